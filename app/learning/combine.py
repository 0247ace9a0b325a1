"""Representations: ordered tuples of frozen prefixes, served as embeddings, that carry heads.

Writes them, and replaces one of their prefixes, with every head fitted again. Trains no prefix and draws nothing.
After Huang et al. 2023 (arXiv 2305.13499), section 3.2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from app.domain import BackboneSpec, HeadKind, InputKind, Prefix, ProblemType, ReadoutKind, TextInput
from app.engine.artifact import MANIFEST, Artifact, flatten_prefix, read_artifact
from app.engine.artifact_checks import FORMAT_VERSION, NAME, PROMPT, prefix_digest
from app.engine.backbone import Backbone
from app.engine.engine import Engine
from app.engine.folder import list_artifacts
from app.engine.heads import head_tensor_names
from app.engine.tokenizer import TextTokenizer
from app.errors import ManifoldError, SettingsError
from app.learning import evaluation, writer
from app.learning.data import Example, Table
from app.learning.evaluation import Scored
from app.learning.learn import Files, Options, learn
from app.learning.measured import Draft, write_measured
from app.learning.model import position_offset
from app.learning.prepare import Frozen, read_frozen
from app.learning.problems import MEASURES
from app.learning.recipe import Recipe
from app.learning.rows import LayerPrefix
from app.learning.study import Tables, Watcher

CHANGES = "changes.json"
READOUTS = (ReadoutKind.MEAN, ReadoutKind.CLS, ReadoutKind.POOLER)  # those without anything to learn
_SENTENCES = (
    "Tea, please.",
    "The train leaves at nine.",
    "Is there a quiet room on the second floor?",
    "She put the blue notebook back on the shelf and closed the window before the rain came.",
)
_GOLDEN = Table(
    name="golden sentences",
    sha256="",
    problem_type=ProblemType.EMBEDDING,
    input_kind=InputKind.TEXT,
    examples=tuple(Example(TextInput(text), line) for line, text in enumerate(_SENTENCES, 1)),
)


def combine(
    name: str,
    prefixes: Sequence[Path],
    out: Path,
    exact: Backbone,
    readout: ReadoutKind = ReadoutKind.MEAN,
    read_layers: tuple[int, ...] = (),
) -> dict[str, Any]:
    """Write the representation `name` of these artifacts' prefixes, in order. `exact`: in float32.

    Returns the manifest. Raises SettingsError where they cannot stand side by side, ArtifactError for a faulty one.
    """
    writer.check_out(out.absolute())
    writer.check_owner(out, name)
    if not prefixes:
        raise SettingsError("there is nothing to combine: name the folders of artifacts that have prefixes")
    frozen = read_frozen(Recipe(name, prefixes=tuple(prefixes)), exact.spec)
    with writer.new_folder(out) as folder:
        return _write_representation(folder, _representation(name, frozen, readout, read_layers, exact.spec), exact)


def _representation(
    name: str, frozen: Frozen, readout: ReadoutKind, read_layers: tuple[int, ...], spec: BackboneSpec
) -> Draft:
    _check_name(name, spec)
    if readout not in READOUTS:
        raise SettingsError(f"--readout must be one of {', '.join(READOUTS)}: a representation learns nothing")
    recipe = Recipe(name, readout, read_layers).completed(ProblemType.EMBEDDING, 0, spec, InputKind.TEXT)
    tensors, entries = stored_prefixes(frozen)
    _check_tuple(entries, recipe.read_layers[-1])
    top, first = recipe.read_layers[-1], min(prefix.first_layer for prefix in frozen.prefixes)
    manifest = {
        "format_version": FORMAT_VERSION,
        "task": name,
        "problem_type": ProblemType.EMBEDDING,
        "labels": [],
        "input": InputKind.TEXT,
        "readout": {"kind": readout, "layers": list(recipe.read_layers)},
        "prefixes": entries,
        "position_offset": position_offset(list(frozen.prefixes)),
        "backbone": {
            "name": spec.name,
            "fingerprint": spec.fingerprint,
            "num_layers": spec.num_layers,
            "hidden_size": spec.hidden_size,
            "num_attention_heads": spec.num_heads,
        },
        "cost": {
            "passes": round(1 + (top - first) / spec.num_layers, 4),
            "passes_alone": round(top / spec.num_layers, 4),
        },
    }
    return Draft(manifest, tensors)


def _check_name(name: str, spec: BackboneSpec) -> None:
    if not NAME.fullmatch(name):
        raise SettingsError("--name must be a name of a-z, 0-9, _, . and -, 64 characters at most")
    if name == spec.name:
        raise SettingsError(f'"{name}" is the name of the backbone\'s own representation: choose another --name')


def _check_tuple(entries: Sequence[Mapping[str, Any]], top: int) -> None:
    seen: dict[str, str] = {}
    for entry in entries:
        if entry["first_layer"] >= top:
            raise SettingsError(
                f"the prefix of {entry['task']} begins at layer {entry['first_layer']}, and the readout ends at {top}: "
                "give higher --read-layers, or leave it out"
            )
        if entry["digest"] in seen:
            raise SettingsError(f"{seen[entry['digest']]} and {entry['task']} hold the same prefix: name it once")
        seen[entry["digest"]] = entry["task"]


def stored_prefixes(frozen: Frozen) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Prefix tensors as an artifact holds them, in half precision, and the manifest's entries for them."""
    tensors: dict[str, Tensor] = {}
    entries: list[dict[str, Any]] = []
    for index, (prefix, entry) in enumerate(zip(frozen.prefixes, frozen.entries, strict=True)):
        flat = flatten_prefix(prefix.vectors).to(writer.STORED)
        tensors[PROMPT if len(frozen.prefixes) == 1 else f"{PROMPT}.{index}"] = flat
        entries.append(dict(entry) | {"digest": prefix_digest(flat, prefix.first_layer)})
    return tensors, entries


def _write_representation(folder: Path, draft: Draft, exact: Backbone) -> dict[str, Any]:
    def golden(engine: Engine, tokenizer: TextTokenizer, artifact: Artifact) -> dict[str, Any]:
        return {"golden": evaluation.golden_examples(engine, tokenizer, artifact, _GOLDEN)}

    return write_measured(folder, draft, exact, golden)


# -- a new version, with its heads -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Head:
    artifact: Artifact
    files: Files

    @property
    def task(self) -> str:
        return str(self.artifact.manifest["task"])


def update(
    representation: Path,
    replace: tuple[str, Path],  # the task or digest of one of its prefixes, and the artifact whose prefix comes instead
    heads: Sequence[Path],  # artifacts that read it, or folders of artifacts, of which those that do
    files: Mapping[str, Files],  # by task
    out: Path,
    backbones: tuple[Backbone, Backbone],
    watcher: Watcher,
) -> dict[str, Any]:
    """Write the representation's next version and its heads, fitted again, to folders in `out` named after them.

    `backbones`: one to train on, one in float32 to measure with. Returns what CHANGES holds: each head's figures
    before and after. Raises a ManifoldError; whatever happens, `out` is never half written.
    """
    writer.check_out(out.absolute())
    writer.check_room(out.absolute())
    if (out / MANIFEST).exists():
        raise SettingsError(f"{out} is an artifact, and several will be written: name a new folder with --out")
    exact = backbones[1]
    old = read_artifact(representation, exact.spec)
    if old.manifest["problem_type"] != ProblemType.EMBEDDING:
        raise SettingsError(f"{representation} is a task, no representation: write one with manifold combine --name")
    index, frozen = _replaced(old, *replace, exact.spec)
    paths = [path for given in heads for path in _heads_in(given, old, exact.spec, watcher)]
    read = [_read_head(path, old, files, exact.spec) for path in paths]
    name, readout = old.manifest["task"], old.manifest["readout"]
    _check_distinct([name, *(head.task for head in read)])
    draft = _representation(name, frozen, ReadoutKind(readout["kind"]), tuple(readout["layers"]), exact.spec)
    changes: dict[str, Any] = {
        "representation": name,
        "from": old.digest,
        "replaced": _entry(old, index),
        "by": draft.manifest["prefixes"][index],
        "heads": {},
    }
    with writer.new_folder(out) as folder:
        (folder / name).mkdir()
        _write_representation(folder / name, draft, exact)
        for head in read:
            changes["heads"][head.task] = _refit(head, folder, name, backbones, watcher)
        (folder / CHANGES).write_text(json.dumps(changes, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return changes


def _entry(artifact: Artifact, index: int) -> dict[str, Any]:
    entry: dict[str, Any] = artifact.manifest["prefixes"][index]
    return entry


def _replaced(old: Artifact, name: str, new: Path, spec: BackboneSpec) -> tuple[int, Frozen]:
    """Where the prefix stood, and the tuple with the new one in its place."""
    entries = [{"task": "unnamed"} | entry for entry in old.manifest["prefixes"]]
    found = [i for i, entry in enumerate(entries) if name in (entry["task"], entry["digest"])]
    if len(found) != 1:
        known = ", ".join(f"{entry['task']} ({entry['digest']})" for entry in entries)
        problem = "stands for more than one prefix" if found else "is none of the prefixes"
        raise SettingsError(f'--replace: "{name}" {problem} of {old.manifest["task"]}: give a digest of {known}')
    index = found[0]
    coming = read_frozen(Recipe("new", prefixes=(new,)), spec)
    if len(coming.prefixes) != 1:
        raise SettingsError(f"--replace: {new} has {len(coming.prefixes)} prefixes: name an artifact with one")
    prefixes = [
        LayerPrefix(entry["first_layer"], vectors.float(), entry["digest"])
        for entry, vectors in zip(entries, old.prefix_vectors, strict=True)
    ]
    _, (came,) = stored_prefixes(coming)
    if came["digest"] == entries[index]["digest"]:
        raise SettingsError(f"--replace: {new} holds the prefix that is there already: nothing would change")
    prefixes[index], entries[index] = coming.prefixes[0], came
    return index, Frozen(tuple(prefixes), tuple(entries))


def _heads_in(given: Path, old: Artifact, spec: BackboneSpec, watcher: Watcher) -> list[Path]:
    """An artifact itself; of a folder of artifacts each task's newest version, where that reads what `old` holds."""
    if (given / MANIFEST).exists() or not given.is_dir():
        return [given]
    numbered = [child for child in given.iterdir() if child.is_dir() and child.name.isdecimal()]
    if numbered:  # one task's
        return [max(numbered, key=lambda child: int(child.name))]
    newest = {place.path.relative_to(given).parts[0]: place.path for place in list_artifacts(given)}
    found = [path for path in newest.values() if (path / MANIFEST).is_file() and _reads(path, old, spec, watcher)]
    if not found:
        name = old.manifest["task"]
        raise SettingsError(f"no artifact in {given} reads {name}: name its heads, or a folder that holds them")
    return found


def _reads(path: Path, old: Artifact, spec: BackboneSpec, watcher: Watcher) -> bool:
    try:
        artifact = read_artifact(path, spec)
    except ManifoldError as error:  # of another backbone, or broken: no head that is served beside it
        watcher.notice([f"{path} is left out: {error}"])
        return False
    return artifact.manifest["problem_type"] != ProblemType.EMBEDDING and _row(artifact) == _row(old)


def _row(artifact: Artifact) -> tuple[tuple[Prefix, ...], int]:
    """What two artifacts that share a row have in common."""
    version = artifact.version(0)
    return version.prefixes, version.position_offset


def _read_head(path: Path, old: Artifact, files: Mapping[str, Files], spec: BackboneSpec) -> _Head:
    artifact = read_artifact(path, spec)
    task, name = artifact.manifest["task"], old.manifest["task"]
    if artifact.manifest["problem_type"] == ProblemType.EMBEDDING:
        raise SettingsError(f"{path} is a representation, no head: leave it out of --heads")
    if _row(artifact) != _row(old):
        raise SettingsError(f"{path} does not read the prefixes of {name}, in their order: leave it out of --heads")
    if task not in files:
        raise SettingsError(f"there are no files for {task}: add [tasks.{task}] with train, dev and test to --config")
    return _Head(artifact, files[task])


def _check_distinct(names: Sequence[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SettingsError(f'two of what would be written are called "{twice}": leave one out of --heads')


def _refit(
    head: _Head, folder: Path, representation: str, backbones: tuple[Backbone, Backbone], watcher: Watcher
) -> dict[str, Any]:
    """Fit and write one head on the new version; its figures before and after, on the same rows."""
    recipe = recipe_of(head.artifact, (folder / representation,))
    kind = ProblemType(head.artifact.manifest["problem_type"])
    tables = Tables.read(head.files, kind, recipe.seed, TextTokenizer(backbones[0].path))
    check_answers(head.artifact, tables)
    watcher.stage(f"head {head.task}", 0)
    learned_from = (head.artifact.manifest.get("data") or {}).get("train", {}).get("sha256")
    if learned_from not in (None, tables.train.sha256):
        watcher.notice(
            [f"{tables.train.name} is not the file that {head.task} was learned from: figures change with it"]
        )
    before = figures(head.artifact, tables, backbones[1], head.artifact.manifest.get("thresholds") or [])
    options = Options(problem_type=kind, earlier=head.artifact.manifest)
    manifest = learn(recipe, head.files, folder / head.task, backbones, watcher, options)
    if manifest["training"]["interrupted"]:
        raise KeyboardInterrupt
    after = manifest["evaluation"]
    return {"measure": measure_of(head.artifact.manifest)} | {
        name: {"before": found, "after": after[name]} for name, found in before.items()
    }


# -- what an artifact says of how it was made --------------------------------------------------------------------------


def recipe_of(artifact: Artifact, prefixes: tuple[Path, ...]) -> Recipe:
    """The recipe that the artifact's head was fitted by, to fit it again on `prefixes`, frozen."""
    manifest = artifact.manifest
    readout, head = manifest["readout"], manifest["head"]
    hidden, num_members = 0, readout.get("num_members", 1)
    if head["kind"] == HeadKind.HIDDEN:
        hidden = int(artifact.tensors[head_tensor_names(HeadKind.HIDDEN)[0]].shape[0]) // num_members
    stated = {
        "readout": readout["kind"],
        "read_layers": readout["layers"],
        "num_queries": readout.get("num_queries"),
        "num_members": num_members,
        "hidden": hidden,
        "activation": head.get("activation", "tanh"),
    }
    training = (manifest.get("training") or {}) | stated
    changes = {"first_layer": 0, "num_virtual_tokens": 0, "prefixes": prefixes}
    return Recipe.from_manifest(dict(manifest) | {"training": training}, **changes)


def measure_of(manifest: Mapping[str, Any]) -> str:
    """What the task is judged by."""
    stated: str = (manifest.get("training") or {}).get("measure", "")
    return stated or MEASURES[ProblemType(manifest["problem_type"])]


def check_answers(artifact: Artifact, tables: Tables) -> None:
    """Raise SettingsError where `tables` would make another task of it."""
    manifest = artifact.manifest
    if set(manifest["labels"]) != set(tables.labels):
        differing = ", ".join(sorted(set(manifest["labels"]) ^ set(tables.labels))[:5])
        raise SettingsError(
            f"{tables.train.name} has not the labels of {manifest['task']} ({differing}): give the task's own data"
        )
    if manifest.get("input", InputKind.TEXT) != tables.train.input_kind:
        raise SettingsError(
            f"{tables.train.name} holds inputs of kind {tables.train.input_kind}, and {manifest['task']} reads "
            f"{manifest.get('input', InputKind.TEXT)}: give the task's own data"
        )


def figures(
    artifact: Artifact, tables: Tables, exact: Backbone, thresholds: Sequence[float] | None = None
) -> dict[str, dict[str, float]]:
    """What the engine measures on dev, and on test where there is one. `thresholds`: None: tuned on dev."""
    scored, labels = scores(artifact, tables, exact), artifact.manifest["labels"]
    if thresholds is None:
        thresholds = evaluation.tuned_thresholds(scored["dev"], labels)
    return {name: evaluation.figures(found, labels, thresholds) for name, found in scored.items()}


def scores(artifact: Artifact, tables: Tables, exact: Backbone) -> dict[str, Scored]:
    """By the engine, of dev, and of test where there is one."""
    tokenizer = TextTokenizer(exact.path)
    with evaluation.running(exact) as engine:
        return {
            name: evaluation.score(engine, tokenizer, artifact, table)
            for name, table in tables.named.items()
            if name != "train"
        }
