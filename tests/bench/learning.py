"""How long learning takes: a late-forked prefix with every baseline, against PEFT's prefix tuning in its usual trainer.

    make bench-learning DATA=folder     # with train.tsv, dev.tsv and test.tsv: text, label

For each of several dev accuracies: how long each takes to reach it. Writes tests/bench/LEARNING.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from app.domain import ReadoutKind
from app.engine.backbone import Backbone, set_threads
from app.engine.host_memory import keep_freed_memory
from app.engine.tokenizer import TextTokenizer
from app.learning.data import Table, read_table
from app.learning.learn import Files, Options, learn
from app.learning.recipe import Recipe
from app.learning.trainer import Epoch
from tests.bench.machine import describe

VIRTUAL_TOKENS = 16
COMPARED = 4  # the first layer that is compared with PEFT
FIRST_LAYERS = (5, 3, 0)  # beside it
PEFT_RATES = (1e-2, 3e-3)
TARGETS = (0.97, 0.98, 0.985)
REPORT = Path(__file__).with_name("LEARNING.md")


@dataclass(frozen=True, slots=True)
class Look:
    """At dev, so many seconds behind the start."""

    seconds: float
    dev: float


class Clock:
    """A watcher that notes when each dev score was there."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.looks: list[Look] = []
        self.stages: dict[str, float] = {}

    def stage(self, name: str, total: int) -> None:
        self.stages[name] = time.perf_counter() - self.began

    def advance(self, steps: int) -> None: ...

    def epoch(self, epoch: Epoch, measure: str) -> None:
        self.looks.append(Look(time.perf_counter() - self.began, epoch.dev))

    def candidate(self, name: str, passes: float, dev: float, seconds: float) -> None: ...

    def notice(self, sentences: object) -> None: ...


@dataclass(frozen=True, slots=True)
class Run:
    name: str
    seconds: float  # all of it
    looks: list[Look]
    dev: float

    def reached_s(self, target: float) -> float | None:
        """Seconds until that dev score was there."""
        return next((look.seconds for look in self.looks if look.dev >= target), None)


def measure_learn(files: Files, backbones: tuple[Backbone, Backbone], first_layer: int) -> Run:
    """`manifold learn` from files to artifact, all baselines but full fine-tuning with it."""
    recipe = Recipe("task", num_virtual_tokens=VIRTUAL_TOKENS, first_layer=first_layer)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        manifest = learn(recipe, files, Path(folder) / "task", backbones, clock, Options(baselines=True))
    seconds = time.perf_counter() - clock.began
    return Run(
        f"manifold learn, first layer {first_layer}",
        seconds,
        clock.looks,
        manifest["evaluation"]["dev"]["accuracy"],
    )


def measure_trunk(files: Files, backbones: tuple[Backbone, Backbone]) -> Run:
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe("task", readout=ReadoutKind.ATTENTION)
        manifest = learn(recipe, files, Path(folder) / "task", backbones, clock, Options(baselines=True))
    seconds = time.perf_counter() - clock.began
    return Run("manifold learn, bare trunk", seconds, clock.looks, manifest["evaluation"]["dev"]["accuracy"])


class _Until(TrainerCallback):
    """Ends PEFT's training at the highest dev score, or when the time is up."""

    def __init__(self, target: float, budget_s: float) -> None:
        self.began, self.target, self.budget_s = time.perf_counter(), target, budget_s
        self.looks: list[Look] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        self.looks.append(Look(time.perf_counter() - self.began, metrics["eval_accuracy"]))
        if self.looks[-1].dev >= self.target or self.looks[-1].seconds > self.budget_s:
            control.should_training_stop = True


def measure_peft(files: Files, path: str, rate: float, target: float, budget_s: float) -> Run:
    """PEFT's PrefixTuningConfig in transformers' Trainer, evaluated after each epoch."""
    assert files.dev is not None
    train, dev = read_table(files.train), read_table(files.dev)
    labels = sorted({example.labels[0] for example in train.examples})
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(labels))
        config = PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=VIRTUAL_TOKENS)
        tokenizer = TextTokenizer(path)
        until = _Until(target, budget_s)  # from here on: loading a model is not counted for ours either
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            num_train_epochs=30,
            learning_rate=rate,
            lr_scheduler_type="linear",
            eval_strategy="epoch",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            train_sampling_strategy="group_by_length",
            seed=0,
        )
        trainer = Trainer(
            get_peft_model(base, config),
            arguments,
            data_collator=_collate,
            train_dataset=_rows(tokenizer, train, labels),  # type: ignore[arg-type]
            eval_dataset=_rows(tokenizer, dev, labels),  # type: ignore[arg-type]
            compute_metrics=lambda found: {"accuracy": float((found[0].argmax(-1) == found[1]).mean())},
            callbacks=[until],
        )
        trainer.train()
    seconds = time.perf_counter() - until.began
    best = max(look.dev for look in until.looks)
    return Run(f"PEFT prefix tuning in transformers' Trainer, rate {rate:g}", seconds, until.looks, best)


def _rows(tokenizer: TextTokenizer, table: Table, labels: list[str]) -> list[dict[str, Any]]:
    encodings = tokenizer.encode(table.texts, [256] * len(table.examples), truncate=True)
    return [
        {"input_ids": list(encoding.input_ids), "labels": labels.index(example.labels[0])}
        for encoding, example in zip(encodings, table.examples, strict=True)
    ]


def _collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    mask = [torch.ones_like(row) for row in ids]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad(mask, batch_first=True),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def _runs(
    files: Files, target: float, budget_s: float, first_layers: Sequence[int], rates: Sequence[float]
) -> Iterator[Run]:
    backbone = Backbone.load("embedded", "cpu", "auto")
    exact = backbone if backbone.spec.dtype == "float32" else Backbone.load("embedded", "cpu", "float32")
    for first_layer in first_layers:
        yield measure_learn(files, (backbone, exact), first_layer)
    yield measure_trunk(files, (backbone, exact))
    yield measure_learn(files, (backbone, exact), COMPARED)
    for rate in rates:
        yield (run := measure_peft(files, exact.path, rate, target, budget_s))
        budget_s = min(budget_s, run.reached_s(target) or budget_s)  # who needs longer is not the faster one
    yield measure_learn(files, (backbone, exact), COMPARED)  # again: hosts change their speed within minutes


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.learning", description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--targets", type=float, nargs="+", default=TARGETS, help="dev accuracies to be reached")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds that a run of PEFT may take; default 300")
    parser.add_argument("--first-layers", type=int, nargs="+", default=FIRST_LAYERS)
    parser.add_argument("--peft-rates", type=float, nargs="+", default=PEFT_RATES)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    keep_freed_memory()
    set_threads(args.threads)
    files = Files(args.data / "train.tsv", args.data / "dev.tsv", args.data / "test.tsv")
    rows = len(read_table(files.train).examples)
    targets = sorted(args.targets)
    heads = " | ".join(f"until {target:g}" for target in targets)
    lines = [
        f"| | from files to artifact, with baselines | {heads} | dev accuracy |",
        "|---" * (3 + len(targets)) + "|",
    ]
    runs = []
    for run in _runs(files, targets[-1], args.budget, args.first_layers, args.peft_rates):
        runs.append(run)
        reached = " | ".join("not reached" if (s := run.reached_s(t)) is None else f"{s:.1f} s" for t in targets)
        whole = "–" if "PEFT" in run.name else f"{run.seconds:.0f} s"
        lines.append(f"| {run.name} | {whole} | {reached} | {run.dev:.3f} |")
        sys.stdout.write(lines[-1] + "\n")
        sys.stdout.flush()
    conditions = describe(args.threads, "bfloat16 and float32")
    text = f"""# Learning: how long it takes

{datetime.now(UTC):%Y-%m-%d}, {conditions}. Written by `make bench-learning DATA=…`.

{args.data.name}: {rows} rows to train on, {VIRTUAL_TOKENS} virtual tokens. Until: from the files to the first look
at dev, behind an epoch, with so high an accuracy. PEFT's runs end with the highest of them, when another
was there sooner, or behind {args.budget:.0f} s.

{chr(10).join(lines)}

First layer {COMPARED}, its two runs (one before PEFT's, one behind them), against the faster of PEFT's:

{chr(10).join(_verdict(runs, target) for target in targets)}

Each runs as it does by default: frozen layers of `learn` in bfloat16 where the processor has it, PEFT's trainer in
float32 throughout.
"""
    REPORT.write_text(text)
    return 0


def _verdict(runs: list[Run], target: float) -> str:
    ours = [run.reached_s(target) for run in runs if run.name.endswith(f"first layer {COMPARED}")]
    there = [seconds for seconds in ours if seconds is not None]
    theirs = [run for run in runs if "PEFT" in run.name]
    reached = [s for run in theirs if (s := run.reached_s(target)) is not None]
    if len(there) < len(ours):
        return f"- {target:g}: not reached from layer {COMPARED} on."
    if reached:
        return f"- {target:g}: {min(reached) / max(there):.1f} and {min(reached) / min(there):.1f} times sooner."
    spent = max(run.seconds for run in theirs)
    return f"- {target:g}: more than {spent / max(there):.1f} times sooner, PEFT was not there within {spent:.0f} s."


if __name__ == "__main__":
    sys.exit(main())
