"""The Kubernetes manifests: they fit each other, the server's settings and its routes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.config import Settings, env_name
from app.main import create_app
from tests.docker.files import DOCKER, ROOT, read_yaml
from tests.docker.known import kinds

K8S = DOCKER / "k8s"
NO_OBJECTS = {"kustomization.yml", "prometheus-adapter.yml"}  # read by tools, not by Kubernetes
KUSTOMIZATION: dict[str, Any] = read_yaml(K8S / "kustomization.yml")
OBJECTS: dict[str, dict[str, Any]] = {
    read_yaml(path)["kind"]: read_yaml(path) for path in sorted(K8S.glob("*.yml")) if path.name not in NO_OBJECTS
}
POD: dict[str, Any] = OBJECTS["Deployment"]["spec"]["template"]
(CONTAINER,) = POD["spec"]["containers"]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
KUBERNETES = "1.31"

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


def settings() -> dict[str, str]:
    (generated,) = KUSTOMIZATION["configMapGenerator"]
    return dict(line.split("=", 1) for line in generated["literals"])


def rendered(folder: Path) -> list[dict[str, Any]]:
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def test_everything_that_is_an_object_is_applied_but_the_example_of_a_secret() -> None:
    there = {path.name for path in K8S.glob("*.yml")} - NO_OBJECTS
    assert there - set(KUSTOMIZATION["resources"]) == {"secret.example.yml"}
    assert set(KUSTOMIZATION["resources"]) <= there
    assert len(OBJECTS) == len(there)
    assert all(one["apiVersion"] and one["metadata"]["name"].startswith("manifold") for one in OBJECTS.values())
    assert not [one for one in OBJECTS.values() if "namespace" in one["metadata"]]


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("Deployment", ("selector", "matchLabels")),
        ("Service", ("selector",)),
        ("PodDisruptionBudget", ("selector", "matchLabels")),
        ("NetworkPolicy", ("podSelector", "matchLabels")),
    ],
)
def test_selectors_find_the_pods(kind: str, path: tuple[str, ...]) -> None:
    selected = OBJECTS[kind]["spec"]
    for part in path:
        selected = selected[part]
    assert selected and selected.items() <= POD["metadata"]["labels"].items()


def test_pods_spread_over_machines() -> None:
    (spread,) = POD["spec"]["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == POD["metadata"]["labels"]


def test_the_monitor_finds_the_service_and_calls_the_job_as_rules_expect() -> None:
    monitor, service = OBJECTS["ServiceMonitor"]["spec"], OBJECTS["Service"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert service["metadata"]["labels"][monitor["jobLabel"]] == "manifold"
    (endpoint,) = monitor["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}


def test_ports_have_one_name() -> None:
    (port,) = CONTAINER["ports"]
    assert port["containerPort"] == Settings.model_fields["port"].default
    assert {p["targetPort"] for p in OBJECTS["Service"]["spec"]["ports"]} == {port["name"]}
    policy = OBJECTS["NetworkPolicy"]["spec"]["ingress"]
    assert {p["port"] for rule in policy for p in rule["ports"]} == {port["name"]}


def test_probes_ask_routes_that_exist() -> None:
    routes = create_app(Settings(_env_file=None)).openapi()["paths"]
    probes = {kind: CONTAINER[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")}
    assert {kind: probe["path"] for kind, probe in probes.items()} == {
        "startup": "/readyz",
        "readiness": "/readyz",
        "liveness": "/livez",  # /readyz would have a draining server killed
    }
    assert all(probe["path"] in routes and probe["port"] == "http" for probe in probes.values())
    assert OBJECTS["ServiceMonitor"]["spec"]["endpoints"][0]["path"] in routes


def test_a_pod_that_goes_has_time_to_drain() -> None:
    program, seconds = CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "sleep"
    grace_s, timeout_s = (float(settings()[env_name(name)]) for name in ("drain_grace_s", "drain_timeout_s"))
    assert grace_s <= timeout_s
    assert POD["spec"]["terminationGracePeriodSeconds"] > float(seconds) + timeout_s + 5


def test_what_is_set_can_be_set() -> None:
    known = {env_name(field) for field in Settings.model_fields}
    assert set(settings()) <= known
    assert set(OBJECTS["Secret"]["stringData"]) == {env_name("redis_url"), env_name("admin_key")}
    assert POD["spec"]["enableServiceLinks"] is False  # they would set MANIFOLD_PORT
    names = {source["name"] for entry in CONTAINER["envFrom"] for source in entry.values()}
    assert names == {"manifold"} == {OBJECTS["Secret"]["metadata"]["name"]}
    assert KUSTOMIZATION["configMapGenerator"][0]["name"] == "manifold"


def test_the_example_of_a_secret_holds_none() -> None:
    values = OBJECTS["Secret"]["stringData"]
    assert "PASSWORD" in values[env_name("redis_url")] and values[env_name("admin_key")].startswith("KEY")


def test_pods_may_do_nothing_that_they_need_not() -> None:
    pod, container = POD["spec"]["securityContext"], CONTAINER["securityContext"]
    (user,) = re.findall(r"^USER (\d+)$", DOCKERFILE, re.MULTILINE)
    assert pod["runAsNonRoot"] is True and pod["runAsUser"] == pod["fsGroup"] == int(user)
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert POD["spec"]["automountServiceAccountToken"] is False


def test_pods_write_only_to_volumes() -> None:
    home = re.search(rf"{env_name('home')}=(\S+)", DOCKERFILE)
    mounts = {mount["mountPath"]: mount["name"] for mount in CONTAINER["volumeMounts"]}
    store = settings()[env_name("artifacts_url")].removeprefix("file://")
    assert home is not None and set(mounts) == {home[1], "/tmp", store}
    assert set(mounts.values()) == {volume["name"] for volume in POD["spec"]["volumes"]}
    claimed = [v["persistentVolumeClaim"]["claimName"] for v in POD["spec"]["volumes"] if "persistentVolumeClaim" in v]
    assert claimed == [OBJECTS["PersistentVolumeClaim"]["metadata"]["name"]]
    assert OBJECTS["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]


def test_a_process_a_pod_with_as_many_threads_as_processors() -> None:
    assert "command" not in CONTAINER and "args" not in CONTAINER  # the image's: one process
    assert CONTAINER["resources"]["requests"]["cpu"] == settings()[env_name("threads")]
    assert {"memory", "ephemeral-storage"} <= set(CONTAINER["resources"]["limits"])
    assert "replicas" not in OBJECTS["Deployment"]["spec"]  # they are the autoscaler's


def test_more_pods_come_when_rows_wait() -> None:
    spec = OBJECTS["HorizontalPodAutoscaler"]["spec"]
    deployment = OBJECTS["Deployment"]
    assert spec["scaleTargetRef"] == {
        "apiVersion": deployment["apiVersion"],
        "kind": "Deployment",
        "name": deployment["metadata"]["name"],
    }
    assert 2 <= spec["minReplicas"] <= spec["maxReplicas"]
    ((metric, target),) = [(m["pods"]["metric"]["name"], m["pods"]["target"]) for m in spec["metrics"]]
    assert kinds()[metric] == "gauge" and target["type"] == "AverageValue"
    (rule,) = read_yaml(K8S / "prometheus-adapter.yml")["rules"]["custom"]
    assert rule["seriesQuery"].startswith(metric + "{") and rule["name"]["matches"] == f"^{metric}$"


def test_the_network_lets_in_clients_and_prometheus_and_out_to_redis_and_names() -> None:
    policy = OBJECTS["NetworkPolicy"]["spec"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert all(rule["from"] for rule in policy["ingress"]) and all(rule["to"] for rule in policy["egress"])
    assert {port["port"] for rule in policy["egress"] for port in rule["ports"]} == {53, 6379, 6380}


# -- by the tools themselves, where they are ---------------------------------------------------------------------------


@needs_kubectl
def test_kustomize_makes_every_object() -> None:
    made = rendered(K8S)
    assert {one["kind"] for one in made} == set(OBJECTS) - {"Secret"} | {"ConfigMap"}
    (policy,) = [one for one in made if one["kind"] == "NetworkPolicy"]
    assert policy["spec"] == OBJECTS["NetworkPolicy"]["spec"]  # labels do not creep into its selectors


@needs_kubectl
def test_with_a_gpu_each_pod_has_one(tmp_path: Path) -> None:
    folder = tmp_path / "k8s"
    shutil.copytree(K8S, folder)
    asked = KUSTOMIZATION | {"components": ["cuda"], "images": [{"name": "manifold", "newTag": "cuda"}]}
    (folder / "kustomization.yml").write_text(json.dumps(asked), "utf-8")
    (deployment,) = [one for one in rendered(folder) if one["kind"] == "Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "manifold:cuda" and container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["env"] == [{"name": env_name("threads"), "value": container["resources"]["requests"]["cpu"]}]


@pytest.mark.filterwarnings("ignore")  # the validator's own
@pytest.mark.parametrize("kind", sorted(set(OBJECTS) - {"ServiceMonitor"}))
def test_every_object_fits_the_schema_of_kubernetes(kind: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    validator.validate(OBJECTS[kind], KUBERNETES, strict=True)
