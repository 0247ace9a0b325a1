"""A batch's layout: which rows stand where at each layer, who forks from whom, and who reads what.

Plans that ask for the same versions form a cohort, and have the same rows. A block is one of those rows for all plans
of its cohort, side by side; so forks, prefixes and reads are slices of the batch, never gathers.
Knows plans and resident versions; holds no tensors, no weights and no requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

from app.domain import Plan, Readout, ReadoutKind, Row
from app.engine.prefix_bank import ResidentPrefix, ResidentVersion

_FIRST_TOKEN = frozenset({ReadoutKind.CLS, ReadoutKind.POOLER})


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """One text's plan with the versions that it was resolved to. Filled on submission."""

    plan: Plan
    residents: tuple[ResidentVersion, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """One row of each plan of a cohort."""

    cohort: int
    index: int  # of the row in its plans
    row: Row
    plans: slice  # of the batch's plans
    prefixes: tuple[ResidentPrefix, ...]

    @property
    def size(self) -> int:
        return int(self.plans.stop - self.plans.start)

    def virtual_tokens(self, layer: int) -> int:
        return sum(p.prefix.num_virtual_tokens for p in self.prefixes if p.prefix.first_layer <= layer)


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a block stands in its chunk's states: rows [start, stop)."""

    block: Block
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows that go through a layer in one call. On a CPU a batch has several, so that what a layer makes fits caches.

    `sources` are the slices of the layer before, (chunk, rows), that these rows come from; empty: from the embeddings.
    """

    placed: tuple[Placed, ...]
    sources: tuple[tuple[int, slice], ...]
    only_first: bool = False  # this is their last layer, and of what it makes only the first token's state is read


LayerStep = tuple[Chunk, ...]


class Padding(Protocol):
    def padded(self, rows: int, tokens: int) -> int:
        """The tokens that rows of at most `tokens` are padded to."""


@dataclass(frozen=True, slots=True, eq=False)
class Readers:
    """Versions of one cohort that read one row in the same way, in the order of their heads.

    What they read stands in one tensor, and so do the scores of heads of one shape.
    """

    cohort: int
    versions: tuple[int, ...]  # of the cohort
    residents: tuple[ResidentVersion, ...]  # theirs
    readout: Readout

    @property
    def num_readouts(self) -> int:
        """Members of all versions."""
        return len(self.versions) * self.readout.num_members


@dataclass(frozen=True, slots=True)
class Read:
    """Who reads one block behind one layer."""

    block: Block
    readers: tuple[Readers, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Cohort:
    """Plans of one batch that ask for the same versions."""

    residents: tuple[ResidentVersion, ...]
    plans: slice
    blocks: tuple[Block, ...] = field(default=())


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    works: tuple[Work, ...]  # cohort by cohort
    cohorts: tuple[Cohort, ...]
    steps: tuple[LayerStep, ...]  # one a layer that runs
    reads: dict[int, tuple[Read, ...]]  # by number of layers passed
    num_tokens: int  # of the longest text: what every row is padded to

    @property
    def num_rows(self) -> int:
        return sum(len(work.plan.rows) for work in self.works)


def lay_out(
    works: Sequence[Work], num_layers: int, chunk_tokens: int | None = None, padding: Padding | None = None
) -> Batch:
    """Arrange any works, of any versions, as one batch, in chunks of about `chunk_tokens` padded tokens."""
    num_tokens = max(len(work.plan.encoding) for work in works)
    if padding is not None:
        num_tokens = padding.padded(len(works), num_tokens)
    chunk_rows = max(1, chunk_tokens // num_tokens) if chunk_tokens is not None else len(works)
    groups = _group(works, chunk_rows)
    cohorts, start = [], 0
    for number, members in enumerate(groups):
        cohorts.append(_cohort(number, members, start))
        start += len(members)
    blocks = [block for cohort in cohorts for block in cohort.blocks]
    reads = _reads(cohorts)
    ends_with_first = _ends_with_first(cohorts, reads)
    return Batch(
        works=tuple(work for members in groups for work in members),
        cohorts=tuple(cohorts),
        steps=tuple(_steps(blocks, num_layers, chunk_rows if chunk_tokens is not None else None, ends_with_first)),
        reads=reads,
        num_tokens=num_tokens,
    )


def shares(batch: Batch) -> dict[str, float]:
    """Each version's part of a batch by its digest, in rows × tokens × layers; they add up to 1.

    Who reads a row pays for it in equal parts; the trunk is paid for by those whose branches fork from it, too.
    """
    costs: dict[str, float] = {}
    for cohort in batch.cohorts:
        from_trunk = [index for block in cohort.blocks if block.row.from_trunk for index in block.row.reads]
        for number, block in enumerate(cohort.blocks):
            readers = {*block.row.reads, *(from_trunk if number == 0 and not block.row.from_trunk else ())}
            layers = block.row.stop_layer - block.row.start_layer
            cost = block.size * layers * (batch.num_tokens + block.virtual_tokens(block.row.stop_layer - 1))
            for index in readers:
                digest = cohort.residents[index].version.digest
                costs[digest] = costs.get(digest, 0.0) + cost / len(readers)
    whole = sum(costs.values())
    return {digest: cost / whole for digest, cost in costs.items()} if whole else {}


def _group(works: Sequence[Work], most: int) -> list[list[Work]]:
    """Works that ask for the same versions, at most `most` together."""
    alike: dict[tuple[str, ...], list[Work]] = {}
    for work in works:
        alike.setdefault(tuple(v.digest for v in work.plan.versions), []).append(work)
    return [members[i : i + most] for members in alike.values() for i in range(0, len(members), most)]


def _cohort(number: int, members: Sequence[Work], start: int) -> Cohort:
    first = members[0]
    plans = slice(start, start + len(members))
    blocks = tuple(
        Block(number, index, row, plans, first.residents[row.reads[0]].prefixes if row.prefixes else ())
        for index, row in enumerate(first.plan.rows)
    )
    return Cohort(first.residents, plans, blocks)


def _ends_with_first(cohorts: Sequence[Cohort], reads: Mapping[int, Sequence[Read]]) -> frozenset[Block]:
    """Blocks of whose last layer only the first token is read, and from whose end nothing forks."""
    all_tokens = {
        (layer, read.block)
        for layer, of_layer in reads.items()
        for read in of_layer
        if any(readers.readout.kind not in _FIRST_TOKEN for readers in read.readers)
    }
    forks = {
        (block.row.start_layer, cohort.blocks[0])
        for cohort in cohorts
        for block in cohort.blocks
        if block.row.from_trunk
    }
    blocks = (block for cohort in cohorts for block in cohort.blocks)
    return frozenset(block for block in blocks if (block.row.stop_layer, block) not in all_tokens | forks)


def _steps(
    blocks: Sequence[Block], num_layers: int, chunk_rows: int | None, ends_with_first: Set[Block]
) -> Iterator[LayerStep]:
    """Blocks of one prefix length stand side by side; a block comes from itself or, where it begins, from its trunk."""
    where: dict[tuple[int, int], tuple[int, slice]] = {}
    for layer in range(num_layers):
        active = [block for block in blocks if block.row.start_layer <= layer < block.row.stop_layer]
        if not active:
            return
        ending = {b for b in active if b in ends_with_first and b.row.stop_layer == layer + 1}
        active.sort(key=lambda block: (block in ending, block.virtual_tokens(layer)))
        step = tuple(
            Chunk(placed, _sources(placed, where), only_first)
            for only_first, alike in groupby(active, ending.__contains__)
            for placed in _chunks(list(alike), chunk_rows)
        )
        yield step
        where = {
            (p.block.cohort, p.block.index): (number, slice(p.start, p.stop))
            for number, chunk in enumerate(step)
            for p in chunk.placed
        }


def _chunks(blocks: Sequence[Block], chunk_rows: int | None) -> Iterator[tuple[Placed, ...]]:
    placed: list[Placed] = []
    for block in blocks:
        start = placed[-1].stop if placed else 0
        if placed and chunk_rows is not None and start + block.size > chunk_rows:
            yield tuple(placed)
            placed, start = [], 0
        placed.append(Placed(block, start, start + block.size))
    yield tuple(placed)


def _sources(
    placed: Sequence[Placed], where: Mapping[tuple[int, int], tuple[int, slice]]
) -> tuple[tuple[int, slice], ...]:
    """Neighbours in one chunk are one slice, so that rows which did not change are not copied."""
    if not where:
        return ()
    sources: list[tuple[int, slice]] = []
    for p in placed:
        key = (p.block.cohort, p.block.index)
        chunk, rows = where[key] if key in where else where[p.block.cohort, 0]
        if sources and sources[-1][0] == chunk and sources[-1][1].stop == rows.start:
            sources[-1] = (chunk, slice(sources[-1][1].start, rows.stop))
        else:
            sources.append((chunk, rows))
    return tuple(sources)


def _reads(cohorts: Sequence[Cohort]) -> dict[int, tuple[Read, ...]]:
    """For each layer, what is read of which block."""
    found: dict[int, dict[Block, list[Readers]]] = {}
    for number, cohort in enumerate(cohorts):
        for block in cohort.blocks:
            for readers in _readers(number, cohort, block):
                for layer in readers.readout.layers:
                    below_fork = block.row.from_trunk and layer <= block.row.start_layer
                    source = cohort.blocks[0] if below_fork else block
                    found.setdefault(layer, {}).setdefault(source, []).append(readers)
    return {
        layer: tuple(Read(block, tuple(readers)) for block, readers in by_block.items())
        for layer, by_block in found.items()
    }


def _readers(number: int, cohort: Cohort, block: Block) -> Iterator[Readers]:
    alike: dict[Readout, list[int]] = {}
    for index in block.row.reads:
        alike.setdefault(cohort.residents[index].version.readout, []).append(index)
    for readout, versions in alike.items():
        versions.sort(key=lambda index: cohort.residents[index].head.order)
        yield Readers(number, tuple(versions), tuple(cohort.residents[i] for i in versions), readout)
