"""Steps of the experiment in several processes at once: each takes the next that is ready, and tells every cell.

Knows processes, and which step needs which; nothing of what a step does.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from app.errors import ManifoldError
from app.learning.experiment_plan import Cell, Ledger, Outcome, Step

_SPAWN = multiprocessing.get_context("spawn")  # threads and CUDA live through no fork
_GRACE_S = 10.0  # from SIGTERM to SIGKILL

Work = Callable[[Step], None]
Prepare = Callable[[Ledger], Work]  # once in each process; sent to it, so a function of a module or a partial of one


@dataclass(frozen=True, slots=True)
class _Found:
    """A cell, as a worker sends it."""

    cell: Cell
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class _Failed:
    sentence: str
    trace: str  # empty where the sentence says all


class _ParentGone(Exception):
    """Nobody is there to tell."""


class _Sent:
    """A worker's ledger: what is added goes to the parent, who keeps it."""

    def __init__(self, connection: Connection, found: Mapping[Cell, Outcome]) -> None:
        self._connection = connection
        self.found = dict(found)

    def add(self, cell: Cell, outcome: Outcome) -> None:
        self.found[cell] = outcome
        try:
            self._connection.send(_Found(cell, outcome))
        except OSError as error:
            raise _ParentGone from error


class _Worker:
    """One process, seen from outside."""

    def __init__(self, prepare: Prepare, found: Mapping[Cell, Outcome]) -> None:
        self.connection, theirs = _SPAWN.Pipe()
        self.process: BaseProcess = _SPAWN.Process(target=_serve, args=(theirs, prepare, dict(found)), daemon=True)
        self.process.start()
        theirs.close()  # so that its end is heard
        self.step: Step | None = None

    def give(self, step: Step) -> None:
        self.step = step
        with suppress(OSError):  # it has died: whoever listens hears of it
            self.connection.send(step)


def run_steps(steps: Sequence[Step], jobs: int, prepare: Prepare, ledger: Ledger) -> None:
    """Do all steps, `jobs` at once, each behind those that it needs. What `ledger` has is not found again.

    Raises ManifoldError where a step fails or a process dies; the others are ended then, as on KeyboardInterrupt.
    """
    waiting, done = list(steps), set[Step]()
    workers: list[_Worker] = []
    try:
        for _ in range(min(jobs, len(waiting))):
            workers.append(_Worker(prepare, ledger.found))
        while len(done) < len(steps):
            for worker in workers:
                ready = next((step for step in waiting if done.issuperset(step.needs)), None)
                if worker.step is None and ready is not None:
                    waiting.remove(ready)
                    worker.give(ready)
            for connection in wait([worker.connection for worker in workers]):
                worker = next(each for each in workers if each.connection is connection)
                message = _heard(worker)
                if message is None:
                    assert worker.step is not None
                    done.add(worker.step)
                    worker.step = None
                else:
                    ledger.add(message.cell, message.outcome)
    finally:
        _end(workers)


def _heard(worker: _Worker) -> _Found | None:
    """The next that a worker tells: a cell, or None where its step is done."""
    try:
        message = worker.connection.recv()
    except (EOFError, OSError):
        worker.process.join(_GRACE_S)
        where = "" if worker.step is None else f" in {worker.step}"
        code = worker.process.exitcode
        raise ManifoldError(
            f"a process ended{where} with exit status {code}; -9 is mostly too little memory: try fewer --jobs, and "
            "go on with --resume"
        ) from None
    if isinstance(message, _Failed):
        if message.trace:
            sys.stderr.write(message.trace)
        raise ManifoldError(message.sentence)
    assert message is None or isinstance(message, _Found)
    return message


def _end(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.process.terminate()
    for worker in workers:
        worker.process.join(_GRACE_S)
        if worker.process.is_alive():
            worker.process.kill()
        worker.connection.close()


# -- in a worker's process ---------------------------------------------------------------------------------------------


def _serve(connection: Connection, prepare: Prepare, found: Mapping[Cell, Outcome]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and says what is to be done
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # half-written folders are taken away
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    what = ""
    try:
        work = prepare(_Sent(connection, found))
        while (step := _received(connection)) is not None:
            what = f"{step}: "
            work(step)
            connection.send(None)
    except _ParentGone:
        return
    except Exception as error:
        is_told = isinstance(error, ManifoldError)
        sentence = str(error) if is_told else repr(error)
        with suppress(OSError):
            connection.send(_Failed(what + sentence, "" if is_told else traceback.format_exc()))


def _received(connection: Connection) -> Step | None:
    """None where the parent is gone."""
    try:
        step: Step = connection.recv()
    except (EOFError, OSError):
        return None
    return step


def _end_with_the_parent() -> None:
    """However it ends: a step may take an hour, and its result would find nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
