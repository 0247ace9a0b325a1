"""Canary, A/B/n, shadows and gates of a whole server: real backbone, index and HTTP. Only its upkeep is hurried."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy.stats import binomtest

from app.config import load_settings
from app.domain import TextInput
from app.engine.artifact import FILES
from app.main import create_app, open_runtime
from app.rollout import State
from app.service import upkeep
from app.service.access import EVERYBODY
from app.service.resolve import Asker, choose_targets, is_paired
from app.service.runtime import Runtime
from tests.artifacts import add_prefix, write_artifact
from tests.serving import running, wait_for

LABELS = ("a", "b", "c", "d", "e", "f", "g", "h")
UNITS = [f"customer-{number}" for number in range(10_000)]
HELLO = "hello there"
Answer = Mapping[str, Any]


class Server:
    """One that runs, and those who publish to it, steer it and ask it."""

    def __init__(self, runtime: Runtime, client: httpx2.Client, folder: Path) -> None:
        self.runtime, self.client, self.folder = runtime, client, folder
        self.spec = runtime.engine.spec
        self._numbers = itertools.count()

    def publish(
        self, task: str, seed: int = 0, change: Callable[[Path], object] = bool, *, approve: bool = True
    ) -> int:
        folder = self.folder / f"{task}-{next(self._numbers)}"
        change(write_artifact(folder, self.spec, task, LABELS, seed=seed))
        files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
        record = self.runtime.rollout.publish(EVERYBODY, task, files, {}, "").record
        if approve:
            self.runtime.rollout.decide(EVERYBODY, task, record.version, State.APPROVED, "")
        return record.version

    def put(self, task: str, **traffic: Any) -> None:
        answer = self.client.put(f"/v1/tasks/{task}/traffic", json=traffic)
        assert answer.status_code == 200, answer.text

    def traffic(self, task: str) -> Answer:
        found: Answer = self.client.get(f"/v1/tasks/{task}").json()["traffic"]
        return found

    def ask(self, *texts: str, task: str, unit: str = "", request_id: str = "", truncate: bool = False) -> Answer:
        """The whole answer, the request's id in it."""
        body: dict[str, Any] = {"inputs": list(texts) or [HELLO], "tasks": [task], "truncate": truncate}
        headers = {"x-request-id": request_id} if request_id else {}
        answer = self.client.post("/v1/predict", json=body | ({"unit": unit} if unit else {}), headers=headers)
        assert answer.status_code == 200, answer.text
        found: Answer = answer.json()
        return found

    def units_of(self, task: str, version: int) -> Iterator[str]:
        """Units that this version answers."""
        traffic = self.runtime.catalog.snapshot.tasks[task].traffic
        return (unit for unit in UNITS if traffic.choose(unit) == version)

    def pairs(self, task: str) -> dict[int, Answer]:
        answer = self.client.get(f"/v1/tasks/{task}/comparison")
        assert answer.status_code == 200, answer.text
        return {pair["version"]: pair for pair in answer.json()["pairs"]}

    def counted(self, task: str, version: int, count: int) -> Answer:
        """The pair, once so many texts of both are counted."""
        wait_for(lambda: self.pairs(task)[version]["count"] >= count)
        pair = self.pairs(task)[version]
        assert pair["count"] == count
        return pair

    def tell(self, request_id: str, task: str, label: str) -> None:
        answer = self.client.post("/v1/feedback", json={"request_id": request_id, "task": task, "label": label})
        assert answer.json() == {"recorded": True}, answer.text


@contextmanager
def serving(home: Path, folder: Path) -> Iterator[Server]:
    (folder / "none").mkdir(parents=True, exist_ok=True)
    chosen = {"home": home, "prefixes": folder / "none", "device": "cpu", "dtype": "float32"}
    settings = load_settings(chosen | {"max_client_batch_size": 400, "answer_cache_bytes": 0})  # passes are counted
    runtime = open_runtime(settings)
    with running(create_app(settings, runtime)) as url, httpx2.Client(base_url=url, trust_env=False) as client:
        yield Server(runtime, client, folder)


@pytest.fixture(scope="module")
def _hurried() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upkeep, "_EVERY_S", 0.05)
        yield


@pytest.fixture(scope="module")
def server(_hurried: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("canary")
    with serving(folder / "home", folder) as opened:
        yield opened


def request_of(paired: bool) -> str:
    """A new id, of a request that scores the champion beside a challenger, or does not."""
    return next(new for new in (uuid4().hex for _ in range(64)) if is_paired(new) is paired)


def change_head(folder: Path, change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.classifier.weight"
    save_file({**tensors, name: change(tensors[name]).astype(np.float32)}, path)


def turned(folder: Path) -> None:
    """Says another label than the same head does: the least likely one."""
    change_head(folder, lambda weight: -weight)


def overflowing(folder: Path) -> None:
    """Finite numbers, so it may go live, whose products are not."""
    change_head(folder, lambda weight: np.sign(weight) * 3e38)


# -- who gets what -----------------------------------------------------------------------------------------------------


def arms(server: Server, task: str) -> dict[str, int]:
    """The version for each unit, by the code that resolves requests."""
    snapshot = server.runtime.catalog.snapshot
    asked = ((unit, choose_targets(snapshot, [TextInput(HELLO)], [task], Asker(unit))) for unit in UNITS)
    return {unit: targets[0].version.version for unit, ((targets,)) in asked}


def assert_share(count: int, percent: float) -> None:
    """Within five standard deviations of chance."""
    share = percent / 100
    spread = math.sqrt(len(UNITS) * share * (1 - share))
    assert abs(count - len(UNITS) * share) <= 5 * spread, (count, percent)


def test_shares_are_right_and_a_unit_stays_in_its_arm_while_the_percentage_grows(server: Server) -> None:
    for seed in (1, 2, 3):
        server.publish("abn", seed)
    before: dict[str, int] = {}
    for second, third in ((1, 0.5), (10, 5), (25, 5), (25, 40), (50, 50)):
        shares = [{"version": 2, "percent": second}, {"version": 3, "percent": third}]
        server.put("abn", champion=1, challengers=shares)
        after = arms(server, "abn")
        counts = Counter(after.values())
        for version, percent in ((1, 100 - second - third), (2, second), (3, third)):
            assert_share(counts[version], percent)
        moved = {unit for unit, version in before.items() if version != 1 and after[unit] != version}
        assert not moved
        before = after


def test_the_answer_comes_from_the_arm_of_the_unit(server: Server) -> None:
    for seed in (1, 2, 3):
        server.publish("arms", seed)
    server.put("arms", champion=1, challengers=[{"version": 2, "percent": 20}, {"version": 3, "percent": 10}])
    alone = {n: server.ask(task=f"arms@{n}")["results"][0][f"arms@{n}"]["scores"] for n in (1, 2, 3)}
    expected = arms(server, "arms")
    for unit in [unit for n in (1, 2, 3) for unit in itertools.islice(server.units_of("arms", n), 15)]:
        for _ in range(2):
            (result,) = server.ask(task="arms", unit=unit)["results"]
            said = result["arms"]
            assert said["version"] == expected[unit]
            assert said["arm"] == ("champion" if said["version"] == 1 else "challenger")
            assert said["scores"] == pytest.approx(alone[said["version"]], abs=1e-6)


def test_without_a_unit_the_request_is_the_unit(server: Server) -> None:
    for seed in (1, 2):
        server.publish("requests", seed)
    server.put("requests", champion=1, challenger=2, canary_percent=50)
    expected = arms(server, "requests")
    for unit in UNITS[:30]:
        (result,) = server.ask(task="requests", request_id=unit)["results"]
        assert result["requests"]["version"] == expected[unit]


def test_another_experiment_begins_with_other_units(server: Server) -> None:
    for seed in (1, 2):
        server.publish("again", seed)
    server.put("again", champion=1, challenger=2, canary_percent=10)
    first = {unit for unit, version in arms(server, "again").items() if version == 2}
    server.put("again", champion=1)
    server.put("again", champion=1, challenger=2, canary_percent=10)
    second = {unit for unit, version in arms(server, "again").items() if version == 2}
    assert len(first & second) < len(first) / 2  # a tenth by chance


# -- shadows -----------------------------------------------------------------------------------------------------------


def test_champion_and_shadow_are_scored_in_one_pass(server: Server) -> None:
    server.publish("trunk", 1)
    server.publish("trunk", 2, approve=False)
    server.publish("trunk", 3, lambda folder: add_prefix(folder, server.spec, 4, first_layer=3), approve=False)
    server.put("trunk", champion=1)
    alone = server.ask(task="trunk")
    assert (alone["usage"]["rows"], alone["usage"]["passes"]) == (1, 1)
    server.put("trunk", champion=1, shadow=[2])
    with_head = server.ask(task="trunk")
    assert (with_head["usage"]["rows"], with_head["usage"]["passes"]) == (1, 1)  # the very same states
    server.put("trunk", champion=1, shadow=[2, 3])
    with_prefix = server.ask(task="trunk")
    assert (with_prefix["usage"]["rows"], with_prefix["usage"]["passes"]) == (2, 1.5)  # forks after three of six layers
    (first,), *others = (answer["results"] for answer in (alone, with_head, with_prefix))
    for (result,) in others:
        assert set(result) == {"trunk"} and result["trunk"]["version"] == 1
        assert result["trunk"]["scores"] == pytest.approx(first["trunk"]["scores"], abs=1e-6)
    assert server.counted("trunk", 2, 2)["arm"] == "shadow"
    assert server.counted("trunk", 3, 1)["arm"] == "shadow"


def test_a_shadow_that_fails_changes_no_answer(server: Server) -> None:
    server.publish("calm", 1)
    server.publish("calm", 1, overflowing)
    server.put("calm", champion=1)
    (alone,) = server.ask(task="calm")["results"]
    server.put("calm", champion=1, shadow=[2])
    (result,) = server.ask(task="calm")["results"]
    assert result["calm"]["arm"] == "champion"
    assert result["calm"]["scores"] == pytest.approx(alone["calm"]["scores"], abs=1e-6)
    wait_for(lambda: server.pairs("calm")[2]["other"]["errors"] == 1)
    assert server.pairs("calm")[2]["count"] == 0  # of texts that both answered


def test_a_shadow_never_makes_a_text_too_long(server: Server) -> None:
    server.publish("long", 1)
    server.publish("long", 1, lambda folder: add_prefix(folder, server.spec, 100, position_offset=100))
    server.put("long", champion=1, shadow=[2])
    text = "word " * 450
    with_shadow = server.ask("word " * 300, task="long")
    assert with_shadow["usage"]["rows"] == 2
    without = server.ask(text, task="long")
    assert (without["usage"]["rows"], without["usage"]["tokens"]) == (1, 452)
    cut = server.ask("word " * 600, task="long", truncate=True)
    assert (cut["usage"]["rows"], cut["usage"]["tokens"]) == (1, server.spec.max_tokens)
    refused = server.client.post("/v1/predict", json={"inputs": text, "tasks": ["long@2"]})
    assert refused.status_code == 422 and "the limit is 412" in refused.json()["error"]
    assert server.counted("long", 2, 1)["count"] == 1


# -- side by side ------------------------------------------------------------------------------------------------------


def test_half_of_the_challenged_requests_are_paired(server: Server) -> None:
    server.publish("pairs", 1)
    server.publish("pairs", 2)
    server.put("pairs", champion=1, challenger=2, canary_percent=50)
    expected: Counter[str] = Counter()
    for number in range(40):
        request_id = f"pairs-{number}"
        answer = server.ask(HELLO, f"text {number}", task="pairs", unit=UNITS[number], request_id=request_id)
        assert answer["usage"]["passes"] == 2  # two texts, whatever is scored beside
        is_challenger = answer["results"][0]["pairs"]["arm"] == "challenger"
        expected["paired" if is_challenger and is_paired(request_id) else "unpaired"] += 1
        expected["champion"] += not is_challenger
        expected["challenger"] += is_challenger
    wait_for(lambda: server.pairs("pairs")[2]["unpaired_requests"] == expected["unpaired"])
    pair = server.counted("pairs", 2, 2 * expected["paired"])
    assert pair["paired_requests"] == expected["paired"] > 0
    assert pair["champion"]["requests"] == expected["champion"] > 0
    assert pair["other"]["requests"] == expected["challenger"] - expected["paired"] > 0
    assert pair["agreed"] + pair["disagreed"] == pair["count"]
    assert pair["latency_ratio"] > 0
    for side in (pair["champion"], pair["other"]):
        assert sum(side["label_rates"].values()) == pytest.approx(1, abs=1e-5)


def test_figures_are_those_of_the_answers(server: Server) -> None:
    server.publish("figures", 1)
    server.publish("figures", 2)
    texts = [f"text number {number} says {word}" for number, word in enumerate(["yes", "no", "maybe"] * 10)]
    first, second = (said(server, texts, f"figures@{number}") for number in (1, 2))
    server.put("figures", champion=1, shadow=[2])
    server.ask(*texts, task="figures")
    pair = server.counted("figures", 2, len(texts))
    labels = [(x["label"], y["label"]) for x, y in zip(first, second, strict=True)]
    assert pair["agreed"] == sum(x == y for x, y in labels)
    differences = [
        max(abs(x["scores"][label] - y["scores"][label]) for label in LABELS)
        for x, y in zip(first, second, strict=True)
    ]
    assert pair["mean_score_difference"] == pytest.approx(np.mean(differences), abs=1e-5)
    assert pair["max_score_difference"] == pytest.approx(max(differences), abs=1e-5)
    for side, position in (("champion", 0), ("other", 1)):
        rates = Counter(pair[position] for pair in labels)
        assert pair[side]["label_rates"] == {n: pytest.approx(c / len(texts), abs=1e-5) for n, c in rates.items()}


def test_outcomes_are_judged_by_mcnemars_test(server: Server) -> None:
    server.publish("judged", 1)
    server.publish("judged", 1, turned)
    server.put("judged", champion=1, shadow=[2])
    ask = [f"judged-{number}" for number in range(12)]
    champions = [server.ask(task="judged", request_id=name)["results"][0]["judged"]["label"] for name in ask]
    others = said(server, [HELLO] * 12, "judged@2")
    server.counted("judged", 2, 12)
    for number, name in enumerate(ask):  # ten times only the champion is right, once only the other, once neither
        neither = next(label for label in LABELS if label not in (champions[number], others[number]["label"]))
        server.tell(name, "judged", {10: others[number]["label"], 11: neither}.get(number, champions[number]))
    outcomes = server.pairs("judged")[2]["outcomes"]
    counts = [outcomes[n] for n in ("count", "both_right", "only_champion_right", "only_other_right", "both_wrong")]
    assert counts == [12, 0, 10, 1, 1]
    assert outcomes["accuracy_gain"] == pytest.approx(-9 / 12)
    assert outcomes["p_value"] == pytest.approx(binomtest(1, 11).pvalue, rel=1e-4)
    again = server.client.post("/v1/feedback", json={"request_id": ask[0], "task": "judged", "label": champions[0]})
    assert again.json() == {"recorded": False}
    other = server.client.post(
        "/v1/feedback", json={"request_id": ask[0], "task": "judged", "label": others[0]["label"]}
    )
    assert other.status_code == 409 and "another outcome" in other.json()["error"]
    assert server.pairs("judged")[2]["outcomes"]["count"] == 12


def said(server: Server, texts: Sequence[str], reference: str) -> list[Answer]:
    return [result[reference] for result in server.ask(*texts, task=reference)["results"]]


# -- gates -------------------------------------------------------------------------------------------------------------


def begin_canary(server: Server, task: str, challenger: Callable[[Path], object], **gates: float) -> None:
    """Version 2 is a challenger of version 1, and version 3 its shadow."""
    server.publish(task, 1)
    server.publish(task, 1, challenger)
    server.publish(task, 3)
    server.put(task, champion=1, challenger=2, canary_percent=50, shadow=[3], gates=gates)


def challenge(server: Server, task: str, count: int, *, paired: bool) -> list[str]:
    """So many requests of the challenger's units, with the champion beside it or not. Their ids."""
    asked = []
    units = itertools.islice(server.units_of(task, 2), count)
    for unit in units:
        request_id = request_of(paired)
        server.ask(task=task, unit=unit, request_id=request_id)
        asked.append(request_id)
    return asked


def assert_ended(server: Server, task: str, reason: str) -> Answer:
    """Traffic is back with the champion, and the audit log says why. The figures in it."""
    wait_for(lambda: server.traffic(task)["challengers"] == [])
    assert server.traffic(task) == {"champion": 1, "challengers": [], "shadow": [3], "gates": None}
    assert {server.ask(task=task, unit=unit)["results"][0][task]["version"] for unit in UNITS[:10]} == {1}
    entry = server.client.get("/v1/audit", params={"task": task}).json()["entries"][-1]
    assert (entry["actor"], entry["action"], entry["task"]) == ("gate", "gate", task)
    assert entry["before"]["traffic"]["challengers"] == [{"version": 2, "percent": 50.0}]
    assert entry["after"]["traffic"]["challengers"] == []
    assert reason in entry["reason"] and entry["reason"].startswith("version 2 ")
    figures: Answer = entry["after"]["figures"]
    assert (figures["version"], figures["arm"]) == (2, "challenger")
    assert server.client.get("/v1/audit/verify").json()["ok"]
    assert f'manifold_rollbacks_total{{cause="gate",task="{task}"}} 1.0' in server.client.get("/metrics").text
    return figures


def test_too_much_disagreement_ends_a_canary_but_not_before_there_are_enough(server: Server) -> None:
    begin_canary(server, "differs", turned, max_disagreement=0.5, min_count=10)
    challenge(server, "differs", 9, paired=True)
    assert server.counted("differs", 2, 9)["disagreed"] == 9
    challenge(server, "differs", 1, paired=False)
    wait_for(lambda: server.pairs("differs")[2]["other"]["requests"] == 1)  # gates were looked at before this one came
    assert server.traffic("differs")["challengers"] == [{"version": 2, "percent": 50.0}]
    challenge(server, "differs", 1, paired=True)
    figures = assert_ended(server, "differs", "differs from the champion on 10 of 10 texts (100.00%)")
    assert (figures["count"], figures["disagreed"], figures["agreement"]) == (10, 10, 0)


def test_too_many_failures_end_a_canary(server: Server) -> None:
    begin_canary(server, "fails", overflowing, max_error_rate=0.25, min_count=8)
    challenge(server, "fails", 8, paired=False)
    figures = assert_ended(server, "fails", "failed on 8 of 8 texts (100.00%); max_error_rate allows 25.00%")
    assert (figures["other"]["errors"], figures["other"]["error_rate"]) == (8, 1)


def test_taking_too_long_ends_a_canary(server: Server) -> None:
    begin_canary(server, "slow", lambda f: add_prefix(f, server.spec, 8), max_latency_ratio=1e-6, min_count=5)
    challenge(server, "slow", 6, paired=False)
    for unit in itertools.islice(server.units_of("slow", 1), 6):
        server.ask(task="slow", unit=unit)
    figures = assert_ended(server, "slow", "times as long as the champion; max_latency_ratio allows 1e-06")
    assert figures["latency_ratio"] > 0
    assert figures["champion"]["requests"] >= 5 and figures["other"]["requests"] >= 5


def test_gaining_too_little_ends_a_canary(server: Server) -> None:
    begin_canary(server, "worse", turned, min_accuracy_gain=0.0, min_count=6)
    right = said(server, [HELLO], "worse@1")[0]["label"]
    asked = challenge(server, "worse", 6, paired=True)
    server.counted("worse", 2, 6)
    for request_id in asked:
        server.tell(request_id, "worse", right)
    figures = assert_ended(server, "worse", "gains -1 on 6 texts with an outcome; min_accuracy_gain asks for +0")
    assert figures["outcomes"]["only_champion_right"] == 6


def test_within_its_bounds_a_canary_goes_on(server: Server) -> None:
    """The challenger is more certain of the same labels."""
    bounds = {"max_disagreement": 0.0, "max_error_rate": 0.0, "max_latency_ratio": 1e6, "min_accuracy_gain": 0.0}
    begin_canary(server, "same", lambda f: change_head(f, lambda weight: weight * 1.5), **bounds, min_count=1)
    right = said(server, [HELLO], "same@1")[0]["label"]
    server.ask(task="same", unit=next(server.units_of("same", 1)))
    challenge(server, "same", 5, paired=False)
    asked = challenge(server, "same", 5, paired=True)
    server.counted("same", 2, 5)
    for request_id in asked:
        server.tell(request_id, "same", right)
    challenge(server, "same", 1, paired=True)
    server.counted("same", 2, 6)  # gates have been looked at since
    challenge(server, "same", 1, paired=True)
    pair = server.counted("same", 2, 7)
    assert (pair["agreement"], pair["outcomes"]["count"], pair["outcomes"]["p_value"]) == (1, 5, 1)
    assert pair["latency_ratio"] > 0
    assert server.traffic("same")["challengers"] == [{"version": 2, "percent": 50.0}]


def test_a_new_canary_is_not_ended_by_the_figures_of_the_one_before(server: Server) -> None:
    begin_canary(server, "second", turned, max_disagreement=0.5, min_count=4)
    challenge(server, "second", 4, paired=True)
    assert_ended(server, "second", "differs from the champion on 4 of 4 texts")
    server.put("second", champion=1, challenger=2, canary_percent=50, gates={"max_disagreement": 0.5, "min_count": 4})
    challenge(server, "second", 3, paired=True)
    assert server.counted("second", 2, 7)["disagreed"] == 7
    assert server.traffic("second")["challengers"] == [{"version": 2, "percent": 50.0}]


@pytest.mark.usefixtures("_hurried")
def test_a_restarted_server_goes_on_counting(tmp_path: Path) -> None:
    with serving(tmp_path / "home", tmp_path) as before:
        begin_canary(before, "kept", turned, max_disagreement=0.5, min_count=10)
        units = set(before.units_of("kept", 2))
        challenge(before, "kept", 6, paired=True)
    with serving(tmp_path / "home", tmp_path) as after:
        assert after.counted("kept", 2, 6)["disagreed"] == 6  # what was counted last was handed over at the end
        assert set(after.units_of("kept", 2)) == units
        challenge(after, "kept", 3, paired=True)
        assert after.counted("kept", 2, 9)["disagreed"] == 9
        assert after.traffic("kept")["challengers"]
        challenge(after, "kept", 1, paired=True)
        figures = assert_ended(after, "kept", "differs from the champion on 10 of 10 texts")
        assert figures["count"] == 10
