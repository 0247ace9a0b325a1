"""The experiment end to end on a tiny backbone: every cell, once, and a page that has them all."""

from __future__ import annotations

import argparse
import errno
import json
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from app.engine.backbone import Backbone
from app.engine.tokenizer import TextTokenizer
from app.errors import DataError, SettingsError
from app.learning import experiment_command, experiment_report
from app.learning.experiment import Experiment, Sets, header
from app.learning.experiment_numbers import Story
from app.learning.experiment_plan import (
    ALL,
    CEILING,
    FULL,
    WHOLE,
    Cell,
    Kind,
    Outcome,
    Part,
    Plan,
    PrefixSettings,
    Results,
    Told,
    cells,
    steps,
    unfinished,
    wide,
)
from app.learning.finetune import FinetuneSettings
from app.learning.splits import sampled_rows
from app.learning.study import Quiet, Study
from tests.learning import samples

PLAN = Plan(
    sources=("words", "pairs"),
    targets=("kinds", "numbers"),
    sizes=(16, ALL),
    seeds=(0, 1),
    single=PrefixSettings(2, 2, 1e-2),
    pair=PrefixSettings(3, 2, 1e-2),
    finetuning=FinetuneSettings(epochs=1, learning_rate=3e-3),
    few_dev_rows=20,
    head_epochs=2,
    least_steps=4,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, source = tmp_path_factory.mktemp("data"), random.Random(0)
    for name, header_, rows in (
        ("words", ("text", "labels"), samples.multi_rows),
        ("pairs", ("text_a", "text_b", "label"), samples.pair_rows),
        ("kinds", ("text", "label"), samples.single_rows),
        ("numbers", ("text", "score"), samples.regression_rows),
    ):
        (folder / name).mkdir()
        for split in ("train", "dev", "test"):
            samples.write_rows(folder / name / f"{split}.tsv", header_, rows(source, 64))
    return folder


class Run:
    """One run in a folder, which counts what it computes."""

    def __init__(self, folder: Path, data: Path, backbone: Backbone, plan: Plan = PLAN) -> None:
        self.folder, self.backbone, self.plan = folder, backbone, plan
        self.sets = Sets(plan, data)
        self.done: list[Cell] = []

    def __call__(self, resume: bool = False, stop_after: int | None = None) -> Results:
        def report(cell: Cell, _: Outcome) -> None:
            self.done.append(cell)
            if len(self.done) == stop_after:
                raise KeyboardInterrupt

        path = self.folder / "results.jsonl"
        results = Results(path, header(self.plan, self.sets, self.backbone.spec), resume)
        tokenizer = TextTokenizer(self.backbone.path)
        ledger = Told(results, report)
        Experiment(self.plan, self.sets, self.backbone, tokenizer, ledger, self.folder / "work").run()
        return results


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path, backbone: Backbone) -> tuple[Run, Results]:
    """Interrupted half way, and resumed."""
    run = Run(tmp_path_factory.mktemp("run"), data, backbone)
    with pytest.raises(KeyboardInterrupt):
        run(stop_after=len(list(cells(PLAN))) // 2)
    return run, run(resume=True)


def test_every_cell_is_computed_once_though_it_was_interrupted(finished: tuple[Run, Results]) -> None:
    run, results = finished
    assert sorted(run.done, key=repr) == sorted(cells(PLAN), key=repr)
    assert set(results.found) == set(cells(PLAN))
    lines = (run.folder / "results.jsonl").read_text().splitlines()
    assert len(lines) == 1 + len(results.found)


def test_a_finished_run_computes_nothing(finished: tuple[Run, Results], data: Path, backbone: Backbone) -> None:
    run, results = finished
    again = Run(run.folder, data, backbone)
    assert again(resume=True).found == results.found
    assert again.done == []


def test_what_is_left_of_a_finished_seed_is_nothing(finished: tuple[Run, Results], tmp_path: Path) -> None:
    run, results = finished
    found = dict(results.found)
    every = list(steps(PLAN))
    assert unfinished(PLAN, {}) == every and unfinished(PLAN, found) == []
    for cell, wanted in (
        (Cell(Part.TARGET, 1, "kinds", CEILING), {Kind.CEILING}),
        (Cell(Part.TARGET, 1, "kinds", "combination", "linear", 16), {Kind.TARGETS}),
        (Cell(Part.SOURCE, 1, "words", "shared prefix", "linear"), {Kind.SHARED}),
        (Cell(Part.TRAINING, 1, "", "whole backbone without pairs"), {Kind.WHOLE}),
        (Cell(Part.SOURCE, 1, "words", "own prefix", "linear"), {Kind.SOURCE}),
    ):
        left = unfinished(PLAN, found.keys() - {cell})
        (last,) = {step for step in left if step.kind in wanted}
        assert last.seed == 1 and last.name in (cell.task, cell.representation)
        assert left == [step for step in every if step == last or step in last.needs]


def test_results_without_what_was_trained_go_on(
    finished: tuple[Run, Results], data: Path, backbone: Backbone, tmp_path: Path
) -> None:
    run, results = finished
    lines = (run.folder / "results.jsonl").read_text().splitlines(keepends=True)
    lost = [
        cell
        for cell in results.found
        if (cell.part, cell.seed, cell.task) == (Part.TARGET, 1, "kinds") and cell.representation != CEILING
    ]
    assert len(lost) > 20
    texts = [json.dumps(asdict(cell)) for cell in lost]
    kept = [line for line in lines[1:] if not any(text in line for text in texts)]
    assert len(kept) == len(lines) - 1 - len(lost)
    (tmp_path / "results.jsonl").write_text("".join((lines[0], *kept)))
    again = Run(tmp_path, data, backbone)
    found = again(resume=True).found
    assert sorted(again.done, key=repr) == sorted(lost, key=repr) and not (tmp_path / "work" / "seed0").exists()
    assert {cell: outcome.score for cell, outcome in found.items()} == {
        cell: outcome.score for cell, outcome in results.found.items()
    }


def test_the_tuned_backbone_is_another_representation(finished: tuple[Run, Results]) -> None:
    run, results = finished
    tuned = Backbone.load(str(run.folder / "work" / "seed0" / "whole-backbone"), "cpu", "float32")
    assert tuned.spec.fingerprint != run.backbone.spec.fingerprint
    assert results.found[Cell(Part.TRAINING, 0, "", WHOLE)].num_parameters > 10_000


def test_costs_are_counted_in_passes(finished: tuple[Run, Results]) -> None:
    run, results = finished
    one = results.found[Cell(Part.SOURCE, 0, "pairs", "own prefix", "linear")]
    full = results.found[Cell(Part.SOURCE, 0, "pairs", CEILING)]
    # the layer below the fork once, the two above it in each of two epochs, against all three in one epoch
    assert one.tokens == round(full.tokens * (1 / 3 + 2 * 2 / 3))
    assert one.num_parameters == 2 * 2 * 3 * 32  # layers, keys and values, virtual tokens, width


def test_targets_are_fine_tuned_from_few_examples_too(finished: tuple[Run, Results]) -> None:
    run, results = finished
    study = Study(run.sets.target("kinds", 0), run.backbone, TextTokenizer(run.backbone.path), Quiet())
    lengths = [len(encoding) for encoding in study.texts("train")[0]]
    drawn = sum(lengths[row] for row in sampled_rows(study.tables.train, 16, 0))
    few, every = (results.found[Cell(Part.TARGET, 0, "kinds", CEILING, examples=size)] for size in (16, ALL))
    assert few.tokens == 4 * drawn  # a step an epoch, and four steps at least
    assert every.tokens == 2 * sum(lengths)  # two steps an epoch
    assert few.score != every.score


def story(run: Run, results: Results) -> Story:
    return Story(
        plan=run.plan,
        found=results.found,
        tables=run.sets.whole,
        shared_texts=run.sets.shared_texts(),
        command="manifold experiment --data DATA",
        machine="a machine",
        model="tiny",
    )


def test_the_page_has_every_number(finished: tuple[Run, Results], tmp_path: Path) -> None:
    run, results = finished
    experiment_report.write(tmp_path / "EXPERIMENT.md", story(run, results))
    page = (tmp_path / "EXPERIMENT.md").read_text()
    for cell in cells(replace(PLAN, seeds=(0,))):
        if cell.part is Part.TRAINING or cell.representation.endswith("without pairs"):
            continue
        pair = [results.found[replace(cell, seed=seed)].score for seed in (0, 1)]
        assert f"{sum(pair) / 2:.3f} ± {abs(pair[0] - pair[1]) / 2**0.5:.3f}" in page, cell
    assert "What was found" in page and "±" in page and str(tmp_path) not in page
    for name in ("targets", "update"):
        assert f"(_experiment/{name}.svg)" in page
        ElementTree.parse(tmp_path / "_experiment" / f"{name}.svg")


def invented(score: Callable[[Cell], float], seeds: tuple[int, ...] = (0, 1, 2)) -> tuple[Plan, dict[Cell, Outcome]]:
    plan = replace(PLAN, seeds=seeds)
    return plan, {cell: Outcome(score(cell), 0.5, 1.0, 1, 1) for cell in cells(plan)}


@pytest.mark.parametrize(
    ("score", "seeds", "summary"),
    [
        (
            lambda cell: 0.8 if cell.representation == "combination" else 0.7,
            (0, 1, 2),
            "For in 4, against in 0, open in 0",
        ),
        (
            lambda cell: 0.6 if cell.representation == "combination" else 0.7,
            (0, 1, 2),
            "For in 0, against in 4, open in 0",
        ),
        (
            lambda cell: 0.7 + 0.1 * (cell.seed - 0.9) * (cell.representation == "combination"),
            (0, 1, 2),
            "open in 4 of 4",
        ),
        (lambda cell: 0.8 if cell.representation == "combination" else 0.7, (0,), "open in 4 of 4"),
    ],
    ids=["for", "against", "within the spread", "one seed"],
)
def test_no_claim_is_made_that_the_numbers_do_not_carry(
    score: Callable[[Cell], float], seeds: tuple[int, ...], summary: str, data: Path, tmp_path: Path
) -> None:
    plan, found = invented(score, seeds)
    sets = Sets(plan, data)
    page = experiment_report.page(
        Story(plan, found, sets.whole, sets.shared_texts(), "manifold experiment", "a machine", "tiny")
    )
    claim = next(line for line in page.splitlines() if line.startswith("**The combination beats the bare trunk.**"))
    assert summary in claim


@pytest.mark.parametrize(
    ("own", "ceiling", "bare", "told"),
    [(0.5, 0.6, 0.4, True), (0.5, 0.4, 0.6, True), (0.5, 0.5, 0.5, False)],
    ids=["below fine-tuning", "below the bare trunk", "as good"],
)
def test_a_prefix_that_is_badly_trained_is_told(
    own: float, ceiling: float, bare: float, told: bool, data: Path
) -> None:
    scores = {"own prefix": own, CEILING: ceiling, "bare trunk": bare}
    plan, found = invented(lambda cell: scores.get(cell.representation, 0.5))
    plan, sets = replace(plan, source_rows=100), Sets(plan, data)
    page = experiment_report.page(
        Story(plan, found, sets.whole, sets.shared_texts(), "manifold experiment", "", "tiny")
    )
    assert ("more than 3 points below the better of the two" in page) is told
    assert "Full fine-tuning took 4 steps" in page


def test_results_of_other_settings_are_refused(finished: tuple[Run, Results], data: Path, backbone: Backbone) -> None:
    run, _ = finished
    other = Run(run.folder, data, backbone, replace(PLAN, head_epochs=3))
    with pytest.raises(SettingsError, match="other settings"):
        other(resume=True)


def test_half_a_line_is_left_out(finished: tuple[Run, Results], tmp_path: Path) -> None:
    run, results = finished
    text = (run.folder / "results.jsonl").read_text()
    path = tmp_path / "results.jsonl"
    path.write_text(text[:-20])
    again = Results(path, json.loads(text.splitlines()[0]), resume=True)
    assert len(again.found) == len(results.found) - 1
    again.add(next(cell for cell in results.found if cell not in again.found), Outcome(0.5, 0.5, 1.0))
    assert len(path.read_text().splitlines()) == 1 + len(results.found)


def test_earlier_results_are_kept_when_a_run_begins_anew(finished: tuple[Run, Results], tmp_path: Path) -> None:
    run, results = finished
    text = (run.folder / "results.jsonl").read_text()
    path, old, header = tmp_path / "results.jsonl", tmp_path / "results.jsonl.old", json.loads(text.splitlines()[0])
    path.write_text(text)
    anew = Results(path, header, resume=False)
    assert anew.kept == old and old.read_text() == text
    assert anew.found == {} and path.read_text() == text.splitlines()[0] + "\n"
    again = Results(path, header, resume=False)  # nothing was found in between
    assert again.kept is None and old.read_text() == text


def test_results_are_never_half_rewritten(
    finished: tuple[Run, Results], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, results = finished
    text = (run.folder / "results.jsonl").read_text()
    path = tmp_path / "results.jsonl"
    path.write_text(text)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SettingsError, match=r"results\.jsonl cannot be written: No space left"):
        Results(path, json.loads(text.splitlines()[0]), resume=True)
    assert path.read_text() == text and [file.name for file in tmp_path.iterdir()] == ["results.jsonl"]


def test_a_set_that_is_missing_is_named(data: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere/train\.tsv"):
        Sets(replace(PLAN, targets=("nowhere",)), data)


def test_texts_that_a_source_and_a_target_share_are_counted(data: Path) -> None:
    sets = Sets(replace(PLAN, sources=("words", "pairs"), targets=("kinds", "words")), data)
    same = {example.text.text.casefold() for example in sets.whole["words"].train.examples}
    test = sets.whole["words"].test
    assert test is not None
    assert sets.shared_texts()["words"] == sum(e.text.text.casefold() in same for e in test.examples)


def test_the_command(
    data: Path, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    experiment_command.add_arguments(parser)
    monkeypatch.setattr(experiment_command, "QUICK", replace(PLAN, seeds=(0,), sizes=(16,), with_ceiling=False))
    out = tmp_path / "page" / "EXPERIMENT.md"
    given = ["--data", str(data), "--quick", "--out", str(out), "--model", str(model_path), "--dtype", "float32"]
    assert experiment_command.run(parser.parse_args(given)) == 0
    shown = capsys.readouterr().out
    assert "target: kinds, combination, linear, 16 examples" in shown
    assert "`manifold experiment --data DATA --quick --seeds 0`" in out.read_text()
    assert "results.jsonl.old" not in shown and experiment_command.run(parser.parse_args(given)) == 0
    assert f"the earlier results are kept in {out.parent / 'results.jsonl.old'}" in capsys.readouterr().out
    assert experiment_command.run(parser.parse_args([*given, "--data", "nowhere"])) == 1
    assert "manifold experiment: nowhere/words/train.tsv cannot be read" in capsys.readouterr().err


def scores(folder: Path) -> dict[str, tuple[float, float]]:
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()[1:]]
    return {json.dumps(line["cell"]): (line["outcome"]["score"], line["outcome"]["dev"]) for line in lines}


def test_steps_at_once_find_what_one_by_one_finds(
    data: Path, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment_command, "QUICK", replace(PLAN, seeds=(0,)))
    parser = argparse.ArgumentParser()
    experiment_command.add_arguments(parser)
    given = ["--data", str(data), "--quick", "--model", str(model_path), "--dtype", "float32", "--threads", "1"]
    for name, jobs in (("one", "1"), ("two", "2")):
        out = tmp_path / name / "EXPERIMENT.md"
        assert experiment_command.run(parser.parse_args([*given, "--out", str(out), "--jobs", jobs])) == 0
    assert scores(tmp_path / "two") == scores(tmp_path / "one")
    assert "1 thread, 2 steps at once" in (tmp_path / "two" / "EXPERIMENT.md").read_text()


@pytest.mark.parametrize(("jobs", "num_steps", "threads"), [(4, 100, 2), (4, 2, 4), (4, 1, 8), (16, 100, 1), (2, 0, 8)])
def test_processes_share_the_cores_as_far_as_there_are_steps(
    jobs: int, num_steps: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment_command, "cores", lambda: 8)
    assert experiment_command.threads_for(jobs, num_steps) == threads


def test_a_number_of_rows_keeps_all_sets_and_few_examples_of_each(
    data: Path, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = argparse.Namespace(quick=False, rows=800, seeds=None, examples=None)
    plan = experiment_command.plan_of(few)
    assert plan == wide(800)
    every = experiment_command.plan_of(argparse.Namespace(**vars(few) | {"examples": (16, ALL)}))
    assert (every.sizes, every.with_ceiling, every.source_rows) == ((16, ALL), True, 800)
    assert (plan.sources, plan.targets, plan.seeds) == (FULL.sources, FULL.targets, FULL.seeds)
    assert (plan.source_rows, plan.sizes, plan.with_ceiling) == (800, (16, 100), True)
    monkeypatch.setattr(
        experiment_command, "wide", lambda rows: replace(PLAN, source_rows=rows, sizes=(16,), with_ceiling=False)
    )
    parser = argparse.ArgumentParser()
    experiment_command.add_arguments(parser)
    out = tmp_path / "EXPERIMENT.md"
    given = ["--data", str(data), "--out", str(out), "--model", str(model_path), "--dtype", "float32", "--seeds", "1"]
    assert experiment_command.run(parser.parse_args([*given, "--rows", "40"])) == 0
    text = out.read_text()
    assert "`manifold experiment --data DATA --rows 40 --seeds 1`" in text and "40 rows of each source" in text
    capsys.readouterr()
    for wrong, words in (
        (["--rows", "none"], '"none" is no number of them'),
        (["--rows", "0"], '"0" is no'),
        (["--rows", "9", "--quick"], "not allowed with"),
        (["--examples", "16,some"], '"16,some" is not numbers'),
        (["--examples", "16,016"], "16 twice"),
        (["--examples", "all,all"], "all twice"),
        (["--examples", "0"], "1 or more"),
        (["--jobs", "0"], '"0" is no'),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args([*given, *wrong])
        assert words in capsys.readouterr().err
