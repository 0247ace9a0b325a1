"""Cached states: the same on disk as in memory, and of some texts as of all."""

from __future__ import annotations

import random
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from app.domain import Encoding
from app.engine.backbone import Backbone
from app.errors import DataError
from app.learning.cache import CachePlan, StateCache, build_cache, states_at
from tests.learning.samples import VOCABULARY

PLAN = CachePlan(read_layers=(1, 2, 3), fork_layer=2)
BARE = CachePlan(read_layers=(1, 3))


@pytest.fixture(scope="module")
def encodings() -> list[Encoding]:
    source = random.Random(0)
    texts = [tuple(source.choices(range(5, len(VOCABULARY)), k=source.randint(3, 30))) for _ in range(40)]
    return [Encoding(ids, (0,) * len(ids)) for ids in texts]


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
    backbone: Backbone, encodings: list[Encoding], folder: Path, plan: CachePlan
) -> None:
    in_memory = build_cache(backbone, encodings, plan)
    assert mapped_bytes(folder) == 0
    on_disk = build_cache(backbone, encodings, plan, max_bytes=1000)
    flat = {*plan.cached_reads, plan.fork_layer} - {None}
    assert mapped_bytes(folder) >= len(flat) * in_memory.num_tokens * backbone.spec.hidden_size * 2
    assert equal(in_memory, on_disk)
    assert list(folder.iterdir()) == []
    del on_disk
    assert mapped_bytes(folder) == 0


def test_what_just_fits_stays_in_memory(backbone: Backbone, encodings: list[Encoding], folder: Path) -> None:
    needed = 2 * sum(map(len, encodings)) * backbone.spec.hidden_size * 2
    kept = build_cache(backbone, encodings, BARE, max_bytes=needed)
    assert mapped_bytes(folder) == 0
    spilled = build_cache(backbone, encodings, BARE, max_bytes=needed - 1)
    assert mapped_bytes(folder) > 0
    assert equal(kept, spilled)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_on_the_disk(backbone: Backbone, encodings: list[Encoding], folder: Path) -> None:
    needed = 2 * sum(map(len, encodings)) * backbone.spec.hidden_size * 2
    with pytest.raises(DataError) as raised, largest_file(1000):
        build_cache(backbone, encodings, BARE, max_bytes=0)
    sentence = str(raised.value)
    assert f"need {needed:,} bytes of disk" in sentence and str(folder) in sentence
    assert "TMPDIR" in sentence and "--read-layers" in sentence
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
