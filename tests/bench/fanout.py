"""Fan-out: the engine's time for N tasks over the bare backbone's forward on the same texts, beside its peers.

The bare forward is transformers' own, eager or compiled, whichever is faster on these texts, in a process of its own.
It and the engine take turns, and each cell is the median of the ratios of neighbours, so that a slow moment hits both.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from app.domain import Encoding, EngineRequest, TaskVersion
from app.engine.backbone import Backbone, apart
from app.engine.engine import Engine
from app.engine.plan import make_plan
from tests.bench.limits_cases import even_case, timed_turn
from tests.bench.limits_process import torch_subject
from tests.bench.limits_torch import COMPILED, DTYPES, EAGER
from tests.engine.models import make_artifact

VIRTUAL_TOKENS = 16
_TURN_S = 0.1  # how long each runs before the other does, at least
COUNTS = (1, 2, 4, 8, 16, 32, 64)
_ROOT = Path(__file__).resolve().parents[2]
_ADAPTERHUB = _ROOT / ".venv-adapterhub/bin/python"


@dataclass(frozen=True)
class Texts:
    """What all rows of one table are measured on, and the bare forward that they are measured by."""

    dtype: str
    encodings: tuple[Encoding, ...]
    bare_name: str
    bare_s: Callable[[float], float]  # median seconds of the bare forwards that fill so many seconds

    @property
    def name(self) -> str:
        count, tokens = len(self.encodings), len(self.encodings[0])
        return f"{count} text{'s' if count > 1 else ''} of {tokens} tokens, {self.dtype}"

    @property
    def most_over_plan(self) -> float:
        """The target, for up to 16 tasks."""
        return 1.08 if len(self.encodings) >= 8 else 1.2


@dataclass(frozen=True)
class Cell:
    """One measurement. `ratio` is over the bare forward of the same texts."""

    kind: str
    tasks: int
    texts: Texts
    passes: float | None  # planned; None for peers
    median_ms: float
    ratio: float

    @property
    def misses(self) -> bool:
        """Whether it is over the target."""
        if self.passes is None or self.tasks > 16:
            return False
        return self.ratio > self.texts.most_over_plan * self.passes


_READOUT: dict[str, object] = {"readout": "attention", "layers": [2, 4, 6]}
KINDS: dict[str, dict[str, object]] = {
    "own prefix, first layer 0": {"prefixes": [(VIRTUAL_TOKENS, 0)], "position_offset": VIRTUAL_TOKENS},
    "own prefix, first layer 3": {"prefixes": [(VIRTUAL_TOKENS, 3)]},
    "own prefix, first layer 4": {"prefixes": [(VIRTUAL_TOKENS, 4)]},
    "own prefix, first layer 5": {"prefixes": [(VIRTUAL_TOKENS, 5)]},
    "one combination of 8 prefixes": {"prefixes": [(VIRTUAL_TOKENS, 3)] * 8, "shared": True},
    # The sizes that `manifold learn` chooses for up to 8 and up to 100 labels.
    "attention readouts, 2 queries, hidden 32": {**_READOUT, "num_queries": 2, "hidden": 32},
    "attention readouts, 4 queries, hidden 64": {**_READOUT, "num_queries": 4, "hidden": 64},
}


@contextmanager
def making_texts(path: str, dtype: str, texts: int, tokens: int, with_compiled: bool, threads: int) -> Iterator[Texts]:
    case = even_case(texts, tokens)
    with ExitStack() as stack:
        names = [EAGER, *([COMPILED] if with_compiled else [])]
        ways = [stack.enter_context(torch_subject(name, path, dtype, threads)) for name in names]
        for way in ways:
            way.settle(case)
        best = min(ways, key=lambda way: way.turn_s(case, 0.3))
        encodings = tuple(Encoding(tuple(ids), (0,) * tokens) for ids in case.texts)
        yield Texts(dtype, encodings, best.name, partial(best.turn_s, case))


def measure_engine(
    backbone: Backbone, texts: Texts, counts: Sequence[int], least_repetitions: int, budget_s: float
) -> Iterator[Cell]:
    """A cell for each kind and count."""
    engine = Engine(backbone)
    engine.start()
    for kind, options in KINDS.items():
        versions = [_version(engine, options, seed) for seed in range(max(counts))]
        for count in counts:
            plans = tuple(make_plan(e, versions[:count], engine.spec.num_layers) for e in texts.encodings)
            request = EngineRequest(plans)

            def run(request: EngineRequest = request) -> object:
                return engine.submit(request).result()

            median_s, ratio = side_by_side(run, texts.bare_s, least_repetitions, budget_s)
            yield Cell(kind, count, texts, plans[0].passes, median_s * 1000, ratio)
        for version in versions:
            engine.unload(version.digest)
    engine.close()


def measure_peft(
    backbone: Backbone, texts: Texts, counts: Sequence[int], least_repetitions: int, budget_s: float
) -> Iterator[Cell]:
    """N adapters on one PEFT model, switched between N forwards."""
    ids = torch.tensor([e.input_ids for e in texts.encodings])
    mask = torch.ones_like(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=VIRTUAL_TOKENS)
        base = AutoModelForSequenceClassification.from_pretrained(
            backbone.path, num_labels=4, dtype=DTYPES[texts.dtype]
        )
        model = get_peft_model(base, config, adapter_name="task0")
        for index in range(1, max(counts)):
            model.add_adapter(f"task{index}", config)
        model.eval()
    for count in counts:

        @torch.inference_mode()
        def run(count: int = count) -> object:
            outputs = []
            for index in range(count):
                model.set_adapter(f"task{index}")
                outputs.append(model(input_ids=ids, attention_mask=mask).logits)
            return outputs

        median_s, ratio = side_by_side(run, texts.bare_s, least_repetitions, budget_s)
        yield Cell("PEFT, a forward a task", count, texts, None, median_s * 1000, ratio)


def measure_adapterhub(
    path: str, texts: Texts, counts: Sequence[int], threads: int, repetitions: int
) -> Iterator[Cell]:
    """AdapterHub's Parallel, in its own environment, over an eager forward there. In float32 alone.

    Nothing where that is not installed (`make bench-peers`).
    """
    if not _ADAPTERHUB.exists() or texts.dtype != "float32":
        return
    for first_layer in (0, 4):
        for count in counts:
            asked = {
                "model": path,
                "tasks": count,
                "texts": len(texts.encodings),
                "tokens": len(texts.encodings[0]),
                "threads": threads,
                "repetitions": repetitions,
                "prefix_length": VIRTUAL_TOKENS,
                "first_layer": first_layer,
            }
            command = [str(_ADAPTERHUB), str(_ROOT / "tests/bench/peers/adapterhub.py")]
            done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=True)
            answer = json.loads(done.stdout.strip().splitlines()[-1])
            kind = f"AdapterHub Parallel, first layer {first_layer}"
            ratio = answer["median_s"] / answer["bare_median_s"]
            yield Cell(kind, count, texts, None, answer["median_s"] * 1000, ratio)


def side_by_side(
    subject: Callable[[], object], bare_s: Callable[[float], float], least: int, budget_s: float
) -> tuple[float, float]:
    """Median seconds of `subject` and median ratio to the bare turns around it, after one warm-up of each."""
    subject()
    began = time.perf_counter()
    seconds: list[float] = []
    ratios: list[float] = []
    before = bare_s(_TURN_S)
    while len(seconds) < least or time.perf_counter() - began < budget_s:
        seconds.append(timed_turn(subject, _TURN_S))
        after = bare_s(_TURN_S)
        ratios.append(seconds[-1] / ((before + after) / 2))
        before = after
    return statistics.median(seconds), statistics.median(ratios)


def _version(engine: Engine, options: dict[str, object], seed: int) -> TaskVersion:
    """A version with random tensors; of a shared kind all versions have the prefixes of the first."""
    own = {key: value for key, value in options.items() if key != "shared"}
    shared = 0 if options.get("shared") else seed
    artifact = apart(lambda: make_artifact(engine.spec, f"task{seed}", seed=shared, labels=4, **own))
    engine.load(artifact)
    return artifact.version(1)
