"""int8 weights in the engine's layers: what they gain, and how far scores move. Writes INT8.md.

    make bench-int8      # in an environment of its own, .venv-limits, which has torchao

Scores: of the golden examples of the shipped tasks, against those that they state. Times: one task without a prefix
through the engine's layout, layers, mean and head; the engines take turns.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from torch import Tensor, nn

from app.domain import Encoding
from app.engine import layers
from app.engine.artifact import read_artifact
from app.engine.backbone import Backbone, set_threads
from app.engine.batch import Work, lay_out
from app.engine.engine import CPU_CHUNK_TOKENS, Engine
from app.engine.forward import run_batch
from app.engine.golden import check_golden
from app.engine.host_memory import keep_freed_memory
from app.engine.plan import make_plan
from app.engine.tokenizer import TextTokenizer
from tests.bench.limits_cases import Case, even_case, timed_turn
from tests.bench.machine import describe

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

SHIPPED = Path(__file__).parents[2] / "prefixes"
REPORT = Path(__file__).with_name("INT8.md")
CASES = ((1, 32), (8, 32), (8, 128), (32, 64))
ALLOWED = 1e-2  # how far a score may move
Product = Callable[[Tensor, Tensor], object]


@dataclass
class Subject:
    name: str
    engine: Engine
    moved: dict[str, float]  # by shipped task: the largest difference of a golden score
    turns_s: dict[str, list[float]]

    def median_ms(self, case: str) -> float:
        return 1000 * statistics.median(self.turns_s[case])


def quantized(config: object) -> Product:
    """The engine's product, over a weight that torchao keeps."""

    def make(weight: Tensor, bias: Tensor) -> object:
        linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        quantize_(linear, config)
        return layers._Product(linear.weight, linear.bias)

    return make


def open_subject(name: str, product: Product, model: str) -> Subject:
    ours, layers._product = layers._product, product  # type: ignore[assignment]
    try:
        backbone = Backbone.load(model, "cpu", "float32")
        engine = Engine(backbone)
        engine.start()
        tokenizer, moved = TextTokenizer(backbone.path), {}
        for folder in sorted(path.parent for path in SHIPPED.glob("*/manifest.json")):
            artifact = read_artifact(folder, engine.spec)
            engine.load(artifact)
            moved[folder.name] = check_golden(engine, tokenizer, artifact) or 0.0
    finally:
        layers._product = ours  # only now: layers are fused at their first run
    return Subject(name, engine, moved, {})


def runs_of(subject: Subject, case: Case) -> Callable[[], object]:
    """A run of the case with one shipped task that reads the bare trunk."""
    artifact = read_artifact(SHIPPED / "spam", subject.engine.spec)
    known, num_layers = artifact.version(1), subject.engine.spec.num_layers
    resident = subject.engine.bank.get(known.digest)
    encodings = [Encoding(tuple(text), (0,) * len(text)) for text in case.texts]
    works = [Work(make_plan(encoding, [known], num_layers), (resident,)) for encoding in encodings]
    return lambda: run_batch(lay_out(works, num_layers, CPU_CHUNK_TOKENS), subject.engine.backbone)


def measure(subjects: list[Subject], rounds: int, turn_s: float) -> None:
    for texts, tokens in CASES:
        case = even_case(texts, tokens)
        runs = [runs_of(subject, case) for subject in subjects]
        for run in runs:
            timed_turn(run, turn_s)
        for _ in range(rounds):
            for subject, run in zip(subjects, runs, strict=True):
                subject.turns_s.setdefault(case.name, []).append(timed_turn(run, turn_s))


def report(subjects: list[Subject], threads: int, rounds: int) -> str:
    plain = subjects[0]
    cases = list(plain.turns_s)
    today = datetime.now(UTC).date()
    lines = [
        "# int8 weights in the engine's layers",
        "",
        f"{today}, {describe(threads)}, torchao {version('torchao')}. Written by `make bench-int8`; {rounds} rounds in "
        "which the engines take turns.",
        "",
        "Milliseconds of a batch (texts × tokens), and in bold the ratio to float32; the largest difference of a score "
        f"over the golden examples of the {len(plain.moved)} shipped tasks. Allowed: {ALLOWED:g}.",
        "",
        f"| weights | {' | '.join(cases)} | scores move by up to | within {ALLOWED:g} |",
        "|---" * (len(cases) + 3) + "|",
    ]
    for subject in subjects:
        cells = [f"{subject.median_ms(c):.1f}, **{subject.median_ms(c) / plain.median_ms(c):.2f}**" for c in cases]
        task, most = max(subject.moved.items(), key=lambda found: found[1])
        told = f"{most:.3f} ({task})" if most > 1e-4 else "0"
        within = f"{sum(value <= ALLOWED for value in subject.moved.values())} of {len(subject.moved)} tasks"
        lines.append(f"| {subject.name} | {' | '.join(cells)} | {told} | {within} |")
    lines += [
        "",
        "int8 is offered only where scores stay within what is allowed for every shipped task.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="the folder of all-MiniLM-L6-v2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--turn-s", type=float, default=0.3)
    options = parser.parse_args()
    keep_freed_memory()
    set_threads(options.threads)
    subjects = [
        open_subject("float32, packed for oneDNN (ours)", layers._product, options.model),
        open_subject("int8 weights (`Int8WeightOnlyConfig`)", quantized(Int8WeightOnlyConfig()), options.model),
        open_subject(
            "int8 weights and, a row each, activations (`Int8DynamicActivationInt8WeightConfig`)",
            quantized(Int8DynamicActivationInt8WeightConfig()),
            options.model,
        ),
    ]
    measure(subjects, options.rounds, options.turn_s)
    REPORT.write_text(report(subjects, options.threads, options.rounds))
    for subject in subjects:
        subject.engine.close()
    print(f"written: {REPORT}")


if __name__ == "__main__":
    main()
