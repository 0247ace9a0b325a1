"""`make bench`: measures everything side by side in one run and writes tests/bench/REPORT.md.

Run it on a machine that does nothing else: a second busy process makes the threads of both wait for each other.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path

from rich.console import Console

from app.engine.backbone import Backbone, keep_freed_memory, set_threads
from tests.bench.fanout import COUNTS, KINDS, Cell, measure_adapterhub, measure_engine, measure_peft
from tests.bench.machine import describe
from tests.bench.resident import Resident, measure_resident
from tests.bench.startup import measure_startup

_REPORT = Path(__file__).with_name("REPORT.md")


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3, help="least number for a cell")
    parser.add_argument("--budget-s", type=float, default=1.5, help="a cell is repeated until this is used up")
    parser.add_argument("--quick", action="store_true", help="32 tokens and up to 16 tasks only; writes no report")
    args = parser.parse_args()
    keep_freed_memory()
    set_threads(args.threads)
    console = Console(highlight=False)
    counts = [n for n in COUNTS if n <= 16] if args.quick else COUNTS
    backbone = Backbone.load("embedded", "cpu", "float32")
    cells: list[Cell] = []
    for tokens in (32,) if args.quick else (32, 128):
        sources: list[Iterable[Cell]] = [
            measure_engine(backbone, tokens, counts, args.repetitions, args.budget_s),
            measure_peft(backbone, tokens, [n for n in counts if n <= 16], args.repetitions, args.budget_s),
            measure_adapterhub(
                backbone.path, tokens, [n for n in counts if n <= 16], args.threads, 2 * args.repetitions
            ),
        ]
        for source in sources:
            for cell in source:
                console.print(_line(cell))
                cells.append(cell)
    resident = measure_resident(backbone)
    console.print(asdict(resident))
    startup_s = measure_startup()
    console.print(f"start to ready: {startup_s:.1f} s")
    if not args.quick:
        _REPORT.write_text(_report(args.threads, cells, resident, startup_s))
        console.print(f"written: {_REPORT.relative_to(Path.cwd())}")


def _line(cell: Cell) -> str:
    planned = f"{cell.ratio / cell.passes:5.2f} of plan" if cell.passes else ""
    what = f"{cell.kind:36} {cell.tasks:3} tasks {cell.tokens:4} tokens"
    return f"{what} {cell.median_ms:9.1f} ms {cell.ratio:6.2f} × bare {planned}"


def _report(threads: int, cells: Sequence[Cell], resident: Resident, startup_s: float) -> str:
    parts = [
        "# Fan-out: what N tasks cost\n",
        f"{date.today()}, {describe(threads)}. Written by `make bench`.\n",
        "Each number is time over that of the bare backbone's forward (transformers, fused attention, no task at all) "
        "on the same 8 texts: the median of paired runs. In brackets the planned passes. "
        "Prefixes have 16 virtual tokens.\n",
    ]
    for tokens in sorted({cell.tokens for cell in cells}):
        parts.append(f"## 8 texts of {tokens} tokens\n")
        parts.append(_table([cell for cell in cells if cell.tokens == tokens]))
    parts.append("## Resident versions and start\n")
    parts.append(
        f"{resident.versions} versions, each with a prefix from layer 4, an attention readout and a head: "
        f"{resident.file_mb:.0f} MB as files (float16), {resident.memory_mb:.0f} MB in memory (float32): "
        f"{resident.memory_mb / resident.file_mb:.2f} times. Loading one takes {resident.load_ms:.1f} ms. "
        f"A request of one task takes {resident.alone_ms:.1f} ms alone and {resident.among_ms:.1f} ms among them.\n"
    )
    parts.append(f"From the command to ready with the shipped tasks: {startup_s:.1f} s.\n")
    return "\n".join(parts)


def _table(cells: Sequence[Cell]) -> str:
    counts = sorted({cell.tasks for cell in cells})
    found = {(cell.kind, cell.tasks): cell for cell in cells}
    kinds = list(dict.fromkeys(cell.kind for cell in cells))
    lines = ["| | " + " | ".join(f"N = {n}" for n in counts) + " |", "|---" * (len(counts) + 1) + "|"]
    for kind in kinds:
        row = [_entry(found.get((kind, n))) for n in counts]
        lines.append(f"| {'**' + kind + '**' if kind in KINDS else kind} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _entry(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    return f"{cell.ratio:.2f}" + (f" ({cell.passes:.2f})" if cell.passes else "")


if __name__ == "__main__":
    main()
