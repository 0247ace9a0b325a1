"""Which tasks read the bare trunk and which share a branch, so that many of them cost about one pass.

Arrangements are searched greedily by their dev scores. Knows what a plan costs, and nothing of how a score comes about.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from app.domain import Encoding, InputKind, TaskVersion
from app.engine.backbone import Backbone
from app.engine.plan import make_plan
from app.learning.notes import Notes
from app.learning.pack_fits import MOST_READOUTS, OTHER_RATES, TRUNK_FITS, Fitter
from app.learning.pack_tasks import (
    NEAR,
    SHORT_TRUNK,
    TRUNK,
    Limits,
    PrefixTuple,
    Source,
    State,
    Task,
    named,
    prefixes_of,
)
from app.learning.study import Watcher

_SHARED_TRIALS, _MIN_SHARED_TRIALS = 3, 6  # for each task, and at least
_LAST_TRIALS = 2  # for each task
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
    fitter: Fitter = field(init=False)
    trials_left: int = 0  # of tasks on tuples of others' prefixes
    last_trials_left: int = 0  # of tasks that lack nothing on tuples that others read
    refined: set[tuple[str, PrefixTuple]] = field(default_factory=set)  # tasks, learned there at other rates too

    def __post_init__(self) -> None:
        self.fitter = Fitter(self.backbone, self.watcher, self.notes)

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
        alone = (TRUNK_FITS + len(first_layers)) * len(self.tasks)
        refinements = _REFINED_PLACES * len(OTHER_RATES) * len(self.tasks)
        self.watcher.stage("fits at most", alone + MOST_READOUTS * trials + refinements)
        for task in self.tasks.values():
            self.fitter.alone(task, first_layers)
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

    # -- what is measured on the way

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
                    self.fitter.on(task, read)
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
            before = task.scores[read]
            self.fitter.at_other_rates(task, read, recipe)
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
        self.fitter.on(task, read)
        return True


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
