"""`manifold learn --config tasks.toml`: the tasks of a file, each learned by a process of its own, some at a time.

Knows the file, the processes and the screen; of learning only its options and where a manifest keeps its figures.
"""

from __future__ import annotations

import argparse
import asyncio
import difflib
import json
import os
import shlex
import signal
import sys
import time
import tomllib
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable, Iterator, Mapping, Sequence
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

# `env`, because OpenMP reads the policy when it is loaded: waiting threads of several processes must not spin.
_CHILD = ("env", "OMP_WAIT_POLICY=PASSIVE", sys.executable, "-u", "-m", "app.learning.command")
_GRACE_S = 120.0  # from SIGINT to SIGKILL: a child still measures and writes its best so far
_CHUNK_BYTES = 1 << 16
_INTERRUPTED = 130
_NOT_OF_A_TASK = {"help", "config", "jobs"}
_OF_ONE_TASK = {"task", "out"}
_FILES = ("train", "dev", "test")

BEST_WRITTEN = "the best so far was written"  # what an interrupted run says last, where it is so

_Value = str | bool
_KINDS: dict[object, tuple[tuple[type, ...], str]] = {
    None: ((str,), "text in quotes"),
    str: ((str,), "text in quotes"),
    Path: ((str,), "a path in quotes"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
}
_ANY_KIND = ((str, int, float), "text, a number or a list of them")


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


# -- the file ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Job:
    """One task of the file, checked: its arguments to `manifold learn`."""

    name: str
    out: Path
    arguments: tuple[str, ...]

    @property
    def log(self) -> Path:
        return self.out.with_name(f"{self.out.name}.log")


def next_step(out: Path) -> str:
    """What comes behind learning."""
    return f"publish it as a candidate: manifold publish {shlex.quote(str(out))}"


def read_jobs(config: Path, parser: argparse.ArgumentParser) -> list[Job]:
    """The tasks in the order of the file. Raises SettingsError naming table and key of what cannot be run."""
    content = _read(config)
    actions = _actions(parser)
    defaults = _values(f"{config.name}, [defaults]", content.get("defaults", {}), actions, config.parent)
    for name in sorted(_OF_ONE_TASK & defaults.keys()):
        raise SettingsError(f"{config.name}, [defaults]: {name} is of one task alone: put it under [tasks.NAME]")
    jobs = []
    for name, table in content["tasks"].items():
        where = f"{config.name}, [tasks.{name}]"
        values = defaults | _values(where, table, actions, config.parent)
        jobs.append(_job(where, name, values, config.parent))
    _check_outs(config.name, jobs)
    return jobs


def _read(config: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(config.read_text("utf-8-sig"))
    except OSError as error:
        raise SettingsError(f"{config} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise SettingsError(f"{config} is not TOML in UTF-8: {error}") from error
    for key in content:
        if key not in ("defaults", "tasks"):
            raise SettingsError(f"{config.name}: {key} has no meaning here: put it into [defaults] or [tasks.NAME]")
    if not isinstance(content.get("tasks"), dict) or not content["tasks"]:
        raise SettingsError(f"{config.name} has no tasks: add a table [tasks.NAME] with train, a file, for each")
    return content


def _job(where: str, name: str, values: Mapping[str, _Value], root: Path) -> Job:
    if "train" not in values:
        raise SettingsError(f"{where}: train is missing: name the file of labelled texts")
    task = str(values.get("task", name))
    out = str(values.get("out", root / "out" / task))
    values = {"task": task, **values, "out": out}
    return Job(name, Path(out), tuple(token for option in values for token in _tokens(option, values[option])))


def _tokens(option: str, value: _Value) -> Iterator[str]:
    if isinstance(value, str):
        yield f"--{option}={value}"
    elif value:
        yield f"--{option}"


def _check_outs(file: str, jobs: Sequence[Job]) -> None:
    seen: dict[Path, str] = {}
    for job in jobs:
        first = seen.setdefault(job.out.resolve(), job.name)
        if first != job.name:
            raise SettingsError(
                f"{file}, [tasks.{job.name}]: out is {job.out}, as in [tasks.{first}]: give each task its own"
            )


# -- its values --------------------------------------------------------------------------------------------------------


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """What a table of the file may hold, by option with dashes between words."""
    options = parser._option_string_actions.items()
    named = {option[2:]: action for option, action in options if option.startswith("--")}
    return {name: action for name, action in named.items() if name not in _NOT_OF_A_TASK}


def _values(where: str, table: object, actions: Mapping[str, argparse.Action], root: Path) -> dict[str, _Value]:
    """Of one table, by option, as the command line takes them."""
    if not isinstance(table, dict):
        raise SettingsError(f"{where} must be a table of options")
    values: dict[str, _Value] = {}
    for key, value in table.items():
        name = key.replace("_", "-")
        if name not in actions:
            near = difflib.get_close_matches(name, actions, 1)
            meant = f": {near[0].replace('-', '_')} is" if near else ""
            raise SettingsError(f"{where}: {key} is no option of manifold learn{meant}")
        if name in values:
            raise SettingsError(f"{where}: {key} is given twice, once with dashes and once with underscores")
        values |= _value(f"{where}: {key}", name, value, actions, root)
    return values


def _value(where: str, name: str, value: Any, actions: Mapping[str, argparse.Action], root: Path) -> dict[str, _Value]:
    action = actions[name]
    if action.nargs != 0:
        return {name: _text(where, name, value, action, root)}
    if not isinstance(value, bool):
        raise SettingsError(f"{where} must be true or false, not {_shown(value)}")
    opposite = f"no-{name}"
    values: dict[str, _Value] = {name: value}
    return values | ({opposite: not value} if opposite in actions else {})


def _text(where: str, name: str, value: Any, action: argparse.Action, root: Path) -> str:
    kinds, expected = _KINDS.get(action.type, _ANY_KIND)
    parts = value if isinstance(value, list) else [value]
    wrong = SettingsError(f"{where} must be {expected}, not {_shown(value)}")
    if any(isinstance(part, bool) or not isinstance(part, kinds) for part in parts):
        raise wrong
    text = ",".join(str(part) for part in parts)
    try:
        converted = action.type(text) if callable(action.type) else text
    except argparse.ArgumentTypeError as error:
        raise SettingsError(f"{where}: {error}") from error
    except (TypeError, ValueError) as error:
        raise wrong from error
    if isinstance(value, list) and not isinstance(converted, tuple):
        raise wrong
    if action.choices is not None and converted not in action.choices:
        raise SettingsError(f"{where} must be one of {', '.join(map(str, action.choices))}, not {_shown(value)}")
    return _placed(where, name, converted, text, root)


def _placed(where: str, name: str, converted: object, text: str, root: Path) -> str:
    """Paths from the folder of the file on; models and prefixes only where they are there, as they may be names."""
    if isinstance(converted, Path):
        path = root / converted
        if name in _FILES and not path.is_file():
            raise SettingsError(f"{where} names {path}, and no such file is there")
        return str(path)
    if name == "model":
        return _beside(root, text)
    if isinstance(converted, tuple) and all(isinstance(part, Path) for part in converted):
        return ",".join(_beside(root, str(part)) for part in converted)
    return text


def _beside(root: Path, text: str) -> str:
    return str(root / text) if (root / text).is_dir() else text


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


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
