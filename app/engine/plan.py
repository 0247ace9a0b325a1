"""From (text, versions) to the rows that answer it, and what they cost in passes.

Pure arithmetic over the central types: no torch, no weights, no text.
"""

from __future__ import annotations

from collections.abc import Sequence

from app.domain import BackboneSpec, Encoding, Plan, Prefix, Row, TaskVersion

_BranchKey = tuple[tuple[Prefix, ...], int]
_TRUNK: _BranchKey = ((), 0)


def make_plan(encoding: Encoding, versions: Sequence[TaskVersion], num_layers: int) -> Plan:
    """One trunk row and a branch for each distinct prefix tuple; equal tuples share a branch.

    The trunk stops above the last fork unless something reads it higher up. A branch whose prefixes begin at layer 0
    starts at the embeddings, so that it can have positions of its own. `passes` is layers run over `num_layers`.
    """
    readers: dict[_BranchKey, list[int]] = {}
    for index, version in enumerate(versions):
        readers.setdefault((version.prefixes, version.position_offset), []).append(index)
    branches = [_branch(key, reads, versions) for key, reads in readers.items() if key != _TRUNK]
    rows = tuple(_trunk(readers.get(_TRUNK, []), branches, versions)) + tuple(branches)
    tokens = len(encoding)
    virtual = sum(p.num_virtual_tokens for row in rows for p in row.prefixes)
    layers_run = sum(row.stop_layer - row.start_layer for row in rows)
    return Plan(encoding, tuple(versions), rows, layers_run / num_layers, len(rows) * tokens + virtual)


def _branch(key: _BranchKey, reads: list[int], versions: Sequence[TaskVersion]) -> Row:
    prefixes, offset = key
    start = min((p.first_layer for p in prefixes), default=0)
    stop = max(start, *(max(versions[i].readout.layers) for i in reads))
    return Row(prefixes, offset, start, stop, start > 0, tuple(reads))


def _trunk(reads: list[int], branches: Sequence[Row], versions: Sequence[TaskVersion]) -> list[Row]:
    highest_read = max((max(versions[i].readout.layers) for i in reads), default=0)
    last_fork = max((b.start_layer for b in branches if b.from_trunk), default=0)
    stop = max(highest_read, last_fork)
    return [Row((), 0, 0, stop, False, tuple(reads))] if stop else []


def split_plan(plan: Plan, num_layers: int, max_cost_tokens: int) -> list[Plan]:
    """The plan itself, or several of at most `max_cost_tokens`, each with a trunk of its own.

    For a text with so many branches that they do not fit one batch. The parts' versions may stand in another order
    than the plan's; their passes add up to what is really run. What reads one row stays together.
    """
    readers = [row.reads for row in plan.rows if row.reads]
    if plan.cost_tokens <= max_cost_tokens or len(readers) <= 1:
        return [plan]
    half = len(readers) // 2
    chosen = ([plan.versions[i] for reads in rows for i in reads] for rows in (readers[:half], readers[half:]))
    parts = [make_plan(plan.encoding, versions, num_layers) for versions in chosen]
    return [piece for part in parts for piece in split_plan(part, num_layers, max_cost_tokens)]


def token_limit(spec: BackboneSpec, versions: Sequence[TaskVersion]) -> int:
    """How many tokens, special ones counted, an input may have for all these versions."""
    return spec.max_tokens - max((v.position_offset for v in versions), default=0)
