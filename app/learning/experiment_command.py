"""`manifold experiment`: the paper's experiment on your copies of its data. Knows the command line and the screen."""

from __future__ import annotations

import argparse
import platform
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from app.engine.backbone import Backbone, cores
from app.engine.tokenizer import TextTokenizer
from app.learning import experiment_report
from app.learning.cache import MAX_BYTES
from app.learning.experiment import Experiment, Sets, header
from app.learning.experiment_numbers import Story
from app.learning.experiment_plan import (
    ALL,
    FULL,
    QUICK,
    Cell,
    Ledger,
    Outcome,
    Plan,
    Results,
    Told,
    cells,
    steps,
    unfinished,
    wide,
)
from app.learning.experiment_workers import Work, run_steps
from app.learning.terminal import add_machine_arguments, backbones, guarded

_DESCRIPTION = """Run the experiment of Huang et al. 2023 (arXiv 2305.13499): prefixes of source tasks, trained
independently and combined, against the bare encoder, single prefixes and multi-task training.

DIR holds a folder for each data set with train.tsv, dev.tsv and test.tsv: {sets}
(of subj and stsb test_clean.tsv). Writes the page, its plots in a folder _experiment beside it, and every finished
number to results.jsonl."""
_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION.format(sets=", ".join((*FULL.sources, *FULL.targets)))
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="three sources, three targets, one seed: ten minutes")
    size.add_argument(
        "--rows", type=_count, metavar="N", help="all sets, N rows of each source, few of a target: an hour a seed"
    )
    parser.add_argument("--out", type=Path, default=Path("EXPERIMENT.md"), metavar="FILE", help="default %(default)s")
    parser.add_argument("--seeds", type=_seeds, metavar="N,N", help="default 0,1,2, with --quick 0")
    parser.add_argument(
        "--examples",
        type=_examples,
        metavar="N,N,all",
        help="of a target, to train on; default 16,100,all, with --quick or --rows 16,100; --quick fine-tunes targets "
        "in full only where all is among them",
    )
    parser.add_argument("--resume", action="store_true", help="go on where an earlier run was interrupted")
    parser.add_argument(
        "--jobs", type=_count, default=1, metavar="N", help="steps at once, each in a process of its own; default 1"
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="for what is trained; default .experiment beside FILE")
    add_machine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """0; 1 with one sentence on stderr; 130 where it was interrupted."""
    return guarded("experiment", lambda: _run(args))


def _seeds(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f'"{text}" is not numbers joined by commas, like 0,1,2') from error
    if len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f'"{text}" names a seed twice')
    return seeds


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'"{text}" is no number of them, 1 or more')
    return int(text)


def _examples(text: str) -> tuple[int, ...]:
    """In rising order, ALL last."""
    parts = text.split(",")
    if not all(part == "all" or part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f'"{text}" is not numbers of examples joined by commas, like 16,100,all')
    found = sorted(ALL if part == "all" else int(part) for part in parts)
    if any(part != "all" and not int(part) for part in parts):
        raise argparse.ArgumentTypeError("a number of examples must be 1 or more")
    repeated = next((count for count in found if found.count(count) > 1), None)
    if repeated is not None:
        raise argparse.ArgumentTypeError(f'"{text}" names {"all" if repeated == ALL else repeated} twice')
    few = tuple(count for count in found if count != ALL)
    return (*few, ALL) if ALL in found else few


def plan_of(args: argparse.Namespace) -> Plan:
    plan = FULL
    if args.quick:
        plan = QUICK
    elif args.rows:
        plan = wide(args.rows)
    if args.examples:
        plan = replace(plan, sizes=args.examples, with_ceiling=plan.with_ceiling or ALL in args.examples)
    return replace(plan, seeds=args.seeds) if args.seeds else plan


def _run(args: argparse.Namespace) -> int:
    plan = plan_of(args)
    sets = Sets(plan, args.data)
    given = args.threads
    if args.jobs > 1 and given is None:
        args.threads = threads_for(args.jobs, len(list(steps(plan))))
    if args.memory is None:
        args.memory = MAX_BYTES // args.jobs
    backbone = backbones(args)[0]
    results = Results(args.out.parent / "results.jsonl", header(plan, sets, backbone.spec), args.resume)
    console = Console()
    if results.kept is not None:
        line = f"note: the earlier results are kept in {results.kept}; --resume would have gone on from them"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    with _Screen(console, plan, results) as screen:
        ledger = Told(results, screen.finished)
        try:
            if args.jobs > 1:
                left = unfinished(plan, results.found)
                if given is None:  # the last steps of a run need not leave cores to others
                    args.threads = threads_for(args.jobs, len(left))
                run_steps(left, args.jobs, partial(_prepared, args, plan), ledger)
            else:
                _experiment(args, plan, sets, backbone, ledger).run()
        except KeyboardInterrupt:
            Console(stderr=True).print("manifold experiment: interrupted, go on with --resume", markup=False)
            return _INTERRUPTED
    experiment_report.write(args.out, _story(args, plan, sets, results, backbone))
    console.print(f"{args.out}", soft_wrap=True, markup=False, highlight=False)
    return 0


def threads_for(jobs: int, num_steps: int) -> int:
    """Of each of so many processes, where that many steps are left."""
    return max(1, cores() // max(1, min(jobs, num_steps)))


def _prepared(args: argparse.Namespace, plan: Plan, ledger: Ledger) -> Work:
    """In a process of its own."""
    return _experiment(args, plan, Sets(plan, args.data), backbones(args)[0], ledger).take


def _experiment(args: argparse.Namespace, plan: Plan, sets: Sets, backbone: Backbone, ledger: Ledger) -> Experiment:
    work = args.work or args.out.parent / ".experiment"
    return Experiment(plan, sets, backbone, TextTokenizer(backbone.path), ledger, work)


def _story(args: argparse.Namespace, plan: Plan, sets: Sets, results: Results, backbone: Backbone) -> Story:
    return Story(
        plan=plan,
        found=results.found,
        tables=sets.whole,
        shared_texts=sets.shared_texts(),
        command=_command(args, plan),
        machine=_machine(backbone) + (f", {args.jobs} steps at once" if args.jobs > 1 else ""),
        model=f"{backbone.spec.name}, {backbone.spec.num_layers} layers, frozen, in {backbone.spec.dtype}",
    )


def _command(args: argparse.Namespace, plan: Plan) -> str:
    size = " --quick" if args.quick else f" --rows {args.rows}" if args.rows else ""
    if args.examples:
        size += f" --examples {','.join('all' if count == ALL else str(count) for count in plan.sizes)}"
    return f"manifold experiment --data DATA{size} --seeds {','.join(map(str, plan.seeds))}"


def _machine(backbone: Backbone) -> str:
    if backbone.device.type == "cuda":
        return f"one {torch.cuda.get_device_name(backbone.device)}"
    threads = torch.get_num_threads()
    return f"CPU ({platform.machine()}), {threads} thread{'s' if threads > 1 else ''}"


class _Screen:
    """A bar over all cells, and a line for each that is finished."""

    def __init__(self, console: Console, plan: Plan, results: Results) -> None:
        self._console = console
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        wanted = list(cells(plan))
        done = sum(cell in results.found for cell in wanted)
        self._task = self._progress.add_task("experiment", total=len(wanted), completed=done)

    def __enter__(self) -> _Screen:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def finished(self, cell: Cell, outcome: Outcome) -> None:
        names = [cell.task or "all sources", cell.representation, cell.readout]
        if cell.examples != ALL:
            names.append(f"{cell.examples} examples")
        what = ", ".join(filter(None, names))
        line = f"seed {cell.seed}  {outcome.score:.4f}  {outcome.seconds:6.0f} s  {cell.part}: {what}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._progress.advance(self._task)
