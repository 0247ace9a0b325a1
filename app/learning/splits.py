"""Tables cut in two, cut down, and compared with each other. Knows texts and labels; nothing of tokens or models.

Two texts are the same where they differ in white space or case alone.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

from app.domain import ProblemType, TextInput
from app.errors import DataError
from app.learning.data import Example, Table

_MIN_SPLIT_ROWS = 20
_MAX_EXAMPLES = 5
_FEW_DEV_ROWS = 50
_Group = list[int]  # rows that stay together


def split_off_dev(train: Table, share: float = 0.1, seed: int = 0) -> tuple[Table, Table]:
    """(train, dev): a share of the rows goes to dev, label by label where a row has one.

    No text is in both, and no label leaves train altogether. Raises DataError where there are too few rows for that.
    """
    count = len(train.examples)
    if count < _MIN_SPLIT_ROWS:
        raise DataError(
            f"{train.name} has {count} rows, too few to set some aside for dev: "
            f"give {_MIN_SPLIT_ROWS} at least, or a --dev file"
        )
    chosen = _dev_rows(train.examples, _strata(train, _same_texts(train.examples), random.Random(seed)), share)
    if not chosen:
        raise DataError(f"{train.name} has no rows that train can spare for dev: give more rows or a --dev file")
    dev = replace(_taken(train, chosen), name=f"{train.name} (dev part)", unreadable=())
    return _taken(train, set(range(count)) - chosen), dev


def subsample(table: Table, count: int, seed: int = 0) -> Table:
    """`count` rows of `table` in its order; see `sampled_rows`."""
    return _taken(table, sampled_rows(table, count, seed))


def sampled_rows(table: Table, count: int, seed: int = 0) -> list[int]:
    """`count` rows drawn at random, ascending; of single labels each its share, and one at least where `count` allows.

    All rows where there are not more.
    """
    total = len(table.examples)
    if count >= total:
        return list(range(total))
    strata = _strata(table, ([row] for row in range(total)), random.Random(seed))
    quotas = _quotas([len(stratum) for stratum in strata], count)
    return sorted(row for stratum, quota in zip(strata, quotas, strict=True) for (row,) in stratum[:quota])


def _dev_rows(examples: Sequence[Example], strata: Iterable[Sequence[_Group]], share: float) -> set[int]:
    left = Counter(label for example in examples for label in set(example.labels))
    chosen: set[int] = set()
    due = 0.0  # rows that dev should still get; a fraction is carried to the next label
    for stratum in strata:
        due += share * sum(map(len, stratum))
        for group in stratum:
            if len(group) > due + 0.5:
                continue
            leaving = Counter(label for row in group for label in set(examples[row].labels))
            if all(left[label] > count for label, count in leaving.items()):
                chosen.update(group)
                left.subtract(leaving)
                due -= len(group)
        due = min(due, 0.5)
    return chosen


def _strata(table: Table, groups: Iterable[_Group], source: random.Random) -> list[list[_Group]]:
    """Groups by label, or all together where rows do not have just one; all in random order."""
    is_single = table.problem_type is ProblemType.SINGLE_LABEL
    by_label: defaultdict[str, list[_Group]] = defaultdict(list)
    for group in groups:
        by_label[table.examples[group[0]].labels[0] if is_single else ""].append(group)
    strata = [by_label[label] for label in sorted(by_label)]
    for stratum in strata:
        source.shuffle(stratum)
    source.shuffle(strata)
    return strata


def _quotas(sizes: Sequence[int], count: int) -> list[int]:
    """`count` spread over strata by size, the furthest below its share first; `count` is less than all."""
    total = sum(sizes)
    quotas = [int(count >= len(sizes))] * len(sizes)
    waiting = [
        (quota - count * size / total, index) for index, (quota, size) in enumerate(zip(quotas, sizes, strict=True))
    ]
    heapq.heapify(waiting)
    for _ in range(count - sum(quotas)):
        surplus, index = waiting[0]
        quotas[index] += 1
        heapq.heapreplace(waiting, (surplus + 1, index))
    return quotas


def _taken(table: Table, rows: Iterable[int]) -> Table:
    return replace(table, examples=tuple(table.examples[row] for row in sorted(rows)))


def _same_texts(examples: Sequence[Example]) -> list[_Group]:
    groups: defaultdict[bytes, _Group] = defaultdict(list)
    for row, example in enumerate(examples):
        groups[_identity(example.text)].append(row)
    return list(groups.values())


def _identity(text: TextInput) -> bytes:
    """Equal for texts that are the same. A digest: a million texts are not held twice."""
    folded = "\0".join(" ".join(part.split()).casefold() for part in (text.text, text.text_pair or ""))
    return blake2b(folded.encode(), digest_size=16).digest()


# -- findings ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Overlap:
    count: int  # texts that train has too
    lines: tuple[int, ...]  # of the first ones


@dataclass(frozen=True, slots=True)
class Contradictions:
    count: int  # rows whose text stands there with another answer too
    lines: tuple[tuple[int, int], ...]  # of the first pairs


@dataclass(frozen=True, slots=True)
class Unopened:
    """Rows of BIO tags in which a span begins with I."""

    count: int
    lines: tuple[int, ...]  # of the first ones


@dataclass(frozen=True, slots=True)
class LeftOut:
    count: int
    reasons: tuple[str, ...]  # of the first ones


@dataclass(frozen=True, slots=True)
class Findings:
    """What a person should know of the data; each mapping is by the table's name in the run: train, dev, test."""

    files: dict[str, str]
    rows: dict[str, int]
    overlaps: dict[str, Overlap]  # with train's file; not of train
    in_dev: Overlap  # of test with a dev file
    contradictions: dict[str, Contradictions]  # within each file
    unopened: Unopened  # in train's file
    unasked: tuple[str, ...]  # labels of train that no row of dev has
    unreadable: dict[str, LeftOut]

    def sentences(self) -> list[str]:
        """One for each finding that a person should act on."""
        found = []
        for name, left_out in self.unreadable.items():
            if left_out.count:
                found.append(
                    f"{left_out.count} rows of {self.files[name]} cannot be read and are left out "
                    f"(the first: {left_out.reasons[0]}): correct or delete them"
                )
        found += [self._overlapping(name, "train", overlap) for name, overlap in self.overlaps.items() if overlap.count]
        if self.in_dev.count:
            found.append(self._overlapping("test", "dev", self.in_dev))
        for name, contradictions in self.contradictions.items():
            if contradictions.count:
                first, second = contradictions.lines[0]
                found.append(
                    f"{contradictions.count} rows of {self.files[name]} share a text and differ in their answers "
                    f"(first lines {first} and {second}): settle which is right"
                )
        if 0 < self.rows.get("dev", 0) < _FEW_DEV_ROWS:
            count = self.rows["dev"]
            found.append(
                f"{self.files['dev']} has {count} rows: one answer moves its score by {100 / count:.1f} points, and "
                "what is chosen by it is chosen by chance; give more of them with --dev"
            )
        if self.unasked:
            found.append(
                f"{self.files['dev']} has no row of {_named(self.unasked)}: how well such texts are answered is not "
                "known; give some with --dev"
            )
        if self.unopened.count:
            found.append(
                f"{self.unopened.count} rows of {self.files['train']} begin a span with I, not B "
                f"({_listed(self.unopened.lines, self.unopened.count)}): where that is a slip, correct them; "
                "answers begin a kind of span so only where more than 5 % of its spans do"
            )
        return found

    def _overlapping(self, name: str, other: str, overlap: Overlap) -> str:
        is_same = self.files[name] == self.files[other]
        one, two = (f"{self.files[n]} ({n})" if is_same else self.files[n] for n in (name, other))
        return (
            f"{overlap.count} of {self.rows[name]} texts of {one} also stand in "
            f"{two} ({_listed(overlap.lines, overlap.count)}): the {name} figures flatter; "
            "take them out of one of the two"
        )


def findings(tables: Mapping[str, Table], whole: Table | None = None) -> Findings:
    """Of the tables of one run by their names: train, and dev and test where there are any.

    `whole`: train's file, where dev was split off from it. What test shares with dev it shares with that file then.
    """
    train = whole or tables["train"]
    others = {name: table for name, table in tables.items() if name != "train"}
    compared = others if whole is None else {name: table for name, table in others.items() if name != "dev"}
    files = {"train": train, **compared}
    groups = {name: _same_texts(table.examples) for name, table in files.items()}
    known = {_identity(train.examples[group[0]].text) for group in groups["train"]}
    in_dev = {_identity(text) for text in compared["dev"].texts} if {"dev", "test"} <= compared.keys() else set()
    return Findings(
        files={name: table.name for name, table in tables.items()},
        rows={name: len(table.examples) for name, table in tables.items()},
        overlaps={name: _overlap(table, known) for name, table in compared.items()},
        in_dev=_overlap(compared["test"], in_dev) if in_dev else Overlap(0, ()),
        contradictions={name: _contradictions(files[name].examples, same) for name, same in groups.items()},
        unopened=_unopened(train),
        unasked=_unasked(tables["train"], tables.get("dev")),
        unreadable={name: _left_out(table) for name, table in tables.items()},
    )


def _overlap(table: Table, known: set[bytes]) -> Overlap:
    lines = [example.line for example in table.examples if _identity(example.text) in known]
    return Overlap(len(lines), tuple(lines[:_MAX_EXAMPLES]))


def _contradictions(examples: Sequence[Example], groups: Iterable[_Group]) -> Contradictions:
    count = 0
    pairs: list[tuple[int, int]] = []
    for group in groups:
        first = examples[group[0]]
        other = next((examples[row] for row in group if _answer(examples[row]) != _answer(first)), None)
        if other is not None:
            count += len(group)
            pairs.append((first.line, other.line))
    return Contradictions(count, tuple(pairs[:_MAX_EXAMPLES]))


def _unopened(table: Table) -> Unopened:
    is_tagged = table.problem_type is ProblemType.TOKEN
    lines = [example.line for example in table.examples if is_tagged and _begins_inside(example.labels)]
    return Unopened(len(lines), tuple(lines[:_MAX_EXAMPLES]))


def _unasked(train: Table, dev: Table | None) -> tuple[str, ...]:
    if dev is None or train.problem_type is ProblemType.TOKEN:
        return ()
    there, asked = ({label for e in table.examples for label in e.labels} for table in (train, dev))
    return tuple(sorted(there - asked))


def _begins_inside(tags: Sequence[str]) -> bool:
    """Whether the inside of a span follows neither its beginning nor its inside."""
    before = ("", *tags)
    return any(tag.startswith("I-") and last[2:] != tag[2:] for last, tag in zip(before, tags, strict=False))


def _answer(example: Example) -> tuple[tuple[str, ...], float]:
    return example.labels, example.score


def _left_out(table: Table) -> LeftOut:
    return LeftOut(len(table.unreadable), tuple(row.reason for row in table.unreadable[:_MAX_EXAMPLES]))


def _named(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - _MAX_EXAMPLES} more" if len(labels) > _MAX_EXAMPLES else ""
    return f"label{'s' if len(labels) > 1 else ''} {', '.join(labels[:_MAX_EXAMPLES])}{more}"


def _listed(lines: Sequence[int], count: int) -> str:
    more = ", …" if count > len(lines) else ""
    return f"line{'s' if count > 1 else ''} {', '.join(map(str, lines))}{more}"
