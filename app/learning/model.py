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
            shape = (len(readout.layers), readout.num_members * readout.num_queries, width)
            self.queries = nn.Parameter(torch.randn(shape) * _QUERY_STD)
        self.prefix = None if prefix is None else nn.Parameter(prefix.clone().float())
        features = feature_size(readout, width)
        hidden = readout.num_members * (recipe.hidden or 0)  # member by member
        self.dense = nn.Linear(features, hidden) if hidden else None
        self.out = nn.Linear(hidden or features, num_outputs)
        self.dropout = nn.Dropout(recipe.dropout)
        self.activation: Callable[[Tensor], Tensor] = ACTIVATIONS[recipe.activation]
        nn.init.normal_(self.out.weight, std=_HEAD_STD)
        nn.init.zeros_(self.out.bias)

    def forward(self, cache: StateCache, batch: Gathered, chosen: Tensor | None = None) -> Tensor:
        """Logits [rows, labels]; for tokens [chosen tokens, labels], `chosen` a bool [rows, tokens].

        While several members are trained [members, rows, labels], of each its own.
        """
        batch = batch.to(self.out.weight.device)
        pieces = self._pieces(self._reads(cache, batch), batch, chosen)
        if self.recipe.readout is ReadoutKind.TOKENS:
            return self.head(torch.cat(pieces, dim=-1))
        if self.recipe.num_members > 1:
            return self._member_heads(join_layers(pieces))
        return self.head(join_layers(pieces))

    def head(self, features: Tensor) -> Tensor:
        features = self.dropout(features)
        if self.dense is not None:
            features = self.dropout(self.activation(self.dense(features)))
        logits: Tensor = self.out(features)
        return logits

    def _member_heads(self, features: Tensor) -> Tensor:
        """Features [rows, members, features] → logits, of each member while they are trained, else their average."""
        assert self.dense is not None
        count = self.recipe.num_members
        features = self.dropout(features).transpose(0, 1)
        weights = self.dense.weight.view(count, -1, features.shape[-1]).transpose(1, 2)  # [members, features, hidden]
        biases = self.dense.bias.view(count, 1, -1)
        hidden = self.dropout(self.activation(torch.baddbmm(biases, features, weights)))
        outs = self.out.weight.view(len(self.out.bias), count, -1).permute(1, 2, 0)  # [members, hidden, labels]
        logits = torch.matmul(hidden, outs) + self.out.bias
        return logits if self.training else logits.mean(dim=0)

    def tensors(self) -> dict[str, Tensor]:
        """Queries and head under the artifact's names, in float32."""
        kind = HeadKind.LINEAR if self.dense is None else HeadKind.HIDDEN
        dense = [] if self.dense is None else [self.dense.weight, self.dense.bias]
        parameters = [*dense, self.out.weight / self.recipe.num_members, self.out.bias]
        named: dict[str, Tensor] = dict(zip(head_tensor_names(kind), parameters, strict=True))
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
                found = [(mean_tokens(s, mask), attend_tokens(s, q, mask)) for s, q in layers]
                return [piece for mean, queried in found for piece in self._of_members(mean, queried)]
            case ReadoutKind.MATCHING:
                assert self.queries is not None
                sides = sides_of(mask, batch.pair_starts)
                layers = zip(states, self.queries, strict=True)
                attended = [attend_sides(s, q, sides) for s, q in layers]  # [rows, 2, 1 + queries, d]
                if self.recipe.num_members > 1:
                    attended = [torch.cat(self._of_members(a[:, :, :1], a[:, :, 1:]), dim=-2) for a in attended]
                return [compare_sides(a) for a in attended]
            case ReadoutKind.CLS:
                return [s[:, :1] for s in states]
            case ReadoutKind.POOLER:
                return [backbone.pool(s.to(backbone.dtype)).float().unsqueeze(1) for s in states]
            case ReadoutKind.TOKENS:
                return [s[chosen] for s in states]
            case _:
                return [mean_tokens(s, mask) for s in states]

    def _of_members(self, mean: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """mean [rows, …, 1, d], attended [rows, …, queries, d]; of several members [rows, members, …] both."""
        count = self.recipe.num_members
        if count == 1:
            return mean, attended
        *others, _, width = attended.shape
        own = attended.view(*others, count, -1, width).movedim(-3, 1)
        return mean.unsqueeze(1).expand(*own.shape[:-2], 1, -1), own


def position_offset(prefixes: list[LayerPrefix]) -> int:
    """PEFT's convention: a prefix from the first layer on takes the first positions; a later one takes none."""
    return sum(p.num_virtual_tokens for p in prefixes if p.first_layer == 0)
