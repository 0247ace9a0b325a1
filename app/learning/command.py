"""`manifold learn`: from files of labelled texts to an artifact. Knows the command line and the screen."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from app.domain import BackboneSpec, ProblemType, ReadoutKind
from app.engine.artifact import CONFIG, MANIFEST, TENSORS
from app.errors import SettingsError
from app.learning import jobs, writer
from app.learning.compose import usable
from app.learning.finetune import FinetuneSettings
from app.learning.learn import Files, Options, learn
from app.learning.problems import CHOICES
from app.learning.recipe import Recipe
from app.learning.search import Arrangement
from app.learning.terminal import Screen, add_machine_arguments, backbones, guarded, numbers
from app.learning.writer import REPORT

_DESCRIPTION = """Learn a task from labelled texts and write its artifact.

Files are TSV, CSV or JSON lines with the columns text (or text_a and text_b) and label, labels (joined by |) or
score; or JSON lines with tokens and tags (BIO)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = Recipe(task="")
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--task", metavar="NAME", help="the name that requests use")
    parser.add_argument("--train", type=Path, metavar="FILE")
    parser.add_argument("--dev", type=Path, metavar="FILE", help="picks epoch and thresholds; default a tenth of train")
    parser.add_argument("--test", type=Path, metavar="FILE", help="measured at the end")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the artifact's folder")
    parser.add_argument(
        "--golden",
        type=Path,
        metavar="FILE",
        help="inputs a line (pairs: with a tab between) to keep as golden examples; default rows of dev",
    )
    kinds = [kind.value for kind in ProblemType if kind is not ProblemType.EMBEDDING]
    parser.add_argument("--problem-type", choices=kinds, help="where the columns do not say it")
    _add_search_arguments(parser)
    _add_model_arguments(parser)
    _add_training_arguments(parser, default)
    add_machine_arguments(parser)
    jobs.add_arguments(parser)


def _add_search_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "what is tried", "Unless a readout, a prefix or prefixes are given, the cheapest arrangement is searched for."
    )
    group.add_argument("--auto", action=argparse.BooleanOptionalAction, help="default: on where nothing is given")
    names = ",".join(_ARRANGEMENTS)
    group.add_argument(
        "--candidates",
        type=_arrangements,
        default=_ARRANGEMENTS,
        metavar="NAME,NAME",
        help=f"of {names}; default all",
    )
    group.add_argument("--compose", choices=["auto"], help="choose among the pool's prefixes and their combinations")
    group.add_argument(
        "--pool",
        type=_folders,
        metavar="DIR,DIR",
        help="artifacts to combine, or folders of them; default the shipped ones",
    )
    group.add_argument(
        "--tolerance", type=float, default=0.5, metavar="X", help="points of dev score that less cost may lose; 0.5"
    )
    group.add_argument(
        "--baselines", action=argparse.BooleanOptionalAction, default=True, help="majority, TF-IDF and a linear head"
    )
    group.add_argument("--full-finetune", action="store_true", help="also fine-tune the whole backbone, as the ceiling")
    group.add_argument(
        "--finetune-epochs", type=int, default=FinetuneSettings().epochs, metavar="N", help=f"of it; {_DEFAULT}"
    )


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is learned")
    readouts = [kind.value for kind in ReadoutKind]
    group.add_argument(
        "--readout", choices=readouts, help="default attention; matching for pairs, tokens for tags of tokens"
    )
    group.add_argument("--read-layers", type=numbers, metavar="N,N", help="default: the last of each third")
    group.add_argument("--num-queries", type=int, metavar="N", help="for each layer read: 2 for up to 8 labels, else 4")
    group.add_argument("--num-members", type=int, metavar="N", help=_MEMBERS)
    group.add_argument("--hidden", type=int, metavar="N", help=_HIDDEN)
    group.add_argument(
        "--num-virtual-tokens", type=int, metavar="N", help="of a prefix of the task's own; default none"
    )
    group.add_argument("--first-layer", type=int, metavar="N", help="where that prefix begins; default 0")
    group.add_argument("--prefixes", type=_folders, metavar="DIR,DIR", help="combine these, frozen")


def _add_training_arguments(parser: argparse.ArgumentParser, default: Recipe) -> None:
    group = parser.add_argument_group("how it is trained")
    told = f"default {default.epochs}, more where rows are few"
    group.add_argument("--epochs", type=int, metavar="N", help=told)
    names = sorted({name for names in CHOICES.values() for name in names})
    told = (
        "what of dev chooses epochs, settings and arrangements; default accuracy, macro_f1, pearson or f1, by problem"
    )
    group.add_argument("--measure", choices=names, help=told)
    for name in ("patience", "batch_size", "seed"):
        group.add_argument(_flag(name), type=int, default=getattr(default, name), metavar="N", help=_DEFAULT)
    for name in _RATES:  # None: a search may choose; a given one, also the default's own number, stays
        told = f"default {getattr(default, name):g}"
        told = f"{_CLASS_WEIGHT_POWER}; {told}" if name == "class_weight_power" else told
        group.add_argument(_flag(name), type=float, metavar="X", help=told)


_SHIPPED_PREFIXES = Path(__file__).resolve().parents[2] / "prefixes"
_DEFAULT = "default %(default)s"
_CLASS_WEIGHT_POWER = (
    "for imbalanced labels, how much more rare ones count in the loss: 0 not at all, 0.5 by the root of how rare they "
    "are, 1 as much as frequent ones"
)
_RATES = (
    "learning_rate",
    "query_learning_rate",
    "prefix_learning_rate",
    "weight_decay",
    "dropout",
    "class_weight_power",
)
_ARRANGEMENTS = tuple(Arrangement)
_REQUIRED = ("task", "train", "out")
_CHOICES = ("readout", "read_layers", "num_virtual_tokens", "first_layer", "prefixes")  # any of them ends the search
_MEMBERS = "learn so many readouts beside each other and average them: surer, and so many times as large; default 1"
_HIDDEN = "width of the head's hidden layer, 0: a linear head; default by labels: 32 up to 8, 64 up to 100, else 96"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _folders(text: str) -> tuple[Path, ...]:
    return tuple(Path(part) for part in text.split(",") if part)


def _arrangements(text: str) -> tuple[Arrangement, ...]:
    try:
        return tuple(Arrangement(part) for part in text.split(","))
    except ValueError as error:
        known = ", ".join(Arrangement)
        raise argparse.ArgumentTypeError(f'"{text}" is not a list of {known}') from error


def run(args: argparse.Namespace) -> int:
    """0; 1 with one sentence on stderr; 130 where it was interrupted."""
    return guarded("learn", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    if args.config is not None:
        _check_alone(args)
        return jobs.run(args.config, args.jobs, _parser(), Console())
    _check_required(args)
    both = backbones(args)
    options = _options(args, both[0].spec)
    with Screen(Console()) as screen:
        writer.check_room(args.out.absolute())
        manifest = learn(recipe_of(args), Files(args.train, args.dev, args.test), args.out, both, screen, options)
    was_interrupted = manifest["training"]["interrupted"]
    _show(manifest, args.out)
    if was_interrupted or not getattr(args, "publish", False):  # else whoever added --publish does it now
        Console().print(jobs.next_step(args.out), markup=False, soft_wrap=True)
    if not was_interrupted:
        return 0
    Console(stderr=True).print(f"manifold learn: interrupted, {jobs.BEST_WRITTEN}", soft_wrap=True)
    return 130


def _check_alone(args: argparse.Namespace) -> None:
    plain = vars(_parser().parse_args([]))
    given = [_flag(name) for name, value in vars(args).items() if name in plain and value != plain[name]]
    others = sorted(set(given) - {"--config", "--jobs"})
    if others:
        raise SettingsError(
            f"{', '.join(others)} beside --config: put options into the file, under [defaults], or [tasks.NAME] for one"
        )


def _typed() -> list[str]:
    """The command's options as they were typed, under `manifold learn` or as a module."""
    return sys.argv[2:] if sys.argv[1:2] == ["learn"] else sys.argv[1:]


def _check_required(args: argparse.Namespace) -> None:
    missing = [_flag(name) for name in _REQUIRED if getattr(args, name) is None]
    if missing:
        raise SettingsError(f"{', '.join(missing)} must be given, or --config with a file of tasks")


def _options(args: argparse.Namespace, spec: BackboneSpec) -> Options:
    given = any(getattr(args, name) is not None for name in _CHOICES)
    if given and (args.auto or args.compose):
        raise SettingsError("--auto and --compose choose what --readout, --prefixes and the like give: leave one out")
    if args.first_layer is not None and not args.num_virtual_tokens:
        raise SettingsError("--first-layer is where the task's own prefix begins: give --num-virtual-tokens too")
    if args.finetune_epochs < 1:
        raise SettingsError("--finetune-epochs is out of range: give 1 or more")
    is_search = args.auto is not False and not given and not args.compose
    needs_pool = args.compose or (is_search and Arrangement.COMBINATION in args.candidates)
    pool: tuple[Path, ...] = ()
    if args.pool is not None:
        pool = tuple(path for given in args.pool for path in _artifacts(given, spec, args.task))
    elif needs_pool:
        pool = tuple(usable(_SHIPPED_PREFIXES, spec, args.task))
    return Options(
        problem_type=None if args.problem_type is None else ProblemType(args.problem_type),
        arrangements=args.candidates if is_search else (),
        pool=pool,
        compose=args.compose is not None,
        tolerance=args.tolerance / 100,
        baselines=args.baselines,
        finetuning=FinetuneSettings(epochs=args.finetune_epochs, seed=args.seed) if args.full_finetune else None,
        golden=args.golden,
        raise_epochs=args.epochs is None,
        given=frozenset(_given(args)),
        command=shlex.join(["manifold", "learn", *_typed()]),
    )


def _artifacts(path: Path, spec: BackboneSpec, task: str) -> list[Path]:
    """The artifact, or those with a prefix in a folder of artifacts."""
    is_artifact = any((path / name).is_file() for name in (MANIFEST, CONFIG))
    return [path] if is_artifact or not path.is_dir() else usable(path, spec, task)


def _given(args: argparse.Namespace) -> list[str]:
    """Choices of the recipe that stand on the command line and that a search must leave alone."""
    return [name for name in (*_RATES, "hidden", "num_queries", "num_members") if getattr(args, name) is not None]


def recipe_of(args: argparse.Namespace) -> Recipe:
    given = {name: getattr(args, name) for name in ("epochs", *_RATES) if getattr(args, name) is not None}
    return Recipe(
        task=args.task,
        readout=None if args.readout is None else ReadoutKind(args.readout),
        read_layers=args.read_layers or (),
        num_queries=args.num_queries,
        num_members=1 if args.num_members is None else args.num_members,
        hidden=args.hidden,
        first_layer=args.first_layer or 0,
        num_virtual_tokens=args.num_virtual_tokens or 0,
        prefixes=args.prefixes or (),
        patience=args.patience,
        batch_size=args.batch_size,
        seed=args.seed,
        measure=args.measure or "",
        **given,
    )


def _show(manifest: dict[str, Any], out: Path) -> None:
    console = Console()
    measured = {name: figures for name, figures in manifest["evaluation"].items() if isinstance(figures, dict)}
    last = "test" if "test" in measured else "dev"
    rows = dict(measured)
    for name, figures in manifest["baselines"].items():
        rows[f"{last}, {name}"] = figures.get(last, {})
    names = list(dict.fromkeys(name for figures in rows.values() for name in figures))
    grid = Grid("", *names)
    for title, figures in rows.items():
        grid.add_row(title, *(_shown(name, figures.get(name)) for name in names))
    console.print(grid)
    size_kb = (out / TENSORS).stat().st_size / 1000
    cost = f"{manifest['cost']['passes']:.2f} passes beside tasks on the bare trunk"
    console.print(f"{manifest['task']}: {out} ({size_kb:.0f} kB, {cost})", soft_wrap=True)
    console.print(f"report: {out / REPORT}", soft_wrap=True)


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return str(value) if name == "rows" else f"{value:.4f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="manifold learn")
    add_arguments(parser)
    return parser


def main() -> int:
    return run(_parser().parse_args())


if __name__ == "__main__":
    sys.exit(main())
