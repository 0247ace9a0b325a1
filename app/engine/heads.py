"""Readouts and heads: from the states of rows to scores. Knows tensors and readouts; nothing of batches or threads.

The attention readout is one softmax over a row's tokens for each learned query (score = query · state, with the key
projection folded into the query), beside the mean of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from app.domain import HeadKind, ProblemType, ReadoutKind, TaskVersion

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "gelu": functional.gelu,
    "relu": functional.relu,
}

QUERIES = "queries"
_CLASSIFIER = "base_model.classifier."


def head_tensor_names(kind: HeadKind) -> tuple[str, ...]:
    """The tensors of a head in an artifact's safetensors, in PEFT's names."""
    parts = ("dense", "out_proj") if kind is HeadKind.HIDDEN else ("",)
    return tuple(f"{_CLASSIFIER}{part}{'.' if part else ''}{leaf}" for part in parts for leaf in ("weight", "bias"))


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    weight: Tensor  # [out, in]
    bias: Tensor  # [out]

    def __call__(self, features: Tensor) -> Tensor:
        return functional.linear(features, self.weight, self.bias)


@dataclass(frozen=True, slots=True, eq=False)
class ResidentHead:
    """A version's readout queries and head, in float32 on the device."""

    queries: Tensor | None  # [layers read, num_queries, d]
    dense: Linear | None  # [hidden, features]
    out: Linear | None  # [labels, hidden or features]; None: the features are the answer (embeddings)
    activation: Callable[[Tensor], Tensor]

    @classmethod
    def from_tensors(
        cls, version: TaskVersion, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device
    ) -> ResidentHead:
        def place(name: str) -> Tensor:
            return tensors[name].to(device, torch.float32, copy=True).contiguous()

        queries = place(QUERIES) if version.readout.kind is ReadoutKind.ATTENTION else None
        if version.problem_type is ProblemType.EMBEDDING:
            return cls(queries, None, None, torch.tanh)
        kind = HeadKind(manifest["head"]["kind"])
        placed = [place(name) for name in head_tensor_names(kind)]
        layers = [Linear(placed[i], placed[i + 1]) for i in range(0, len(placed), 2)]
        activation = ACTIVATIONS[manifest["head"].get("activation", "tanh")]
        return cls(queries, layers[0] if len(layers) == 2 else None, layers[-1], activation)

    def logits(self, features: Tensor) -> Tensor:
        """Features [..., features] → logits [..., labels] (or the features, where there is no head)."""
        if self.dense is not None:
            features = self.activation(self.dense(features))
        return features if self.out is None else self.out(features)


def pool_tokens(states: Tensor, queries: Tensor | None, mask: Tensor | None) -> tuple[Tensor, ...]:
    """A row's mean over its tokens, [rows, 1, d], and behind it each query's attention result, [rows, q, d].

    states [rows, tokens, d], queries [q, d] or None, mask bool [rows, tokens] (True: a token of the text) or None.
    Everything in float32.
    """
    states = states.float()
    mean = _mean(states, mask)
    if queries is None:
        return (mean,)
    scores = torch.matmul(states, queries.t())  # [rows, tokens, q]
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(-1), float("-inf"))
    return mean, torch.bmm(torch.softmax(scores, dim=1).transpose(1, 2), states)


def _mean(states: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return states.mean(dim=1, keepdim=True)
    weights = mask.to(states.dtype) / mask.sum(dim=1, keepdim=True)
    return torch.bmm(weights.unsqueeze(1), states)


def scores_of(problem_type: ProblemType, logits: Tensor) -> Tensor:
    """Logits [..., labels] → what the caller is told: probabilities, values, or a vector of length 1."""
    match problem_type:
        case ProblemType.SINGLE_LABEL | ProblemType.TOKEN:
            return torch.softmax(logits, dim=-1)
        case ProblemType.MULTI_LABEL:
            return torch.sigmoid(logits)
        case ProblemType.EMBEDDING:
            return functional.normalize(logits, dim=-1)
        case ProblemType.REGRESSION:
            return logits


def join_layers(pieces: Sequence[Tensor]) -> Tensor:
    """Pooled pieces [..., n, d], layer by layer → features [..., all n · d]."""
    return (pieces[0] if len(pieces) == 1 else torch.cat(tuple(pieces), dim=-2)).flatten(-2)
