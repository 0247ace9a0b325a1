"""Steps of training: torch's own loop takes the same ones, and so do graphs. What a GPU captures is run again here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from app.domain import ReadoutKind
from app.engine.backbone import Backbone
from app.engine.tokenizer import TextTokenizer
from app.learning import multitask, steps, trainer
from app.learning.finetune import PaddedTexts, Texts
from app.learning.steps import Shape, Steps
from app.learning.study import Study, Tables
from tests.learning import samples
from tests.learning.test_learn import Silent, files_of, recipe
from tests.learning.test_multitask import recipes, studies  # noqa: F401 - a fixture

_ROWS, _WIDTH, _BATCH = 60, 6, 8
_CPU = torch.device("cpu")


class Rerun:
    """A capture for machines without CUDA: the call is not done now, and once for each replay."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            run()

        return replay


class _Problem:
    """Texts of numbers, of which a linear layer tells the mean."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.lengths = torch.randint(1, 20, (_ROWS,), generator=generator)
        self.values = torch.randn(_ROWS, 24, _WIDTH, generator=generator)
        self.targets = torch.randn(_ROWS, generator=generator)
        self.model = nn.Linear(_WIDTH, 1)
        self.groups = [
            {"params": [self.model.weight], "lr": 0.05, "weight_decay": 0.1},
            {"params": [self.model.bias], "lr": 0.2, "weight_decay": 0.0},
        ]
        self.batches = [torch.randperm(_ROWS, generator=generator)[:_BATCH] for _ in range(40)]

    def loss(self, texts: Tensor, width: int | None) -> Tensor:
        lengths = self.lengths[texts]
        size = int(lengths.max()) if width is None else width
        mask = (torch.arange(size) < lengths.unsqueeze(1)).float()
        means = (self.values[texts, :size] * mask.unsqueeze(2)).sum(1) / lengths.unsqueeze(1)
        return (self.model(means).squeeze(1) - self.targets[texts]).square().mean()

    def trained(self, taken: Steps) -> float:
        with taken.round():
            for texts in self.batches:
                taken.take(texts, self.loss, taken.shape(texts, self.lengths))
        return taken.mean_loss()


@pytest.fixture
def problem() -> _Problem:
    torch.manual_seed(0)
    return _Problem()


def same(one: nn.Module, other: nn.Module, atol: float = 0.0) -> None:
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=atol)


def test_the_steps_are_those_of_torchs_own_loop(problem: _Problem) -> None:
    theirs = copy.deepcopy(problem)
    optimizer = torch.optim.AdamW(theirs.groups)
    rising, total = 4, 40

    def factor(step: int) -> float:
        return (step + 1) / rising if step < rising else (total - step) / (total - rising)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses = []
    for texts in theirs.batches:
        loss = theirs.loss(texts, None)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(theirs.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    taken = Steps(problem.model, problem.groups, total, 0.1)
    assert problem.trained(taken) == pytest.approx(sum(losses) / len(losses), abs=1e-12)
    same(problem.model, theirs.model)
    assert taken.mean_loss() == 0.0  # of the steps since


def test_graphs_take_the_same_steps(problem: _Problem) -> None:
    one_by_one, capture = copy.deepcopy(problem), Rerun()
    losses = [
        one_by_one.trained(Steps(one_by_one.model, one_by_one.groups, 40, 0.1)),
        problem.trained(Steps(problem.model, problem.groups, 40, 0.1, capture=capture)),
    ]
    same(problem.model, one_by_one.model, 1e-6)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    widths = {-(-int(problem.lengths[texts].max()) // 8) * 8 for texts in problem.batches}
    assert 1 <= capture.captures <= len(widths) and capture.replays >= len(problem.batches) - 2 * len(widths) > 0


def test_a_shape_is_rounded_up_but_not_beyond_the_longest_of_all(problem: _Problem) -> None:
    taken = Steps(problem.model, problem.groups, 40, 0.1, capture=Rerun())
    lengths = torch.tensor([1, 3, 8, 9, 12])
    shapes = [taken.shape(torch.tensor(texts), lengths, "a") for texts in ([0], [0, 1], [2], [3, 0])]
    assert shapes == [Shape("a", 1, 8), Shape("a", 2, 8), Shape("a", 1, 8), Shape("a", 2, 12)]
    assert taken.shape(torch.tensor([0]), torch.ones(4, dtype=torch.long)) == Shape("", 1, 1)
    assert Steps(problem.model, problem.groups, 40, 0.1).shape(torch.tensor([0]), lengths) is None


def test_what_cannot_be_captured_is_trained_all_the_same(problem: _Problem, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(_: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    one_by_one = copy.deepcopy(problem)
    one_by_one.trained(Steps(one_by_one.model, one_by_one.groups, 40, 0.1))
    problem.trained(Steps(problem.model, problem.groups, 40, 0.1, capture=refuse))
    same(problem.model, one_by_one.model, 1e-6)
    assert [record.levelname for record in caplog.records] == ["ERROR"]  # once


def test_graphs_are_bounded(problem: _Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "_MOST_GRAPHS", 1)
    monkeypatch.setattr(steps, "_WIDTH_STEP", 1)
    one_by_one, capture = copy.deepcopy(problem), Rerun()
    one_by_one.trained(Steps(one_by_one.model, one_by_one.groups, 40, 0.1))
    problem.trained(Steps(problem.model, problem.groups, 40, 0.1, capture=capture))
    same(problem.model, one_by_one.model, 1e-6)
    assert capture.captures == 1


@pytest.mark.parametrize("arrangement", ["mean", "attention", "matching", "prefix"])
def test_a_task_is_learned_the_same_from_graphs(
    arrangement: str, tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = samples.pair_rows if arrangement == "matching" else samples.single_rows
    study = Study(Tables.read(files_of(tmp_path, rows), None), backbone, TextTokenizer(backbone.path), Silent())
    asked = {
        "mean": {"readout": ReadoutKind.MEAN, "hidden": 0},
        "attention": {"readout": ReadoutKind.ATTENTION},
        "matching": {"readout": ReadoutKind.MATCHING},
        "prefix": {"readout": ReadoutKind.MEAN, "hidden": 0, "num_virtual_tokens": 4, "first_layer": 1},
    }[arrangement]
    completed = study.completed(recipe(epochs=3, dropout=0.0, patience=0, **asked))
    plain = study.fit(completed)
    capture = Rerun()
    monkeypatch.setattr(trainer, "Steps", partial(Steps, capture=capture))
    graphed = study.fit(completed)
    assert capture.replays > capture.captures > 0
    same(graphed.model, plain.model, 1e-4)
    logits = [study.logits(each, "dev")[0] for each in (plain, graphed)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-3)


def test_a_shared_prefix_is_learned_the_same_from_graphs(
    studies: dict[str, Study],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = recipes(studies, epochs=2)
    plain, _ = multitask.train_shared_prefix(studies, asked)
    capture = Rerun()
    monkeypatch.setattr(multitask, "Steps", partial(Steps, capture=capture))
    graphed, _ = multitask.train_shared_prefix(studies, asked)
    assert capture.replays > capture.captures > 1
    torch.testing.assert_close(graphed, plain, rtol=0, atol=1e-4)


def test_padded_texts_are_the_texts(tmp_path: Path, backbone: Backbone) -> None:
    study = Study(
        Tables.read(files_of(tmp_path, samples.pair_rows), None), backbone, TextTokenizer(backbone.path), Silent()
    )
    texts = Texts(*study.texts("train"))
    batches, chosen = PaddedTexts(texts, _CPU), torch.tensor([5, 2, 9])
    encodings = [texts.encodings[row] for row in chosen.tolist()]
    longest = max(map(len, encodings))
    for width in (None, longest + 3):
        ids, types, mask, targets = batches.of(chosen, width)
        size = longest if width is None else width
        assert ids.tolist() == [[*e.input_ids, *[0] * (size - len(e))] for e in encodings]
        assert types.tolist() == [[*e.token_type_ids, *[0] * (size - len(e))] for e in encodings]
        assert mask.sum(dim=1).tolist() == [len(e) for e in encodings]
        assert torch.equal(targets, texts.targets[chosen])
