"""What a log collector and Prometheus read."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from app.domain import BatchReport
from app.telemetry import logs
from app.telemetry.logs import configure_logging
from app.telemetry.metrics import Metrics
from tests.serving import wait_for


@pytest.fixture(autouse=True)
def _root_logger_as_before() -> Iterator[None]:
    root, access = logging.getLogger(), logging.getLogger(logs.ACCESS)
    handlers, level, ours, propagates = root.handlers[:], root.level, access.handlers[:], access.propagate
    yield
    access.handlers[:], access.propagate = ours, propagates
    root.handlers[:] = handlers
    root.setLevel(level)


def test_json_is_an_object_a_line_with_request_and_trace(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("manifold").exception("it %s", "broke", extra={"request_id": "r-1"})
    logging.getLogger().handlers[0].flush()
    (said,) = capsys.readouterr().err.splitlines()
    event = json.loads(said)
    assert (event["level"], event["logger"], event["message"], event["request_id"]) == (
        "error",
        "manifold",
        "it broke",
        "r-1",
    )
    assert "ValueError" in event["exception"]
    assert event["time"].endswith("Z")


def test_text_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("text")
    logging.getLogger("manifold").info("ready")
    logging.getLogger().handlers[0].flush()
    assert capsys.readouterr().err.endswith("INFO manifold: ready\n")


def test_text_tells_the_request_and_what_its_message_does_not_say(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("text")
    fields = {"status": 200, "generation": 17, "versions": {"spam": "3 champion", "tone@1": "1 pinned"}, "actor": None}
    extra = {"request_id": "r-1", "trace_id": "4bf9", "span_id": "00f0", "fields": fields, "told": {"status"}}
    logging.getLogger("manifold").info("GET /x 200", extra=extra)
    logging.getLogger().handlers[0].flush()
    pairs = 'request_id=r-1 trace_id=4bf9 generation=17 versions="spam:3 champion,tone@1:1 pinned"'
    assert capsys.readouterr().err.endswith(f"INFO manifold: GET /x 200 {pairs}\n")


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("a generation=9", '"a generation=9"'),
        ('a" generation="9', r'"a\" generation=\"9"'),
        ("a\\", r'"a\\"'),
        ("", '""'),
        ("a\n2026 ERROR forged", r'"a\n2026 ERROR forged"'),
        ("a\u2028b\x9b2J", r'"a\u2028b\x9b2J"'),
    ],
)
def test_a_value_can_begin_no_line_and_no_other_pair(
    given: str, written: str, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging("text")
    logging.getLogger("manifold").info("asked", extra={"request_id": given, "fields": {"rows": 1}})
    logging.getLogger().handlers[0].flush()
    (said,) = capsys.readouterr().err.splitlines()
    assert said.endswith(f"INFO manifold: asked request_id={written} rows=1")


def test_a_caller_can_begin_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("text")
    logging.getLogger("manifold").info("%s", "GET /x\n2026-01-01 ERROR forged\x1b[2J\u2028")
    logging.getLogger().handlers[0].flush()
    (said,) = capsys.readouterr().err.splitlines()
    assert said.endswith(r"INFO manifold: GET /x\n2026-01-01 ERROR forged\x1b[2J\u2028")


class Slow(logs._Stream):
    def __init__(self) -> None:
        self.opens, self.written = threading.Event(), list[str]()

    def write(self, text: str) -> None:
        assert self.opens.wait(10)
        self.written += text.splitlines()


def line(text: str) -> logging.LogRecord:
    return logging.makeLogRecord({"name": "access", "msg": text})


def test_lines_that_a_slow_reader_loses_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_MOST_LINES", 2)
    stream = Slow()
    aside = logs._Aside(logging.Formatter("%(message)s"), stream)
    number = 0
    while not aside._num_dropped:
        aside.handle(line(f"line {number}"))
        number += 1
    stream.opens.set()
    wait_for(lambda: stream.written == [f"line {kept}" for kept in range(number - 1)])
    aside.handle(line("the last"))
    wait_for(lambda: stream.written[-2:] == ["1 lines were dropped: the log is read too slowly", "the last"])
    aside.close()
    assert not aside._thread.is_alive()


def test_what_is_said_last_is_written_before_the_end() -> None:
    stream = Slow()
    stream.opens.set()
    aside = logs._Aside(logging.Formatter("%(message)s"), stream)
    for number in range(1000):
        aside.handle(line(str(number)))
    aside.flush()
    assert stream.written == [str(number) for number in range(1000)]
    aside.handle(line("the last"))
    aside.close()
    assert stream.written[-1] == "the last"


def test_a_line_is_made_on_the_thread_that_writes_it_in_its_turn() -> None:
    stream, makers = Slow(), list[str]()
    stream.opens.set()
    aside = logs._Aside(logging.Formatter("%(message)s"), stream)
    logging.root.handlers[:] = [aside]

    def make() -> logs.Line:
        makers.append(threading.current_thread().name)
        return logs.Line("access", 0.0, "made of 100%d", {}, {})

    aside.handle(line("before"))
    logs.log_made(logging.getLogger("access"), make)
    aside.handle(line("behind"))
    aside.close()
    assert stream.written == ["before", "made of 100%d", "behind"] and makers == ["log"]


def test_a_line_says_the_same_as_the_record_of_it() -> None:
    said = logs.Line("access", 1_700_000_000.5, "made", {"request_id": "r-1"}, {"status": 200, "a": 'b"'}, {"status"})
    as_json = logs.JsonFormatter()
    assert as_json.line(said) == as_json.format(said.record())
    assert json.loads(as_json.line(said)) == {
        "time": "2023-11-14T22:13:20.500Z",
        "level": "info",
        "logger": "access",
        "message": "made",
        "request_id": "r-1",
        "status": 200,
        "a": 'b"',
    }
    assert logs.TextFormatter().format(said.record()).endswith(r'INFO access: made request_id=r-1 a="b\""')


def test_a_line_that_cannot_be_made_takes_no_other_with_it() -> None:
    stream = Slow()
    stream.opens.set()
    aside = logs._Aside(logging.Formatter("%(message)s"), stream)
    aside.handle(line("before"))
    aside.take(lambda: logs.Line("access", 1 // 0, "", {}, {}))
    aside.handle(logging.makeLogRecord({"msg": "no text for %d", "args": ("x",)}))
    aside.handle(line("behind"))
    aside.flush()
    reasons = ["a line could not be made: ZeroDivisionError", "a line could not be made: TypeError"]
    assert stream.written == ["before", *reasons, "behind"]
    aside.handle(line("the next"))
    aside.close()
    assert stream.written[4:] == ["the next"]


def test_where_nothing_writes_aside_a_line_is_made_at_once(caplog: pytest.LogCaptureFixture) -> None:
    logs.log_made(logging.getLogger("access"), lambda: logs.Line("access", 0.0, "made", {}, {}))
    assert [record.getMessage() for record in caplog.records] == ["made"]


def test_a_reader_that_stopped_holds_up_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_MOST_WAIT_S", 0.05)
    stream = Slow()
    aside = logs._Aside(logging.Formatter("%(message)s"), stream)
    aside.handle(line("nobody reads this"))
    aside.flush()
    aside.close()
    assert stream.written == []
    stream.opens.set()


# -- metrics -----------------------------------------------------------------------------------------------------------


@dataclass
class FakeClock:
    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def metrics(clock: FakeClock) -> Metrics:
    return Metrics(CollectorRegistry(), clock)


def samples(metrics: Metrics) -> dict[str, float]:
    """Values by `name{label=value,…}`, as a scraper reads them."""
    body, content_type = metrics.render()
    assert content_type.startswith("text/plain; version=0.0.4")
    found = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def exercised(metrics: Metrics) -> Metrics:
    """Everything was counted once."""
    metrics.built({"version": "0.1.0", "model": "all-MiniLM-L6-v2"})
    metrics.answered("/v1/predict", 200, 0.02)
    metrics.predicted("spam", 3, "champion", "ok", 2)
    metrics.looked_up(4, 5, 6_000)
    metrics.rejected("full")
    metrics.staged("queue", 0.003)
    metrics.ran(BatchReport(3, 96, 0.0001, 0.02, 0.001, {("spam", 3): 0.75, ("tone", 1): 0.25}, passes=2.0))
    metrics.ran(BatchReport(0, 0, 0.0, 0.0, 0.0, {("new", 0): 1.0}, passes=1.0))  # being loaded
    metrics.scored("spam", 3, ("ham", 'a"b\\%d\n'), np.array([[0.2, 0.8], [0.31, np.nan]]))
    metrics.drifted("spam", 3, {"score": (0.31, 1e-30), "length": (0.0, 1.0)})
    metrics.watch(lambda: 5, lambda: 1_000)
    metrics.lagged(0.002)
    metrics.disagreed("spam", 3)
    metrics.rolled_back("spam", "gate")
    metrics.unwatched(2)
    metrics.spans_dropped(4)
    metrics.logged(7)
    metrics.log_dropped("full", 2)
    metrics.loaded(0.02)
    metrics.load_failed("artifact")
    metrics.unserved({"spam": 1})
    metrics.index_answered()
    metrics.following(17, 8)
    metrics.propagated(0.03)
    return metrics


def test_every_metric_has_the_name_that_dashboards_ask_for(metrics: Metrics) -> None:
    found = samples(exercised(metrics))
    expected = {
        "manifold_build_info{model=all-MiniLM-L6-v2,version=0.1.0}": 1.0,
        "manifold_requests_total{code=200,route=/v1/predict}": 1.0,
        "manifold_predictions_total{arm=champion,outcome=ok,task=spam,version=3}": 2.0,
        "manifold_request_duration_seconds_count{route=/v1/predict}": 1.0,
        "manifold_rejected_total{reason=full}": 1.0,
        "manifold_stage_duration_seconds_count{stage=queue}": 1.0,
        "manifold_stage_duration_seconds_sum{stage=collate}": 0.0001,
        "manifold_stage_duration_seconds_sum{stage=forward}": 0.02,
        "manifold_stage_duration_seconds_sum{stage=heads}": 0.001,
        "manifold_batch_rows_sum": 3.0,
        "manifold_batch_tokens_sum": 96.0,
        "manifold_passes_total{task=spam}": 1.5,
        "manifold_device_seconds_total{task=spam,version=3}": 0.015,
        "manifold_device_seconds_total{task=tone,version=1}": 0.005,
        "manifold_score_bucket{label=ham,le=0.2,task=spam,version=3}": 1.0,
        "manifold_score_bucket{label=ham,le=0.3,task=spam,version=3}": 1.0,
        "manifold_score_bucket{label=ham,le=+Inf,task=spam,version=3}": 2.0,
        "manifold_score_sum{label=ham,task=spam,version=3}": 0.51,
        'manifold_score_count{label=a"b\\%d\n,task=spam,version=3}': 1.0,
        "manifold_drift_psi{kind=score,task=spam,version=3}": 0.31,
        "manifold_drift_p_value{kind=score,task=spam,version=3}": 1e-30,
        "manifold_drift_p_value{kind=length,task=spam,version=3}": 1.0,
        "manifold_queue_rows": 5.0,
        "manifold_device_memory_bytes": 1000.0,
        "manifold_event_loop_lag_seconds_count": 1.0,
        "manifold_answer_cache_hits_total": 4.0,
        "manifold_answer_cache_misses_total": 5.0,
        "manifold_answer_cache_bytes": 6000.0,
        "manifold_arm_disagreement_total{task=spam}": 3.0,
        "manifold_watch_dropped_total": 2.0,
        "manifold_spans_dropped_total": 4.0,
        "manifold_prediction_log_rows_total": 7.0,
        "manifold_prediction_log_dropped_total{reason=full}": 2.0,
        "manifold_rollbacks_total{cause=gate,task=spam}": 1.0,
        "manifold_prefix_load_duration_seconds_count": 1.0,
        "manifold_prefix_load_duration_seconds_sum": 0.02,
        "manifold_prefix_load_failures_total{reason=artifact}": 1.0,
        "manifold_versions_unserved{task=spam}": 1.0,
        "manifold_prefixes_resident": 8.0,
        "manifold_generation": 17.0,
        "manifold_index_up": 1.0,
        "manifold_index_staleness_seconds": 0.0,
        "manifold_swap_propagation_seconds_count": 1.0,
        "manifold_swap_propagation_seconds_sum": 0.03,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert found["process_resident_memory_bytes"] > 0
    stems = {name.split("{")[0] for name in found if name.startswith("manifold_")}
    counted = {stem for stem in stems if not stem.endswith(("_bucket", "_sum", "_count"))}
    named = {name.split("{")[0] for name in expected}
    assert counted == {name for name in named if not name.endswith(("_bucket", "_sum", "_count"))}


def test_what_is_refused_at_once_says_nothing_of_how_long_answers_take(metrics: Metrics) -> None:
    for code in (200, 504, 401, 403, 429, 429):
        metrics.answered("/v1/predict", code, 0.02)
    found = samples(metrics)
    assert found["manifold_request_duration_seconds_count{route=/v1/predict}"] == 2.0
    assert found["manifold_requests_total{code=429,route=/v1/predict}"] == 2.0
    assert found["manifold_requests_total{code=401,route=/v1/predict}"] == 1.0


def test_a_version_that_is_forgotten_leaves_no_series(metrics: Metrics) -> None:
    for version in (1, 11):
        for arm in ("champion", "shadow"):
            metrics.predicted("spam", version, arm, "success")
    metrics.predicted("intent", 1, "champion", "failure")
    metrics.ran(BatchReport(1, 16, 0.0, 0.02, 0.0, {("spam", 1): 0.5, ("spam", 11): 0.5}, passes=1.0))
    for version in (1, 11):
        metrics.scored("spam", version, ("ham",), np.array([[0.2]]))
        metrics.drifted("spam", version, {"score": (0.0, 1.0)})
    metrics.forget("spam", 1)
    metrics.forget("spam", 2)  # never asked for
    of_versions = {name for name in samples(metrics) if "_score_sum" in name or "_drift" in name}
    assert of_versions == {
        "manifold_score_sum{label=ham,task=spam,version=11}",
        "manifold_drift_psi{kind=score,task=spam,version=11}",
        "manifold_drift_p_value{kind=score,task=spam,version=11}",
    }
    assert [name for name in samples(metrics) if "device_seconds" in name] == [
        "manifold_device_seconds_total{task=spam,version=11}"
    ]
    found = {name for name in samples(metrics) if name.startswith("manifold_predictions_total")}
    assert found == {
        *(
            f"manifold_predictions_total{{arm={arm},outcome={outcome},task=spam,version=11}}"
            for arm in ("champion", "shadow")
            for outcome in ("success", "failure")
        ),
        "manifold_predictions_total{arm=champion,outcome=failure,task=intent,version=1}",
    }
    metrics.predicted("spam", 1, "champion", "success")  # it is loaded again
    assert samples(metrics)["manifold_predictions_total{arm=champion,outcome=failure,task=spam,version=1}"] == 0


def test_failures_are_there_before_the_first_one(metrics: Metrics) -> None:
    """A series that is new has no increase."""
    found = samples(metrics)
    for route in ("/v1/predict", "/v1/embeddings"):
        assert [found[f"manifold_requests_total{{code={code},route={route}}}"] for code in (500, 503, 504)] == [0.0] * 3
    assert found["manifold_rejected_total{reason=full}"] == 0.0
    metrics.predicted("spam", 1, "champion", "success")
    assert samples(metrics)["manifold_predictions_total{arm=champion,outcome=failure,task=spam,version=1}"] == 0.0


def test_a_task_that_is_not_live_any_more_has_no_unserved_versions(metrics: Metrics) -> None:
    metrics.unserved({"spam": 2, "intent": 1})
    metrics.unserved({"intent": 0})
    found = {name: value for name, value in samples(metrics).items() if "unserved" in name}
    assert found == {"manifold_versions_unserved{task=intent}": 0.0}


def test_staleness_grows_by_itself_while_the_index_is_gone(metrics: Metrics, clock: FakeClock) -> None:
    def state() -> tuple[float, float]:
        found = samples(metrics)
        return found["manifold_index_up"], found["manifold_index_staleness_seconds"]

    clock.now_s += 5
    assert state() == (0.0, 5.0)  # it never answered yet
    metrics.index_answered()
    assert state() == (1.0, 0.0)
    clock.now_s += 30
    metrics.index_lost(30.0)
    assert state() == (0.0, 30.0)
    clock.now_s += 12
    assert state() == (0.0, 42.0)
    metrics.index_answered()
    assert state() == (1.0, 0.0)


def test_two_servers_in_one_process_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.answered("/v1/predict", 200, 0.02)
    assert not any(value for name, value in samples(other).items() if name.startswith("manifold_requests_total"))


def test_any_label_value_is_escaped(metrics: Metrics) -> None:
    metrics.disagreed('a"b\\c\nd')
    assert samples(metrics)['manifold_arm_disagreement_total{task=a"b\\c\nd}'] == 1.0


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_has_nothing_to_say(metrics: Metrics) -> None:
    body, _ = exercised(metrics).render()
    done = subprocess.run(["promtool", "check", "metrics"], input=body, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
