"""The prediction log of real server processes: killed, on a full disk, without texts; and `manifold why` later on."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from app.domain import BackboneSpec, ProblemType
from app.engine.backbone import Backbone
from app.registry.prediction_lines import rows_of
from app.rollout import Role
from tests.artifacts import write_artifact
from tests.commands import CommandLine
from tests.serving import ROOT, ServerProcess, wait_for

ADMIN_KEY = "an-administrators-own-key"
ROLES = {"paula": Role.PUBLISH, "anna": Role.APPROVE, "otto": Role.OPERATE, "ada": Role.AUDIT}
SECRET = "Zebulon Quigley has the measles"


@pytest.fixture(scope="module")
def spec() -> BackboneSpec:
    return Backbone.load("embedded", "cpu", "float32").spec


@pytest.fixture
def prefixes(spec: BackboneSpec, tmp_path: Path) -> Path:
    write_artifact(tmp_path / "prefixes" / "spam", spec, "spam", ("ham", "spam"))
    return tmp_path / "prefixes"


Serve = Callable[..., ServerProcess]


@pytest.fixture
def serve(prefixes: Path, tmp_path: Path) -> Serve:
    def start(*options: str, log: str = str(tmp_path / "log")) -> ServerProcess:
        fixed = ("--port", "0", "--dtype", "float32", "--drain-grace-s", "0", "--home", str(tmp_path / "home"))
        place = ("--prefixes", str(prefixes), "--prediction-log", log)
        return ServerProcess("app.cli", "serve", *fixed, *place, *options)

    return start


@pytest.fixture
def client() -> Iterator[httpx2.Client]:
    with httpx2.Client(trust_env=False) as opened:
        yield opened


def ask(client: httpx2.Client, url: str, request_id: str, *texts: str) -> dict[str, Any]:
    body = {"inputs": list(texts) or ["hello"], "tasks": ["spam"]}
    answer = client.post(f"{url}/v1/predict", json=body, headers={"x-request-id": request_id})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def metric(client: httpx2.Client, url: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", client.get(f"{url}/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


# -- the story ---------------------------------------------------------------------------------------------------------


def test_an_auditor_finds_why_a_text_got_its_answer_although_the_version_was_retired_since(
    serve: Serve, spec: BackboneSpec, tmp_path: Path, client: httpx2.Client
) -> None:
    with serve("--admin-key", ADMIN_KEY, "--log-format", "json") as server:
        url = server.wait_until_ready()
        admin = CommandLine(url, ADMIN_KEY)
        people = {}
        for name, role in ROLES.items():
            people[name] = CommandLine(url, admin.json("keys", "create", name, "--role", role)["token"])
        emotion = {"problem_type": ProblemType.MULTI_LABEL, "thresholds": [0.25, 0.75]}
        for seed in (1, 2):
            folder = write_artifact(tmp_path / f"mood-{seed}", spec, "mood", ("glad", "sad"), seed=seed, **emotion)
            people["paula"].say("publish", str(folder), "--reason", f"data of week {seed}")
            people["anna"].say("approve", f"mood@{seed}", "--reason", "dev 0.91")
        people["otto"].say("promote", "mood@1", "--reason", "the first")
        answer = admin.json("predict", SECRET, "--task", "mood", "--task", "spam")
        request_id = answer["request_id"]
        people["otto"].say("promote", "mood@2", "--reason", "better")
        people["anna"].say("retire", "mood@1", "--reason", "old")

        wait_for(lambda: people["ada"]("why", request_id).status == 0)
        told = people["ada"].json("why", request_id)
        rows = {row["task"]: row for row in told["rows"]}
        assert {row["generation"] for row in told["rows"]} == {answer["generation"]}
        assert {row["actor"] for row in told["rows"]} == {"admin"}
        for task, said in answer["results"][0].items():
            assert (rows[task]["version"], rows[task]["arm"]) == (said["version"], said["arm"])
            assert rows[task]["scores"] == said["scores"] and rows[task].get("labels") == said.get("labels")
        mood = next(version for version in told["versions"] if version["task"] == "mood")
        assert mood["state"] == "retired" and mood["thresholds"] == {"glad": 0.25, "sad": 0.75}
        assert (mood["published"]["actor"], mood["published"]["reason"]) == ("paula", "data of week 1")
        assert [(d["action"], d["actor"], d["reason"]) for d in mood["decisions"]] == [
            ("approve", "anna", "dev 0.91"),
            ("retire", "anna", "old"),
        ]
        then = next(traffic for traffic in told["traffic"] if traffic["task"] == "mood")
        assert (then["traffic"]["champion"], then["put"]["actor"], then["put"]["reason"]) == (1, "otto", "the first")

        words = people["ada"].say("why", request_id, "--text", SECRET)
        for part in ("mood@1 is retired", "approved by anna", "published by paula", "put by otto", "(from 0.25 on)"):
            assert part in words
        assert "the text is one that was answered" in words and SECRET not in words
        assert "audit" in people["otto"].refused("why", request_id)
        assert "no answer to request nobody" in people["ada"].refused("why", "nobody")

        def changes() -> list[dict[str, Any]]:
            return [line for line in map(json.loads, server.log) if line.get("event") == "index_change"]

        wait_for(lambda: changes()[-1]["action"] == "retire")  # the log is written aside
        told_of = changes()
        assert [(line["actor"], line["action"], line["task"], line["to"]) for line in told_of][-2:] == [
            ("otto", "traffic", "mood", "champion 2"),
            ("anna", "retire", "mood", "version 1 retired"),
        ]
        assert [line["generation"] for line in told_of] == list(range(2, 2 + len(told_of)))
    for folder in ("log", "home"):
        for path in (tmp_path / folder).rglob("*"):
            assert not path.is_file() or b"Quigley" not in path.read_bytes(), path
    assert "Quigley" not in "".join(server.log)


def test_texts_are_kept_where_a_setting_says_so(serve: Serve, tmp_path: Path, client: httpx2.Client) -> None:
    with serve("--prediction-log-texts", "--prediction-log-format", "parquet") as server:
        url = server.wait_until_ready()
        ask(client, url, "r-1", SECRET)
        wait_for(lambda: client.get(f"{url}/v1/predictions/r-1").status_code == 200)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    (path,) = (path for path in (tmp_path / "log").iterdir())
    assert path.suffix == ".parquet"
    with serve() as server:  # another format now: both are read
        url = server.wait_until_ready()
        assert not any("index_change" in line or "create" in line for line in server.log)  # no history at a start
        (row,) = client.get(f"{url}/v1/predictions/r-1").json()["rows"]
        assert row["text"] == SECRET


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_every_whole_row_survives_a_kill_in_the_middle(serve: Serve, tmp_path: Path, client: httpx2.Client) -> None:
    with serve() as server:
        url = server.wait_until_ready()
        for number in range(300):
            ask(client, url, f"r-{number}", "hello", "you")
        wait_for(lambda: metric(client, url, "manifold_prediction_log_rows_total") >= 400)
        server.signal(signal.SIGKILL)
        server.wait()
    (path,) = (tmp_path / "log").iterdir()
    assert "_open_" in path.name
    whole = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    rows = [row for line in whole for row in rows_of(line)]
    assert len(rows) >= 400
    assert [(row["request_id"], row["input"]) for row in rows] == [(f"r-{n // 2}", n % 2) for n in range(len(rows))]
    with serve() as server:
        url = server.wait_until_ready()
        assert len(client.get(f"{url}/v1/predictions/r-150").json()["rows"]) == 2
        ask(client, url, "r-after")
        wait_for(lambda: client.get(f"{url}/v1/predictions/r-after").status_code == 200)
        wait_for(lambda: not path.exists())  # it was finished
        assert client.get(f"{url}/v1/predictions/r-150").status_code == 200
    assert len(list((tmp_path / "log").iterdir())) == 2


def test_a_full_disk_costs_rows_and_no_answers(serve: Serve, tmp_path: Path, client: httpx2.Client) -> None:
    with serve() as server:
        url = server.wait_until_ready()
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (4_096, resource.RLIM_INFINITY))
        for number in range(60):
            assert ask(client, url, f"r-{number}")["results"][0]["spam"]["label"] in ("ham", "spam")
        wait_for(lambda: metric(client, url, 'manifold_prediction_log_dropped_total{reason="full"}') > 0)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        ask(client, url, "r-after")
        wait_for(lambda: client.get(f"{url}/v1/predictions/r-after").status_code == 200)
        written = metric(client, url, "manifold_prediction_log_rows_total")
        dropped = metric(client, url, 'manifold_prediction_log_dropped_total{reason="full"}')
        assert written + dropped == 61
        wait_for(lambda: any("is written again" in line for line in server.log))
        assert sum("rows are dropped" in line for line in server.log) == 1
    lines = [line for path in (tmp_path / "log").iterdir() for line in path.read_bytes().splitlines()]
    assert len(list(map(json.loads, lines))) == written


def _size_bytes(folder: Path) -> int:
    """Of files that the server may be taking away meanwhile."""
    total_bytes = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total_bytes += path.stat().st_size
    return total_bytes


def test_files_are_bounded_in_size_and_all_together(serve: Serve, tmp_path: Path, client: httpx2.Client) -> None:
    with serve("--prediction-log-part-bytes", "9000", "--prediction-log-limit-bytes", "60000") as server:
        url = server.wait_until_ready()
        for number in range(10):  # 13 kB each
            ask(client, url, f"r-{number}", *["hello"] * 30)
            wait_for(lambda number=number: client.get(f"{url}/v1/predictions/r-{number}").status_code == 200)
        wait_for(lambda: _size_bytes(tmp_path / "log") <= 60_000)
        assert len(list((tmp_path / "log").iterdir())) > 2
        assert client.get(f"{url}/v1/predictions/r-0").status_code == 404
        assert client.get(f"{url}/v1/predictions/r-9").status_code == 200


@pytest.mark.parametrize(
    ("log", "told"), [("/dev/null/log", "Not a directory"), ("ftps://host/log", "no place for predictions")]
)
def test_a_log_that_cannot_be_written_is_told_at_the_start(log: str, told: str, tmp_path: Path) -> None:
    options = ("--port", "0", "--home", str(tmp_path), "--prediction-log", log)
    arguments = [sys.executable, "-m", "app.cli", "serve", *options]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("manifold: ") and told in last and log in last
