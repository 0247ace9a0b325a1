"""`make bench-gpu`: what a CUDA device makes of large and small batches, beside its matrix rate. Writes GPU.md.

Encoders have random weights in the shapes of bert-base and roberta-large: speed does not depend on what they know.
Needs torch and transformers, and for learning what that imports; no server's packages.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product, starmap
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoModel, BertConfig, PreTrainedConfig, RobertaConfig

from app.domain import Encoding, EngineRequest, TaskVersion
from app.engine.artifact import Artifact
from app.engine.backbone import Backbone
from app.engine.engine import Engine
from app.engine.graphs import run_trunk
from app.engine.plan import make_plan
from tests.engine.models import make_artifact, random_encoding

REPORT = Path(__file__).with_name("GPU.md")
VIRTUAL_TOKENS = 16
RESIDENT = 1000
LOADED = 100
TURNS = 6
BERT_BASE = BertConfig()
ROBERTA_LARGE = RobertaConfig(
    vocab_size=50265,
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
    max_position_embeddings=514,
    type_vocab_size=1,
)
_AGREES = 1e-4


@dataclass(frozen=True)
class Line:
    what: str
    figure: str
    target: str = ""
    met: bool | None = None

    def __str__(self) -> str:
        verdict = "" if self.met is None else ", met" if self.met else ", **not met**"
        return f"| {self.what} | {self.figure} | {self.target}{verdict} |"


# -- time --------------------------------------------------------------------------------------------------------------


def device_ms(run: Callable[[], object], repetitions: int = 30) -> float:
    """Median of the device's own clock."""
    for _ in range(5):
        run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repetitions)]
    for began, ended in events:
        began.record()
        run()
        ended.record()
    torch.cuda.synchronize()
    return statistics.median(began.elapsed_time(ended) for began, ended in events)


def wall_ms(run: Callable[[], object], repetitions: int = 200) -> list[float]:
    """Sorted, each from before the call to after its answer."""
    for _ in range(10):
        run()
    found = []
    for _ in range(repetitions):
        began = time.perf_counter()
        run()
        found.append(1000 * (time.perf_counter() - began))
    return sorted(found)


def sustained_ms(engine: Engine, requests: Sequence[EngineRequest], repetitions: int = 90) -> float:
    """Of each request, where all of these, of other texts each, are in flight: while one is computed the next is laid
    out."""
    waiting = [engine.submit(request) for request in requests]
    began = time.perf_counter()
    for number in range(repetitions):
        waiting.pop(0).result()
        waiting.append(engine.submit(requests[number % len(requests)]))
    elapsed_ms = 1000 * (time.perf_counter() - began)
    for future in waiting:
        future.result()
    return elapsed_ms / repetitions


def quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


# -- what runs ---------------------------------------------------------------------------------------------------------


def random_network(config: PreTrainedConfig) -> nn.Module:
    torch.manual_seed(0)
    with torch.device("cuda"):
        network: nn.Module = AutoModel.from_config(config, attn_implementation="sdpa")
    return network.eval()


def matrix_tflops(size: int = 8192) -> float:
    one, other = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / device_ms(lambda: one @ other) / 1e9


def forward_flops(config: PreTrainedConfig, texts: int, tokens: int) -> float:
    """Of the layers' products; embeddings, norms and activations are not counted."""
    width, inner, rows = config.hidden_size, config.intermediate_size, texts * tokens
    layer = rows * (2 * 4 * width * width + 2 * 2 * width * inner + 4 * tokens * width)
    return float(config.num_hidden_layers * layer)


def versions_of(engine: Engine, count: int, first_layer: int) -> list[TaskVersion]:
    found = []
    for seed in range(count):
        artifact = small_artifact(engine, seed, first_layer)
        engine.load(artifact)
        found.append(artifact.version(1))
    return found


def small_artifact(engine: Engine, seed: int, first_layer: int) -> Artifact:
    return make_artifact(
        engine.spec, f"task{seed}", seed=seed, prefixes=[(VIRTUAL_TOKENS, first_layer)], labels=4, hidden=32
    )


def request_of(engine: Engine, encodings: Sequence[Encoding], versions: Sequence[TaskVersion]) -> EngineRequest:
    return EngineRequest(tuple(make_plan(encoding, versions, engine.spec.num_layers) for encoding in encodings))


def started(backbone: Backbone) -> Engine:
    engine = Engine(backbone)
    engine.start()
    return engine


# -- what is measured --------------------------------------------------------------------------------------------------


def large_batches() -> Iterator[Line]:
    """roberta-large: the bare forward over the card's matrix rate, and eight tasks over that."""
    texts, tokens, first_layer = 64, 128, 20
    rate = matrix_tflops()
    yield Line("matrix product 8192 × 8192 × 8192, bfloat16", f"{rate:.0f} TFLOP/s")
    network = random_network(ROBERTA_LARGE)
    flops = forward_flops(ROBERTA_LARGE, texts, tokens)
    backbone = Backbone.from_model(network, "roberta-large", device="cuda", dtype="bfloat16")
    encodings = [random_encoding(tokens, seed) for seed in range(texts)]
    ids = torch.tensor([e.input_ids for e in encodings], device="cuda")
    types = torch.zeros_like(ids)
    with torch.inference_mode():
        ours_ms = device_ms(lambda: run_trunk(backbone, ids, types, None, backbone.spec.num_layers), 150)
        network.config._attn_implementation = "sdpa"
        theirs_ms = device_ms(lambda: network(input_ids=ids), 150)
        network.config._attn_implementation = "manifold"
    case = f"roberta-large, {texts} texts of {tokens} tokens"
    yield Line(f"{case}: transformers' forward", f"{theirs_ms:.2f} ms, {flops / theirs_ms / 1e7 / rate:.0f} % of that")
    share = flops / ours_ms / 1e7 / rate
    yield Line(f"{case}: bare forward, fused layers", f"{ours_ms:.2f} ms, {share:.0f} % of that", "≥ 45 %", share >= 45)
    engine = started(backbone)
    versions = versions_of(engine, 8, first_layer)
    request = request_of(engine, encodings, versions)
    passes = request.plans[0].passes
    answer_ms = quantile(wall_ms(lambda: engine.submit(request).result(), 30), 0.5)
    others = [[random_encoding(tokens, 1000 * n + seed) for seed in range(texts)] for n in range(1, 7)]
    each_ms = sustained_ms(engine, [request_of(engine, encodings, versions) for encodings in others])
    over = each_ms / (passes * ours_ms)
    what = f"{case}: 8 tasks from layer {first_layer}, {passes:.2f} passes"
    yield Line(f"{what}, a request alone to its answer", f"{answer_ms:.1f} ms")
    yield Line(f"{what}, each of many", f"{each_ms:.1f} ms, {over:.2f} × passes × bare", "≤ 1.1 ×", over <= 1.1)
    engine.close()


def small_batches() -> Iterator[Line]:
    """bert-base: one text, eight tasks, with graphs and without."""
    backbone = Backbone.from_model(random_network(BERT_BASE), "bert-base", device="cuda", dtype="bfloat16")
    for tokens in (128, 32, 100):
        for graphed in (True, False):
            engine = started(backbone)
            if not graphed:
                engine._graphs = None
            request = request_of(engine, [random_encoding(tokens, 0)], versions_of(engine, 8, 10))
            found = wall_ms(lambda engine=engine, request=request: engine.submit(request).result(), 300)
            median, late = quantile(found, 0.5), quantile(found, 0.99)
            how = "a graph of the trunk" if graphed else "no graph"
            aim = ("p50 ≤ 3 ms", median <= 3.0) if tokens == 128 and graphed else ("", None)
            case = f"bert-base, one text of {tokens} tokens, 8 tasks from layer 10, {how}"
            yield Line(case, f"p50 {median:.2f} ms, p99 {late:.2f} ms", *aim)
            engine.close()


def resident_versions() -> Iterator[Line]:
    """A thousand versions, and a hundred more that are loaded while requests run."""
    backbone = Backbone.from_model(random_network(BERT_BASE), "bert-base", device="cuda", dtype="bfloat16")
    engine = started(backbone)
    before = torch.cuda.memory_allocated()
    began = time.perf_counter()
    first = versions_of(engine, RESIDENT, 10)[:8]
    each_ms = 1000 * (time.perf_counter() - began) / RESIDENT
    taken_mb = (torch.cuda.memory_allocated() - before) / 2**20
    yield Line(f"{RESIDENT:,} versions resident", f"{taken_mb:.0f} MB, {each_ms:.1f} ms to make and load one")
    request = request_of(engine, [random_encoding(128, 0)], first)
    found = wall_ms(lambda: engine.submit(request).result(), 300)
    yield Line("one text of 128 tokens, 8 tasks among them", f"p50 {quantile(found, 0.5):.2f} ms")
    quiet: list[float] = []
    loading: list[float] = []
    for turn in range(2 * TURNS):
        seeds = range(RESIDENT + turn * LOADED, RESIDENT + (turn + 1) * LOADED) if turn % 2 else range(0)
        artifacts = [small_artifact(engine, seed, 10) for seed in seeds]
        (loading if turn % 2 else quiet).extend(under_traffic(engine, request, artifacts))
    ratio = quantile(sorted(loading), 0.99) / quantile(sorted(quiet), 0.99)
    yield Line(
        f"4 clients, {LOADED} versions loaded within 3 s, {TURNS} times in turn with none",
        f"p99 {quantile(sorted(quiet), 0.99):.2f} → {quantile(sorted(loading), 0.99):.2f} ms, {ratio:.3f} ×",
        "≤ 1.05 ×",
        ratio <= 1.05,
    )
    engine.close()


def under_traffic(engine: Engine, request: EngineRequest, artifacts: Sequence[Artifact]) -> list[float]:
    """Milliseconds of each answer within three seconds, in which the artifacts are loaded one after another."""
    ends = threading.Event()

    def client(_: int) -> list[float]:
        found = []
        while not ends.is_set():
            began = time.perf_counter()
            engine.submit(request).result()
            found.append(1000 * (time.perf_counter() - began))
        return found

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client, number) for number in range(4)]
        began = time.perf_counter()
        for number, artifact in enumerate(artifacts):
            engine.load(artifact)
            time.sleep(max(0.0, began + 3 * (number + 1) / len(artifacts) - time.perf_counter()))
        time.sleep(max(0.0, began + 3 - time.perf_counter()))
        ends.set()
        return [ms for client in clients for ms in client.result()]


def learning() -> Iterator[Line]:
    """What a step of it takes."""
    from tests.bench.gpu_learning import step_times  # imports more than the rest of this page needs

    return starmap(Line, step_times("cuda"))


def exactness() -> Iterator[Line]:
    """The same requests on the CPU in float32, and on the device in both types, with graphs."""
    config = BertConfig(vocab_size=120, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_labels=2)
    torch.manual_seed(0)
    network = AutoModel.from_config(config).eval()
    scores: dict[str, list[float]] = {}
    for name, device, dtype in (
        ("cpu", "cpu", "float32"),
        ("float32", "cuda", "float32"),
        ("bfloat16", "cuda", "bfloat16"),
    ):
        copied = AutoModel.from_config(config).eval()
        copied.load_state_dict(network.state_dict())
        engine = started(Backbone.from_model(copied, "small", device=device, dtype=dtype))
        versions = versions_of(engine, 4, 2) + [_bare(engine, "attention")]
        matching = _bare(engine, "matching")
        found = []
        for pair, lengths in product((False, True), ((7,), (7,), (7,), *[(7, 30, 64)] * 3, (100,) * 40)):
            texts = [random_encoding(n, seed, pair) for seed, n in enumerate(lengths)]
            request = request_of(engine, texts, [*versions, matching] if pair else versions)
            for outputs in engine.submit(request).result().outputs:
                found.extend(score for output in outputs for score in output.scores)
        scores[name] = found
        engine.close()
    for name in ("float32", "bfloat16"):
        worst = max(abs(one - other) for one, other in zip(scores["cpu"], scores[name], strict=True))
        aim = (f"≤ {_AGREES:g}", worst <= _AGREES) if name == "float32" else ("", None)
        yield Line(f"largest difference of a score, cuda {name} and CPU float32", f"{worst:.1e}", *aim)


def _bare(engine: Engine, readout: str) -> TaskVersion:
    artifact = make_artifact(engine.spec, readout, seed=9, readout=readout, layers=[1, 4], num_queries=2, labels=4)
    engine.load(artifact)
    return artifact.version(1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=REPORT)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device on this machine")
    torch.backends.cuda.matmul.allow_tf32 = False
    lines = []
    for section in (exactness, small_batches, large_batches, resident_versions, learning):
        for line in section():
            print(line, flush=True)
            lines.append(line)
        torch.cuda.empty_cache()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    text = [
        "# On a GPU",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {torch.cuda.get_device_name()}, {versions}. Written by `make bench-gpu`.",
        "",
        "Random weights in the shapes of the encoders; bfloat16. Times are medians; those of a request are wall time "
        "from handing it to the engine to its answer on the host.",
        "",
        "| | | target |",
        "|---|---|---|",
        *map(str, lines),
    ]
    options.out.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
