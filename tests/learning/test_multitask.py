"""Training on several source tasks at once: a shared prefix, and the whole backbone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from app.domain import ReadoutKind
from app.engine.backbone import Backbone
from app.engine.tokenizer import TextTokenizer
from app.learning.cache import CachePlan
from app.learning.finetune import FinetuneSettings
from app.learning.multitask import finetune_together, train_shared_prefix, write_prefix
from app.learning.problems import dev_figure, loss_of
from app.learning.recipe import Recipe
from app.learning.study import Files, Quiet, Study, Tables
from tests.learning import samples


def study(folder: Path, name: str, backbone: Backbone, count: int) -> Study:
    source = random.Random(0)
    rows, header = {
        "single": (samples.single_rows, ("text", "label")),
        "multi": (samples.multi_rows, ("text", "labels")),
        "pair": (samples.pair_rows, ("text_a", "text_b", "label")),
    }[name]
    paths = [folder / f"{name}-{split}.tsv" for split in ("train", "dev", "test")]
    for path, size in zip(paths, (count, 60, 60), strict=True):
        samples.write_rows(path, header, rows(source, size))
    return Study(Tables.read(Files(*paths), None), backbone, TextTokenizer(backbone.path), Quiet())


@pytest.fixture
def studies(tmp_path: Path, backbone: Backbone) -> dict[str, Study]:
    return {
        name: study(tmp_path, name, backbone, count) for name, count in (("single", 160), ("multi", 80), ("pair", 80))
    }


def recipes(studies: dict[str, Study], epochs: int) -> dict[str, Recipe]:
    return {
        name: study.completed(
            Recipe(
                task=name,
                readout=ReadoutKind.MEAN,
                hidden=0,
                first_layer=1,
                num_virtual_tokens=4,
                epochs=epochs,
                patience=0,
                batch_size=16,
                learning_rate=2e-2,
                prefix_learning_rate=3e-2,
                dropout=0.0,
            )
        )
        for name, study in studies.items()
    }


def loss(study: Study, logits: torch.Tensor) -> float:
    return float(loss_of(study.tables.problem_type, logits, study.texts("train")[1]))


def test_a_shared_prefix_lowers_the_loss_of_every_source(studies: dict[str, Study]) -> None:
    _, few = train_shared_prefix(studies, recipes(studies, 1))
    told: list[float] = []
    prefix, many = train_shared_prefix(studies, recipes(studies, 20), lambda _, dev: told.append(dev))
    for name, one in studies.items():
        assert loss(one, many.logits(name, "train")) < 0.85 * loss(one, few.logits(name, "train"))
    assert prefix.shape[3] == 3 * 4
    assert many.num_parameters == prefix.numel()
    assert len(told) == 20 and max(told) == pytest.approx(sum(many.dev.values()) / 3)


def test_the_kept_epoch_is_the_one_that_is_reported(studies: dict[str, Study]) -> None:
    _, done = train_shared_prefix(studies, recipes(studies, 4))
    for name, one in studies.items():
        kind, targets = one.tables.problem_type, one.texts("dev")[1]
        assert dev_figure(kind, done.logits(name, "dev"), targets, one.tables.labels, ()) == done.dev[name]


def test_a_shared_prefix_can_be_read_like_any_other(studies: dict[str, Study], tmp_path: Path) -> None:
    one = studies["single"]
    prefix, _ = train_shared_prefix(studies, recipes(studies, 1))
    write_prefix(tmp_path / "shared", "shared", prefix, 1, one.backbone.spec)
    fitted = one.fit(one.completed(Recipe(task="head", prefixes=(tmp_path / "shared",), epochs=2)), lambda *_: None)
    (frozen,) = fitted.frozen.prefixes
    assert frozen.first_layer == 1
    assert torch.allclose(frozen.vectors, prefix, atol=1e-3)


def test_a_seed_fixes_the_result(studies: dict[str, Study]) -> None:
    first, _ = train_shared_prefix(studies, recipes(studies, 1))
    second, _ = train_shared_prefix(studies, recipes(studies, 1))
    assert torch.equal(first, second)


def test_the_whole_backbone_learns_every_source_and_becomes_another(
    studies: dict[str, Study], backbone: Backbone, tmp_path: Path
) -> None:
    before = backbone.spec.fingerprint
    settings = FinetuneSettings(epochs=6, batch_size=16, learning_rate=3e-3, head_learning_rate=1e-2)
    network, done = finetune_together(studies, settings)
    assert done.dev["single"] > 0.9 and done.dev["pair"] > 0.9
    num_tokens = sum(len(e) for one in studies.values() for e in one.texts("train")[0])
    assert done.tokens > 3 * num_tokens
    network.save_pretrained(tmp_path / "tuned")
    tuned = Backbone.load(str(tmp_path / "tuned"), "cpu", "float32")
    assert tuned.spec.fingerprint != before
    one = studies["single"]
    other = Study(one.tables, tuned, one.tokenizer, Quiet())
    plan = CachePlan((3,))
    bare, changed = (s.split(plan, "dev").cache.reads[3].float() for s in (one, other))
    assert (bare - changed).abs().mean() > 0.1
