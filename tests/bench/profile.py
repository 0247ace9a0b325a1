"""Where a batch's time goes, operator by operator, and a request's, stage by stage: what stands before the targets.

    make bench-profile

Writes PROFILE.md. Shares are of one process alone; it compares nothing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import httpx2
import torch
from torch.profiler import ProfilerActivity, profile

from app.engine.backbone import Backbone, set_threads
from app.engine.batch import Work, lay_out
from app.engine.engine import CPU_CHUNK_TOKENS, Engine
from app.engine.forward import run_batch
from app.engine.host_memory import keep_freed_memory
from app.engine.plan import make_plan
from tests.bench.load import Call, run_wrk
from tests.bench.load_open import run_alone, stages
from tests.bench.load_texts import TextSet, make_texts
from tests.bench.machine import describe
from tests.bench.serving_artifacts import READOUT, write_prefixes
from tests.bench.serving_servers import MANIFOLD, Running, manifold, running
from tests.bench.soak import metric
from tests.engine.models import make_artifact, random_encoding

REPORT = Path(__file__).with_name("PROFILE.md")
CASES = ((1, 32), (8, 32), (32, 64))
_SHOWN = 9
_REPETITIONS = 50
LENGTHS = ("16", "64", "256")  # tokens of a request's text
_CALLERS, _LOAD_S = 64, 10
_ENGINE_STAGES = ("collate", "forward", "heads")
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


def server_tables(backbone: Backbone, threads: int, dtype: str) -> tuple[list[str], list[str]]:
    """Of one server: a request's stages where it comes alone, and what the engine does under load."""
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
            texts = [make_texts(backbone.path, length, folder) for length in LENGTHS]
            return request_table(one, call, texts), load_table(one, call, texts)


def request_table(one: Running, call: Call, texts: Sequence[TextSet]) -> list[str]:
    """Medians in milliseconds, for one caller who waits for each answer."""
    lines = [
        "| tokens | latency | engine | latency − engine | tokenizing | queue | HTTP and threads | socket and client |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for length in texts:
        quoted = length.file.read_text().splitlines()
        bodies = [call.body(quoted[i % len(quoted)]) for i in range(_REQUESTS)]
        answers = run_alone(one.url, call.path, bodies)[_REQUESTS // 10 :]
        lines.append(f"| {length.name} | {' | '.join(f'{ms:.2f}' for ms in stages(answers))} |")
    return lines


def load_table(one: Running, call: Call, texts: Sequence[TextSet]) -> list[str]:
    """With many callers: how much of the time the engine's thread is at work, from the server's own metrics."""
    lines = ["| tokens | texts a batch | a batch, ms | between two, ms | engine at work |", "|---|---|---|---|---|"]
    for length in texts:
        before, began_s = _work_done(one), time.perf_counter()
        run_wrk(one.url, [call], length.file, _CALLERS, _LOAD_S)
        wall_s = time.perf_counter() - began_s
        batches, rows, work_s = (now - then for now, then in zip(_work_done(one), before, strict=True))
        figures = f"{1000 * work_s / batches:.1f} | {1000 * (wall_s - work_s) / batches:.1f}"
        lines.append(f"| {length.name} | {rows / batches:.0f} | {figures} | {100 * work_s / wall_s:.0f} % |")
    return lines


def _work_done(one: Running) -> tuple[float, float, float]:
    """Batches, rows and seconds of the engine's stages, since the server began."""
    metrics = httpx2.get(f"{one.url}/metrics").text
    work_s = sum(metric(metrics, f'manifold_stage_duration_seconds_sum{{stage="{stage}"}}') for stage in _ENGINE_STAGES)
    return metric(metrics, "manifold_batch_rows_count"), metric(metrics, "manifold_batch_rows_sum"), work_s


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
    half = Backbone.load("embedded", "cpu", "bfloat16")
    half.release_layers()
    lines += ["", "## 1 × 32 tokens in bfloat16", "", *table(batch_of(Engine(half), 1, 32))]
    alone, loaded = server_tables(backbone, options.threads, options.dtype)
    lines += [
        "",
        "## One request at a time",
        "",
        "One text a request, one task, one caller on one connection; medians in milliseconds. The engine, tokenizing "
        "and the queue are from the headers of the answer; HTTP and threads is the rest of its `x-total-time`; the "
        "socket and the client are what the latency has beyond that.",
        "",
        *alone,
        "",
        f"## {_CALLERS} callers",
        "",
        "As many requests at once; each caller asks again when its answer is there. A batch is collating, layers and "
        "heads; what lies between two of them is waiting for requests and handing out answers.",
        "",
        *loaded,
    ]
    options.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _layer_mb(backbone: Backbone) -> float:
    width, inner = backbone.spec.hidden_size, backbone.family.config.intermediate_size
    numbers = backbone.spec.num_layers * (4 * width * width + 2 * width * inner)
    return numbers * torch.empty(0, dtype=backbone.dtype).element_size() / 1e6


if __name__ == "__main__":
    main()
