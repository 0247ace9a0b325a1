"""Packing on a tiny backbone: who needs a prefix shares a branch, and the release says what the engine then does."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from app.cli import main
from app.config import Settings
from app.domain import Encoding, TaskVersion
from app.engine.artifact import Artifact, read_artifact
from app.engine.backbone import Backbone
from app.engine.plan import make_plan
from app.engine.tokenizer import TextTokenizer
from app.errors import DataError
from app.learning import evaluation, pack_command
from app.learning.data import read_table
from app.learning.learn import Files, Options, learn
from app.learning.pack import Search
from app.learning.pack_tasks import Limits, Member
from app.learning.recipe import Recipe
from app.learning.release import propose
from app.learning.study import Fitted, Study
from app.learning.trainer import Epoch
from app.main import create_app
from app.service.runtime import Runtime
from tests.fake_rollout import FakeRollout
from tests.fakes import snapshot_of
from tests.learning import samples
from tests.serving import running

# A head that hardly learns: what it lacks, a prefix gives it.
WEAK = {"hidden": 0, "learning_rate": 1e-5, "query_learning_rate": 1e-4, "prefix_learning_rate": 0.3, "dropout": 0.0}
STRONG = {"hidden": 0, "learning_rate": 1e-2, "query_learning_rate": 0.1, "dropout": 0.0, "epochs": 14, "patience": 0}
TOLERANCE = 0.05
MAX_PASSES = 1.4  # one branch from layer 2 of 3 on


class Silent:
    """A watcher that may interrupt behind a fit."""

    def __init__(self, interrupt_behind: str | None = None) -> None:
        self._interrupt_behind = interrupt_behind
        self.fits: list[str] = []
        self.at_most = 0
        self.noticed: list[str] = []

    def stage(self, name: str, total: int) -> None:
        if name == "fits at most":
            self.at_most = total

    def advance(self, steps: int) -> None: ...

    def epoch(self, epoch: Epoch, measure: str) -> None: ...

    def candidate(self, name: str, passes: float, dev: float, seconds: float) -> None:
        self.fits.append(name)
        if name == self._interrupt_behind:
            raise KeyboardInterrupt

    def notice(self, sentences: Sequence[str]) -> None:
        self.noticed += sentences


def recipe(task: str, **changes: Any) -> Recipe:
    return Recipe(task, **({"epochs": 4, "batch_size": 4, "num_virtual_tokens": 8} | changes))


def write_files(folder: Path, name: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Files:
    """60 rows to train on, 40 for dev, 40 for test."""
    parts = {"train": rows[:60], "dev": rows[60:100], "test": rows[100:]}
    return Files(
        *(samples.write_rows(folder / f"{name}-{part}.tsv", header, part_rows) for part, part_rows in parts.items())
    )


def plain_files(folder: Path) -> Files:
    return write_files(folder, "plain", ("text", "label"), samples.single_rows(random.Random(0), 140))


def mood_files(folder: Path) -> Files:
    return write_files(folder, "mood", ("text", "score"), samples.regression_rows(random.Random(1), 140))


def twin_files(folder: Path) -> Files:
    return write_files(folder, "twin", ("text", "score"), samples.regression_rows(random.Random(2), 140))


def pair_files(folder: Path) -> Files:
    """The words of one mood in two texts."""
    rows = [(*_halves(text), score) for text, score in samples.regression_rows(random.Random(3), 140)]
    return write_files(folder, "pair", ("text_a", "text_b", "score"), rows)


def _halves(text: str) -> tuple[str, str]:
    words = text.split()
    return " ".join(words[:2]), " ".join(words[2:])


@dataclass(frozen=True)
class Packed:
    folder: Path
    live: Path
    files: dict[str, Files]
    release: dict[str, Any]
    watcher: Silent

    def artifact(self, backbone: Backbone, task: str) -> Artifact:
        """As it would be live after the release."""
        is_new = self.release["tasks"][task]["is_new"]
        return read_artifact((self.folder if is_new else self.live) / task, backbone.spec)


@pytest.fixture(scope="module", autouse=True)
def short_trainings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("app.learning.learn._LEAST_STEPS", 75)
        patch.setattr("app.learning.pack_fits._READOUT_STEPS", 75)
        yield


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone, short_trainings: None) -> Packed:
    """Live are `plain` on the bare trunk and `mood` with a prefix from layer 0; `twin` and `pair` are new."""
    root = tmp_path_factory.mktemp("pack")
    made = {"plain": plain_files, "mood": mood_files, "twin": twin_files, "pair": pair_files}
    files = {name: make(root) for name, make in made.items()}
    members = [Member(recipe(name, **(STRONG if name == "plain" else WEAK)), given) for name, given in files.items()]
    both = backbone, backbone
    learn(
        recipe("plain", **STRONG | {"num_virtual_tokens": 0}), files["plain"], root / "live" / "plain", both, Silent()
    )
    mood = recipe("mood", **WEAK, first_layer=0)
    learn(mood, files["mood"], root / "live" / "mood", both, Silent(), Options(baselines=True))
    watcher = Silent()
    release = propose(members, root / "live", root / "out", both, watcher, Limits(TOLERANCE, MAX_PASSES))
    return Packed(root / "out", root / "live", files, release, watcher)


def passes(versions: Sequence[TaskVersion], backbone: Backbone) -> float:
    return make_plan(Encoding((1, 2, 3), (0, 0, 0)), versions, backbone.spec.num_layers).passes


def test_tasks_that_lack_share_a_branch(packed: Packed, backbone: Backbone) -> None:
    plain, mood, twin = (packed.artifact(backbone, name).version(0) for name in ("plain", "mood", "twin"))
    assert not plain.prefixes and mood.prefixes
    assert mood.prefixes == twin.prefixes
    group = packed.release["groups"][0]
    assert group["tasks"] == ["mood", "twin"]
    assert group["prefixes"] == [prefix.digest for prefix in mood.prefixes]


def test_a_text_and_a_pair_share_no_pass(packed: Packed, backbone: Backbone) -> None:
    version = packed.artifact(backbone, "pair").version(0)
    assert version.prefixes and packed.release["passes"]["pair"]["after"] == passes([version], backbone) == 1.0


def test_it_states_the_passes_of_the_plan(packed: Packed, backbone: Backbone) -> None:
    live = [read_artifact(packed.live / name, backbone.spec).version(0) for name in ("plain", "mood")]
    after = [packed.artifact(backbone, name).version(0) for name in ("plain", "mood", "twin")]
    stated = packed.release["passes"]
    assert stated["text"]["before"] == pytest.approx(passes(live, backbone), abs=1e-4) == 2.0
    assert stated["text"]["after"] == pytest.approx(passes(after, backbone), abs=1e-4)
    assert stated["text"]["after"] <= MAX_PASSES
    assert stated["pair"] == {"before": None, "after": 1.0}


def test_the_engine_scores_as_the_release_states(packed: Packed, backbone: Backbone) -> None:
    tokenizer = TextTokenizer(backbone.path)
    with evaluation.running(backbone) as engine:
        for name, task in packed.release["tasks"].items():
            artifact = packed.artifact(backbone, name)
            assert artifact.digest == task["digest"]
            for split in ("dev", "test"):
                scored = evaluation.score(engine, tokenizer, artifact, read_table(getattr(packed.files[name], split)))
                figures = evaluation.figures(scored, artifact.manifest["labels"], artifact.manifest["thresholds"])
                assert task["after"][split] == figures[task["measure"]]


def test_no_task_loses_more_than_the_tolerance(packed: Packed) -> None:
    assert packed.release["lacking"] == [] == packed.release["worse"]
    for task in packed.release["tasks"].values():
        assert task["search"]["dev"] >= task["search"]["best"] - TOLERANCE
        assert task["after"]["dev"] == pytest.approx(task["search"]["dev"], abs=0.01)
    assert (
        packed.release["tasks"]["mood"]["search"]["trunk"]
        < packed.release["tasks"]["mood"]["search"]["best"] - 2 * TOLERANCE
    )


def test_a_task_that_stays_gets_no_new_version(packed: Packed) -> None:
    plain = packed.release["tasks"]["plain"]
    assert plain["before"] == plain["after"] and not plain["is_new"]
    found = sorted(path.name for path in packed.folder.iterdir())
    assert found == ["RELEASE.md", "curve.svg", "mood", "pair", "release.json", "twin"]
    assert (packed.folder / "mood" / "report.html").is_file()


def test_baselines_stay_as_the_rows_do(packed: Packed, backbone: Backbone) -> None:
    before = read_artifact(packed.live / "mood", backbone.spec).manifest["baselines"]
    assert before and packed.artifact(backbone, "mood").manifest["baselines"] == before
    assert packed.artifact(backbone, "twin").manifest["baselines"] == {}, "nothing was measured of it"


def test_its_files_say_what_it_returns(packed: Packed) -> None:
    assert json.loads((packed.folder / "release.json").read_text()) == packed.release
    text = (packed.folder / "RELEASE.md").read_text()
    assert "kind of input: text 2.00 → 1.33, pair 1.00 (each at most 1.4)." in text
    assert "| plain | as it is | accuracy |" in text
    assert "Every task is within 5 points of its best arrangement." in text


def test_the_curve_rises_with_the_passes(packed: Packed) -> None:
    curve = packed.release["curve"]
    assert [point["state"] for point in (curve[0], curve[-1])] == ["all on the bare trunk", "each at its best"]
    assert sorted({point["passes"]["text"] for point in curve[:-1]}) == [1.0, 1.3333]
    assert curve[0]["passes"]["pair"] == curve[-2]["passes"]["pair"] == 1.0
    scores = [point["dev"] for point in curve]
    assert scores == sorted(scores) and scores[0] < scores[-1]
    drawn = ElementTree.fromstring((packed.folder / "curve.svg").read_text())
    dots = drawn.findall("{http://www.w3.org/2000/svg}circle")
    assert len(dots) == len(curve) and [dot.get("class") for dot in dots].count("dot chosen") == 1


def test_the_number_of_fits_is_told_and_held(packed: Packed) -> None:
    assert packed.release["fits"] == len(packed.watcher.fits) <= packed.watcher.at_most
    assert packed.watcher.at_most <= 26 * 4


# -- what cannot be had ------------------------------------------------------------------------------------------------


def test_where_no_branch_is_affordable_all_move_onto_one(packed: Packed, tmp_path: Path, backbone: Backbone) -> None:
    members = [
        Member(recipe("plain", **STRONG), packed.files["plain"]),
        Member(recipe("mood", **WEAK), packed.files["mood"]),
    ]
    release = propose(members, packed.live, tmp_path / "out", (backbone, backbone), Silent(), Limits(TOLERANCE, 1.0))
    assert release["lacking"] == []
    assert release["passes"] == {"text": {"before": 2.0, "after": 1.0}}
    (group,) = release["groups"]
    assert group["tasks"] == ["plain", "mood"]


def test_where_the_trunk_ends_below_its_last_layer_a_branch_costs_no_more(
    packed: Packed, tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.learning.pack._SHARED_TRIALS", 0)
    monkeypatch.setattr("app.learning.pack._MIN_SHARED_TRIALS", 0)
    members = [
        Member(recipe("plain", **STRONG), packed.files["plain"]),
        Member(recipe("mood", **WEAK), packed.files["mood"]),
    ]
    release = propose(members, packed.live, tmp_path / "out", (backbone, backbone), Silent(), Limits(TOLERANCE, 1.0))
    assert release["lacking"] == [] == release["worse"]
    plain, mood = (read_artifact(tmp_path / "out" / name, backbone.spec).version(0) for name in ("plain", "mood"))
    assert plain.readout.layers == (1, 2) and not plain.prefixes and mood.first_layer == 2
    assert release["passes"]["text"]["after"] == pytest.approx(passes([plain, mood], backbone), abs=1e-4) == 1.0
    assert release["tasks"]["plain"]["reads"] == "the bare trunk without its last layer"
    assert [group["tasks"] for group in release["groups"]] == [["mood"]]


def test_what_is_left_lacking_is_said(
    packed: Packed, tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.learning.pack._SHARED_TRIALS", 0)
    monkeypatch.setattr("app.learning.pack._MIN_SHARED_TRIALS", 0)
    monkeypatch.setattr(Search, "_first_layers", lambda _: [1])
    members = [
        Member(recipe("plain", **STRONG), packed.files["plain"]),
        Member(recipe("mood", **WEAK), packed.files["mood"]),
    ]
    release = propose(members, packed.live, tmp_path / "out", (backbone, backbone), Silent(), Limits(TOLERANCE, 1.0))
    (lacking,) = release["lacking"]
    assert lacking["task"] == "mood" and lacking["best_reads"].startswith("mood's ")
    assert lacking["best"] - TOLERANCE - lacking["dev"] == pytest.approx(lacking["short_by"], abs=1e-4)
    assert release["worse"] == ["mood"]
    assert release["passes"] == {"text": {"before": 2.0, "after": 1.0}}
    assert "mood is lacking: " in (tmp_path / "out" / "RELEASE.md").read_text()


def test_a_linear_head_is_taken_where_an_attention_readout_learns_too_slowly(
    packed: Packed, tmp_path: Path, backbone: Backbone
) -> None:
    watcher = Silent()
    member = Member(recipe("plain", hidden=16, learning_rate=1e-2, patience=1), packed.files["plain"])
    (tmp_path / "live").mkdir()
    release = propose([member], tmp_path / "live", tmp_path / "out", (backbone, backbone), watcher, Limits(0.9))
    artifact = read_artifact(tmp_path / "out" / "plain", backbone.spec)
    assert "plain: bare trunk, mean, linear" in watcher.fits
    assert artifact.manifest["readout"] == {"kind": "mean", "layers": [3]}
    assert artifact.manifest["evaluation"]["dev"]["accuracy"] == release["tasks"]["plain"]["search"]["trunk"]
    assert "plain: plain's from layer 2, mean" in watcher.fits  # as good on the trunk: tried on other rows too
    assert release["tasks"]["plain"]["reads"] == "the bare trunk"


def test_a_large_task_is_searched_on_a_part_and_learned_on_all(
    packed: Packed, tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.learning.pack_tasks._SEARCH_ROWS", 40)
    monkeypatch.setattr("app.learning.pack_tasks._SEARCH_DEV_ROWS", 20)
    watcher = Silent()
    members = [Member(recipe(name, **WEAK), packed.files[name]) for name in ("mood", "twin")]
    release = propose(members, packed.live, tmp_path / "out", (backbone, backbone), watcher, Limits(TOLERANCE))
    for task in release["tasks"].values():
        assert (task["search"]["train_rows"], task["search"]["dev_rows"]) == (40, 20)
    assert "mood: mood's live from layer 0" in watcher.fits
    assert "live tasks that take no part stay as they are: plain" in watcher.noticed
    assert release["passes"]["text"]["after"] == 1.0  # nothing reads the trunk above the fork of the branch
    assert release["tasks"]["twin"]["is_new"]
    assert read_artifact(tmp_path / "out" / "twin", backbone.spec).manifest["data"]["train"]["rows"] == 60


def test_files_of_another_task_are_refused(packed: Packed, tmp_path: Path, backbone: Backbone) -> None:
    member = Member(recipe("mood"), packed.files["plain"])
    with pytest.raises(DataError, match="give the files it is of"):
        propose([member], packed.live, tmp_path / "out", (backbone, backbone), Silent())


def test_an_interrupt_leaves_nothing(packed: Packed, tmp_path: Path, backbone: Backbone) -> None:
    (tmp_path / "place").mkdir()
    watcher = Silent("mood: own prefix from layer 1")
    member = Member(recipe("mood", **WEAK), packed.files["mood"])
    with pytest.raises(KeyboardInterrupt):
        propose([member], packed.live, tmp_path / "place" / "out", (backbone, backbone), watcher)
    assert not list((tmp_path / "place").iterdir())


def fits_counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The task of every training from now on."""
    fitted: list[str] = []
    fit = Study.fit

    def counted(study: Study, recipe: Recipe, *rest: Any) -> Fitted:
        fitted.append(recipe.task)
        return fit(study, recipe, *rest)

    monkeypatch.setattr(Study, "fit", counted)
    return fitted


def test_a_search_that_was_broken_off_goes_on_where_it_was(
    packed: Packed, tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [Member(recipe(name, **WEAK), packed.files[name]) for name in ("mood", "twin")]
    given = {"members": members, "live_folder": packed.live, "backbones": (backbone, backbone)}
    given |= {"limits": Limits(TOLERANCE, MAX_PASSES)}
    fitted = fits_counted(monkeypatch)
    whole = propose(**given, out=tmp_path / "whole", watcher=Silent())
    needed = len(fitted)
    fitted.clear()
    given["work"] = tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        propose(**given, out=tmp_path / "out", watcher=Silent("twin: own prefix from layer 1"))
    assert not (tmp_path / "out").exists() and 0 < len(fitted) < needed
    with (tmp_path / "work" / "fits.jsonl").open("a") as file:
        file.write('{"key": "half a li')
    watcher = Silent()
    assert propose(**given, out=tmp_path / "out", watcher=watcher) == whole
    assert len(fitted) == needed and len(watcher.fits) == whole["fits"]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert propose(**given, out=tmp_path / "again", watcher=Silent()) == whole
    assert len(fitted) == needed, "new versions are there too"


def test_other_settings_and_lost_prefixes_are_fitted_anew(
    packed: Packed, tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"live_folder": packed.live, "backbones": (backbone, backbone), "work": tmp_path / "work"}
    given |= {"limits": Limits(TOLERANCE, MAX_PASSES), "watcher": Silent()}
    (tmp_path / "none").mkdir()
    fitted = fits_counted(monkeypatch)
    propose([Member(recipe("mood", **WEAK), packed.files["mood"])], out=tmp_path / "one", **given)
    needed = len(fitted)
    assert needed
    gone, broken, *_ = sorted((tmp_path / "work").glob("prefix-*"))
    other = Member(recipe("mood", **WEAK), plain_files(tmp_path))
    propose([other], out=tmp_path / "other", **given | {"live_folder": tmp_path / "none"})
    assert len(fitted) >= 2 * needed, "of the same name and settings, and of another type"
    needed = len(fitted)
    propose([Member(recipe("mood", **WEAK, seed=1), packed.files["mood"])], out=tmp_path / "two", **given)
    assert len(fitted) > needed
    fitted.clear()
    shutil.rmtree(gone)
    (broken / "adapter_model.safetensors").unlink()
    propose([Member(recipe("mood", **WEAK), packed.files["mood"])], out=tmp_path / "three", **given)
    assert 0 < len(fitted) < needed


# -- what is live on a server ------------------------------------------------------------------------------------------


@pytest.fixture
def weak_tasks(packed: Packed, tmp_path: Path) -> Path:
    """The config of `mood`, which is live with a prefix, and of `twin`, which is new."""
    lines = ["[defaults]", "epochs = 4", "batch_size = 4", "num_virtual_tokens = 8"]
    lines += [f"{name} = {value}" for name, value in WEAK.items()]
    for name in ("mood", "twin"):
        files = packed.files[name]
        lines += [f"[tasks.{name}]", f'train = "{files.train}"', f'dev = "{files.dev}"', f'test = "{files.test}"']
    path = tmp_path / "tasks.toml"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def live_server(
    packed: Packed, settings: Settings, runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> Iterator[str]:
    """Where a server is that has the artifacts of the folder as champions."""
    assert isinstance(runtime.rollout, FakeRollout)
    runtime.rollout.separate, runtime.catalog.snapshot = False, snapshot_of()
    with running(create_app(settings, runtime)) as url:
        for name in ("plain", "mood"):
            assert main(["publish", str(packed.live / name), "--approve", "--url", url]) == 0
            assert main(["promote", f"{name}@1", "--url", url]) == 0
        capsys.readouterr()
        yield url


def contents(folder: Path) -> dict[str, bytes]:
    """But for reports, which tell how long it took."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "report.html"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_what_is_live_on_a_server_gives_the_release_that_its_folder_gives(
    packed: Packed,
    live_server: str,
    weak_tasks: Path,
    model_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No prefix but the live one can be moved to, so it is read until the release is written."""
    monkeypatch.setattr("app.learning.pack.Search._first_layers", lambda search: [2])
    monkeypatch.setattr("app.learning.pack._own_prefixes", lambda tasks, first_layer: ())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    pack = ["pack", "--config", str(weak_tasks), "--model", str(model_path), "--dtype", "float32"]
    assert main([*pack, "--live", str(packed.live), "--out", str(tmp_path / "folder")]) == 0
    told = capsys.readouterr().out
    assert main([*pack, "--url", live_server, "--out", str(tmp_path / "server")]) == 0
    shown = capsys.readouterr().out
    release = json.loads((tmp_path / "server" / "release.json").read_text())
    assert release["tasks"]["twin"]["reads"] == "mood's live from layer 0" and release["tasks"]["twin"]["is_new"]
    assert contents(tmp_path / "server") == contents(tmp_path / "folder")
    assert "note: live on the server: mood@1\n" in shown and "live on the server" not in told
    for out in (told, shown):
        assert "note: live tasks that take no part stay as they are: plain\n" in out
    assert not list((tmp_path / "temporary").glob("manifold-live-*"))


# -- as it is typed ----------------------------------------------------------------------------------------------------


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    pack_command.add_arguments(parser)
    return pack_command.run(parser.parse_args(arguments))


@pytest.fixture
def arguments(tmp_path: Path, model_path: Path) -> list[str]:
    files = plain_files(tmp_path)
    assert files.test is not None
    (tmp_path / "tasks.toml").write_text(
        "[defaults]\nepochs = 3\nbatch_size = 4\nhidden = 8\nnum_virtual_tokens = 4\n"
        f'[tasks.plain]\ntrain = "{files.train.name}"\ntest = "{files.test.name}"\n'
        f'[tasks.other]\ntrain = "{files.train.name}"\n'
    )
    (tmp_path / "live").mkdir()
    given = {"config": tmp_path / "tasks.toml", "live": tmp_path / "live", "out": tmp_path / "out", "model": model_path}
    return [part for name, value in given.items() for part in (f"--{name}", str(value))] + ["--dtype", "float32"]


def test_it_packs_a_task_without_dev_file(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, "--tasks", "plain", "--tolerance", "100") == 1
    assert "--tolerance must be" in capsys.readouterr().err
    assert run(*arguments, "--tasks", "plain", "--tolerance", "50") == 0
    shown = capsys.readouterr().out
    assert "plain: bare trunk, attention" in shown
    assert "Passes for all tasks: 1.00 (at most 1.2)." in shown
    manifest = json.loads((tmp_path / "out" / "plain" / "manifest.json").read_text())
    assert manifest["data"]["dev"]["rows"] == 6 and manifest["readout"]["kind"] == "attention"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("--tasks", "plain,nobody"), "tasks.toml has no task nobody: it has plain, other"),
        (("--max-passes", "0.9"), "--max-passes must be 1 or more: the bare trunk alone takes one pass"),
        (("--live", "nowhere"), "nowhere is not a folder: name the folder of the live artifacts with --live"),
        (("--out", "."), ". exists and is not empty: name a new folder with --out"),
        (("--work", "/dev/null"), "--work /dev/null is no folder: name a folder of its own"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    arguments: list[str], capsys: pytest.CaptureFixture[str], given: Sequence[str], sentence: str
) -> None:
    assert run(*arguments, *given) == 1
    assert capsys.readouterr().err == f"manifold pack: {sentence}\n"


def test_a_setting_that_a_task_cannot_have_is_told_with_its_name(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "tasks.toml"
    config.write_text(config.read_text() + 'measure = "micro_f1"\n')
    assert run(*arguments) == 1
    assert "manifold pack: other: --measure micro_f1 is nothing that this problem has" in capsys.readouterr().err


def test_without_a_folder_and_without_a_server_it_says_what_to_give(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without = arguments[: arguments.index("--live")] + arguments[arguments.index("--live") + 2 :]
    assert run(*without) == 1
    assert "name the folder of the live artifacts with --live" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setenv("MANIFOLD_PORT", str(port))
    assert main(["pack", *without]) == 1
    assert capsys.readouterr().err == (
        f"manifold pack: nothing answers at http://127.0.0.1:{port}: start a server with `manifold serve`, "
        "or say with --url where it is; or give a folder of the live artifacts with --live\n"
    )
    assert main(["pack", *arguments, "--url", "http://127.0.0.1:9"]) == 2
    assert "give one of them" in capsys.readouterr().err
    assert main(["pack", *without, "--max-passes", "0"]) == 1
    assert "--max-passes must be 1 or more" in capsys.readouterr().err, "nothing is asked of a server before"


def test_an_interrupted_training_writes_nothing(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("app.learning.study.train", interrupted)
    assert run(*arguments) == 130
    assert capsys.readouterr().err == "manifold pack: interrupted, nothing was written\n"
    assert sorted(tmp_path.iterdir()) == before
    assert run(*arguments, "--work", str(tmp_path / "out" / "work")) == 1
    assert "which is new each time: name another folder" in capsys.readouterr().err
    work = tmp_path / "work"
    assert run(*arguments, "--work", str(work)) == 130
    assert capsys.readouterr().err == f"manifold pack: interrupted, the same command goes on from {work}\n"
