"""The tags of a text's words as a linear chain: which tag may follow which, and how likely. Knows tensors alone.

The likeliest sequence is Viterbi's (1967), over scores that a head gives to each word and scores of each step from one
tag to the next, as in a linear-chain conditional random field (Lafferty, McCallum & Pereira 2001).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TRANSITIONS = "transitions"  # an artifact's tensor [labels + 1, labels]: from (the last: the beginning), to
_LEAST = 1e-30  # of a probability
# Steps from tag to tag of rows that are decoded together, which with hundreds of tags are 100,000 a row. A device gets
# more of them at once: what it takes is the launches.
_MOST_STEPS, _MOST_STEPS_AFAR = 2**20, 2**26


def decode(probabilities: Tensor, words: Sequence[Sequence[int]], transitions: Tensor) -> Tensor:
    """Tags [rows, tokens]: of each word's first token as the likeliest sequence has it, of any other the likeliest.

    probabilities [rows, tokens, labels]; words: the first tokens of each row's words, rising.
    """
    tags = probabilities.argmax(dim=-1)
    lengths = [len(tokens) for tokens in words]
    width = max(lengths, default=0)
    if not width:
        return tags
    # A row's padding repeats its last word, so that writing back what was found there changes nothing.
    padded = [[*tokens, *[tokens[-1] if tokens else 0] * (width - len(tokens))] for tokens in words]
    places = torch.tensor(padded).to(tags.device, non_blocking=True)
    seen = places.unsqueeze(-1).expand(-1, -1, probabilities.shape[-1])
    scores = probabilities.gather(1, seen).clamp_min(_LEAST).log()
    found = likeliest(scores, lengths, transitions)
    is_empty = torch.tensor(lengths).to(tags.device, non_blocking=True).unsqueeze(1) == 0
    return tags.scatter(1, places, torch.where(is_empty, tags.gather(1, places), found))


def likeliest(scores: Tensor, lengths: Sequence[int], transitions: Tensor) -> Tensor:
    """Tags [rows, words]; behind a row's length they repeat its last.

    scores [rows, words, labels], logarithms; transitions [labels + 1, labels], added to them.
    """
    most = _MOST_STEPS if scores.device.type == "cpu" else _MOST_STEPS_AFAR
    rows = max(1, most // transitions.shape[1] ** 2)
    parts = range(0, len(lengths), rows)
    return torch.cat([_likeliest(scores[i : i + rows], lengths[i : i + rows], transitions) for i in parts])


def _likeliest(scores: Tensor, lengths: Sequence[int], transitions: Tensor) -> Tensor:
    width = scores.shape[1]
    into = transitions[:-1].t().contiguous()  # [to, from]
    ends = torch.tensor(lengths).to(scores.device, non_blocking=True).unsqueeze(1)
    best = [scores[:, 0] + transitions[-1]]  # of sequences that end with each tag [rows, labels], word by word
    for word in range(1, width):
        longer = (best[-1].unsqueeze(1) + into).amax(dim=2) + scores[:, word]
        best.append(torch.where(ends > word, longer, best[-1]))
    # Where each came from is found only for those that are on the way: a maximum without its place is far faster.
    path = [best[-1].argmax(dim=-1)]
    for word in range(width - 1, 0, -1):
        before = (best[word - 1] + into[path[-1]]).argmax(dim=-1)
        path.append(torch.where(ends[:, 0] > word, before, path[-1]))
    return torch.stack(path[::-1], dim=1)
