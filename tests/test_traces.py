"""A server process and an OTLP receiver: a request from its caller to its batch, a swap, a receiver that is gone."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from app.domain import BackboneSpec
from app.engine.backbone import Backbone
from tests.artifacts import write_artifact
from tests.otlp import Receiver, receiving, said
from tests.serving import ServerProcess, wait_for

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TEXT = "You won a prize!"
STAGES = {"collate", "forward", "heads"}
LOADING = {"verify", "place", "golden"}


@pytest.fixture(scope="module")
def spec() -> BackboneSpec:
    return Backbone.load("embedded", "cpu", "float32").spec


@pytest.fixture(scope="module")
def prefixes(spec: BackboneSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prefixes")
    write_artifact(folder / "spam", spec, "spam", ("ham", "spam"))
    return folder


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as opened:
        yield opened


@pytest.fixture(scope="module")
def url(receiver: Receiver, prefixes: Path) -> Iterator[str]:
    with serving(prefixes, receiver.endpoint, "--max-queue-delay-ms", "500", "--log-format", "json") as server:
        yield server.wait_until_ready()


def serving(prefixes: Path, endpoint: str, *options: str) -> ServerProcess:
    always = ("--port", "0", "--prefixes", str(prefixes), "--drain-grace-s", "0", "--dtype", "float32")
    return ServerProcess("app.cli", "serve", *always, "--otlp-endpoint", endpoint, *options)


def ask(url: str, text: str, trace_id: str = TRACE, flags: str = "01") -> dict[str, Any]:
    headers = {"traceparent": f"00-{trace_id}-{SPAN}-{flags}", "tracestate": "rojo=00f0"}
    answer = httpx2.post(f"{url}/v1/predict", json={"inputs": text}, headers=headers)
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


def test_a_request_leads_from_its_caller_to_its_batch(url: str, receiver: Receiver) -> None:
    answer = ask(url, TEXT)
    (request,) = receiver.wait_for("POST /v1/predict")
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, SPAN)
    assert request.trace_state == "rojo=00f0"
    assert said(request)["manifold.versions"] == ["spam: 1 champion"]
    assert said(request)["manifold.request_id"] == answer["request_id"]
    stages = receiver.below(request)
    assert set(stages) == {"tokenize", "queue"}

    (batch,) = receiver.wait_for("batch")
    assert [(link.trace_id, link.span_id) for link in batch.links] == [(request.trace_id, request.span_id)]
    assert set(receiver.below(batch)) == STAGES
    ordered = [
        stages["tokenize"],
        stages["queue"],
        *(receiver.below(batch)[n] for n in ("collate", "forward", "heads")),
    ]
    times = [time for span in ordered for time in (span.start_time_unix_nano, span.end_time_unix_nano)]
    slack_ns = 5e6  # the queue's time is taken on another thread than the tokenizer's
    assert all(later >= earlier - slack_ns for earlier, later in zip(times, times[1:], strict=False))
    assert request.start_time_unix_nano <= times[0] and times[-1] <= request.end_time_unix_nano + slack_ns
    assert not any(TEXT.encode() in sent.SerializeToString() for sent in receiver.requests)


def test_two_requests_of_one_batch_are_both_named_by_it(url: str, receiver: Receiver) -> None:
    traces = ["a" * 32, "b" * 32]
    with ThreadPoolExecutor(2) as callers:
        list(callers.map(ask, [url] * 2, ["one text", "another text"], traces))
    wait_for(lambda: {link.trace_id.hex() for batch in receiver.named("batch") for link in batch.links} >= set(traces))
    (batch,) = (b for b in receiver.named("batch") if any(link.trace_id.hex() in traces for link in b.links))
    requests = {s.trace_id.hex(): s.span_id for s in receiver.named("POST /v1/predict")}
    assert {link.trace_id.hex(): link.span_id for link in batch.links} == {t: requests[t] for t in traces}


def test_an_unsampled_caller_sends_nothing(url: str, receiver: Receiver) -> None:
    ask(url, "nobody follows this", "c" * 32, flags="00")
    ask(url, "somebody follows this", "d" * 32)
    wait_for(lambda: any(span.trace_id.hex() == "d" * 32 for span in receiver.named("POST /v1/predict")))
    linked = {link.trace_id.hex() for batch in receiver.named("batch") for link in batch.links}
    assert "d" * 32 in linked and "c" * 32 not in linked
    assert not any(span.trace_id.hex() == "c" * 32 for span in receiver.spans)


def test_the_start_and_a_swap_tell_what_took_their_time(
    url: str, receiver: Receiver, spec: BackboneSpec, tmp_path: Path
) -> None:
    (start,) = receiver.wait_for("start")
    assert set(receiver.below(receiver.below(start)["load"])) == LOADING

    golden = [{"text": TEXT, "scores": [0.5, 0.5]}]
    folder = write_artifact(tmp_path / "spam", spec, "spam", ("ham", "spam"), seed=1)
    httpx2.post(f"{url}/v1/tasks/spam/versions", files=files(folder)).raise_for_status()
    receiver.wait_for("POST /v1/tasks/{task}/versions")
    published = receiver.named("POST /v1/tasks/{task}/versions")[0]
    assert set(receiver.below(receiver.below(published)["load"])) == LOADING
    refused = write_artifact(tmp_path / "off", spec, "spam", ("ham", "spam"), seed=2, golden=golden)
    assert httpx2.post(f"{url}/v1/tasks/spam/versions", files=files(refused)).status_code == 422
    receiver.wait_for("POST /v1/tasks/{task}/versions", 2)
    mismatch = next(span for span in receiver.named("golden") if span.status.message)
    assert (
        mismatch.status.code == mismatch.status.STATUS_CODE_ERROR and "golden scores differ" in mismatch.status.message
    )

    httpx2.post(f"{url}/v1/tasks/spam/versions/2/approve", json={}).raise_for_status()
    generation = httpx2.put(f"{url}/v1/tasks/spam/traffic", json={"champion": 2}).headers["etag"].strip('"')
    receiver.wait_for("PUT /v1/tasks/{task}/traffic")
    wait_for(lambda: any(said(s)["manifold.generation"] == int(generation) for s in receiver.named("swap")))
    swaps = {said(span)["manifold.generation"]: span for span in receiver.named("swap")}
    loading = next(span for span in swaps.values() if "version" in receiver.below(span))
    version = receiver.below(loading)["version"]
    assert said(version) == {"manifold.task": "spam", "manifold.version": 2}
    assert set(receiver.below(version)) == {"fetch", "load"}
    assert "assign" in receiver.below(swaps[int(generation)])


def files(folder: Path) -> list[tuple[str, tuple[str, bytes]]]:
    return [("files", (path.name, path.read_bytes())) for path in folder.iterdir()]


def test_a_receiver_that_is_gone_changes_no_answer_and_holds_no_end_up(prefixes: Path) -> None:
    with receiving() as gone:
        endpoint = gone.endpoint
    with serving(prefixes, endpoint, "--log-format", "json") as server:
        url = server.wait_until_ready()
        answers = [ask(url, f"{TEXT} {number}") for number in range(20)]
        assert all(set(answer["results"][0]) == {"spam"} for answer in answers)
        wait_for(lambda: lost_spans(url) > 0, 30)
        server.signal(signal.SIGTERM)
        assert server.wait(15) == 0
    told = [json.loads(line) for line in server.log if "spans are lost" in line]
    assert 1 <= len(told) <= 2 and endpoint.removeprefix("http://") in told[0]["message"]
    assert not any("Traceback" in line for line in server.log)


def test_a_receiver_that_never_answers_holds_no_end_up(prefixes: Path) -> None:
    with receiving() as silent, serving(prefixes, silent.endpoint) as server:
        silent.answers.clear()
        url = server.wait_until_ready()
        ask(url, TEXT)
        server.signal(signal.SIGTERM)
        assert server.wait(15) == 0
        assert silent.requests == []  # it would answer in half a minute


def lost_spans(url: str) -> float:
    lines = httpx2.get(f"{url}/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("manifold_spans_dropped_total "))
