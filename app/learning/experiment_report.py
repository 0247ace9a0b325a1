"""The experiment's page: what was run and found, tables, plots. Knows finished cells and markdown; runs nothing."""

from __future__ import annotations

from pathlib import Path

from app.domain import InputKind
from app.errors import SettingsError
from app.learning.experiment_findings import findings
from app.learning.experiment_numbers import BEST_SINGLE, Story, grid, listed, show, show_size
from app.learning.experiment_plan import (
    ATTENTION,
    BARE,
    CEILING,
    COMBINATION,
    LINEAR,
    OWN,
    READOUTS,
    SHARED,
    TOGETHER,
    WHOLE,
    Plan,
    alone,
    measure_of,
    without_last,
)
from app.learning.experiment_plots import targets_plot, update_plot

FIGURES = "_experiment"  # the plots' folder; one that begins so is no artifact


def write(out: Path, story: Story) -> None:
    """The page at `out` and its plots in a folder beside it."""
    try:
        figures = out.parent / FIGURES
        figures.mkdir(parents=True, exist_ok=True)
        (figures / "targets.svg").write_text(targets_plot(story), encoding="utf-8")
        (figures / "update.svg").write_text(update_plot(story), encoding="utf-8")
        out.write_text(page(story), encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{out} cannot be written: {error.strerror}") from error


def page(story: Story) -> str:
    parts = [
        "# The paper's experiment\n\n"
        "Independently trained prefixes of source tasks, combined side by side on a frozen encoder, make one text "
        "representation; light heads for new tasks are trained on it. After *Learning Easily Updated General Purpose "
        "Text Representations with Adaptable Task-Specific Prefixes* (Huang et al., Findings of EMNLP 2023, "
        "arXiv 2305.13499).",
        _run(story),
        findings(story),
        _sources(story),
        _targets(story),
        _update(story),
    ]
    return "\n\n".join(parts) + "\n"


# -- what was run ------------------------------------------------------------------------------------------------------


def _run(story: Story) -> str:
    plan = story.plan
    settings = [
        ("command", f"`{story.command}`"),
        ("encoder", story.model),
        ("machine", story.machine),
        ("seeds", ", ".join(map(str, plan.seeds))),
        ("figures", "mean ± standard deviation over the seeds" if len(plan.seeds) > 1 else "of one seed"),
        ("prefix of single texts", _settings(plan.single)),
        ("prefix of pairs", _settings(plan.pair)),
        (
            "shared prefix",
            "as many virtual tokens, and as many steps, as all sources' own prefixes; the lowest of their rates",
        ),
        (
            "whole backbone",
            f"epochs: {plan.finetuning.epochs}, rate {plan.finetuning.learning_rate:g}; the best epoch on dev is kept",
        ),
        *([("full fine-tuning of a target", _target_finetuning(plan))] if plan.with_ceiling else []),
        ("linear head", "one layer over the mean of the last layer's states"),
        ("attention readout", "learned queries over a third, two thirds and all of the layers; a small hidden layer"),
    ]
    if plan.source_rows is not None:
        settings.append(("cut to", f"{plan.source_rows} rows of each source, {plan.test_rows} of each test set"))
    few = f"{plan.few_dev_rows} rows of dev choose the epoch, but with all examples all of them."
    return "\n\n".join(
        [
            "## What was run",
            grid(("", ""), settings).replace("---:", "---"),
            grid(
                ("set", "role", "text", "measure", "train", "dev", "test", "test texts seen in a source"),
                [_set_row(story, name) for name in (*plan.sources, *plan.targets)],
            ),
            f"Targets are learned from {listed([show_size(size) for size in plan.sizes])}; {few}",
        ]
    )


def _target_finetuning(plan: Plan) -> str:
    return (
        f"as the whole backbone's, but so many epochs that there are {plan.least_steps} steps; where these are many, "
        "dev is looked at behind some"
    )


def _settings(settings: object) -> str:
    count, epochs, rate = (getattr(settings, n) for n in ("num_virtual_tokens", "epochs", "learning_rate"))
    return f"{count} virtual tokens from the middle layer on, at most {epochs} epochs, rate {rate:g}"


def _set_row(story: Story, name: str) -> list[str]:
    tables = story.tables[name]
    assert tables.test is not None
    is_pair = tables.train.input_kind is InputKind.PAIR
    sizes = [str(len(table.examples)) for table in (tables.train, tables.dev, tables.test)]
    role = "source" if name in story.plan.sources else "target"
    measure = measure_of(name, tables.problem_type).replace("_", "-")
    return [name, role, "pair" if is_pair else "single", measure, *sizes, str(story.shared_texts.get(name, "–"))]


# -- sources -----------------------------------------------------------------------------------------------------------

_SOURCE_COLUMNS = (
    (BARE, LINEAR),
    (BARE, ATTENTION),
    (OWN, LINEAR),
    (OWN, ATTENTION),
    (SHARED, LINEAR),
    (WHOLE, LINEAR),
)


def _sources(story: Story) -> str:
    columns = (*_SOURCE_COLUMNS, (CEILING, ""))
    header = ["source", *(f"{name}, {readout}" if readout else name for name, readout in columns)]
    rows = [[s, *(show(story.source_scores(s, n, r)) for n, r in columns)] for s in story.plan.sources]
    return "\n\n".join(
        [
            "## How well the sources are learned",
            "Test scores. An own prefix is trained under a linear head; an attention readout is fitted on it later. "
            "Shared prefix and whole backbone are trained on all sources at once, under a linear head for each.",
            grid(header, rows),
        ]
    )


# -- targets -----------------------------------------------------------------------------------------------------------


def _names(plan: Plan) -> list[str]:
    return [BARE, *map(alone, plan.sources), BEST_SINGLE, *TOGETHER]


def _targets(story: Story) -> str:
    plan = story.plan
    sections = [
        "## Light heads on fixed representations",
        f"Test scores. *{BEST_SINGLE}*: for each target, size and seed the prefix with the best dev score.",
        "### Mean over the targets",
        _averages(story),
        f"![Mean target score by representation and number of examples]({FIGURES}/targets.svg)",
    ]
    for size in plan.sizes:
        sections += [f"### {show_size(size).capitalize()}", _each_target(story, size)]
    return "\n\n".join(sections)


def _averages(story: Story) -> str:
    plan = story.plan
    columns = [(readout, size) for readout in READOUTS for size in plan.sizes]
    header = ["representation", *(f"{readout}, {show_size(size)}" for readout, size in columns)]
    rows = [[name, *(show(story.average(name, r, n)) for r, n in columns)] for name in _names(plan)]
    if plan.with_ceiling:
        rows.append([CEILING, *(show(story.average(CEILING, r, n)) if r == LINEAR else "" for r, n in columns)])
    return grid(header, rows)


def _each_target(story: Story, size: int) -> str:
    plan = story.plan
    rows = [
        [f"{name}, {readout}", *(show(story.scores(target, name, readout, size)) for target in plan.targets)]
        for readout in READOUTS
        for name in _names(plan)
    ]
    if plan.with_ceiling:
        rows.append([CEILING, *(show(story.scores(target, CEILING, "", size)) for target in plan.targets)])
    return grid(["representation", *plan.targets], rows)


# -- the update --------------------------------------------------------------------------------------------------------

_WAYS = {
    COMBINATION: "combination: one prefix trained",
    SHARED: "shared prefix: trained again on all",
    WHOLE: "whole backbone: trained again on all",
}


def _update(story: Story) -> str:
    plan = story.plan
    header = ["way", "trained parameters", "seconds", "tokens through the backbone", "seconds for the heads"]
    costs = [
        [
            _WAYS[name],
            f"{story.cost(name, lambda o: o.num_parameters):,.0f}",
            f"{story.cost(name, lambda o: o.seconds):,.0f}",
            f"{story.cost(name, lambda o: o.tokens):,.0f}",
            f"{story.head_seconds(name):,.0f}",
        ]
        for name in TOGETHER
    ]
    sizes = [show_size(size) for size in plan.sizes]
    scores = [
        [f"{name}, {readout}", *(_before_after(story, name, readout, size) for size in plan.sizes)]
        for name in TOGETHER
        for readout in READOUTS
    ]
    return "\n\n".join(
        [
            f"## The update: {plan.sources[-1]} arrives after the other {len(plan.sources) - 1}",
            "Each way changes the representation, so the heads of all targets are fitted anew in each: their seconds "
            f"are those of both readouts of all targets with {show_size(plan.sizes[-1])}, without the layers below a "
            "prefix, which run once for all. Tokens are counted in training alone; one that passes a part of the "
            "layers counts as that part.",
            grid(header, costs),
            "Mean target score, before → after:",
            grid(["representation, readout", *sizes], scores),
            f"![Mean target score after the update against its cost]({FIGURES}/update.svg)",
        ]
    )


def _before_after(story: Story, name: str, readout: str, size: int) -> str:
    before = story.average(without_last(name, story.plan), readout, size)
    return f"{show(before)} → {show(story.average(name, readout, size))}"
