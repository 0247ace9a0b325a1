"""The experiment's page: tables, plots, and what was found, in sentences that its numbers carry.

Knows finished cells and markdown; runs nothing. A claim counts as decided where the mean over seeds of its difference
is larger than the differences' standard deviation, and than a tenth of a point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from xml.etree.ElementTree import Element, SubElement, tostring

from app.domain import InputKind
from app.errors import SettingsError
from app.learning.experiment_plan import (
    ALL,
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
    Cell,
    Outcome,
    Part,
    Plan,
    alone,
    measure_of,
    without_last,
)
from app.learning.study import Tables

BEST_SINGLE = "best single prefix"  # for each target, number of examples and seed the one that dev picks
FIGURES = "_experiment"  # the plots' folder; one that begins so is no artifact
_LINES = (BARE, BEST_SINGLE, COMBINATION, SHARED, WHOLE)
_LEAST_DIFFERENCE = 0.001  # a tenth of a point
_SHORTFALL = 0.03  # of a source's prefix below full fine-tuning: more is called badly trained


@dataclass(frozen=True, slots=True, eq=False)
class Story:
    plan: Plan
    found: Mapping[Cell, Outcome]
    tables: Mapping[str, Tables]
    shared_texts: Mapping[str, int]  # target → test texts that a source is trained on
    command: str
    machine: str  # in words
    model: str


def write(out: Path, story: Story) -> None:
    """The page at `out` and its plots in a folder beside it."""
    try:
        figures = out.parent / FIGURES
        figures.mkdir(parents=True, exist_ok=True)
        (figures / "targets.svg").write_text(_targets_plot(story), encoding="utf-8")
        (figures / "update.svg").write_text(_update_plot(story), encoding="utf-8")
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
        _findings(story),
        _sources(story),
        _targets(story),
        _update(story),
    ]
    return "\n\n".join(parts) + "\n"


# -- numbers -----------------------------------------------------------------------------------------------------------

_Values = list[float]  # one a seed


def _source_scores(story: Story, source: str, name: str, readout: str) -> _Values:
    cells = (Cell(Part.SOURCE, seed, source, name, readout) for seed in story.plan.seeds)
    return [story.found[cell].score for cell in cells]


def _scores(story: Story, target: str, name: str, readout: str, examples: int) -> _Values:
    if name == CEILING:
        readout = ""
    if name == BEST_SINGLE:
        return [_best_single(story, seed, target, readout, examples).score for seed in story.plan.seeds]
    return [story.found[Cell(Part.TARGET, s, target, name, readout, examples)].score for s in story.plan.seeds]


def _best_single(story: Story, seed: int, target: str, readout: str, examples: int) -> Outcome:
    names = map(alone, story.plan.sources)
    singles = [story.found[Cell(Part.TARGET, seed, target, name, readout, examples)] for name in names]
    return max(singles, key=lambda outcome: outcome.dev)


def _average(story: Story, name: str, readout: str, examples: int) -> _Values:
    """The mean over targets, for each seed."""
    each = [_scores(story, target, name, readout, examples) for target in story.plan.targets]
    return [mean(values) for values in zip(*each, strict=True)]


def _cost(story: Story, name: str, figure: Callable[[Outcome], float]) -> float:
    """Of one training, the mean over seeds."""
    source = story.plan.sources[-1]
    return mean(figure(story.found[_training_cell(name, seed, source)]) for seed in story.plan.seeds)


def _training_cell(name: str, seed: int, last: str) -> Cell:
    """What it takes to take in the last source: a prefix of its own, or all trained again."""
    if name == COMBINATION:
        return Cell(Part.SOURCE, seed, last, OWN, LINEAR)
    return Cell(Part.TRAINING, seed, "", name)


def _head_seconds(story: Story, name: str) -> float:
    """Of the heads of all targets, both readouts, at the largest size; with the states that they read."""
    plan, size = story.plan, story.plan.sizes[-1]
    return mean(
        sum(story.found[Cell(Part.TARGET, s, t, name, r, size)].seconds for t in plan.targets for r in READOUTS)
        for s in plan.seeds
    )


# -- words -------------------------------------------------------------------------------------------------------------


def _shown(values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def _points(values: Sequence[float]) -> str:
    shown = f"{100 * mean(values):+.1f}".replace("-0.0", "+0.0")
    return shown + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def _size(examples: int) -> str:
    return "all examples" if examples == ALL else f"{examples} examples"


def _grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table, the first column to the left."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _verdict(differences: Sequence[float]) -> str:
    if len(differences) < 2:  # one seed has no spread
        return "open"
    if abs(mean(differences)) < _LEAST_DIFFERENCE:
        return "open: alike"
    if abs(mean(differences)) <= stdev(differences):
        return "open: within the spread"
    return "for" if mean(differences) > 0 else "against"


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
            _grid(("", ""), settings).replace("---:", "---"),
            _grid(
                ("set", "role", "text", "measure", "train", "dev", "test", "test texts seen in a source"),
                [_set_row(story, name) for name in (*plan.sources, *plan.targets)],
            ),
            f"Targets are learned from {_listed([_size(size) for size in plan.sizes])}; {few}",
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


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


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
    rows = [[s, *(_shown(_source_scores(story, s, n, r)) for n, r in columns)] for s in story.plan.sources]
    return "\n\n".join(
        [
            "## How well the sources are learned",
            "Test scores. An own prefix is trained under a linear head; an attention readout is fitted on it later. "
            "Shared prefix and whole backbone are trained on all sources at once, under a linear head for each.",
            _grid(header, rows),
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
        sections += [f"### {_size(size).capitalize()}", _each_target(story, size)]
    return "\n\n".join(sections)


def _averages(story: Story) -> str:
    plan = story.plan
    columns = [(readout, size) for readout in READOUTS for size in plan.sizes]
    header = ["representation", *(f"{readout}, {_size(size)}" for readout, size in columns)]
    rows = [[name, *(_shown(_average(story, name, r, n)) for r, n in columns)] for name in _names(plan)]
    if plan.with_ceiling:
        rows.append([CEILING, *(_shown(_average(story, CEILING, r, n)) if r == LINEAR else "" for r, n in columns)])
    return _grid(header, rows)


def _each_target(story: Story, size: int) -> str:
    plan = story.plan
    rows = [
        [f"{name}, {readout}", *(_shown(_scores(story, target, name, readout, size)) for target in plan.targets)]
        for readout in READOUTS
        for name in _names(plan)
    ]
    if plan.with_ceiling:
        rows.append([CEILING, *(_shown(_scores(story, target, CEILING, "", size)) for target in plan.targets)])
    return _grid(["representation", *plan.targets], rows)


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
            f"{_cost(story, name, lambda o: o.num_parameters):,.0f}",
            f"{_cost(story, name, lambda o: o.seconds):,.0f}",
            f"{_cost(story, name, lambda o: o.tokens):,.0f}",
            f"{_head_seconds(story, name):,.0f}",
        ]
        for name in TOGETHER
    ]
    sizes = [_size(size) for size in plan.sizes]
    scores = [
        [f"{name}, {readout}", *(_before_after(story, name, readout, size) for size in plan.sizes)]
        for name in TOGETHER
        for readout in READOUTS
    ]
    return "\n\n".join(
        [
            f"## The update: {plan.sources[-1]} arrives after the other {len(plan.sources) - 1}",
            "Each way changes the representation, so the heads of all targets are fitted anew in each: their seconds "
            f"are those of both readouts of all targets with {_size(plan.sizes[-1])}, without the layers below a "
            "prefix, which run once for all. Tokens are counted in training alone; one that passes a part of the "
            "layers counts as that part.",
            _grid(header, costs),
            "Mean target score, before → after:",
            _grid(["representation, readout", *sizes], scores),
            f"![Mean target score after the update against its cost]({FIGURES}/update.svg)",
        ]
    )


def _before_after(story: Story, name: str, readout: str, size: int) -> str:
    before = _average(story, without_last(name, story.plan), readout, size)
    return f"{_shown(before)} → {_shown(_average(story, name, readout, size))}"


# -- what was found ----------------------------------------------------------------------------------------------------


def _findings(story: Story) -> str:
    claims = [
        _claim(story, "The combination beats the bare trunk.", COMBINATION, BARE),
        _claim(story, f"The combination beats the {BEST_SINGLE}.", COMBINATION, BEST_SINGLE),
        _claim(story, "The combination beats one shared prefix trained on all sources.", COMBINATION, SHARED),
        _claim(
            story, "The combination beats the whole backbone trained on all sources, then frozen.", COMBINATION, WHOLE
        ),
        _cheaper(story),
        _update_helps(story),
    ]
    notes = [_trained(story), _readouts(story), *([_ceiling(story)] if story.plan.with_ceiling else [])]
    rule = (
        "Differences are in points of the mean target score. A claim is called decided (*for* or *against* the paper) "
        "where the mean of its difference over seeds is larger than the difference's standard deviation, and than a "
        "tenth of a point, else *open*."
    )
    if len(story.plan.seeds) < 2:
        rule += " One seed has no spread: whatever its numbers, each claim about scores stays open."
    sections = ["## What was found", rule, *(f"**{head}** {text}" for head, text in claims)]
    return "\n\n".join([*sections, "Beside the paper's claims:", "\n".join(f"- {note}" for note in notes)])


def _claim(story: Story, head: str, one: str, other: str) -> tuple[str, str]:
    verdicts: list[str] = []
    sentences = []
    for readout in READOUTS:
        pieces = []
        for size in story.plan.sizes:
            differences = _difference(story, (one, readout), (other, readout), size)
            verdicts.append(_verdict(differences))
            wins = _wins(story, one, other, readout, size)
            pieces.append(f"{_points(differences)} with {_size(size)} ({wins}; {verdicts[-1]})")
        sentences.append(f"- {_how(readout).capitalize()}: {'; '.join(pieces)}.")
    counts = [sum(verdict.startswith(word) for verdict in verdicts) for word in ("for", "against", "open")]
    summary = f"For in {counts[0]}, against in {counts[1]}, open in {counts[2]} of {len(verdicts)} comparisons."
    return head, "\n".join([summary, *sentences])


def _difference(story: Story, one: tuple[str, str], other: tuple[str, str], size: int) -> _Values:
    """Of two (representation, readout), seed by seed."""
    pairs = zip(_average(story, *one, size), _average(story, *other, size), strict=True)
    return [a - b for a, b in pairs]


def _wins(story: Story, one: str, other: str, readout: str, size: int) -> str:
    targets = story.plan.targets
    better = [
        mean(_scores(story, t, one, readout, size)) > mean(_scores(story, t, other, readout, size)) for t in targets
    ]
    return f"higher on {sum(better)} of {len(targets)} targets"


def _how(readout: str) -> str:
    return "linear heads" if readout == LINEAR else "attention readouts"


def _cheaper(story: Story) -> tuple[str, str]:
    figures: dict[str, Callable[[Outcome], float]] = {
        "trained parameters": lambda o: o.num_parameters,
        "tokens through the backbone": lambda o: o.tokens,
        "seconds": lambda o: o.seconds,
    }
    sentences, ratios = [], []
    for name in (SHARED, WHOLE):
        pieces = []
        for what, figure in figures.items():
            ratio = _cost(story, name, figure) / max(1e-9, _cost(story, COMBINATION, figure))
            ratios.append(ratio)
            pieces.append(f"{ratio:,.1f} times the {what}")
        sentences.append(f"Training the {name} again takes {_listed(pieces)} of training one prefix.")
    held = "For" if min(ratios) > 1 else "Against" if max(ratios) <= 1 else "For in part"
    return "Taking in a new source is cheaper for the combination.", " ".join([f"{held}.", *sentences])


def _update_helps(story: Story) -> tuple[str, str]:
    plan, size = story.plan, story.plan.sizes[-1]
    sentences = []
    for name in TOGETHER:
        pieces = []
        for readout in READOUTS:
            change = _difference(story, (name, readout), (without_last(name, plan), readout), size)
            pieces.append(f"{_points(change)} with {_how(readout)} ({_verdict(change)})")
        sentences.append(f"{name.capitalize()}: {_listed(pieces)}.")
    last = plan.sources[-1]
    return f"The arrival of {last} helps the targets (with {_size(size)}).", " ".join(sentences)


def _trained(story: Story) -> str:
    """How well each source's own prefix is learned: against full fine-tuning, and a readout of the bare trunk."""
    pieces, gaps = [], {}
    for source in story.plan.sources:
        own, bare = (_at_its_readout(story, source, name) for name in (OWN, BARE))
        ceiling = mean(_source_scores(story, source, CEILING, ""))
        pieces.append(f"{source} {100 * (own - ceiling):+.1f} and {100 * (own - bare):+.1f}")
        gaps[source] = own - max(ceiling, bare)
    text = (
        "Own prefixes against full fine-tuning of the same source and against the bare trunk, each at the readout that "
        f"is better on dev, in points: {', '.join(pieces)}.{_ceiling_steps(story.plan)}"
    )
    bad = [source for source, gap in gaps.items() if gap < -_SHORTFALL]
    if not bad:
        return text
    are = "is" if len(bad) == 1 else "are"
    return (
        f"{text} {_listed(bad)} {are} more than {100 * _SHORTFALL:.0f} points below the better of the two, "
        "which what their combination shows must be read with."
    )


def _at_its_readout(story: Story, source: str, name: str) -> float:
    """The mean test score with the readout that dev prefers."""

    def dev(readout: str) -> float:
        return mean(story.found[Cell(Part.SOURCE, seed, source, name, readout)].dev for seed in story.plan.seeds)

    return mean(_source_scores(story, source, name, max(READOUTS, key=dev)))


def _ceiling_steps(plan: Plan) -> str:
    if plan.source_rows is None:
        return ""
    steps = plan.finetuning.epochs * math.ceil(plan.source_rows / plan.finetuning.batch_size)
    return f" Full fine-tuning took {steps} steps: a ceiling of so little training, not of the source."


def _readouts(story: Story) -> str:
    sizes = story.plan.sizes
    on_bare = [_difference(story, (BARE, ATTENTION), (BARE, LINEAR), size) for size in sizes]
    against = [_difference(story, (BARE, ATTENTION), (COMBINATION, LINEAR), size) for size in sizes]

    def told(differences: Sequence[_Values]) -> str:
        pieces = (f"{_points(d)} with {_size(size)}" for d, size in zip(differences, sizes, strict=True))
        return ", ".join(pieces)

    return (
        f"An attention readout of the bare trunk against a linear head on the bare trunk, in points: {told(on_bare)}; "
        f"against a linear head on the combination: {told(against)}."
    )


def _ceiling(story: Story) -> str:
    options = [(name, readout) for name in (BARE, BEST_SINGLE, *TOGETHER) for readout in READOUTS]
    pieces = []
    for size in story.plan.sizes:
        means = {option: mean(_average(story, *option, size)) for option in options}
        best = max(options, key=means.__getitem__)
        difference = _difference(story, best, (CEILING, ""), size)
        pieces.append(f"{_points(difference)} with {_size(size)} ({best[0]}, {best[1]})")
    return (
        "The best fixed representation against full fine-tuning of a backbone for each target, in points: "
        f"{', '.join(pieces)}."
    )


# -- plots -------------------------------------------------------------------------------------------------------------

# Okabe & Ito's colours, which the colour-blind can tell apart
_COLOURS = {
    BARE: "#555555",
    BEST_SINGLE: "#e69f00",
    COMBINATION: "#0072b2",
    SHARED: "#009e73",
    WHOLE: "#d55e00",
    CEILING: "#cc79a7",
}
_PANEL = (60.0, 40.0, 300.0, 220.0)  # left, top, width, height


@dataclass(frozen=True, slots=True)
class _Scale:
    low: float
    high: float
    start: float  # pixels
    stop: float

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


def _targets_plot(story: Story) -> str:
    plan = story.plan
    names = [*_LINES, *([CEILING] if plan.with_ceiling else [])]
    left, top, width, height = _PANEL
    svg = _svg(2 * (left + width) + 30, top + height + 60 + 18 * math.ceil(len(names) / 3))
    every = [v for n in _LINES for r in READOUTS for size in plan.sizes for v in _average(story, n, r, size)]
    if plan.with_ceiling:
        every += [v for size in plan.sizes for v in _average(story, CEILING, "", size)]
    y = _scale(every, top + height, top)
    for index, readout in enumerate(READOUTS):
        start = left + index * (left + width)
        x = _Scale(0, max(1, len(plan.sizes) - 1), start + 30, start + width - 30)
        _frame(svg, start, y, f"{_how(readout)}: mean score over targets")
        for place, size in enumerate(plan.sizes):
            _text(svg, _size(size), x.at(place), top + height + 18, "middle")
        for nudge, name in enumerate(names):
            values = [_average(story, name, readout, size) for size in plan.sizes]
            _series(svg, [(x.at(i) + 3 * (nudge - 2), v) for i, v in enumerate(values)], y, _COLOURS[name])
    _legend(svg, names, top + height + 45)
    return tostring(svg, encoding="unicode") + "\n"


def _update_plot(story: Story) -> str:
    """Tokens through the backbone, on a logarithmic scale, against the score with most examples."""
    size = story.plan.sizes[-1]
    left, top, width, height = _PANEL
    svg = _svg(2 * (left + width) + 30, top + height + 80)
    every = [v for name in TOGETHER for readout in READOUTS for v in _average(story, name, readout, size)]
    y = _scale(every, top + height, top)
    costs = {name: math.log10(max(1.0, _cost(story, name, lambda o: o.tokens))) for name in TOGETHER}
    low, high = math.floor(min(costs.values())), math.floor(max(costs.values())) + 1
    for index, readout in enumerate(READOUTS):
        start = left + index * (left + width)
        x = _Scale(low, high, start + 15, start + width - 15)
        _frame(svg, start, y, f"{_how(readout)}: mean score over targets, {_size(size)}")
        for power in range(low, high + 1):
            _text(svg, f"{10**power:,}", x.at(power), top + height + 18, "middle")
        _text(svg, "tokens through the backbone to take the source in", start + width / 2, top + height + 36, "middle")
        for name in TOGETHER:
            _series(svg, [(x.at(costs[name]), _average(story, name, readout, size))], y, _COLOURS[name])
    _legend(svg, TOGETHER, top + height + 62)
    return tostring(svg, encoding="unicode") + "\n"


def _svg(width: float, height: float) -> Element:
    box = f"0 0 {width:g} {height:g}"
    style = "font-family: sans-serif; font-size: 11px"
    svg = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "viewBox": box, "width": f"{width:g}", "style": style})
    SubElement(svg, "rect", {"width": "100%", "height": "100%", "fill": "#ffffff"})
    return svg


def _scale(values: Sequence[float], start: float, stop: float) -> _Scale:
    """From the tenth below to the tenth above, where there is that much between."""
    step = 0.1 if max(values) - min(values) > 0.1 else 0.02
    low, high = math.floor(min(values) / step) * step, math.ceil(max(values) / step) * step
    return _Scale(low, max(high, low + step), start, stop)


def _frame(svg: Element, left: float, y: _Scale, title: str) -> None:
    width = _PANEL[2]
    _text(svg, title, left, y.stop - 14, "start")
    for index in range(6):
        value = y.low + (y.high - y.low) * index / 5
        _line(svg, [(left, y.at(value)), (left + width, y.at(value))], "#dddddd", 1)
        _text(svg, f"{value:.3f}", left - 6, y.at(value) + 4, "end")


def _series(svg: Element, points: Sequence[tuple[float, Sequence[float]]], y: _Scale, colour: str) -> None:
    """A line through means, each with a bar of one standard deviation to each side."""
    _line(svg, [(x, y.at(mean(values))) for x, values in points], colour, 2)
    for x, values in points:
        middle, spread = mean(values), stdev(values) if len(values) > 1 else 0.0
        _line(svg, [(x, y.at(middle - spread)), (x, y.at(middle + spread))], colour, 1)
        SubElement(svg, "circle", {"cx": f"{x:.1f}", "cy": f"{y.at(middle):.1f}", "r": "3.5", "fill": colour})


def _legend(svg: Element, names: Sequence[str], top: float) -> None:
    for index, name in enumerate(names):
        x, y = _PANEL[0] + 220 * (index % 3), top + 18 * (index // 3)
        _line(svg, [(x, y - 4), (x + 18, y - 4)], _COLOURS[name], 3)
        _text(svg, name, x + 24, y, "start")


def _line(svg: Element, points: Sequence[tuple[float, float]], colour: str, width: float) -> None:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    SubElement(svg, "polyline", {"points": places, "fill": "none", "stroke": colour, "stroke-width": f"{width:g}"})


def _text(svg: Element, text: str, x: float, y: float, anchor: str) -> None:
    attributes = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, "fill": "#333333"}
    SubElement(svg, "text", attributes).text = text
