"""From what the readers of a batch found to an output for each text and version.

Knows readers, heads and outputs; nothing of layers, prefixes or masks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from app.domain import ReadoutKind, TaskOutput
from app.engine.batch import Batch, Readers
from app.engine.heads import join_layers, score_all

log = logging.getLogger(__name__)

Pieces = dict[Readers, list[Tensor]]  # what each reads, layer by layer

_NOT_FINITE = TaskOutput(error="its scores are not finite")
_BROKEN = TaskOutput(error="it failed while computing; the server's log says why")


def score(batch: Batch, pieces: Pieces) -> Scores:
    """The scores of all readers, on their way to the host in one transfer. Heads of one shape are computed together."""
    return Scores(batch, [part for readers, found in _joined(pieces) for part in _scored(batch, readers, found)])


def _joined(pieces: Pieces) -> Iterator[tuple[Readers, list[Tensor]]]:
    """Readers of one cohort that read in the same way are one, whichever rows they read. Those of tokens stay apart."""
    alike: dict[object, list[Readers]] = {}
    for readers in pieces:
        alone = readers.readout.kind is ReadoutKind.TOKENS
        alike.setdefault(readers if alone else (readers.cohort, readers.readout), []).append(readers)
    for members in alike.values():
        if len(members) == 1:
            yield members[0], pieces[members[0]]
            continue
        members.sort(key=lambda readers: readers.residents[0].head.order)
        versions = tuple(version for readers in members for version in readers.versions)
        residents = tuple(resident for readers in members for resident in readers.residents)
        joined = Readers(members[0].cohort, versions, residents, members[0].readout)
        yield joined, [torch.cat(found, dim=1) for found in zip(*(pieces[readers] for readers in members), strict=True)]


class Scores:
    """What a batch found. On a CUDA device it may be on its way still; `outputs` waits for it."""

    def __init__(self, batch: Batch, scored: Sequence[_Scored]) -> None:
        self._batch = batch
        self._scored = scored
        self._flat, self._arrived = _to_host([part.scores for part in scored])

    def wait(self) -> torch.cuda.Event | None:
        """Until they are on the host. Returns what a CUDA device recorded then; None: they never were elsewhere."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._arrived

    def outputs(self) -> list[tuple[TaskOutput, ...]]:
        """The outputs of each work of `batch.works`, in the order of its plan's versions."""
        columns = self._columns()
        outputs: list[tuple[TaskOutput, ...]] = []
        for number, cohort in enumerate(self._batch.cohorts):
            broken = [_BROKEN] * len(self._batch.works[cohort.plans])
            of_texts = zip(*(columns.get((number, i), broken) for i in range(len(cohort.residents))), strict=True)
            outputs.extend(of_texts)
        return outputs

    def _columns(self) -> dict[tuple[int, int], list[TaskOutput]]:
        """(cohort, version) → an output for each of its texts."""
        self.wait()
        values, all_finite = _nested(self._flat, [part.scores for part in self._scored])
        columns: dict[tuple[int, int], list[TaskOutput]] = {}
        for part, of_versions in zip(self._scored, values, strict=True):
            works = self._batch.works[self._batch.cohorts[part.cohort].plans]
            lengths = [len(work.plan.encoding) for work in works]
            cut = _token_output if part.is_token else _output
            for version, rows in zip(part.versions, of_versions, strict=True):
                columns[part.cohort, version] = [cut(*row, all_finite) for row in zip(rows, lengths, strict=True)]
        return columns


@dataclass(frozen=True, slots=True, eq=False)
class _Scored:
    cohort: int
    versions: tuple[int, ...]  # of the cohort
    scores: Tensor  # [versions, rows, labels]; of tokens [1, rows, tokens, 2]: the best score and its tag
    is_token: bool = False


def _scored(batch: Batch, readers: Readers, pieces: Sequence[Tensor]) -> list[_Scored]:
    """The scores of all readers. A version that breaks is left out, and breaks alone."""
    if readers.readout.kind is ReadoutKind.TOKENS:
        features, words = torch.cat(tuple(pieces), dim=-1), _words(batch, readers)
        return _one_by_one(readers, lambda position: _score_tokens(readers, position, features, words))
    features = join_layers(pieces).transpose(0, 1)
    try:
        return _together(readers, features)
    except Exception:  # one of them: the others must not fail with it
        log.warning("heads of one shape failed together, and are computed one by one", exc_info=True)
        return _one_by_one(readers, lambda position: _score(readers, position, features))


def _together(readers: Readers, features: Tensor) -> list[_Scored]:
    found, start = [], 0
    for size, scores in score_all([resident.head for resident in readers.residents], features):
        found.append(_Scored(readers.cohort, readers.versions[start : start + size], scores))
        start += size
    return found


def _one_by_one(readers: Readers, score: Callable[[int], _Scored]) -> list[_Scored]:
    found = []
    for position, resident in enumerate(readers.residents):
        try:
            found.append(score(position))
        except Exception:  # a fault of one version's tensors must not reach the batch's other tasks
            log.exception("a version of %s failed: %s", resident.version.task, resident.version.digest)
    return found


def _score(readers: Readers, position: int, features: Tensor) -> _Scored:
    count = readers.readout.num_members
    own = features[position * count : (position + 1) * count]
    scores = readers.residents[position].head.scores(own if count > 1 else own[0])
    return _Scored(readers.cohort, (readers.versions[position],), scores.unsqueeze(0))


def _words(batch: Batch, readers: Readers) -> list[list[int]]:
    """The first tokens of each row's words, where a reader asks for them."""
    if all(resident.head.transitions is None for resident in readers.residents):
        return []
    return [work.plan.encoding.first_tokens for work in batch.works[batch.cohorts[readers.cohort].plans]]


def _score_tokens(readers: Readers, position: int, features: Tensor, words: Sequence[Sequence[int]]) -> _Scored:
    head = readers.residents[position].head
    probabilities = head.scores(features)
    tags = head.tags(probabilities, words).unsqueeze(-1)
    both = torch.cat((probabilities.gather(-1, tags), tags.to(probabilities.dtype)), dim=-1)
    return _Scored(readers.cohort, (readers.versions[position],), both.unsqueeze(0), is_token=True)


def _to_host(scores: Sequence[Tensor]) -> tuple[Tensor, torch.cuda.Event | None]:
    """All numbers in one tensor on the host, and what says that they are there (None: they are)."""
    flat = torch.cat([tensor.flatten() for tensor in scores]) if scores else torch.empty(0)
    if flat.device.type == "cpu":
        return flat, None
    host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True).copy_(flat, non_blocking=True)
    arrived = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    arrived.record()
    return host, arrived


def _nested(flat: Tensor, scores: Sequence[Tensor]) -> tuple[list[Any], bool]:
    """The tensors as nested lists, and whether all their numbers are finite."""
    parts = torch.split(flat, [tensor.numel() for tensor in scores])
    nested = [part.view(tensor.shape).tolist() for part, tensor in zip(parts, scores, strict=True)]
    return nested, bool(flat.isfinite().all())


def _output(scores: list[float], _: int, all_finite: bool) -> TaskOutput:
    return TaskOutput(tuple(scores)) if all_finite or all(map(math.isfinite, scores)) else _NOT_FINITE


def _token_output(found: list[list[float]], num_tokens: int, all_finite: bool) -> TaskOutput:
    """Each token's tag and its probability, padding left out."""
    scores, tags = zip(*found[:num_tokens], strict=True)
    return TaskOutput(scores, tuple(map(int, tags))) if all_finite or all(map(math.isfinite, scores)) else _NOT_FINITE
