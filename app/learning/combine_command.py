"""`manifold combine`: writes representations and their next versions. Knows the command line and the screen."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from app.domain import ReadoutKind
from app.errors import SettingsError
from app.learning import command, jobs_file, writer
from app.learning.combine import CHANGES, READOUTS, combine, update
from app.learning.learn import Files
from app.learning.terminal import Screen, add_machine_arguments, backbones, guarded, numbers

_DESCRIPTION = """Combine prefixes into a representation, in the order given. No training.

It is served as an embedding under --name, and `manifold learn --prefixes DIR` fits heads on it that share its row.
With --update one of its prefixes is replaced, and the heads in --heads are fitted again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("artifacts", nargs="*", type=Path, metavar="DIR", help="artifacts whose prefixes are combined")
    parser.add_argument("--name", help="the model name of POST /v1/embeddings")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    kinds = [kind.value for kind in READOUTS]
    parser.add_argument("--readout", choices=kinds, default=ReadoutKind.MEAN.value, help="default mean")
    parser.add_argument("--read-layers", type=numbers, default=(), metavar="N,N", help="default: the last layer")
    group = parser.add_argument_group("a new version")
    group.add_argument("--update", type=Path, metavar="DIR", help="the representation")
    group.add_argument(
        "--replace", type=_replacement, metavar="OLD=DIR", help="a prefix's task or digest, and what takes its place"
    )
    group.add_argument(
        "--heads",
        nargs="+",
        type=Path,
        default=[],
        metavar="DIR",
        help="artifacts that read it, or a folder of artifacts: those in it that do",
    )
    group.add_argument("--config", type=Path, metavar="FILE", help="their files, as manifold learn --config reads them")
    add_machine_arguments(parser)


def _replacement(text: str) -> tuple[str, Path]:
    old, is_there, new = text.partition("=")
    if not (old and is_there and new):
        raise argparse.ArgumentTypeError(
            f'"{text}" is not a task or digest and a folder, like entailment=new/entailment'
        )
    return old, Path(new)


def run(args: argparse.Namespace) -> int:
    """0; 1 with one sentence on stderr; 130 where it was interrupted."""
    return guarded("combine", lambda: _combine(args) if args.update is None else _update(args))


def _combine(args: argparse.Namespace) -> int:
    if args.replace or args.heads or args.config:
        raise SettingsError("--replace, --heads and --config go with --update DIR, the representation")
    if not args.name:
        raise SettingsError("--name must be given: it is what requests call the representation")
    console = Console()
    for sentence in writer.check_owner(args.out, args.name):
        console.print(f"note: {sentence}", markup=False, soft_wrap=True)
    _, exact = backbones(args)
    manifest = combine(args.name, args.artifacts, args.out, exact, ReadoutKind(args.readout), args.read_layers)
    grid = Grid("prefix of", "virtual tokens", "from layer", "digest")
    for entry in manifest["prefixes"]:
        grid.add_row(entry["task"], str(entry["num_virtual_tokens"]), str(entry["first_layer"]), entry["digest"][:19])
    console.print(grid)
    console.print(
        f"{args.name}: {args.out} ({manifest['cost']['passes_alone']:g} passes alone, "
        f"{manifest['cost']['passes']:g} beside tasks on the bare trunk)",
        soft_wrap=True,
    )
    return 0


def _update(args: argparse.Namespace) -> int:
    if args.artifacts or args.name:
        raise SettingsError("--update takes name and prefixes from the representation: leave out --name and folders")
    if args.replace is None:
        raise SettingsError("--replace OLD=DIR must be given: which prefix goes, and the artifact whose prefix comes")
    if args.heads and args.config is None:
        raise SettingsError("--config must be given: its [tasks.NAME] name the files that heads are fitted on again")
    files = {} if args.config is None else _files(args.config)
    console = Console()
    pair = backbones(args)
    with Screen(console) as screen:
        changes = update(args.update, args.replace, args.heads, files, args.out, pair, screen)
    _show(changes, args.out, console)
    return 0


def _files(config: Path) -> dict[str, Files]:
    parser = argparse.ArgumentParser(prog="manifold learn")
    command.add_arguments(parser)
    read = (parser.parse_args(job.arguments) for job in jobs_file.read_jobs(config, parser))
    return {args.task: Files(args.train, args.dev, args.test) for args in read}


def _show(changes: Mapping[str, Any], out: Path, console: Console) -> None:
    grid = Grid("head", "figures of", "measure", "before", "after", "change")
    for task, change in changes["heads"].items():
        for split in ("dev", "test"):
            if split in change:
                grid.add_row(task, split, change["measure"], *_compared(change[split], change["measure"]))
    if changes["heads"]:
        console.print(grid)
    console.print(f"{changes['representation']}: {out}, what changed is in {out / CHANGES}", soft_wrap=True)


def _compared(change: Mapping[str, Mapping[str, float]], measure: str) -> tuple[str, ...]:
    before, after = change["before"].get(measure), change["after"].get(measure)
    if before is None or after is None:  # undefined, where all scores are equal
        return "", "", ""
    return f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}"
