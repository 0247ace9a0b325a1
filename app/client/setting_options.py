"""The settings as options of a command: their names, and what `--help` says of them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from pydantic.fields import FieldInfo

from app.config import Settings, env_name, option_name


def add_setting_options(parser: argparse.ArgumentParser, names: Iterable[str], is_hidden: bool = False) -> None:
    """`is_hidden`: taken, and not printed by `--help`."""
    for name in names:
        field = Settings.model_fields[name]
        told = argparse.SUPPRESS if is_hidden else _told(name, field)
        if field.annotation is bool:
            parser.add_argument(option_name(name), action=argparse.BooleanOptionalAction, help=told)
        else:
            parser.add_argument(option_name(name), metavar=name.rpartition("_")[2].upper(), help=told)


def given_settings(options: argparse.Namespace) -> dict[str, object]:
    """Those that stand on the command line. `key` is an option of the clients' own."""
    given = {name: getattr(options, name, None) for name in Settings.model_fields if name != "key"}
    return {name: value for name, value in given.items() if value is not None}


def _told(name: str, field: FieldInfo) -> str:
    return f"{field.description} [{env_name(name)}; default {_default(field.default)}]".replace("%", "%%")


def _default(value: object) -> str:
    match value:
        case None | ():
            return "unset"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case _:
            return str(value)
