"""Futures always end: with scores, with an error, or cancelled; and one fault never takes others along."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import app.engine.engine as engine_module
from app.domain import BatchReport, EngineRequest, TaskVersion
from app.engine.engine import Engine
from app.engine.linear import LinearBank
from app.engine.plan import make_plan
from app.errors import DeadlineError, EngineError, NotFoundError, UnavailableError
from tests.engine.models import assert_close, make_artifact, random_encoding, run, tiny_backbone

MakeEngine = Callable[..., Engine]


def _load(engine: Engine, name: str, seed: int = 0, **options: object) -> TaskVersion:
    artifact = make_artifact(engine.spec, name, seed=seed, **options)
    engine.load(artifact)
    return artifact.version(1)


def _request(engine: Engine, *versions: TaskVersion, deadline_s: float | None = None, seed: int = 0) -> EngineRequest:
    return EngineRequest((make_plan(random_encoding(9, seed), versions, engine.spec.num_layers),), deadline_s)


def _wait_until(condition: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.001)


class _Gate:
    """Holds the engine's thread inside a batch until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self._open = threading.Event(), threading.Event()
        self.batches: list[int] = []
        real = engine_module.begin_batch

        def held(batch, backbone, graphs):  # type: ignore[no-untyped-def]
            self.batches.append(len(batch.works))
            self.entered.set()
            assert self._open.wait(30)
            return real(batch, backbone, graphs)

        monkeypatch.setattr(engine_module, "begin_batch", held)

    def open(self) -> None:
        self._open.set()


def test_a_version_that_is_not_loaded_is_refused_not_answered_by_the_bare_backbone(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine()
    unloaded = make_artifact(engine.spec, "ghost").version(1)
    with pytest.raises(NotFoundError, match="is not loaded"):
        engine.submit(_request(engine, unloaded))


def test_a_request_without_texts_ends_at_once(make_engine: MakeEngine) -> None:
    assert make_engine().submit(EngineRequest(())).result(timeout=5).outputs == ()


def _break(engine: Engine, version: TaskVersion, weight: Tensor, bias: Tensor) -> None:
    """Give a resident version another last layer than its artifact's."""
    resident = engine.bank.get(version.digest)
    head = replace(resident.head, out=LinearBank(torch.device("cpu")).place(weight, bias))
    changed = replace(resident, head=head)
    engine.bank._versions[version.digest] = engine.bank._held[version.digest] = changed


def test_a_task_that_fails_fails_alone(make_engine: MakeEngine) -> None:
    engine = make_engine()
    good, broken, infinite = (_load(engine, name, seed) for seed, name in enumerate(("good", "broken", "infinite")))
    _break(engine, broken, torch.zeros(3, 5), torch.zeros(3))
    _break(engine, infinite, torch.zeros(3, 32), torch.full((3,), float("nan")))
    ((alone,),) = run(engine, (random_encoding(9, 0), [good]))
    ((ok, failed, not_finite),) = run(engine, (random_encoding(9, 0), [good, broken, infinite]))
    assert_close(ok.scores, alone.scores)
    assert failed.error is not None and not failed.scores
    assert not_finite.error == "its scores are not finite"
    assert engine.alive


def test_a_readout_with_members_that_fails_fails_alone(make_engine: MakeEngine) -> None:
    engine = make_engine()
    kind: dict[str, Any] = {"readout": "attention", "layers": [1, 3], "num_queries": 2, "hidden": 4, "num_members": 3}
    artifacts = [make_artifact(engine.spec, name, seed=seed, **kind) for seed, name in enumerate(("a", "broken", "c"))]
    for artifact in artifacts:
        engine.load(artifact)
    first, broken, last = (artifact.version(1) for artifact in artifacts)
    encoding = random_encoding(9, 0)
    alone = [run(engine, (encoding, [version]))[0][0] for version in (first, last)]
    _break(engine, broken, torch.zeros(3, 5), torch.zeros(3))
    ((one, failed, other),) = run(engine, (encoding, [first, broken, last]))
    assert_close(one.scores, alone[0].scores)
    assert_close(other.scores, alone[1].scores)
    assert failed.error is not None and not failed.scores


def test_a_version_that_fails_is_named_in_the_log_once_a_batch(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine()
    good, broken, infinite = (_load(engine, name, seed) for seed, name in enumerate(("good", "broken", "infinite")))
    _break(engine, broken, torch.zeros(3, 5), torch.zeros(3))
    _break(engine, infinite, torch.zeros(3, 32), torch.full((3,), float("nan")))
    asked = [replace(version, version=7) for version in (good, broken, infinite)]
    plans = tuple(make_plan(random_encoding(9, seed), asked, engine.spec.num_layers) for seed in range(4))
    engine.submit(EngineRequest(plans)).result(timeout=10)
    engine.close()
    told = [record.getMessage() for record in caplog.records if "of a batch" in record.getMessage()]
    assert sorted(told) == [
        "broken@7 failed for 4 texts of a batch: it failed while computing; the server's log says why",
        "infinite@7 failed for 4 texts of a batch: its scores are not finite",
    ]


def test_a_batch_that_fails_fails_its_waiters_and_the_engine_lives_on(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    version = _load(engine, "task")

    def explode(batch, backbone, graphs):  # type: ignore[no-untyped-def]
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "begin_batch", explode)
        with pytest.raises(EngineError, match="batch that this request was in failed"):
            engine.submit(_request(engine, version)).result(timeout=10)
    assert engine.alive
    assert engine.submit(_request(engine, version)).result(timeout=10).outputs[0][0].error is None


def test_when_the_thread_dies_in_a_batch_its_requests_are_told(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    version = _load(engine, "task")

    def die(batch, backbone, graphs):  # type: ignore[no-untyped-def]
        raise SystemExit("device lost")

    monkeypatch.setattr(engine_module, "begin_batch", die)
    with pytest.raises(UnavailableError, match="died while it computed"):
        engine.submit(_request(engine, version)).result(timeout=10)


def test_when_the_thread_dies_every_waiter_is_told_and_later_ones_are_refused(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    version = _load(engine, "task")

    def die() -> None:
        raise MemoryError("scheduler broke")

    monkeypatch.setattr(engine._scheduler, "next_batch", die)
    with pytest.raises(UnavailableError, match="engine died"):
        engine.submit(_request(engine, version)).result(timeout=10)
    assert not engine.alive
    assert engine.queue_rows == 0
    with pytest.raises(UnavailableError, match="engine died"):
        engine.submit(_request(engine, version))


def test_nothing_waits_in_an_engine_that_was_closed(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    version = _load(engine, "task")
    gate = _Gate(monkeypatch)
    engine.submit(_request(engine, version))
    assert gate.entered.wait(10)
    waiting = engine.submit(_request(engine, version))
    closer = threading.Thread(target=engine.close)
    closer.start()
    _wait_until(lambda: not engine.alive)
    assert engine.queue_rows == 1
    gate.open()
    closer.join(10)
    with pytest.raises(UnavailableError):
        waiting.result(timeout=10)
    assert engine.queue_rows == 0


def test_closing_tells_everyone_who_waits(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    version = _load(engine, "task")
    gate = _Gate(monkeypatch)
    running = engine.submit(_request(engine, version))
    assert gate.entered.wait(10)
    waiting = engine.submit(_request(engine, version))
    closer = threading.Thread(target=engine.close)
    closer.start()
    time.sleep(0.05)
    gate.open()
    closer.join(10)
    assert running.result(timeout=10).outputs
    with pytest.raises(UnavailableError):
        waiting.result(timeout=10)
    with pytest.raises(UnavailableError):
        engine.submit(_request(engine, version))


def test_an_engine_that_was_not_started_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_backbone("bert"))
    version = _load(engine, "task")
    with pytest.raises(UnavailableError, match="does not run"):
        engine.submit(_request(engine, version))


def test_a_cancelled_request_is_dropped_before_it_runs(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    version = _load(engine, "task")
    gate = _Gate(monkeypatch)
    first = engine.submit(_request(engine, version))
    assert gate.entered.wait(10)
    gone, kept = engine.submit(_request(engine, version)), engine.submit(_request(engine, version))
    assert gone.cancel()
    gate.open()
    first.result(timeout=10)
    kept.result(timeout=10)
    assert gate.batches == [1, 1]
    with pytest.raises(CancelledError):
        gone.result(timeout=10)


def test_the_rest_of_a_request_is_dropped_when_its_client_goes_in_the_middle(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(max_batch_rows=2)
    version = _load(engine, "task")
    plans = tuple(make_plan(random_encoding(9, seed), [version], engine.spec.num_layers) for seed in range(6))
    gate = _Gate(monkeypatch)
    future = engine.submit(EngineRequest(plans))
    assert gate.entered.wait(10)
    assert future.cancel()
    gate.open()
    engine.submit(_request(engine, version)).result(timeout=10)
    assert gate.batches == [2, 1]


def test_work_whose_deadline_passed_in_the_queue_is_dropped(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    version = _load(engine, "task")
    gate = _Gate(monkeypatch)
    first = engine.submit(_request(engine, version))
    assert gate.entered.wait(10)
    late = engine.submit(_request(engine, version, deadline_s=time.monotonic() + 0.01))
    time.sleep(0.05)
    gate.open()
    first.result(timeout=10)
    with pytest.raises(DeadlineError):
        late.result(timeout=10)
    assert gate.batches == [1]


def test_requests_that_queue_while_a_batch_runs_are_rows_that_wait_and_share_the_next(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    version = _load(engine, "task")
    gate = _Gate(monkeypatch)
    futures = [engine.submit(_request(engine, version))]
    assert gate.entered.wait(10)
    assert engine.queue_rows == 0, "what a batch has taken does not wait any more"
    futures += [engine.submit(_request(engine, version, seed=i)) for i in range(5)]
    assert engine.queue_rows == 5
    gate.open()
    for future in futures:
        future.result(timeout=10)
    assert engine.queue_rows == 0
    assert gate.batches == [1, 5]


def test_a_version_unloaded_in_flight_still_answers_those_who_came_before(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    version = _load(engine, "task", prefixes=[(3, 1)])
    expected = engine.submit(_request(engine, version)).result(timeout=10).outputs
    gate = _Gate(monkeypatch)
    first = engine.submit(_request(engine, version))
    assert gate.entered.wait(10)
    queued = engine.submit(_request(engine, version))
    engine.unload(version.digest)
    gate.open()
    first.result(timeout=10)
    assert queued.result(timeout=10).outputs == expected
    _wait_until(lambda: len(engine.bank) == 0)  # the thread that answered lets go a moment later
    with pytest.raises(NotFoundError):
        engine.submit(_request(engine, version))


def test_many_threads_may_submit_load_and_unload_at_once(make_engine: MakeEngine) -> None:
    engine = make_engine()
    steady = _load(engine, "steady")
    expected = engine.submit(_request(engine, steady)).result(timeout=10).outputs[0][0].scores
    faults: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for round_ in range(15):
                mine = _load(engine, f"own{seed}", seed * 100 + round_, prefixes=[(2, 2)])
                result = engine.submit(_request(engine, steady, mine)).result(timeout=30)
                assert_close(result.outputs[0][0].scores, expected)
                engine.unload(mine.digest)
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not faults
    _wait_until(lambda: len(engine.bank) == 1)


def test_versions_with_the_same_prefix_share_its_vectors(make_engine: MakeEngine) -> None:
    engine = make_engine()
    one = _load(engine, "one", prefixes=[(4, 2)])
    two = _load(engine, "two", prefixes=[(4, 2)])
    assert one.prefixes == two.prefixes
    assert engine.bank.get(one.digest).prefixes[0] is engine.bank.get(two.digest).prefixes[0]


def test_bfloat16_stays_near_float32(make_engine: MakeEngine) -> None:
    from app.engine.backbone import Backbone
    from tests.engine.models import tiny_network

    exact = make_engine("bert")
    rough = Engine(Backbone.from_model(tiny_network("bert"), "tiny", dtype="bfloat16"))
    rough.start()
    version = _load(exact, "task", prefixes=[(4, 2)])
    assert _load(rough, "task", prefixes=[(4, 2)]) == version
    ((a,),), ((b,),) = (run(e, (random_encoding(15, 1), [version])) for e in (exact, rough))
    rough.close()
    assert torch.tensor(a.scores).sub(torch.tensor(b.scores)).abs().max() < 5e-2


def test_requests_for_one_text_share_its_trunk(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    one, other = _load(engine, "one", 1), _load(engine, "other", 2, prefixes=[(2, 2)])
    asked = ([one], [other], [other, one])
    alone = [engine.submit(_request(engine, *versions)).result(timeout=10).outputs[0] for versions in asked]
    gate = _Gate(monkeypatch)
    blocker = engine.submit(_request(engine, one, seed=1))
    assert gate.entered.wait(10)
    futures = [engine.submit(_request(engine, *versions)) for versions in asked]
    futures.append(engine.submit(_request(engine, one, seed=2)))
    gate.open()
    blocker.result(timeout=10)
    results = [future.result(timeout=10) for future in futures]
    assert gate.batches == [1, 2]
    for result, expected in zip(results, alone, strict=False):
        for found, before in zip(result.outputs[0], expected, strict=True):
            assert_close(found.scores, before.scores)
    assert results[0].passes == 1 and results[3].outputs[0][0].scores != results[0].outputs[0][0].scores


def test_while_a_device_computes_the_next_batch_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_backbone("bert"), max_batch_rows=1)
    version = _load(engine, "task")
    engine._works_ahead = True
    order: list[str] = []
    begin, finish = engine._begin, engine._finish

    def note(name: str, call: Callable[..., object]) -> Callable[..., object]:
        return lambda *arguments: (order.append(name), call(*arguments))[1]

    gate = _Gate(monkeypatch)
    monkeypatch.setattr(engine, "_begin", note("begin", begin))
    monkeypatch.setattr(engine, "_finish", note("finish", finish))
    engine.start()
    try:
        futures = [engine.submit(_request(engine, version, seed=seed)) for seed in range(3)]
        gate.open()
        outputs = [future.result(timeout=10).outputs[0][0] for future in futures]
        assert order == ["begin", "begin", "finish", "begin", "finish", "finish"]
        assert all(output.error is None for output in outputs)
    finally:
        engine.close()


# -- whoever watches ---------------------------------------------------------------------------------------------------


def test_each_batch_is_reported_behind_its_answers(make_engine: MakeEngine) -> None:
    reports: list[BatchReport] = []
    engine = make_engine(observe=reports.append)
    version = _load(engine, "task")
    engine.submit(_request(engine, version)).result(timeout=10)
    _wait_until(lambda: len(reports) == 1)
    (report,) = reports
    assert report.rows == 1 and report.tokens >= 1 and report.passes == 1.0
    assert min(report.collate_s, report.forward_s, report.heads_s) > 0
    assert report.shares == {(version.task, version.version): 1.0}


def test_a_batch_tells_when_it_ran_and_for_whom(make_engine: MakeEngine) -> None:
    reports: list[BatchReport] = []
    engine = make_engine(observe=reports.append, max_queue_delay_ms=200)
    version = _load(engine, "task")
    plan = _request(engine, version).plans[0]
    before_s = time.monotonic()
    asked = [EngineRequest((plan, plan), context="one"), EngineRequest((plan,)), EngineRequest((plan,), context="two")]
    for future in [engine.submit(request) for request in asked]:
        future.result(timeout=10)
    _wait_until(lambda: len(reports) == 1)
    (report,) = reports
    assert report.contexts == ("one", "two")
    assert before_s <= report.began_s <= report.ended_s - report.collate_s - report.forward_s
    assert report.ended_s <= time.monotonic()


def test_a_watcher_that_breaks_breaks_nobody_else(make_engine: MakeEngine) -> None:
    def break_down(report: BatchReport) -> None:
        raise RuntimeError("out of ink")

    engine = make_engine(observe=break_down)
    version = _load(engine, "task")
    for _ in range(2):
        assert engine.submit(_request(engine, version)).result(timeout=10).outputs[0][0].error is None
    assert engine.alive
