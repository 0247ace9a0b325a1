"""The whole backbone fine-tuned: it learns in either precision, and its logits stand in the order of the texts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from app.engine.backbone import Backbone
from app.engine.tokenizer import TextTokenizer
from app.learning.finetune import FinetuneSettings, Texts, WholeModel, finetune, whole_logits
from app.learning.problems import IGNORED
from app.learning.study import Study, Tables
from tests.learning import samples
from tests.learning.test_learn import Silent, files_of, tagged_files

CPU = torch.device("cpu")


def study_of(tmp_path: Path, backbone: Backbone, is_token: bool) -> Study:
    files = tagged_files(tmp_path) if is_token else files_of(tmp_path, samples.single_rows)
    return Study(Tables.read(files, None), backbone, TextTokenizer(backbone.path), Silent())


@pytest.mark.parametrize("is_token", [False, True])
def test_logits_stand_in_the_order_of_the_texts(tmp_path: Path, backbone: Backbone, is_token: bool) -> None:
    study = study_of(tmp_path, backbone, is_token)
    texts = Texts(*study.texts("train"))
    assert len(set(texts.lengths.tolist())) > 1
    torch.manual_seed(0)
    model = WholeModel(backbone.path, study.tables.num_outputs, is_token)
    together, targets, _ = whole_logits(model, texts, CPU)
    each = torch.split(texts.targets, texts.lengths.tolist()) if is_token else torch.split(texts.targets, 1)
    alone = [whole_logits(model, Texts([one], gold), CPU) for one, gold in zip(texts.encodings, each, strict=True)]
    torch.testing.assert_close(together, torch.cat([logits for logits, _, _ in alone]), rtol=0, atol=1e-5)
    assert torch.equal(targets, texts.targets[texts.targets != IGNORED] if is_token else texts.targets)


def test_a_large_dev_set_is_looked_at_no_longer_than_is_trained(tmp_path: Path, backbone: Backbone) -> None:
    study = study_of(tmp_path, backbone, is_token=False)
    train, dev = (Texts(*study.texts(name)) for name in ("train", "dev"))
    few = Texts(train.encodings[:5], train.targets[:5])
    assert len(dev.encodings) == 60
    kind, labels = study.tables.problem_type, study.tables.labels
    for epochs, expected in ((18, [4, 8, 12, 16, 18]), (9, [2, 4, 6, 8, 9]), (4, [1, 2, 3, 4])):
        told: dict[int, float | None] = {}
        settings = FinetuneSettings(epochs=epochs)
        tuned = finetune(backbone.path, (few, dev), kind, labels, settings, CPU, told.__setitem__)
        assert list(told) == list(range(1, epochs + 1))
        # 20 rows are trained between, each of which counts as three of dev; but four looks at least
        assert [epoch for epoch, dev_measure in told.items() if dev_measure is not None] == expected
        assert tuned.tokens == epochs * int(few.lengths.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns_in_either_precision(tmp_path: Path, backbone: Backbone, dtype: torch.dtype) -> None:
    study = study_of(tmp_path, backbone, is_token=False)
    both = Texts(*study.texts("train")), Texts(*study.texts("dev"))
    settings = FinetuneSettings(epochs=6, batch_size=16, learning_rate=3e-3, head_learning_rate=1e-2)
    kind, labels = study.tables.problem_type, study.tables.labels
    tuned = finetune(backbone.path, both, kind, labels, settings, CPU, dtype=dtype)
    assert tuned.dev > 0.9
    assert {parameter.dtype for parameter in tuned.model.parameters()} == {torch.float32}
    assert whole_logits(tuned.model, both[1], CPU)[0].dtype is torch.float32
