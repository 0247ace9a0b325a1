"""What operators do, from a terminal, against a server process of its own: the whole story, and what is refused."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from app.cli import main
from app.client.http import Server
from app.domain import BackboneSpec
from app.engine.backbone import Backbone
from tests.artifacts import add_prefix, write_artifact
from tests.commands import CommandLine
from tests.serving import ServerProcess, wait_for

ADMIN_KEY = "an-administrators-own-key"
LIMIT_BYTES = 300_000
PRIZE = "You won a prize!"
TENSORS, MANIFEST = "adapter_model.safetensors", "manifest.json"


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone.load("embedded", "cpu", "float32")


@pytest.fixture(scope="module")
def spec(backbone: Backbone) -> BackboneSpec:
    return backbone.spec


@pytest.fixture(scope="module")
def shell(spec: BackboneSpec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """The terminal of an administrator, who may do everything, and approve what is their own."""
    prefixes = tmp_path_factory.mktemp("prefixes")
    write_artifact(prefixes / "spam", spec, "spam", ("ham", "spam"))
    options = ("--port", "0", "--prefixes", str(prefixes), "--artifact-limit-bytes", str(LIMIT_BYTES))
    keys = ("--admin-key", ADMIN_KEY, "--separate-approval", "false")
    with ServerProcess("app.cli", "serve", *options, *keys, "--dtype", "float32", "--drain-grace-s", "0") as server:
        yield CommandLine(server.wait_until_ready(), ADMIN_KEY)


@pytest.fixture
def client(shell: CommandLine) -> Iterator[httpx2.Client]:
    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    with httpx2.Client(base_url=shell.url, headers=headers, trust_env=False) as opened:
        yield opened


Make = Callable[..., Path]


@pytest.fixture
def make(spec: BackboneSpec, tmp_path: Path) -> Make:
    """Writes the folder of an artifact; another seed makes another version."""

    def make_folder(task: str, seed: int = 0, **manifest: Any) -> Path:
        return write_artifact(tmp_path / f"{task}-{seed}", spec, task, ("ham", "spam"), seed=seed, **manifest)

    return make_folder


@pytest.fixture
def begun(shell: CommandLine, make: Make) -> Callable[[str, int], None]:
    """Makes a task with so many approved versions, the first one the champion."""

    def begin(task: str, versions: int) -> None:
        for seed in range(versions):
            shell.say("publish", str(make(task, seed)), "--approve")
        shell.say("promote", f"{task}@1")

    return begin


def ask(shell: CommandLine, task: str, *options: str) -> dict[str, Any]:
    found: dict[str, Any] = shell.json("predict", PRIZE, "--task", task, *options)["results"][0][task]
    return found


# -- the story ---------------------------------------------------------------------------------------------------------


def test_publish_approve_canary_compare_promote_and_roll_back(
    shell: CommandLine, client: httpx2.Client, make: Make
) -> None:
    published = shell.json("publish", str(make("spam", 2)), "--reason", "trained on May's mail")
    digest = published["digest"]
    assert (published["version"], published["state"], published["published_by"]) == (2, "candidate", "admin")
    assert re.fullmatch("sha256:[0-9a-f]{64}", digest)
    assert "spam@2 is candidate: approve it first" in shell.refused("canary", "spam@2", "10")
    assert ask(shell, "spam")["version"] == 1
    candidate = ask(shell, "spam@2")

    approved = shell.json("approve", "spam@2", "--reason", "looks good")
    assert (approved["state"], approved["decided_by"], approved["reason"]) == ("approved", "admin", "looks good")

    told = shell.say("canary", "spam@2", "10", "--max-error-rate", "0.01")
    assert "spam: champion 1, challenger 2 at 10 %" in told and "max_error_rate 0.01, min_count 100" in told
    body = {"inputs": PRIZE, "tasks": ["spam"]}
    answers = {
        unit: client.post("/v1/predict", json=body | {"unit": unit}).json()["results"][0]["spam"]
        for unit in (f"customer {number}" for number in range(150))
    }
    challenged = [unit for unit, answer in answers.items() if answer["arm"] == "challenger"]
    assert 0 < len(challenged) < 45
    assert all(answers[unit] == {**candidate, "arm": "challenger"} for unit in challenged)
    assert {answer["version"] for unit, answer in answers.items() if unit not in challenged} == {1}
    assert ask(shell, "spam", "--unit", challenged[0]) == answers[challenged[0]]

    request = shell.json("predict", "hello", "--task", "spam@challenger")["request_id"]
    wait_for(lambda: shell.json("compare", "spam")["pairs"][0]["other"]["texts"] == len(challenged) + 2)
    wait_for(lambda: shell("feedback", request, "spam", "--label", "ham").status == 0)
    assert shell.json("feedback", request, "spam", "--label", "ham") == {"recorded": False}
    shown = shell.say("compare", "spam")
    assert "spam: champion 1 and challenger 2" in shown and "texts scored" in shown and "accuracy" in shown

    promoted = shell.json("promote", "spam@2", "--reason", "better")
    assert promoted["traffic"] == {"champion": 2, "challengers": [], "shadow": [], "gates": None}
    assert promoted["previous"] == [1]
    after = ask(shell, "spam")
    assert (after["version"], after["arm"], after["scores"]) == (2, "champion", candidate["scores"])

    rolled = shell.json("rollback", "spam", "--reason", "complaints")
    assert rolled["traffic"]["champion"] == 1 and rolled["generation"] == promoted["generation"] + 1
    assert ask(shell, "spam")["version"] == 1

    entries = shell.json("audit", "--task", "spam")["entries"]
    told_of = [(entry["actor"], entry["action"], entry["reason"]) for entry in entries]
    assert told_of[-5:] == [
        ("admin", "publish", "trained on May's mail"),
        ("admin", "approve", "looks good"),
        ("admin", "traffic", ""),
        ("admin", "traffic", "better"),
        ("admin", "rollback", "complaints"),
    ]
    assert entries[-1]["before"]["traffic"]["champion"] == 2 and entries[-1]["after"]["traffic"]["champion"] == 1
    verified = shell.say("audit", "--verify")
    head = re.search("head ([0-9]+:[0-9a-f]+)", verified)
    assert "the log is whole" in verified and head is not None
    assert shell.json("audit", "--verify", "--expect", head[1])["ok"]


def test_every_operation_of_the_api_has_a_command_and_every_command_prints_json_and_words(
    shell: CommandLine, make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: set[tuple[str, str]] = set()
    send = Server._send

    def remember(server: Server, method: str, path: str, **content: Any) -> httpx2.Response:
        asked.add((method, path.partition("?")[0]))
        return send(server, method, path, **content)

    monkeypatch.setattr(Server, "_send", remember)
    release = tmp_path / "release.json"
    release.write_text(json.dumps({"tasks": {"all": {"champion": 2}}}))
    for seed in range(4):
        shell.json("publish", str(make("all", seed)))
    shell.say("publish", str(make("all", 4)))
    for step in (
        "approve all@1", "approve all@2", "approve all@3", "reject all@4", "reject all@5", "promote all@1",
        "canary all@2 5", "canary all@2 0", "shadow all@3", "shadow all@3 --off", "promote all@2", "rollback all",
        f"releases create {release}", "releases list", "retire all@3", "tasks", "tasks all", "compare all",
        "predict hello --task all", "audit", "audit --verify", "index", "index show", "keys list", "drift",
    ):  # fmt: skip
        assert isinstance(shell.json(*step.split()), dict), step
    assert shell.json("pull", "all@1", "--out", str(tmp_path / "pulled"))["version"] == 1
    for step in ("tasks", "tasks all", "compare all", "releases list", "audit", "index", "keys list", "drift"):
        words = shell.say(*step.split())
        assert words.strip() and not words.lstrip().startswith("{"), step
    made = shell.json("releases", "list")["releases"][0]
    assert shell.json("releases", "rollback", made["id"])["rolled_back_by"] == "admin"
    counted = httpx2.get(f"{shell.url}/metrics", trust_env=False).text
    assert 'manifold_rollbacks_total{cause="operator",task="all"} 2.0' in counted, "the task alone, then with a release"
    key = shell.json("keys", "create", "a shop", "--role", "predict", "--role", "audit")
    assert "is revoked" in shell.say("keys", "revoke", key["id"])
    for action in ("restore", "accept"):
        assert "the index lost nothing" in shell.refused("index", action)
    assert "keeps no prediction log" in shell.refused("why", "r")
    assert "no answer of task all" in shell.refused("feedback", "r", "all", "--label", "ham")

    document = httpx2.get(f"{shell.url}/openapi.json", trust_env=False).json()
    free = {"/livez", "/readyz", "/healthz", "/metrics", "/info", "/v1/embeddings"}
    operations = [(m.upper(), path) for path, methods in document["paths"].items() for m in methods if path not in free]
    assert len(operations) > 20
    without = [(m, path) for m, path in operations if not any(m == n and fits(path, p) for n, p in asked)]
    assert without == []


def fits(template: str, path: str) -> bool:
    return re.fullmatch(re.sub(r"\{[^}]+\}", "[^/]+", template), path) is not None


# -- nobody overwrites what they have not seen -------------------------------------------------------------------------


def test_a_stale_generation_is_a_conflict_that_names_the_present_one(
    client: httpx2.Client, shell: CommandLine, begun: Callable[[str, int], None]
) -> None:
    begun("stale", 3)
    read = client.get("/v1/tasks/stale")
    generation = read.json()["generation"]
    assert read.headers["etag"] == f'"{generation}"'
    present = shell.json("promote", "stale@2")["generation"]
    headers = {"if-match": read.headers["etag"]}
    late = client.put("/v1/tasks/stale/traffic", json={"champion": 3}, headers=headers)
    assert late.status_code == 409
    assert late.json()["error_type"] == "conflict" and str(present) in late.json()["error"]
    assert late.headers["etag"] == f'"{present}"'
    assert str(present) in shell.refused("rollback", "stale", "--if-match", str(generation))
    assert client.get("/v1/tasks/stale").json()["traffic"]["champion"] == 2
    again = client.put("/v1/tasks/stale/traffic", json={"champion": 3}, headers={"if-match": late.headers["etag"]})
    assert again.status_code == 200 and again.headers["etag"] == f'"{present + 1}"'


def test_two_operators_at_once_lose_no_update(shell: CommandLine, begun: Callable[[str, int], None]) -> None:
    begun("busy", 7)

    def add_shadows(versions: range) -> int:
        """As a person does: where somebody else was faster, the same command again."""
        refused = 0
        for version in versions:
            while main(["shadow", f"busy@{version}", "--url", shell.url, "--key", ADMIN_KEY]):
                refused += 1
        return refused

    with ThreadPoolExecutor(2) as both:
        list(both.map(add_shadows, (range(2, 8, 2), range(3, 8, 2))))
    assert sorted(shell.json("tasks", "busy")["traffic"]["shadow"]) == list(range(2, 8))


# -- a folder straight from PEFT ---------------------------------------------------------------------------------------


@pytest.fixture
def tuned(backbone: Backbone, tmp_path: Path) -> PeftModel:
    """A network with a prefix, saved by PEFT into the folder peft."""
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    torch.manual_seed(1)
    network = AutoModelForSequenceClassification.from_pretrained(
        backbone.path, num_labels=3, attn_implementation="eager"
    )
    config = PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5)
    model = get_peft_model(network, config).eval()
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_(std=0.5)
    model.save_pretrained(str(tmp_path / "peft"))
    return model


def test_a_folder_straight_from_peft_is_published_and_gives_pefts_own_numbers(
    shell: CommandLine, backbone: Backbone, tuned: PeftModel, tmp_path: Path
) -> None:
    folder = str(tmp_path / "peft")
    assert not (tmp_path / "peft" / MANIFEST).exists()
    assert shell("publish", folder).status == 2  # nothing says which task it is of
    assert "problem type" in shell.refused("publish", folder, "--task", "mood")
    options = ("--problem-type", "single_label_classification", "--labels", "sad, calm,happy")
    record = shell.json("publish", folder, "--task", "mood", *options, "--approve")
    assert (record["task"], record["version"], record["state"]) == ("mood", 1, "approved")
    shell.say("promote", "mood@1")
    tokenizer = AutoTokenizer.from_pretrained(backbone.path)
    for text in ("I passed the exam!", "It is Tuesday, and it rains as it did all week."):
        (result,) = shell.json("predict", text, "--task", "mood")["results"]
        with torch.no_grad():
            logits = tuned(**tokenizer(text, return_tensors="pt")).logits[0]
        scores = dict(zip(("sad", "calm", "happy"), logits.softmax(-1).tolist(), strict=True))
        assert result["mood"]["scores"] == pytest.approx(scores, abs=2e-5)
        assert result["mood"]["label"] == max(scores, key=lambda label: scores[label])
    assert shell.json("publish", folder, "--task", "mood", *options)["version"] == 1  # the same content again


# -- artifacts that come back ------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_what_was_handed_in_comes_back_byte_for_byte(
    shell: CommandLine, spec: BackboneSpec, make: Make, tmp_path: Path
) -> None:
    first, second = make("back", 0), add_prefix(make("back", 1), spec, 4)
    out = str(tmp_path / "champion")
    for folder in (first, second):
        shell.say("publish", str(folder), "--approve")
    assert "no version of back is live: name one, as in back@1" in shell.refused("pull", "back", "--out", out)
    shell.say("promote", "back@1")
    told = shell.say("pull", "back", "--out", out)
    assert told.startswith(f"back@1 is in {out} (") and "next: manifold publish" in told
    shell.say("pull", "back@2", "--out", str(tmp_path / "second"))
    assert contents(tmp_path / "champion") == contents(first)
    assert contents(tmp_path / "second") == contents(second)
    assert shell.json("publish", str(tmp_path / "second"))["version"] == 2
    assert "task back has no version 3" in shell.refused("pull", "back@3", "--out", str(tmp_path / "third"))


def test_a_folder_straight_from_peft_comes_back_with_a_manifest(
    shell: CommandLine, tuned: PeftModel, tmp_path: Path
) -> None:
    given = ("--problem-type", "single_label_classification", "--labels", "sad,calm,happy")
    record = shell.json("publish", str(tmp_path / "peft"), "--task", "moods", *given)
    shell.say("pull", "moods@1", "--out", str(tmp_path / "pulled"))
    pulled = contents(tmp_path / "pulled")
    assert json.loads(pulled.pop(MANIFEST))["labels"] == ["sad", "calm", "happy"]
    assert pulled == {name: (tmp_path / "peft" / name).read_bytes() for name in ("adapter_config.json", TENSORS)}
    again = shell.json("publish", str(tmp_path / "pulled"))  # which now says all by itself
    assert (again["task"], again["version"], again["digest"]) == ("moods", 1, record["digest"])


# -- artifacts with faults ---------------------------------------------------------------------------------------------


def truncate(folder: Path) -> None:
    path = folder / TENSORS
    path.write_bytes(path.read_bytes()[:-100])


def flip(position: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / TENSORS).read_bytes())
        content[position] ^= 0x40
        (folder / TENSORS).write_bytes(content)

    return damage


def of_another_backbone(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["backbone"]["fingerprint"] = "sha256:" + "0" * 64
    (folder / MANIFEST).write_text(json.dumps(manifest))


def not_a_number(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    tensors["base_model.classifier.weight"][0, 7] = float("nan")
    save_file(tensors, folder / TENSORS)


def pickled(folder: Path) -> None:
    (folder / TENSORS).write_bytes(pickle.dumps({"weight": [1.0]}))


def oversized(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    save_file({**tensors, "more": tensors["base_model.classifier.weight"].repeat(200, axis=0)}, folder / TENSORS)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (truncate, "adapter_model.safetensors is not a safetensors file, or is damaged"),
        (flip(3), "adapter_model.safetensors is not a safetensors file, or is damaged"),
        (flip(-3), "prompt_embeddings has not the digest that the manifest states: it was changed or damaged"),
        (of_another_backbone, "fingerprint"),
        (not_a_number, "tensor base_model.classifier.weight has values that are not finite"),
        (pickled, "adapter_model.safetensors is not a safetensors file, or is damaged"),
        (oversized, f"the body is larger than {LIMIT_BYTES} bytes"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_an_artifact_with_a_fault_is_refused_with_a_sentence(
    shell: CommandLine, spec: BackboneSpec, make: Make, damage: Callable[[Path], None], told: str
) -> None:
    folder = add_prefix(make("faulty"), spec, 2, first_layer=3)
    damage(folder)
    assert told in shell.refused("publish", str(folder))
    assert shell.refused("tasks", "faulty").startswith("there is no task")
    assert ask(shell, "spam")["version"] == 1


def test_bits_that_flipped_in_the_head_show_in_its_golden_examples(shell: CommandLine, make: Make) -> None:
    shell.say("publish", str(make("golden")), "--approve")
    scores = list(shell.json("predict", "hello", "--task", "golden@1")["results"][0]["golden@1"]["scores"].values())
    folder = make("golden", 1, golden=[{"text": "hello", "scores": scores}])
    (folder / TENSORS).write_bytes((folder.with_name("golden-0") / TENSORS).read_bytes())
    assert shell.json("publish", str(folder))["version"] == 2
    flip(-1)(folder)
    assert "golden scores differ by" in shell.refused("publish", str(folder))


def test_every_fault_of_an_artifact_is_told_at_once(shell: CommandLine, make: Make) -> None:
    folder = make("many", problem_type="guess", thresholds=[0.5])
    of_another_backbone(folder)
    told = shell.refused("publish", str(folder))
    assert "problem_type" in told and "1 thresholds for 2 labels" in told and "fingerprint" in told


@pytest.mark.parametrize("name", ["adapter_model.bin", "training_args.pt", "state.pkl"])
def test_a_pickle_beside_the_tensors_is_refused_unread(client: httpx2.Client, make: Make, name: str) -> None:
    folder = make("pickles")
    contents = {file: (folder / file).read_bytes() for file in (TENSORS, MANIFEST)} | {name: pickle.dumps({})}
    files = [("files", (file, content)) for file, content in contents.items()]
    answer = client.post("/v1/tasks/pickles/versions", files=files)
    assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
    assert f"{name} is a pickle, which can run code when it is read" in answer.json()["error"]


def test_too_large_is_413_and_a_body_without_a_length_is_cut_off_too(client: httpx2.Client) -> None:
    files = [("files", (TENSORS, b"\0" * (LIMIT_BYTES + 1)))]
    answer = client.post("/v1/tasks/large/versions", files=files)
    assert (answer.status_code, answer.json()["error_type"]) == (413, "validation")
    pieces = (b"\0" * 50_000 for _ in range(20))
    answer = client.post(
        "/v1/tasks/large/versions", content=pieces, headers={"content-type": "multipart/form-data; boundary=x"}
    )
    assert answer.status_code == 413
