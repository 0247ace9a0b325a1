"""ONNX Runtime and OpenVINO over token batches: a process of the environment .venv-limits, with a line of JSON for each
question on standard input. Knows nothing of Manifold.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.limits_cases import Case, Ids, padded, timed_turn

Run = Callable[[], Any]


def export(model: str, path: Path) -> None:
    """The encoder as ONNX, any number of texts and tokens: input_ids, attention_mask → last_hidden_state."""
    import torch
    from transformers import AutoModel

    network = AutoModel.from_pretrained(model, attn_implementation="sdpa", add_pooling_layer=False).eval()

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            states: torch.Tensor = self.network(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return states

    ids = torch.randint(1000, 20000, (2, 16))
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    sizes = {0: torch.export.Dim("texts", min=1, max=4096), 1: torch.export.Dim("tokens", min=2, max=512)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Encoder(),
            (ids, mask),
            path,
            input_names=["input_ids", "attention_mask"],
            output_names=["last_hidden_state"],
            dynamic_shapes=(sizes, sizes),
            dynamo=True,
            verbose=False,
        )


class OnnxRuntime:
    def __init__(self, path: Path, threads: int, _dtype: str) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def prepare(self, texts: Ids, is_static: bool) -> Run:
        del is_static  # its kernels do not ask
        inputs = _inputs(texts)
        return lambda: self._session.run(None, inputs)[0]


class OpenVino:
    def __init__(self, path: Path, threads: int, dtype: str) -> None:
        import openvino

        self._core = openvino.Core()
        self._model = self._core.read_model(path)
        self._options = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype],
        }
        self._any_shape = None

    def prepare(self, texts: Ids, is_static: bool) -> Run:
        """A fixed shape is compiled for itself, which is fastest; mixed ones share a model of any shape."""
        inputs = _inputs(texts)
        if is_static:
            model = self._model.clone()
            model.reshape({name: list(array.shape) for name, array in inputs.items()})
            compiled = self._core.compile_model(model, "CPU", self._options)
        else:
            if self._any_shape is None:
                self._any_shape = self._core.compile_model(self._model, "CPU", self._options)
            compiled = self._any_shape
        request = compiled.create_infer_request()

        def run() -> Any:
            return request.infer(inputs, share_inputs=True, share_outputs=True)[0]

        return run


def _inputs(texts: Ids) -> dict[str, Any]:
    ids, mask = padded(texts)
    array = np.array(ids, np.int64)
    return {"input_ids": array, "attention_mask": np.ones_like(array) if mask is None else np.array(mask, np.int64)}


def _prepare_case(runtime: OnnxRuntime | OpenVino, case: Case) -> tuple[int, Run]:
    """The batch size that is fastest for this runtime, and the run over all batches."""
    runs: dict[int, Run] = {}
    for size in case.batch_sizes:
        parts = [runtime.prepare(batch, not case.is_mixed) for batch in case.batches(size)]
        runs[size] = lambda parts=parts: [part() for part in parts]  # type: ignore[misc]
        runs[size]()
    if len(runs) == 1:
        return next(iter(runs.items()))
    seconds = {size: timed_turn(run, 0.2) for size, run in runs.items()}
    best = min(seconds, key=seconds.__getitem__)
    return best, runs[best]


def _answers(runtime: OnnxRuntime | OpenVino) -> Iterator[dict[str, Any]]:
    runs: dict[str, Run] = {}
    for line in sys.stdin:
        question = json.loads(line)
        name = question["case"]
        if "texts" in question:
            case = Case(name, question["texts"], tuple(question["batch_sizes"]))
            size, runs[name] = _prepare_case(runtime, case)
            yield {"batch": size, "state": runs[name]()[0][0, 0].tolist()}
        else:
            yield {"seconds": timed_turn(runs[name], question["turn_s"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runtime", choices=["export", "onnxruntime", "openvino"])
    parser.add_argument("path", type=Path, help="the ONNX file")
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.runtime == "export":
        export(options.model, options.path)
        return
    kind = OnnxRuntime if options.runtime == "onnxruntime" else OpenVino
    for answer in _answers(kind(options.path, options.threads, options.dtype)):
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
