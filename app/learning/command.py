"""`manifold learn`: from files of labelled texts to an artifact. Knows the command line and the screen."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as Grid

from app.domain import ProblemType, ReadoutKind
from app.engine.backbone import EMBEDDED, Backbone, keep_freed_memory, set_threads
from app.errors import ManifoldError
from app.learning.learn import Files, learn
from app.learning.recipe import Recipe
from app.learning.trainer import Epoch

_DESCRIPTION = """Learn a task from labelled texts and write its artifact.

Files are TSV, CSV or JSON lines with the columns text (or text_a and text_b) and label, labels (joined by |) or
score; or JSON lines with tokens and tags (BIO)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = Recipe(task="")
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--task", required=True, metavar="NAME", help="the name that requests use")
    parser.add_argument("--train", required=True, type=Path, metavar="FILE")
    parser.add_argument("--dev", required=True, type=Path, metavar="FILE", help="picks the epoch and the thresholds")
    parser.add_argument("--test", type=Path, metavar="FILE", help="measured at the end")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the artifact's folder")
    kinds = [kind.value for kind in ProblemType if kind is not ProblemType.EMBEDDING]
    parser.add_argument("--problem-type", choices=kinds, help="where the columns do not say it")
    _add_model_arguments(parser)
    _add_training_arguments(parser, default)


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is learned")
    readouts = [kind.value for kind in ReadoutKind]
    group.add_argument("--readout", choices=readouts, help="default attention; tokens where tokens are tagged")
    group.add_argument("--read-layers", type=_numbers, metavar="N,N", help="default: the last of each third")
    group.add_argument("--num-queries", type=int, metavar="N", help="for each layer read: 2 for up to 8 labels, else 4")
    group.add_argument("--hidden", type=int, metavar="N", help=_HIDDEN)
    group.add_argument(
        "--num-virtual-tokens", type=int, default=0, metavar="N", help="of a prefix of the task's own; default none"
    )
    group.add_argument("--first-layer", type=int, default=0, metavar="N", help="where that prefix begins; default 0")
    group.add_argument("--prefixes", type=_folders, default=(), metavar="DIR,DIR", help="combine these, frozen")
    group.add_argument("--model", default=EMBEDDED, help="a folder, a Hugging Face id, or embedded (default)")


def _add_training_arguments(parser: argparse.ArgumentParser, default: Recipe) -> None:
    group = parser.add_argument_group("how it is trained")
    for name in ("epochs", "batch_size", "seed"):
        group.add_argument(_flag(name), type=int, default=getattr(default, name), metavar="N", help=_DEFAULT)
    for name in ("learning_rate", "query_learning_rate", "prefix_learning_rate", "weight_decay", "dropout"):
        group.add_argument(_flag(name), type=float, default=getattr(default, name), metavar="X", help=_DEFAULT)
    group.add_argument("--device", default="auto", help="cpu, cuda, or auto (default): cuda where there is one")
    group.add_argument(
        "--dtype", default="auto", help="of the frozen layers while training, default auto; figures are float32's"
    )
    group.add_argument("--threads", type=int, metavar="N", help="of one operator on a CPU; default torch's own choice")


_DEFAULT = "default %(default)s"
_HIDDEN = "width of the head's hidden layer, 0: a linear head; default by labels: 32 up to 8, 64 up to 100, else 96"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f'"{text}" is not numbers joined by commas, like 2,4,6') from error


def _folders(text: str) -> tuple[Path, ...]:
    return tuple(Path(part) for part in text.split(",") if part)


def run(args: argparse.Namespace) -> int:
    """0; 1 with one sentence on stderr; 130 where it was interrupted."""
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        keep_freed_memory()
        set_threads(args.threads)
        files = Files(args.train, args.dev, args.test)
        problem_type = None if args.problem_type is None else ProblemType(args.problem_type)
        with _Screen(Console()) as screen:
            manifest = learn(_recipe(args), files, args.out, _backbones(args), screen, problem_type)
    except ManifoldError as error:
        errors.print(f"manifold learn: {error}", markup=False)
        return 1
    except KeyboardInterrupt:
        errors.print("manifold learn: interrupted, nothing was written")
        return 130
    _show(manifest, args.out)
    return 0


def _recipe(args: argparse.Namespace) -> Recipe:
    return Recipe(
        task=args.task,
        readout=None if args.readout is None else ReadoutKind(args.readout),
        read_layers=args.read_layers or (),
        num_queries=args.num_queries,
        hidden=args.hidden,
        first_layer=args.first_layer,
        num_virtual_tokens=args.num_virtual_tokens,
        prefixes=args.prefixes,
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        query_learning_rate=args.query_learning_rate,
        prefix_learning_rate=args.prefix_learning_rate,
        weight_decay=args.weight_decay,
        dropout=args.dropout,
        seed=args.seed,
    )


def _backbones(args: argparse.Namespace) -> tuple[Backbone, Backbone]:
    """One to train on, one in float32 to measure with; the same where they do not differ."""
    backbone = Backbone.load(args.model, args.device, args.dtype)
    if backbone.spec.dtype == "float32":
        return backbone, backbone
    return backbone, Backbone.load(args.model, args.device, "float32")


class _Screen:
    """Bars for the stages, a line for each epoch."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task: Any = None

    def __enter__(self) -> _Screen:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def stage(self, name: str, total: int) -> None:
        if not self._console.is_terminal:
            self._console.print(f"{name}: {total}")
        self._task = self._progress.add_task(name, total=total)

    def advance(self, steps: int) -> None:
        self._progress.advance(self._task, steps)

    def epoch(self, epoch: Epoch, measure: str) -> None:
        mark = "  best so far" if epoch.is_best else ""
        self._console.print(f"epoch {epoch.number:3}  loss {epoch.loss:.4f}  dev {measure} {epoch.dev:.4f}{mark}")
        self.advance(1)


def _show(manifest: dict[str, Any], out: Path) -> None:
    console = Console()
    measured = {name: figures for name, figures in manifest["evaluation"].items() if isinstance(figures, dict)}
    names = list(measured["dev"])
    grid = Grid("", *names)
    for split, figures in measured.items():
        grid.add_row(split, *(f"{figures[n]:.4f}" if n != "rows" else str(figures[n]) for n in names))
    console.print(grid)
    size_kb = sum(file.stat().st_size for file in out.iterdir()) / 1000
    console.print(f"{manifest['task']}: {out} ({size_kb:.0f} kB)", soft_wrap=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="manifold learn")
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
