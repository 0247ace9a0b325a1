"""BentoML as a peer: POST /predict {"texts": ["…"]} → [[[…] for each task]], batched by BentoML across requests.

`bentoml serve` takes no arguments for the service, so it reads a JSON object from the environment: PEER_OPTIONS.
"""

from __future__ import annotations

import json
import os

import bentoml
from predictors import make_predictor

_OPTIONS = json.loads(os.environ["PEER_OPTIONS"])


@bentoml.service(workers=1, traffic={"timeout": 600}, logging={"access": {"enabled": False}})
class Classifier:
    def __init__(self) -> None:
        o = _OPTIONS
        self._predict = make_predictor("classifiers", o["folders"], o["tasks"], o["threads"], o["dtype"])

    @bentoml.api(batchable=True, max_batch_size=_OPTIONS["max_batch_size"], max_latency_ms=_OPTIONS["max_latency_ms"])
    def predict(self, texts: list[str]) -> list[list[list[float]]]:
        return self._predict(texts)
