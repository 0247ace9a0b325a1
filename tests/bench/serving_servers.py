"""The servers under load, each a process with the same threads: Manifold, and its peers in environments of their own.

Knows how each is started and asked, at which settings; measures nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx2

from tests.bench.load import Call
from tests.bench.serving_artifacts import FIRST_LAYER, JOBS, TASKS

ROOT = Path(__file__).resolve().parents[2]
_PEERS = ROOT / "tests/bench/peers"
_START_S = 120.0
MANIFOLD = "Manifold"


@dataclass(frozen=True)
class Work:
    """One job on one server: the requests that answer one text, and the bare forwards that they may cost."""

    calls: tuple[Call, ...]
    passes: float


@dataclass(frozen=True)
class Server:
    """How to start one, and how to ask it."""

    name: str
    environment: str  # the folder with its Python
    arguments: Callable[[int], list[str]]  # from the port, without the program's folder
    jobs: dict[str, Work]
    settings: str  # in words
    variables: dict[str, str] = field(default_factory=dict)
    folder: Path = ROOT  # where it runs

    @property
    def is_installed(self) -> bool:
        return (ROOT / self.environment / "bin/python").exists()


@dataclass
class Running:
    server: Server
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def pause(self) -> None:
        """Nothing of it runs while others are measured."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def stop(self) -> None:
        self.resume()
        for number, seconds in ((signal.SIGTERM, 8.0), (signal.SIGKILL, 8.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
        self.process.wait()


class StartError(Exception):
    """A server could not be started; the message is what it said."""


def environment_variables(threads: int) -> dict[str, str]:
    """For every process that computes, so that none has an advantage."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("MANIFOLD_")}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    return own | offline | {"OMP_NUM_THREADS": str(threads), "DO_NOT_TRACK": "1"}


@contextlib.contextmanager
def running(
    servers: Sequence[Server], threads: int, folder: Path, failures: dict[str, str]
) -> Iterator[dict[str, Running]]:
    """Starts all, waits until each has answered every job, and pauses them. What fails goes into `failures`."""
    begun: dict[str, Running] = {}
    try:
        for server in servers:
            if server.is_installed:
                begun[server.name] = _begin(server, threads, folder)
            else:
                failures[server.name] = f"{server.environment} is not there: make bench-peers installs it"
        for name, one in list(begun.items()):
            try:
                _wait(one)
                one.pause()
            except StartError as error:
                failures[name] = str(error)
                begun.pop(name).stop()
        yield begun
    finally:
        for one in begun.values():
            one.stop()


def _begin(server: Server, threads: int, folder: Path) -> Running:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    program, *arguments = server.arguments(port)
    log_file = folder / f"{server.name.replace(' ', '-').replace('/', '-')}.log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [str(ROOT / server.environment / "bin" / program), *arguments],
            cwd=server.folder,
            env=environment_variables(threads) | server.variables,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Running(server, f"http://127.0.0.1:{port}", process, log_file)


def _wait(one: Running) -> None:
    """Until a request of each job has been answered. Raises StartError."""
    until_s = time.monotonic() + _START_S
    waiting = [call for work in one.server.jobs.values() for call in work.calls]
    said = "it does not answer"
    while waiting:
        if one.process.poll() is not None or time.monotonic() > until_s:
            log = one.log.read_text(errors="replace").strip()
            raise StartError(f"{said}; its log ends: {' '.join(log.split())[-600:]}")
        headers = {"content-type": "application/json"}
        try:
            answer = httpx2.post(
                one.url + waiting[-1].path, content=waiting[-1].body('"warm up"'), headers=headers, timeout=60
            )
        except httpx2.HTTPError:
            time.sleep(0.2)
            continue
        if answer.status_code == 200 and '"error"' not in answer.text:
            waiting.pop()
        else:
            said = f"it answers {answer.status_code} {answer.text[:300]}"
            time.sleep(0.2)


# -- Manifold ----------------------------------------------------------------------------------------------------------


def manifold(
    folder: Path, threads: int, dtype: str = "float32", permits: int | None = None, name: str = MANIFOLD
) -> Server:
    """Serves the artifacts in `folder`/prefixes. `permits`: at most so many requests at once."""
    home = folder / f"home-{name.replace(' ', '-')}"
    options = ["--prefixes", str(folder / "prefixes"), "--home", str(home), "--dtype", dtype]
    options += ["--threads", str(threads)]
    if permits is not None:
        options += ["--max-concurrent-requests", str(permits)]
    jobs = {
        job.name: Work((Call("/v1/predict", '{"inputs":', f',"tasks":{_names(job.kind, job.tasks)}}}'),), job.passes)
        for job in JOBS
    }
    environment = str(Path(sys.prefix))
    return Server(
        name,
        environment,
        lambda port: ["python", "-m", "app.cli", "serve", "--port", str(port), *options],
        jobs,
        f"defaults, but `--dtype {dtype} --threads {threads}` and no answer cache",
        {"MANIFOLD_ANSWER_CACHE_BYTES": "0"},
    )


def _names(kind: str, tasks: int) -> str:
    return json.dumps([f"{kind}{index}" for index in range(tasks)])


# -- peers -------------------------------------------------------------------------------------------------------------

ONE_TASK, SEVERAL_TASKS = "1 task", f"{TASKS} tasks"
_TEXT = (Call("/predict", '{"text":', "}"),)


def _job(tasks: int) -> str:
    return ONE_TASK if tasks == 1 else SEVERAL_TASKS


def infinity(classifiers: Sequence[Path], tasks: int, threads: int, dtype: str = "float32") -> Server:
    """A model for each task; it answers one of them a request."""
    options = [
        "v2",
        "--host",
        "127.0.0.1",
        "--device",
        "cpu",
        "--engine",
        "torch",
        "--log-level",
        "warning",
        "--no-model-warmup",
    ]
    for index in range(tasks):
        options += ["--model-id", str(classifiers[index]), "--served-model-name", f"task{index}"]
        options += ["--dtype", dtype, "--batch-size", "32", "--no-compile", "--no-bettertransformer"]
    calls = tuple(Call("/classify", f'{{"model":"task{index}","input":[', "]}") for index in range(tasks))
    return Server(
        "infinity" if tasks == 1 else f"infinity, {tasks} models",
        ".venv-peers-infinity",
        lambda port: ["infinity_emb", *options, "--port", str(port)],
        {_job(tasks): Work(calls, tasks)},
        "infinity-emb 0.0.78, engine torch, batch size 32 (its default), no compile; its bettertransformer "
        "needs an optimum that this torch is too new for",
        {"INFINITY_ANONYMOUS_USAGE_STATS": "0"},
    )


def infinity_onnx(exported: Path) -> Server:
    """Its engine for CPUs, with embeddings: its classifier takes texts one by one there.

    It finds the exported file only in the folder where it runs, and takes a thread a core whatever it is told.
    """
    options = ["v2", "--host", "127.0.0.1", "--device", "cpu", "--engine", "optimum", "--log-level", "warning"]
    options += ["--no-model-warmup", "--model-id", ".", "--served-model-name", "task0", "--batch-size", "32"]
    return Server(
        "infinity, ONNX Runtime",
        ".venv-peers-infinity",
        lambda port: ["infinity_emb", *options, "--port", str(port)],
        {ONE_TASK: Work((Call("/embeddings", '{"model":"task0","input":[', "]}"),), 1.0)},
        "infinity-emb 0.0.78, engine optimum (ONNX Runtime 1.32, a thread a core), embeddings, batch size 32",
        {"INFINITY_ANONYMOUS_USAGE_STATS": "0"},
        exported,
    )


def litserve(classifiers: Sequence[Path], tasks: int, threads: int, dtype: str = "float32") -> Server:
    return _litserve("LitServe" if tasks == 1 else f"LitServe, {tasks} models", classifiers, tasks, threads, dtype)


def peft(classifiers: Sequence[Path], threads: int) -> Server:
    return _litserve("PEFT adapters switched, behind LitServe", classifiers[:1], TASKS, threads, "float32", kind="peft")


def adapterhub(classifiers: Sequence[Path], threads: int, first_layer: int) -> Server:
    name = f"AdapterHub Parallel from layer {first_layer}, behind LitServe"
    passes = (first_layer + TASKS * (6 - first_layer)) / 6
    return _litserve(
        name,
        classifiers[:1],
        TASKS,
        threads,
        "float32",
        kind=f"adapterhub-{first_layer}",
        environment=".venv-adapterhub",
        passes=passes,
    )


def _litserve(
    name: str,
    folders: Sequence[Path],
    tasks: int,
    threads: int,
    dtype: str,
    kind: str = "classifiers",
    environment: str = ".venv-peers-litserve",
    passes: float | None = None,
) -> Server:
    batch = ["--max-batch-size", "32", "--batch-timeout-s", "0.01"]
    options = [*map(str, folders), "--kind", kind, "--tasks", str(tasks), "--threads", str(threads), "--dtype", dtype]
    return Server(
        name,
        environment,
        lambda port: ["python", str(_PEERS / "litserve_server.py"), *options, *batch, "--port", str(port)],
        {_job(tasks): Work(_TEXT, passes or tasks)},
        "LitServe 0.2.19, one worker, max_batch_size 32, batch_timeout 10 ms",
    )


def fastapi(classifiers: Sequence[Path], tasks: int, threads: int, dtype: str = "float32") -> Server:
    options = [*map(str, classifiers), "--tasks", str(tasks), "--threads", str(threads), "--dtype", dtype, "--on-loop"]
    return Server(
        "FastAPI" if tasks == 1 else f"FastAPI, {tasks} models",
        ".venv-peers-litserve",
        lambda port: ["python", str(_PEERS / "fastapi_server.py"), *options, "--port", str(port)],
        {_job(tasks): Work(_TEXT, tasks)},
        "FastAPI 0.165, uvicorn with uvloop and httptools, one text a forward, run on the event loop",
    )


def bentoml(classifiers: Sequence[Path], tasks: int, threads: int, dtype: str = "float32") -> Server:
    options = {
        "folders": [str(path) for path in classifiers],
        "tasks": tasks,
        "threads": threads,
        "dtype": dtype,
        "max_batch_size": 32,
        "max_latency_ms": 60_000,
    }
    service = ["bentoml_service:Classifier", "--working-dir", str(_PEERS), "--host", "127.0.0.1"]
    return Server(
        "BentoML" if tasks == 1 else f"BentoML, {tasks} models",
        ".venv-peers-bentoml",
        lambda port: ["bentoml", "serve", *service, "--port", str(port)],
        {_job(tasks): Work((Call("/predict", '{"texts":[', "]}"),), tasks)},
        "BentoML 1.4.40, one worker, adaptive batches of up to 32",
        {"PEER_OPTIONS": json.dumps(options), "BENTOML_DO_NOT_TRACK": "True"},
    )


def one_task_peers(classifiers: Sequence[Path], threads: int, dtype: str = "float32") -> list[Server]:
    """Those that take the dtype and the number of threads."""
    peers = [make(classifiers, 1, threads, dtype) for make in (infinity, litserve, bentoml, fastapi)]
    has_onnx = dtype == "float32" and threads == os.cpu_count()
    return [*peers, infinity_onnx(classifiers[0].parent / "onnx")] if has_onnx else peers


def several_task_peers(classifiers: Sequence[Path], threads: int) -> list[Server]:
    whole_models = [make(classifiers, TASKS, threads) for make in (infinity, litserve, bentoml, fastapi)]
    shared = [peft(classifiers, threads), *(adapterhub(classifiers, threads, s) for s in (0, FIRST_LAYER))]
    return [*whole_models, *shared]
