"""LitServe as a peer: POST /predict {"text": …} → {"scores": [[…] for each task]}, batched by LitServe.

Without postponed annotations: LitServe reads those of `decode_request`, as they are.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import litserve as ls
from predictors import make_predictor


class Classifier(ls.LitAPI):  # type: ignore[misc]
    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(max_batch_size=options.max_batch_size, batch_timeout=options.batch_timeout_s)
        self._options = options

    def setup(self, device: str) -> None:
        o = self._options
        self._predict = make_predictor(o.kind, o.folders, o.tasks, o.threads, o.dtype)

    def decode_request(self, request: dict[str, Any], **_: Any) -> str:
        return str(request["text"])

    def batch(self, inputs: Sequence[str]) -> list[str]:
        return list(inputs)

    def predict(self, texts: list[str], **_: Any) -> list[list[list[float]]]:
        return self._predict(texts)

    def unbatch(self, output: list[list[list[float]]]) -> list[list[list[float]]]:
        return output

    def encode_response(self, output: list[list[float]], **_: Any) -> dict[str, Any]:
        return {"scores": output}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--kind", default="classifiers")
    parser.add_argument("--tasks", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-batch-size", type=int, default=32)
    parser.add_argument("--batch-timeout-s", type=float, default=0.01)
    parser.add_argument("--fast-queue", action="store_true")
    options = parser.parse_args()
    server = ls.LitServer(Classifier(options), accelerator="cpu", workers_per_device=1, fast_queue=options.fast_queue)
    server.run(host="127.0.0.1", port=options.port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
