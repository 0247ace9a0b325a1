"""`report.html`: what was learned, how good it is and what it costs, on one page that opens anywhere.

Knows the page and plain numbers; nothing of training, models or files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from app.domain import ProblemType
from app.learning import drawing
from app.learning.baselines import CEILING, LINEAR, TFIDF

_MAX_TEXT = 300  # characters of one text
_MAX_MATRIX = 30  # labels of a confusion matrix; above, its largest cells are listed
_MAX_ROWS = 100  # of the longer tables
_MAX_NAMED = 8  # labels that the first sentence names
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_NAMES = {
    ProblemType.SINGLE_LABEL: "single-label classification",
    ProblemType.MULTI_LABEL: "multi-label classification",
    "macro_f1": "macro-F1",
    "micro_f1": "micro-F1",
    "f1": "F1",
    "mcc": "MCC",
    "auroc": "AUROC",
    "ece": "ECE",
    "rmse": "RMSE",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    TFIDF: "TF-IDF + a linear model",
}


def render(report: Mapping[str, Any]) -> str:
    """The whole page. Whatever `report` does not have is left out; every text in it is taken for hostile."""
    report = _clean(report)
    own = _Quality.of(report)
    details = _details(report, own)
    return _TEMPLATE.render(
        report=report,
        created=_moment(report.get("created") or ""),
        kind=_words(report.get("problem_type") or ""),
        measure=own.measure,
        lead=_lead(report, own),
        warnings=list(_warnings(report, own)),
        cards=list(_cards(report, own)),
        candidates=report.get("candidates") or [],
        curve=_curve(report, own),
        band=_band(report.get("tolerance")),
        sizes=report.get("sizes") or [],
        sizes_curve=_sizes_curve(report, own),
        baselines=_baselines(own),
        figures=report.get("figures") or {},
        figure_names=_columns(report.get("figures") or {}),
        split=details.get("split"),
        labels=_worst_first(details.get("per_label") or []),
        matrix=_matrix(details["confusion"]),
        pairs=_pairs(details["confusion"]),
        reliability=_reliability(details.get("reliability") or []),
        bins=details.get("reliability") or [],
        ece=details.get("ece"),
        scatter=drawing.scatter(details.get("points") or [], "right", "found"),
        mistakes=report.get("mistakes") or [],
        epochs=_epochs(report.get("epochs") or [], own.measure),
        max_rows=_MAX_ROWS,
    )


# -- values in words ---------------------------------------------------------------------------------------------------


def _clean(value: Any) -> Any:
    """A copy whose texts can be written as UTF-8 and hold nothing that no page may hold."""
    if isinstance(value, str):
        return _CONTROL.sub("\ufffd", value.encode("utf-8", "replace").decode("utf-8"))
    if isinstance(value, Mapping):
        return {_clean(key): _clean(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_clean(item) for item in value]
    return value


def _cut(text: Any, length: int = _MAX_TEXT) -> str:
    whole = str(text)
    return whole if len(whole) <= length else whole[:length] + "…"


def _number(value: Any, digits: int = 3) -> str:
    """With fixed decimals; a dash for what is no number."""
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return f"{float(value):,.{digits}f}" if is_number else "–"


def _value(value: Any) -> str:
    """Whole numbers as they are, others with three decimals."""
    if isinstance(value, float) or value is None:
        return _number(value)
    if isinstance(value, int):
        return f"{value:,}"
    return ", ".join(map(_value, value)) if isinstance(value, list) else _cut(value)


def _setting(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "–" if value is None else ("no", "yes")[value]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_setting(item)}" for name, item in value.items())
    return _cut(", ".join(map(_setting, value)) if isinstance(value, list) else value) or "–"


def _words(name: str) -> str:
    """How a figure, setting or baseline is called in prose."""
    return _NAMES.get(name, name.replace("num_", "number of ").replace("_", " "))


def _title(name: str) -> str:
    words = _words(name)
    return words[:1].upper() + words[1:]


def _duration(seconds: Any) -> str:
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _size(count: Any) -> str:
    if not isinstance(count, int | float) or not math.isfinite(count):
        return "–"
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def _moment(text: str) -> str:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return text
    zone = moment.tzname() or ""
    return f"{moment.day} {moment:%B %Y, %H:%M} {zone}".strip()


def _counted(count: int, noun: str) -> str:
    return f"one {noun}" if count == 1 else f"{count:,} {noun}{'es' if noun.endswith('x') else 's'}"


def _band(tolerance: Any) -> str:
    """A tolerance in points."""
    return "" if tolerance is None else f"{tolerance * 100:g} points"


# -- how good it is ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Baseline:
    """A row of the table: what one way of doing it reaches."""

    name: str
    dev: float | None
    test: float | None
    difference: float | None = None  # to the artifact, where both were measured
    width: float = 0.0  # of its bar, in per cent
    is_own: bool = False


@dataclass(frozen=True, slots=True)
class _Quality:
    """The artifact's figure and those of the baselines, on test or, where there is none, on dev."""

    measure: str
    split: str
    value: float | None
    rows: int | None
    baselines: Mapping[str, Mapping[str, Any]]  # name → split → figures
    dev: float | None
    key: str
    is_linear: bool  # the artifact is itself what the linear baseline is

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> _Quality:
        figures, key = report.get("figures") or {}, report.get("measure") or "accuracy"
        split = "test" if figures.get("test") else "dev"
        measured = figures.get(split) or {}
        dev = (figures.get("dev") or {}).get(key)
        baselines = report.get("baselines") or {}
        return cls(_words(key), split, measured.get(key), measured.get("rows"), baselines, dev, key, _is_linear(report))

    def reached(self, name: str) -> float | None:
        """By a baseline, on the same split."""
        value = (self.baselines[name].get(self.split) or {}).get(self.key)
        return value if isinstance(value, int | float) and math.isfinite(value) else None

    def difference(self, value: float | None) -> float | None:
        """To the artifact, as the page's three decimals show it."""
        return None if value is None or self.value is None else round(round(value, 3) - round(self.value, 3), 3)

    @property
    def best(self) -> tuple[str, float] | None:
        """The best of what the artifact has to beat: not a copy of the backbone, which is the ceiling."""
        rivals = [name for name in self.baselines if name != CEILING and not (name == LINEAR and self.is_linear)]
        reached = [(name, value) for name in rivals if (value := self.reached(name)) is not None]
        return max(reached, key=lambda pair: pair[1], default=None)


def _is_linear(report: Mapping[str, Any]) -> bool:
    recipe, cost = report.get("recipe") or {}, report.get("cost") or {}
    is_plain = recipe.get("readout") in ("mean", "tokens") and len(recipe.get("read_layers") or []) <= 1
    return is_plain and not recipe.get("hidden") and cost.get("passes", 1.0) <= 1.0


def _lead(report: Mapping[str, Any], own: _Quality) -> str:
    return " ".join(filter(None, [_what(report), _choice(report, own), _compression(report, own), *_how_good(own)]))


def _what(report: Mapping[str, Any]) -> str:
    task, labels = report.get("task") or "This task", [_cut(label, 60) for label in report.get("labels") or []]
    names = f": {', '.join(labels)}" if 0 < len(labels) <= _MAX_NAMED else ""
    match report.get("problem_type"):
        case ProblemType.SINGLE_LABEL:
            return f"{task} gives each text one of {_counted(len(labels), 'label')}{names}."
        case ProblemType.MULTI_LABEL:
            return f"{task} gives each text none, one or several of {_counted(len(labels), 'label')}{names}."
        case ProblemType.REGRESSION:
            return f"{task} gives each text a number."
        case ProblemType.TOKEN:
            return f"{task} gives each word of a text one of {_counted(len(labels), 'tag')}{names}."
        case _:
            return f"{task} was learned."


def _choice(report: Mapping[str, Any], own: _Quality) -> str:
    """Which arrangement, and why; nothing where neither is told."""
    candidates = [c for c in report.get("candidates") or [] if _number(c.get("dev")) != "–"]
    chosen = next((c for c in candidates if c.get("chosen")), None)
    if chosen is None:
        return "" if candidates or not report.get("recipe") else f"It was given {_arrangement(report['recipe'])}."
    best, tolerance = max(c["dev"] for c in candidates), report.get("tolerance") or 0.0
    near = [c["passes"] for c in candidates if c["dev"] >= best - tolerance - 1e-9]
    taken = f"Of {_counted(len(candidates), 'arrangement')} “{chosen['name']}” was taken"
    reached = f"dev {own.measure} {_number(chosen['dev'])} at {_number(chosen['passes'], 2)} passes"
    if len(candidates) == 1:
        return f"The only arrangement tried is “{chosen['name']}” ({reached})."
    if chosen["dev"] < best - tolerance - 1e-9 or chosen["passes"] > min(near) + 1e-9:
        return f"{taken} ({reached})."
    if chosen["dev"] >= best:
        return f"{taken}: the best on dev, and none as good is cheaper ({reached})."
    within = _band(tolerance)
    return f"{taken}: the cheapest within {within} of the best ({reached}; the best has {_number(best)})."


def _compression(report: Mapping[str, Any], own: _Quality) -> str:
    """What was made smaller, and what that lost; the first of the sizes is the artifact as it was."""
    sizes = report.get("sizes") or []
    chosen = next((size for size in sizes if size.get("chosen")), None)
    if chosen is None:
        return ""
    before, after = (
        f"{_counted(size['num_virtual_tokens'], 'virtual token')}, {_size(size['size_bytes'])}"
        for size in (sizes[0], chosen)
    )
    lost = _points(round(chosen["dev"], 3) - round(sizes[0]["dev"], 3))
    reached = f"dev {own.measure} {_number(chosen['dev'])}, against {_number(sizes[0]['dev'])} before: {lost}"
    return f"Its prefix was compressed, {before} to {after}, with the head {chosen['head']} ({reached})."


def _arrangement(recipe: Mapping[str, Any]) -> str:
    row = "the bare trunk"
    if recipe.get("num_virtual_tokens"):
        row = f"an own prefix of {recipe['num_virtual_tokens']} tokens from layer {recipe.get('first_layer', 0)} on"
    elif recipe.get("prefixes"):
        row = f"{_counted(len(recipe['prefixes']), 'frozen prefix')} combined"
    layers = recipe.get("read_layers") or []
    readout = f", {_cut(recipe['readout'])}" if recipe.get("readout") else ""
    return f"{row}{readout}" + (f" of layers {_setting(layers)}" if layers else "")


def _how_good(own: _Quality) -> Iterator[str]:
    if own.value is None:
        return
    rows = f"{_counted(own.rows, 'row')} of {own.split}" if own.rows else own.split
    yield f"On {rows} its {own.measure} is {_number(own.value)}."
    if own.best is not None:
        name, value = own.best
        yield f"The best baseline, {_words(name)}, reaches {_number(value)}: {_points(own.difference(value))}."
    ceiling = own.reached(CEILING) if CEILING in own.baselines else None
    if ceiling is not None:
        difference = _points(own.difference(ceiling))
        yield f"Full fine-tuning, with a copy of the whole backbone, reaches {_number(ceiling)}: {difference}."


def _points(difference: float | None) -> str:
    """A difference in words."""
    points = 0.0 if difference is None else round(difference * 100, 1)
    return "the same" if points == 0 else f"{abs(points):.1f} points {'more' if points > 0 else 'less'}"


def _warnings(report: Mapping[str, Any], own: _Quality) -> Iterator[tuple[str, str]]:
    """(how bad, a sentence)."""
    difference = None if own.best is None else own.difference(own.best[1])
    if own.best is not None and difference is not None and difference >= 0:
        comparison = "better than" if difference > 0 else "as good as"
        yield (
            "bad",
            f"Ship nothing: the baseline {_words(own.best[0])} is {comparison} this artifact on {own.split} "
            f"({own.measure} {_number(own.best[1])} against {_number(own.value)}).",
        )
    if report.get("interrupted"):
        yield (
            "mild",
            "The run was interrupted: this is the best that was there by then, and what was not tried, trained to its "
            "end or measured any more is missing beside it.",
        )
    if own.split == "dev" and "test" in (report.get("data") or {}):
        yield "mild", "Measuring was interrupted: the dev set picked what is measured on it, so its figures flatter."
    elif own.split == "dev":
        yield (
            "mild",
            "There is no test set: the dev set picked what is measured on it, so its figures flatter. "
            "Give rows of their own with --test.",
        )
    if report.get("findings"):
        count = len(report["findings"])
        verb, object_ = ("stands", "it") if count == 1 else ("stand", "them")
        yield "mild", f"{_counted(count, 'finding').capitalize()} about the data {verb} below: read {object_} first."


def _cards(report: Mapping[str, Any], own: _Quality) -> Iterator[tuple[str, str, str]]:
    """(what, how much, of what)."""
    cost = report.get("cost") or {}
    if own.value is not None:
        yield (
            f"{_title(own.measure)} on {own.split}",
            _number(own.value),
            f"dev {_number(own.dev)}" if own.split == "test" else "",
        )
    if own.best is not None:
        yield "Best baseline", _number(own.best[1]), _words(own.best[0])
    if "passes" in cost:
        alone = f"alone {_number(cost['passes_alone'], 2)}" if "passes_alone" in cost else ""
        yield "Cost in passes", _number(cost["passes"], 2), alone
    if "size_bytes" in cost:
        yield "Size", _size(cost["size_bytes"]), "on disk"
    if "training_s" in cost:
        yield "Training", _duration(cost["training_s"]), "in all, frozen layers included"


def _baselines(own: _Quality) -> list[_Baseline]:
    """The artifact and the baselines, the best first."""
    if not own.baselines:
        return []
    rows = [
        _Baseline("This artifact", own.dev, own.value if own.split == "test" else None, None, _bar(own.value), True)
    ]
    for name, splits in own.baselines.items():
        dev, test = ((splits.get(split) or {}).get(own.key) for split in ("dev", "test"))
        reached = own.reached(name)
        rows.append(_Baseline(_title(name), dev, test, own.difference(reached), _bar(reached)))
    return sorted(rows, key=lambda row: row.width, reverse=True)


def _bar(value: Any) -> float:
    return 100 * min(1.0, max(0.0, value)) if _number(value) != "–" else 0.0


def _columns(figures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """All names of figures, rows last."""
    names = dict.fromkeys(name for measured in figures.values() for name in measured)
    return sorted(names, key=lambda name: name == "rows")


# -- charts and tables -------------------------------------------------------------------------------------------------


def _details(report: Mapping[str, Any], own: _Quality) -> dict[str, Any]:
    """The details of one split, whether under the names that `figures.details` gives them or under the page's own."""
    details = dict(report.get("details") or {})
    confusion = details.get("confusion") or {"pairs": details.get("confused") or []}
    if isinstance(confusion, list):
        confusion = {"labels": report.get("labels") or [], "counts": confusion}
    measured = (report.get("figures") or {}).get(details.get("split") or own.split) or {}
    named = {"per_label": details.get("labels"), "ece": measured.get("ece"), "split": own.split}
    return named | details | {"confusion": confusion}


def _curve(report: Mapping[str, Any], own: _Quality) -> str:
    marks = [
        drawing.Mark(number, float(c["passes"]), float(c["dev"]), bool(c.get("chosen")))
        for number, c in enumerate(report.get("candidates") or [], 1)
        if _number(c.get("passes")) != "–" and _number(c.get("dev")) != "–"
    ]
    return drawing.curve(marks, report.get("tolerance"), "passes", f"dev {own.measure}") if len(marks) > 1 else ""


def _sizes_curve(report: Mapping[str, Any], own: _Quality) -> str:
    sizes = report.get("sizes") or []
    marks = [
        drawing.Mark(number, float(size["num_virtual_tokens"]), float(size["dev"]), bool(size.get("chosen")))
        for number, size in enumerate(sizes, 1)
    ]
    if not marks:
        return ""
    return drawing.curve(marks, report.get("tolerance"), "virtual tokens", f"dev {own.measure}", marks[0].y)


def _reliability(bins: Sequence[Mapping[str, Any]]) -> str:
    return drawing.reliability([drawing.Bubble(b["confidence"], b["accuracy"], b["count"]) for b in bins if b["count"]])


def _epochs(epochs: Sequence[Mapping[str, Any]], measure: str) -> list[str]:
    """Two charts: what was minimised, and what picked the epoch."""
    scored = [(e["number"], float(e["dev"])) for e in epochs if _number(e.get("dev")) != "–"]
    losses = [(e["number"], float(e["loss"])) for e in epochs if _number(e.get("loss")) != "–"]
    best = max(scored, key=lambda pair: pair[1])[0] if scored else None
    charts = [
        drawing.line("loss", losses, "training loss", best),
        drawing.line("dev", scored, f"dev {measure}", best),
    ]
    return [chart for chart in charts if chart]


def _worst_first(labels: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = [dict(row) | {"width": _bar(row.get("f1"))} for row in labels]
    return sorted(rows, key=lambda row: row["width"])


def _matrix(confusion: Mapping[str, Any]) -> dict[str, Any] | None:
    """Labels, and for each row its cells: (count, share of the row)."""
    labels, counts = confusion.get("labels") or [], confusion.get("counts") or []
    if not counts or len(labels) > _MAX_MATRIX:
        return None
    rows = [[(count, count / max(1, sum(row))) for count in row] for row in counts]
    return {"labels": labels, "rows": rows}


def _pairs(confusion: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Which label was taken for which, most often first: where there is no matrix small enough."""
    labels, counts = confusion.get("labels") or [], confusion.get("counts") or []
    pairs = list(confusion.get("pairs") or [])
    if len(labels) > _MAX_MATRIX:
        pairs += [
            {"gold": gold, "found": found, "count": count}
            for gold, row in zip(labels, counts, strict=True)
            for found, count in zip(labels, row, strict=True)
            if count and gold != found
        ]
    return sorted(pairs, key=lambda pair: -pair["count"])[:_MAX_MATRIX]


def _template() -> Environment:
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    pages.filters |= {
        "cut": _cut,
        "number": _number,
        "value": _value,
        "setting": _setting,
        "words": _words,
        "heading": _title,
        "duration": _duration,
        "size": _size,
    }
    return pages


_TEMPLATE = _template().get_template("report.html.j2")
