"""Where a file's own words lie among a tokenizer's tokens. Knows encodings and tags; nothing of tensors.

The first token of each word (as the tokenizer splits words) carries its tag; a file's word that the tokenizer splits
into several carries `B-x` on the first and `I-x` on the others.
"""

from __future__ import annotations

from collections.abc import Sequence

from app.domain import Encoding
from app.learning.data import OUTSIDE


def word_starts(encoding: Encoding, words: Sequence[str]) -> list[list[int]]:
    """For each of the file's words, joined by single spaces, the first tokens of the tokenizer's words within it.

    A word of which nothing was read (cut off, or without readable characters) has none.
    """
    found: list[list[int]] = [[] for _ in words]
    word, end = 0, len(words[0])
    for index in encoding.first_tokens:
        start = encoding.offsets[index][0]
        while start >= end and word + 1 < len(words):
            word += 1
            end += 1 + len(words[word])
        found[word].append(index)
    return found


def token_tags(starts: Sequence[Sequence[int]], tags: Sequence[str]) -> list[tuple[int, str]]:
    """(token, tag) for each token that carries one."""
    return [
        (token, tag if position == 0 else _continued(tag))
        for tokens, tag in zip(starts, tags, strict=True)
        for position, token in enumerate(tokens)
    ]


def tags_of_words(starts: Sequence[Sequence[int]], tags: Sequence[str]) -> list[str]:
    """A tag for each of the file's words, from the tags of all tokens of its encoding."""
    return [tags[tokens[0]] if tokens else OUTSIDE for tokens in starts]


def _continued(tag: str) -> str:
    return tag if tag == OUTSIDE else f"I-{tag[2:]}"
