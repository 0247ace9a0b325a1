"""Which tasks read the bare trunk and which share a branch, so that many of them cost about one pass.

Arrangements are measured on dev and searched greedily. Knows live artifacts, studies and what a plan costs; writes
nothing but prefixes and notes for its own use.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from app.domain import BackboneSpec, Encoding, InputKind, ProblemType, ReadoutKind, TaskVersion
from app.engine.artifact import flatten_prefix, read_artifact
from app.engine.artifact_checks import FORMAT_VERSION, PROMPT, prefix_digest
from app.engine.backbone import Backbone
from app.engine.plan import make_plan
from app.engine.tokenizer import TextTokenizer
from app.learning import writer
from app.learning.learn import with_enough_steps
from app.learning.notes import Notes, Trial, key_of
from app.learning.pack_tasks import (
    NEAR,
    SHORT_TRUNK,
    TRUNK,
    Limits,
    Live,
    PrefixTuple,
    Source,
    State,
    Task,
    named,
    num_virtual_tokens_of,
    prefixes_of,
    whole_artifact,
)
from app.learning.prepare import read_frozen
from app.learning.recipe import Recipe
from app.learning.search import passes_of
from app.learning.study import Fitted, Quiet, Study, Tables, Watcher

_SHARED_TRIALS, _MIN_SHARED_TRIALS = 3, 6  # for each task, and at least
_LAST_TRIALS = 2  # for each task
_READOUT_STEPS = 900  # over fixed states a step costs next to nothing, and with a third of them emotion lost 8 points
_LINEAR_RATE = 10.0  # times a readout's: a single layer learns best so
_NEAR_READOUT = 0.03  # a linear head that is no more than this behind is tried wherever a readout with queries is
_TRUNK_FITS, _MOST_READOUTS = 5, 2
_OTHER_RATES = (3.0, 1 / 3)  # times a readout's own, for a task that lacks where it has come to stand
_REFINED_PLACES = 2  # of a task, on average
_FREE = 1e-3  # passes that a move is taken to cost at least
_ENCODING = Encoding((0,), (0,))  # what a plan costs in passes is the same for every text


@dataclass(slots=True, eq=False)
class Search:
    """Measures arrangements, and moves tasks until none lacks anything or nothing more can be afforded.

    A move puts tasks that lack onto one tuple, or back onto the trunk. Of all moves that `max_passes` allows, the one
    that removes most of what is lacking for each extra pass is taken, again and again. Where a tuple is affordable
    only if nobody reads the trunk's last layer, its readers stop below. Where no move is left, what lacks still is
    learned at other rates, and all others are tried on the tuples in use. A text and a pair never stand in one
    request, so each kind of input has its own plan, and the limit holds for each.
    """

    tasks: dict[str, Task]
    backbone: Backbone
    watcher: Watcher
    limits: Limits
    notes: Notes
    fits: int = 0
    trials_left: int = 0  # of tasks on tuples of others' prefixes
    last_trials_left: int = 0  # of tasks that lack nothing on tuples that others read
    refined: set[tuple[str, PrefixTuple]] = field(default_factory=set)  # tasks, learned there at other rates too

    def run(self) -> list[tuple[str, State]]:
        """Every state that the search went through, with what led to it."""
        first_layers = self._first_layers()
        self.trials_left = max(_SHARED_TRIALS * len(self.tasks), _MIN_SHARED_TRIALS)
        self.last_trials_left = _LAST_TRIALS * len(self.tasks)
        trials = (
            self.trials_left
            + self.last_trials_left
            + sum(len(first_layers) + task.live_is_ahead for task in self.tasks.values())
        )
        alone = (_TRUNK_FITS + len(first_layers)) * len(self.tasks)
        refinements = _REFINED_PLACES * len(_OTHER_RATES) * len(self.tasks)
        self.watcher.stage("fits at most", alone + _MOST_READOUTS * trials + refinements)
        for task in self.tasks.values():
            self._measure_alone(task, first_layers)
        states = [("all on the bare trunk", dict.fromkeys(self.tasks, TRUNK))]
        while (move := self._next_move(states[-1][1])) is not None or self._knows_more([state for _, state in states]):
            if move is not None:
                states.append(move)
        return states

    def passes(self, state: Mapping[str, PrefixTuple]) -> dict[InputKind, float]:
        return self.plan_passes(self.tasks[name].version(read) for name, read in state.items())

    def plan_passes(self, versions: Iterable[TaskVersion]) -> dict[InputKind, float]:
        """For each kind of input, of one request for all of them that read it."""
        by_kind: dict[InputKind, list[TaskVersion]] = {}
        for version in versions:
            by_kind.setdefault(version.input_kind, []).append(version)
        layers = self.backbone.spec.num_layers
        return {kind: make_plan(_ENCODING, by_kind[kind], layers).passes for kind in InputKind if kind in by_kind}

    def average(self, state: Mapping[str, PrefixTuple]) -> float:
        return sum(self.tasks[name].scores[read] for name, read in state.items()) / len(state)

    def lacking(self, state: Mapping[str, PrefixTuple]) -> list[Task]:
        """What lacks most comes first."""
        tasks = [self.tasks[name] for name, read in state.items() if self._shortfall(name, read)]
        return sorted(tasks, key=lambda task: -self._shortfall(task.name, state[task.name]))

    def _shortfall(self, name: str, read: PrefixTuple) -> float:
        return self.tasks[name].shortfall(read, self.limits.tolerance)

    def _total_shortfall(self, state: Mapping[str, PrefixTuple]) -> float:
        return sum(self._shortfall(name, read) for name, read in state.items())

    def _first_layers(self) -> list[int]:
        """Of own prefixes, from the cheapest: the last few layers."""
        top = self.backbone.spec.num_layers
        return sorted({5 * top // 6, 2 * top // 3, top // 2}, reverse=True)

    # -- one task alone

    def _measure_alone(self, task: Task, first_layers: Sequence[int]) -> None:
        """On the bare trunk, with a prefix of its own, and beside what it reads now."""
        study = self._study(task)
        self._measure_trunk(task, study)
        for first_layer in first_layers:
            if first_layer < task.readout.read_layers[-1]:
                self._measure_own(task, study, first_layer)
        if task.live is not None:
            self._compare_live(task, task.live, study)

    def _measure_trunk(self, task: Task, study: Study) -> None:
        """Readouts at two pairs of rates, then of all layers and of all but the last; and a linear head, which can be
        best where rows are few for each label."""
        base = with_enough_steps(task.bare, len(task.part.train.examples), _READOUT_STEPS)
        slow = study.completed(base)
        fast = replace(slow, learning_rate=3 * slow.learning_rate, query_learning_rate=slow.query_learning_rate / 3)
        layers = tuple(range(1, self.backbone.spec.num_layers + 1))
        self._prepare(study, [slow, fast], (replace(slow, read_layers=layers),))
        fits = [self._fit_trunk(task, study, slow, ""), self._fit_trunk(task, study, fast, ", other rates")]
        better = max(fits, key=_dev).recipe
        wide = replace(better, read_layers=layers)
        if wide != better:
            fits.append(self._fit_trunk(task, study, wide, " of all layers"))
        best = max(fits, key=_dev)
        task.readouts = [best.recipe]
        if len(layers) > 1:
            short = replace(better, read_layers=layers[:-1])
            trial = self._fit(task, study, short, f"{named(SHORT_TRUNK)}, {short.readout}")
            task.note(SHORT_TRUNK, trial.dev, short)
        if slow.reads.kind.has_queries:
            rate = _LINEAR_RATE * base.learning_rate
            linear = replace(base, readout=ReadoutKind.MEAN, hidden=0, learning_rate=rate)
            plain = self._fit_trunk(task, study, study.completed(linear), ", linear")
            if _dev(plain) >= _dev(best) - _NEAR_READOUT:
                task.readouts.append(plain.recipe)

    def _fit_trunk(self, task: Task, study: Study, recipe: Recipe, told: str) -> Trial:
        trial = self._fit(task, study, recipe, f"bare trunk, {recipe.readout}{told}")
        task.note(TRUNK, trial.dev, recipe)
        return trial

    def _measure_own(self, task: Task, study: Study, first_layer: int) -> None:
        """A prefix is trained for as long as its member says, and readouts then fitted on it for longer."""
        count, bare = num_virtual_tokens_of(task.member), task.bare
        schedule = replace(task.readout, epochs=bare.epochs, patience=bare.patience)
        recipe = study.completed(replace(schedule, num_virtual_tokens=count, first_layer=first_layer))
        key = self._key(study, recipe)
        path = self.notes.folder / f"prefix-{key}"
        if whole_artifact(path, self.backbone.spec) is None:
            self.notes.forget(key)
        name = f"own prefix from layer {first_layer}"
        trial = self._fit(task, study, recipe, name, lambda fitted: _write_prefix(path, fitted, self.backbone.spec))
        source = Source(task.name, path, read_artifact(path, self.backbone.spec).version(0).prefixes, is_live=False)
        task.sources.append(source)
        task.own[source] = recipe
        task.note((source,), trial.dev, recipe)
        self._fit_readouts(task, (source,), study)

    def _compare_live(self, task: Task, live: Live, study: Study) -> None:
        """Where it learned from more rows, its prefixes get a new readout from the search's."""
        read = TRUNK
        if live.version.prefixes:
            source = Source(task.name, live.path, live.version.prefixes, is_live=True)
            task.sources.append(source)
            read = (source,)
        if not task.live_is_ahead:
            task.note(read, live.dev)
        elif read:
            self._fit_readouts(task, read, study)

    # -- moves

    def _next_move(self, state: State) -> tuple[str, State] | None:
        lacking = self.lacking(state)
        if not lacking:
            return None
        return self._best_of(self._moves(state, lacking), state) or self._best_of(
            self._gatherings(state, lacking), state
        )

    def _best_of(self, possible: Iterator[tuple[str, State]], state: State) -> tuple[str, State] | None:
        moves = list(possible)  # measured by now, which may have found a better best
        before, passes = self._total_shortfall(state), sum(self.passes(state).values())

        def worth(move: tuple[str, State]) -> tuple[float, float, float, int]:
            """Of equal moves the one with the fewest prefixes, which chance had less to choose from."""
            gain, extra = before - self._total_shortfall(move[1]), sum(self.passes(move[1]).values()) - passes
            num_prefixes = sum(len(prefixes_of(read)) for read in set(move[1].values()))
            return gain / max(extra, _FREE), -extra, self.average(move[1]), -num_prefixes

        useful = [m for m in moves if self._is_affordable(m[1]) and before - self._total_shortfall(m[1]) > NEAR]
        return max(useful, key=worth, default=None)

    def _is_affordable(self, state: Mapping[str, PrefixTuple]) -> bool:
        return max(self.passes(state).values()) <= self.limits.max_passes + NEAR

    def _moves(self, state: State, lacking: Sequence[Task]) -> Iterator[tuple[str, State]]:
        """Of one kind of input after the other, since they share no pass; that of the task that lacks most first."""
        for kind in dict.fromkeys(task.input_kind for task in lacking):
            yield from self._moves_of(kind, state, [task for task in lacking if task.input_kind is kind])

    def _moves_of(self, kind: InputKind, state: State, lacking: Sequence[Task]) -> Iterator[tuple[str, State]]:
        """What is likeliest to help comes first: the number of fits is bounded."""
        for read in (TRUNK, SHORT_TRUNK):
            yield from self._move(state, read, (), [task for task in lacking if read in task.scores])
        alike = (read for name, read in state.items() if self.tasks[name].input_kind is kind)
        in_use = [read for read in dict.fromkeys(alike) if prefixes_of(read)]
        for read in in_use:
            yield from self._move(state, read, (), lacking)
        for read in _new_tuples(lacking, self._first_layers()):
            # Others join a prefix of the task that lacks most; any other task at first reads its own alone.
            joining = lacking if read[0].owner == lacking[0].name or len(read) > 1 else []
            owners = [task for task in lacking if any(source.owner == task.name for source in read)]
            yield from self._move(state, read, (), joining or owners)
        for read in in_use:
            members = [self.tasks[name] for name in state if state[name] == read]
            for source in sorted(lacking[0].sources, key=lambda source: -source.first_layer):
                if not _shares(read, source):
                    yield from self._move(state, (*read, source), members, lacking)
        yield from self._exchanges(state, in_use, lacking)

    def _exchanges(
        self, state: State, in_use: Sequence[PrefixTuple], lacking: Sequence[Task]
    ) -> Iterator[tuple[str, State]]:
        """Onto a tuple that is known to suit a task that lacks, all that read another one, which is then spared."""
        for task in lacking:
            better = [read for read in task.scores if prefixes_of(read)]
            for read in (read for read in better if task.scores[read] > task.scores[state[task.name]]):
                for spared in (other for other in in_use if other != read):
                    members = [self.tasks[name] for name in state if state[name] == spared]
                    if all(read in member.scores for member in members):
                        yield from self._move(state, read, members, lacking)

    def _gatherings(self, state: State, lacking: Sequence[Task]) -> Iterator[tuple[str, State]]:
        """All tasks of one kind of input onto one tuple: nothing reads the trunk above its fork any more.

        Tasks that lack nothing move too, so it comes when nothing else helps.
        """
        for kind in dict.fromkeys(task.input_kind for task in lacking):
            members = [task for task in self.tasks.values() if task.input_kind is kind]
            alike = [task for task in lacking if task.input_kind is kind]
            for first_layer in self._first_layers():
                if read := _own_prefixes(alike, first_layer):
                    yield from self._move(state, read, members, ())

    def _move(
        self, state: State, read: PrefixTuple, members: Sequence[Task], lacking: Sequence[Task]
    ) -> Iterator[tuple[str, State]]:
        """Onto `read`: all `members`, and of those that lack whom it helps."""
        carried = {task.name: read for task in members}
        if self._afforded(state | carried) is None:
            return
        others = [task for task in lacking if task.name not in carried]
        if self._afforded(state | carried | {task.name: read for task in others}) is None:
            others = []
        if not all(self._measure(task, read) for task in members):
            return
        helped = [t for t in others if self._measure(t, read) and t.scores[read] > t.scores[state[t.name]]]
        names = [task.name for task in (*members, *helped)]
        moved = self._afforded(state | dict.fromkeys(names, read)) if names else None
        if moved is not None:
            by_place: dict[PrefixTuple, list[str]] = {}
            for name in sorted(moved, key=lambda name: name not in names):  # those that were meant come first
                if moved[name] != state[name]:
                    by_place.setdefault(moved[name], []).append(name)
            yield "; ".join(f"{', '.join(moving)} on {named(place)}" for place, moving in by_place.items()), moved

    def _afforded(self, state: State) -> State | None:
        """The state, or where it costs too much that in which readers of the trunk stop below the last layer."""
        over = {kind for kind, passes in self.passes(state).items() if passes > self.limits.max_passes + NEAR}
        if not over:
            return state
        shortened = dict(state)
        for task in self.tasks.values():
            if task.input_kind in over and state[task.name] == TRUNK and SHORT_TRUNK in task.scores:
                shortened[task.name] = SHORT_TRUNK
        return shortened if self._is_affordable(shortened) else None

    # -- fits

    def _knows_more(self, states: Sequence[State]) -> bool:
        """Whether more is known now, so that it is worth while to look for moves again."""
        return self._refine(states[-1]) or self._try_in_use(states)

    def _try_in_use(self, states: Sequence[State]) -> bool:
        """Whether a task that lacked nothing is now known to be better on a tuple that others read, or have read."""
        tried = False
        for name, stands in states[-1].items():
            task = self.tasks[name]
            alike = (s[other] for s in reversed(states) for other in s if self._are_alike(other, name))
            for read in dict.fromkeys(alike):
                if self.last_trials_left and prefixes_of(read) and read not in task.scores:
                    self.last_trials_left -= 1
                    self._fit_readouts(task, read, self._study(task))
                    tried |= bool(task.shortfall(stands, self.limits.tolerance))
        return tried

    def _are_alike(self, one: str, other: str) -> bool:
        return self.tasks[one].input_kind is self.tasks[other].input_kind

    def _refine(self, state: State) -> bool:
        """Whether one of those that lack is better now where it stands, at other rates than those of the trunk."""
        room = _REFINED_PLACES * len(self.tasks)
        for task in self.lacking(state):
            read = state[task.name]
            recipe = task.recipes.get(read)  # None: it is live as it is
            if recipe is None or recipe.num_virtual_tokens:
                continue
            if (task.name, read) in self.refined or len(self.refined) >= room:
                continue
            self.refined.add((task.name, read))
            before, study = task.scores[read], self._study(task)
            others = [replace(recipe, learning_rate=factor * recipe.learning_rate) for factor in _OTHER_RATES]
            self._prepare(study, others)
            for other in others:
                name = f"{named(read)}, rate {other.learning_rate:.2g}"
                task.note(read, self._fit(task, study, other, name).dev, other)
            if task.scores[read] > before + NEAR:
                return True
        return False

    def _measure(self, task: Task, read: PrefixTuple) -> bool:
        """Whether the task's score on this tuple is known, now if not before."""
        if read in task.scores:
            return True
        if not self.trials_left:
            return False
        self.trials_left -= 1
        self._fit_readouts(task, read, self._study(task))
        return True

    def _fit_readouts(self, task: Task, read: PrefixTuple, study: Study) -> None:
        paths = tuple(source.path for source in read)
        recipes = [study.completed(replace(readout, prefixes=paths)) for readout in task.readouts]
        self._prepare(study, recipes)
        for recipe in recipes:
            name = named(read) if recipe.readout is task.readout.readout else f"{named(read)}, {recipe.readout}"
            task.note(read, self._fit(task, study, recipe, name).dev, recipe)
        study.forget(recipes[0])

    def _prepare(self, study: Study, recipes: Sequence[Recipe], wider: Sequence[Recipe] = ()) -> None:
        """Unless all of them are known. `wider`: with more layers, at once, since they come next."""
        if any(self._key(study, recipe) not in self.notes for recipe in recipes):
            study.prepare([*recipes, *wider])

    def _fit(
        self, task: Task, study: Study, recipe: Recipe, name: str, keep: Callable[[Fitted], None] | None = None
    ) -> Trial:
        """As it is known, or now; `keep` is given what is fitted now."""
        key = self._key(study, recipe)
        if key not in self.notes:
            fitted = study.fit(recipe, lambda *_: None)
            if fitted.was_interrupted:
                raise KeyboardInterrupt
            if keep is not None:
                keep(fitted)
            self.notes.add(key, Trial(recipe, fitted.best.dev, fitted.seconds))
        trial = self.notes.trial(key, recipe)
        self.fits += 1
        self.watcher.candidate(f"{task.name}: {name}", passes_of(recipe, self.backbone.spec), trial.dev, trial.seconds)
        return trial

    def _key(self, study: Study, recipe: Recipe) -> str:
        return key_of(recipe, made_from(recipe, study.tables, ("train", "dev"), self.backbone.spec))

    def _study(self, task: Task) -> Study:
        """A new one each time: the states of all tasks would not fit into memory."""
        return Study(task.part, self.backbone, TextTokenizer(self.backbone.path), Quiet())


def _dev(trial: Trial) -> float:
    return trial.dev


def _new_tuples(lacking: Sequence[Task], first_layers: Sequence[int]) -> Iterator[PrefixTuple]:
    """From the latest fork: the lacking tasks' prefixes combined, and each alone; then what is live, each alone."""
    for first_layer in first_layers:
        own = _own_prefixes(lacking, first_layer)
        if len(own) > 1:
            yield own
        yield from ((source,) for source in own)
    yield from ((source,) for task in lacking for source in task.sources if source.is_live)


def _own_prefixes(tasks: Sequence[Task], first_layer: int) -> PrefixTuple:
    return tuple(s for task in tasks for s in task.sources if not s.is_live and s.first_layer == first_layer)


def _shares(read: PrefixTuple, source: Source) -> bool:
    """Whether a prefix would stand in the tuple twice."""
    return bool(set(prefixes_of(read)) & set(source.prefixes))


def made_from(recipe: Recipe, tables: Tables, names: Collection[str], spec: BackboneSpec) -> dict[str, Any]:
    """What a fit depends on beside its recipe: rows of the tables in `names`, the problem, frozen prefixes, model."""
    rows = {name: [table.sha256, len(table.examples)] for name, table in tables.named.items() if name in names}
    return {
        "rows": rows,
        "problem": [tables.problem_type, *tables.labels],
        "prefixes": [prefix.digest for prefix in read_frozen(recipe, spec).prefixes],
        "model": [spec.fingerprint, spec.dtype],
    }


def _write_prefix(path: Path, fitted: Fitted, spec: BackboneSpec) -> None:
    """A trained prefix alone, as a representation that others can read."""
    recipe, prefix = fitted.recipe, fitted.model.prefix
    assert prefix is not None
    flat = flatten_prefix(prefix.detach().cpu()).to(writer.STORED)
    entry = {
        "digest": prefix_digest(flat, recipe.first_layer),
        "num_virtual_tokens": recipe.num_virtual_tokens,
        "first_layer": recipe.first_layer,
    }
    manifest = {
        "format_version": FORMAT_VERSION,
        "task": recipe.task,
        "problem_type": ProblemType.EMBEDDING,
        "labels": [],
        "readout": {"kind": ReadoutKind.MEAN, "layers": [spec.num_layers]},
        "prefixes": [entry],
        "position_offset": fitted.position_offset,
        "backbone": {"fingerprint": spec.fingerprint},
    }
    shutil.rmtree(path, ignore_errors=True)  # of an earlier run, and broken
    with writer.new_folder(path, "--work") as folder:
        writer.write_tensors(folder, {PROMPT: flat})
        writer.write_manifest(folder, manifest)
