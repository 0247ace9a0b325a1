"""Graphs of trunks: the same scores, whatever a replay has written before. What a GPU captures is run again here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from app.engine.engine import Engine
from app.engine.graphs import MOST_TOKENS, TrunkGraphs, run_trunk
from tests.engine.models import FAMILY_NAMES, assert_close, make_artifact, random_encoding, run, tiny_backbone

MakeEngine = Callable[..., Engine]
KINDS: tuple[dict[str, object], ...] = (
    {},
    {"readout": "attention", "layers": [1, 3], "num_queries": 3, "hidden": 6},
    {"readout": "cls"},
    {"readout": "tokens", "layers": [2, 3], "problem_type": "token_classification"},
    {"prefixes": [(7, 2)]},
    {"prefixes": [(4, 3)], "readout": "attention", "layers": [2, 3, 4], "num_queries": 2},
    {"readout": "matching", "layers": [1, 3], "num_queries": 2, "hidden": 6},
    {"readout": "attention", "layers": [2, 4], "num_queries": 2, "hidden": 6, "num_members": 3},
)


class Rerun:
    """A capture for machines without CUDA: the replay writes into the same tensors, as a graph's would."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, run: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
        self.captures += 1
        states = run()

        def replay() -> None:
            self.replays += 1
            for state, new in zip(states, run(), strict=True):
                state.copy_(new)

        return replay, states


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_replay_gives_the_scores_of_the_layers(family: str, make_engine: MakeEngine) -> None:
    plain, graphed, capture = make_engine(family), make_engine(family), Rerun()
    graphed._graphs = TrunkGraphs(graphed.backbone, capture)
    versions = []
    for seed, options in enumerate(KINDS):
        artifact = make_artifact(plain.spec, f"task{seed}", seed=seed, **options)
        plain.load(artifact)
        graphed.load(artifact)
        versions.append(artifact.version(1))
    for tasks in (versions, versions[:4], versions[4:]):
        for lengths in ((9,), (9,), (16,), (16,), (5, 9, 16), (3, 9, 11), (12,), (90,), (94,)):
            asked = [(random_encoding(n, seed, pair=seed == 1), tasks) for seed, n in enumerate(lengths)]
            for one, other in zip(run(graphed, *asked), run(plain, *asked), strict=True):
                for mine, theirs in zip(one, other, strict=True):
                    assert_close(mine.scores, theirs.scores)
                    assert mine.tags == theirs.tags
    assert 0 < capture.captures <= capture.replays


def test_a_shape_is_captured_when_it_comes_again() -> None:
    capture = Rerun()
    graphs = TrunkGraphs(tiny_backbone("bert"), capture)
    ids = torch.randint(5, 100, (2, 16))
    with torch.inference_mode():
        assert graphs.run(ids, torch.zeros_like(ids), None, 2) is None
        first = graphs.run(ids, torch.zeros_like(ids), None, 2)
        assert first is not None and len(first) == 2
        assert graphs.run(ids, torch.zeros_like(ids), None, 3) is None, "another depth is another shape"
    assert (capture.captures, len(graphs)) == (1, 1)


def test_padding_is_seen_by_no_token() -> None:
    backbone, capture = tiny_backbone("bert"), Rerun()
    graphs = TrunkGraphs(backbone, capture)
    graphs.warm((1,), (16,), 2)
    ids = torch.randint(5, 100, (1, 16))
    mask = torch.arange(16).unsqueeze(0) < 10
    with torch.inference_mode():
        found = graphs.run(ids, torch.zeros_like(ids), mask, 2)
        alone = run_trunk(backbone, ids[:, :10], torch.zeros_like(ids[:, :10]), None, 2)
    assert found is not None and capture.captures == 2
    torch.testing.assert_close(found[-1][:, :10], alone[-1], rtol=0, atol=1e-5)


def test_large_batches_and_other_rows_keep_their_widths() -> None:
    graphs = TrunkGraphs(tiny_backbone("bert"), Rerun())
    assert [graphs.padded(1, n) for n in (1, 16, 17, 90, 96)] == [16, 16, 32, 96, 96]
    assert graphs.padded(MOST_TOKENS // 16, 9) == 16
    assert graphs.padded(MOST_TOKENS // 16 + 1, 9) == 9
    ids = torch.zeros(MOST_TOKENS // 16 + 1, 16, dtype=torch.long)
    assert all(graphs.run(ids, ids, None, 2) is None for _ in range(3))


def test_the_graph_that_was_not_used_for_longest_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.engine.graphs._MOST_GRAPHS", 2)
    capture = Rerun()
    graphs = TrunkGraphs(tiny_backbone("bert"), capture)
    graphs.warm((1,), (16,), 1)
    graphs.warm((1,), (32,), 1)
    ids = torch.zeros(1, 32, dtype=torch.long)
    with torch.inference_mode():
        assert graphs.run(ids, ids, None, 1) is not None
        assert graphs.run(ids[:, :16], ids[:, :16], None, 1) is None
    assert len(graphs) == 2


def test_layers_that_cannot_be_captured_run_without(caplog: pytest.LogCaptureFixture) -> None:
    attempts = []

    def fail(run: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
        attempts.append(run)
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs = TrunkGraphs(tiny_backbone("bert"), fail)
    graphs.warm((1,), (16, 32), 2)
    ids = torch.zeros(1, 16, dtype=torch.long)
    assert all(graphs.run(ids, ids, None, 2) is None for _ in range(3))
    assert len(attempts) == 1 and "run without" in caplog.text
