"""The bare limit: the encoder alone over the same token batches, by torch, ONNX Runtime and OpenVINO, and Manifold's
engine with no branch beside them, in turns of one run.

    make bench-limits

Writes tests/bench/LIMITS.md.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import torch

from app.engine.backbone import Backbone
from tests.bench.limits_cases import Case, even_case, mixed_case
from tests.bench.limits_process import Outside, beside, torch_subject
from tests.bench.limits_report import Timing, report
from tests.bench.limits_torch import COMPILED, DIRECT, EAGER, FROZEN, INT8, SUBMITTED, forward, load_network
from tests.bench.load_texts import MIXED, MIXED_BLOCK, make_texts

REPORT = Path(__file__).with_name("LIMITS.md")
_ROOT = Path(__file__).resolve().parents[2]
_PYTHON = _ROOT / ".venv-limits/bin/python"
_LEAST_COSINE = 0.99  # between a runtime's state of one token and torch's: it computes the same encoder


@contextmanager
def outside_subjects(path: str, folder: Path, threads: int) -> Iterator[list[Outside]]:
    """None where the environment is not installed."""
    if not _PYTHON.exists():
        print("ONNX Runtime and OpenVINO are left out: make .venv-limits/.installed")
        yield []
        return
    file = str(folder / "encoder.onnx")
    base = [str(_PYTHON), "-m", "tests.bench.limits_runtimes"]
    subprocess.run([*base, "export", file, "--model", path], cwd=_ROOT, check=True, capture_output=True)
    kinds = [("ONNX Runtime", "float32"), ("OpenVINO", "float32"), ("OpenVINO", "bfloat16")]
    with ExitStack() as stack:
        subjects = []
        for name, dtype in kinds:
            command = [*base, name.lower().replace(" ", ""), file, "--dtype", dtype, "--threads", str(threads)]
            subjects.append(stack.enter_context(beside(name, dtype, command)))
        yield subjects


def measure(subjects: Sequence[Outside], case: Case, rounds: int, turn_s: float) -> list[Timing]:
    """All subjects take turns, `rounds` times, each round beginning with another."""
    batches = [subject.settle(case) for subject in subjects]
    turns: list[list[float]] = [[] for _ in subjects]
    for number in range(rounds):
        for step in range(len(subjects)):
            index = (number + step) % len(subjects)
            turns[index].append(1000 * subjects[index].turn_s(case, turn_s))
    return [
        Timing(s.name, s.dtype, case.name, batch, tuple(ms))
        for s, batch, ms in zip(subjects, batches, turns, strict=True)
    ]


def check_agreement(outsiders: Sequence[Outside], path: str, case: Case) -> None:
    state = forward(load_network(path, "float32"), case.batches(1)[0])()[0, 0]
    for outsider in outsiders:
        cosine = float(torch.cosine_similarity(torch.tensor(outsider.states[case.name]), state, dim=0))
        if cosine < _LEAST_COSINE:
            raise RuntimeError(f"{outsider.name} in {outsider.dtype} computes another encoder: cosine {cosine:.3f}")


def outside_versions() -> list[str]:
    if not _PYTHON.exists():
        return []
    code = "import onnxruntime, openvino; print(onnxruntime.__version__); print(openvino.__version__.split('-')[0])"
    done = subprocess.run([str(_PYTHON), "-c", code], capture_output=True, text=True, check=True)
    return [f"{name} {version}" for name, version in zip(("onnxruntime", "openvino"), done.stdout.split(), strict=True)]


def make_cases(path: str, folder: Path, names: Sequence[str]) -> list[Case]:
    """Each name is TEXTSxTOKENS, or mixed."""
    lengths = [len(ids) for ids in make_texts(path, MIXED, folder).ids[:MIXED_BLOCK]] if MIXED in names else []
    return [mixed_case(lengths) if name == MIXED else even_case(*map(int, name.split("x"))) for name in names]


def torch_subjects(
    path: str, dtypes: Sequence[str], is_compiled: bool, threads: int
) -> Iterator[AbstractContextManager[Outside]]:
    for dtype in dtypes:
        names = [EAGER, *([COMPILED, FROZEN] if is_compiled else []), DIRECT, SUBMITTED]
        yield from (torch_subject(name, path, dtype, threads) for name in names)
    if "float32" in dtypes:
        yield torch_subject(INT8, path, "float32", threads)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-limits", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--turn-s", type=float, default=0.4, help="how long a subject runs in a turn, at least")
    parser.add_argument("--cases", nargs="+", default=["1x32", "1x128", "8x32", "8x128", "32x64", MIXED])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, whose start takes minutes")
    parser.add_argument("--out", type=Path, default=REPORT)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    path = Backbone.load("embedded", "cpu", "float32").path
    timings: list[Timing] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="limits-")))
        begun = torch_subjects(path, options.dtypes, not options.no_compile, options.threads)
        subjects = [stack.enter_context(subject) for subject in begun]
        outsiders = stack.enter_context(outside_subjects(path, folder, options.threads))
        outsiders = [outsider for outsider in outsiders if outsider.dtype in options.dtypes]
        cases = make_cases(path, folder, options.cases)
        for case in cases:
            found = measure([*subjects, *outsiders], case, options.rounds, options.turn_s)
            check_agreement(outsiders, path, case)
            timings += found
            for timing in found:
                what = f"{case.name:8} {timing.dtype:9} {timing.subject:36}"
                print(f"{what} {timing.median_ms:9.2f} ms ± {100 * timing.spread:.0f} %", flush=True)
    text = report(timings, options.threads, options.rounds, outside_versions())
    options.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
