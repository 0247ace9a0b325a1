"""Cached states: the same on disk as in memory, and of some texts as of all."""

from __future__ import annotations

import random
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from app.domain import Encoding
from app.engine.backbone import Backbone
from app.engine.tokenizer import TextTokenizer
from app.errors import DataError
from app.learning import cache as cache_module
from app.learning.cache import CachePlan, Memory, StateCache, build_cache, states_at
from app.learning.rows import LayerPrefix, differentiable_attention, run_layers
from app.learning.study import Files, Quiet, Study, Tables
from app.learning.trainer import Split
from tests.learning import samples
from tests.learning.samples import VOCABULARY

PLAN = CachePlan(read_layers=(1, 2, 3), fork_layer=2)
BARE = CachePlan(read_layers=(1, 3))


@pytest.fixture(scope="module")
def encodings() -> list[Encoding]:
    source = random.Random(0)
    texts = [tuple(source.choices(range(5, len(VOCABULARY)), k=source.randint(3, 30))) for _ in range(40)]
    return [Encoding(ids, (0,) * len(ids)) for ids in texts]


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    """In which nothing lies yet."""
    fresh = Memory()
    monkeypatch.setattr(cache_module, "MEMORY", fresh)
    return fresh


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def mapped_bytes(folder: Path) -> int:
    """Of this process's memory, what lies in deleted or unnamed files of `folder`."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if f" {folder}/" in line:
            start, end = (int(side, 16) for side in line.split()[0].split("-"))
            total += end - start
    return total


def equal(one: StateCache, other: StateCache) -> bool:
    assert one.reads.keys() == other.reads.keys() and (one.fork is None) == (other.fork is None)
    same = all(torch.equal(one.reads[layer], other.reads[layer]) for layer in one.reads)
    return same and (one.fork is None or other.fork is None or torch.equal(one.fork, other.fork))


@pytest.mark.parametrize("plan", [PLAN, BARE, CachePlan((1,), 0), CachePlan((), 0)])
def test_states_on_disk_are_those_in_memory(
    backbone: Backbone, encodings: list[Encoding], folder: Path, memory: Memory, plan: CachePlan
) -> None:
    in_memory = build_cache(backbone, encodings, plan)
    assert mapped_bytes(folder) == 0
    memory.max_bytes = 1000
    on_disk = build_cache(backbone, encodings, plan)
    flat = {*plan.cached_reads, plan.fork_layer} - {None}
    assert mapped_bytes(folder) >= len(flat) * in_memory.num_tokens * backbone.spec.hidden_size * 2
    assert equal(in_memory, on_disk)
    assert list(folder.iterdir()) == []
    del on_disk
    assert mapped_bytes(folder) == 0


def size_of(encodings: list[Encoding], backbone: Backbone) -> int:
    """Bytes of the states of two layers."""
    return 2 * sum(map(len, encodings)) * backbone.spec.hidden_size * 2


def test_what_just_fits_stays_in_memory(
    backbone: Backbone, encodings: list[Encoding], folder: Path, memory: Memory
) -> None:
    memory.max_bytes = size_of(encodings, backbone)
    kept = build_cache(backbone, encodings, BARE)
    assert mapped_bytes(folder) == 0
    memory.max_bytes = 2 * size_of(encodings, backbone) - 1
    spilled = build_cache(backbone, encodings, BARE)
    assert mapped_bytes(folder) > 0
    assert equal(kept, spilled)


def test_a_text_that_stands_there_twice_is_run_once(backbone: Backbone, encodings: list[Encoding]) -> None:
    told: list[int] = []
    cache = build_cache(backbone, [*encodings, *encodings[::2]], PLAN, told.append)
    assert cache.extents.starts.tolist() == [*cache.extents.starts[:40].tolist(), *cache.extents.starts[:40:2].tolist()]
    assert cache.fork is not None and len(cache.fork) == sum(map(len, encodings))
    assert sum(told) == 60
    once = build_cache(backbone, encodings, PLAN)
    assert equal(cache.subset(torch.arange(40)), once) and torch.equal(cache.lengths[:40], once.lengths)


def test_pairs_of_the_same_tokens_begin_where_they_do(backbone: Backbone, encodings: list[Encoding]) -> None:
    pairs = [replace(encodings[0], pair_start=start) for start in (2, 1, 2)]
    cache = build_cache(backbone, pairs, PLAN)
    assert cache.gather(torch.arange(3)).pair_starts.tolist() == [2, 1, 2]
    assert cache.extents.starts[0] == cache.extents.starts[2] != cache.extents.starts[1]


def test_texts_of_words_have_states_of_their_own(backbone: Backbone, encodings: list[Encoding]) -> None:
    """Equal ones may have different tags, token by token."""
    worded = [replace(encoding, word_ids=tuple(range(len(encoding)))) for encoding in (*encodings, *encodings)]
    cache = build_cache(backbone, worded, PLAN)
    assert len(set(cache.extents.starts.tolist())) == 80
    assert cache.fork is not None and len(cache.fork) == sum(map(len, worded))


def test_caches_that_are_there_together_share_what_may_lie_in_memory(
    backbone: Backbone, encodings: list[Encoding], folder: Path, memory: Memory
) -> None:
    needed = size_of(encodings, backbone)
    memory.max_bytes = needed + 1
    first = build_cache(backbone, encodings, BARE)
    second = build_cache(backbone, encodings, BARE)
    assert mapped_bytes(folder) >= needed, "the first is still there"
    assert equal(first, second)
    del first, second
    assert mapped_bytes(folder) == 0
    third = build_cache(backbone, encodings, BARE)
    assert mapped_bytes(folder) == 0 and len(third) == len(encodings), "what the first took is free again"


def test_pooled_states_take_their_part_of_it(
    backbone: Backbone, encodings: list[Encoding], folder: Path, memory: Memory
) -> None:
    cache = build_cache(backbone, encodings, BARE)
    memory.max_bytes = 1000
    pooled = Split(cache, torch.zeros(len(encodings))).pooled(backbone.device).cache
    assert mapped_bytes(folder) >= 2 * len(encodings) * backbone.spec.hidden_size * 4
    memory.max_bytes = 10**9
    assert equal(pooled, Split(cache, torch.zeros(len(encodings))).pooled(backbone.device).cache)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_on_the_disk(backbone: Backbone, encodings: list[Encoding], folder: Path, memory: Memory) -> None:
    needed = size_of(encodings, backbone)
    memory.max_bytes = 0
    with pytest.raises(DataError) as raised, largest_file(1000):
        build_cache(backbone, encodings, BARE)
    sentence = str(raised.value)
    assert f"need {needed:,} bytes of disk" in sentence and str(folder) in sentence
    assert "TMPDIR" in sentence and "--memory" in sentence and "--read-layers" in sentence
    assert list(folder.iterdir()) == []


def test_a_subset_reads_the_states_of_its_texts(backbone: Backbone, encodings: list[Encoding]) -> None:
    cache = build_cache(backbone, encodings, PLAN)
    texts = torch.tensor([31, 4, 17])
    subset = cache.subset(texts)
    assert len(subset) == 3 and subset.num_tokens == sum(len(encodings[text]) for text in texts.tolist())
    whole, part = cache.gather(texts[[2, 0]]), subset.gather(torch.tensor([2, 0]))
    assert torch.equal(whole.index, part.index) and torch.equal(whole.mask, part.mask)
    assert subset.fork is cache.fork and cache.fork is not None
    first = states_at(cache.fork, part)[0, : len(encodings[17])]
    start = sum(map(len, encodings[:17]))
    assert torch.equal(first, cache.fork[start : start + len(encodings[17])].float())


def test_it_goes_on_from_states_that_are_there(backbone: Backbone, encodings: list[Encoding]) -> None:
    whole = build_cache(backbone, encodings, BARE)
    rest = build_cache(backbone, encodings, CachePlan((3,)), begin=(1, whole.reads[1]))
    assert rest.reads.keys() == {3}
    assert torch.allclose(rest.reads[3].float(), whole.reads[3].float(), atol=5e-3)  # what lies between is in half


def test_a_layer_that_is_asked_for_later_is_computed_from_the_one_below(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = samples.single_rows(random.Random(0), 30)
    path = samples.write_rows(tmp_path / "train.tsv", ("text", "label"), rows)
    study = Study(Tables.read(Files(path, path), None), backbone, TextTokenizer(backbone.path), Quiet())
    run: list[int] = []
    layer = backbone.serve_layer
    monkeypatch.setattr(backbone, "serve_layer", lambda index, *rest: run.append(index) or layer(index, *rest))
    study.split(CachePlan((2,)), "train")
    study.split(CachePlan((2, 3)), "train")
    assert sorted(set(run)) == [0, 1, 2] and run.count(2) == run.count(0)


def test_what_is_trained_through_attends_as_the_engine_does(backbone: Backbone) -> None:
    torch.manual_seed(0)
    spec = backbone.spec
    states, mask = torch.randn(3, 7, spec.hidden_size), torch.ones(3, 7, dtype=torch.bool)
    mask[0, 4:] = False
    prefix = LayerPrefix(1, torch.randn(spec.num_layers - 1, 2, spec.num_heads, 5, spec.head_size, requires_grad=True))
    layers = range(1, spec.num_layers)
    with differentiable_attention(backbone):
        *_, (_, trained) = run_layers(backbone, states, mask, layers, [prefix])
    *_, (_, served) = run_layers(backbone, states, mask, layers, [prefix])
    assert torch.allclose(trained[mask], served[mask], atol=1e-5)
    trained[mask].sum().backward()
    assert prefix.vectors.grad is not None and prefix.vectors.grad.abs().sum() > 0
