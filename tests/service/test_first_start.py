"""Start-up with the real engine and backbone: what becomes visible, and what one broken artifact does to the others."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.config import SHIPPED_PREFIXES, load_settings
from app.domain import TextInput
from app.engine.backbone import Backbone
from app.engine.engine import Engine
from app.engine.folder import list_artifacts
from app.engine.tokenizer import TextTokenizer
from app.errors import SettingsError
from app.main import open_runtime
from app.rollout import Role
from app.service.answers import FailedAnswer
from app.service.runtime import Runtime
from tests.artifacts import write_artifact


@contextlib.contextmanager
def opened(prefixes: Path, **settings: object) -> Iterator[Runtime]:
    runtime = open_runtime(load_settings({"prefixes": prefixes, "dtype": "float32", **settings}))
    try:
        yield runtime
    finally:
        runtime.close()


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone.load("embedded", "cpu", "float32")


@pytest.fixture(scope="module")
def words(backbone: Backbone) -> TextTokenizer:
    return TextTokenizer(backbone.path)


@pytest.fixture
def real_engine(backbone: Backbone) -> Iterator[Engine]:
    engine = Engine(backbone)
    engine.start()
    yield engine
    engine.close()


def golden_of(engine: Engine, words: TextTokenizer, folder: Path, text: str) -> list[float]:
    """What the artifact in `folder` really says of `text`."""
    from app.engine.artifact import read_artifact
    from app.engine.golden import predict

    artifact = read_artifact(folder, engine.spec)
    engine.load(artifact)
    (output,) = predict(engine, words, artifact, [TextInput(text)])
    return list(output.scores)


def test_artifacts_become_tasks_with_their_versions(tmp_path: Path, backbone: Backbone) -> None:
    write_artifact(tmp_path / "spam", backbone.spec, "spam", ("ham", "spam"), evaluation={"test": {"accuracy": 0.9}})
    for number in (1, 2):
        write_artifact(tmp_path / "intent" / str(number), backbone.spec, "intent", ("a", "b", "c"), seed=number)
    with opened(tmp_path) as runtime:
        snapshot, catalog = runtime.catalog.snapshot, runtime.catalog
        assert snapshot.generation == 1
        assert {name: (task.traffic.champion, sorted(task.versions)) for name, task in snapshot.tasks.items()} == {
            "intent": (2, [2]),
            "spam": (1, [1]),
        }
        assert sorted(snapshot.view.tasks["intent"].versions) == [1, 2]
        record = snapshot.view.tasks["spam"].versions[1]
        assert json.loads(record.card)["evaluation"] == {"test": {"accuracy": 0.9}}
        assert catalog.describe(record) == snapshot.tasks["spam"].champion
        assert catalog.passes_alone(snapshot.tasks["spam"].champion) == 1.0
        assert list(snapshot.representations) == ["all-MiniLM-L6-v2"]


def test_a_broken_artifact_is_left_out_with_all_its_faults_and_the_others_serve(
    tmp_path: Path, backbone: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    write_artifact(tmp_path / "good", backbone.spec, "good")
    write_artifact(tmp_path / "wrong", backbone.spec, "wrong", labels=("a", "a"), problem_type="guess")
    (tmp_path / "empty").mkdir()
    write_artifact(tmp_path / "good again", backbone.spec, "good", seed=5)
    write_artifact(tmp_path / "cut", backbone.spec, "cut")
    (tmp_path / "cut" / "manifest.json").write_text("{")
    with opened(tmp_path) as runtime:
        left_out = runtime.catalog.left_out
        assert list(runtime.catalog.snapshot.tasks) == ["good"]
    assert set(left_out) == {"wrong", "empty", "good again", "cut"}
    assert "guess" in left_out["wrong"] and "a name twice" in left_out["wrong"]
    assert sum("is left out" in record.message for record in caplog.records) == 4


def test_golden_examples_decide(tmp_path: Path, real_engine: Engine, words: TextTokenizer) -> None:
    probe = write_artifact(tmp_path / "probe" / "right", real_engine.spec, "right")
    scores = golden_of(real_engine, words, probe, "hello there")
    shelf = tmp_path / "shelf"
    write_artifact(shelf / "right", real_engine.spec, "right", golden=[{"text": "hello there", "scores": scores}])
    wrong = [{"text": "hello there", "scores": [scores[0] - 0.001, scores[1] + 0.001]}]
    write_artifact(shelf / "wrong", real_engine.spec, "wrong", golden=wrong)
    with opened(shelf) as runtime:
        assert list(runtime.catalog.snapshot.tasks) == ["right"]
        assert "golden scores differ by 0.001" in runtime.catalog.left_out["wrong"]


def test_an_artifact_of_another_backbone_is_left_out(tmp_path: Path, backbone: Backbone) -> None:
    folder = write_artifact(tmp_path / "spam", backbone.spec, "spam")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"backbone": {"fingerprint": "sha256:other"}}))
    with opened(tmp_path) as runtime:
        assert runtime.catalog.snapshot.tasks == {}
        assert "sha256:other" in runtime.catalog.left_out["spam"]


def test_a_folder_that_is_not_there_keeps_the_server_from_starting(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there is no folder"), opened(tmp_path / "nowhere"):
        pass


def test_a_host_that_others_reach_needs_a_key(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no keys protect the server"), opened(tmp_path, host="0.0.0.0"):
        pass
    with opened(tmp_path, host="0.0.0.0", admin_key="a key of some length") as runtime:
        assert runtime.access.is_guarded


def test_what_was_changed_is_there_after_a_restart(tmp_path: Path, backbone: Backbone) -> None:
    write_artifact(tmp_path / "spam", backbone.spec, "spam")
    with opened(tmp_path) as runtime:
        runtime.rollout.create_key(runtime.access.authenticate(None, "here"), "anna", frozenset({Role.ADMIN}))
    with opened(tmp_path) as runtime:
        assert runtime.access.is_guarded
        assert runtime.catalog.snapshot.generation == 2


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.anyio
async def test_the_whole_runtime_answers_in_each_type(tmp_path: Path, backbone: Backbone, dtype: str) -> None:
    write_artifact(tmp_path / "spam", backbone.spec, "spam", ("ham", "spam"))
    write_artifact(tmp_path / "slots", backbone.spec, "slots", ("O", "B-city", "I-city"), "token_classification")
    with opened(tmp_path, dtype=dtype) as runtime:
        runtime.check_ready()
        if dtype == "auto":
            assert runtime.engine.spec.dtype == "float32", "without golden examples nothing shows that less is enough"
        prediction = await runtime.inference.predict([TextInput("Book a table in Paris")], None, False)
        (result,) = prediction.results
        assert set(result) == {"spam", "slots"}
        assert (prediction.usage.rows, prediction.usage.passes) == (1, 1.0)
        again = await runtime.inference.predict([TextInput("Book a table in Paris")], None, False)
        assert again.results == prediction.results and (again.usage.rows, again.usage.cached) == (0, 2)
        model = runtime.engine.spec.name
        vectors = [(await runtime.inference.embed([TextInput("a")], model, False)).vectors for _ in range(2)]
        assert vectors[0] == vectors[1]
    with pytest.raises(Exception, match="dead"):
        runtime.check_ready()


@pytest.mark.parametrize(("shift", "dtype"), [(0.0, "bfloat16"), (0.5, "float32")])
def test_auto_takes_sixteen_bits_only_where_golden_examples_allow_it(
    tmp_path: Path,
    real_engine: Engine,
    words: TextTokenizer,
    shift: float,
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("app.engine.backbone.cpu_has_bf16", lambda: True)
    probe = write_artifact(tmp_path / "probe" / "spam", real_engine.spec, "spam")
    scores = [score + shift for score in golden_of(real_engine, words, probe, "hello there")]
    shelf = tmp_path / "shelf"
    write_artifact(shelf / "spam", real_engine.spec, "spam", golden=[{"text": "hello there", "scores": scores}])
    with opened(shelf, device="cpu", dtype="auto") as runtime:
        assert runtime.engine.spec.dtype == dtype
        assert ("spam" in runtime.catalog.left_out) == (shift > 0)


@pytest.mark.anyio
async def test_every_shipped_artifact_serves() -> None:
    folders = list_artifacts(SHIPPED_PREFIXES)
    with opened(SHIPPED_PREFIXES) as runtime:
        assert runtime.catalog.left_out == {}
        tasks = runtime.catalog.snapshot.tasks
        assert sum(len(task.versions) for task in tasks.values()) == len(folders)
        inputs = {"text": TextInput("Book a table in Paris"), "pair": TextInput("He sleeps.", "He is up.")}
        for kind, text in inputs.items():
            asked = [name for name, task in tasks.items() if task.champion.input_kind == kind]
            if asked:
                prediction = await runtime.inference.predict([text], asked, False)
                failed = [name for name, answer in prediction.results[0].items() if isinstance(answer, FailedAnswer)]
                assert failed == []
