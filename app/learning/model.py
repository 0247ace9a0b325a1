"""What is trained: a prefix, readout queries and a head, over states of the frozen backbone.

The same mathematics as the engine's, open to autograd. Knows states; nothing of texts, labels or files.
Prefix tuning: Li & Liang 2021 (arXiv 2101.00190); combined prefixes: Huang et al. 2023 (arXiv 2305.13499).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from app.domain import HeadKind, ReadoutKind
from app.engine.artifact_checks import feature_size
from app.engine.backbone import Backbone
from app.engine.heads import (
    ACTIVATIONS,
    QUERIES,
    attend_sides,
    attend_tokens,
    compare_sides,
    head_tensor_names,
    join_layers,
    mean_tokens,
    sides_of,
)
from app.learning.cache import Gathered, StateCache, states_at
from app.learning.recipe import Recipe
from app.learning.rows import LayerPrefix, differentiable_attention, run_layers

_QUERY_STD = 0.02
_HEAD_STD = 0.02


class TaskModel(nn.Module):
    """A completed recipe's parameters; the backbone is held, not owned, and never trained."""

    def __init__(self, recipe: Recipe, backbone: Backbone, num_outputs: int, prefix: Tensor | None) -> None:
        """`prefix`: [layers, 2, heads, virtual tokens, head size], where the task's own begins; None: it has none."""
        super().__init__()
        self._backbone = (backbone,)  # in a tuple: a module would register it as its own
        self.recipe = recipe
        readout, width = recipe.reads, backbone.spec.hidden_size
        self.queries: nn.Parameter | None = None
        if readout.kind.has_queries:
            shape = (len(readout.layers), readout.num_queries, width)
            self.queries = nn.Parameter(torch.randn(shape) * _QUERY_STD)
        self.prefix = None if prefix is None else nn.Parameter(prefix.clone().float())
        features = feature_size(readout, width)
        self.dense = nn.Linear(features, recipe.hidden) if recipe.hidden else None
        self.out = nn.Linear(recipe.hidden or features, num_outputs)
        self.dropout = nn.Dropout(recipe.dropout)
        self.activation: Callable[[Tensor], Tensor] = ACTIVATIONS[recipe.activation]
        nn.init.normal_(self.out.weight, std=_HEAD_STD)
        nn.init.zeros_(self.out.bias)

    def forward(self, cache: StateCache, batch: Gathered, chosen: Tensor | None = None) -> Tensor:
        """Logits [rows, labels]; for tokens [chosen tokens, labels], `chosen` a bool [rows, tokens]."""
        batch = batch.to(self.out.weight.device)
        pieces = self._pieces(self._reads(cache, batch), batch, chosen)
        if self.recipe.readout is ReadoutKind.TOKENS:
            return self.head(torch.cat(pieces, dim=-1))
        return self.head(join_layers(pieces))

    def head(self, features: Tensor) -> Tensor:
        features = self.dropout(features)
        if self.dense is not None:
            features = self.dropout(self.activation(self.dense(features)))
        logits: Tensor = self.out(features)
        return logits

    def tensors(self) -> dict[str, Tensor]:
        """Queries and head under the artifact's names, in float32."""
        layers = [self.out] if self.dense is None else [self.dense, self.out]
        kind = HeadKind.LINEAR if self.dense is None else HeadKind.HIDDEN
        parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
        named = dict(zip(head_tensor_names(kind), parameters, strict=True))
        if self.queries is not None:
            named[QUERIES] = self.queries
        return {name: tensor.detach().float().cpu() for name, tensor in named.items()}

    def _reads(self, cache: StateCache, batch: Gathered) -> dict[int, Tensor]:
        """Layer → states [rows, tokens, d]: from the cache, and above the fork from the layers themselves."""
        backbone, device = self._backbone[0], batch.mask.device
        reads = {layer: states_at(flat, batch).to(device) for layer, flat in cache.reads.items()}
        if self.prefix is None or cache.fork is None:
            return reads
        first = self.recipe.first_layer
        prefix = LayerPrefix(first, self.prefix)
        fork = states_at(cache.fork, batch).to(device, backbone.dtype)
        layers = range(first, self.recipe.read_layers[-1])
        offset = position_offset([prefix])
        with differentiable_attention(backbone):
            for passed, states in run_layers(backbone, fork, batch.mask, layers, [prefix], offset):
                if passed in self.recipe.read_layers:
                    reads[passed] = backbone.read_states(passed, states).float()
        return reads

    def _pieces(self, reads: dict[int, Tensor], batch: Gathered, chosen: Tensor | None) -> list[Tensor]:
        backbone, mask = self._backbone[0], batch.mask
        states = [reads[layer] for layer in self.recipe.read_layers]
        match self.recipe.readout:
            case ReadoutKind.ATTENTION:
                assert self.queries is not None
                layers = zip(states, self.queries, strict=True)
                return [piece for s, q in layers for piece in (mean_tokens(s, mask), attend_tokens(s, q, mask))]
            case ReadoutKind.MATCHING:
                assert self.queries is not None
                sides = sides_of(mask, batch.pair_starts)
                layers = zip(states, self.queries, strict=True)
                return [compare_sides(attend_sides(s, q, sides)) for s, q in layers]
            case ReadoutKind.CLS:
                return [s[:, :1] for s in states]
            case ReadoutKind.POOLER:
                return [backbone.pool(s.to(backbone.dtype)).float().unsqueeze(1) for s in states]
            case ReadoutKind.TOKENS:
                return [s[chosen] for s in states]
            case _:
                return [mean_tokens(s, mask) for s in states]


def position_offset(prefixes: list[LayerPrefix]) -> int:
    """PEFT's convention: a prefix from the first layer on takes the first positions; a later one takes none."""
    return sum(p.num_virtual_tokens for p in prefixes if p.first_layer == 0)
