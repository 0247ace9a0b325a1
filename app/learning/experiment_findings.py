"""What an experiment found, in sentences that its numbers carry: for or against the paper, and beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import mean

from app.learning.experiment_numbers import (
    BEST_SINGLE,
    Story,
    Values,
    heads_of,
    listed,
    show_points,
    show_size,
    verdict,
)
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
    Cell,
    Outcome,
    Part,
    Plan,
    without_last,
)

_SHORTFALL = 0.03  # of a source's prefix below full fine-tuning: more is called badly trained


def findings(story: Story) -> str:
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
            differences = story.difference((one, readout), (other, readout), size)
            verdicts.append(verdict(differences))
            wins = _wins(story, one, other, readout, size)
            pieces.append(f"{show_points(differences)} with {show_size(size)} ({wins}; {verdicts[-1]})")
        sentences.append(f"- {heads_of(readout).capitalize()}: {'; '.join(pieces)}.")
    counts = [sum(verdict.startswith(word) for verdict in verdicts) for word in ("for", "against", "open")]
    summary = f"For in {counts[0]}, against in {counts[1]}, open in {counts[2]} of {len(verdicts)} comparisons."
    return head, "\n".join([summary, *sentences])


def _wins(story: Story, one: str, other: str, readout: str, size: int) -> str:
    targets = story.plan.targets
    better = [mean(story.scores(t, one, readout, size)) > mean(story.scores(t, other, readout, size)) for t in targets]
    return f"higher on {sum(better)} of {len(targets)} targets"


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
            ratio = story.cost(name, figure) / max(1e-9, story.cost(COMBINATION, figure))
            ratios.append(ratio)
            pieces.append(f"{ratio:,.1f} times the {what}")
        sentences.append(f"Training the {name} again takes {listed(pieces)} of training one prefix.")
    held = "For" if min(ratios) > 1 else "Against" if max(ratios) <= 1 else "For in part"
    return "Taking in a new source is cheaper for the combination.", " ".join([f"{held}.", *sentences])


def _update_helps(story: Story) -> tuple[str, str]:
    plan, size = story.plan, story.plan.sizes[-1]
    sentences = []
    for name in TOGETHER:
        pieces = []
        for readout in READOUTS:
            change = story.difference((name, readout), (without_last(name, plan), readout), size)
            pieces.append(f"{show_points(change)} with {heads_of(readout)} ({verdict(change)})")
        sentences.append(f"{name.capitalize()}: {listed(pieces)}.")
    last = plan.sources[-1]
    return f"The arrival of {last} helps the targets (with {show_size(size)}).", " ".join(sentences)


def _trained(story: Story) -> str:
    """How well each source's own prefix is learned: against full fine-tuning, and a readout of the bare trunk."""
    pieces, gaps = [], {}
    for source in story.plan.sources:
        own, bare = (_at_its_readout(story, source, name) for name in (OWN, BARE))
        ceiling = mean(story.source_scores(source, CEILING, ""))
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
        f"{text} {listed(bad)} {are} more than {100 * _SHORTFALL:.0f} points below the better of the two, "
        "which what their combination shows must be read with."
    )


def _at_its_readout(story: Story, source: str, name: str) -> float:
    """The mean test score with the readout that dev prefers."""

    def dev(readout: str) -> float:
        return mean(story.found[Cell(Part.SOURCE, seed, source, name, readout)].dev for seed in story.plan.seeds)

    return mean(story.source_scores(source, name, max(READOUTS, key=dev)))


def _ceiling_steps(plan: Plan) -> str:
    if plan.source_rows is None:
        return ""
    steps = plan.finetuning.epochs * math.ceil(plan.source_rows / plan.finetuning.batch_size)
    return f" Full fine-tuning took {steps} steps: a ceiling of so little training, not of the source."


def _readouts(story: Story) -> str:
    sizes = story.plan.sizes
    on_bare = [story.difference((BARE, ATTENTION), (BARE, LINEAR), size) for size in sizes]
    against = [story.difference((BARE, ATTENTION), (COMBINATION, LINEAR), size) for size in sizes]

    def told(differences: Sequence[Values]) -> str:
        pieces = (f"{show_points(d)} with {show_size(size)}" for d, size in zip(differences, sizes, strict=True))
        return ", ".join(pieces)

    return (
        f"An attention readout of the bare trunk against a linear head on the bare trunk, in points: {told(on_bare)}; "
        f"against a linear head on the combination: {told(against)}."
    )


def _ceiling(story: Story) -> str:
    options = [(name, readout) for name in (BARE, BEST_SINGLE, *TOGETHER) for readout in READOUTS]
    pieces = []
    for size in story.plan.sizes:
        means = {option: mean(story.average(*option, size)) for option in options}
        best = max(options, key=means.__getitem__)
        difference = story.difference(best, (CEILING, ""), size)
        pieces.append(f"{show_points(difference)} with {show_size(size)} ({best[0]}, {best[1]})")
    return (
        "The best fixed representation against full fine-tuning of a backbone for each target, in points: "
        f"{', '.join(pieces)}."
    )
