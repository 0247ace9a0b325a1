"""`make bench-fanout`: measures what N tasks cost side by side in one run and writes tests/bench/FANOUT.md.

Run it on a machine that does nothing else: a second busy process makes the threads of both wait for each other.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path

from rich.console import Console

from app.engine.backbone import Backbone, apart, set_threads
from app.engine.host_memory import keep_freed_memory
from tests.bench.fanout import (
    COUNTS,
    KINDS,
    Cell,
    Texts,
    making_texts,
    measure_adapterhub,
    measure_engine,
    measure_peft,
)
from tests.bench.machine import describe
from tests.bench.resident import Resident, measure_resident
from tests.bench.startup import measure_startup

_REPORT = Path(__file__).with_name("FANOUT.md")
_SHAPES = ((1, 32), (8, 32), (8, 128))  # texts, tokens


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3, help="least number for a cell")
    parser.add_argument("--budget-s", type=float, default=1.5, help="a cell is repeated until this is used up")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--no-compile", action="store_true", help="the bare forward is eager, whichever is faster")
    parser.add_argument("--quick", action="store_true", help="32 tokens and up to 16 tasks only; writes no report")
    args = parser.parse_args()
    keep_freed_memory()
    set_threads(args.threads)
    console = Console(highlight=False)
    cells: list[Cell] = []
    for dtype in args.dtypes:
        backbone = apart(partial(Backbone.load, "embedded", "cpu", dtype))
        for texts, tokens in _SHAPES[:2] if args.quick else _SHAPES:
            is_compiled = not args.no_compile
            with making_texts(backbone.path, dtype, texts, tokens, is_compiled, args.threads) as shape:
                for cell in _cells(args, backbone, shape):
                    console.print(_line(cell))
                    cells.append(cell)
    resident = measure_resident(Backbone.load("embedded", "cpu", "float32"))
    console.print(asdict(resident))
    startup_s = measure_startup()
    console.print(f"start to ready: {startup_s:.1f} s")
    text = _report(args.threads, cells, resident, startup_s)
    if args.quick:
        console.print(text)
    else:
        _REPORT.write_text(text)
        console.print(f"written: {_REPORT.relative_to(Path.cwd())}")


def _cells(args: argparse.Namespace, backbone: Backbone, texts: Texts) -> Iterator[Cell]:
    counts = [n for n in COUNTS if n <= 16]
    all_counts = counts if args.quick else COUNTS
    yield from measure_engine(backbone, texts, all_counts, args.repetitions, args.budget_s)
    yield from apart(lambda: list(measure_peft(backbone, texts, counts, args.repetitions, args.budget_s)))
    yield from measure_adapterhub(backbone.path, texts, counts, args.threads, 2 * args.repetitions)


def _line(cell: Cell) -> str:
    planned = f"{cell.ratio / cell.passes:5.2f} of plan" if cell.passes else ""
    what = f"{cell.texts.name}: {cell.kind:36} {cell.tasks:3} tasks"
    return f"{what} {cell.median_ms:9.1f} ms {cell.ratio:6.2f} × bare {planned}{' (missed)' if cell.misses else ''}"


def _report(threads: int, cells: Sequence[Cell], resident: Resident, startup_s: float) -> str:
    dtypes = dict.fromkeys(cell.texts.dtype for cell in cells)
    parts = [
        "# Fan-out: what N tasks cost\n",
        f"{date.today()}, {describe(threads, ' and '.join(dtypes))}. Written by `make bench-fanout`.\n",
        "Each number is time over that of the bare backbone's forward (transformers, no task at all, eager or compiled "
        "as is faster) on the same texts in the same dtype: the median of paired turns. In brackets planned passes. "
        "Prefixes have 16 virtual tokens. AdapterHub's is over an eager forward in its own environment.\n",
        "The target, for up to 16 tasks: at most 1.08 times the planned passes for 8 texts, 1.2 times for one. What "
        "misses it is marked *.\n",
    ]
    for texts in dict.fromkeys(cell.texts for cell in cells):
        of_texts = [cell for cell in cells if cell.texts is texts]
        parts.append(f"## {texts.name}\n")
        parts.append(f"The bare forward is {texts.bare_name}.\n")
        parts.append(_table(of_texts))
        parts.append(_misses(of_texts))
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
    return f"{cell.ratio:.2f}" + (f" ({cell.passes:.2f})" if cell.passes else "") + ("*" if cell.misses else "")


def _misses(cells: Sequence[Cell]) -> str:
    held = [cell for cell in cells if cell.passes and cell.tasks <= 16]
    missed = [cell for cell in held if cell.misses]
    worst = max(held, key=lambda cell: cell.ratio / (cell.passes or 1.0))
    over = worst.ratio / (worst.passes or 1.0)
    return (
        f"{len(held) - len(missed)} of {len(held)} cells are within {worst.texts.most_over_plan:.2f} times their plan; "
        f"the furthest is {worst.kind}, N = {worst.tasks}, at {over:.2f} times: {'**not met**' if missed else 'met'}.\n"
    )


if __name__ == "__main__":
    main()
