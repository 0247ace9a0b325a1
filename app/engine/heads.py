"""Readouts and heads: from the states of rows to scores. Knows tensors and readouts; nothing of batches or threads.

The attention readout is one softmax over a row's tokens for each learned query (score = query · state, with the key
projection folded into the query), beside the mean of the layer. The matching readout has both for each text of a pair,
and how the two differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from app.domain import HeadKind, ProblemType, TaskVersion
from app.engine.chain import TRANSITIONS, decode
from app.engine.linear import Linear, LinearBank, apply_all

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
class ResidentHead:
    """A version's readout queries and head, in float32 on the device."""

    queries: Tensor | None  # [layers read, members × num_queries, d]
    dense: tuple[Linear, ...]  # features → hidden, of each member; none: a linear head
    activation: str
    out: Linear | None  # features or hidden → labels; None: the features are the answer (embeddings)
    problem_type: ProblemType
    transitions: Tensor | None = None  # of a tagger that has learned how tags follow one another [labels + 1, labels]

    @classmethod
    def from_tensors(
        cls, version: TaskVersion, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], bank: LinearBank
    ) -> ResidentHead:
        queries = None
        if version.readout.kind.has_queries:
            queries = tensors[QUERIES].to(bank.device, torch.float32, copy=True).contiguous()
        if version.problem_type is ProblemType.EMBEDDING:
            return cls(queries, (), "", None, version.problem_type)
        names = head_tensor_names(HeadKind(manifest["head"]["kind"]))
        pairs = zip(names[::2], names[1::2], strict=True)
        *dense, (weight, bias) = [(tensors[weight], tensors[bias]) for weight, bias in pairs]
        count = version.readout.num_members
        layers = tuple(layer for w, b in dense for layer in bank.place_all(w.chunk(count), b.chunk(count)))
        activation = manifest["head"].get("activation", "tanh")
        transitions = tensors.get(TRANSITIONS)
        if transitions is not None:
            transitions = transitions.to(bank.device, torch.float32, copy=True)
        return cls(queries, layers, activation, bank.place(weight, bias), version.problem_type, transitions)

    @property
    def order(self) -> tuple[object, ...]:
        """Heads sorted by it: equal shapes stand together, and neighbours in memory beside each other."""
        places = [layer.place for layer in (*self.dense, self.out) if layer is not None]
        return *_hidden_stage(self), *_out_stage(self), *places

    def scores(self, features: Tensor) -> Tensor:
        """Features [..., features], with several members [members, rows, features] → scores [..., labels]."""
        match self.dense:
            case ():
                hidden = features
            case (dense,):
                hidden = ACTIVATIONS[self.activation](dense(features))
            case _:
                hidden = _hidden([self], features)[0]
        return scores_of(self.problem_type, hidden if self.out is None else self.out(hidden))

    def tags(self, probabilities: Tensor, words: Sequence[Sequence[int]]) -> Tensor:
        """[..., tokens, labels] → tag ids [..., tokens]; `words`: the first tokens of each row's words."""
        if self.transitions is None:
            return probabilities.argmax(dim=-1)
        return decode(probabilities, words, self.transitions)


def score_all(heads: Sequence[ResidentHead], features: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(how many heads, their scores [heads, rows, labels]), for heads sorted by `order`, with as many members each.

    features [heads × members, rows, features]. Heads of one shape are computed together.
    """
    start, count = 0, len(features) // len(heads)
    for _, alike in groupby(heads, _hidden_stage):
        group = list(alike)
        stop = start + count * len(group)
        hidden = _hidden(group, features[start:stop])
        start = stop
        yield from _score_group(group, hidden)


def _score_group(heads: Sequence[ResidentHead], hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
    start = 0
    for _, alike in groupby(heads, _out_stage):
        group = list(alike)
        here = hidden[start : start + len(group)]
        layers = [head.out for head in group if head.out is not None]
        yield len(group), scores_of(group[0].problem_type, apply_all(layers, here) if layers else here)
        start += len(group)


def _hidden(heads: Sequence[ResidentHead], features: Tensor) -> Tensor:
    """[heads × members, rows, features] → [heads, rows, members × hidden]; of linear heads the features."""
    layers = [layer for head in heads for layer in head.dense]
    if not layers:
        return features
    hidden = ACTIVATIONS[heads[0].activation](apply_all(layers, features))
    if len(layers) == len(heads):
        return hidden
    _, rows, width = hidden.shape
    return hidden.view(len(heads), len(layers) // len(heads), rows, width).transpose(1, 2).flatten(2)


def _hidden_stage(head: ResidentHead) -> tuple[object, ...]:
    return (*head.dense[0].shape, head.activation) if head.dense else (0, 0, "")


def _out_stage(head: ResidentHead) -> tuple[object, ...]:
    return (head.problem_type, *((0, 0) if head.out is None else head.out.shape))


def attend_tokens(states: Tensor, queries: Tensor, mask: Tensor | None) -> Tensor:
    """Each query's attention result over a row's tokens, [rows, q, d] in float32.

    states [rows, tokens, d], queries [q, d], mask bool [rows, tokens] (True: a token of the text) or None.
    """
    states = states.float()
    scores = torch.matmul(states, queries.t())  # [rows, tokens, q]
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(-1), float("-inf"))
    return torch.bmm(torch.softmax(scores, dim=1).transpose(1, 2), states)


def mean_tokens(states: Tensor, mask: Tensor | None) -> Tensor:
    """A row's mean over its tokens, [rows, 1, d] in float32. Arguments as for `attend_tokens`."""
    states = states.float()
    if mask is None:
        return states.mean(dim=1, keepdim=True)
    weights = mask.to(states.dtype) / mask.sum(dim=1, keepdim=True)
    return torch.bmm(weights.unsqueeze(1), states)


def sides_of(mask: Tensor, pair_starts: Tensor) -> Tensor:
    """Which tokens are the first text's of a pair and which the second's, bool [rows, 2, tokens].

    mask bool [rows, tokens] (True: a token of the text), pair_starts [rows]: the second text's first token; 0: there
    is one text, which is both.
    """
    places, starts = torch.arange(mask.shape[1], device=mask.device), pair_starts.unsqueeze(1)
    second = mask & (places >= starts)
    return torch.stack((mask & ((places < starts) | (starts == 0)), second), dim=1)


def attend_sides(states: Tensor, queries: Tensor, sides: Tensor) -> Tensor:
    """Of each text of a pair its mean, and each query's attention result over it, [rows, 2, 1 + q, d] in float32.

    states [rows, tokens, d], queries [q, d], sides bool [rows, 2, tokens]: each text's tokens, one at least.
    """
    states = states.float()
    mean = sides.to(states.dtype) / sides.sum(dim=-1, keepdim=True)  # [rows, 2, tokens]
    scores = torch.matmul(queries, states.transpose(1, 2)).unsqueeze(1)  # [rows, 1, q, tokens]
    attended = torch.softmax(scores.masked_fill(~sides.unsqueeze(2), float("-inf")), dim=-1)
    weights = torch.cat((mean.unsqueeze(2), attended), dim=2)  # [rows, 2, 1 + q, tokens]
    return torch.bmm(weights.flatten(1, 2), states).view(*weights.shape[:3], -1)


def compare_sides(found: Tensor) -> Tensor:
    """What was found in each text of a pair, u and v [..., 2, n, d] → u, v, |u - v|, u · v [..., 4n, d].

    Heuristic matching: Mou et al. 2016 (arXiv 1512.08422).
    """
    u, v = found.unbind(dim=-3)
    return torch.cat((u, v, (u - v).abs(), u * v), dim=-2)


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
