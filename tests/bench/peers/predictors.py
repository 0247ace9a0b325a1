"""What stands behind the peers' servers: texts in, scores of every task out; plain transformers, PEFT or AdapterHub.

Runs in the peers' environments; knows nothing of Manifold or of how requests come in.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

Scores = list[list[list[float]]]  # [text][task][label]
Predictor = Callable[[Sequence[str]], Scores]
LABELS = 4
VIRTUAL_TOKENS = 16


def make_predictor(kind: str, folders: Sequence[str], tasks: int, threads: int, dtype: str = "float32") -> Predictor:
    """`folders`: checkpoints of classifiers, a task each; PEFT and AdapterHub take the encoder of the first."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if kind == "classifiers":
        return _classifiers(folders[:tasks], dtype)
    if kind == "peft":
        return _peft(folders[0], tasks, dtype)
    if kind.startswith("adapterhub-"):
        return _adapterhub(folders[0], tasks, int(kind.removeprefix("adapterhub-")))
    raise SystemExit(f"no predictor is named {kind}")


def _classifiers(folders: Sequence[str], dtype: str) -> Predictor:
    """A whole model for each task."""
    from transformers import AutoModelForSequenceClassification

    read = getattr(torch, dtype)
    models = [AutoModelForSequenceClassification.from_pretrained(f, dtype=read).eval() for f in folders]
    return _predictor(folders[0], lambda inputs: [model(**inputs).logits for model in models])


def _peft(folder: str, tasks: int, dtype: str) -> Predictor:
    """One model, a prefix-tuning adapter for each task, switched between forwards: PEFT mixes none in one."""
    from peft import PrefixTuningConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=VIRTUAL_TOKENS)
        base = AutoModelForSequenceClassification.from_pretrained(folder, dtype=getattr(torch, dtype))
        model: Any = get_peft_model(base, config, adapter_name="task0")
        for index in range(1, tasks):
            model.add_adapter(f"task{index}", config)
    model.eval()

    def forwards(inputs: Any) -> list[torch.Tensor]:
        logits = []
        for index in range(tasks):
            model.set_adapter(f"task{index}")
            logits.append(model(**inputs).logits)
        return logits

    return _predictor(folder, forwards)


def _adapterhub(folder: str, tasks: int, first_layer: int) -> Predictor:
    """All adapters in one forward; the rows are copied where the first layer with prefixes is reached."""
    from adapters import AutoAdapterModel, PrefixTuningConfig
    from adapters.composition import Parallel

    model = AutoAdapterModel.from_pretrained(folder)
    config = PrefixTuningConfig(flat=True, prefix_length=VIRTUAL_TOKENS, leave_out=list(range(first_layer)))
    names = [f"task{index}" for index in range(tasks)]
    for name in names:
        model.add_adapter(name, config=config)
        model.add_classification_head(name, num_labels=LABELS, layers=1, activation_function=None)
    model.active_adapters = Parallel(*names)
    model.eval()
    return _predictor(folder, lambda inputs: [output.logits for output in model(**inputs).head_outputs])


def _predictor(folder: str, forwards: Callable[[Any], list[torch.Tensor]]) -> Predictor:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.inference_mode()
    def predict(texts: Sequence[str]) -> Scores:
        inputs = tokenizer(list(texts), padding=True, return_tensors="pt")
        scores = [logits.float().softmax(-1).tolist() for logits in forwards(inputs)]
        return [[of_task[index] for of_task in scores] for index in range(len(texts))]

    return predict
