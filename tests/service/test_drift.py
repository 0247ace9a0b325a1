"""What the watcher makes of answers: series and drift of live versions, windows that outlive the process."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import pytest

from app.domain import Snapshot, Task, TaskOutput, TaskVersion, TextInput
from app.service import drift
from app.service.dispatch import Reading
from app.service.drift import MOST_LABELS, DriftWatcher
from app.service.usage import Timings, Usage
from app.service.watching import Served
from app.service.windows import Drift, Kind
from app.telemetry.metrics import Metrics
from tests.fakes import FakeTokenizer, FakeWindows, make_task, make_version, snapshot_of
from tests.service.test_windows import MANY, SPAM, baseline_of
from tests.test_telemetry import samples

WATCHED = replace(SPAM, baseline=baseline_of(SPAM))
NEXT = replace(make_version("spam", 2, labels=("ham", "spam")), baseline=WATCHED.baseline)


class Server:
    """A watcher over a snapshot that changes."""

    def __init__(self, *tasks: Task, windows: FakeWindows | None = None) -> None:
        self.snapshot: Snapshot = snapshot_of(*tasks)
        self.metrics, self.windows = Metrics(), windows or FakeWindows()
        self.watcher = DriftWatcher(lambda: self.snapshot, 3, 500, self.windows, self.metrics)
        self.watcher.take_in([])

    def answer(self, version: TaskVersion, *outputs: TaskOutput) -> None:
        self.watcher.take_in([served(version, outputs)])
        self.watcher.compare_all()

    def found(self, task: Task) -> dict[Kind, Drift]:
        (version,) = self.watcher.drift_of(task)
        return {drift.kind: drift for drift in version.kinds}


def served(version: TaskVersion, outputs: Sequence[TaskOutput]) -> Served:
    (encoding,) = FakeTokenizer().encode_each([TextInput("one two three")], [99], [False], True)
    assert not isinstance(encoding, str)
    readings = [Reading(0, TextInput("…"), (), (version,), encoding, {version.digest: output}) for output in outputs]
    return Served("r", "shop", 1, [], [], b"[]", readings, Usage(0, 0, 0.0, 0), Timings(0.0, 0.0, 0.0), 0.0)


def said(count: int, spam: float = 0.95) -> list[TaskOutput]:
    return [TaskOutput((1 - spam, spam))] * count


def names(server: Server, prefix: str) -> set[str]:
    return {name for name in samples(server.metrics) if name.startswith(prefix)}


def test_scores_are_counted_for_each_label() -> None:
    server = Server(make_task(WATCHED))
    server.answer(WATCHED, *said(3, 0.75), TaskOutput((0.35, 0.65)), TaskOutput(error="it broke"))
    found = samples(server.metrics)
    at = "{label=spam,task=spam,version=1}"
    assert found[f"manifold_score_count{at}"] == 4
    assert found[f"manifold_score_sum{at}"] == pytest.approx(2.9)
    assert found["manifold_score_bucket{label=spam,le=0.7,task=spam,version=1}"] == 1
    assert found["manifold_score_bucket{label=spam,le=0.8,task=spam,version=1}"] == 4
    assert found["manifold_score_bucket{label=ham,le=+Inf,task=spam,version=1}"] == 4


def test_a_task_with_many_labels_has_series_for_the_commonest() -> None:
    labels = ("other", *MANY.labels[1:])
    version = replace(MANY, labels=labels, baseline=baseline_of(MANY))
    server = Server(make_task(version))
    assert version.baseline is not None
    common = sorted(range(60), key=lambda i: (-version.baseline.labels[i], i))[:MOST_LABELS]
    rare = next(i for i in range(60) if i not in common and labels[i] != "other")
    scores = [0.001] * 60
    scores[common[0]], scores[rare] = 0.4, 0.6
    server.answer(version, TaskOutput(tuple(scores)))
    found = {name: value for name, value in samples(server.metrics).items() if name.startswith("manifold_score_sum")}
    expected = {labels[i] for i in common} | {"other"}
    assert {name.partition("label=")[2].partition(",")[0] for name in found} == expected
    assert found["manifold_score_sum{label=other,task=intent,version=1}"] == 0.6


def test_drift_becomes_gauges_once_there_is_something_to_say() -> None:
    task = make_task(WATCHED)
    server = Server(task)
    server.answer(WATCHED, *said(150))
    assert server.found(task)[Kind.LABEL].psi is None and not names(server, "manifold_drift")
    server.answer(WATCHED, *said(150))
    drift = server.found(task)[Kind.LABEL]
    assert drift.is_drifting and drift.texts == 300
    found = samples(server.metrics)
    assert found["manifold_drift_psi{kind=label,task=spam,version=1}"] == pytest.approx(drift.psi, rel=1e-4)
    assert found["manifold_drift_p_value{kind=label,task=spam,version=1}"] < 1e-6
    kinds = {name.partition("kind=")[2].partition(",")[0] for name in found if name.startswith("manifold_drift")}
    assert kinds == {"score", "label", "length", "unknown"}


def test_a_version_without_a_baseline_has_scores_alone() -> None:
    task = make_task(SPAM)
    server = Server(task)
    server.answer(SPAM, *said(300))
    assert names(server, "manifold_score") and not names(server, "manifold_drift")
    (found,) = server.watcher.drift_of(task)
    assert not found.has_baseline and found.kinds == ()
    server.watcher.close()
    assert server.windows.num_tries == 0


def test_every_live_arm_is_watched_and_what_is_not_live_is_not() -> None:
    shadow = replace(NEXT, version=3, digest="sha256:spam-3")
    task = make_task(WATCHED, NEXT, shadow, champion=1, challenger=2, shadow=(3,))
    server = Server(task)
    pinned = replace(WATCHED, version=9, digest="sha256:spam-9")
    for version in (WATCHED, NEXT, shadow, pinned):
        server.answer(version, *said(200))
    arms = [(found.version, found.arm.value) for found in server.watcher.drift_of(task)]
    assert arms == [(1, "champion"), (2, "challenger"), (3, "shadow")]
    assert not [name for name in names(server, "manifold_score") if "version=9" in name]


def test_a_version_that_is_not_live_any_more_alarms_nobody_and_may_come_back() -> None:
    before, after = make_task(WATCHED), make_task(WATCHED, NEXT, champion=2)
    server = Server(before)
    server.answer(WATCHED, *said(300))
    server.snapshot = snapshot_of(replace(after, versions={2: NEXT}))
    server.watcher.take_in([])
    assert not names(server, "manifold_drift") and not names(server, "manifold_score")
    server.snapshot = snapshot_of(before)
    server.watcher.take_in([])
    server.watcher.compare_all()
    assert server.found(before)[Kind.LABEL].texts == 300 and names(server, "manifold_drift")


@pytest.mark.parametrize("is_unloaded_first", [True, False])
def test_a_version_that_is_unloaded_leaves_no_series_whoever_is_first(is_unloaded_first: bool) -> None:
    """Answers of it wait to be counted while another thread unloads it."""
    server = Server(make_task(WATCHED))
    server.answer(WATCHED, *said(300))
    server.watcher.take_in([served(WATCHED, said(5))])
    server.snapshot = snapshot_of(make_task(NEXT))
    if is_unloaded_first:
        server.metrics.forget("spam", 1)
    server.watcher.take_in([served(WATCHED, said(200)), served(NEXT, said(200))])
    if not is_unloaded_first:
        server.metrics.forget("spam", 1)
    server.watcher.close()
    assert {name for name in names(server, "manifold_") if "version=1" in name} == set()
    assert names(server, "manifold_score")
    assert len(server.windows.kept[WATCHED.digest]) == 305


def test_scores_that_were_counted_behind_an_unloading_go_at_the_next_look() -> None:
    server = Server(make_task(WATCHED))
    seen, server.snapshot = server.snapshot, snapshot_of(make_task(NEXT))
    server.metrics.forget("spam", 1)
    server.watcher._current_snapshot = lambda: seen  # it had asked before
    server.answer(WATCHED, *said(300))
    assert names(server, "manifold_score") and names(server, "manifold_drift")
    server.watcher._current_snapshot = lambda: server.snapshot
    server.watcher.take_in([])
    assert not names(server, "manifold_score") and not names(server, "manifold_drift")


def test_content_that_gets_another_number_keeps_its_window() -> None:
    """As after an index that began anew."""
    server = Server(make_task(WATCHED))
    server.answer(WATCHED, *said(300))
    renumbered = replace(WATCHED, version=4)
    server.snapshot = snapshot_of(make_task(renumbered))
    server.watcher.take_in([])
    server.answer(renumbered, *said(10))
    assert {name.partition("version=")[2] for name in names(server, "manifold_drift")} == {"4}"}
    assert server.found(make_task(renumbered))[Kind.LABEL].texts == 310


def test_with_many_tasks_everything_is_counted_in_the_end() -> None:
    versions = [replace(WATCHED, task=f"t{i}", digest=f"sha256:{i}") for i in range(40)]
    server = Server(*(make_task(version) for version in versions))
    for version in versions:
        server.watcher.take_in([served(version, said(130))])
    for _ in range(3):
        server.watcher.take_in([])
    counts = {value for name, value in samples(server.metrics).items() if name.startswith("manifold_score_count")}
    assert counts == {130} and len(names(server, "manifold_score_count")) == 80


def test_of_very_many_none_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "_MOST_WAITING", 100)
    versions = [replace(WATCHED, task=f"t{i}", digest=f"sha256:{i}") for i in range(40)]
    server = Server(*(make_task(version) for version in versions))
    server.watcher.take_in([served(version, said(3)) for version in versions])
    counts = {value for name, value in samples(server.metrics).items() if name.startswith("manifold_score_count")}
    assert counts == {3} and len(names(server, "manifold_score_count")) == 80


def test_answers_are_counted_together_and_the_last_at_the_end() -> None:
    server = Server(make_task(WATCHED))
    server.watcher.take_in([served(WATCHED, said(5))])
    server.watcher.take_in([served(WATCHED, said(6))])
    server.watcher.close()
    assert samples(server.metrics)["manifold_score_count{label=ham,task=spam,version=1}"] == 11
    assert len(server.windows.kept["sha256:spam-1"]) == 11


# -- across restarts ---------------------------------------------------------------------------------------------------


def test_windows_go_on_after_a_restart() -> None:
    task = make_task(WATCHED)
    first = Server(task)
    first.answer(WATCHED, *said(300))
    first.watcher.close()
    second = Server(task, windows=first.windows)
    assert second.found(task) == first.found(task)
    second.watcher.take_in([])
    assert names(second, "manifold_drift") == names(first, "manifold_drift") != set()
    second.answer(WATCHED, *said(10))
    assert second.found(task)[Kind.SCORE].texts == 310


def test_a_saved_window_that_does_not_fit_is_told_and_left(caplog: pytest.LogCaptureFixture) -> None:
    task, windows = make_task(WATCHED), FakeWindows()
    first = Server(task, windows=windows)
    first.answer(WATCHED, *said(300))
    first.watcher.close()
    windows.kept = {digest: rows[:, :-1] for digest, rows in windows.kept.items()}
    second = Server(task, windows=windows)
    assert second.found(task)[Kind.LABEL].texts == 0
    assert "the saved window of spam@1 is not used" in caplog.text


def test_a_full_disk_is_told_once_and_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    task = make_task(WATCHED)
    server = Server(task, windows=FakeWindows(is_full=True))
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            server.watcher._save_at_s = 0.0
            server.answer(WATCHED, *said(100))
            server.watcher.close()
    assert server.windows.num_tries >= 3 and caplog.text.count("drift windows are not saved") == 1
    assert server.found(task)[Kind.LABEL].texts == 300
    server.windows.is_full = False
    server.watcher.close()
    assert len(server.windows.kept["sha256:spam-1"]) == 300
