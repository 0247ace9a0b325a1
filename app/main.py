"""The only place that wires: settings → engine, catalogue, service → application → server process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any, NoReturn

import uvloop
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.middleware import Middleware

from app.api import (
    artifacts,
    audit,
    comparison,
    control,
    drift,
    embeddings,
    health,
    index,
    keys,
    predict,
    predictions,
    releases,
    tasks,
)
from app.api.errors import install_handlers
from app.api.middleware import Body, Border, Gatekeeper
from app.api.process import Server, bound_socket, cannot_listen
from app.api.shortcut import Shortcut
from app.config import Settings, env_name, is_loopback, to_headers
from app.domain import BatchReport
from app.engine.backbone import Backbone, choose, set_threads, without_helpers
from app.engine.engine import Engine
from app.engine.host_memory import keep_freed_memory
from app.engine.tokenizer import TextTokenizer
from app.errors import SettingsError
from app.registry.comparison import Comparisons
from app.registry.opening import open_registry
from app.registry.prediction_parts import PartWriter
from app.registry.prediction_store import PredictionStore
from app.registry.store import ArtifactStore
from app.service.access import Access, BackgroundNotes
from app.service.admission import Admission
from app.service.catalog import Catalog
from app.service.drift import DriftWatcher
from app.service.experiment import Recorder
from app.service.first_start import Beginning, begin, find_beginning, live_folders
from app.service.hot_swap import Follower
from app.service.inference import InferenceService, Limits
from app.service.loading import HALF_TOLERANCE, Loader
from app.service.prediction_log import PredictionLog
from app.service.rollout import Rollout
from app.service.runtime import Runtime
from app.service.upkeep import Upkeep
from app.service.watching import Watch, Watcher
from app.service.why import Why
from app.telemetry.logs import configure_logging, flush_logging
from app.telemetry.metrics import Metrics
from app.telemetry.tracing import NOT_TRACING, Tracing

logger = logging.getLogger("manifold")

_LAG_EVERY_S = 0.25
_ROUTED = (
    predict,
    embeddings,
    comparison,
    tasks,
    drift,
    control,
    artifacts,
    releases,
    audit,
    predictions,
    keys,
    index,
    health,
)
_DESCRIPTION = "One text in, every prediction out: a frozen encoder, one shared pass, many tasks."


def create_app(settings: Settings, runtime: Runtime | None = None) -> FastAPI:
    """The application. It closes its runtime at shutdown, and opens one at startup unless it was given one."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Runtime]]:
        app.openapi()  # builds every route now; otherwise the first client would wait for it
        opened = runtime if runtime is not None else await asyncio.to_thread(open_runtime, settings)
        lag = asyncio.create_task(_measure_lag(opened.metrics))
        try:
            yield {"runtime": opened}
        finally:
            lag.cancel()
            await asyncio.to_thread(opened.close)

    app = FastAPI(
        title="Manifold",
        version=health.software_version(),
        description=_DESCRIPTION,
        lifespan=lifespan,
        middleware=_middleware(settings),
        telemetry={"tracing": False, "metrics": False, "logs": False},  # it reads the environment at each request
        redirect_slashes=False,
        redoc_url=None,
    )
    install_handlers(app)
    for module in _ROUTED:
        app.include_router(module.router)
    return app


async def _measure_lag(metrics: Metrics) -> None:
    """How late the loop comes to what is due."""
    loop = asyncio.get_running_loop()
    while True:
        due_s = loop.time() + _LAG_EVERY_S
        await asyncio.sleep(_LAG_EVERY_S)
        metrics.lagged(max(0.0, loop.time() - due_s))


def open_runtime(settings: Settings) -> Runtime:
    """Loads everything and does a first forward; takes seconds.

    Raises SettingsError, BackboneError, or UnavailableError where neither the index nor a last good state is there.
    """
    keep_freed_memory()
    set_threads(settings.threads)
    with contextlib.ExitStack() as opened:
        runtime = _open_runtime(settings, opened)
        runtime.close = opened.pop_all().close
    return runtime


def _open_runtime(settings: Settings, opened: contextlib.ExitStack) -> Runtime:
    """Everything that must be closed again goes onto `opened`, in the order in which it was opened."""
    metrics = Metrics()
    server = f"{socket.gethostname()}:{os.getpid()}"
    traces = _open_traces(settings, server, metrics)
    opened.callback(traces.close)  # behind everything that is traced
    registry = opened.enter_context(
        open_registry(settings.home, settings.redis_url, settings.artifacts_url, settings.cache_limit_bytes)
    )
    logger.info("the index is %s", registry.shown_url)
    following, store, comparisons = registry.index, registry.store, Comparisons(registry.redis)
    beginning = find_beginning(following, registry.last_good)
    check_host(settings, beginning is not None and bool(beginning.view.keys))
    predictions = _open_predictions(settings)
    loader = _open_loader(settings, beginning, store, metrics, traces)
    opened.callback(loader.engine.close)
    follower = Follower(
        following,
        store,
        loader,
        registry.last_good,
        metrics,
        server=server,
        poll_s=settings.index_poll_ms / 1000,
        has_hints=settings.index_hints,
        most_others=settings.pinned_versions,
        revive=registry.revive,
        traces=traces,
    )
    engine, spec = loader.engine, loader.engine.spec
    on_device = engine.device_bytes() is not None
    metrics.watch(lambda: engine.queue_rows, (lambda: engine.device_bytes() or 0) if on_device else None)
    metrics.built(
        {"version": health.software_version(), "model": spec.name, "device": spec.device, "dtype": spec.dtype}
    )
    with traces.change("start"):
        begin(follower, beginning, following, store, settings.prefixes)
    recorder, catalog = Recorder(), follower.catalog
    upkeep = Upkeep(recorder, comparisons, following, follower, metrics, settings.feedback_window_s)
    notes = BackgroundNotes(following.note)
    unknown_id = loader.tokenizer.unknown_id
    drifts = DriftWatcher(lambda: catalog.snapshot, unknown_id, settings.drift_window, registry.windows, metrics)
    watchers: list[Watcher] = [drifts] if settings.drift_window else []
    if predictions is not None:
        watchers.append(_start_prediction_log(settings, predictions, metrics))
    watch = Watch(watchers, metrics.unwatched)
    access = _open_access(settings, catalog, notes)
    for thread in (follower, upkeep, watch):
        thread.start()
        opened.callback(thread.close)
    opened.callback(notes.close)
    workers = ThreadPoolExecutor(settings.tokenization_workers, thread_name_prefix="tokenizer")
    opened.callback(workers.shutdown, cancel_futures=True)
    admission = Admission(settings.max_concurrent_requests, metrics.rejected)
    limits = Limits(settings.max_client_batch_size, settings.deadline_ms, settings.answer_cache_bytes)
    inference = InferenceService(
        loader.engine,
        loader.tokenizer,
        lambda: catalog.snapshot,
        workers,
        admission,
        limits,
        follower,
        recorder,
        watch,
        metrics,
    )

    def is_separate() -> bool:
        asked = settings.separate_approval
        return asked if asked is not None else access.is_guarded

    rollout = Rollout(
        following, store, loader, follower, comparisons, metrics, url=registry.shown_url, separate=is_separate
    )
    return Runtime(
        settings,
        loader.engine,
        catalog,
        inference,
        admission,
        rollout,
        access,
        Why(predictions, settings.prediction_log_sample, catalog, rollout.audit),
        drifts,
        metrics,
        traces,
        lambda: follower.health,
        registry.abandon,
        opened.close,
    )


def _open_traces(settings: Settings, server: str, metrics: Metrics) -> Tracing:
    if settings.otlp_endpoint is None:
        return NOT_TRACING
    from app.telemetry.outlet import Outlet  # a server without traces is not to load what sends them
    from app.telemetry.traces import Traces

    resource = {
        "service.name": "manifold",
        "service.version": health.software_version(),
        "service.instance.id": server,
    }
    headers = {} if settings.otlp_headers is None else to_headers(settings.otlp_headers.get_secret_value())
    return Traces(Outlet(settings.otlp_endpoint, resource, metrics.spans_dropped, headers), settings.trace_sample)


def _open_predictions(settings: Settings) -> PredictionStore | None:
    url, kind = settings.prediction_log, settings.prediction_log_format
    if url is None:
        return None
    days, limit_bytes = settings.prediction_log_limit_days, settings.prediction_log_limit_bytes
    limit_s = math.inf if days is None else days * 86_400
    return PredictionStore(url, settings.home.absolute(), kind, limit_bytes, limit_s)


def _start_prediction_log(settings: Settings, store: PredictionStore, metrics: Metrics) -> PredictionLog:
    most_bytes, most_s = settings.prediction_log_part_bytes, settings.prediction_log_part_s
    log = PredictionLog(
        PartWriter(store.folder, store.server, most_bytes, most_s),
        store,
        metrics,
        sample=settings.prediction_log_sample,
        has_texts=settings.prediction_log_texts,
    )
    log.start()
    return log


def _open_access(settings: Settings, catalog: Catalog, notes: BackgroundNotes) -> Access:
    admin_key = None if settings.admin_key is None else settings.admin_key.get_secret_value()
    return Access(lambda: catalog.snapshot.view.keys, admin_key, notes.note)


def check_host(settings: Settings, has_keys: bool) -> None:
    """Raises SettingsError where other machines could reach a server that nobody needs a key for."""
    if is_loopback(settings.host) or settings.allow_remote or has_keys or settings.admin_key is not None:
        return
    raise SettingsError(
        f"host {settings.host} can be reached from other machines and no keys protect the server: keep 127.0.0.1, "
        f"set admin_key ({env_name('admin_key')}), or say so with --allow-remote ({env_name('allow_remote')}=true)"
    )


def serve(settings: Settings) -> int:
    """Serves until SIGTERM or SIGINT, drains, returns the exit status. Raises ManifoldError where it cannot start."""
    configure_logging(settings.log_format)
    try:
        return _serve(settings)
    finally:
        flush_logging()  # what is said of the end comes behind


def _serve(settings: Settings) -> int:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop_loading)  # there is nothing to drain yet
    began_s = time.monotonic()
    with bound_socket(settings) as listener:
        runtime = open_runtime(settings)
        _tell_who_may_come(settings, runtime)
        server = Server(create_app(settings, runtime), runtime, listener, began_s)
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(server.serve(sockets=[listener]))
        except OSError as error:  # another process began to listen while we loaded
            raise cannot_listen(settings, error) from error
    return 0


def _tell_who_may_come(settings: Settings, runtime: Runtime) -> None:
    if runtime.access.is_guarded:
        logger.info("a key is asked for: %d are in the index", len(runtime.catalog.snapshot.view.keys))
    elif is_loopback(settings.host):
        logger.info("no keys are configured, so only this machine can connect (%s)", settings.host)
    else:
        logger.warning("no keys are configured: whoever reaches %s can use and change this server", settings.host)


def _middleware(settings: Settings) -> list[Middleware]:
    """Outermost first: CORS headers also stand on errors, and the border sees what the body's limit raises."""
    inner = [
        Middleware(Border, logs_requests=settings.log_requests),
        Middleware(Gatekeeper),
        Middleware(Body, limit_bytes=settings.payload_limit_bytes, artifact_limit_bytes=settings.artifact_limit_bytes),
        Middleware(Shortcut, routes=[*predict.router.routes, *embeddings.router.routes]),
    ]
    if not settings.cors_allow_origins:
        return inner
    cors: Any = CORSMiddleware  # its signature and Middleware's type parameter do not meet
    origins = list(settings.cors_allow_origins)
    return [Middleware(cors, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], max_age=600), *inner]


def _open_loader(
    settings: Settings, beginning: Beginning | None, store: ArtifactStore, metrics: Metrics, traces: Tracing
) -> Loader:
    """dtype auto keeps a 16-bit type only where golden examples of what will be live show that it is exact enough."""
    _, dtype = choose(settings.device, settings.dtype)
    if settings.dtype != "auto" or dtype == "float32":
        return _load(settings, dtype, metrics, traces)
    loader = _load(settings, dtype, metrics, traces)
    measured = loader.worst_difference(list(live_folders(beginning, store, settings.prefixes)))
    told = "there are no golden examples" if measured is None else f"golden scores differ by up to {measured:.2g}"
    if measured is not None and measured <= HALF_TOLERANCE:
        logger.info("dtype auto takes %s: %s", dtype, told)
        return loader
    logger.info("dtype auto takes float32: in %s %s", dtype, told)
    loader.engine.close()
    del loader  # two backbones need not fit
    return _load(settings, "float32", metrics, traces)


def _load(settings: Settings, dtype: str, metrics: Metrics, traces: Tracing) -> Loader:
    def observe(report: BatchReport) -> None:
        metrics.ran(report)
        traces.ran(report)

    with without_helpers():  # and not apart: a signal ends the loading at once
        backbone = Backbone.load(settings.model, settings.device, dtype)
        backbone.release_layers()
    tokenizer = TextTokenizer(backbone.path)
    engine = Engine(
        backbone,
        max_batch_tokens=settings.max_batch_tokens,
        max_batch_rows=settings.max_batch_rows,
        max_queue_delay_ms=settings.max_queue_delay_ms,
        observe=observe,
    )
    engine.start()
    return Loader(engine, tokenizer, traces=traces)


def _stop_loading(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)  # whatever is open already is closed on the way out
