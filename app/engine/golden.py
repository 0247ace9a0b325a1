"""Golden examples: inputs whose scores an artifact states, computed again to show that it is served as it was trained.

Knows the engine and the tokenizer; does not know what difference is too much.
"""

from __future__ import annotations

from app.domain import EngineRequest, TaskOutput, TextInput
from app.engine.artifact import Artifact
from app.engine.engine import Engine
from app.engine.plan import make_plan, token_limit
from app.engine.tokenizer import TextTokenizer
from app.errors import ArtifactError


def check_golden(engine: Engine, tokenizer: TextTokenizer, artifact: Artifact) -> float | None:
    """The largest difference between stated and computed scores; None where the artifact has no examples.

    The artifact must be resident. Raises ArtifactError where a score has another shape or cannot be computed.
    """
    golden = artifact.manifest.get("golden") or []
    if not golden:
        return None
    inputs = [TextInput(example["text"], example.get("text_pair")) for example in golden]
    outputs = predict(engine, tokenizer, artifact, inputs)
    differences = [_difference(artifact, example["scores"], out) for example, out in zip(golden, outputs, strict=True)]
    return max(differences)


def predict(
    engine: Engine, tokenizer: TextTokenizer, artifact: Artifact, inputs: list[TextInput], truncate: bool = True
) -> list[TaskOutput]:
    """What a resident artifact says of `inputs`, by the engine's own path."""
    version = artifact.version(0)
    limit = token_limit(engine.spec, [version])
    encodings = tokenizer.encode(inputs, [limit] * len(inputs), truncate)
    plans = tuple(make_plan(encoding, [version], engine.spec.num_layers) for encoding in encodings)
    return [output for (output,) in engine.submit(EngineRequest(plans)).result().outputs]


def _difference(artifact: Artifact, stated: list[float], output: TaskOutput) -> float:
    name = artifact.manifest["task"]
    if output.error is not None:
        raise ArtifactError(name, [f"a golden example fails: {output.error}"])
    if len(stated) != len(output.scores):
        raise ArtifactError(name, [f"a golden example states {len(stated)} scores, and {len(output.scores)} came"])
    pairs = zip(stated, output.scores, strict=True)
    return max((abs(a - b) / max(1.0, abs(a)) for a, b in pairs), default=0.0)  # values of regressions may be large
