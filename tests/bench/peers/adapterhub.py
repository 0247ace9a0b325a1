"""AdapterHub's Parallel as a peer of the fan-out: N prefix-tuning adapters and their heads in one forward.

Runs in an environment of its own (`make bench-peers`), since adapters pins transformers 4; knows nothing of Manifold.
Reads one JSON object a line from standard input and answers each with one line:

    echo '{"model": "FOLDER", "tasks": 8}' | .venv-adapterhub/bin/python tests/bench/peers/adapterhub.py
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from adapters import AutoAdapterModel, PrefixTuningConfig
from adapters.composition import Parallel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel


@dataclass(frozen=True)
class Request:
    model: str  # the backbone's folder
    tasks: int
    texts: int = 8
    tokens: int = 32
    threads: int = 2
    repetitions: int = 20
    prefix_length: int = 16
    first_layer: int = 0  # the first layer with a prefix; AdapterHub copies the rows where it is reached
    labels: int = 4
    input_ids: list[list[int]] | None = None  # [texts, tokens] without padding; absent: random ids


def measure(request: Request) -> dict[str, object]:
    torch.set_num_threads(request.threads)
    torch.manual_seed(0)
    names = [f"task{index}" for index in range(request.tasks)]
    parallel, bare = _with_adapters(request, names), AutoModel.from_pretrained(request.model).eval()
    ids = _input_ids(request)
    mask = torch.ones_like(ids)
    _check(parallel, names, ids)
    medians = _medians(
        [lambda: parallel(input_ids=ids, attention_mask=mask), lambda: bare(input_ids=ids, attention_mask=mask)],
        request.repetitions,
    )
    versions = {name: importlib.metadata.version(name) for name in ("adapters", "transformers", "torch")}
    asked = {key: value for key, value in asdict(request).items() if key not in {"model", "input_ids"}}
    asked |= {"texts": ids.shape[0], "tokens": ids.shape[1]}
    return {**asked, "median_s": medians[0], "bare_median_s": medians[1], "versions": versions}


def _with_adapters(request: Request, names: list[str]) -> nn.Module:
    model = AutoAdapterModel.from_pretrained(request.model)
    left_out = list(range(request.first_layer))
    config = PrefixTuningConfig(flat=True, prefix_length=request.prefix_length, leave_out=left_out)
    for name in names:
        model.add_adapter(name, config=config)
        model.add_classification_head(name, num_labels=request.labels, layers=1, activation_function=None)
    return model.eval()


def _check(model: nn.Module, names: list[str], ids: Tensor) -> None:
    """Leaves all adapters active, having seen that each gives there what it gives alone, and not the bare scores."""

    def scores(setup: str | Parallel | None) -> list[Tensor]:
        model.active_adapters = setup
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
        return [one.logits for one in getattr(output, "head_outputs", [output])]

    alone = []
    for name in names:
        alone += scores(name)
        if torch.equal(alone[-1], scores(None)[0]):
            raise RuntimeError(f"{name}'s adapter changes nothing")
    together = scores(Parallel(*names))
    for name, expected, found in zip(names, alone, together, strict=True):
        if not torch.allclose(expected, found, atol=1e-4):
            raise RuntimeError(f"{name} scores differently beside others")


def _input_ids(request: Request) -> Tensor:
    if request.input_ids is not None:
        return torch.tensor(request.input_ids)
    vocabulary = AutoConfig.from_pretrained(request.model).vocab_size
    return torch.randint(vocabulary // 2, vocabulary, (request.texts, request.tokens))


def _medians(runs: list[Callable[[], object]], repetitions: int) -> list[float]:
    """Median seconds of each, taken in turns so that a slow moment hits all alike."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(repetitions + 2):
        for run, seconds in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            if turn >= 2:  # the first two warm up
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


def main() -> None:
    logging.getLogger("adapters").setLevel(logging.ERROR)  # that none is active is what the check asks for
    with torch.inference_mode():
        for line in sys.stdin:
            if line.strip():
                print(json.dumps(measure(Request(**json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
