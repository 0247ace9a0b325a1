"""Writes an artifact's files, and moves them into place only when all of them are there and have been read back.

Knows formats and folders; trains and judges nothing.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from app.domain import BackboneSpec, ProblemType
from app.engine.artifact import FILES, MANIFEST, TENSORS
from app.errors import DataError, SettingsError

STORED = torch.float16
_ROOM_BYTES = 8_000_000  # asked for before hours of training: most artifacts take a megabyte
REPORT = "report.html"
_OF_AN_ARTIFACT = {*FILES, REPORT, "README.md"}  # the last as PEFT leaves it
_NUMBERS = re.compile(r"\[\n[-\d.eE+,\s]*\]")  # of numbers; no text matches: JSON escapes its line breaks


@contextmanager
def new_folder(out: Path, option: str = "--out") -> Iterator[Path]:
    """A hidden folder beside `out` that becomes `out` when the block ends well, and vanishes when it does not.

    An artifact that was at `out` is replaced. `option`: by which the user names another folder. Raises SettingsError
    where something else is there.
    """
    out = out.absolute()
    _check_content(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise SettingsError(
            f"{out.parent} cannot be written: {error.strerror}; name another folder with {option}"
        ) from error
    try:
        yield draft
        draft.chmod(0o755)
        _replace(draft, out)
    except OSError as error:
        advice = "make room there, or name another folder" if error.errno == errno.ENOSPC else "name another folder"
        reason = error.strerror or error
        raise DataError(f"the artifact cannot be written to {out.parent}: {reason}; {advice} with {option}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def check_out(out: Path) -> None:
    """Raise SettingsError where `out` cannot be written, or holds something that is not an artifact alone."""
    _check_content(out)
    there = next(folder for folder in out.parents if folder.exists())
    try:
        Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=there)).rmdir()
    except OSError as error:
        raise SettingsError(f"{there} cannot be written: {error.strerror}; name another folder with --out") from error


def _check_content(out: Path) -> None:
    is_empty = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    if not is_empty and not (out / MANIFEST).is_file():
        raise SettingsError(f"{out} exists and is no artifact: name a new folder with --out")
    if not is_empty and any(child.is_dir() for child in out.iterdir()):
        raise SettingsError(f"{out} holds folders, which may be other versions: name a folder of its own with --out")
    foreign = [] if is_empty else sorted(child.name for child in out.iterdir() if child.name not in _OF_AN_ARTIFACT)
    if foreign:
        raise SettingsError(
            f"{out} would be replaced, and holds {', '.join(foreign[:3])}, which is of no artifact: "
            "name a folder of its own with --out"
        )


def check_owner(out: Path, task: str) -> list[str]:
    """A sentence where an earlier version of `task` is at `out`, which will be replaced.

    Raises SettingsError where it is another task's.
    """
    if not (out / MANIFEST).is_file():
        return []
    try:
        owner = json.loads((out / MANIFEST).read_text("utf-8")).get("task")
    except (OSError, ValueError, AttributeError):
        owner = None
    if owner != task:
        whose = f'is an artifact of "{owner}"' if isinstance(owner, str) else "is an artifact that cannot be read"
        raise SettingsError(f"{out} {whose}: name a folder of its own with --out")
    return [f"{out} holds {task} already, which is replaced at the end"]


def check_room(out: Path) -> None:
    """Raise SettingsError where the disk of `out` has no room for an artifact: before training, not behind it."""
    there = next(folder for folder in (out, *out.parents) if folder.is_dir())
    usage = shutil.disk_usage(there)
    if usage.total and usage.free < _ROOM_BYTES:  # some file systems say nothing
        raise SettingsError(
            f"the disk of {there} has {usage.free / 1e6:.1f} MB left, and an artifact with its report may take "
            f"{_ROOM_BYTES / 1e6:.0f} MB: make room there, or name another folder with --out"
        )


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], exact: Collection[str] = ()) -> None:
    """In half precision, but those named in `exact`, which stay as they are.

    Written as bytes: safetensors' own file would be readable by its owner alone.
    """
    stored = {
        name: (tensor if name in exact else tensor.to(STORED)).contiguous() for name, tensor in sorted(tensors.items())
    }
    (folder / TENSORS).write_bytes(save(stored, metadata={"format": "pt"}))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / TENSORS)


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Indented, but each list of numbers on one line."""
    (folder / MANIFEST).write_text(_manifest_text(manifest), encoding="utf-8")


def replace_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """In one step: whoever reads the folder meanwhile finds the old manifest or the new one. Raises DataError."""
    path, draft = folder / MANIFEST, folder / f".{MANIFEST}.{uuid.uuid4().hex}"
    try:
        with draft.open("x", encoding="utf-8") as file:
            file.write(_manifest_text(manifest))
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, draft)
        draft.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        draft.unlink(missing_ok=True)


def _manifest_text(manifest: Mapping[str, Any]) -> str:
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    return _NUMBERS.sub(lambda found: " ".join(found.group().split()), text) + "\n"


def write_peft_config(folder: Path, manifest: Mapping[str, Any], spec: BackboneSpec) -> None:
    """PEFT's own configuration, for a prefix that PEFT can run: one, from layer 0 on. Others would be misread."""
    prefixes = manifest["prefixes"]
    if len(prefixes) != 1 or prefixes[0]["first_layer"] != 0:
        return
    from peft import PrefixTuningConfig, TaskType  # takes seconds, and few artifacts need it

    is_token = manifest["problem_type"] == ProblemType.TOKEN
    config = PrefixTuningConfig(
        task_type=TaskType.TOKEN_CLS if is_token else TaskType.SEQ_CLS,
        num_virtual_tokens=prefixes[0]["num_virtual_tokens"],
        token_dim=spec.hidden_size,
        num_transformer_submodules=1,
        num_attention_heads=spec.num_heads,
        num_layers=spec.num_layers,
        encoder_hidden_size=spec.hidden_size,
        inference_mode=True,
    )
    config.base_model_name_or_path = spec.name
    config.save_pretrained(str(folder))


def _replace(draft: Path, out: Path) -> None:
    if not out.exists():
        os.rename(draft, out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
    os.rename(out, old / out.name)
    os.rename(draft, out)
    shutil.rmtree(old, ignore_errors=True)
