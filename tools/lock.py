"""Writes requirements.lock and requirements-dev.lock: what pip resolves from pyproject.toml today, pinned with ==.

Needs nothing but pip. CUDA's packages are torch's own dependencies and differ by machine, so they are left to pip;
for the same reason a local version such as `+cpu` is cut off.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BY_MACHINE = re.compile(r"(nvidia|cuda)-.*|triton")
RUNTIME_NOTE = "# What Manifold needs to run. Written by `make lock`; edit pyproject.toml instead."
DEV_NOTE = "# What `make test` and `make check` need on top. Written by `make lock`; edit pyproject.toml instead."


def resolve(requirements: Sequence[str]) -> dict[str, str]:
    """Name → version of everything that pip would install into an empty environment."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    report = subprocess.run([*command, *requirements], check=True, capture_output=True, text=True).stdout
    found = (item["metadata"] for item in json.loads(report)["install"])
    pins = {re.sub(r"[-_.]+", "-", meta["name"]).lower(): meta["version"].partition("+")[0] for meta in found}
    return {name: version for name, version in sorted(pins.items()) if not BY_MACHINE.fullmatch(name)}


def write(path: Path, lines: Iterable[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {path.name}")


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    runtime_wanted, dev_wanted = project["project"]["dependencies"], project["dependency-groups"]["dev"]
    runtime = resolve(runtime_wanted)
    pinned = [f"{name}=={version}" for name, version in runtime.items()]
    both = resolve([*pinned, *dev_wanted])
    write(ROOT / "requirements.lock", [RUNTIME_NOTE, *pinned])
    added = [f"{name}=={version}" for name, version in both.items() if name not in runtime]
    write(ROOT / "requirements-dev.lock", [DEV_NOTE, "-r requirements.lock", *added])


if __name__ == "__main__":
    main()
