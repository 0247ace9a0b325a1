"""A plain FastAPI handler as a peer: POST /predict {"text": …} → {"scores": [[…] a task]}; it batches nothing."""

from __future__ import annotations

import argparse
from typing import Any

import uvicorn
from fastapi import FastAPI
from predictors import make_predictor
from pydantic import BaseModel


class Request(BaseModel):
    text: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--tasks", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--on-loop", action="store_true", help="run the model on the event loop: no threads compete")
    options = parser.parse_args()
    predict = make_predictor("classifiers", options.folders, options.tasks, options.threads, options.dtype)
    app = FastAPI()

    def in_thread(request: Request) -> dict[str, Any]:
        return {"scores": predict([request.text])[0]}

    async def on_loop(request: Request) -> dict[str, Any]:
        return {"scores": predict([request.text])[0]}

    app.post("/predict")(on_loop if options.on_loop else in_thread)
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
