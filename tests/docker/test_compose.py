"""The compose stack: every service is checked, bounded and closed to other machines, and finds what it is given."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from typing import Any

import pytest

from app.config import Settings, env_name
from tests.docker.files import DOCKER, ROOT, SERVICES, read_yaml

every_service = pytest.mark.parametrize("name", SERVICES)
CUDA: dict[str, Any] = read_yaml(DOCKER / "compose.cuda.yml")["services"]["manifold"]


def limits(service: dict[str, Any]) -> dict[str, Any]:
    return service["deploy"]["resources"]["limits"]


def has_compose() -> bool:
    docker = shutil.which("docker")
    if docker is None:
        return False
    return subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode == 0


def test_the_stack_is_whole() -> None:
    assert set(SERVICES) == {"manifold", "redis", "prometheus", "grafana"}


@every_service
def test_every_service_is_checked_restarted_and_bounded(name: str) -> None:
    service = SERVICES[name]
    check = service["healthcheck"]
    assert check["test"][0] in {"CMD", "CMD-SHELL"} and {"interval", "timeout", "start_period", "retries"} <= set(check)
    assert service["restart"] == "unless-stopped"
    assert set(limits(service)) == {"cpus", "memory", "pids"}
    assert float(limits(service)["cpus"]) <= 2  # more than the machine has is refused


@every_service
def test_every_service_has_no_rights_to_lose(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "network_mode", "pid"} & set(service)


@every_service
def test_other_machines_reach_no_service(name: str) -> None:
    ports = SERVICES[name].get("ports", [])
    assert all(re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port) for port in ports)


@every_service
def test_images_are_pinned(name: str) -> None:
    service = SERVICES[name]
    tag = service["image"].partition(":")[2]
    assert "build" in service or re.match(r"v?\d+\.\d+", tag)


@every_service
def test_what_is_mounted_is_there_and_only_read(name: str) -> None:
    for volume in SERVICES[name].get("volumes", []):
        source, _, rest = volume.partition(":")
        if source.startswith("."):
            assert (ROOT / source).is_dir() and rest.endswith(":ro")


def test_prometheus_reads_the_configuration_that_is_mounted() -> None:
    options = dict(option.lstrip("-").split("=", 1) for option in SERVICES["prometheus"]["command"])
    mounts = {target: source for source, target, *_ in (v.split(":") for v in SERVICES["prometheus"]["volumes"])}
    folder, _, file = options["config.file"].rpartition("/")
    assert (ROOT / mounts[folder] / file).is_file()
    assert mounts[options["storage.tsdb.path"]] == "prometheus"
    assert not [option for option in options if option.startswith("web.enable")]  # who reaches it may only read


def test_nobody_gets_into_grafana_without_the_password() -> None:
    environment = SERVICES["grafana"]["environment"]
    assert environment["GF_SECURITY_ADMIN_PASSWORD"].startswith("${GRAFANA_ADMIN_PASSWORD:?")
    assert environment["GF_AUTH_ANONYMOUS_ENABLED"] == environment["GF_USERS_ALLOW_SIGN_UP"] == "false"


@pytest.mark.parametrize("name", ["prometheus", "grafana"])
def test_health_checks_ask_the_port_that_is_published(name: str) -> None:
    service = SERVICES[name]
    command, url = service["healthcheck"]["test"][1], service["healthcheck"]["test"][-1]
    assert command == "wget"  # which both images bring along
    assert f":{service['ports'][0].rpartition(':')[2]}/" in url


def test_the_server_has_time_to_drain() -> None:
    grace = SERVICES["manifold"]["stop_grace_period"]
    assert float(grace.removesuffix("s")) > Settings.model_fields["drain_timeout_s"].default + 2


@pytest.mark.parametrize("service", [SERVICES["manifold"], CUDA], ids=["cpu", "cuda"])
def test_the_server_runs_as_many_threads_as_it_has_processors(service: dict[str, Any]) -> None:
    assert service["environment"][env_name("threads")] == limits(service)["cpus"]


def test_the_gpu_variant_changes_only_what_differs() -> None:
    assert set(CUDA) == {"build", "image", "environment", "deploy"}
    (device,) = CUDA["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"] and device["count"] == 1  # one process a device
    example = (DOCKER / "env.example").read_text("utf-8")
    assert "# COMPOSE_FILE=docker-compose.yml:docker/compose.cuda.yml\n" in example


# -- by the tools themselves, where they are ---------------------------------------------------------------------------


def test_the_files_fit_the_compose_specification() -> None:
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed")
    files = [str(ROOT / "docker-compose.yml"), str(DOCKER / "compose.cuda.yml")]
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not has_compose(), reason="docker has no compose plugin here")
@pytest.mark.parametrize("files", [["docker-compose.yml"], ["docker-compose.yml", "docker/compose.cuda.yml"]])
def test_docker_compose_accepts_the_files(files: list[str]) -> None:
    secrets = re.findall(r"^(\w+)=$", (DOCKER / "env.example").read_text("utf-8"), re.MULTILINE)
    environment = {**os.environ, **dict.fromkeys(secrets, "0123456789abcdef")}
    command = ["docker", "compose", *(part for file in files for part in ("-f", file)), "config", "--quiet"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
