"""The ceiling: a copy of the whole backbone fine-tuned for one task. Served by nothing here; it says what is given up.

Knows encodings and targets; nothing of prefixes or artifacts.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel

from app.domain import Encoding, ProblemType
from app.learning.cache import Extents
from app.learning.chain import Chain
from app.learning.problems import IGNORED, dev_figure, loss_of, tagged
from app.learning.steps import Steps
from app.learning.trainer import shuffled

_EVALUATION_ROWS = 64
_LOOK_SHARE = 3  # a step of training takes about three times a look at as many rows
_LEAST_LOOKS = 4  # at dev, where there are as many epochs


@dataclass(frozen=True, slots=True)
class FinetuneSettings:
    epochs: int = 4
    batch_size: int = 32
    learning_rate: float = 1e-4
    head_learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.1
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """Encodings of a table and its targets, as `problems.targets_of` makes them."""

    encodings: Sequence[Encoding]
    targets: Tensor

    @property
    def lengths(self) -> Tensor:
        return torch.tensor([len(encoding) for encoding in self.encodings])

    @property
    def tagged(self) -> list[Tensor]:
        """The tag ids of each text's tagged tokens."""
        return tagged(self.targets, self.lengths.tolist())


class PaddedTexts:
    """The token ids and targets of texts, end to end on a device, and batches of them."""

    def __init__(self, texts: Texts, device: torch.device, *, is_tagged: bool = False) -> None:
        """`is_tagged`: targets are of tokens."""

        def flat(rows: Iterable[Sequence[int]]) -> Tensor:
            return torch.from_numpy(np.fromiter(chain.from_iterable(rows), np.int32)).to(device)

        lengths = texts.lengths
        self._ids = flat(encoding.input_ids for encoding in texts.encodings)
        self._types = flat(encoding.token_type_ids for encoding in texts.encodings)
        self._extents = Extents(lengths.cumsum(0) - lengths, lengths, torch.zeros_like(lengths)).to(device)
        self._targets = texts.targets.to(device)
        self._is_tagged = is_tagged

    def of(self, texts: Tensor, width: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ids, types and mask [rows, tokens] of `texts`, indices [rows], and their targets: [rows, …], or of tagged
        tokens [rows, tokens]. `width`: as `Extents.gather` takes it."""
        texts = texts.to(self._ids.device)
        batch = self._extents.gather(texts, width)
        ids, types = (flat[batch.index].masked_fill(~batch.mask, 0).long() for flat in (self._ids, self._types))
        if self._is_tagged:
            return ids, types, batch.mask, self._targets[batch.index].masked_fill(~batch.mask, IGNORED)
        return ids, types, batch.mask, self._targets[texts]


@dataclass(frozen=True, slots=True, eq=False)
class Finetuned:
    model: WholeModel
    dev: float  # the measure of the best epoch
    seconds: float
    tokens: int  # that went through the backbone in training


class WholeModel(nn.Module):
    """An encoder and a linear head, over the mean of the last layer or over each token."""

    def __init__(self, path: str, num_outputs: int, is_token: bool, dtype: torch.dtype = torch.float32) -> None:
        """`dtype`: bfloat16 for the layers' products in half precision; weights and head stay in float32
        (mixed precision: Micikevicius et al. 2018, arXiv 1710.03740)."""
        super().__init__()
        self.network = AutoModel.from_pretrained(path, dtype=torch.float32)
        self.has_types = "token_type_ids" in inspect.signature(self.network.forward).parameters
        self.out = nn.Linear(self.network.config.hidden_size, num_outputs)
        self.dropout = nn.Dropout(0.1)
        self.is_token = is_token
        self.is_mixed = dtype is torch.bfloat16

    def forward(self, ids: Tensor, types: Tensor, mask: Tensor) -> Tensor:
        """All [rows, tokens] → logits [rows, labels] or [rows, tokens, labels]."""
        extra = {"token_type_ids": types} if self.has_types else {}
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.is_mixed):
            states = self.network(input_ids=ids, attention_mask=mask.long(), **extra).last_hidden_state
        states = states.float()
        if not self.is_token:
            weights = mask.to(states.dtype) / mask.sum(dim=1, keepdim=True)
            states = torch.bmm(weights.unsqueeze(1), states).squeeze(1)
        logits: Tensor = self.out(self.dropout(states))
        return logits


def finetune(
    path: str,
    texts: tuple[Texts, Texts],  # to train on, and to choose the epoch with
    problem_type: ProblemType,
    labels: Sequence[str],
    settings: FinetuneSettings,
    device: torch.device,
    report: Callable[[int, float | None], None] = lambda *_: None,
    dtype: torch.dtype = torch.float32,
    measure: str = "",
) -> Finetuned:
    """Train all weights; the best on dev of the epochs that it is looked at behind is kept.

    Where dev is much larger than train, and epochs are many, it is not looked at behind each: looks take about as long
    as training then. `report` is told of (epoch, dev measure); None: it was not looked at.
    `dtype`: of the layers' products, as `WholeModel` takes it. `measure`: of dev, as `dev_figure` takes it.
    """
    began = time.perf_counter()
    train, dev = texts
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    is_token = problem_type is ProblemType.TOKEN
    model = WholeModel(path, max(1, len(labels)), is_token, dtype).to(device)
    groups = [
        {"params": list(model.network.parameters()), "lr": settings.learning_rate},
        {"params": list(model.out.parameters()), "lr": settings.head_learning_rate},
    ]
    groups = [group | {"weight_decay": settings.weight_decay} for group in groups]
    total = settings.epochs * math.ceil(len(train.encodings) / settings.batch_size)
    lengths, batches = train.lengths, PaddedTexts(train, device, is_tagged=is_token)

    def loss(texts: Tensor, width: int | None) -> Tensor:
        return loss_of(problem_type, *_run(model, batches, texts, width))

    transitions = Chain.of(train.tagged, labels).transitions() if is_token else None
    best, kept, tokens = -math.inf, {}, 0
    every = min(
        max(1, settings.epochs // _LEAST_LOOKS),
        math.ceil(len(dev.encodings) / (_LOOK_SHARE * len(train.encodings))),
    )
    # fused: most weights are embeddings, and a step of each by itself took a sixth of the training
    steps = Steps(model, groups, total, settings.warmup, fused=True)
    for epoch in range(1, settings.epochs + 1):
        model.train()
        with steps.round():
            for chosen in shuffled(lengths, settings.batch_size, generator):
                shape = None if is_token else steps.shape(chosen, lengths)  # tagged tokens are as many as they are
                steps.take(chosen, loss, shape)
                tokens += int(lengths[chosen].sum())
        if epoch % every and epoch < settings.epochs:
            report(epoch, None)
            continue
        logits, gold, counts = whole_logits(model, dev, device)
        figure = dev_figure(problem_type, logits, gold, labels, counts, transitions, measure)
        report(epoch, figure)
        if figure > best:
            best, kept = figure, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    steps.close()
    model.load_state_dict(kept)
    model.eval()
    return Finetuned(model, best, time.perf_counter() - began, tokens)


@torch.inference_mode()
def whole_logits(model: WholeModel, texts: Texts, device: torch.device) -> tuple[Tensor, Tensor, list[int]]:
    """Logits and targets in the order of the texts; of tokens the tagged ones alone, with their count a text."""
    model.eval()
    counts = list(map(len, texts.tagged)) if model.is_token else [1] * len(texts.encodings)
    logits: list[Tensor] = [torch.empty(0)] * len(counts)
    batches = PaddedTexts(texts, device, is_tagged=model.is_token)
    for chosen in torch.split(texts.lengths.argsort(), _EVALUATION_ROWS):
        found, _ = _run(model, batches, chosen)
        rows = chosen.tolist()
        for row, part in zip(rows, torch.split(found.cpu(), [counts[row] for row in rows]), strict=True):
            logits[row] = part
    if not model.is_token:
        return torch.cat(logits), texts.targets, []
    return torch.cat(logits), texts.targets[texts.targets != IGNORED], counts


def _run(model: WholeModel, batches: PaddedTexts, texts: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Logits and targets of some texts, indices [rows]; of tokens, of those with a tag."""
    ids, types, mask, targets = batches.of(texts, width)
    logits = model(ids, types, mask)
    if not model.is_token:
        return logits, targets
    return logits[targets != IGNORED], targets[targets != IGNORED]
