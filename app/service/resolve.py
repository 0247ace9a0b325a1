"""From the names that a caller wrote to the versions that answer, against one snapshot. Pure: no I/O, no state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from app.domain import Arm, InputKind, Snapshot, Task, TaskVersion, TextInput
from app.errors import MalformedError, NotFoundError, UnservableError

_LISTED = 20  # names that an error lists
_KINDS = {InputKind.TEXT: "single text", InputKind.PAIR: "pair (text and text_pair)"}


@dataclass(frozen=True, slots=True)
class Target:
    """One version that was asked for. `reference` is what the caller wrote, and the key of the answer."""

    reference: str
    version: TaskVersion
    arm: Arm


def choose_targets(
    snapshot: Snapshot, inputs: Sequence[TextInput], references: Sequence[str] | None
) -> list[tuple[Target, ...]]:
    """The targets of each input: those named, or every live task that fits the input's kind.

    Raises NotFoundError for a name, alias or number that is not there, UnservableError where a task and an input do
    not fit, MalformedError for an empty list. The same reference twice is one target.
    """
    if references is None:
        return _fitting(snapshot, inputs)
    if not references:
        raise MalformedError("tasks is empty: name at least one, or leave it out to ask every task that fits")
    targets = tuple(_resolve(snapshot, reference) for reference in dict.fromkeys(references))
    for target in targets:
        _check_kinds(target, inputs)
    return [targets] * len(inputs)


def representation(snapshot: Snapshot, model: str) -> TaskVersion:
    """The version behind a model name of /v1/embeddings. Raises NotFoundError."""
    if model not in snapshot.representations:
        raise NotFoundError(f'there is no representation "{model}"; {_listing(list(snapshot.representations))}')
    return snapshot.representations[model]


def find_task(snapshot: Snapshot, name: str) -> Task:
    """Raises NotFoundError."""
    if name in snapshot.tasks:
        return snapshot.tasks[name]
    if name in snapshot.representations:
        raise NotFoundError(f'"{name}" is a representation, not a task: ask POST /v1/embeddings for it')
    raise NotFoundError(f'there is no task "{name}"; {_listing(list(snapshot.tasks))}')


def find_version(task: Task, number: int) -> TaskVersion:
    """Raises NotFoundError."""
    if number not in task.versions:
        raise NotFoundError(f"task {task.name} has no version {number}; {_listing([str(n) for n in task.versions])}")
    return task.versions[number]


def _fitting(snapshot: Snapshot, inputs: Sequence[TextInput]) -> list[tuple[Target, ...]]:
    champions = [_champion(task, name) for name, task in snapshot.tasks.items()]
    chosen = [tuple(c for c in champions if c.version.input_kind == text.kind) for text in inputs]
    for index, targets in enumerate(chosen):
        if not targets:
            raise UnservableError(f"no live task reads a {_KINDS[inputs[index].kind]}, which input {index} is")
    return chosen


def _resolve(snapshot: Snapshot, reference: str) -> Target:
    name, at, alias = reference.partition("@")
    task = find_task(snapshot, name)
    if not at or alias == Arm.CHAMPION:
        return _champion(task, reference)
    if alias == Arm.CHALLENGER:
        return _challenger(task, reference)
    if not (alias.isascii() and alias.isdecimal()):
        raise NotFoundError(f'"{reference}" names no version: after @ comes a number, champion or challenger')
    return Target(reference, find_version(task, int(alias)), Arm.PINNED)


def _champion(task: Task, reference: str) -> Target:
    return Target(reference, task.versions[task.champion], Arm.CHAMPION)


def _challenger(task: Task, reference: str) -> Target:
    if task.challenger is None:
        raise NotFoundError(f"task {task.name} has no challenger at the moment")
    return Target(reference, task.versions[task.challenger], Arm.CHALLENGER)


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
