"""`manifold compress`: writes a smaller version of an artifact. Knows the command line and the screen."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from app.engine.artifact import TENSORS
from app.learning.compress import Step, compress
from app.learning.learn import Files
from app.learning.terminal import Screen, add_machine_arguments, backbones, guarded
from app.learning.writer import REPORT

_DESCRIPTION = """Write a smaller version of an artifact: fewer virtual tokens, in half precision.

The fewest tokens are kept whose dev score is within --tolerance of the artifact's own; a version that loses more is
not written. Give the data that the task was learned from."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("artifact", type=Path, metavar="DIR", help="an artifact with a prefix of its own")
    parser.add_argument("--train", type=Path, required=True, metavar="FILE", help="the head is fitted again on it")
    told = "says which tokens matter and what is lost; may be left out where the task was learned without one too"
    parser.add_argument("--dev", type=Path, metavar="FILE", help=told)
    parser.add_argument("--test", type=Path, metavar="FILE", help="measured at the end")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the smaller artifact's folder")
    parser.add_argument(
        "--tolerance", type=float, default=0.5, metavar="X", help="points of dev score that may be lost; 0.5"
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="this number of virtual tokens; default: the fewest")
    add_machine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """0; 1 with one sentence on stderr; 130 where it was interrupted."""
    return guarded("compress", lambda: _compress(args))


def _compress(args: argparse.Namespace) -> int:
    console = Console()
    pair = backbones(args)
    files = Files(args.train, args.dev, args.test)
    steps: list[Step] = []
    try:
        with Screen(console) as screen:
            tolerance = args.tolerance / 100
            manifest = compress(
                args.artifact, files, args.out, pair, screen, tolerance, args.tokens, steps.append, _typed()
            )
    finally:
        if len(steps) > 1:
            console.print(_curve(steps))
    _show(manifest, args.out, console)
    if not manifest["compressed"]["interrupted"]:
        return 0
    Console(stderr=True).print("manifold compress: interrupted, the smallest so far was written", soft_wrap=True)
    return 130


def _typed() -> str:
    return shlex.join(["manifold", "compress", *sys.argv[2:]])


def _curve(steps: list[Step]) -> Grid:
    grid = Grid("head")
    for name in ("virtual tokens", "dev", "change", "bytes"):
        grid.add_column(name, justify="right")
    for step in steps:
        change = f"{100 * (step.dev - steps[0].dev):+.2f}"
        grid.add_row(step.head, str(step.num_virtual_tokens), f"{step.dev:.4f}", change, f"{step.size_bytes:,}")
    return grid


def _show(manifest: dict[str, Any], out: Path, console: Console) -> None:
    measure, story = manifest["evaluation"]["measure"], manifest["compressed"]
    found = ", ".join(
        f"{name} {before.get(measure, 0):.4f} → {manifest['evaluation'][name].get(measure, 0):.4f}"
        for name, before in story["before"].items()
    )
    sizes = f"{story['curve'][0]['size_bytes']:,} → {(out / TENSORS).stat().st_size:,} bytes"
    tokens = f"{story['curve'][0]['num_virtual_tokens']} → {manifest['prefixes'][0]['num_virtual_tokens']}"
    console.print(f"{manifest['task']}: {out}: {tokens} virtual tokens, {sizes}, {measure} {found}", soft_wrap=True)
    console.print(f"report: {out / REPORT}", soft_wrap=True)
