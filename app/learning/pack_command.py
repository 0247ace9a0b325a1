"""`manifold pack`: many tasks for about one pass. Knows the command line and the screen."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.domain import ProblemType
from app.errors import SettingsError
from app.learning import command, jobs_file
from app.learning.pack_tasks import Limits, Member, check
from app.learning.release import conclusions, cost, curve_rows, propose, task_rows
from app.learning.study import Files, Watcher
from app.learning.terminal import Screen, add_machine_arguments, backbones, guarded

_DESCRIPTION = """Propose a release in which many tasks cost about one pass.

Each task reads the bare trunk, or shares a branch with others, whichever is the cheapest within the tolerance of the
best arrangement that is found for it. Nothing is published: the new versions are written to a folder."""


# Puts the live artifacts of these tasks into a folder, one folder a task; returns the champion of every live task.
Pull = Callable[[Collection[str], Path], Mapping[str, int]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = Limits()
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the tasks, as for manifold learn")
    parser.add_argument(
        "--live", type=Path, metavar="DIR", help="artifacts of the tasks as they are; default: a server's champions"
    )
    parser.add_argument("--tasks", type=_names, metavar="NAME,NAME", help="default: all of the file")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=100 * default.tolerance,
        metavar="X",
        help="points of dev score that a task may lose against its best arrangement; default %(default)s",
    )
    parser.add_argument(
        "--max-passes",
        type=float,
        default=default.max_passes,
        metavar="X",
        help="of a request for all tasks that read its kind of input, text or pair; default %(default)s",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder for the release")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="keep what is fitted there; the same command goes on from it"
    )
    add_machine_arguments(parser)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def run(args: argparse.Namespace, pull: Pull | None = None) -> int:
    """0; 1 with one sentence on stderr; 130 where it was interrupted. `pull`: where no folder of live artifacts is."""
    lost = "nothing was written" if args.work is None else f"the same command goes on from {args.work}"
    return guarded("pack", lambda: _run(args, pull), lost)


def _run(args: argparse.Namespace, pull: Pull | None) -> int:
    members = _members(args.config, args.tasks)
    limits = Limits(args.tolerance / 100, args.max_passes)
    check(members, limits, args.out, args.work)
    console = Console()
    names = [member.recipe.task for member in members]
    with Screen(console) as screen, _live(args.live, pull, names, screen) as (live, others):
        release = propose(members, live, args.out, backbones(args), screen, limits, others, args.work)
    _show(release, args.out, console)
    return 0


@contextmanager
def _live(
    folder: Path | None, pull: Pull | None, names: Sequence[str], watcher: Watcher
) -> Iterator[tuple[Path, Collection[str]]]:
    """A folder of the live artifacts, and the live tasks that are not in it. What was pulled ends with the block."""
    if folder is not None:
        yield folder, ()
    elif pull is None:
        raise SettingsError("nothing says what is live: name the folder of the live artifacts with --live")
    else:
        with tempfile.TemporaryDirectory(prefix="manifold-live-") as pulled:
            champions = pull(names, Path(pulled))
            taken = [f"{name}@{champions[name]}" for name in names if name in champions]
            watcher.notice([f"live on the server: {', '.join(taken) or 'none of these tasks'}"])
            yield Path(pulled), champions.keys() - set(names)


def _members(config: Path, names: Sequence[str] | None) -> list[Member]:
    """The tasks of the file, or those named. Raises SettingsError."""
    parser = argparse.ArgumentParser("manifold learn")
    command.add_arguments(parser)
    parsed = [parser.parse_args(job.arguments) for job in jobs_file.read_jobs(config, parser)]
    known = {given.task: given for given in parsed}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise SettingsError(f"{config.name} has no task {', '.join(unknown)}: it has {', '.join(known)}")
    chosen = parsed if names is None else [known[name] for name in names]
    return [
        Member(
            command.recipe_of(given),
            Files(given.train, given.dev, given.test),
            None if given.problem_type is None else ProblemType(given.problem_type),
        )
        for given in chosen
    ]


def _show(release: dict[str, Any], out: Path, console: Console) -> None:
    for rows in (task_rows(release), curve_rows(release)):
        heading, *rest = rows
        table = Table(*heading)
        for row in rest:
            table.add_row(*map(Text, row))
        console.print(table)
    for sentence in (*cost(release), *conclusions(release), f"release: {out}"):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="manifold pack")
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
