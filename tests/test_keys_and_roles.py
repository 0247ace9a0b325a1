"""Who may do what: keys and roles of a server process that asks for them, over HTTP and from the command line."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
from redis import Redis

from app.domain import BackboneSpec
from app.engine.artifact import FILES
from app.engine.backbone import Backbone
from app.registry.connection import connect
from app.registry.schema import from_bytes
from app.rollout import Role, hash_token
from tests.artifacts import write_artifact
from tests.commands import CommandLine
from tests.registry.redis_server import RedisServer
from tests.serving import ServerProcess, wait_for

ADMIN_KEY = "an-administrators-own-key"
TOKEN = re.compile(r"mf_[^_]+_[A-Za-z0-9_-]{40,}")
_fresh = itertools.count(1)


@pytest.fixture(scope="module")
def spec() -> BackboneSpec:
    return Backbone.load("embedded", "cpu", "float32").spec


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    folder = Path(tempfile.mkdtemp(prefix="redis-"))
    server = RedisServer(folder)
    server.start()
    yield server
    server.kill()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def url(redis_server: RedisServer, spec: BackboneSpec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a server is that has spam@1 live."""
    prefixes = tmp_path_factory.mktemp("prefixes")
    write_artifact(prefixes / "spam", spec, "spam")
    options = ("--prefixes", str(prefixes), "--redis-url", redis_server.url, "--admin-key", ADMIN_KEY)
    started = ServerProcess("app.cli", "serve", "--port", "0", *options, "--dtype", "float32", "--drain-grace-s", "0")
    with started as server:
        yield server.wait_until_ready()


@dataclass
class Office:
    """Gives people keys, and terminals that hold them."""

    url: str
    shell: CommandLine

    def hire(self, *roles: Role) -> Person:
        name = f"{'-'.join(roles)}-{next(_fresh)}"
        arguments = [argument for role in roles for argument in ("--role", role)]
        key = self.shell.json("keys", "create", name, *arguments)
        return Person(name, key["id"], key["token"], CommandLine(self.url, key["token"]))


@dataclass(frozen=True)
class Person:
    name: str
    key_id: str
    token: str = field(repr=False)
    shell: CommandLine = field(repr=False)

    def request(self, method: str, path: str, **content: Any) -> httpx2.Response:
        headers = {"authorization": f"Bearer {self.token}"}
        return httpx2.request(method, self.shell.url + path, headers=headers, trust_env=False, **content)


@pytest.fixture(scope="module")
def office(url: str) -> Office:
    return Office(url, CommandLine(url, ADMIN_KEY))


@pytest.fixture
def folder(spec: BackboneSpec, tmp_path: Path) -> Callable[[str], Path]:
    """Makes the folder of another version at each call."""
    numbers = itertools.count()

    def make(task: str) -> Path:
        seed = next(numbers)
        return write_artifact(tmp_path / f"{task}-{seed}", spec, task, seed=seed)

    return make


def notes(office: Office, actor: str) -> list[dict[str, Any]]:
    """What the audit log has of this actor's attempts. It is written behind the answers."""
    entries = office.shell.json("audit", "--after", "0", "--limit", "1000")["entries"]
    return [entry for entry in entries if entry["actor"] == actor]


# -- failed attempts ---------------------------------------------------------------------------------------------------
# They come first: the log takes 60 of them a minute, and the tests of roles make more.


def from_address(address: str, url: str, token: str = "") -> httpx2.Client:
    transport = httpx2.HTTPTransport(local_address=address)
    headers = {"authorization": f"Bearer {token}"} if token else {}
    return httpx2.Client(base_url=url, transport=transport, headers=headers)


def test_wrong_keys_are_audited_and_rate_limited(office: Office, url: str) -> None:
    guess = "mf_guess_" + "x" * 43
    with from_address("127.0.0.7", url, guess) as client:
        answers = [client.get("/v1/tasks") for _ in range(12)]
    assert [answer.status_code for answer in answers] == [401] * 10 + [429] * 2
    assert answers[0].headers["www-authenticate"] == "Bearer"
    assert answers[0].json()["error_type"] == "unauthorized"
    assert answers[-1].json()["error_type"] == "overloaded" and 0 < int(answers[-1].headers["retry-after"]) <= 60
    assert "too many wrong keys from 127.0.0.7: try again in" in answers[-1].json()["error"]
    wait_for(lambda: len(notes(office, "unknown at 127.0.0.7")) == 10)
    found = notes(office, "unknown at 127.0.0.7")
    assert {entry["action"] for entry in found} == {"authenticate"}
    assert guess not in json.dumps(found) and "x" * 43 not in json.dumps(found)
    person = office.hire(Role.PREDICT)
    with from_address("127.0.0.7", url, person.token) as client:  # whoever has a key is not kept out by a neighbour
        assert client.get("/v1/tasks").status_code == 200
    with from_address("127.0.0.8", url, guess) as client:
        assert client.get("/v1/tasks").status_code == 401


def test_a_key_with_a_wrong_secret_is_refused(office: Office, url: str) -> None:
    person = office.hire(Role.ADMIN)
    changed = person.token[:-1] + ("a" if person.token[-1] != "a" else "b")
    with from_address("127.0.0.9", url, changed) as client:
        assert client.get("/v1/keys").status_code == 401
    wait_for(lambda: notes(office, "unknown at 127.0.0.9"))
    assert notes(office, "unknown at 127.0.0.9")[0]["after"]["key"] == person.key_id


def test_an_attempt_to_approve_what_one_published_is_audited(office: Office, folder: Callable[[str], Path]) -> None:
    person = office.hire(Role.PUBLISH, Role.APPROVE)
    person.shell.say("publish", str(folder("alone")))
    person.shell.refused("approve", "alone@1")
    wait_for(lambda: [entry["action"] for entry in notes(office, person.name)] == ["publish", "forbidden"])
    assert "somebody else must approve it" in notes(office, person.name)[-1]["reason"]


def test_what_a_role_may_not_do_is_audited(office: Office) -> None:
    person = office.hire(Role.PREDICT)
    person.shell.refused("promote", "spam@1")
    wait_for(lambda: notes(office, person.name))
    (entry,) = notes(office, person.name)
    assert entry["action"] == "forbidden"
    assert entry["reason"].startswith("PUT /v1/tasks/spam/traffic: this needs a key with the role operate")
    for _ in range(15):
        assert person.request("GET", "/v1/keys").status_code == 403
    wait_for(lambda: len(notes(office, person.name)) == 10)  # the log is not theirs to fill
    assert office.shell.json("audit", "--verify")["ok"]


# -- keys --------------------------------------------------------------------------------------------------------------


def test_keys_are_created_listed_and_revoked(office: Office) -> None:
    shown = office.shell.say("keys", "create", "the shop", "--role", "predict", "--role", "audit")
    token = TOKEN.search(shown)
    assert token is not None and "it is shown this once" in shown
    listed = office.shell.json("keys", "list")["keys"]
    (key,) = (key for key in listed if key["name"] == "the shop")
    assert sorted(key["roles"]) == ["audit", "predict"] and key["created_by"] == "admin"
    assert set(key) == {"id", "name", "roles", "created_by", "created_at"}
    assert "the shop" in office.shell.say("keys", "list") and token[0] not in office.shell.say("keys", "list")
    assert "the shop" in office.shell.refused("keys", "create", "the shop", "--role", "predict")
    shop = CommandLine(office.url, token[0])
    assert shop.json("predict", "hello", "--task", "spam")["results"]
    office.shell.say("keys", "revoke", key["id"])
    assert "was revoked" in shop.refused("predict", "hello", "--task", "spam")
    assert key["id"] not in {key["id"] for key in office.shell.json("keys", "list")["keys"]}
    actions = [entry["action"] for entry in office.shell.json("audit")["entries"] if entry["actor"] == "admin"]
    assert "create_key" in actions and "revoke_key" in actions


def test_without_a_key_only_health_and_documents_are_open(url: str) -> None:
    with from_address("127.0.0.6", url) as client:  # not the others' address: its failures would be theirs
        for path in ("/livez", "/readyz", "/healthz", "/metrics", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200, path
        document = client.get("/openapi.json").json()
        for path, methods in document["paths"].items():
            if path in ("/livez", "/readyz", "/healthz", "/metrics"):
                continue
            for method in methods:
                answer = client.request(method, re.sub(r"\{[^}]+\}", "1", path))
                assert answer.status_code in (401, 429), (method, path)
    assert "asks for a key" in CommandLine(url).refused("tasks")


def test_keys_are_hashed_at_rest(office: Office, redis_server: RedisServer) -> None:
    tokens = [office.hire(role).token for role in Role]
    with connect(redis_server.url) as client:
        stored = dump(client)
        records = client.hgetall("{manifold}:keys")
    assert len(records) >= len(tokens)
    appended = b"".join(path.read_bytes() for path in redis_server.folder.rglob("*") if path.is_file())
    for token in (*tokens, ADMIN_KEY):
        secret = token.split("_", 2)[-1]
        assert (hash_token(token).encode() in stored) is (token != ADMIN_KEY)
        assert secret.encode() not in stored and secret.encode() not in appended


def dump(client: Redis) -> bytes:
    """Every name and value that there is."""
    found = []
    for key in client.scan_iter("*"):
        read: dict[str, Callable[[], object]] = {
            "string": partial(client.get, key),
            "hash": partial(client.hgetall, key),
            "list": partial(client.lrange, key, 0, -1),
            "set": partial(client.smembers, key),
            "zset": partial(client.zrange, key, 0, -1),
        }
        found.append(repr((key, read[from_bytes(client.type(key))]())).encode())
    assert found
    return b"\n".join(found)


# -- roles -------------------------------------------------------------------------------------------------------------

ANY = frozenset(Role)
OPERATIONS: list[tuple[str, str, Any, frozenset[Role]]] = [
    ("POST", "/v1/predict", {"inputs": "hello", "tasks": ["spam"]}, frozenset({Role.PREDICT})),
    ("POST", "/v1/embeddings", {"input": "hello", "model": "all-MiniLM-L6-v2"}, frozenset({Role.PREDICT})),
    ("POST", "/v1/feedback", {"request_id": "r", "task": "spam", "label": "no"}, frozenset({Role.PREDICT})),
    ("POST", "/v1/tasks/none/versions", None, frozenset({Role.PUBLISH})),
    ("POST", "/v1/tasks/none/versions/1/approve", {}, frozenset({Role.APPROVE})),
    ("POST", "/v1/tasks/none/versions/1/reject", {}, frozenset({Role.APPROVE})),
    ("POST", "/v1/tasks/none/versions/1/retire", {}, frozenset({Role.APPROVE})),
    ("PUT", "/v1/tasks/none/traffic", {"champion": 1}, frozenset({Role.OPERATE})),
    ("POST", "/v1/tasks/none/rollback", {}, frozenset({Role.OPERATE})),
    ("POST", "/v1/releases", {"tasks": {"none": {"champion": 1}}}, frozenset({Role.OPERATE})),
    ("POST", "/v1/releases/none/rollback", {}, frozenset({Role.OPERATE})),
    ("GET", "/v1/audit", None, frozenset({Role.AUDIT})),
    ("GET", "/v1/audit/verify", None, frozenset({Role.AUDIT})),
    ("GET", "/v1/predictions/none", None, frozenset({Role.AUDIT})),
    ("GET", "/v1/keys", None, frozenset()),
    ("POST", "/v1/keys", {"name": "anonymous", "roles": ["admin"]}, frozenset()),
    ("DELETE", "/v1/keys/none", None, frozenset()),
    ("POST", "/v1/index/restore", {}, frozenset()),
    ("POST", "/v1/index/accept", {}, frozenset()),
    ("GET", "/v1/tasks", None, ANY),
    ("GET", "/v1/tasks/spam", None, ANY),
    ("GET", "/v1/tasks/spam/versions/1", None, ANY),
    ("GET", "/v1/tasks/spam/versions/1/artifact", None, frozenset({Role.PUBLISH, Role.APPROVE, Role.OPERATE})),
    ("GET", "/v1/tasks/spam/comparison", None, ANY),
    ("GET", "/v1/drift", None, ANY),
    ("GET", "/v1/releases", None, ANY),
    ("GET", "/v1/index", None, ANY),
    ("GET", "/info", None, ANY),
]


@pytest.mark.parametrize("role", list(Role))
def test_each_role_may_do_its_part_and_nothing_else(office: Office, role: Role) -> None:
    person = office.hire(role)
    for method, path, body, allowed in OPERATIONS:
        answer = person.request(method, path, **({} if body is None else {"json": body}))
        if role in allowed | {Role.ADMIN}:
            assert answer.status_code not in (401, 403, 429, 500, 503), (method, path, answer.text)
        else:
            assert answer.status_code == 403, (method, path, answer.text)
            assert answer.json()["error_type"] == "forbidden"
            assert f"and {person.name} has {role}" in answer.json()["error"]


def test_the_table_of_operations_is_whole(url: str) -> None:
    document = httpx2.get(f"{url}/openapi.json", trust_env=False).json()
    free = {"/livez", "/readyz", "/healthz", "/metrics"}
    for template, methods in document["paths"].items():
        pattern = re.compile(re.sub(r"\{[^}]+\}", "[^/]+", template))
        for method in methods if template not in free else ():
            assert any(method.upper() == m and pattern.fullmatch(p) for m, p, _, _ in OPERATIONS), (method, template)


def test_a_version_goes_live_by_the_hands_of_several_people(office: Office, folder: Callable[[str], Path]) -> None:
    paula, anna = office.hire(Role.PUBLISH), office.hire(Role.APPROVE)
    otto, ada, rita = office.hire(Role.OPERATE), office.hire(Role.AUDIT), office.hire(Role.PREDICT)
    assert paula.shell.json("publish", str(folder("team")))["published_by"] == paula.name
    assert "role approve" in paula.shell.refused("approve", "team@1")
    assert "role publish" in anna.shell.refused("publish", str(folder("team")))
    assert anna.shell.json("approve", "team@1")["decided_by"] == anna.name
    assert "role operate" in anna.shell.refused("promote", "team@1")
    assert otto.shell.json("promote", "team@1")["traffic"]["champion"] == 1
    assert "role predict" in otto.shell.refused("predict", "hello", "--task", "team")
    assert rita.shell.json("predict", "hello", "--task", "team")["results"][0]["team"]["version"] == 1
    assert "role audit" in rita.shell.refused("audit")
    entries = ada.shell.json("audit", "--task", "team")["entries"]
    assert [(entry["actor"], entry["action"]) for entry in entries] == [
        (paula.name, "publish"),
        (anna.name, "approve"),
        (otto.name, "traffic"),
    ]
    assert "the log is whole" in ada.shell.say("audit", "--verify")


def test_nobody_approves_what_they_published(office: Office, folder: Callable[[str], Path]) -> None:
    both, other = office.hire(Role.PUBLISH, Role.APPROVE), office.hire(Role.APPROVE)
    both.shell.say("publish", str(folder("own")))
    told = both.shell.refused("approve", "own@1")
    assert told == f"own@1 was published by {both.name}: somebody else must approve it"
    answer = both.request("POST", "/v1/tasks/own/versions/1/approve", json={})
    assert (answer.status_code, answer.json()["error_type"]) == (403, "forbidden")
    assert "own@2 is published and not approved" in both.shell.refused("publish", str(folder("own")), "--approve")
    office.shell.say("publish", str(folder("own")))
    assert "somebody else" in office.shell.refused("approve", "own@3")  # an administrator neither
    assert other.shell.json("approve", "own@1")["state"] == "approved"
    assert both.shell.json("reject", "own@2")["state"] == "rejected"  # taking back is not putting live
    assert "only a candidate can become approved" in other.shell.refused("approve", "own@2")


def test_what_is_not_approved_is_reached_by_a_pin_with_the_role_approve_or_as_a_shadow(
    office: Office, folder: Callable[[str], Path]
) -> None:
    approver = office.hire(Role.APPROVE, Role.PREDICT)
    caller, operator = office.hire(Role.PREDICT), office.hire(Role.OPERATE)
    office.shell.say("publish", str(folder("pins")))
    told = caller.shell.refused("predict", "hello", "--task", "pins@1")
    assert told == "pins@1 is candidate: asking it needs a key with the role approve"
    pinned = approver.shell.json("predict", "hello", "--task", "pins@1")["results"][0]["pins@1"]
    assert (pinned["version"], pinned["arm"]) == (1, "pinned")
    assert "approve it first" in operator.shell.refused("promote", "pins@1")
    approver.shell.say("approve", "pins@1")
    operator.shell.say("promote", "pins@1")
    assert caller.shell.json("predict", "hello", "--task", "pins@1")["results"][0]["pins@1"] == pinned
    office.shell.say("publish", str(folder("pins")))
    assert "approve it first" in operator.shell.refused("canary", "pins@2", "10")
    operator.shell.say("shadow", "pins@2")
    answer = caller.shell.json("predict", "hello", "--task", "pins")
    assert list(answer["results"][0]) == ["pins"] and answer["results"][0]["pins"]["version"] == 1
    wait_for(lambda: caller.shell.json("compare", "pins")["pairs"][0]["count"] == 1)
    assert "needs a key with the role approve" in caller.shell.refused("predict", "hello", "--task", "pins@2")
    assert "has no challenger" in caller.shell.refused("predict", "hello", "--task", "pins@challenger")
    assert approver.shell.json("predict", "hello", "--task", "pins@2")["results"][0]["pins@2"]["arm"] == "pinned"
    operator.shell.say("shadow", "pins@2", "--off")
    approver.shell.say("reject", "pins@2")
    assert "pins@2 is rejected" in caller.shell.refused("predict", "hello", "--task", "pins@2")


def test_an_artifact_of_somebody_who_may_not_publish_is_refused_unread(
    office: Office, folder: Callable[[str], Path]
) -> None:
    caller, path = office.hire(Role.PREDICT), folder("unread")
    files = [("files", (name, (path / name).read_bytes())) for name in FILES if (path / name).exists()]
    assert caller.request("POST", "/v1/tasks/unread/versions", files=files).status_code == 403
    assert caller.request("POST", "/v1/tasks/unread/versions", content=b"\0" * 100_000_000).status_code == 403
