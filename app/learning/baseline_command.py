"""`manifold baseline`: gives an artifact the baseline that live texts are compared with. Knows the command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from app.domain import InputKind, ProblemType, TextInput
from app.engine.artifact import MANIFEST, Artifact, read_artifact
from app.engine.backbone import Backbone
from app.engine.baseline import BASELINE, measured_baseline
from app.engine.tokenizer import TextTokenizer
from app.engine.traits import traits_of
from app.errors import DataError, SettingsError
from app.learning import evaluation, writer
from app.learning.data import read_inputs, read_texts
from app.learning.terminal import add_machine_arguments, backbones, guarded

_FEWEST_TEXTS = 200
_DESCRIPTION = """Measure how texts and answers look, and write it into the artifact's manifest.

A server compares live texts with it to see them drift. Give texts that look as live ones should and that the task was
not trained on: the dev file of `manifold learn`, or a sample of traffic. Nothing else of the artifact changes, but its
digest does: publish it as a new version."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("artifact", type=Path, metavar="DIR", help="what `manifold learn` wrote, or PEFT saved")
    told = "a table as for learn, with answers or without, or .txt: a text a line (pairs: with a tab between)"
    told = f"{told}; {_FEWEST_TEXTS} different texts at least"
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help=told)
    group = parser.add_argument_group("for a folder without a manifest, as PEFT saves it: one is written")
    group.add_argument("--task", metavar="NAME", help="default: the folder's name")
    group.add_argument("--problem-type", choices=[kind.value for kind in ProblemType if kind != ProblemType.EMBEDDING])
    group.add_argument("--labels", metavar="A,B", help="in the order of the head")
    group.add_argument("--input", choices=list(InputKind), help="default text")
    add_machine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """0; 1 with one sentence on stderr; 130 where it was interrupted."""
    return guarded("baseline", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    given = {name: getattr(args, name) for name in ("task", "problem_type", "input")}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if args.labels is not None:
        options["labels"] = [label.strip() for label in args.labels.split(",")]
    texts = renew(args.artifact, args.data, backbones(args)[1], options)
    said = f"{args.artifact} has the baseline of {texts} texts; its digest is another one now"
    Console(soft_wrap=True).print(said, markup=False, highlight=False)
    return 0


def renew(folder: Path, data: Path, exact: Backbone, options: Mapping[str, Any]) -> int:
    """Measures by the serving engine and replaces the manifest in one step. The number of texts.

    `options` (task, problem_type, labels, input) complete a folder that comes straight from PEFT, without a manifest.
    Raises ArtifactError, DataError or SettingsError; the folder is then as it was.
    """
    if options and (folder / MANIFEST).is_file():
        given = ", ".join(f"--{name.replace('_', '-')}" for name in options)
        raise SettingsError(f"{folder} has a manifest, which says what it is: leave out {given}")
    artifact = read_artifact(folder, exact.spec, options)
    if artifact.manifest["problem_type"] == ProblemType.EMBEDDING:
        raise SettingsError(f"{folder} is a representation: it answers with vectors, and has nothing that drifts")
    texts = _texts(data, artifact)
    writer.replace_manifest(folder, _manifest(folder, artifact) | {BASELINE: _measure(artifact, texts, exact)})
    return len(texts)


def _texts(data: Path, artifact: Artifact) -> list[TextInput]:
    kind = artifact.version(0).input_kind
    texts = read_inputs(data, kind) if data.suffix.lower() == ".txt" else read_texts(data)
    if texts and texts[0].kind is not kind:
        raise DataError(f"{data.name} holds inputs of kind {texts[0].kind}, and the artifact reads {kind}")
    distinct = len(set(texts))
    if distinct < _FEWEST_TEXTS:
        raise DataError(
            f"{data.name} has {distinct} different texts, too few to compare with: give {_FEWEST_TEXTS} at least"
        )
    return texts


def _measure(artifact: Artifact, texts: list[TextInput], exact: Backbone) -> dict[str, Any]:
    tokenizer, version = TextTokenizer(exact.path), artifact.version(0)
    with evaluation.running(exact) as engine:
        outputs, encodings = evaluation.answers_to(engine, tokenizer, artifact, texts)
    return measured_baseline(version, traits_of(version, outputs, encodings, tokenizer.unknown_id))


def _manifest(folder: Path, artifact: Artifact) -> dict[str, Any]:
    """In the file's own order; without a file what was derived."""
    path = folder / MANIFEST
    manifest: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else dict(artifact.manifest)
    return manifest
