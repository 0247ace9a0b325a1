"""Steps in processes: none before what it needs, and the one who waits hears of every end that a process can have."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from app.errors import DataError, ManifoldError
from app.learning.experiment_plan import Cell, Kind, Ledger, Outcome, Part, Step
from app.learning.experiment_workers import Work, run_steps
from tests.serving import wait_for

FIRST, SECOND = (Step(Kind.SOURCE, 0, name) for name in ("a", "b"))
BOTH = Step(Kind.TARGETS, 0, "combination", (FIRST, SECOND))
ALONE = Step(Kind.TARGETS, 0, "bare trunk")
STEPS = [FIRST, SECOND, BOTH, ALONE]


class Kept:
    def __init__(self) -> None:
        self.found: dict[Cell, Outcome] = {}

    def add(self, cell: Cell, outcome: Outcome) -> None:
        self.found[cell] = outcome


def cell_of(step: Step) -> Cell:
    return Cell(Part.SOURCE, step.seed, step.name, "")


def _go_wrong(fault: str, folder: Path) -> None:
    match fault:
        case "error":
            raise DataError("row 7 is empty")
        case "bug":
            raise ZeroDivisionError("by nothing")
        case "end of file":
            raise EOFError("half a file")
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "long":
            (folder / "began").touch()
            time.sleep(300)
        case "slow":
            time.sleep(0.5)


def prepared(folder: Path, fault: str, ledger: Ledger) -> Work:
    """Each step finds its cell once its needs have left a file each."""
    if fault == "prepare":
        raise DataError("nothing is there")
    (folder / f"pid-{os.getpid()}").touch()

    def work(step: Step) -> None:
        assert all((folder / need.name).exists() for need in step.needs)
        if step == SECOND:
            _go_wrong(fault, folder)
        (folder / step.name).touch()
        if cell_of(step) not in ledger.found:
            ledger.add(cell_of(step), Outcome(os.getpid(), 0.0, 0.0))

    return work


def test_what_is_needed_comes_first_and_what_is_known_is_left(tmp_path: Path) -> None:
    kept = Kept()
    kept.add(cell_of(ALONE), Outcome(-1.0, 0.0, 0.0))
    run_steps(STEPS, 2, partial(prepared, tmp_path, "slow"), kept)
    assert set(kept.found) == set(map(cell_of, STEPS))
    assert kept.found[cell_of(ALONE)].score == -1
    assert os.getpid() not in {outcome.score for outcome in kept.found.values()}
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("prepare", "^nothing is there$"),
        ("error", "source b, seed 0: row 7 is empty"),
        ("bug", r"source b, seed 0: ZeroDivisionError\('by nothing'\)"),
        ("end of file", r"source b, seed 0: EOFError\('half a file'\)"),
        ("killed", "ended in source b, seed 0 with exit status -9"),
    ],
)
def test_a_failure_reaches_the_one_who_waits(tmp_path: Path, fault: str, words: str) -> None:
    with pytest.raises(ManifoldError, match=words):
        run_steps(STEPS, 2 if fault == "error" else 1, partial(prepared, tmp_path, fault), Kept())
    assert not multiprocessing.active_children()


def test_an_interrupt_ends_all_and_what_was_found_is_kept(tmp_path: Path) -> None:
    def interrupt() -> None:
        while not (tmp_path / "began").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    kept, waiter = Kept(), threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
    waiter.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_steps(STEPS, 1, partial(prepared, tmp_path, "long"), kept)
    finally:
        signal.signal(signal.SIGINT, before)
    waiter.join()
    assert set(kept.found) == {cell_of(FIRST)}
    assert not multiprocessing.active_children()


def _run_long(folder: Path) -> None:
    run_steps(STEPS, 1, partial(prepared, folder, "long"), Kept())


def test_workers_end_with_the_parent_however_it_ends(tmp_path: Path) -> None:
    parent = multiprocessing.get_context("spawn").Process(target=_run_long, args=(tmp_path,))
    parent.start()
    wait_for(lambda: (tmp_path / "began").exists(), 60)
    (worker,) = (int(path.name.removeprefix("pid-")) for path in tmp_path.glob("pid-*"))
    parent.kill()
    parent.join()
    wait_for(lambda: not Path(f"/proc/{worker}").exists() or "Z" in Path(f"/proc/{worker}/stat").read_text().split()[2])
