"""What `--compose auto` wins with few labels: heads on the shipped prefixes, for sets that none was trained on.

    make bench-few-labels DATA=folder    # with a folder for each set: train.tsv, dev.tsv, test.tsv

Each seed draws other rows. Writes tests/bench/FEWLABELS.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from app.domain import ReadoutKind
from app.engine.backbone import Backbone, set_threads
from app.engine.host_memory import keep_freed_memory
from app.engine.tokenizer import TextTokenizer
from app.learning.compose import compose, usable
from app.learning.learn import with_enough_steps
from app.learning.problems import dev_figure
from app.learning.recipe import Recipe
from app.learning.splits import subsample
from app.learning.study import Files, Fitted, Quiet, Study, Tables
from tests.bench.machine import describe

SETS = ("trec", "mpqa", "subj", "tweeteval_offensive", "mrpc", "rte")
ALL = 0
SIZES = (16, 100, ALL)
DEV_ROWS, TEST_ROWS = 200, 500
REPORT = Path(__file__).with_name("FEWLABELS.md")
PREFIXES = Path(__file__).parents[2] / "prefixes"


@dataclass(frozen=True)
class Run:
    scores: Sequence[float]  # on test: a linear head on the bare trunk, a readout of it, what compose chose
    read: str  # by what compose chose
    seconds: float  # that compose took, the frozen layers' passes included


def study_of(
    backbone: Backbone, folder: Path, rows: int, seed: int, dev_rows: int = DEV_ROWS, test_rows: int = TEST_ROWS
) -> Study:
    """Of a part of a set's rows: others for each seed, of test the same."""
    whole = Tables.read(Files(*(folder / f"{name}.tsv" for name in ("train", "dev", "test"))), None)
    assert whole.test is not None
    tables = replace(
        whole,
        train=whole.train if rows == ALL else subsample(whole.train, rows, seed),
        dev=whole.dev if rows == ALL else subsample(whole.dev, dev_rows, seed),
        test=subsample(whole.test, test_rows, 0),
    )
    return Study(tables, backbone, TextTokenizer(backbone.path), Quiet())


def measure(backbone: Backbone, pool: Sequence[Path], folder: Path, rows: int, seed: int, tolerance: float) -> Run:
    study = study_of(backbone, folder, rows, seed)
    base = with_enough_steps(Recipe("task", seed=seed), len(study.tables.train.examples))
    linear = study.completed(replace(base, readout=ReadoutKind.MEAN, hidden=0, learning_rate=5e-3))
    began = time.perf_counter()
    found = compose(study, base, pool, tolerance, lambda *_: None)
    seconds = time.perf_counter() - began
    plain = (study.fit(recipe) for recipe in (linear, study.completed(base)))
    scores = [on_test(study, fitted) for fitted in (*plain, found.fitted)]
    return Run(scores, found.candidate.name, seconds)


def on_test(study: Study, fitted: Fitted) -> float:
    logits, targets = study.logits(fitted, "test")
    return dev_figure(study.tables.problem_type, logits, targets, study.tables.labels, [])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.fewlabels", description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tolerance", type=float, default=0.5, help="points of dev score; default 0.5")
    parser.add_argument("--pool", type=Path, default=PREFIXES, help="a folder of artifacts; default the shipped ones")
    parser.add_argument("--out", type=Path, default=REPORT)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    keep_freed_memory()
    set_threads(args.threads)
    backbone = Backbone.load("embedded", "cpu", "auto")
    pool = usable(args.pool, backbone.spec)
    lines = [
        "| set | rows | bare trunk, linear | bare trunk, usual readout | compose | seconds | what it read |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in SETS:
        for rows in SIZES:
            tolerance = args.tolerance / 100
            runs = [measure(backbone, pool, args.data / name, rows, seed, tolerance) for seed in range(args.seeds)]
            scores = " | ".join(map(spread, zip(*(run.scores for run in runs), strict=True)))
            took, read = statistics.mean(run.seconds for run in runs), "; ".join(run.read for run in runs)
            lines.append(f"| {name} | {rows or 'all'} | {scores} | {took:.0f} | {read} |")
            sys.stdout.write(lines[-1] + "\n")
            sys.stdout.flush()
    args.out.write_text(
        f"""# Few labels: heads on prefixes that other tasks trained

{datetime.now(UTC):%Y-%m-%d}, {describe(args.threads, backbone.spec.dtype)}. Written by `make bench-few-labels DATA=…`.

Accuracy on up to {TEST_ROWS} test texts, mean and standard deviation over {args.seeds} seeds, each with other rows but
where all are taken; {DEV_ROWS} rows choose epoch and composition, with all examples all rows of dev. Seconds are of
compose, from texts to the head. The pool is {len(pool)} prefixes{" that ship" if args.pool == PREFIXES else ""}
({", ".join(path.name for path in pool)}); none was trained on these sets.

{chr(10).join(lines)}
"""
    )
    return 0


def spread(scores: Sequence[float]) -> str:
    return f"{statistics.mean(scores):.3f} ± {statistics.pstdev(scores):.3f}"


if __name__ == "__main__":
    sys.exit(main())
