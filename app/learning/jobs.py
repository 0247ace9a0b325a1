"""`manifold learn --config tasks.toml`: the tasks of a file, each learned by a process of its own, some at a time.

Knows the processes and the screen; of learning only where a manifest keeps its figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from app.engine.artifact import MANIFEST
from app.engine.backbone import cores
from app.errors import SettingsError
from app.learning.cache import MAX_BYTES
from app.learning.jobs_file import Job, read_jobs

# `env`, because OpenMP reads the policy when it is loaded: waiting threads of several processes must not spin.
_CHILD = ("env", "OMP_WAIT_POLICY=PASSIVE", sys.executable, "-u", "-m", "app.learning.command")
_GRACE_S = 120.0  # from SIGINT to SIGKILL: a child still measures and writes its best so far
_CHUNK_BYTES = 1 << 16
_INTERRUPTED = 130
BEST_WRITTEN = "the best so far was written"  # what an interrupted run says last, where it is so


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("many tasks")
    group.add_argument("--config", type=Path, metavar="FILE", help="learn every [tasks.NAME] of this TOML file")
    group.add_argument(
        "--jobs",
        type=int,
        default=max(1, cores() // 2),
        metavar="N",
        help="how many of them at once; default one for two cores: %(default)s",
    )


def run(config: Path, jobs: int, parser: argparse.ArgumentParser, console: Console) -> int:
    """Learn the tasks of `config`, `jobs` at once. `parser` is that of `manifold learn`: it says what a table may hold.

    Returns 0; 1 where a task failed; 130 where it was stopped. Raises SettingsError before anything starts.
    """
    runs = [_Run(job) for job in read_jobs(config, parser)]
    if jobs < 1:
        raise SettingsError("--jobs must be 1 or more")
    at_once = min(jobs, len(runs))
    share = (f"--threads={max(1, cores() // at_once)}", f"--memory={MAX_BYTES / 1e9 / at_once:g}")
    with _live(runs, console) if console.is_terminal else nullcontext():
        tell = _silent if console.is_terminal else _teller(console)
        was_stopped = asyncio.run(_run_all(runs, at_once, share, tell))
    _show(runs, console)
    if was_stopped:
        return _INTERRUPTED
    return 0 if all(run.state is _State.DONE for run in runs) else 1


def next_step(out: Path) -> str:
    """What comes behind learning."""
    return f"publish it as a candidate: manifold publish {shlex.quote(str(out))}"


# -- the processes -----------------------------------------------------------------------------------------------------


class _State(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


@dataclass(slots=True, eq=False)
class _Run:
    """A job on its way."""

    job: Job
    state: _State = _State.WAITING
    last_line: str = ""  # of its output
    last_error: str = ""  # of its stderr
    began_s: float = 0.0
    ended_s: float | None = None
    num_notes: int = 0  # on its data

    @property
    def is_written(self) -> bool:
        """An artifact of this run is there: an interrupted one may have left its best so far."""
        return self.state is _State.DONE or (self.state is _State.INTERRUPTED and BEST_WRITTEN in self.last_error)

    @property
    def seconds(self) -> float:
        if not self.began_s:
            return 0.0
        return (time.monotonic() if self.ended_s is None else self.ended_s) - self.began_s

    def begin(self) -> None:
        self.state, self.began_s = _State.RUNNING, time.monotonic()

    def end(self, status: int, was_stopped: bool) -> None:
        self.ended_s = time.monotonic()
        if status == 0:
            self.state = _State.DONE
            return
        self.state = _State.INTERRUPTED if was_stopped else _State.FAILED
        if status < 0:
            self.last_error = f"it was ended by signal {-status} ({signal.strsignal(-status)})"
        if status == -signal.SIGKILL and not was_stopped:
            self.last_error += "; if memory ran out, give fewer --jobs"


_Tell = Callable[[_Run], None]


async def _run_all(runs: Sequence[_Run], at_once: int, share: Sequence[str], tell: _Tell) -> bool:
    """Whether a signal stopped it. `share`: options of each. No process is left when it returns."""
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[None] = loop.create_future()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # under nohup it is ignored
            loop.add_signal_handler(number, _stop, stop)
    free = asyncio.Semaphore(at_once)
    await asyncio.gather(*(_run_one(run, share, free, stop, tell) for run in runs))
    return stop.done()


def _stop(stop: asyncio.Future[None]) -> None:
    if not stop.done():
        stop.set_result(None)


async def _run_one(
    run: _Run, share: Sequence[str], free: asyncio.Semaphore, stop: asyncio.Future[None], tell: _Tell
) -> None:
    async with free:
        if stop.done():
            return
        run.begin()
        tell(run)
        try:
            status = await _learn(run, share, stop)
        except OSError as error:
            status, run.last_error = 1, f"its log cannot be written or it cannot be started: {error}"
        run.end(status, stop.done())
        tell(run)


async def _learn(run: _Run, share: Sequence[str], stop: asyncio.Future[None]) -> int:
    """The exit status of the child, all of whose output is in the log then."""
    run.job.log.parent.mkdir(parents=True, exist_ok=True)
    with run.job.log.open("wb", buffering=0) as log:
        # A session of its own: Ctrl-C reaches the child through us alone.
        process = await asyncio.create_subprocess_exec(
            *(*_CHILD, *share, *run.job.arguments),
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=PIPE,
            start_new_session=True,
        )
        assert process.stdout is not None and process.stderr is not None

        def took(line: bytes, is_error: bool) -> None:
            log.write(line + b"\n")
            text = line.decode("utf-8", "replace").strip()
            run.last_line = text or run.last_line
            run.num_notes += text.startswith("note: ")
            if is_error:
                run.last_error = text or run.last_error

        try:
            *_, status = await asyncio.gather(
                _follow(process.stdout, lambda line: took(line, False)),
                _follow(process.stderr, lambda line: took(line, True)),
                _ended(process, stop),
            )
        finally:
            if process.returncode is None:
                _kill(process)
                await process.wait()
    return status


async def _follow(stream: asyncio.StreamReader, took: Callable[[bytes], None]) -> None:
    rest = b""
    while chunk := await stream.read(_CHUNK_BYTES):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            took(line)
    if rest:
        took(rest)


async def _ended(process: Process, stop: asyncio.Future[None]) -> int:
    """The exit status. After `stop` the process gets SIGINT, and SIGKILL when it does not heed that."""
    ended = asyncio.ensure_future(process.wait())
    either: set[asyncio.Future[Any]] = {ended, stop}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    if not ended.done():
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        await asyncio.wait({ended}, timeout=_GRACE_S)
    if not ended.done():
        _kill(process)
    return await ended


def _kill(process: Process) -> None:
    """With all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


# -- the screen --------------------------------------------------------------------------------------------------------


def _live(runs: Sequence[_Run], console: Console) -> Live:
    return Live(get_renderable=lambda: _progress(runs), console=console, refresh_per_second=4, transient=True)


def _progress(runs: Sequence[_Run]) -> Table:
    table = Table("task", "state")
    table.add_column("seconds", justify="right")
    table.add_column("last line", no_wrap=True, overflow="ellipsis")
    for run in runs:
        table.add_row(Text(run.job.name), run.state, f"{run.seconds:.0f}", Text.from_ansi(run.last_line))
    return table


def _silent(_: _Run) -> None:
    """The live table says it."""


def _teller(console: Console) -> _Tell:
    """A line when a task starts and when it ends."""

    def tell(run: _Run) -> None:
        if run.state is _State.RUNNING:
            _print(console, f"{run.job.name} started, its output is in {run.job.log}")
        else:
            _print(console, f"{run.job.name} {run.state} after {run.seconds:.1f} s")

    return tell


def _show(runs: Sequence[_Run], console: Console) -> None:
    table = Table("task", "state", "measure")
    for name in ("dev", "test", "passes", "seconds"):
        table.add_column(name, justify="right")
    for run in runs:
        table.add_row(Text(run.job.name), run.state, *_figures(run), f"{run.seconds:.1f}")
    console.print(table)
    for run in runs:
        if run.num_notes:
            notes = "1 note" if run.num_notes == 1 else f"{run.num_notes} notes"
            _print(console, f"{run.job.name}: {notes} on its data, see {run.job.log}")
        if run.state is _State.WAITING:
            _print(console, f"{run.job.name} was not begun: give a file with the tasks that are left")
        elif run.state is not _State.DONE:
            reason = (run.last_error or run.last_line).removeprefix("manifold learn: ").removeprefix("interrupted, ")
            _print(console, f"{run.job.name} {run.state}: {reason} (see {run.job.log})")
        if run.is_written:
            _print(console, f"{run.job.name}: {next_step(run.job.out)}")


def _figures(run: _Run) -> list[str]:
    """Measure, its dev and test figure, and passes, as the task's manifest has them."""
    manifest = _manifest(run.job.out) if run.is_written else {}
    evaluation = manifest.get("evaluation", {})
    measure = evaluation.get("measure", "")
    figures = [evaluation.get(split, {}).get(measure) for split in ("dev", "test")]
    passes = manifest.get("cost", {}).get("passes")
    return [measure, *("" if f is None else f"{f:.4f}" for f in figures), "" if passes is None else f"{passes:.2f}"]


def _manifest(out: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((out / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest


def _print(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
