"""Steps of training: AdamW with warm-up and linear decay, gradients clipped.

A step of a small model is some two hundred kernels, whose launches take twenty times as long as they do. On a CUDA
device the steps of batches of one shape are captured once and replayed as one launch each.
Knows parameters and losses; nothing of texts or models.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

_MAX_GRADIENT_NORM = 1.0
_SEEN_BEFORE = 2  # times before a shape is captured: what is made once, as the optimizer's states, is made by then
_MOST_GRAPHS = 64
_WIDTH_STEP = 8  # tokens that a captured batch is padded to a multiple of, so that few shapes serve all lengths

Group = Mapping[str, Any]  # of parameters, as torch's optimizers take them, each with its rate
Loss = Callable[[Tensor, int | None], Tensor]
"""Of texts, as indices [rows] on the parameters' device, padded to so many tokens; None: to the longest."""
Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Of what a call launches, which is not done: what does it."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What steps have in common that launch the same kernels, whatever the texts."""

    task: str
    rows: int
    width: int  # tokens that rows are padded to


@dataclass(frozen=True, slots=True, eq=False)
class _Graph:
    texts: Tensor  # where the kernels read which they are
    replay: Callable[[], None]


class Steps:
    """Steps that train all parameters of some modules, until `close`. Not for several threads."""

    def __init__(
        self,
        modules: nn.Module,
        groups: Sequence[Group],
        total: int,
        warmup: float,
        *,
        fused: bool = False,
        capture: Capture | None = None,
    ) -> None:
        """`total`: steps until the rates are 0; `warmup`: the share of them in which they rise.

        `fused`: one kernel for all parameters, on a CPU too; faster where these are large. `capture`: None: a CUDA
        device's own, and nothing is captured elsewhere.
        """
        self._parameters = list(modules.parameters())
        self._rates = [float(group["lr"]) for group in groups]
        self.device = self._parameters[0].device
        on_cuda = self.device.type == "cuda"
        if on_cuda:  # a captured step reads its rate where it runs
            groups = [{**group, "lr": torch.tensor(group["lr"], device=self.device)} for group in groups]
        self._stream = _side_stream(self.device) if on_cuda else None
        self._capture = _Capturing() if capture is None and on_cuda and _Capturing.is_possible else capture
        self._optimizer = torch.optim.AdamW(map(dict, groups), fused=fused or on_cuda, capturable=on_cuda)
        self._total, self._rising = total, max(1, int(total * warmup))
        self._taken = 0
        self._sum = torch.zeros((), dtype=torch.float64, device=self.device)  # of the losses that nobody asked for yet
        self._num_summed = 0
        self._seen: Counter[Shape] = Counter()
        self._graphs: dict[Shape, _Graph] = {}
        self._longest: dict[str, int] = {}  # text of each task
        self._set_rates()

    def shape(self, texts: Tensor, lengths: Tensor, task: str = "") -> Shape | None:
        """Of `texts`, indices [rows], of all texts' `lengths`. None where nothing is captured: rows are best padded to
        the longest then."""
        if self._capture is None:
            return None
        if task not in self._longest:
            self._longest[task] = int(lengths.max())
        rounded = -(-int(lengths[texts].max()) // _WIDTH_STEP) * _WIDTH_STEP
        return Shape(task, len(texts), min(rounded, self._longest[task]))

    @contextmanager
    def round(self) -> Iterator[None]:
        """Steps are taken within; what reads their parameters runs outside."""
        if self._stream is None:
            yield
            return
        outside = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self._stream):  # autograd remembers it for each parameter: no other may be captured
                yield
        finally:
            outside.wait_stream(self._stream)

    def take(self, texts: Tensor, loss: Loss, shape: Shape | None) -> None:
        """One step on `texts`, indices [rows].

        `shape`: of all that the kernels depend on; None: they depend on more, and are launched one by one.
        """
        graph = None if shape is None else self._graphs.get(shape) or self._captured(texts, loss, shape)
        if graph is None:
            self._step(self._brought(texts), loss, shape)
        else:
            graph.texts.copy_(self._brought(texts))
            graph.replay()
        self._taken += 1
        self._num_summed += 1
        self._set_rates()

    def mean_loss(self) -> float:
        """Of the steps since this was asked last; 0 where there were none. Waits for the device."""
        mean = float(self._sum) / max(1, self._num_summed)
        self._sum.zero_()
        self._num_summed = 0
        return mean

    def close(self) -> None:
        """Give back what steps have taken of the device's memory, but for the parameters."""
        self._optimizer.zero_grad(set_to_none=True)
        self._graphs.clear()
        release_memory(self.device)  # of graphs' own memory nobody else is given any

    def _brought(self, texts: Tensor) -> Tensor:
        """To the device, without waiting for the step before."""
        if self.device.type == "cpu":
            return texts
        return texts.pin_memory().to(self.device, non_blocking=True)

    def _step(self, texts: Tensor, loss: Loss, shape: Shape | None) -> None:
        found = loss(texts, None if shape is None else shape.width)
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(found)
        nn.utils.clip_grad_norm_(self._parameters, _MAX_GRADIENT_NORM)
        self._optimizer.step()
        self._sum += found.detach()

    def _set_rates(self) -> None:
        step, rising = self._taken, self._rising
        factor = min((step + 1) / rising, max(0.0, (self._total - step) / max(1, self._total - rising)))
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor

    def _captured(self, texts: Tensor, loss: Loss, shape: Shape) -> _Graph | None:
        """None where it is not worth it yet, or, then and ever after, where these steps cannot be captured."""
        if self._capture is None or len(self._graphs) == _MOST_GRAPHS:
            return None
        self._seen[shape] += 1
        if self._seen[shape] <= _SEEN_BEFORE:
            return None
        here = self._brought(texts.clone())
        try:
            replay = self._capture(lambda: self._step(here, loss, shape))
        except Exception:
            log.exception("steps of training cannot be captured as a CUDA graph, and are launched one by one")
            self._capture = None
            self._graphs.clear()
            return None
        self._graphs[shape] = graph = _Graph(here, replay)
        return graph


def release_memory(device: torch.device) -> None:
    """Give back what torch holds for nobody of the device's memory."""
    if device.type == "cuda" and _Capturing.is_possible:  # else its allocator takes a capture to be under way
        torch.cuda.empty_cache()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all trainings: memory that one has used is another's on the same stream alone."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class _Capturing:
    """CUDA graphs of one memory pool: they run one after another, and nothing of one is read in the next."""

    is_possible = True  # of the process: behind a capture that failed torch's allocator is not as before
    _failed: ClassVar[list[torch.cuda.CUDAGraph]] = []  # which it still asks

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """On the current stream, which all that the graph reads was made on."""
        graph = torch.cuda.CUDAGraph()
        try:
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
        except BaseException:
            type(self).is_possible = False
            self._failed.append(graph)
            raise
        return graph.replay
