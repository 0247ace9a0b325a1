"""The tasks that `manifold pack` arranges: their rows, how they are served now, and what a search finds of each.

Knows live artifacts, data files and what a plan asks of a version; searches nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from app.domain import BackboneSpec, InputKind, Prefix, ProblemType, TaskVersion
from app.engine.artifact import Artifact, read_artifact
from app.engine.backbone import Backbone
from app.engine.engine import Engine
from app.engine.folder import list_artifacts
from app.engine.tokenizer import TextTokenizer
from app.errors import DataError, ManifoldError, SettingsError
from app.learning import evaluation, writer
from app.learning.evaluation import Scored
from app.learning.learn import with_enough_steps
from app.learning.problems import MEASURES
from app.learning.recipe import Recipe
from app.learning.search import NUM_VIRTUAL_TOKENS
from app.learning.splits import findings, sampled_rows, subsample
from app.learning.study import Files, Tables, Watcher

NEAR = 1e-9  # of passes and scores: less is rounding
_SEARCH_ROWS = 3000  # more are not needed to tell arrangements apart
_SEARCH_DEV_ROWS = 1500


@dataclass(frozen=True, slots=True)
class Member:
    """A task that takes part; of its recipe the readout and the prefixes are chosen here."""

    recipe: Recipe
    files: Files
    problem_type: ProblemType | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    tolerance: float = 0.005  # of dev score that a task may lose against its best arrangement
    max_passes: float = 1.2  # of a request for all tasks that read its kind of input


@dataclass(frozen=True, slots=True)
class Source:
    """What a tuple is made of: a prefix of a task's own, or all those of its live version. None in `SHORT_TRUNK`."""

    owner: str
    path: Path
    prefixes: tuple[Prefix, ...]
    is_live: bool

    @property
    def first_layer(self) -> int:
        return min(prefix.first_layer for prefix in self.prefixes)

    def __str__(self) -> str:
        if not self.prefixes:
            return "the bare trunk without its last layer"
        whose = f"{self.owner}'s live" if self.is_live else f"{self.owner}'s"
        return f"{whose} from layer {self.first_layer}"


PrefixTuple = tuple[Source, ...]
State = dict[str, PrefixTuple]  # task → what it reads
TRUNK: PrefixTuple = ()
SHORT_TRUNK: PrefixTuple = (Source("", Path(), (), is_live=False),)  # no reader of it needs the last layer


@dataclass(frozen=True, slots=True, eq=False)
class Live:
    """A task as it is now."""

    path: Path
    version: TaskVersion
    rows: int  # that it learned from
    manifest: Mapping[str, Any]
    figures: dict[str, float]  # by table, on all its rows
    dev: float  # on the search's dev rows


@dataclass(slots=True, eq=False)
class Task:
    """A task, and what the search has measured of it."""

    member: Member
    tables: Tables
    part: Tables  # the rows that the search uses
    live: Live | None
    bare: Recipe  # as its member says, with steps enough for a prefix
    readouts: list[Recipe] = field(default_factory=list)  # by the search, from the trunk: for all other rows
    sources: list[Source] = field(default_factory=list)
    own: dict[Source, Recipe] = field(default_factory=dict)  # how each of its own prefixes is trained
    scores: dict[PrefixTuple, float] = field(default_factory=dict)  # dev score by what is read
    recipes: dict[PrefixTuple, Recipe] = field(default_factory=dict)  # what had that score, where it was fitted here

    @property
    def name(self) -> str:
        return self.member.recipe.task

    @property
    def readout(self) -> Recipe:
        return self.readouts[0]

    @property
    def input_kind(self) -> InputKind:
        return self.tables.train.input_kind

    @property
    def measure(self) -> str:
        return self.bare.measure or MEASURES[self.tables.problem_type]

    @property
    def live_is_ahead(self) -> bool:
        """The live version learned from more rows than the search has: their scores do not compare."""
        return self.live is not None and self.live.rows > len(self.part.train.examples)

    @property
    def best(self) -> PrefixTuple:
        return max(self.scores, key=lambda read: self.scores[read])

    def shortfall(self, read: PrefixTuple, tolerance: float) -> float:
        """What a measured arrangement lacks of the best one, beyond the tolerance."""
        lost = self.scores[self.best] - tolerance - self.scores[read]
        return lost if lost > NEAR else 0.0

    def note(self, read: PrefixTuple, dev: float, recipe: Recipe | None = None) -> None:
        """`recipe`: how it was fitted; None: it is live as it is."""
        if read in self.scores and dev <= self.scores[read]:
            return
        self.scores[read] = dev
        if recipe is not None:
            self.recipes[read] = recipe

    def recipe_for(self, read: PrefixTuple) -> Recipe:
        """The best found; where only what is live was measured, the first readout."""
        return self.recipes.get(read, self.readout)

    def version(self, read: PrefixTuple) -> TaskVersion:
        """As a plan needs it."""
        tables = self.tables
        return TaskVersion(
            task=self.name,
            version=0,
            digest=self.name,
            problem_type=tables.problem_type,
            labels=tables.labels,
            readout=self.recipe_for(read).reads,
            input_kind=self.input_kind,
            prefixes=prefixes_of(read),
        )


def check(members: Sequence[Member], limits: Limits, out: Path, work: Path | None = None) -> None:
    names = [member.recipe.task for member in members]
    if not names:
        raise SettingsError("there is no task to pack")
    if len(set(names)) < len(names):
        raise SettingsError(f"a task is named twice: {', '.join(sorted(n for n in names if names.count(n) > 1))}")
    if not limits.max_passes >= 1:
        raise SettingsError("--max-passes must be 1 or more: the bare trunk alone takes one pass")
    if not 0 <= limits.tolerance < 1:
        raise SettingsError("--tolerance must be in 0 … 100 points")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SettingsError(f"{out} exists and is not empty: name a new folder with --out")
    if work is not None and work.exists() and not work.is_dir():
        raise SettingsError(f"--work {work} is no folder: name a folder of its own")
    if work is not None and work.resolve().is_relative_to(out.resolve()):
        raise SettingsError(f"--work {work} lies in --out {out}, which is new each time: name another folder")
    writer.check_room(out.absolute())


# -- the tasks as they are now -----------------------------------------------------------------------------------------


def find_live(folder: Path, names: Sequence[str], spec: BackboneSpec) -> dict[str, tuple[Path, Artifact]]:
    """The artifacts in `folder` by their task; of those that cannot be read, one that is asked for is an error."""
    if not folder.is_dir():
        raise SettingsError(f"{folder} is not a folder: name the folder of the live artifacts with --live")
    found: dict[str, tuple[Path, Artifact]] = {}
    newest = {place.path.relative_to(folder).parts[0]: place.path for place in list_artifacts(folder)}
    for path in newest.values():
        try:
            artifact = read_artifact(path, spec)
        except ManifoldError:
            if path.relative_to(folder).parts[0] in names:
                raise
            continue
        task = artifact.manifest["task"]
        if task in found and task in names:
            raise SettingsError(f"{found[task][0]} and {path} are both of task {task}: leave one of them in --live")
        found[task] = path, artifact
    return found


def read_tasks(
    members: Sequence[Member],
    live: Mapping[str, tuple[Path, Artifact]],
    exact: Backbone,
    watcher: Watcher,
    others: Collection[str] = (),
) -> list[Task]:
    """`others`: live tasks beside those in `live`, for the notice alone."""
    names = [member.recipe.task for member in members]
    left_out = sorted({*live, *others} - set(names))
    if left_out:
        watcher.notice([f"live tasks that take no part stay as they are: {', '.join(left_out)}"])
    tokenizer = TextTokenizer(exact.path)
    tasks = [_read_task(member, exact.spec, tokenizer) for member in members]
    for task in tasks:
        noticed = findings(task.tables.named, task.tables.whole)
        watcher.notice([f"{task.name}: {sentence}" for sentence in noticed.sentences()])
    watcher.stage("live tasks", len(tasks))
    with evaluation.running(exact) as engine:
        for task in tasks:
            if task.name in live:
                task.live = _measure_live(task, *live[task.name], engine, tokenizer)
            watcher.advance(1)
    return tasks


def _read_task(member: Member, spec: BackboneSpec, tokenizer: TextTokenizer) -> Task:
    """Raises SettingsError too: better now than behind hours of other tasks' fits."""
    seed = member.recipe.seed
    try:
        tables = Tables.read(member.files, member.problem_type, seed, tokenizer)
    except DataError as error:
        raise DataError(f"{member.recipe.task}: {error}") from error
    train, dev = subsample(tables.train, _SEARCH_ROWS, seed), subsample(tables.dev, _SEARCH_DEV_ROWS, seed)
    bare = replace(member.recipe, readout=None, num_virtual_tokens=0, first_layer=0, prefixes=())
    recipe = with_enough_steps(bare, len(train.examples))
    own = replace(recipe, num_virtual_tokens=num_virtual_tokens_of(member))
    try:
        own.completed(tables.problem_type, tables.num_outputs, spec, tables.train.input_kind)
    except SettingsError as error:
        raise SettingsError(f"{member.recipe.task}: {error}") from error
    return Task(member, tables, replace(tables, train=train, dev=dev), None, recipe)


def num_virtual_tokens_of(member: Member) -> int:
    """Of a prefix of its own."""
    return member.recipe.num_virtual_tokens or NUM_VIRTUAL_TOKENS


def _measure_live(task: Task, path: Path, artifact: Artifact, engine: Engine, tokenizer: TextTokenizer) -> Live:
    tables, version = task.tables, artifact.version(0)
    is_same = version.problem_type is tables.problem_type and version.input_kind is task.input_kind
    if not is_same or set(version.labels) != set(tables.labels):
        raise DataError(f"{path} answers with other labels than the files of {task.name} hold: give the files it is of")
    figures: dict[str, float] = {}
    dev = 0.0
    for name, table in tables.named.items():
        if name == "train":
            continue
        scored = evaluation.score(engine, tokenizer, artifact, table)
        figures[name] = _figure(task, scored, version)
        if name == "dev":
            dev = _figure(task, _part(scored, task), version)
    rows = artifact.manifest.get("data", {}).get("train", {}).get("rows", len(tables.train.examples))
    return Live(path, version, rows, artifact.manifest, figures, dev)


def _part(scored: Scored, task: Task) -> Scored:
    """Of the dev rows that the search uses."""
    rows = sampled_rows(scored.table, _SEARCH_DEV_ROWS, task.bare.seed)
    outputs = tuple(scored.outputs[row] for row in rows)
    return Scored(task.part.dev, outputs, tuple(scored.encodings[row] for row in rows))


def _figure(task: Task, scored: Scored, version: TaskVersion) -> float:
    return evaluation.figures(scored, version.labels, version.thresholds).get(task.measure, 0.0)


def prefixes_of(read: PrefixTuple) -> tuple[Prefix, ...]:
    return tuple(prefix for source in read for prefix in source.prefixes)


def named(read: PrefixTuple) -> str:
    return " + ".join(map(str, read)) or "the bare trunk"


def whole_artifact(path: Path, spec: BackboneSpec) -> Artifact | None:
    """What an earlier run left there; None where that is nothing, or broken."""
    try:
        return read_artifact(path, spec)
    except ManifoldError:
        return None
