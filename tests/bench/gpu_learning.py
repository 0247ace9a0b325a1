"""What a step of learning takes on a device, as a CUDA graph and kernel by kernel: a part of `make bench-gpu`.

States are random, in the shape of the embedded encoder's. Knows nothing of what is served.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModel, BertConfig

from app.domain import InputKind, ProblemType, ReadoutKind
from app.engine.backbone import Backbone
from app.learning import steps
from app.learning.cache import Extents, StateCache
from app.learning.model import TaskModel
from app.learning.prepare import Frozen, cache_plan, initial_prefix
from app.learning.recipe import Recipe
from app.learning.trainer import Split, train

MINILM = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
TEXTS, LABELS, TURNS = 6400, 28, 3
CASES: dict[str, dict[str, Any]] = {
    "a prefix of 16 tokens from the middle layer on": {
        "readout": ReadoutKind.MEAN,
        "hidden": 0,
        "num_virtual_tokens": 16,
        "first_layer": 3,
    },
    "an attention readout of three layers": {"readout": ReadoutKind.ATTENTION},
}


def step_times(device: str, texts: int = TEXTS) -> Iterator[tuple[str, str]]:
    """What is learned, and its times: the best of a few epochs in turn."""
    torch.manual_seed(0)
    network = AutoModel.from_config(MINILM, attn_implementation="sdpa").eval()
    backbone = Backbone.from_model(network, "minilm", device=device, dtype="bfloat16")
    for what, settings in CASES.items():
        recipe = Recipe("task", epochs=1, patience=0, **settings).completed(
            ProblemType.SINGLE_LABEL, LABELS, backbone.spec, InputKind.TEXT
        )
        split = random_split(backbone, recipe, texts)
        each_ms: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(TURNS):
            for is_graphed, found in each_ms.items():
                steps._Capturing.is_possible = is_graphed
                found.append(step_ms(backbone, recipe, split))
        steps._Capturing.is_possible = True
        graphed, launched = min(each_ms[True]), min(each_ms[False])
        case = f"learning {what}, 32 texts of 8 to 40 tokens a step"
        yield case, f"{graphed:.2f} ms, kernel by kernel {launched:.2f} ms: {launched / graphed:.1f} ×"


def random_split(backbone: Backbone, recipe: Recipe, texts: int) -> Split:
    """Frozen states of no text in particular."""
    plan = cache_plan(recipe, Frozen())
    lengths = torch.randint(8, 41, (texts,))
    layers = {*plan.cached_reads, *([] if plan.fork_layer is None else [plan.fork_layer])}
    size = int(lengths.sum()), backbone.spec.hidden_size
    flat = {layer: torch.randn(size, device=backbone.device).half() for layer in layers}
    extents = Extents(lengths.cumsum(0) - lengths, lengths, torch.zeros_like(lengths))
    fork = None if plan.fork_layer is None else flat[plan.fork_layer]
    cache = StateCache(extents, {layer: flat[layer] for layer in plan.cached_reads}, fork)
    return Split(cache, torch.randint(0, LABELS, (texts,)))


def step_ms(backbone: Backbone, recipe: Recipe, split: Split) -> float:
    """Of one epoch, with the captures that it makes, and a look at a few rows."""
    torch.manual_seed(0)
    model = TaskModel(recipe, backbone, LABELS, initial_prefix(recipe, backbone, split.cache)).to(backbone.device)
    few = torch.arange(64)
    look = Split(split.cache.subset(few), split.targets[few])
    began = time.perf_counter()
    train(model, (split, look), ProblemType.SINGLE_LABEL, tuple(map(str, range(LABELS))), lambda _: None)
    return 1000 * (time.perf_counter() - began) / -(-len(split.cache) // recipe.batch_size)
