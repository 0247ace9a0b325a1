"""`manifold predict --file`: a file of texts in, the same rows with every prediction out, part by part.

Wires source, flow, parts and screen, and says how it went. A run that was stopped goes on with the same command.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import shlex
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from app.client.bulk_columns import Outcome, with_answers
from app.client.bulk_flow import Flow, Predictor
from app.client.bulk_parts import Parts, Summary, open_parts
from app.client.bulk_predictors import EnginePredictor, Question, ServerPredictor
from app.client.bulk_sink import SINKS
from app.client.bulk_source import ROWS, Chunk, RawChunk, format_of, read_chunks
from app.client.http import MisuseError, Server, settings_of
from app.client.setting_options import given_settings
from app.client.tables import print_json, say
from app.config import Settings, option_name
from app.errors import ManifoldError
from app.rollout import printable

SOME_FAILED = 3
_INTERRUPTED = 130
_LAYOUT = 1  # of the parts
_PATIENT_MS = 3_600_000.0  # nobody waits for one request of an engine of our own


class StoppedError(ManifoldError):
    """The run has not ended; what is kept of it is used when it goes on."""


@dataclass(frozen=True, slots=True)
class Job:
    source: Path
    input_format: str
    out: Path
    question: Question
    all_scores: bool
    concurrency: int
    patience_s: float

    @classmethod
    def of(cls, options: argparse.Namespace) -> Job:
        """Raises MisuseError."""
        source, out = Path(options.file), Path(options.out or "")
        if options.out is None or out.suffix.lower() not in SINKS:
            raise MisuseError(f"--out names the file to write, which ends in {', '.join(SINKS)}")
        if not out.absolute().parent.is_dir():
            raise MisuseError(f"there is no folder {out.absolute().parent} for --out: make it first")
        if not source.is_file():
            raise MisuseError(f"there is no file {source}")
        if out.exists() and out.samefile(source):
            raise MisuseError("--out is the file that is read: take another name")
        input_format = options.input_format or format_of(source)
        if input_format is None:
            raise MisuseError(f"{source} does not say what it is: give --input-format")
        question = Question(tuple(options.task) if options.task else None, options.unit, options.truncate)
        return cls(source, input_format, out, question, options.scores, options.concurrency, options.patience)

    def made_of(self) -> dict[str, Any]:
        """All that decides what stands in the parts, named as people are told."""
        stat, asked = self.source.stat(), self.question
        return {
            "--file": str(self.source.resolve()),
            "size of the file": stat.st_size,
            "time of the file's last change": stat.st_mtime_ns,
            "--input-format": self.input_format,
            "--task": None if asked.tasks is None else list(asked.tasks),
            "--unit": asked.unit,
            "--truncate": asked.truncate,
            "--scores": self.all_scores,
            "layout of the parts": [_LAYOUT, ROWS],
        }


def predict_file(options: argparse.Namespace) -> int:
    """The exit status. Raises ManifoldError where the run cannot begin or had to stop."""
    job = Job.of(options)
    _check_place(options)
    console = Console(stderr=True, soft_wrap=True)
    with open_parts(job.out, job.made_of(), options.overwrite) as parts:
        screen = Screen(console)
        try:
            with _predictor(options, job) as predictor, screen:
                asyncio.run(_run(job, parts, predictor, screen))
        except ManifoldError as error:
            if not screen.kept:
                raise
            raise StoppedError(f"{error}; {_to_go_on(options, screen.kept)}") from error
        except KeyboardInterrupt:
            console.print(f"manifold: interrupted; {_to_go_on(options, screen.kept)}", markup=False, highlight=False)
            return _INTERRUPTED
        summary = parts.join()
    return _tell(options, job, summary, screen)


# -- the run -----------------------------------------------------------------------------------------------------------


async def _run(job: Job, parts: Parts, predictor: Predictor, screen: Screen) -> None:
    """Keeps every part of the input that is not kept yet."""
    flow = Flow(predictor, job.concurrency, job.patience_s, screen.advance)
    # Enough of them that all requests in flight have rows while the oldest part ends and is written.
    most_open = 2 + math.ceil(job.concurrency * predictor.max_rows / ROWS)
    begun: deque[tuple[Chunk, asyncio.Task[list[Outcome]]]] = deque()
    chunks, passed_over = read_chunks(job.source, job.input_format), parts.count

    async def keep_oldest() -> None:
        chunk, answering = begun[0]
        table = await asyncio.to_thread(with_answers, chunk.carried, await answering, job.all_scores)
        await asyncio.to_thread(parts.keep, table)
        begun.popleft()
        screen.keep(table.num_rows)

    try:
        while (raw := await asyncio.to_thread(next, chunks, None)) is not None:
            screen.read(raw)
            if passed_over:
                passed_over -= 1
                screen.pass_over(raw)
                continue
            chunk = await asyncio.to_thread(raw.parse)
            begun.append((chunk, asyncio.create_task(flow.answer(chunk))))
            if len(begun) == most_open:
                await keep_oldest()
        while begun:
            await keep_oldest()
    finally:
        for _, answering in begun:
            answering.cancel()
        await asyncio.gather(*(answering for _, answering in begun), return_exceptions=True)
        await predictor.close()


@contextmanager
def _predictor(options: argparse.Namespace, job: Job) -> Iterator[Predictor]:
    if not options.in_process:
        yield ServerPredictor(Server.of(options), job.question, job.concurrency)
        return
    settings = _engine_settings(given_settings(options))
    runtime = options.open_runtime(settings)
    try:
        yield EnginePredictor(runtime.inference.predict, job.question, settings.max_client_batch_size)
    finally:
        runtime.close()


def _check_place(options: argparse.Namespace) -> None:
    given = given_settings(options)
    if given and not options.in_process:
        raise MisuseError(f"{option_name(min(given))} goes with --in-process: a server has its own settings")
    if options.url is not None and options.in_process:
        raise MisuseError("--url and --in-process exclude each other")


def _engine_settings(given: Mapping[str, object]) -> Settings:
    settings = settings_of({**given, "host": "127.0.0.1"})  # nothing listens, so nothing need be protected
    if "deadline_ms" in settings.model_fields_set:
        return settings
    return settings.model_copy(update={"deadline_ms": _PATIENT_MS})


# -- what people see ---------------------------------------------------------------------------------------------------


class Screen:
    """A bar over all rows, whose number is estimated from the share of the file that has been read."""

    def __init__(self, console: Console) -> None:
        self.kept = 0  # rows in parts, those of earlier runs included
        self.passed_over = 0
        self._num_read = 0
        self._began_s = time.monotonic()
        self.duration_s = 0.0  # of this run, without what it passed over
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} of about {task.total:,.0f} rows"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task: TaskID | None = None
        self._num_done = 0

    def __enter__(self) -> Screen:
        self._began_s = time.monotonic()
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.duration_s = time.monotonic() - self._began_s
        self._progress.stop()

    def read(self, raw: RawChunk) -> None:
        self._num_read += raw.num_rows
        total = self._num_read / raw.share
        if self._task is None:
            self._task = self._progress.add_task("predicting", total=total, rate="")
        self._progress.update(self._task, total=total)

    def pass_over(self, raw: RawChunk) -> None:
        self.passed_over += raw.num_rows
        self.kept += raw.num_rows
        self._began_s = time.monotonic()
        self._show()

    def advance(self, rows: int) -> None:
        self._num_done += rows
        self._show()

    def keep(self, rows: int) -> None:
        self.kept += rows

    def _show(self) -> None:
        rate = self._num_done / max(time.monotonic() - self._began_s, 1e-6)
        if self._task is not None:
            completed = self.passed_over + self._num_done
            self._progress.update(self._task, completed=completed, rate=f"{rate:,.0f} rows/s")


def _to_go_on(options: argparse.Namespace, kept: int) -> str:
    return f"{kept:,} rows are kept, and this goes on from there: {_command(options.arguments)}"


def _command(arguments: list[str]) -> str:
    """As it was typed, but what must not be said twice: --overwrite would begin again, and a key is a secret."""
    shown, is_secret = ["manifold"], False
    for argument in arguments:
        if is_secret:
            shown.append("TOKEN")
        elif argument.startswith("--key="):
            shown.append("--key=TOKEN")
        elif argument != "--overwrite":
            shown.append(argument)
        is_secret = argument == "--key"
    return shlex.join(shown)


def _tell(options: argparse.Namespace, job: Job, summary: Summary, screen: Screen) -> int:
    rows = summary.rows - screen.passed_over
    rate = rows / max(screen.duration_s, 1e-6)
    if options.json:
        answer = {"out": str(job.out), "rows": summary.rows, "failed": summary.failed, "rows_per_s": round(rate, 1)}
        print_json(answer)
    else:
        say(f"{summary.rows:,} rows in {job.out}, {summary.rows - summary.failed:,} answered, {summary.failed:,} not")
        before = f" ({screen.passed_over:,} were there before)" if screen.passed_over else ""
        say(f"{rows:,} rows in {screen.duration_s:.1f} s, {rate:,.1f} rows/s{before}", "dim")
    if summary.first_failure is not None:
        number, error = summary.first_failure
        told = f"manifold: {summary.failed:,} rows have an error; the first is row {number:,}: {error}"
        sys.stderr.write(printable(told) + "\n")
    return SOME_FAILED if summary.failed else 0
