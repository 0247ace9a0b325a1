"""What `--compose auto` wins with few labels: heads on the shipped prefixes, for sets that none was trained on.

    make bench-few-labels DATA=folder    # with a folder for each set: train.tsv, dev.tsv, test.tsv

Each seed draws other rows. Writes tests/bench/FEWLABELS.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
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
SIZES = (16, 100, 1000)
DEV_ROWS, TEST_ROWS = 200, 500
REPORT = Path(__file__).with_name("FEWLABELS.md")
PREFIXES = Path(__file__).parents[2] / "prefixes"


def measure(backbone: Backbone, folder: Path, rows: int, seed: int, tolerance: float) -> dict[str, tuple[float, str]]:
    """Test score and what was read, for a linear head on the bare trunk, a readout of it, and what compose chose."""
    whole = Tables.read(Files(*(folder / f"{name}.tsv" for name in ("train", "dev", "test"))), None)
    assert whole.test is not None
    tables = replace(
        whole,
        train=subsample(whole.train, rows, seed),
        dev=subsample(whole.dev, DEV_ROWS, seed),
        test=subsample(whole.test, TEST_ROWS, 0),
    )
    study = Study(tables, backbone, TextTokenizer(backbone.path), Quiet())
    base = with_enough_steps(Recipe("task", seed=seed), rows)
    linear = study.completed(replace(base, readout=ReadoutKind.MEAN, hidden=0, learning_rate=5e-3))
    found = compose(study, base, usable(PREFIXES, backbone.spec), tolerance, lambda *_: None)
    return {
        "bare trunk, linear": (_test(study, study.fit(linear)), ""),
        "bare trunk, attention": (_test(study, study.fit(study.completed(base))), ""),
        "compose": (_test(study, found.fitted), found.candidate.name),
    }


def _test(study: Study, fitted: Fitted) -> float:
    logits, targets = study.logits(fitted, "test")
    return dev_figure(study.tables.problem_type, logits, targets, study.tables.labels, [])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.fewlabels", description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tolerance", type=float, default=0.5, help="points of dev score; default 0.5")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    keep_freed_memory()
    set_threads(args.threads)
    backbone = Backbone.load("embedded", "cpu", "float32")
    lines = [
        "| set | rows | bare trunk, linear | bare trunk, attention | compose | what it read |",
        "|---|---|---|---|---|---|",
    ]
    for name in SETS:
        for rows in SIZES:
            runs = [measure(backbone, args.data / name, rows, s, args.tolerance / 100) for s in range(args.seeds)]
            scores = [[run[kind][0] for run in runs] for kind in runs[0]]
            read = "; ".join(run["compose"][1] for run in runs)
            lines.append(f"| {name} | {rows} | {' | '.join(map(_spread, scores))} | {read} |")
            sys.stdout.write(lines[-1] + "\n")
            sys.stdout.flush()
    REPORT.write_text(
        f"""# Few labels: heads on prefixes that other tasks trained

{datetime.now(UTC):%Y-%m-%d}, {describe(args.threads)}. Written by `make bench-few-labels DATA=…`.

Accuracy on up to {TEST_ROWS} test texts, mean and standard deviation over {args.seeds} seeds, each with other rows;
{DEV_ROWS} rows choose epoch and composition. The pool is the prefixes that ship; none was trained on these sets.

{chr(10).join(lines)}
"""
    )
    return 0


def _spread(scores: Sequence[float]) -> str:
    return f"{statistics.mean(scores):.3f} ± {statistics.pstdev(scores):.3f}"


if __name__ == "__main__":
    sys.exit(main())
