"""What the commands of learning share at a terminal: the machine's options, progress, and how failures end."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from app.engine.backbone import EMBEDDED, Backbone, set_threads
from app.engine.host_memory import keep_freed_memory
from app.errors import ManifoldError
from app.learning.cache import MAX_BYTES, MEMORY
from app.learning.trainer import Epoch


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and machine")
    group.add_argument("--model", default=EMBEDDED, help="a folder, a Hugging Face id, or embedded (default)")
    group.add_argument("--device", default="auto", help="cpu, cuda, or auto (default): cuda where there is one")
    group.add_argument(
        "--dtype", default="auto", help="of the frozen layers while training, default auto; figures are float32's"
    )
    group.add_argument("--threads", type=int, metavar="N", help="of one operator on a CPU; default torch's own choice")
    group.add_argument(
        "--memory",
        type=_bytes,
        metavar="GB",
        help=f"for the texts' states; more of them lie on disk, in TMPDIR; default {MAX_BYTES / 1e9:g}",
    )


def backbones(args: argparse.Namespace) -> tuple[Backbone, Backbone]:
    """One to train on, one in float32 to measure with; the same where they do not differ."""
    keep_freed_memory()
    set_threads(args.threads)
    if args.memory is not None:
        MEMORY.max_bytes = args.memory
    backbone = Backbone.load(args.model, args.device, args.dtype)
    if backbone.spec.dtype == "float32":
        return backbone, backbone
    return backbone, Backbone.load(args.model, args.device, "float32")


def _bytes(text: str) -> int:
    """Of so many gigabytes."""
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = -1.0
    if not 0 <= gigabytes < math.inf:
        raise argparse.ArgumentTypeError(f'"{text}" is no number of gigabytes, like 4 or 0.5')
    return int(gigabytes * 1e9)


def numbers(text: str) -> tuple[int, ...]:
    """As an option gives them: joined by commas."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f'"{text}" is not numbers joined by commas, like 2,4,6') from error


def guarded(name: str, work: Callable[[], int], interrupted: str = "nothing was written") -> int:
    """What `work` returns; 1 with one sentence on stderr where it fails, 130 where it was interrupted."""
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        return work()
    except ManifoldError as error:
        errors.print(f"manifold {name}: {error}", markup=False)
        return 1
    except KeyboardInterrupt:
        errors.print(f"manifold {name}: interrupted, {interrupted}", markup=False)
        return 130


class Screen:
    """Bars for the stages, a line for each epoch and each arrangement."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task: Any = None

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def stage(self, name: str, total: int) -> None:
        if not self._console.is_terminal:
            self._console.print(f"{name}: {total}" if total else name)
        self._task = self._progress.add_task(name, total=total or None)

    def advance(self, steps: int) -> None:
        self._progress.advance(self._task, steps)

    def epoch(self, epoch: Epoch, measure: str) -> None:
        mark = "  best so far" if epoch.is_best else ""
        self._console.print(f"epoch {epoch.number:3g}  loss {epoch.loss:.4f}  dev {measure} {epoch.dev:.4f}{mark}")
        self.advance(1)

    def candidate(self, name: str, passes: float, dev: float, seconds: float) -> None:
        line = f"{passes:.2f} passes  dev {dev:.4f}  {seconds:5.0f} s  {name}"
        self._console.print(line, markup=False, soft_wrap=True)
        self.advance(1)

    def notice(self, sentences: Sequence[str]) -> None:
        for sentence in sentences:
            self._console.print(f"note: {sentence}", markup=False, soft_wrap=True)
