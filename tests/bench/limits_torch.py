"""The subjects of the limits benchmark that torch runs: transformers' own encoder, and Manifold's engine."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.utils import logging

from app.domain import Encoding, EngineRequest, Plan
from app.engine.backbone import Backbone, apart
from app.engine.batch import Work, lay_out
from app.engine.engine import CPU_CHUNK_TOKENS, Engine
from app.engine.forward import run_batch
from app.engine.plan import make_plan
from tests.bench.limits_cases import Case, Ids, padded, timed_turn
from tests.engine.models import make_artifact

EAGER, COMPILED, FROZEN = "torch, eager", "torch.compile", "torch.compile, frozen weights"
DIRECT, SUBMITTED = "**Manifold: lay_out, run_batch**", "**Manifold: Engine.submit**"
INT8 = "torch, eager, int8 weights (dynamic)"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Run = Callable[[], Any]
Key = TypeVar("Key")
Prepare = Callable[[Ids, bool], Run]  # a batch, and whether its shape is the only one → a run of it

torch._dynamo.config.recompile_limit = 256  # a compilation for each shape; past this many torch would go back to eager


class Local:
    """Something that runs a case's texts in this process. `settle` before `turn_s`."""

    def __init__(self, name: str, dtype: str, prepare: Prepare, takes_all: bool = False) -> None:
        self.name, self.dtype = name, dtype
        self.prepare = prepare
        self._takes_all = takes_all  # it divides texts into batches itself
        self._runs: dict[str, Run] = {}

    def settle(self, case: Case) -> int:
        """Choose the fastest batch size and warm up; returns the size."""
        sizes = (len(case.texts),) if self._takes_all else case.batch_sizes
        runs: dict[int, Run] = {}
        for size in sizes:
            runs[size] = _one_after_another([self.prepare(batch, not case.is_mixed) for batch in case.batches(size)])
            runs[size]()
        best = fastest(runs)
        self._runs[case.name] = runs[best]
        return best

    def turn_s(self, case: Case, seconds: float) -> float:
        """Median seconds of the runs in one turn."""
        return timed_turn(self._runs[case.name], seconds)


def _one_after_another(runs: Sequence[Run]) -> Run:
    return runs[0] if len(runs) == 1 else lambda: [run() for run in runs]


def fastest(runs: Mapping[Key, Run]) -> Key:
    """Of runs that are warm."""
    if len(runs) == 1:
        return next(iter(runs))
    seconds = {key: timed_turn(run, 0.3) for key, run in runs.items()}
    return min(seconds, key=seconds.__getitem__)


def load_network(path: str, dtype: str) -> nn.Module:
    """transformers' own encoder, as fast as it comes: fused attention, no pooler."""
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # the pooler's weights are left out on purpose
    network: nn.Module = AutoModel.from_pretrained(
        path, attn_implementation="sdpa", dtype=DTYPES[dtype], add_pooling_layer=False
    )
    return network.eval()


def forward(network: Callable[..., Any], texts: Ids) -> Run:
    """A run of one batch; no mask where nothing is padded, for that is faster."""
    ids, mask = padded(texts)
    inputs = {"input_ids": torch.tensor(ids)}
    if mask is not None:
        inputs["attention_mask"] = torch.tensor(mask)

    @torch.no_grad()  # inductor freezes weights under no_grad alone
    def run() -> Tensor:
        states: Tensor = network(**inputs).last_hidden_state
        return states

    return run


def eager(path: str, dtype: str) -> Local:
    network = load_network(path, dtype)
    return Local(EAGER, dtype, lambda texts, _: forward(network, texts))


def compiled(path: str, dtype: str, is_frozen: bool = False) -> Local:
    """inductor: each fixed shape compiled for itself, mixed ones as code for any shape."""
    network = load_network(path, dtype)
    options: dict[str, str | int | bool | Callable[..., Any]] = {"freezing": is_frozen}
    for_one, for_any = (torch.compile(network, dynamic=dynamic, options=options) for dynamic in (False, True))
    name = FROZEN if is_frozen else COMPILED
    return Local(name, dtype, lambda texts, is_static: forward(for_one if is_static else for_any, texts))


def dynamic_int8(path: str) -> Local:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = torch.ao.quantization.quantize_dynamic(load_network(path, "float32"), {nn.Linear}, dtype=torch.qint8)
    return Local(INT8, "int8", lambda texts, _: forward(network, texts))


def engine_subject(path: str, dtype: str, is_submitted: bool) -> Local:
    """One task without a branch: the mean of the last layer and a head of four labels.

    `is_submitted`: through the engine's queue and thread, which runs from here on; else the forward alone.
    """
    backbone = apart(lambda: Backbone.load(path, "cpu", dtype))
    engine = Engine(backbone)
    artifact = apart(lambda: make_artifact(engine.spec, "task", labels=4))
    engine.load(artifact)
    version, resident = artifact.version(1), engine.bank.get(artifact.version(1).digest)

    def plans(texts: Ids) -> tuple[Plan, ...]:
        encodings = [Encoding(tuple(text), (0,) * len(text)) for text in texts]
        return tuple(make_plan(encoding, [version], engine.spec.num_layers) for encoding in encodings)

    def direct(texts: Ids, _: bool) -> Run:
        works = [Work(plan, (resident,)) for plan in plans(texts)]
        return lambda: run_batch(lay_out(works, engine.spec.num_layers, CPU_CHUNK_TOKENS), backbone)

    def submitted(texts: Ids, _: bool) -> Run:
        request = EngineRequest(plans(texts))
        return lambda: engine.submit(request).result()

    if not is_submitted:
        return Local(DIRECT, dtype, direct)
    engine.start()
    return Local(SUBMITTED, dtype, submitted, takes_all=True)
