"""Where a batch's time goes, operator by operator, and a request's, stage by stage: what stands before the targets.

    make bench-profile

Writes PROFILE.md. Shares are of one process alone; it compares nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from app.engine.backbone import Backbone, set_threads
from app.engine.batch import Work, lay_out
from app.engine.engine import CPU_CHUNK_TOKENS, Engine
from app.engine.forward import run_batch
from app.engine.host_memory import keep_freed_memory
from app.engine.plan import make_plan
from tests.bench.load_open import run_alone, stages
from tests.bench.load_texts import make_texts
from tests.bench.machine import describe
from tests.bench.serving_artifacts import READOUT, write_prefixes
from tests.bench.serving_servers import MANIFOLD, manifold, running
from tests.engine.models import make_artifact, random_encoding

REPORT = Path(__file__).with_name("PROFILE.md")
CASES = ((1, 32), (8, 32), (32, 64))
_SHOWN = 9
_REPETITIONS = 50
LENGTHS = ("16", "64", "256")  # tokens of a request's text
_REQUESTS = 500


def batch_of(engine: Engine, texts: int, tokens: int) -> Callable[[], object]:
    """A run of one task without a prefix."""
    artifact = make_artifact(engine.spec, "task", labels=4)
    engine.load(artifact)
    plans = [
        make_plan(random_encoding(tokens, seed), [artifact.version(1)], engine.spec.num_layers) for seed in range(texts)
    ]
    works = [Work(plan, (engine.bank.get(plan.versions[0].digest),)) for plan in plans]
    return lambda: run_batch(lay_out(works, engine.spec.num_layers, CPU_CHUNK_TOKENS), engine.backbone)


def table(run: Callable[[], object]) -> list[str]:
    """Operators by their own time, in milliseconds for one batch."""
    for _ in range(10):
        run()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(_REPETITIONS):
            run()
    found = sorted(profiled.key_averages(), key=lambda event: event.self_cpu_time_total, reverse=True)
    whole = sum(event.self_cpu_time_total for event in found)
    lines = ["| operator | calls | ms | share |", "|---|---|---|---|"]
    for event in found[:_SHOWN]:
        own_ms = event.self_cpu_time_total / 1000 / _REPETITIONS
        share = 100 * event.self_cpu_time_total / whole
        lines.append(f"| `{event.key}` | {event.count // _REPETITIONS} | {own_ms:.2f} | {share:.0f} % |")
    return [*lines, f"| all operators | | {whole / 1000 / _REPETITIONS:.2f} | 100 % |"]


def request_table(backbone: Backbone, threads: int, dtype: str) -> list[str]:
    """Medians in milliseconds of a server's stages, for one caller who waits for each answer."""
    lines = [
        "| tokens | latency | engine | latency − engine | tokenizing | queue | HTTP and threads | socket and client |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_prefixes(folder / "prefixes", backbone.spec)
        server = manifold(folder, threads, dtype)
        failures: dict[str, str] = {}
        with running([server], threads, folder, failures) as started:
            if failures:
                raise RuntimeError(failures[MANIFOLD])
            one, (call,) = started[MANIFOLD], server.jobs[READOUT.name].calls
            one.resume()
            for length in LENGTHS:
                quoted = make_texts(backbone.path, length, folder).file.read_text().splitlines()
                bodies = [call.body(quoted[i % len(quoted)]) for i in range(_REQUESTS)]
                answers = run_alone(one.url, call.path, bodies)[_REQUESTS // 10 :]
                lines.append(f"| {length} | {' | '.join(f'{ms:.2f}' for ms in stages(answers))} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-profile", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, default=REPORT)
    options = parser.parse_args()
    keep_freed_memory()
    set_threads(options.threads)
    backbone = Backbone.load("embedded", "cpu", options.dtype)
    backbone.release_layers()
    engine = Engine(backbone)
    lines = [
        "# Profile of a batch and a request",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {describe(options.threads, options.dtype)}. Written by `make bench-profile`.",
        "",
        f"One task that reads the bare trunk. The encoder's layers hold {_layer_mb(backbone):.0f} MB of weights, "
        "and a batch reads all of them, however small it is.",
    ]
    for texts, tokens in CASES:
        lines += ["", f"## {texts} × {tokens} tokens", "", *table(batch_of(engine, texts, tokens))]
    lines += [
        "",
        "## One request at a time",
        "",
        "One text a request, one task, one caller on one connection; medians in milliseconds. The engine, tokenizing "
        "and the queue are from the headers of the answer; HTTP and threads is the rest of its `x-total-time`; the "
        "socket and the client are what the latency has beyond that.",
        "",
        *request_table(backbone, options.threads, options.dtype),
    ]
    options.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _layer_mb(backbone: Backbone) -> float:
    width, inner = backbone.spec.hidden_size, backbone.family.config.intermediate_size
    numbers = backbone.spec.num_layers * (4 * width * width + 2 * width * inner)
    return numbers * torch.empty(0, dtype=backbone.dtype).element_size() / 1e6


if __name__ == "__main__":
    main()
