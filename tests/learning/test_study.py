"""States of a task's texts: each layer of each text runs once, whoever reads it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from app.engine.backbone import Backbone
from app.engine.tokenizer import TextTokenizer
from app.learning.cache import CachePlan, build_cache
from app.learning.learn import learn
from app.learning.rows import LayerPrefix
from app.learning.study import Study, Tables
from tests.learning import samples
from tests.learning.test_learn import Silent, files_of, recipe

COUNT = 24


@pytest.fixture
def study(tmp_path: Path, backbone: Backbone) -> Study:
    files = files_of(tmp_path, samples.single_rows, count=COUNT)
    return Study(Tables.read(files, None), backbone, TextTokenizer(backbone.path), Silent())


@pytest.fixture
def rows_run(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Layer → rows that ran through it."""
    counts: Counter[int] = Counter()
    serve = backbone.serve_layer

    def counted(index: int, states: torch.Tensor, *rest: Any) -> torch.Tensor:
        counts[index] += len(states)
        return serve(index, states, *rest)

    monkeypatch.setattr(backbone, "serve_layer", counted)
    return counts


def prefix_of(backbone: Backbone, first_layer: int, digest: str) -> LayerPrefix:
    spec = backbone.spec
    generator = torch.Generator().manual_seed(first_layer)
    shape = (spec.num_layers - first_layer, 2, spec.num_heads, 3, spec.head_size)
    return LayerPrefix(first_layer, torch.randn(shape, generator=generator), digest)


def distinct(study: Study) -> int:
    return len({encoding.input_ids for encoding in study.texts("train")[0]})


def test_below_their_prefixes_tasks_share_the_bare_trunk(
    study: Study, backbone: Backbone, rows_run: Counter[int]
) -> None:
    prefixes = [prefix_of(backbone, first, str(first)) for first in (1, 2)]
    plans = [
        CachePlan((1, 3)),
        CachePlan((1, 3), prefixes=(prefixes[0],)),
        CachePlan((1, 2, 3), prefixes=(prefixes[1],)),
    ]
    plans.append(CachePlan((1, 3), prefixes=tuple(prefixes)))
    splits = [study.split(plan, "train") for plan in plans]
    rows = distinct(study)
    # the second layer: for the trunk, once more as its end was not kept, and for both tuples that begin below it
    assert rows_run == {0: rows, 1: 4 * rows, 2: 4 * rows}
    rows_run.clear()
    for plan, split in zip(plans, splits, strict=True):
        encodings, targets = study.texts("train")
        alone = build_cache(backbone, encodings, plan)
        assert split.cache.reads.keys() == alone.reads.keys()
        assert torch.equal(split.targets, targets)
        for layer, states in alone.reads.items():
            torch.testing.assert_close(split.cache.reads[layer], states, atol=2e-3, rtol=2e-3)


def test_what_is_prepared_together_passes_no_layer_of_the_trunk_twice(
    study: Study, backbone: Backbone, tmp_path: Path, rows_run: Counter[int]
) -> None:
    for first in (1, 2):
        settings: dict[str, Any] = {"num_virtual_tokens": 2, "first_layer": first, "epochs": 1}
        files = files_of(tmp_path, samples.single_rows, 40)
        learn(recipe(**settings), files, tmp_path / f"from{first}", (backbone, backbone), Silent())
    rows_run.clear()
    tuples = [(), (tmp_path / "from2",), (tmp_path / "from1",)]
    study.prepare((study.completed(recipe(prefixes=paths, read_layers=(1, 3))) for paths in tuples), ("train",))
    rows = distinct(study)
    assert rows_run == {0: rows, 1: 2 * rows, 2: 3 * rows}


def test_a_prefix_from_the_first_layer_on_shares_nothing(
    study: Study, backbone: Backbone, rows_run: Counter[int]
) -> None:
    prefix = prefix_of(backbone, 0, "0")
    plan = CachePlan((3,), prefixes=(prefix,), position_offset=prefix.num_virtual_tokens)
    study.split(plan, "train")
    assert rows_run == dict.fromkeys((0, 1, 2), distinct(study))


def test_what_is_read_below_the_prefix_alone_has_targets_too(study: Study, backbone: Backbone) -> None:
    split = study.split(CachePlan((1,), prefixes=(prefix_of(backbone, 2, "2"),)), "train")
    bare = study.split(CachePlan((1,)), "train")
    assert torch.equal(split.cache.reads[1], bare.cache.reads[1]) and torch.equal(split.targets, bare.targets)


def test_a_part_of_the_rows_has_states_from_the_trunk_too(
    study: Study, backbone: Backbone, tmp_path: Path, rows_run: Counter[int]
) -> None:
    settings: dict[str, Any] = {"num_virtual_tokens": 2, "first_layer": 1, "epochs": 1}
    learn(
        recipe(**settings),
        files_of(tmp_path, samples.single_rows, 40),
        tmp_path / "one",
        (backbone, backbone),
        Silent(),
    )
    rows_run.clear()
    part = study.part({"train": range(5)})
    fitted = part.fit(part.completed(recipe(prefixes=(tmp_path / "one",), epochs=1)))
    whole = study.split(CachePlan((1, 2, 3), prefixes=fitted.frozen.prefixes), "train")
    own = part.split(CachePlan((1, 2, 3), prefixes=fitted.frozen.prefixes), "train")
    assert len(own.cache) == 5 and own.cache.reads[3] is whole.cache.reads[3]
    assert rows_run[0] == rows_run[2]
