"""The report as a reader finds it: what it says, what it leaves out, and what no text can make of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from app.learning.drawing import spread
from app.learning.report import render

VOID = {"meta", "wbr", "br"}
EVIL = "<script>alert(1)</script>\" onmouseover='x' {{ 7*7 }} \ud800 \x00 & done"


class Page(HTMLParser):
    """Headings, visible text and attributes; complains where a tag is not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.headings: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)
            if self.open[-1] == "h2":
                self.headings.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def candidate(name: str, passes: float, dev: float | None, chosen: bool = False) -> dict[str, Any]:
    return {"name": name, "passes": passes, "dev": dev, "seconds": 12.0, "chosen": chosen}


def reached(dev: float, test: float) -> dict[str, dict[str, float]]:
    return {"dev": {"accuracy": dev}, "test": {"accuracy": test}}


def example(**changes: Any) -> dict[str, Any]:
    report = {
        "task": "spam",
        "problem_type": "single_label_classification",
        "labels": ["ham", "spam"],
        "created": "2026-11-24T10:00:00Z",
        "recipe": {"readout": "attention", "read_layers": [2, 4, 6], "hidden": 32, "learning_rate": 0.0005},
        "cost": {"passes": 1.0, "passes_alone": 1.0, "size_bytes": 380_000, "training_s": 141.2},
        "figures": {
            "dev": {"accuracy": 0.98222, "rows": 561},
            "test": {"accuracy": 0.98548, "mcc": 0.936, "rows": 1102},
        },
        "measure": "accuracy",
        "candidates": [
            candidate("bare trunk, mean", 1.0, 0.941),
            candidate("bare trunk, attention", 1.0, 0.9822, chosen=True),
            candidate("own prefix from layer 0", 2.0, 0.984),
        ],
        "tolerance": 0.005,
        "baselines": {"majority": reached(0.866, 0.861), "tfidf": reached(0.971, 0.9746)},
        "details": {
            "split": "test",
            "per_label": [
                {"label": "ham", "precision": 0.99, "recall": 0.992, "f1": 0.991, "support": 949},
                {"label": "spam", "precision": 0.95, "recall": 0.94, "f1": 0.945, "support": 153},
            ],
            "confusion": {"labels": ["ham", "spam"], "counts": [[941, 8], [9, 144]]},
            "reliability": [
                {"confidence": 0.6, "accuracy": 0.5, "count": 20},
                {"confidence": 0.98, "accuracy": 0.97, "count": 1082},
            ],
            "ece": 0.011,
        },
        "mistakes": [{"text": "call now", "text_pair": None, "gold": "spam", "found": "ham", "score": 0.9991}],
        "epochs": [{"number": 1, "loss": 0.3, "dev": 0.95}, {"number": 2, "loss": 0.1, "dev": 0.982}],
        "findings": ["12 texts of test.tsv also stand in train.tsv (lines 3, 9)."],
        "data": {"train": {"file": "train.tsv", "sha256": "da5e1f", "rows": 3911}},
        "backbone": {"name": "all-MiniLM-L6-v2", "fingerprint": "sha256:0a1b"},
        "command": "manifold learn --task spam --train train.tsv",
    }
    return {name: value for name, value in (report | changes).items() if value is not None}


def read(**changes: Any) -> Page:
    return Page(render(example(**changes)))


def charts(html: str) -> dict[str, ElementTree.Element]:
    """The SVGs of a page by the last of their classes; each is well-formed."""
    found = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]
    return {svg.attrib["class"].split()[-1]: svg for svg in found}


SECTIONS = {
    "Findings about the data": ("findings",),
    "Quality against cost": ("candidates",),
    "Against the baselines": ("baselines",),
    "All figures": ("figures",),
    "Label by label": ("details",),
    "What is taken for what": ("details",),
    "Can its scores be believed?": ("details",),
    "Worst mistakes": ("mistakes",),
    "Training": ("epochs",),
    "How it was made": ("recipe", "data", "backbone", "command"),
}


def test_it_says_what_why_and_how_good() -> None:
    text = read().text
    assert "single-label classification · learned 24 November 2026, 10:00 UTC" in text
    assert "spam gives each text one of 2 labels: ham, spam." in text
    assert "Of 3 arrangements “bare trunk, attention” was taken: the cheapest within 0.5 points of the best" in text
    assert "(dev accuracy 0.982 at 1.00 passes; the best has 0.984)" in text
    assert "On 1,102 rows of test its accuracy is 0.985." in text
    assert "The best baseline, TF-IDF + a linear model, reaches 0.975: 1.0 points less." in text
    assert "One finding about the data stands below" in text
    assert "Ship nothing" not in text and "no test set" not in text


def test_all_sections_are_there_in_order() -> None:
    assert read().headings == list(SECTIONS)


@pytest.mark.parametrize("heading", SECTIONS)
def test_what_is_missing_is_left_out(heading: str) -> None:
    page = read(**dict.fromkeys(SECTIONS[heading]))
    assert heading not in page.headings
    assert len(page.headings) >= len(SECTIONS) - 3


def test_a_report_of_nothing_but_a_name_renders() -> None:
    page = Page(render({"task": "spam", "problem_type": "regression"}))
    assert page.headings == []
    assert "spam gives each text a number." in page.text
    assert Page(render({})).headings == []


@pytest.mark.parametrize(("test", "words"), [(0.9854, "as good as"), (0.99, "better than")])
def test_a_baseline_that_does_as_well_is_a_reason_to_ship_nothing(test: float, words: str) -> None:
    text = read(baselines={"tfidf": reached(0.9, test)}).text
    assert f"Ship nothing: the baseline TF-IDF + a linear model is {words} this artifact on test" in text


def test_full_fine_tuning_is_what_can_be_reached_and_no_rival() -> None:
    text = read(baselines={"full fine-tuning": reached(0.99, 0.991)}).text
    assert "Full fine-tuning, with a copy of the whole backbone, reaches 0.991: 0.6 points more." in text
    assert "Ship nothing" not in text


def test_a_linear_head_is_no_rival_of_itself() -> None:
    rival = {"linear head on the bare trunk": reached(0.982, 0.98548)}
    assert "Ship nothing" in read(baselines=rival).text
    linear = {"readout": "mean", "hidden": 0, "read_layers": [6]}
    assert "Ship nothing" not in read(baselines=rival, recipe=linear).text


def test_without_a_test_set_dev_is_told_and_warned_of() -> None:
    text = read(figures={"dev": {"accuracy": 0.98222, "rows": 561}}).text
    assert "On 561 rows of dev its accuracy is 0.982." in text
    assert "The best baseline, TF-IDF + a linear model, reaches 0.971: 1.1 points less." in text
    assert "There is no test set" in text


def test_the_choice_is_told_as_it_was() -> None:
    best = [candidate("a", 1.0, 0.9), candidate("b", 2.0, 0.95, chosen=True)]
    assert "“b” was taken: the best on dev, and none as good is cheaper" in read(candidates=best).text
    other = [candidate("a", 1.0, 0.951, chosen=False), candidate("b", 2.0, 0.95, chosen=True)]
    assert "Of 2 arrangements “b” was taken (dev accuracy 0.950 at 2.00 passes)." in read(candidates=other).text
    alone = read(candidates=[candidate("a", 1.0, 0.9, chosen=True)])
    assert "The only arrangement tried is “a”" in alone.text
    given = read(candidates=None, recipe={"readout": "attention", "num_virtual_tokens": 16, "first_layer": 4})
    assert "It was given an own prefix of 16 tokens from layer 4 on, attention." in given.text


def test_nothing_in_a_text_becomes_markup() -> None:
    hostile = example(
        task=EVIL,
        labels=[EVIL, "spam"],
        findings=[EVIL],
        command=EVIL,
        candidates=[candidate(EVIL, 1.0, 0.9, True), candidate(EVIL, 2.0, 0.9)],
        measure=EVIL,
        figures={EVIL: {EVIL: 0.5}},
        baselines={EVIL: {"dev": {EVIL: 0.5}}},
        recipe={EVIL: EVIL},
        backbone={EVIL: EVIL},
        data={EVIL: {"file": EVIL, "sha256": EVIL, "rows": 1}},
        mistakes=[{"text": EVIL, "text_pair": EVIL, "gold": EVIL, "found": EVIL * 20, "score": 0.5}],
        details={
            "split": EVIL,
            "per_label": [{"label": EVIL * 20, "precision": 0.1, "recall": 0.1, "f1": 0.1, "support": 1}],
            "confusion": {"labels": [EVIL, EVIL * 20], "counts": [[1, 0], [0, 1]]},
        },
    )
    html = render(hostile)
    html.encode("utf-8")  # the lone surrogate is gone
    assert "\x00" not in html
    assert "&lt;script&gt;" in html and "{{ 7*7 }}" in html
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    charts(html)


def test_long_texts_are_cut() -> None:
    html = render(example(mistakes=[{"text": "x" * 5000, "gold": "spam", "found": "ham", "score": 0.5}]))
    assert "x" * 300 + "…" in html
    assert "x" * 301 not in html


def test_it_needs_nothing_from_anywhere() -> None:
    html = render(example())
    tags = Page(html).tags
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in tags}
    assert not [attributes for _, attributes in tags if {"src", "href"} & set(attributes)]
    assert "url(" not in html and "@import" not in html and "http://" not in html and "https://" not in html


def test_it_can_be_read_without_seeing_it() -> None:
    html = render(example())
    page = Page(html)
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    identities = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    found = charts(html)
    assert set(found) == {"curve", "reliability", "loss", "dev"}
    for svg in found.values():
        assert svg.attrib["role"] == "img"
        assert svg.attrib["aria-labelledby"].split() == [svg[0].attrib["id"], svg[1].attrib["id"]]
        assert svg[0].text and svg[1].text
    assert "2 (chosen): dev accuracy 0.982 at 1.00 passes" in str(found["curve"][1].text)


def test_numbers_of_the_curve_never_touch() -> None:
    near = [candidate(f"c{i}", 1.0 + (i % 3) / 6, 0.98 + (i % 4) / 1e4, chosen=i == 3) for i in range(12)]
    curve = charts(render(example(candidates=near)))["curve"]
    numbers = [text for text in curve.iter("text") if "number" in text.attrib["class"]]
    places = [(float(text.attrib["x"]), float(text.attrib["y"])) for text in numbers]
    assert sorted(int(text.text or 0) for text in numbers) == list(range(1, 13))
    width, height = (float(side) for side in curve.attrib["viewBox"].split()[2:])
    assert all(0 < x < width - 12 and 12 < y < height for x, y in places)
    for i, (x, y) in enumerate(places):
        assert all(abs(x - other_x) >= 16 or abs(y - other_y) >= 12 for other_x, other_y in places[:i])


@pytest.mark.parametrize("dev", [None, float("nan")])
def test_an_arrangement_without_a_score_is_listed_and_not_drawn(dev: float | None) -> None:
    tried = [candidate("a", 1.0, 0.9, chosen=True), candidate("broken", 1.5, dev), candidate("c", 2.0, 0.91)]
    html = render(example(candidates=tried))
    assert "broken" in Page(html).text
    assert len(list(charts(html)["curve"].iter("circle"))) == 2


def test_equal_scores_and_costs_can_be_drawn() -> None:
    html = render(example(candidates=[candidate("a", 1.0, 0.9, True), candidate("b", 1.0, 0.9)], tolerance=0.0))
    assert len(list(charts(html)["curve"].iter("circle"))) == 2


def matrix_cells(details: Mapping[str, Any], **changes: Any) -> tuple[Page, list[str]]:
    page = read(details=details, **changes)
    return page, [a["style"] or "" for tag, a in page.tags if tag == "td" and "--s" in (a.get("style") or "")]


def test_a_matrix_is_shaded_by_the_share_of_its_row() -> None:
    _, styles = matrix_cells({"confusion": {"labels": ["a", "b"], "counts": [[3, 1], [0, 0]]}})
    assert styles == ["--s:0.75", "--s:0.25", "--s:0.00", "--s:0.00"]


def test_many_labels_are_listed_by_their_confusions() -> None:
    labels = [f"label{i}" for i in range(31)]
    counts = [[9 if i == j else 0 for j in range(31)] for i in range(31)]
    counts[4][7], counts[5][6] = 2, 3
    page, styles = matrix_cells({"confusion": {"labels": labels, "counts": counts}})
    assert styles == []
    assert "Right Found Times label5 label6 3 label4 label7 2" in page.text
    listed, _ = matrix_cells({"confusion": {"pairs": [{"gold": "a", "found": "b", "count": 3}]}})
    assert "Right Found Times a b 3" in listed.text


def test_details_are_taken_as_the_figures_give_them() -> None:
    rows = [{"label": "ham", "precision": 0.9, "recall": 0.9, "f1": 0.9, "support": 3}]
    page, styles = matrix_cells({"split": "test", "labels": rows, "confusion": [[3, 0], [1, 2]]})
    assert len(styles) == 4
    assert "Label by label" in page.headings
    listed, _ = matrix_cells({"confused": [{"gold": "a", "found": "b", "count": 3}]})
    assert "Right Found Times a b 3" in listed.text


def test_a_regression_is_drawn_as_points() -> None:
    html = render(
        example(
            problem_type="regression",
            measure="pearson",
            figures={"test": {"pearson": 0.79, "rmse": 0.9, "rows": 3}},
            details={"split": "test", "points": [[1.0, 1.2], [2.0, 1.7], [3.0, 3.1]]},
            baselines=None,
        )
    )
    assert len(list(charts(html)["scatter"].iter("circle"))) == 3
    assert "its Pearson correlation is 0.790" in Page(html).text


def test_labels_are_listed_from_the_worst() -> None:
    text = read().text
    assert text.index("spam 0.945 0.950 0.940 153") < text.index("ham 0.991 0.990 0.992 949")


def test_settings_keep_their_digits() -> None:
    assert "Learning rate 0.0005" in read().text
    assert "2 min 21 s" in read().text and "380 kB" in read().text


def test_spread_keeps_order_gap_and_bounds() -> None:
    assert spread([10, 100], 14, 0, 200) == [10, 100]
    assert spread([50, 50, 50], 10, 0, 200) == [50, 60, 70]
    assert spread([195, 198], 10, 0, 200) == [190, 200]
    assert spread([0, 0, 0], 50, 0, 20) == [0, 10, 20]
