"""What it brings to match the texts of a pair: readouts of the bare trunk and of own prefixes, on five sets of pairs.

    make bench-matching DATA=folder    # with a folder for each set: train.tsv, dev.tsv, test.tsv

Each seed draws other rows. Writes tests/bench/MATCHING.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from app.domain import ReadoutKind
from app.engine.backbone import Backbone, set_threads
from app.engine.host_memory import keep_freed_memory
from app.learning.learn import with_enough_steps
from app.learning.recipe import Recipe
from app.learning.study import Study
from tests.bench.fewlabels import on_test, spread, study_of
from tests.bench.machine import describe

SETS = ("snli_small", "qqp10k", "mrpc", "rte", "stsb")
SIZES = (16, 100, 2000)
PREFIXED = 2000  # rows from which own prefixes are learned too
FEW_DEV_ROWS, DEV_ROWS, TEST_ROWS = 200, 1000, 1000
WAYS = (
    "trunk, linear",
    "trunk, attention",
    "trunk, matching",
    "trunk, matching of all layers",
    "own prefix, attention",
    "own prefix, matching",
)
REPORT = Path(__file__).with_name("MATCHING.md")


def recipes(study: Study, rows: int, seed: int) -> Iterator[tuple[str, Recipe]]:
    spec = study.backbone.spec
    base = with_enough_steps(Recipe("task", seed=seed), rows)
    attention = replace(base, readout=ReadoutKind.ATTENTION)
    matching = replace(base, readout=ReadoutKind.MATCHING)
    yield WAYS[0], replace(base, readout=ReadoutKind.MEAN, hidden=0, learning_rate=5e-3)
    yield WAYS[1], attention
    yield WAYS[2], matching
    yield WAYS[3], replace(matching, read_layers=tuple(range(1, spec.num_layers + 1)))
    if rows >= PREFIXED:
        late = replace(base, num_virtual_tokens=32, first_layer=2 * spec.num_layers // 3, prefix_learning_rate=0.03)
        yield WAYS[4], replace(late, readout=ReadoutKind.ATTENTION)
        yield WAYS[5], replace(late, readout=ReadoutKind.MATCHING)


def measure(backbone: Backbone, folder: Path, rows: int, seed: int) -> dict[str, float]:
    """On test, by way."""
    study = study_of(backbone, folder, rows, seed, DEV_ROWS if rows >= PREFIXED else FEW_DEV_ROWS, TEST_ROWS)
    fitted = ((way, study.fit(study.completed(recipe), lambda *_: None)) for way, recipe in recipes(study, rows, seed))
    return {way: on_test(study, one) for way, one in fitted}


def row(name: str, rows: int, runs: Sequence[Mapping[str, float]]) -> str:
    scores = (spread([run[way] for run in runs]) if way in runs[0] else "–" for way in WAYS)
    return f"| {name} | {rows} | {' | '.join(scores)} |"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.matching", description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    keep_freed_memory()
    set_threads(args.threads)
    backbone = Backbone.load("embedded", "cpu", "auto")
    lines = [f"| set | rows | {' | '.join(WAYS)} |", "|---" * (2 + len(WAYS)) + "|"]
    for name in SETS:
        for rows in SIZES:
            runs = [measure(backbone, args.data / name, rows, seed) for seed in range(args.seeds)]
            lines.append(row(name, rows, runs))
            sys.stdout.write(lines[-1] + "\n")
            sys.stdout.flush()
    REPORT.write_text(
        f"""# Matching: how a pair is read

{datetime.now(UTC):%Y-%m-%d}, {describe(args.threads, backbone.spec.dtype)}. Written by `make bench-matching DATA=…`.

Accuracy (stsb: Pearson's correlation) on up to {TEST_ROWS} test pairs, mean and standard deviation over {args.seeds}
seeds, each with other rows. {FEW_DEV_ROWS} rows of dev choose the epoch, with {PREFIXED} examples up to {DEV_ROWS}.
*Attention*: learned queries over the tokens of the pair, beside its mean; *matching*: the same over each text apart,
and how the two differ. Two queries a layer, a hidden layer of 32, and three layers where it does not say all. *Own
prefix*: 32 virtual tokens from two thirds of the layers on.

{chr(10).join(lines)}
"""
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
