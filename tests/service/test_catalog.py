"""Start-up with the real engine and backbone: what becomes visible, and what one broken artifact does to the others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.config import SHIPPED_PREFIXES, Settings, load_settings
from app.domain import TextInput
from app.engine.backbone import Backbone
from app.engine.engine import Engine
from app.engine.folder import list_artifacts
from app.engine.tokenizer import TextTokenizer
from app.errors import SettingsError
from app.main import open_runtime
from app.service.answers import FailedAnswer
from app.service.catalog import build_catalog
from app.service.runtime import Runtime
from tests.artifacts import write_artifact


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


def test_artifacts_become_tasks_with_their_versions(tmp_path: Path, real_engine: Engine, words: TextTokenizer) -> None:
    write_artifact(tmp_path / "spam", real_engine.spec, "spam", ("ham", "spam"), evaluation={"test": {"accuracy": 0.9}})
    for number in (1, 2):
        write_artifact(tmp_path / "intent" / str(number), real_engine.spec, "intent", ("a", "b", "c"), seed=number)
    catalog = build_catalog(tmp_path, real_engine, words)
    tasks = catalog.snapshot.tasks
    assert catalog.snapshot.generation == 1
    assert {name: (task.champion, sorted(task.versions)) for name, task in tasks.items()} == {
        "intent": (2, [1, 2]),
        "spam": (1, [1]),
    }
    assert catalog.evaluations[tasks["spam"].versions[1].digest] == {"test": {"accuracy": 0.9}}
    assert catalog.passes_alone(tasks["spam"].versions[1]) == 1.0
    assert list(catalog.snapshot.representations) == ["all-MiniLM-L6-v2"]


def test_a_broken_artifact_is_left_out_with_all_its_faults_and_the_others_serve(
    tmp_path: Path, real_engine: Engine, words: TextTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    write_artifact(tmp_path / "good", real_engine.spec, "good")
    write_artifact(tmp_path / "wrong", real_engine.spec, "wrong", labels=("a", "a"), problem_type="guess")
    (tmp_path / "empty").mkdir()
    write_artifact(tmp_path / "good again", real_engine.spec, "good", seed=5)
    write_artifact(tmp_path / "cut", real_engine.spec, "cut")
    (tmp_path / "cut" / "manifest.json").write_text("{")
    catalog = build_catalog(tmp_path, real_engine, words)
    assert list(catalog.snapshot.tasks) == ["good"]
    assert set(catalog.left_out) == {"wrong", "empty", "good again", "cut"}
    assert "guess" in catalog.left_out["wrong"] and "a name twice" in catalog.left_out["wrong"]
    assert sum("is left out" in record.message for record in caplog.records) == 4


def test_golden_examples_decide(tmp_path: Path, real_engine: Engine, words: TextTokenizer) -> None:
    probe = write_artifact(tmp_path / "probe" / "right", real_engine.spec, "right")
    scores = golden_of(real_engine, words, probe, "hello there")
    shelf = tmp_path / "shelf"
    write_artifact(shelf / "right", real_engine.spec, "right", golden=[{"text": "hello there", "scores": scores}])
    wrong = [{"text": "hello there", "scores": [scores[0] - 0.001, scores[1] + 0.001]}]
    write_artifact(shelf / "wrong", real_engine.spec, "wrong", golden=wrong)
    catalog = build_catalog(shelf, real_engine, words)
    assert list(catalog.snapshot.tasks) == ["right"]
    assert "golden scores differ by 0.001" in catalog.left_out["wrong"]
    assert catalog.worst_difference == pytest.approx(0.001, abs=1e-5)


def test_an_artifact_of_another_backbone_is_left_out(tmp_path: Path, real_engine: Engine, words: TextTokenizer) -> None:
    folder = write_artifact(tmp_path / "spam", real_engine.spec, "spam")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"backbone": {"fingerprint": "sha256:other"}}))
    catalog = build_catalog(tmp_path, real_engine, words)
    assert catalog.snapshot.tasks == {}
    assert "sha256:other" in catalog.left_out["spam"]


def test_a_folder_that_is_not_there_keeps_the_server_from_starting(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there is no folder"):
        open_runtime(load_settings({"prefixes": tmp_path / "nowhere", "dtype": "float32"}))


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.anyio
async def test_the_whole_runtime_answers_in_each_type(tmp_path: Path, backbone: Backbone, dtype: str) -> None:
    write_artifact(tmp_path / "spam", backbone.spec, "spam", ("ham", "spam"))
    write_artifact(tmp_path / "slots", backbone.spec, "slots", ("O", "B-city", "I-city"), "token_classification")
    settings: Settings = load_settings({"prefixes": tmp_path, "dtype": dtype})
    runtime: Runtime = open_runtime(settings)
    try:
        runtime.check_ready()
        if dtype == "auto":
            assert runtime.engine.spec.dtype == "float32", "without golden examples nothing shows that less is enough"
        prediction = await runtime.inference.predict([TextInput("Book a table in Paris")], None, False)
        (result,) = prediction.results
        assert set(result) == {"spam", "slots"}
        assert (prediction.usage.rows, prediction.usage.passes) == (1, 1.0)
    finally:
        runtime.close()
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
    runtime = open_runtime(load_settings({"prefixes": shelf, "device": "cpu"}))
    try:
        assert runtime.engine.spec.dtype == dtype
        assert ("spam" in runtime.catalog.left_out) == (shift > 0)
    finally:
        runtime.close()


@pytest.mark.anyio
async def test_every_shipped_artifact_serves() -> None:
    folders = list_artifacts(SHIPPED_PREFIXES)
    runtime = open_runtime(load_settings({"dtype": "float32"}))
    try:
        assert runtime.catalog.left_out == {}
        tasks = runtime.catalog.snapshot.tasks
        assert sum(len(task.versions) for task in tasks.values()) == len(folders)
        inputs = {"text": TextInput("Book a table in Paris"), "pair": TextInput("He sleeps.", "He is up.")}
        for kind, text in inputs.items():
            asked = [name for name, task in tasks.items() if task.versions[task.champion].input_kind == kind]
            if asked:
                prediction = await runtime.inference.predict([text], asked, False)
                failed = [name for name, answer in prediction.results[0].items() if isinstance(answer, FailedAnswer)]
                assert failed == []
    finally:
        runtime.close()
