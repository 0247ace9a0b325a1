"""Smaller prefixes: fewer virtual tokens, in half precision, with the loss measured on dev.

The tokens that the dev texts attend to least go first; the head stays as it was, or is fitted again. Draws nothing.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from app.domain import BackboneSpec, Encoding, HeadKind, ProblemType
from app.engine import attention
from app.engine.artifact import TENSORS, Artifact, read_artifact
from app.engine.attention import Segment, attend
from app.engine.backbone import Backbone
from app.engine.engine import Engine
from app.engine.heads import head_tensor_names
from app.engine.tokenizer import TextTokenizer
from app.errors import SettingsError
from app.learning import evaluation, reporting, writer
from app.learning.baselines import stated_baselines
from app.learning.cache import CachePlan, build_cache
from app.learning.combine import check_answers, figures, measure_of, recipe_of, scores, stored_prefixes
from app.learning.learn import Files, Options, learn
from app.learning.measured import Draft, write_measured
from app.learning.model import position_offset
from app.learning.prepare import Frozen, described, encode, limit_tokens
from app.learning.rows import LayerPrefix
from app.learning.study import Tables, Watcher

_METERED = "manifold_metered"
_METERED_TOKENS = 4096  # at once: each has a weight for each other, in float32


@dataclass(frozen=True, slots=True)
class Step:
    """One size that was tried."""

    num_virtual_tokens: int
    head: str  # "as it was" or "fitted again"
    dev: float
    size_bytes: int  # of the tensors' file


def compress(
    source: Path,
    files: Files,
    out: Path,
    backbones: tuple[Backbone, Backbone],
    watcher: Watcher,
    tolerance: float = 0.005,
    tokens: int | None = None,
    report: Callable[[Step], None] = lambda _: None,
    command: str = "",
) -> dict[str, Any]:
    """Write the smallest version of the artifact `source` whose dev score is within `tolerance` of its own.

    `backbones`: one to train on, one in float32 to measure with. `tokens`: try this size alone. `report` is told of
    the artifact as it is, and of each size tried; `command`, as it was typed, is for the page that is written beside
    the artifact. Returns the manifest; raises SettingsError where none is good enough. A user's interrupt ends the
    trials, with the smallest that is good enough by then.
    """
    writer.check_out(out.absolute())
    writer.check_room(out.absolute())
    if out.resolve() == source.resolve():
        raise SettingsError(f"{out} is the artifact itself: name another folder with --out")
    artifact = _read(source, backbones[1].spec)
    watcher.notice(writer.check_owner(out, artifact.manifest["task"]))
    sizes = _sizes(artifact, tokens)
    if not tolerance >= 0:
        raise SettingsError("--tolerance is out of range: give points of the dev score, 0 or more")
    kind = ProblemType(artifact.manifest["problem_type"])
    seed = recipe_of(artifact, ()).seed  # what a dev part is split off by, here and where the head is fitted again
    tables = Tables.read(files, kind, seed, TextTokenizer(backbones[0].path))
    if files.dev is None:
        _check_split(artifact, files.train, tables.train.sha256)
    check_answers(artifact, tables)
    work = _Work(artifact, files, tables, backbones, watcher)
    watcher.stage("measuring the artifact as it is", 0)
    before = figures(artifact, tables, backbones[1])
    original = Step(work.num_virtual_tokens, "as it was", work.dev(before), (source / TENSORS).stat().st_size)
    report(original)
    with tempfile.TemporaryDirectory(prefix="manifold-") as scratch:
        tried: list[tuple[Step, Path]] = []
        was_interrupted = False
        try:
            for step, folder in work.steps(Path(scratch), sizes):
                report(step)
                tried.append((step, folder))
        except KeyboardInterrupt:
            if not _near(tried, original, tolerance):
                raise
            was_interrupted = True
        chosen, folder = _choose(tried, original, tolerance, work.measure)
        story = {
            "from": artifact.digest,
            "from_prefix": artifact.manifest["prefixes"][0]["digest"],
            "tolerance": tolerance,
            "head": chosen.head,
            "lost": round(original.dev - chosen.dev, 5),
            "curve": [asdict(step) for step in (original, *(step for step, _ in tried))],
            "interrupted": was_interrupted,
        }
        with writer.new_folder(out) as draft:
            shutil.copytree(folder, draft, dirs_exist_ok=True)
            return work.complete(draft, before, story, command)


def _read(path: Path, spec: BackboneSpec) -> Artifact:
    """Raise SettingsError where there is no prefix of the task's own."""
    artifact = read_artifact(path, spec)
    manifest = artifact.manifest
    prefixes = manifest["prefixes"]
    if not prefixes:
        raise SettingsError(f"{path} reads the bare trunk: it has no prefix to compress")
    if manifest["problem_type"] == ProblemType.EMBEDDING or len(prefixes) > 1:
        raise SettingsError(
            f"{path} combines prefixes, and others read the same row: compress the artifacts that they come from"
        )
    owner = prefixes[0].get("task", manifest["task"])
    if owner != manifest["task"]:
        raise SettingsError(f"{path} reads the prefix of {owner}, and shares its row: compress {owner} instead")
    return artifact


def _check_split(artifact: Artifact, train: Path, sha256: str) -> None:
    """Raise SettingsError where a part split off from `train` would be rows that the artifact was learned from."""
    data = artifact.manifest.get("data") or {}
    known = {data.get(name, {}).get("sha256") for name in ("train", "dev")}
    if known != {sha256}:
        task = artifact.manifest["task"]
        raise SettingsError(
            f"--dev must be given: {task} was not learned from a part of {train} with the rest for dev, so no part of "
            "it is known to be new to it"
        )


def _sizes(artifact: Artifact, tokens: int | None) -> list[int]:
    """Numbers of virtual tokens to try, falling: each power of a half, and three quarters of it between."""
    vectors = artifact.prefix_vectors[0]
    count = int(vectors.shape[3])
    most = count if vectors.dtype.itemsize > writer.STORED.itemsize else count - 1  # precision alone is a gain too
    if most == 0:
        raise SettingsError(f"{artifact.manifest['task']} has one virtual token, in half precision: it is the smallest")
    if tokens is not None:
        if not 1 <= tokens <= most:
            raise SettingsError(f"--tokens must be in 1 … {most}")
        return [tokens]
    halvings = range(count.bit_length())
    found = {max(1, part >> n) for n in halvings for part in (count, count * 3 // 4)}
    return sorted((size for size in found if size <= most), reverse=True)


def _choose(tried: Sequence[tuple[Step, Path]], original: Step, tolerance: float, measure: str) -> tuple[Step, Path]:
    """The fewest tokens within `tolerance`; of equal number the better head."""
    near = _near(tried, original, tolerance)
    if near:
        return min(near, key=lambda pair: (pair[0].num_virtual_tokens, -pair[0].dev))
    best = max((step for step, _ in tried), key=lambda step: step.dev)
    raise SettingsError(
        f"nothing smaller stays within {100 * tolerance:g} points of dev {measure} {original.dev:.4f}: the best, with "
        f"{best.num_virtual_tokens} virtual tokens, has {best.dev:.4f}; give a larger --tolerance, more training rows, "
        "or learn the task with fewer --num-virtual-tokens"
    )


def _near(tried: Sequence[tuple[Step, Path]], original: Step, tolerance: float) -> list[tuple[Step, Path]]:
    return [pair for pair in tried if pair[0].dev >= original.dev - tolerance - 1e-9]


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    artifact: Artifact
    files: Files
    tables: Tables
    backbones: tuple[Backbone, Backbone]
    watcher: Watcher

    @property
    def measure(self) -> str:
        return measure_of(self.artifact.manifest)

    @property
    def num_virtual_tokens(self) -> int:
        return int(self.artifact.prefix_vectors[0].shape[3])

    def dev(self, found: dict[str, dict[str, float]]) -> float:
        return found["dev"].get(self.measure, 0.0)  # undefined where all scores are equal

    def steps(self, scratch: Path, sizes: Sequence[int]) -> Iterator[tuple[Step, Path]]:
        """Each size with both heads, written to folders in `scratch`. Tokens are ranked anew at each."""
        entry = self.artifact.manifest["prefixes"][0]
        prefix = LayerPrefix(entry["first_layer"], self.artifact.prefix_vectors[0].float())
        for size in sizes:
            self.watcher.stage(f"{size} virtual tokens", 0)
            prefix = self._pruned(prefix, size)
            kept, fitted = scratch / f"{size}-kept", scratch / f"{size}-fitted"
            yield self._step(self._keep_head(kept, prefix), "as it was", kept)
            yield self._step(self._fit_head(fitted, kept), "fitted again", fitted)

    def complete(
        self, folder: Path, before: dict[str, dict[str, float]], story: dict[str, Any], command: str
    ) -> dict[str, Any]:
        """Measure test too, and say in the manifest and on the page what was lost."""
        exact = self.backbones[1]
        written = read_artifact(folder, exact.spec)
        manifest, scored = dict(written.manifest), scores(written, self.tables, exact)
        labels, thresholds = manifest["labels"], manifest.get("thresholds") or []
        after = {name: evaluation.figures(found, labels, thresholds) for name, found in scored.items()}
        manifest["evaluation"] = after | {"measure": self.measure}
        manifest["details"] = {name: evaluation.details(found, labels, thresholds) for name, found in scored.items()}
        limit = exact.spec.max_tokens - manifest["position_offset"]
        measured = {name: described(table, limit) for name, table in self.tables.named.items() if name != "train"}
        manifest["data"] = (manifest.get("data") or {}) | measured
        manifest["baselines"] = stated_baselines(self.artifact.manifest, measured)
        manifest["compressed"] = story | {"before": before}
        manifest["prefixes"] = [{name: value for name, value in manifest["prefixes"][0].items() if name != "task"}]
        writer.write_manifest(folder, manifest)
        reporting.write_compressed(folder, manifest, scored, command)
        read_artifact(folder, exact.spec)
        return manifest

    def _pruned(self, prefix: LayerPrefix, size: int) -> LayerPrefix:
        if size == prefix.num_virtual_tokens:
            return prefix
        backbone = self.backbones[0]
        top = self.artifact.manifest["readout"]["layers"][-1]
        plan = CachePlan((top,), prefixes=(prefix,), position_offset=position_offset([prefix]))
        encodings = encode(TextTokenizer(backbone.path), self.tables.dev, limit_tokens(backbone.spec, plan))
        kept = attention_mass(backbone, encodings, plan).topk(size).indices.sort().values
        return LayerPrefix(prefix.first_layer, prefix.vectors[:, :, :, kept])

    def _keep_head(self, folder: Path, prefix: LayerPrefix) -> dict[str, Any]:
        manifest = dict(self.artifact.manifest)
        entry: dict[str, object] = {"num_virtual_tokens": prefix.num_virtual_tokens, "first_layer": prefix.first_layer}
        tensors, entries = stored_prefixes(Frozen((prefix,), (entry,)))
        manifest |= {
            "prefixes": entries,
            "position_offset": position_offset([prefix]),
            "thresholds": [],
        }
        head = HeadKind(manifest["head"]["kind"])
        # A regression's last layer holds the data's own units, which may be large and close together.
        in_full = head_tensor_names(head)[-2:] if self.tables.problem_type is ProblemType.REGRESSION else ()
        draft = Draft(manifest, dict(self.artifact.tensors) | tensors)
        with writer.new_folder(folder) as hidden:
            return write_measured(hidden, draft, self.backbones[1], self._measure_dev, in_full)

    def _measure_dev(self, engine: Engine, tokenizer: TextTokenizer, artifact: Artifact) -> dict[str, Any]:
        dev, labels = self.tables.dev, artifact.manifest["labels"]
        scored = evaluation.score(engine, tokenizer, artifact, dev)
        thresholds = evaluation.tuned_thresholds(scored, labels)
        return {
            "thresholds": thresholds,
            "evaluation": {"dev": evaluation.figures(scored, labels, thresholds), "measure": self.measure},
            "score_baseline": evaluation.score_baseline(artifact.version(0), scored, tokenizer.unknown_id, thresholds),
            "golden": evaluation.golden_examples(engine, tokenizer, artifact, dev),
        }

    def _fit_head(self, folder: Path, pruned: Path) -> dict[str, Any]:
        recipe = recipe_of(self.artifact, (pruned,))
        files = Files(self.files.train, self.files.dev)
        options = Options(problem_type=self.tables.problem_type)
        manifest = learn(recipe, files, folder, self.backbones, self.watcher, options)
        if manifest["training"]["interrupted"]:
            raise KeyboardInterrupt
        return manifest

    def _step(self, manifest: dict[str, Any], head: str, folder: Path) -> tuple[Step, Path]:
        count = manifest["prefixes"][0]["num_virtual_tokens"]
        return Step(count, head, self.dev(manifest["evaluation"]), (folder / TENSORS).stat().st_size), folder


# -- which tokens matter -----------------------------------------------------------------------------------------------


def attention_mass(backbone: Backbone, encodings: Sequence[Encoding], plan: CachePlan) -> Tensor:
    """How much the texts' tokens take from each virtual token of the plan's prefix: [virtual tokens].

    The attention that each gets, times the length of its value, summed over layers, heads, texts and tokens
    (Kobayashi et al. 2020, arXiv 2004.10102: attention weights alone mislead where values are short).
    """
    (prefix,) = plan.prefixes
    meter = _Meter(torch.zeros(prefix.num_virtual_tokens, dtype=torch.float64))
    with _metered(backbone, meter):
        build_cache(backbone, encodings, plan, once=False, batch_tokens=_METERED_TOKENS)  # each counts
    return meter.mass


@contextmanager
def _metered(backbone: Backbone, meter: _Meter) -> Iterator[None]:
    config = backbone.family.config
    AttentionInterface.register(_METERED, meter)
    config._attn_implementation = _METERED
    try:
        yield
    finally:
        config._attn_implementation = attention.NAME


@dataclass(slots=True, eq=False)
class _Meter:
    """The engine's attention function, which also adds up what virtual tokens give."""

    mass: Tensor  # [virtual tokens]

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,  # [rows, heads, tokens, head size]
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float | None = None,
        segments: Sequence[Segment] = (),
        **named: Any,
    ) -> tuple[Tensor, None]:
        for segment in segments:
            if segment.key is not None and segment.value is not None:
                self.mass += _given(query, key, segment.key, segment.value, segment.mask, scaling).to("cpu")
        return attend(module, query, key, value, attention_mask, scaling=scaling, segments=segments, **named)


def _given(
    query: Tensor, key: Tensor, prefix_key: Tensor, prefix_value: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """[virtual tokens]"""
    count = prefix_key.shape[2]
    logits = query @ torch.cat((prefix_key, key), dim=2).transpose(-1, -2)
    logits = logits.float() * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    given = torch.softmax(logits if mask is None else logits + mask.float(), dim=-1)[..., :count]
    if mask is not None:  # a token that none may see is padding, and what it sees does not count
        is_text = (mask[..., count:] == 0).any(dim=2)  # [rows, 1, tokens]
        given = given * is_text.unsqueeze(-1)
    mass: Tensor = given.sum(dim=2) * prefix_value.float().norm(dim=-1)  # [rows, heads, virtual tokens]
    return mass.sum(dim=(0, 1)).double()


AttentionMaskInterface.register(_METERED, sdpa_mask)
