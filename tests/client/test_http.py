"""How commands reach the server: the key, and one sentence for what goes wrong."""

from __future__ import annotations

import argparse

import pytest

from app.cli import main
from app.client.http import AnsweredError, MisuseError, Server
from app.config import Settings
from app.main import create_app
from app.rollout import Role
from app.service.access import EVERYBODY
from app.service.runtime import Runtime
from tests.client.conftest import Run
from tests.client.recorded import answering
from tests.fake_rollout import FakeRollout
from tests.serving import running


def options(**given: str | None) -> argparse.Namespace:
    return argparse.Namespace(**{"url": None, "key": None, **given})


@pytest.fixture
def token(rollout: FakeRollout) -> str:
    return rollout.create_key(EVERYBODY, "olga", frozenset({Role.OPERATE, Role.ADMIN}))[1]


def test_the_key_is_an_option_or_a_variable(
    run: Run, url: str, token: str, monkeypatch: pytest.MonkeyPatch, rollout: FakeRollout
) -> None:
    assert run("keys", "list", "--key", token).status == 0
    monkeypatch.setenv("MANIFOLD_KEY", f"{token}\n")
    assert run("keys", "list").status == 0
    assert run("keys", "list", "--key", "mf_wrong").status == 1  # the option wins


def test_without_a_key_the_sentence_says_where_it_goes(run: Run, token: str) -> None:
    done = run("keys", "list")
    assert done.status == 1
    assert "--key or MANIFOLD_KEY" in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize("key", ["mf_a\nx-evil: 1", "schlüssel"])
def test_a_key_that_no_header_can_carry_is_not_repeated(key: str) -> None:
    with pytest.raises(MisuseError) as raised:
        Server.of(options(key=key))
    assert key not in str(raised.value) and "--key, MANIFOLD_KEY" in str(raised.value)


def test_the_key_is_not_shown_where_objects_are() -> None:
    server = Server.of(options(url="http://x/", key="mf_secret"))
    assert (server.url, server.key) == ("http://x", "mf_secret")
    assert "mf_secret" not in repr(server)


def test_what_was_read_is_named_with_the_change() -> None:
    with answering({"PUT /x": [(200, {})]}) as server:
        assert Server(server.url).ask("PUT", "/x", {"a": 1}, if_match=17) == {}
    ((_, _, headers),) = server.asked
    assert headers["if-match"] == '"17"' and headers["content-type"] == "application/json"
    assert "authorization" not in headers


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ((409, {"error": "somebody was faster"}), "somebody was faster"),
        ((500, {"detail": "?"}), "the server answered with status 500"),
        ((307, {}), "the server answered with status 307"),
    ],
)
def test_an_error_is_the_servers_sentence(answer: tuple[int, object], sentence: str) -> None:
    with answering({"GET /x": [answer]}) as server, pytest.raises(AnsweredError, match=sentence) as raised:
        Server(server.url).ask("GET", "/x")
    assert raised.value.status == answer[0]


def test_the_url_may_end_with_a_slash(settings: Settings, runtime: Runtime, capsys: pytest.CaptureFixture[str]) -> None:
    with running(create_app(settings, runtime)) as url:
        assert main(["tasks", "--url", f"{url}/"]) == 0
