"""A file of tasks to learn, as `manifold learn --config` takes it: what it may hold, and what each task is asked with.

Knows TOML and the options of `manifold learn`, by their parser; runs nothing.
"""

from __future__ import annotations

import argparse
import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.errors import SettingsError

_NOT_OF_A_TASK = {"help", "config", "jobs"}
_OF_ONE_TASK = {"task", "out"}
_FILES = ("train", "dev", "test")

_Value = str | bool
_KINDS: dict[object, tuple[tuple[type, ...], str]] = {
    None: ((str,), "text in quotes"),
    str: ((str,), "text in quotes"),
    Path: ((str,), "a path in quotes"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
}
_ANY_KIND = ((str, int, float), "text, a number or a list of them")


@dataclass(frozen=True, slots=True)
class Job:
    """One task of the file, checked: its arguments to `manifold learn`."""

    name: str
    out: Path
    arguments: tuple[str, ...]

    @property
    def log(self) -> Path:
        return self.out.with_name(f"{self.out.name}.log")


def read_jobs(config: Path, parser: argparse.ArgumentParser) -> list[Job]:
    """The tasks in the order of the file. Raises SettingsError naming table and key of what cannot be run."""
    content = _read(config)
    actions = _actions(parser)
    defaults = _values(f"{config.name}, [defaults]", content.get("defaults", {}), actions, config.parent)
    for name in sorted(_OF_ONE_TASK & defaults.keys()):
        raise SettingsError(f"{config.name}, [defaults]: {name} is of one task alone: put it under [tasks.NAME]")
    jobs = []
    for name, table in content["tasks"].items():
        where = f"{config.name}, [tasks.{name}]"
        values = defaults | _values(where, table, actions, config.parent)
        jobs.append(_job(where, name, values, config.parent))
    _check_outs(config.name, jobs)
    return jobs


def _read(config: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(config.read_text("utf-8-sig"))
    except OSError as error:
        raise SettingsError(f"{config} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise SettingsError(f"{config} is not TOML in UTF-8: {error}") from error
    for key in content:
        if key not in ("defaults", "tasks"):
            raise SettingsError(f"{config.name}: {key} has no meaning here: put it into [defaults] or [tasks.NAME]")
    if not isinstance(content.get("tasks"), dict) or not content["tasks"]:
        raise SettingsError(f"{config.name} has no tasks: add a table [tasks.NAME] with train, a file, for each")
    return content


def _job(where: str, name: str, values: Mapping[str, _Value], root: Path) -> Job:
    if "train" not in values:
        raise SettingsError(f"{where}: train is missing: name the file of labelled texts")
    task = str(values.get("task", name))
    out = str(values.get("out", root / "out" / task))
    values = {"task": task, **values, "out": out}
    return Job(name, Path(out), tuple(token for option in values for token in _tokens(option, values[option])))


def _tokens(option: str, value: _Value) -> Iterator[str]:
    if isinstance(value, str):
        yield f"--{option}={value}"
    elif value:
        yield f"--{option}"


def _check_outs(file: str, jobs: Sequence[Job]) -> None:
    seen: dict[Path, str] = {}
    for job in jobs:
        first = seen.setdefault(job.out.resolve(), job.name)
        if first != job.name:
            raise SettingsError(
                f"{file}, [tasks.{job.name}]: out is {job.out}, as in [tasks.{first}]: give each task its own"
            )


# -- its values --------------------------------------------------------------------------------------------------------


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """What a table of the file may hold, by option with dashes between words."""
    options = parser._option_string_actions.items()
    named = {option[2:]: action for option, action in options if option.startswith("--")}
    return {name: action for name, action in named.items() if name not in _NOT_OF_A_TASK}


def _values(where: str, table: object, actions: Mapping[str, argparse.Action], root: Path) -> dict[str, _Value]:
    """Of one table, by option, as the command line takes them."""
    if not isinstance(table, dict):
        raise SettingsError(f"{where} must be a table of options")
    values: dict[str, _Value] = {}
    for key, value in table.items():
        name = key.replace("_", "-")
        if name not in actions:
            near = difflib.get_close_matches(name, actions, 1)
            meant = f": {near[0].replace('-', '_')} is" if near else ""
            raise SettingsError(f"{where}: {key} is no option of manifold learn{meant}")
        if name in values:
            raise SettingsError(f"{where}: {key} is given twice, once with dashes and once with underscores")
        values |= _value(f"{where}: {key}", name, value, actions, root)
    return values


def _value(where: str, name: str, value: Any, actions: Mapping[str, argparse.Action], root: Path) -> dict[str, _Value]:
    action = actions[name]
    if action.nargs != 0:
        return {name: _text(where, name, value, action, root)}
    if not isinstance(value, bool):
        raise SettingsError(f"{where} must be true or false, not {_shown(value)}")
    opposite = f"no-{name}"
    values: dict[str, _Value] = {name: value}
    return values | ({opposite: not value} if opposite in actions else {})


def _text(where: str, name: str, value: Any, action: argparse.Action, root: Path) -> str:
    kinds, expected = _KINDS.get(action.type, _ANY_KIND)
    parts = value if isinstance(value, list) else [value]
    wrong = SettingsError(f"{where} must be {expected}, not {_shown(value)}")
    if any(isinstance(part, bool) or not isinstance(part, kinds) for part in parts):
        raise wrong
    text = ",".join(str(part) for part in parts)
    try:
        converted = action.type(text) if callable(action.type) else text
    except argparse.ArgumentTypeError as error:
        raise SettingsError(f"{where}: {error}") from error
    except (TypeError, ValueError) as error:
        raise wrong from error
    if isinstance(value, list) and not isinstance(converted, tuple):
        raise wrong
    if action.choices is not None and converted not in action.choices:
        raise SettingsError(f"{where} must be one of {', '.join(map(str, action.choices))}, not {_shown(value)}")
    return _placed(where, name, converted, text, root)


def _placed(where: str, name: str, converted: object, text: str, root: Path) -> str:
    """Paths from the folder of the file on; models and prefixes only where they are there, as they may be names."""
    if isinstance(converted, Path):
        path = root / converted
        if name in _FILES and not path.is_file():
            raise SettingsError(f"{where} names {path}, and no such file is there")
        return str(path)
    if name == "model":
        return _beside(root, text)
    if isinstance(converted, tuple) and all(isinstance(part, Path) for part in converted):
        return ",".join(_beside(root, str(part)) for part in converted)
    return text


def _beside(root: Path, text: str) -> str:
    return str(root / text) if (root / text).is_dir() else text


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
