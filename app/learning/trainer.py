"""The training loop: batches from cached states, AdamW with warm-up and linear decay, the best on dev kept.

Dev is looked at behind each epoch; a long one is gone through in rounds, with a look behind each, so that an hour's
work is neither lost to an interrupt nor done unseen.

Knows models, caches and targets; nothing of files, texts or artifacts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from app.domain import ProblemType
from app.engine.heads import mean_tokens
from app.errors import DataError
from app.learning.cache import Extents, Gathered, StateCache, flat_tensors, states_at
from app.learning.chain import Chain
from app.learning.model import TaskModel
from app.learning.problems import IGNORED, class_weights, dev_figure, loss_of, tagged
from app.learning.recipe import Recipe
from app.learning.steps import Group, Steps

_POOL = 64  # batches whose texts are sorted by length together: little padding, and still a new mix every epoch
_POOLED_ROWS = 256
_ROUND_ROWS = 65_536  # a round has as many at least
_ROUND_DEV = 4  # … and so many for each row of dev: a look costs a twelfth of the round at most


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """A table's cached states and its targets."""

    cache: StateCache
    targets: Tensor
    order: Tensor | None = None  # lengths that batches go by [texts], where the cache has others

    def to(self, device: torch.device) -> Split:
        """With what batches are gathered by on `device`, beside the states."""
        cache = replace(self.cache, extents=self.cache.extents.to(device))
        return Split(cache, self.targets.to(device), self.order)

    @property
    def lengths(self) -> Tensor:
        return self.cache.lengths if self.order is None else self.order

    @property
    def tagged(self) -> list[Tensor]:
        """The tag ids of each text's tagged tokens."""
        return tagged(self.targets, self.cache.lengths.tolist())

    def pooled(self, device: torch.device) -> Split:
        """Each text as one token, the mean of its own: all that a mean readout sees, and so in the same batches.

        `device`: where it is trained on them.
        """
        cache, count = self.cache, len(self.cache)
        width = next(iter(cache.reads.values())).shape[1]
        reads = flat_tensors(cache.reads, count, width, torch.float32, device)
        for texts in _in_order(cache.lengths, _POOLED_ROWS, by_length=True):
            batch = cache.gather(texts)
            for layer, flat in cache.reads.items():
                means = mean_tokens(states_at(flat, batch), batch.mask.to(flat.device)).squeeze(1)
                reads[layer][texts.to(reads[layer].device)] = means.to(reads[layer].device)
        extents = Extents(torch.arange(count), torch.ones_like(cache.lengths), torch.zeros_like(cache.lengths))
        return Split(StateCache(extents, reads, None), self.targets, self.lengths)


@dataclass(frozen=True, slots=True)
class Epoch:
    """What is reported behind each epoch, or each round of a long one."""

    number: float  # epochs done: 0.25 behind the first of four rounds
    loss: float
    dev: float
    is_best: bool
    dev_loss: float = 0.0  # decides between equal scores: on few rows many epochs have the same
    was_interrupted: bool = False  # the user ended the training behind it

    @property
    def quality(self) -> tuple[float, float]:
        """Larger is better."""
        return self.dev, -self.dev_loss


def train(
    model: TaskModel,
    splits: tuple[Split, Split],
    problem_type: ProblemType,
    labels: tuple[str, ...],
    report: Callable[[Epoch], None],
) -> list[Epoch]:
    """Train on the first split, choose the epoch on the second, leave the model with that epoch's parameters.

    Ends early when `patience` epochs in a row bring nothing, or when the user interrupts it behind the first look.
    """
    train_split, dev_split = splits
    recipe = model.recipe
    generator = torch.Generator().manual_seed(recipe.seed)
    total = recipe.epochs * -(-len(train_split.cache) // recipe.batch_size)
    steps = Steps(model, _groups(model, recipe), total, recipe.warmup)
    transitions = None
    if problem_type is ProblemType.TOKEN:
        transitions = Chain.of(train_split.tagged, labels).transitions()
    weights = class_weights(problem_type, train_split.targets, model.out.out_features, recipe.class_weight_power)
    learner = _Learner(model, train_split, problem_type, weights, steps)
    shift = _shift(problem_type, weights)
    rounds = num_rounds(len(train_split.cache), len(dev_split.cache), recipe.batch_size)
    batches: list[Tensor] = []
    epochs: list[Epoch] = []
    best = (-math.inf, -math.inf)
    kept: dict[str, Tensor] = {}
    try:
        while len(epochs) < recipe.epochs * rounds and not _is_stalled(epochs, recipe.patience * rounds):
            if len(epochs) % rounds == 0:
                batches = list(shuffled(train_split.lengths, recipe.batch_size, generator))
            loss = learner.run(batches[len(epochs) % rounds :: rounds])
            logits, targets, counts = predict_logits(model, dev_split, problem_type)
            logits = logits - shift
            dev = dev_figure(problem_type, logits, targets, labels, counts, transitions, recipe.measure)
            dev_loss = float(loss_of(problem_type, logits, targets))
            is_best = (dev, -dev_loss) > best and math.isfinite(dev_loss)
            number = (len(epochs) + 1) / rounds
            epochs.append(Epoch(int(number) if number.is_integer() else round(number, 3), loss, dev, is_best, dev_loss))
            if is_best:
                best = epochs[-1].quality
                kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            report(epochs[-1])
    except KeyboardInterrupt:
        if not kept:
            raise
        epochs = [replace(epoch, was_interrupted=True) for epoch in epochs]
    steps.close()
    if not kept:
        raise DataError("training diverged, its dev score is not a number: lower --learning-rate")
    model.load_state_dict(kept)
    model.out.bias.data -= shift.to(model.out.bias)
    model.eval()
    return epochs


def num_rounds(train_rows: int, dev_rows: int, batch_size: int) -> int:
    """In which an epoch is gone through."""
    return max(1, train_rows // max(_ROUND_ROWS, _ROUND_DEV * dev_rows, batch_size))


def _shift(problem_type: ProblemType, weights: Tensor | None) -> Tensor:
    """What weights add to each label's logit, so that it can be taken off: [labels], or one 0.

    A label that counts w times as much where it is given is answered with w times its odds. (Of labels that exclude one
    another weights are there to change the answer.)
    """
    if weights is None or problem_type is not ProblemType.MULTI_LABEL:
        return torch.zeros(1)
    return weights.log()


def _is_stalled(epochs: Sequence[Epoch], patience: int) -> bool:
    return patience > 0 and len(epochs) > patience and not any(epoch.is_best for epoch in epochs[-patience:])


class _Learner:
    """A step for each batch of a split."""

    def __init__(
        self, model: TaskModel, split: Split, problem_type: ProblemType, weights: Tensor | None, steps: Steps
    ) -> None:
        self._model, self._problem_type, self._steps = model, problem_type, steps
        self._lengths = split.cache.lengths
        self._split = split.to(steps.device)
        # else states are fetched, or how many tags are read differs from batch to batch: no capture can do either
        self._has_shapes = problem_type is not ProblemType.TOKEN and split.cache.is_on(steps.device)
        self._weights = None if weights is None else weights.to(steps.device)
        self._has_tags = None
        if problem_type is ProblemType.TOKEN:
            self._has_tags = torch.tensor([len(tags) > 0 for tags in split.tagged])

    def run(self, batches: Iterable[Tensor]) -> float:
        """`batches`: indices of texts, [rows] each. Returns their mean loss."""
        self._model.train()
        with self._steps.round():
            for texts in batches:
                if self._has_tags is None or bool(self._has_tags[texts].any()):
                    shape = self._steps.shape(texts, self._lengths) if self._has_shapes else None
                    self._steps.take(texts, self._loss, shape)
        return self._steps.mean_loss()

    def _loss(self, texts: Tensor, width: int | None) -> Tensor:
        batch = self._split.cache.gather(texts, width)
        chosen, targets = _select(self._split, batch, texts, self._problem_type)
        logits = self._model(self._split.cache, batch, chosen)
        return loss_of(self._problem_type, logits, targets, self._weights)


@torch.inference_mode()
def predict_logits(model: TaskModel, split: Split, problem_type: ProblemType) -> tuple[Tensor, Tensor, list[int]]:
    """Logits and targets of a split in its order; of tokens the tagged ones alone, text by text, with their counts."""
    model.eval()
    logits, targets, counts, order = [], [], [], []
    is_token = problem_type is ProblemType.TOKEN
    for texts in _in_order(split.lengths, 4 * model.recipe.batch_size, by_length=not is_token):
        batch = split.cache.gather(texts)
        chosen, wanted = _select(split, batch, texts, problem_type)
        logits.append(model(split.cache, batch, chosen).cpu())
        targets.append(wanted)
        counts += [] if chosen is None else chosen.sum(dim=1).tolist()
        order.append(texts)
    if counts:
        return torch.cat(logits), torch.cat(targets), counts
    back = torch.cat(order).argsort()
    return torch.cat(logits)[back], torch.cat(targets)[back], []


def _select(split: Split, batch: Gathered, texts: Tensor, problem_type: ProblemType) -> tuple[Tensor | None, Tensor]:
    """The tokens to read (where tokens are tagged) and the batch's targets."""
    if problem_type is not ProblemType.TOKEN:
        return None, split.targets[texts]
    tags = split.targets[batch.index].masked_fill(~batch.mask, IGNORED)
    chosen = tags != IGNORED
    return chosen, tags[chosen]


def _groups(model: TaskModel, recipe: Recipe) -> list[Group]:
    """Queries and prefix have rates of their own, and no decay: their size is what makes them attend."""
    special = [
        (model.queries, recipe.query_learning_rate),
        (model.prefix, recipe.prefix_learning_rate),
    ]
    apart = {id(parameter) for parameter, _ in special}
    rest = [p for p in model.parameters() if id(p) not in apart]
    extra = [{"params": [p], "lr": rate, "weight_decay": 0.0} for p, rate in special if p is not None]
    return [{"params": rest, "lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}, *extra]


def shuffled(lengths: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of texts in a new order, of similar lengths each."""
    order = torch.randperm(len(lengths), generator=generator)
    batches = [
        batch
        for pool in torch.split(order, _POOL * batch_size)
        for batch in torch.split(pool[lengths[pool].argsort(stable=True)], batch_size)
    ]
    for index in torch.randperm(len(batches), generator=generator).tolist():
        yield batches[index]


def _in_order(lengths: Tensor, batch_size: int, by_length: bool) -> Iterator[Tensor]:
    order = lengths.argsort(stable=True) if by_length else torch.arange(len(lengths))
    yield from torch.split(order, batch_size)
