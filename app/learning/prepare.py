"""From tables to what the trainer takes: encodings, cached states, targets, and a prefix to start from.

Knows tokenizer, backbone and artifacts of other tasks; trains nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from app.domain import BackboneSpec, Encoding, ProblemType, TextInput
from app.engine.artifact import read_artifact
from app.engine.backbone import Backbone
from app.engine.tokenizer import TextTokenizer
from app.errors import DataError, SettingsError, TokenizationError
from app.learning.cache import CachePlan, StateCache
from app.learning.data import Example, Table, without
from app.learning.model import position_offset
from app.learning.recipe import Recipe
from app.learning.rows import LayerPrefix, recorded_keys_values, run_layers


@dataclass(frozen=True, slots=True, eq=False)
class Frozen:
    """Trained prefixes that are combined, with what the manifest says of them."""

    prefixes: tuple[LayerPrefix, ...] = ()
    entries: tuple[dict[str, object], ...] = ()  # digest, num_virtual_tokens, first_layer, task


def read_frozen(recipe: Recipe, spec: BackboneSpec) -> Frozen:
    """The prefixes of the recipe's artifacts, in order (Huang et al. 2023, section 3.2)."""
    prefixes: list[LayerPrefix] = []
    entries: list[dict[str, object]] = []
    for path in recipe.prefixes:
        artifact = read_artifact(path, spec)
        if not artifact.prefix_vectors:
            raise SettingsError(
                f"{path} has no prefix: what is combined must have one, as `learn --num-virtual-tokens N` makes it"
            )
        for entry, vectors in zip(artifact.manifest["prefixes"], artifact.prefix_vectors, strict=True):
            prefixes.append(LayerPrefix(entry["first_layer"], vectors.float(), entry["digest"]))
            entries.append({"task": artifact.manifest["task"]} | entry)
    return Frozen(tuple(prefixes), tuple(entries))


def cache_plan(recipe: Recipe, frozen: Frozen) -> CachePlan:
    if recipe.num_virtual_tokens:
        offset = recipe.num_virtual_tokens if recipe.first_layer == 0 else 0
        return CachePlan(recipe.read_layers, recipe.first_layer, position_offset=offset)
    offset = position_offset(list(frozen.prefixes))
    return CachePlan(recipe.read_layers, prefixes=frozen.prefixes, position_offset=offset)


def tokenized(tokenizer: TextTokenizer, table: Table) -> Table:
    """`table` with the lengths of its texts, without rows that hold nothing to read: they join the unreadable ones.

    Raises DataError where they are too many.
    """
    faults: dict[int, str] = {}
    examples: list[Example] = []
    limits = [sys.maxsize] * len(table.examples)
    found = tokenizer.encode_many(table.texts, limits, truncate=False, has_offsets=False)
    for row, (example, encoding) in enumerate(zip(table.examples, found, strict=True)):
        if isinstance(encoding, str):
            faults[row] = encoding
        examples.append(example if isinstance(encoding, str) else replace(example, num_tokens=len(encoding)))
    return without(replace(table, examples=tuple(examples)), faults)


def num_truncated(table: Table, limit: int) -> int:
    return sum(example.num_tokens > limit for example in table.examples)


def described(table: Table, limit: int) -> dict[str, Any]:
    """What a manifest says of a table; `limit`: tokens of a text that are read."""
    return {
        "file": table.name,
        "sha256": table.sha256,
        "rows": len(table.examples),
        "truncated": num_truncated(table, limit),
    }


def told_of_truncated(tables: Iterable[Table], limit: int) -> list[str]:
    """A sentence where texts are longer than `limit` tokens."""
    counts = [(num_truncated(table, limit), table) for table in tables]
    parts = [f"{count} of {len(table.examples)} texts of {table.name}" for count, table in counts if count]
    if not parts:
        return []
    return [
        f"{', '.join(parts)} are longer than {limit} tokens: only their beginning is read; "
        'the service answers 422 for such texts unless a request says "truncate": true'
    ]


def encode(tokenizer: TextTokenizer, table: Table, limit: int) -> list[Encoding]:
    """Encodings cut at `limit` tokens. Raises DataError naming the row that has nothing to read.

    Offsets and word ids, which are most of an encoding's memory, are there only where tokens are tagged.
    """
    texts, is_token = table.texts, table.problem_type is ProblemType.TOKEN
    try:
        return tokenizer.encode(texts, [limit] * len(texts), truncate=True, has_offsets=is_token)
    except TokenizationError:
        line = next(e.line for e in table.examples if not _readable(tokenizer, e.text, limit))
        raise DataError(f"{table.name}, line {line} has nothing that the model can read") from None


def _readable(tokenizer: TextTokenizer, text: TextInput, limit: int) -> bool:
    try:
        tokenizer.encode([text], [limit], truncate=True)
    except TokenizationError:
        return False
    return True


@torch.no_grad()
def initial_prefix(recipe: Recipe, backbone: Backbone, cache: StateCache) -> Tensor | None:
    """Keys and values that the frozen layers make of random training tokens: [layers, 2, heads, P, head size].

    Real activations are the start that Li & Liang 2021 (section 7.4) found best on little data.
    """
    count = recipe.num_virtual_tokens
    if not count or cache.fork is None:
        return None
    generator = torch.Generator().manual_seed(recipe.seed)
    texts = torch.randperm(len(cache), generator=generator)[:count]
    spec = backbone.spec
    drawn: list[Tensor] = []
    for text in texts.tolist():
        drawn.append(_random_token(backbone, cache, text, recipe.first_layer, generator))
    while len(drawn) < count:  # fewer texts than virtual tokens
        drawn.append(drawn[len(drawn) % len(texts)])
    stacked = torch.stack(drawn[:count], dim=3)
    assert stacked.shape == (spec.num_layers - recipe.first_layer, 2, spec.num_heads, count, spec.head_size)
    return stacked


def _random_token(
    backbone: Backbone, cache: StateCache, text: int, first_layer: int, generator: torch.Generator
) -> Tensor:
    """[layers, 2, heads, head size] of one token between the special ones."""
    assert cache.fork is not None
    start, length = int(cache.extents.starts[text]), int(cache.lengths[text])
    states = cache.fork[start : start + length].unsqueeze(0).to(backbone.device, backbone.dtype)
    mask = torch.ones(1, length, dtype=torch.bool, device=backbone.device)
    token = int(torch.randint(1, max(2, length - 1), (1,), generator=generator))
    with recorded_keys_values(backbone) as recorded:
        for _ in run_layers(backbone, states, mask, range(first_layer, backbone.spec.num_layers)):
            pass
        return torch.stack([torch.stack((k[0, :, token], v[0, :, token])) for k, v in recorded]).float().cpu()


def limit_tokens(spec: BackboneSpec, plan: CachePlan) -> int:
    return spec.max_tokens - plan.position_offset
