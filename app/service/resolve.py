"""From the names that a caller wrote to the versions that answer, against one snapshot. Pure: no I/O, no state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from app.domain import Arm, InputKind, Snapshot, Task, TaskVersion, TextInput
from app.errors import ForbiddenError, MalformedError, NotFoundError, UnservableError
from app.rollout import State, TaskRecord, VersionRecord

_LISTED = 20  # names that an error lists
_KINDS = {InputKind.TEXT: "single text", InputKind.PAIR: "pair (text and text_pair)"}


@dataclass(frozen=True, slots=True)
class Target:
    """One version that was asked for. `reference` is what the caller wrote, and the key of the answer."""

    reference: str
    version: TaskVersion
    arm: Arm


@dataclass(frozen=True, slots=True)
class Asker:
    """What of a request decides which versions answer it."""

    unit: str = ""  # keeps to its arm in every task
    may_pin_unapproved: bool = False
    pinned: Mapping[tuple[str, int], TaskVersion] = field(default_factory=dict)  # made resident for this request


def choose_targets(
    snapshot: Snapshot, inputs: Sequence[TextInput], references: Sequence[str] | None, asker: Asker
) -> list[tuple[Target, ...]]:
    """The targets of each input: those named, or every live task that fits the input's kind.

    Raises NotFoundError for a name, alias or number that is not there, UnservableError where a task and an input do
    not fit, MalformedError for an empty list, ForbiddenError for a pin that needs a role. The same reference twice is
    one target.
    """
    if references is None:
        return _fitting(snapshot, inputs, asker)
    if not references:
        raise MalformedError("tasks is empty: name at least one, or leave it out to ask every task that fits")
    targets = tuple(_resolve(snapshot, reference, asker) for reference in dict.fromkeys(references))
    for target in targets:
        _check_kinds(target, inputs)
    return [targets] * len(inputs)


def pins_to_load(snapshot: Snapshot, references: Iterable[str] | None, may_pin_unapproved: bool) -> list[VersionRecord]:
    """The pinned versions that exist and are not resident. Raises as `choose_targets` does."""
    records = []
    for reference in dict.fromkeys(references or ()):
        name, _, alias = reference.partition("@")
        if _is_number(alias):
            record = _pinnable(find_record(snapshot, name), int(alias), may_pin_unapproved)
            if name not in snapshot.tasks or record.version not in snapshot.tasks[name].versions:
                records.append(record)
    return records


def beside(task: Task, target: Target, is_paired: bool) -> tuple[TaskVersion, ...]:
    """What is scored beside the answer of a live arm: shadows, and where `is_paired` the champion beside a challenger.

    The other challenged requests run without it, so that their times are what promotion would bring.
    """
    if target.arm is Arm.PINNED:
        return ()
    champion = (task.champion,) if is_paired and target.arm is Arm.CHALLENGER else ()
    return *champion, *(task.versions[number] for number in task.traffic.shadow)


def is_paired(request_id: str) -> bool:
    """Half of all requests."""
    return hashlib.sha256(request_id.encode("utf-8", "surrogatepass")).digest()[0] % 2 == 0


def representation(snapshot: Snapshot, model: str) -> TaskVersion:
    """The version behind a model name of /v1/embeddings. Raises NotFoundError."""
    if model not in snapshot.representations:
        raise NotFoundError(f'there is no representation "{model}"; {_listing(list(snapshot.representations))}')
    return snapshot.representations[model]


def find_task(snapshot: Snapshot, name: str) -> Task:
    """A live one. Raises NotFoundError."""
    if name in snapshot.tasks:
        return snapshot.tasks[name]
    if name in snapshot.representations:
        raise NotFoundError(f'"{name}" is a representation, not a task: ask POST /v1/embeddings for it')
    if name in snapshot.view.tasks:
        raise NotFoundError(f"no version of task {name} is live: approve one and make it the champion")
    raise NotFoundError(f'there is no task "{name}"; {_listing(list(snapshot.tasks))}')


def find_record(snapshot: Snapshot, name: str) -> TaskRecord:
    """Live or not. Raises NotFoundError."""
    record = snapshot.view.tasks.get(name)
    return find_task(snapshot, name).record if record is None else record


def find_version(record: TaskRecord, number: int) -> VersionRecord:
    """Raises NotFoundError."""
    if number not in record.versions:
        numbers = [str(n) for n in sorted(record.versions)[-_LISTED:]]
        raise NotFoundError(f"task {record.name} has no version {number}; its newest are {', '.join(numbers)}")
    return record.versions[number]


def _fitting(snapshot: Snapshot, inputs: Sequence[TextInput], asker: Asker) -> list[tuple[Target, ...]]:
    live = [_arm(task, name, asker) for name, task in snapshot.tasks.items()]
    chosen = [tuple(target for target in live if target.version.input_kind == text.kind) for text in inputs]
    for index, targets in enumerate(chosen):
        if not targets:
            raise UnservableError(f"no live task reads a {_KINDS[inputs[index].kind]}, which input {index} is")
    return chosen


def _resolve(snapshot: Snapshot, reference: str, asker: Asker) -> Target:
    name, at, alias = reference.partition("@")
    if _is_number(alias):
        return _pinned(snapshot, reference, name, int(alias), asker)
    task = find_task(snapshot, name)
    if not at:
        return _arm(task, reference, asker)
    if alias == Arm.CHAMPION:
        return Target(reference, task.champion, Arm.CHAMPION)
    if alias == Arm.CHALLENGER:
        return _challenger(task, reference)
    raise NotFoundError(f'"{reference}" names no version: after @ comes a number, champion or challenger')


def _pinned(snapshot: Snapshot, reference: str, name: str, number: int, asker: Asker) -> Target:
    record = _pinnable(find_record(snapshot, name), number, asker.may_pin_unapproved)
    resident = asker.pinned.get((name, record.version))
    if resident is None:
        resident = find_task(snapshot, name).versions[record.version]
    return Target(reference, resident, Arm.PINNED)


def _pinnable(task: TaskRecord, number: int, may_pin_unapproved: bool) -> VersionRecord:
    record = find_version(task, number)
    if record.state is not State.APPROVED and not may_pin_unapproved:
        raise ForbiddenError(f"{task.name}@{number} is {record.state}: asking it needs a key with the role approve")
    return record


def _arm(task: Task, reference: str, asker: Asker) -> Target:
    number = task.traffic.choose(asker.unit)
    arm = Arm.CHAMPION if number == task.traffic.champion else Arm.CHALLENGER
    return Target(reference, task.versions[number], arm)


def _challenger(task: Task, reference: str) -> Target:
    if not task.traffic.challengers:
        raise NotFoundError(f"task {task.name} has no challenger at the moment")
    return Target(reference, task.versions[task.traffic.challengers[0].version], Arm.CHALLENGER)


def _is_number(alias: str) -> bool:
    return alias.isascii() and alias.isdecimal() and len(alias) < 10


def _check_kinds(target: Target, inputs: Sequence[TextInput]) -> None:
    wanted = target.version.input_kind
    for index, text in enumerate(inputs):
        if text.kind != wanted:
            reads, given = _KINDS[wanted], _KINDS[text.kind]
            raise UnservableError(f"task {target.reference} reads a {reads} and input {index} is a {given}")


def _listing(names: Sequence[str]) -> str:
    if not names:
        return "none is live"
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return "those live are " + ", ".join(sorted(names)[:_LISTED]) + more
