"""The cheapest arrangement within the tolerance is found, and few labels are answered by others' prefixes."""

from __future__ import annotations

import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from app.domain import ProblemType, ReadoutKind
from app.engine.artifact import read_artifact
from app.engine.backbone import Backbone
from app.engine.tokenizer import TextTokenizer
from app.errors import DataError, SettingsError
from app.learning import reporting, trainer
from app.learning.cache import Gathered, StateCache
from app.learning.compose import compose, usable
from app.learning.finetune import FinetuneSettings
from app.learning.learn import Options, learn, with_enough_steps
from app.learning.prepare import cache_plan, read_frozen
from app.learning.recipe import Recipe
from app.learning.search import (
    Arrangement,
    Candidate,
    Fits,
    Point,
    candidates,
    choose,
    passes_of,
    refinements,
    search,
)
from app.learning.study import Files, Fitted, Study, Tables
from app.learning.trainer import Epoch, num_rounds
from tests.learning import samples
from tests.learning.test_learn import Silent, files_of, recipe

ALL = tuple(Arrangement)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone) -> tuple[Path, ...]:
    """Two tasks with prefixes, from layers 1 and 2 on."""
    folder = tmp_path_factory.mktemp("pool")
    files = files_of(folder, samples.single_rows, count=60)
    for name, first_layer in (("one", 1), ("two", 2)):
        own = recipe(task=name, epochs=2, num_virtual_tokens=3, first_layer=first_layer)
        learn(own, files, folder / name, (backbone, backbone), Silent())
    return tuple(usable(folder, backbone.spec))


def study_of(files: Files, backbone: Backbone) -> Study:
    return Study(Tables.read(files, None), backbone, TextTokenizer(backbone.path), Silent())


def fit(dev: float) -> Fitted:
    epoch: Any = Epoch(1, 0.0, dev, True)
    return Fitted(Recipe("x"), None, None, 0, (epoch,), epoch, 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tolerance", "chosen"), [(0.0, "own"), (0.01, "combined"), (0.02, "better trunk"), (1.0, "better trunk")]
)
def test_the_cheapest_within_the_tolerance_of_the_best(tolerance: float, chosen: str) -> None:
    scores = {"trunk": (1.0, 0.88), "better trunk": (1.0, 0.881), "combined": (1.3, 0.89), "own": (1.5, 0.9)}
    fits = Fits((Candidate(name, Recipe("x"), passes), fit(dev)) for name, (passes, dev) in scores.items())
    found = choose(fits, tolerance)
    assert found.candidate.name == chosen
    assert [point.name for point in found.points if point.chosen] == [chosen]
    assert found.points[3] == Point("own", 1.5, 0.9, 1.0, chosen == "own")


def test_of_equal_scores_the_one_with_less_loss() -> None:
    fits = Fits()
    for name, loss in (("first", 0.5), ("surer", 0.2), ("last", 0.3)):
        epoch: Any = Epoch(1, 0.0, 1.0, True, dev_loss=loss)
        fitted = Fitted(Recipe("x"), None, None, 0, (epoch,), epoch, 1.0)  # type: ignore[arg-type]
        fits.append((Candidate(name, Recipe("x"), 1.0), fitted))
    assert choose(fits, 0.0).candidate.name == "surer"


def test_candidates_rise_in_cost(tmp_path: Path, backbone: Backbone, pool: tuple[Path, ...]) -> None:
    study = study_of(files_of(tmp_path, samples.single_rows, count=60), backbone)
    found = candidates(recipe(), study, ALL, pool)
    assert [round(c.passes, 2) for c in found] == [1.0, 1.0, 1.0, 1.33, 1.67, 1.67, 2.0]
    assert sum(c.recipe.num_virtual_tokens > 0 for c in found) == 3
    assert [len(c.recipe.prefixes) for c in found if c.recipe.prefixes] == [2]
    assert {c.recipe.readout for c in found} == {ReadoutKind.MEAN, ReadoutKind.ATTENTION}


def test_states_are_computed_once_for_all_candidates(
    tmp_path: Path, backbone: Backbone, pool: tuple[Path, ...]
) -> None:
    study = study_of(files_of(tmp_path, samples.single_rows, count=60), backbone)
    study.prepare(candidate.recipe for candidate in candidates(recipe(), study, ALL, pool))
    watcher: Any = study.watcher
    before = len(watcher.stages)
    for candidate in candidates(recipe(epochs=1), study, ALL, pool):
        study.fit(candidate.recipe)
    assert len(watcher.stages) == before


def test_settings_of_a_combination_share_its_states(tmp_path: Path, backbone: Backbone, pool: tuple[Path, ...]) -> None:
    study = study_of(files_of(tmp_path, samples.single_rows, count=60), backbone)
    (combined,) = candidates(recipe(epochs=1), study, [Arrangement.COMBINATION], pool)
    rates = [replace(combined, recipe=replace(combined.recipe, learning_rate=rate)) for rate in (1e-3, 3e-3)]
    trunk = candidates(recipe(epochs=1), study, [Arrangement.TRUNK], pool)[0]
    watcher: Any = study.watcher
    found = search(study, [trunk, *rates], 0.0, lambda *_: None)
    before = len(watcher.stages)
    study.logits(found.fitted, "dev")
    search(study, rates, 0.0, lambda *_: None)
    assert len(watcher.stages) == before
    fits = Fits()
    for candidate in (combined, trunk, combined):  # what no other reads is given up
        fits.add(study, [candidate], lambda *_: None)
    fits.add(study, [trunk], lambda *_: None)
    study.fit(combined.recipe)
    assert len(watcher.stages) > before


def test_others_join_the_best_prefix_while_they_help(
    tmp_path: Path, backbone: Backbone, pool: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(files_of(tmp_path, samples.single_rows, count=40), backbone)
    third = tmp_path / "three"
    shutil.copytree(pool[0], third)
    one, two, three = (*pool, third)
    scores = {(): 0.5, (one,): 0.6, (two,): 0.7, (three,): 0.6, (one, two, three): 0.65, (two, one): 0.72}
    monkeypatch.setattr(study, "fit", lambda recipe, *_: replace(fit(scores.get(recipe.prefixes, 0.71)), recipe=recipe))
    monkeypatch.setattr(study, "forget", lambda *_, **__: None)
    monkeypatch.setattr("app.learning.compose.passes_of", lambda recipe, _: 1.0 + len(recipe.prefixes) / 10)
    tried: list[str] = []
    found = compose(study, recipe(epochs=3), (one, two, three), 0.0, lambda name, *_: tried.append(name))
    assert tried[4:] == ["one + two + three", "two + one", "two + three"]
    assert found.candidate.recipe.prefixes == (two, one)
    within = compose(study, recipe(epochs=3), (one, two, three), 0.03, lambda *_: None)
    assert within.candidate.recipe.prefixes == (two,), "the cheaper one is near enough"


def test_a_part_of_a_study_has_the_same_states(tmp_path: Path, backbone: Backbone) -> None:
    study = study_of(files_of(tmp_path, samples.single_rows, count=60), backbone)
    own = study.completed(recipe(num_virtual_tokens=2, first_layer=1))
    plan = cache_plan(own, read_frozen(own, backbone.spec))
    part = study.part({"train": [5, 3, 40]})
    whole, some = study.split(plan, "train"), part.split(plan, "train")
    assert torch.equal(some.targets, whole.targets[[5, 3, 40]])
    both = [s.cache.gather(torch.tensor(rows)) for s, rows in ((some, [0, 1, 2]), (whole, [5, 3, 40]))]
    assert whole.cache.fork is not None and some.cache.fork is not None
    assert torch.equal(some.cache.fork[both[0].index], whole.cache.fork[both[1].index])
    assert part.fit(replace(own, epochs=1)).best.number == 1


def test_the_search_ends_in_an_artifact_that_says_what_was_tried(tmp_path: Path, backbone: Backbone) -> None:
    files = files_of(tmp_path, samples.single_rows, count=120)
    options = Options(arrangements=(Arrangement.TRUNK, Arrangement.LATE), baselines=True)
    watcher = Silent()
    manifest = learn(
        recipe(epochs=6), Files(files.train, None, files.test), tmp_path / "out", (backbone, backbone), watcher, options
    )
    assert len(watcher.candidates) >= 7
    assert manifest["cost"] == {"passes": 1.0, "passes_alone": 1.0}
    assert set(manifest["baselines"]) == {"majority", "tfidf", "linear head on the bare trunk"}
    assert manifest["baselines"]["tfidf"]["test"]["rows"] == 60
    assert manifest["data"]["dev"]["rows"] == 12 and manifest["data"]["train"]["rows"] == 108
    report = (tmp_path / "out" / "report.html").read_text()
    assert "bare trunk" in report and "own prefix from layer" in report and "<svg" in report
    read_artifact(tmp_path / "out", backbone.spec)


def test_a_search_on_a_sample_says_so(tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.learning.learn._SEARCH_ROWS", 50)
    files, watcher = files_of(tmp_path, samples.single_rows, count=120), Silent()
    options = Options(arrangements=(Arrangement.TRUNK,))
    manifest = learn(recipe(epochs=1), files, tmp_path / "out", (backbone, backbone), watcher, options)
    told = "a sample: 50 of 120 rows of train and 60 of 60 rows of dev"
    assert f"the search runs on {told}; what it chooses is then trained on all of them" in watcher.noticed
    assert f"The search ran on {told}." in (tmp_path / "out" / "report.html").read_text()
    assert manifest["search_sample"] == {"train": 50, "dev": 60} and manifest["data"]["train"]["rows"] == 120
    monkeypatch.undo()
    manifest = learn(recipe(epochs=1), files, tmp_path / "out", (backbone, backbone), Silent(), options)
    assert manifest["search_sample"] == {}
    assert "a sample" not in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("given", [frozenset({"num_members"}), frozenset()])
def test_members_that_are_given_are_kept_by_a_search(tmp_path: Path, backbone: Backbone, given: frozenset[str]) -> None:
    files = files_of(tmp_path, samples.single_rows, count=120)
    options = Options(arrangements=(Arrangement.TRUNK,), given=given)
    wanted = recipe(epochs=2, hidden=None, num_members=2)
    manifest = learn(wanted, files, tmp_path / "out", (backbone, backbone), Silent(), options)
    names = [point["name"] for point in manifest["search"]]
    assert ("bare trunk, mean, linear" in names) == (not given)
    assert manifest["readout"]["kind"] == "mean" or manifest["readout"]["num_members"] == 2


def test_the_time_of_training_is_that_of_all_of_it(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frozen layers' passes, which are most of it on a CPU, are no part of a fit."""

    class Slow(Silent):
        def stage(self, name: str, total: int) -> None:
            time.sleep(2.0 if name == "frozen layers, train" else 0.0)

    told: dict[str, Any] = {}
    monkeypatch.setattr(reporting, "render", lambda report: told.update(report) or "")
    files = files_of(tmp_path, samples.single_rows, count=40)
    learn(recipe(epochs=1), files, tmp_path / "out", (backbone, backbone), Slow())
    assert told["cost"]["training_s"] >= 2.0


def test_the_ceiling_is_measured_without_the_cheap_baselines_too(tmp_path: Path, backbone: Backbone) -> None:
    files = files_of(tmp_path, samples.single_rows, count=40)
    options = Options(finetuning=FinetuneSettings(epochs=1))
    manifest = learn(recipe(epochs=1), files, tmp_path / "out", (backbone, backbone), Silent(), options)
    assert set(manifest["baselines"]) == {"full fine-tuning"}


def test_a_head_on_the_prefixes_of_others(tmp_path: Path, backbone: Backbone, pool: tuple[Path, ...]) -> None:
    study = study_of(files_of(tmp_path, samples.single_rows, count=40), backbone)
    tried: list[str] = []
    found = compose(study, recipe(epochs=3), pool, 0.0, lambda name, *_: tried.append(name))
    assert tried == ["bare trunk", "one", "two", "one + two"]
    assert found.candidate.name in tried
    with pytest.raises(SettingsError, match="no prefixes of this backbone"):
        compose(study, recipe(), (), 0.0, lambda *_: None)


def test_passes_count_from_the_first_fork(tmp_path: Path, backbone: Backbone, pool: tuple[Path, ...]) -> None:
    study = study_of(files_of(tmp_path, samples.single_rows, count=40), backbone)
    both = study.completed(recipe(prefixes=pool))
    assert passes_of(both, backbone.spec) == pytest.approx(1 + 2 / 3)
    assert passes_of(study.completed(recipe()), backbone.spec) == 1.0


def test_few_rows_are_gone_through_more_often() -> None:
    few = with_enough_steps(Recipe("x"), 16)
    assert few.epochs == 200 and few.patience > Recipe("x").patience
    assert with_enough_steps(Recipe("x"), 10_000) == Recipe("x")


def test_training_ends_when_nothing_more_is_won(tmp_path: Path, backbone: Backbone) -> None:
    source = random.Random(0)
    rows = [(text, source.choice(("yes", "no"))) for text, _ in samples.single_rows(source, 120)]  # nothing to learn
    paths = [
        samples.write_rows(tmp_path / f"{name}.tsv", ("text", "label"), part)
        for name, part in (("a", rows[:80]), ("b", rows[80:]))
    ]
    study = study_of(Files(paths[0], paths[1]), backbone)
    fitted = study.fit(study.completed(recipe(epochs=60, patience=2)))
    assert len(fitted.epochs) == fitted.best.number + 2 < 60


def test_an_interrupt_keeps_the_best_so_far(tmp_path: Path, backbone: Backbone) -> None:
    watcher = Silent()

    def stop(epoch: Epoch, measure: str) -> None:
        if epoch.number == 2:
            raise KeyboardInterrupt

    watcher.epoch = stop  # type: ignore[method-assign]
    files = files_of(tmp_path, samples.single_rows, count=60)
    manifest = learn(recipe(), files, tmp_path / "out", (backbone, backbone), watcher)
    assert manifest["training"]["interrupted"] is True and manifest["training"]["best_epoch"] <= 2
    read_artifact(tmp_path / "out", backbone.spec)


def test_only_long_epochs_are_gone_through_in_rounds_and_dev_costs_little() -> None:
    assert num_rounds(3_911, 556, 32) == num_rounds(100_000, 10_000, 32) == 1
    assert num_rounds(1_000_000, 1_000, 32) == 15
    assert num_rounds(900_000, 100_000, 32) == 2
    assert num_rounds(1_000_000, 1_000, 250_000) == 4, "each has a batch"


def test_a_long_epoch_is_seen_in_rounds_and_an_interrupt_within_it_loses_little(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "_ROUND_ROWS", 20)
    monkeypatch.setattr(trainer, "_ROUND_DEV", 0)
    files = files_of(tmp_path, samples.single_rows, count=80)
    study = study_of(files, backbone)
    chosen = study.completed(recipe(epochs=2, batch_size=4))
    gathered: list[int] = []
    before = StateCache.gather

    def gather(cache: StateCache, texts: torch.Tensor, width: int | None = None) -> Gathered:
        gathered.extend(texts.tolist() if len(cache) == 80 else [])
        return before(cache, texts, width)

    monkeypatch.setattr(StateCache, "gather", gather)
    fitted = study.fit(chosen)
    assert [epoch.number for epoch in fitted.epochs] == [0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2]
    assert study.num_looks(chosen) == 8
    assert sorted(gathered) == sorted([*range(80)] * 2), "every row once an epoch"

    watcher = Silent()

    def stop(epoch: Epoch, measure: str) -> None:
        if epoch.number == 0.5:
            raise KeyboardInterrupt

    watcher.epoch = stop  # type: ignore[method-assign]
    manifest = learn(recipe(), files, tmp_path / "out", (backbone, backbone), watcher)
    assert manifest["training"]["interrupted"] is True and manifest["training"]["best_epoch"] in (0.25, 0.5)
    read_artifact(tmp_path / "out", backbone.spec)


class Impatient(Silent):
    """Interrupts when the given number of candidates has been reported."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self._after = after

    def candidate(self, name: str, passes: float, dev: float, seconds: float) -> None:
        super().candidate(name, passes, dev, seconds)
        if len(self.candidates) == self._after:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("after", [1, 5, 7])
def test_an_interrupt_ends_the_search_and_what_comes_after_it(tmp_path: Path, backbone: Backbone, after: int) -> None:
    """Behind the first candidate, behind the last, and among the settings."""
    files = files_of(tmp_path, samples.single_rows, count=60)
    watcher = Impatient(after)
    options = Options(arrangements=(Arrangement.TRUNK, Arrangement.LATE), baselines=True)
    manifest = learn(recipe(epochs=2), files, tmp_path / "out", (backbone, backbone), watcher, options)
    assert manifest["training"]["interrupted"] is True and manifest["baselines"] == {}
    assert len(watcher.candidates) == after
    assert "baselines" not in watcher.stages
    assert "The run was interrupted: this is the best" in (tmp_path / "out" / "report.html").read_text()
    read_artifact(tmp_path / "out", backbone.spec)


def test_what_was_given_stays_in_a_search(tmp_path: Path, backbone: Backbone) -> None:
    study = study_of(files_of(tmp_path, samples.single_rows, count=60), backbone)
    given = {"learning_rate", "dropout", "hidden"}
    found = candidates(recipe(), study, ALL, (), given)
    tried = [c.recipe for c in found] + [r for c in found for _, r in refinements(c, study, given)]
    assert {(r.learning_rate, r.dropout, r.hidden) for r in tried} == {(5e-3, 0.1, 16)}


def test_what_is_refined_goes_by_the_problem(tmp_path: Path, backbone: Backbone) -> None:
    rows = {ProblemType.SINGLE_LABEL: samples.single_rows, ProblemType.MULTI_LABEL: samples.multi_rows}
    weights = dict[ProblemType, set[float]]()
    for kind, of_kind in rows.items():
        (tmp_path / kind).mkdir()
        study = study_of(files_of(tmp_path / kind, of_kind, count=60), backbone)
        tried = [r for c in candidates(recipe(), study, ALL, ()) for _, r in refinements(c, study)]
        weights[kind] = {r.class_weight_power for r in tried}
        assert {r.num_queries for r in tried if r.readout is ReadoutKind.ATTENTION} == {2, 4}
    assert weights == {ProblemType.SINGLE_LABEL: {0.0}, ProblemType.MULTI_LABEL: {0.0, 0.5}}


def test_two_texts_take_more_virtual_tokens(tmp_path: Path, backbone: Backbone) -> None:
    counts = []
    for name, rows in (("texts", samples.single_rows), ("pairs", samples.pair_rows)):
        (tmp_path / name).mkdir()
        found = candidates(recipe(), study_of(files_of(tmp_path / name, rows, count=60), backbone), ALL, ())
        counts.append({c.recipe.num_virtual_tokens for c in found})
    assert counts == [{0, 16}, {0, 32}]


def test_two_texts_are_matched(tmp_path: Path, backbone: Backbone) -> None:
    study = study_of(files_of(tmp_path, samples.pair_rows, count=60), backbone)
    found = candidates(recipe(), study, ALL, ())
    assert {c.recipe.readout for c in found} == {ReadoutKind.MEAN, ReadoutKind.MATCHING}
    assert [c.name for c in found if c.passes == 1.0][1:] == [
        "bare trunk, matching",
        "bare trunk, matching of all layers",
    ]
    assert {r.num_queries for c in found for _, r in refinements(c, study) if r.readout is not ReadoutKind.MEAN} == {
        2,
        4,
    }
    asked = candidates(recipe(readout=ReadoutKind.ATTENTION), study, ALL, ())
    assert {c.recipe.readout for c in asked} == {ReadoutKind.MEAN, ReadoutKind.ATTENTION}


def test_the_prefixes_of_others_are_those_that_are_finished(backbone: Backbone, pool: tuple[Path, ...]) -> None:
    folder = pool[0].parent
    shutil.copytree(pool[0], folder / ".one.draft", dirs_exist_ok=True)
    assert [path.name for path in usable(folder, backbone.spec)] == ["one", "two"]
    assert [path.name for path in usable(folder, backbone.spec, without="one")] == ["two"]


def test_nothing_to_choose_from(tmp_path: Path, backbone: Backbone) -> None:
    files = files_of(tmp_path, samples.single_rows, count=60)
    options = Options(arrangements=(Arrangement.COMBINATION,))
    with pytest.raises(SettingsError, match="nothing to choose from"):
        learn(recipe(), files, tmp_path / "out", (backbone, backbone), Silent(), options)
    with pytest.raises(SettingsError, match="--tolerance"):
        learn(recipe(), files, tmp_path / "out", (backbone, backbone), Silent(), Options(tolerance=-1))


def test_other_versions_are_never_replaced(tmp_path: Path, backbone: Backbone) -> None:
    files = files_of(tmp_path, samples.single_rows, count=40)
    learn(recipe(epochs=1), files, tmp_path / "out", (backbone, backbone), Silent())
    shutil.copytree(tmp_path / "out", tmp_path / "out" / "2")
    with pytest.raises(SettingsError, match="may be other versions"):
        learn(recipe(epochs=1), files, tmp_path / "out", (backbone, backbone), Silent())


def test_golden_inputs_that_cannot_be_read_are_told_before_anything_is_trained(
    tmp_path: Path, backbone: Backbone
) -> None:
    files = files_of(tmp_path, samples.single_rows, count=40)
    (tmp_path / "golden.txt").write_text("we was good\n\u200b\n")
    watcher = Silent()
    options = Options(golden=tmp_path / "golden.txt")
    with pytest.raises(DataError, match=r"golden\.txt"):
        learn(recipe(epochs=1), files, tmp_path / "out", (backbone, backbone), watcher, options)
    assert "training" not in watcher.stages


def test_training_that_diverges_is_told(tmp_path: Path, backbone: Backbone) -> None:
    study = study_of(files_of(tmp_path, samples.regression_rows, count=40), backbone)
    study.scaling = replace(study.scaling, std=float("nan"))
    with pytest.raises(DataError, match="training diverged"):
        study.fit(study.completed(recipe(epochs=1)))


def test_golden_examples_can_be_given(tmp_path: Path, backbone: Backbone) -> None:
    files = files_of(tmp_path, samples.single_rows, count=60)
    (tmp_path / "golden.txt").write_text("we was good in it\n\nthe awful of paris\n")
    options = Options(golden=tmp_path / "golden.txt")
    manifest = learn(recipe(epochs=1), files, tmp_path / "out", (backbone, backbone), Silent(), options)
    assert [example["text"] for example in manifest["golden"]] == ["we was good in it", "the awful of paris"]
    (tmp_path / "golden.txt").write_text("two\ttexts\n")
    with pytest.raises(DataError, match=r"golden\.txt must hold a text a line: input 1 does not"):
        learn(recipe(epochs=1), files, tmp_path / "out", (backbone, backbone), Silent(), options)
