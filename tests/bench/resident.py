"""A thousand resident versions: what they take in memory and on disk, and whether a request notices the others."""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from app.domain import EngineRequest, TaskVersion
from app.engine.backbone import Backbone
from app.engine.engine import Engine
from app.engine.plan import make_plan
from tests.engine.models import make_artifact, random_encoding

VERSIONS = 1000


@dataclass(frozen=True)
class Resident:
    versions: int
    file_mb: float  # of all their safetensors, in float16 as `manifold learn` writes them
    memory_mb: float  # that the process grew by
    load_ms: float  # median for one version
    alone_ms: float  # a request of one version with a prefix of its own, nothing else resident
    among_ms: float  # the same request with all resident


def measure_resident(backbone: Backbone) -> Resident:
    """Versions with a prefix from layer 4, 16 virtual tokens, and an attention readout with a hidden layer."""
    engine = Engine(backbone)
    engine.start()
    first = _load(engine, 0)
    alone = _request_ms(engine, first)
    gc.collect()
    before, file_bytes, seconds = _rss_bytes(), 0, []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1, VERSIONS + 1):
            began = time.perf_counter()
            _load(engine, seed)
            seconds.append(time.perf_counter() - began)
            if seed <= 5:
                file_bytes += _file_bytes(engine, seed, Path(folder))
    gc.collect()
    grown = _rss_bytes() - before
    among = _request_ms(engine, first)
    assert len(engine.bank) == VERSIONS + 1
    engine.close()
    per_file = file_bytes / 5
    load_ms = statistics.median(seconds) * 1000
    return Resident(VERSIONS, per_file * VERSIONS / 2**20, grown / 2**20, load_ms, alone, among)


_KIND = {"prefixes": [(16, 4)], "readout": "attention", "layers": [2, 4, 6], "num_queries": 4, "hidden": 16}


def _load(engine: Engine, seed: int) -> TaskVersion:
    artifact = make_artifact(engine.spec, f"task{seed}", seed=seed, **_KIND)
    engine.load(artifact)
    return artifact.version(1)


def _file_bytes(engine: Engine, seed: int, folder: Path) -> int:
    artifact = make_artifact(engine.spec, f"task{seed}", seed=seed, **_KIND)
    tensors = {name: tensor.half() for name, tensor in artifact.tensors.items()}
    tensors["prompt_embeddings"] = artifact.prefix_vectors[0].half().contiguous()
    path = folder / "adapter_model.safetensors"
    save_file(tensors, path)
    return path.stat().st_size


def _request_ms(engine: Engine, version: TaskVersion) -> float:
    plan = make_plan(random_encoding(32, 0), [version], engine.spec.num_layers)
    seconds = []
    for _ in range(30):
        began = time.perf_counter()
        engine.submit(EngineRequest((plan,))).result()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds) * 1000


def _rss_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
