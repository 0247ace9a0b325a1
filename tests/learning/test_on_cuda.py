"""Learning on a CUDA device: graphs are captured, and what they learn is what the CPU learns. Skipped without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from app.domain import ReadoutKind
from app.engine.backbone import Backbone
from app.engine.tokenizer import TextTokenizer
from app.learning import multitask, steps
from app.learning.finetune import FinetuneSettings, Texts, finetune
from app.learning.study import Study, Tables
from tests.learning import samples
from tests.learning.test_learn import Silent, files_of, recipe, tagged_files
from tests.learning.test_multitask import recipes, study

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.fixture
def backbones(model_path: Path) -> list[Backbone]:
    return [Backbone.load(str(model_path), device, "float32") for device in ("cpu", "cuda")]


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    made: list[Callable[[], None]] = []
    capture = steps._Capturing.__call__

    def counted(self: steps._Capturing, run: Callable[[], None]) -> Callable[[], None]:
        made.append(capture(self, run))
        return made[-1]

    monkeypatch.setattr(steps._Capturing, "__call__", counted)
    return made


@pytest.mark.parametrize("arrangement", ["mean", "attention", "matching", "prefix", "tokens"])
def test_a_task_is_learned_as_on_the_cpu(
    arrangement: str, tmp_path: Path, backbones: list[Backbone], captures: list[Callable[[], None]]
) -> None:
    rows = samples.pair_rows if arrangement == "matching" else samples.single_rows
    files = tagged_files(tmp_path) if arrangement == "tokens" else files_of(tmp_path, rows)
    asked = {
        "mean": {"readout": ReadoutKind.MEAN, "hidden": 0},
        "attention": {"readout": ReadoutKind.ATTENTION},
        "matching": {"readout": ReadoutKind.MATCHING},
        "prefix": {"readout": ReadoutKind.MEAN, "hidden": 0, "num_virtual_tokens": 4, "first_layer": 1},
        "tokens": {"readout": ReadoutKind.TOKENS},
    }[arrangement]
    logits = []
    for backbone in backbones:
        own = Study(Tables.read(files, None), backbone, TextTokenizer(backbone.path), Silent())
        fitted = own.fit(own.completed(recipe(epochs=3, dropout=0.0, patience=0, **asked)))
        logits.append(own.logits(fitted, "dev")[0])
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=2e-2)
    assert bool(captures) == (arrangement != "tokens") and steps._Capturing.is_possible


def test_a_shared_prefix_and_a_backbone_are_learned(
    tmp_path: Path, backbones: list[Backbone], captures: list[Callable[[], None]]
) -> None:
    prefixes = []
    for backbone in backbones:
        studies = {name: study(tmp_path, name, backbone, 96) for name in ("single", "multi", "pair")}
        prefixes.append(multitask.train_shared_prefix(studies, recipes(studies, epochs=3))[0])
    torch.testing.assert_close(prefixes[1], prefixes[0], rtol=0, atol=2e-2)
    assert captures
    captures.clear()
    _, done = multitask.finetune_together(studies, FinetuneSettings(epochs=3, batch_size=16))
    assert captures and all(0 <= dev <= 1 for dev in done.dev.values())


def test_a_backbone_learns_from_graphs(
    tmp_path: Path, backbones: list[Backbone], captures: list[Callable[[], None]]
) -> None:
    backbone = backbones[1]
    own = Study(
        Tables.read(files_of(tmp_path, samples.single_rows), None), backbone, TextTokenizer(backbone.path), Silent()
    )
    both = Texts(*own.texts("train")), Texts(*own.texts("dev"))
    settings = FinetuneSettings(epochs=6, batch_size=16, learning_rate=3e-3, head_learning_rate=1e-2)
    kind, labels = own.tables.problem_type, own.tables.labels
    for dtype in (torch.float32, torch.bfloat16):
        captures.clear()
        tuned = finetune(backbone.path, both, kind, labels, settings, backbone.device, dtype=dtype)
        assert captures and tuned.dev > 0.9


def test_an_interrupted_training_keeps_its_best(tmp_path: Path, backbones: list[Backbone]) -> None:
    backbone = backbones[1]
    own = Study(
        Tables.read(files_of(tmp_path, samples.single_rows), None), backbone, TextTokenizer(backbone.path), Silent()
    )

    def interrupt(epoch: object, measure: str) -> None:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(epoch)

    seen: list[object] = []
    fitted = own.fit(own.completed(recipe(epochs=4, patience=0, readout=ReadoutKind.ATTENTION)), interrupt)
    assert fitted.was_interrupted and bool(torch.isfinite(own.logits(fitted, "dev")[0]).all())
