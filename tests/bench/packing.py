"""Twelve tasks for about one pass: `manifold pack` at its full width, on few rows of each set.

    make bench-packing DATA=folder    # with a folder for each set: train.tsv, dev.tsv, test.tsv

Live is each task with a branch of its own. Writes tests/bench/PACKING.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from app.domain import ReadoutKind
from app.engine.artifact import MANIFEST
from app.engine.backbone import Backbone, set_threads
from app.engine.host_memory import keep_freed_memory
from app.learning.data import Table, read_table
from app.learning.learn import Files, Options, learn
from app.learning.pack_tasks import Limits, Member
from app.learning.recipe import Recipe
from app.learning.release import RELEASE, conclusions, cost, curve_plot, curve_rows, markdown, propose, task_rows
from app.learning.splits import subsample
from app.learning.terminal import Screen
from tests.bench.machine import describe

TEXTS = ("trec", "sst2", "emotion", "banking77", "tweeteval_offensive", "davidson_hate", "sms_spam", "snips")
PAIRS = ("snli_small", "mrpc", "qqp10k", "rte")
DEV_ROWS, TEST_ROWS = 1000, 1000
LIVE_FIRST_LAYER = 4
EPOCHS, PATIENCE = 7, 2
REPORT = Path(__file__).with_name("PACKING.md")


def cut(data: Path, name: str, rows: int, folder: Path) -> Files:
    """Files with a part of each table's rows."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = {"train": rows, "dev": DEV_ROWS, "test": TEST_ROWS}
    paths = []
    for split, count in counts.items():
        paths.append(folder / f"{split}.tsv")
        _write(paths[-1], subsample(read_table(data / name / f"{split}.tsv"), count))
    return Files(*paths)


def _write(path: Path, table: Table) -> None:
    is_pair = table.examples[0].text.text_pair is not None
    lines = ["text_a\ttext_b\tlabel" if is_pair else "text\tlabel"]
    for example in table.examples:
        text = example.text
        lines.append("\t".join([text.text, *([text.text_pair or ""] if is_pair else []), example.labels[0]]))
    path.write_text("\n".join(lines) + "\n", "utf-8")


def recipe(name: str) -> Recipe:
    return Recipe(name, epochs=EPOCHS, patience=PATIENCE)


def learn_live(name: str, files: Files, out: Path, backbones: tuple[Backbone, Backbone], screen: Screen) -> None:
    """With a prefix of its own and a linear head, as the tasks of a service may be today."""
    own = Recipe(
        name,
        readout=ReadoutKind.MEAN,
        hidden=0,
        learning_rate=5e-3,
        num_virtual_tokens=16,
        first_layer=LIVE_FIRST_LAYER,
        epochs=EPOCHS,
        patience=PATIENCE,
    )
    learn(own, files, out, backbones, screen, Options(raise_epochs=True))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.packing", description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=1000, help="to learn each task from; default 1000")
    parser.add_argument("--tasks", default=",".join((*TEXTS, *PAIRS)))
    parser.add_argument("--tolerance", type=float, default=0.5, help="points of dev score; default 0.5")
    parser.add_argument("--max-passes", type=float, default=1.2)
    parser.add_argument("--work", type=Path, help="keep what is learned there, and use what is there")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    keep_freed_memory()
    set_threads(args.threads)
    backbone = Backbone.load("embedded", "cpu", "auto")
    exact = backbone if backbone.spec.dtype == "float32" else Backbone.load("embedded", "cpu", "float32")
    with ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        _check_alike(parser, work, args)
        screen = stack.enter_context(Screen(Console()))
        files = {name: cut(args.data, name, args.rows, work / "data" / name) for name in args.tasks.split(",")}
        for name, given in files.items():
            if not (work / "live" / name / MANIFEST).is_file():
                learn_live(name, given, work / "live" / name, (backbone, exact), screen)
        if not (work / "release").is_dir():
            members = [Member(recipe(name), given) for name, given in files.items()]
            limits = Limits(args.tolerance / 100, args.max_passes)
            fits = work / "fits"
            propose(members, work / "live", work / "release", (backbone, exact), screen, limits, work=fits)
        release = json.loads((work / "release" / RELEASE).read_text("utf-8"))
    REPORT.write_text(page(release, args, backbone), "utf-8")
    REPORT.with_name("packing.svg").write_text(curve_plot(release), "utf-8")
    return 0


def _check_alike(parser: argparse.ArgumentParser, work: Path, args: argparse.Namespace) -> None:
    """What lies in `work` is of the same run."""
    settings = [args.rows, DEV_ROWS, TEST_ROWS, args.tasks, args.tolerance, args.max_passes]
    path = work / "settings.json"
    if path.is_file() and json.loads(path.read_text("utf-8")) != settings:
        parser.error(f"{work} holds a run with other settings: name another folder with --work")
    work.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings), "utf-8")


def page(release: Mapping[str, Any], args: argparse.Namespace, backbone: Backbone) -> str:
    title = "# Packing: many tasks for about one pass"
    made = f"{datetime.now(UTC):%Y-%m-%d}, {describe(args.threads, backbone.spec.dtype)}."
    command = f"make bench-packing DATA=… ARGS='--threads {args.threads} --rows {args.rows}'"
    parts = [
        title,
        f"{made} Written by `{command}`.",
        f"{len(release['tasks'])} tasks, at most {args.rows} rows of each to learn from, {DEV_ROWS} of dev and "
        f"{TEST_ROWS} of test at most, one seed, so a point is noise. Live is each task with a prefix of its own from "
        f"layer {LIVE_FIRST_LAYER} on, the mean of the last layer and a linear head. The search took {release['fits']} "
        "fits. A text and a pair never stand in one request: passes are counted, and limited, for each kind of input "
        "by itself.",
        *cost(release),
        markdown(task_rows(release)),
        "dev and test: before → after; search: the dev score of what was chosen, of the best that was found at any "
        "cost.",
        *conclusions(release),
        "## Score against passes",
        "![Average dev score against passes](packing.svg)",
        markdown(curve_rows(release)),
        "## What prefixes add to readouts with queries",
        "Attention for texts, matching for pairs.",
        markdown(_gains(release)),
    ]
    return "\n\n".join(parts) + "\n"


def _gains(release: Mapping[str, Any]) -> list[list[str]]:
    """Dev scores of the search: the best readout of the bare trunk, and the best with prefixes of whatever kind."""
    rows = [["task", "bare trunk", "best at any cost", "points", "what it reads"]]
    for name, task in release["tasks"].items():
        trunk, best = task["search"]["trunk"], task["search"]["best"]
        rows.append([name, f"{trunk:.4f}", f"{best:.4f}", f"{100 * (best - trunk):+.1f}", task["search"]["best_reads"]])
    return rows


if __name__ == "__main__":
    sys.exit(main())
