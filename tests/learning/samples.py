"""A tiny random BERT with a tokenizer of its own, and generated data that it can learn in seconds."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

FILLERS = ("the", "of", "a", "in", "to", "and", "we", "it", "is", "was")
GOOD, BAD = ("good", "fine", "great", "nice"), ("bad", "poor", "awful", "grim")
CITIES, NAMES = ("paris", "rome", "oslo", "lima"), ("ann", "bob", "eve", "dan")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = (*SPECIAL, *FILLERS, *GOOD, *BAD, *CITIES, *NAMES, "-", "new", "york", "##s")


def write_model(folder: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.05,  # layers that leave the words in the states, as trained ones do
    )
    BertModel(config).save_pretrained(folder)
    ids = {word: index for index, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer()
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=64, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )
    fast.save_pretrained(folder)
    return folder


def sentence(source: random.Random, words: Sequence[str]) -> str:
    """The words at random places among fillers."""
    around = [source.choice(FILLERS) for _ in range(source.randint(2, 6))]
    for word in words:
        around.insert(source.randint(0, len(around)), word)
    return " ".join(around)


def write_rows(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Path:
    path.write_text("\n".join("\t".join(row) for row in (header, *rows)) + "\n")
    return path


def single_rows(source: random.Random, count: int) -> list[tuple[str, str]]:
    kinds = {"good": GOOD, "bad": BAD, "city": CITIES}
    labels = [source.choice(list(kinds)) for _ in range(count)]
    return [(sentence(source, [source.choice(kinds[label])]), label) for label in labels]


def multi_rows(source: random.Random, count: int) -> list[tuple[str, str]]:
    kinds = {"city": CITIES, "name": NAMES}
    rows = []
    for _ in range(count):
        labels = [label for label in kinds if source.random() < 0.5]
        rows.append((sentence(source, [source.choice(kinds[label]) for label in labels]), "|".join(labels)))
    return rows


def regression_rows(source: random.Random, count: int) -> list[tuple[str, str]]:
    rows = []
    for _ in range(count):
        good = source.randint(0, 4)
        words = [source.choice(GOOD) for _ in range(good)] + [source.choice(BAD) for _ in range(4 - good)]
        source.shuffle(words)
        rows.append((" ".join(words), str(100 + 10 * good)))
    return rows


def pair_rows(source: random.Random, count: int) -> list[tuple[str, str, str]]:
    rows = []
    for _ in range(count):
        word = source.choice((*GOOD, *BAD))
        rows.append((sentence(source, ["we"]), sentence(source, [word]), "yes" if word in GOOD else "no"))
    return rows


def tagged_lines(source: random.Random, count: int) -> list[str]:
    """Names, and cities of one or two words, of which `new-york` is split by the tokenizer."""
    lines = []
    for _ in range(count):
        words, tags = ["we"], ["O"]
        for _ in range(source.randint(1, 4)):
            kind = source.choice(("filler", "name", "city", "two", "split"))
            piece, tag = {
                "filler": ([source.choice(FILLERS)], ["O"]),
                "name": ([source.choice(NAMES)], ["B-name"]),
                "city": ([source.choice(CITIES)], ["B-city"]),
                "two": (["new", "york"], ["B-city", "I-city"]),
                "split": (["new-york"], ["B-city"]),
            }[kind]
            words += ["the", *piece]
            tags += ["O", *tag]
        lines.append(json.dumps({"tokens": words, "tags": tags}))
    return lines
