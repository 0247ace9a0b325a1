"""`manifold drift`: who drifts is read at a glance."""

from __future__ import annotations

import pytest

from app.service.drift import DriftWatcher
from app.service.runtime import Runtime
from tests.client.conftest import Run
from tests.client.recorded import answering
from tests.fakes import make_task, make_version, snapshot_of
from tests.service.test_drift import WATCHED, said, served


def watch(runtime: Runtime, count: int) -> None:
    runtime.catalog.snapshot = snapshot_of(make_task(WATCHED), make_task(make_version("intent")))
    assert isinstance(runtime.drift, DriftWatcher)
    runtime.drift.take_in([])
    runtime.drift.take_in([served(WATCHED, said(count))])
    runtime.drift.compare_all()


def test_who_drifts_is_named(run: Run, runtime: Runtime) -> None:
    watch(runtime, 300)
    done = run("drift")
    assert done.status == 0 and "drifting: spam@1\n" in done.out
    label = next(line for line in done.out.splitlines() if " label " in line)
    assert label.startswith("spam@1") and label.rstrip().endswith("DRIFTING")
    assert "without a baseline: intent@1" in done.out and "manifold baseline" in done.out
    assert run("drift", "spam", "--json").answer["drift"][1]["drifting"] is True


def test_before_there_are_enough_texts_it_says_so(run: Run, runtime: Runtime) -> None:
    watch(runtime, 10)
    out = run("drift", "spam").out
    assert "nothing drifts" in out and "nothing is said before 200 texts" in out and "intent" not in out


@pytest.mark.parametrize(("p_value", "said"), [(0.0, "<1e-300"), (1.25e-299, "1.2e-299"), (1.0, "1")])
def test_no_chance_is_called_0(run: Run, p_value: float, said: str) -> None:
    version = {"task": "spam", "version": 1, "arm": "champion", "kind": "label", "label": None, "drifting": False}
    row = version | {"psi": 0.125, "p_value": p_value, "texts": 300, "baseline_texts": 1000}
    answer = {"window": 500, "least_texts": 200, "drift": [row], "without_baseline": []}
    with answering({"GET /v1/drift": [(200, answer)]}) as server:
        out = run("drift", "--url", server.url).out
    (line,) = [line for line in out.splitlines() if line.startswith("spam@1")]
    assert line.split() == ["spam@1", "champion", "label", "0.125", said, "300", "1000"]


def test_a_task_that_is_not_there_is_one_sentence(run: Run) -> None:
    done = run("drift", "nothing")
    assert done.status == 1 and 'there is no task "nothing"' in done.err


def test_a_server_that_does_not_watch_says_so(run: Run) -> None:
    answer = {"window": 0, "least_texts": 200, "drift": [], "without_baseline": []}
    with answering({"GET /v1/drift": [(200, answer)]}) as server:
        assert "drift_window is 0" in run("drift", "--url", server.url).out
