"""Holds what a fresh clone is installed from, what containers are made of, and the tables of the README."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from redis import AuthenticationError, Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from app.config import ENV_PREFIX, Settings, env_name
from app.main import create_app
from app.telemetry.metrics import Metrics
from tests.registry import redis_server

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PLACES = ("app", "docker", "prefixes", "tests", "tools", ".ci")
TEXTS = {".py", ".json", ".md", ".toml", ".yml", ".txt", ".lock", ""}
README = (ROOT / "README.md").read_text("utf-8")
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
SOMEONES_MACHINE = re.compile(r"(?<![\w.])/(root|work|Users|home/\w+|tmp/\w+|opt/(pypi|wheels))/")


def pins(lock: str) -> dict[str, str]:
    lines = (ROOT / lock).read_text("utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith(("#", "-r ")))


def wanted() -> list[Requirement]:
    return [Requirement(line) for line in [*PROJECT["project"]["dependencies"], *PROJECT["dependency-groups"]["dev"]]]


def texts() -> Iterator[Path]:
    inside = (path for place in PLACES for path in (ROOT / place).rglob("*"))
    at_the_top = ROOT.glob("*")
    for path in [*inside, *at_the_top]:
        if path.is_file() and path.suffix in TEXTS and "__pycache__" not in path.parts:
            yield path


@pytest.mark.parametrize("requirement", wanted(), ids=lambda requirement: requirement.name)
def test_the_lock_holds_what_the_project_asks_for(requirement: Requirement) -> None:
    locked = pins("requirements.lock") | pins("requirements-dev.lock")
    assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)])


def test_the_lock_fits_machines_with_and_without_a_gpu() -> None:
    locked = pins("requirements.lock") | pins("requirements-dev.lock")
    assert locked["torch"] == "2.13.0"
    assert not [name for name in locked if name.startswith(("nvidia-", "cuda-", "triton"))]
    assert not [version for version in locked.values() if not re.fullmatch(r"[\w.]+", version)]


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    assert [str(path.relative_to(ROOT)) for path in texts() if SOMEONES_MACHINE.search(path.read_text("utf-8"))] == []


# -- containers --------------------------------------------------------------------------------------------------------


def section(title: str) -> str:
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_containers_set_only_what_there_is_to_set() -> None:
    known = {env_name(field) for field in Settings.model_fields}
    in_image = set(re.findall(rf"^\s*(?:ENV )?({ENV_PREFIX}\w+)=", DOCKERFILE, re.MULTILINE))
    assert in_image and in_image <= known
    assert set(COMPOSE["services"]["manifold"]["environment"]) <= known


def test_the_image_keeps_its_home_in_a_volume_of_a_user_without_rights() -> None:
    home = re.search(rf"{ENV_PREFIX}HOME=(\S+)", DOCKERFILE)
    assert home is not None
    assert f"VOLUME {home[1]}\n" in DOCKERFILE
    assert f"--home-dir {home[1]} --create-home" in DOCKERFILE
    assert re.findall(r"^USER (.+)", DOCKERFILE, re.MULTILINE) == ["10001"]
    assert f"manifold:{home[1]}" in COMPOSE["services"]["manifold"]["volumes"]


def test_the_image_does_not_open_the_door_to_everybody() -> None:
    assert not re.search(rf"^\s*(?:ENV )?{env_name('allow_remote')}=", DOCKERFILE, re.MULTILINE)


def test_what_the_image_is_built_from_is_not_ignored() -> None:
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    sent = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    assert {source for line in copied for source in line.split()} == sent


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_every_service_is_checked_and_writes_to_volumes_alone(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["healthcheck"]["test"] and service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    written = [volume for volume in service["volumes"] if not volume.endswith(":ro")]
    assert {volume.partition(":")[0] for volume in written} <= set(COMPOSE["volumes"])


def test_redis_is_reached_by_manifold_alone() -> None:
    redis = COMPOSE["services"]["redis"]
    assert "ports" not in redis
    assert redis["networks"] == ["index"] and COMPOSE["networks"]["index"]["internal"] is True
    assert COMPOSE["services"]["manifold"]["environment"][env_name("redis_url")].endswith("@redis:6379/0")


def test_secrets_come_from_env_and_are_asked_for() -> None:
    text = (ROOT / "docker-compose.yml").read_text("utf-8")
    asked = re.findall(r"(?<!\$)\$\{(\w+)(:\?\w[^}]+)?\}", text)
    assert all(sentence for _, sentence in asked)
    example = (ROOT / "docker" / "env.example").read_text("utf-8")
    assert {name for name, _ in asked} == set(re.findall(r"^(\w+)=$", example, re.MULTILINE))


def test_the_redis_of_the_compose_file_starts_keeps_and_asks_for_the_password() -> None:
    shell, option, script = COMPOSE["services"]["redis"]["command"]
    with tempfile.TemporaryDirectory() as folder:
        socket = f"{folder}/s"
        script = script.replace("$$", "$").replace("redis-server", f"redis-server --port 0 --unixsocket {socket}")
        binaries = str(Path(redis_server.binary()).parent)
        environment = {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "REDISCLI_AUTH": "0123abcd"}
        process = subprocess.Popen([shell, option, script], cwd=folder, env=environment, stdout=subprocess.DEVNULL)
        try:
            with Redis(unix_socket_path=socket, password="0123abcd") as client:
                wait_for(client)
                kept = {
                    name: client.config_get(name)[name] for name in ("appendonly", "appendfsync", "maxmemory-policy")
                }
            assert kept == {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
            with Redis(unix_socket_path=socket) as stranger, pytest.raises(AuthenticationError):
                stranger.ping()
            assert "0123abcd" not in " ".join(psutil.Process(process.pid).cmdline())
        finally:
            process.kill()
            process.wait()


def wait_for(client: Redis) -> None:
    deadline_s = time.monotonic() + 30
    while True:
        try:
            client.ping()
            return
        except RedisConnectionError:
            assert time.monotonic() < deadline_s, "redis-server does not answer"
            time.sleep(0.01)


# -- the README --------------------------------------------------------------------------------------------------------


def test_the_readme_has_every_setting_as_it_is() -> None:
    def default(value: object) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        return f"{value:.12g}" if isinstance(value, int | float) else str(value)

    known = [
        [f"`{name}`", "–" if field.default in (None, ()) else f"`{default(field.default)}`", field.description]
        for name, field in Settings.model_fields.items()
        if name != "prefixes"
    ]
    told = rows(section("Settings"))
    assert [row for row in told if row[0] != "`prefixes`"] == known
    assert ["`prefixes`", "`prefixes/`", Settings.model_fields["prefixes"].description] in told


def test_the_readme_has_every_metric() -> None:
    metrics = Metrics()
    metrics.watch(lambda: 0, lambda: 0)
    body, _ = metrics.render()
    known = set(re.findall(r"^# TYPE (manifold_\w+)", body.decode(), re.MULTILINE))
    assert set(re.findall(r"`(manifold_\w+)", section("Metrics"))) == known


def test_the_readme_has_every_endpoint() -> None:
    told = {without_names(path) for path in re.findall(r"[` ](/[^`? ]+)", section("The API"))}
    paths = create_app(Settings(_env_file=None)).openapi()["paths"]
    assert {without_names(path) for path in paths} - told == set()


def without_names(path: str) -> str:
    return re.sub(r"\{\w+\}", "{}", path)
