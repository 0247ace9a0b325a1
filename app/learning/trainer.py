"""The training loop: batches from cached states, AdamW with warm-up and linear decay, the best epoch on dev kept.

Knows models, caches and targets; nothing of files, texts or artifacts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from app.domain import ProblemType
from app.learning.cache import Gathered, StateCache
from app.learning.model import TaskModel
from app.learning.problems import IGNORED, dev_figure, loss_of
from app.learning.recipe import Recipe

_POOL = 64  # batches whose texts are sorted by length together: little padding, and still a new mix every epoch
_MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """A table's cached states and its targets."""

    cache: StateCache
    targets: Tensor


@dataclass(frozen=True, slots=True)
class Epoch:
    """What is reported behind each epoch."""

    number: int
    loss: float
    dev: float
    is_best: bool


def train(
    model: TaskModel,
    splits: tuple[Split, Split],
    problem_type: ProblemType,
    labels: tuple[str, ...],
    report: Callable[[Epoch], None],
) -> Epoch:
    """Train on the first split, choose the epoch on the second, leave the model with that epoch's parameters."""
    train_split, dev_split = splits
    recipe = model.recipe
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = _optimizer(model, recipe)
    steps = recipe.epochs * -(-len(train_split.cache) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps, recipe.warmup))
    best: Epoch | None = None
    kept: dict[str, Tensor] = {}
    for number in range(1, recipe.epochs + 1):
        loss = _run_epoch(model, train_split, problem_type, optimizer, schedule, generator)
        dev = _evaluate(model, dev_split, problem_type, labels)
        epoch = Epoch(number, loss, dev, best is None or dev > best.dev)
        if epoch.is_best:
            best, kept = epoch, {name: tensor.clone() for name, tensor in model.state_dict().items()}
        report(epoch)
    assert best is not None
    model.load_state_dict(kept)
    model.eval()
    return best


def _run_epoch(
    model: TaskModel,
    split: Split,
    problem_type: ProblemType,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    generator: torch.Generator,
) -> float:
    """The epoch's mean loss."""
    model.train()
    losses = []
    for texts in _shuffled(split.cache.lengths, model.recipe.batch_size, generator):
        batch = split.cache.gather(texts)
        chosen, targets = _select(split, batch, texts, problem_type)
        if targets.numel() == 0:
            continue
        loss = loss_of(problem_type, model(split.cache, batch, chosen), targets.to(model.out.weight.device))
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return sum(losses) / max(1, len(losses))


@torch.inference_mode()
def _evaluate(model: TaskModel, split: Split, problem_type: ProblemType, labels: tuple[str, ...]) -> float:
    model.eval()
    logits, targets, counts = [], [], []
    for texts in _in_order(split.cache.lengths, 4 * model.recipe.batch_size):
        batch = split.cache.gather(texts)
        chosen, wanted = _select(split, batch, texts, problem_type)
        logits.append(model(split.cache, batch, chosen).cpu())
        targets.append(wanted)
        counts += [] if chosen is None else chosen.sum(dim=1).tolist()
    return dev_figure(problem_type, torch.cat(logits), torch.cat(targets), labels, counts)


def _select(split: Split, batch: Gathered, texts: Tensor, problem_type: ProblemType) -> tuple[Tensor | None, Tensor]:
    """The tokens to read (where tokens are tagged) and the batch's targets."""
    if problem_type is not ProblemType.TOKEN:
        return None, split.targets[texts]
    tags = split.targets[batch.index].masked_fill(~batch.mask, IGNORED)
    chosen = tags != IGNORED
    return chosen, tags[chosen]


def _optimizer(model: TaskModel, recipe: Recipe) -> torch.optim.Optimizer:
    """Queries and prefix have rates of their own, and no decay: their size is what makes them attend."""
    special = [
        (model.queries, recipe.query_learning_rate),
        (model.prefix, recipe.prefix_learning_rate),
    ]
    apart = {id(parameter) for parameter, _ in special}
    groups = [{"params": [p for p in model.parameters() if id(p) not in apart], "weight_decay": recipe.weight_decay}]
    extra = [{"params": [p], "lr": rate, "weight_decay": 0.0} for p, rate in special if p is not None]
    return torch.optim.AdamW([*groups, *extra], lr=recipe.learning_rate)


def _rate(step: int, steps: int, warmup: float) -> float:
    rising = max(1, int(steps * warmup))
    return (step + 1) / rising if step < rising else max(0.0, (steps - step) / max(1, steps - rising))


def _shuffled(lengths: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    order = torch.randperm(len(lengths), generator=generator)
    batches = [
        batch
        for pool in torch.split(order, _POOL * batch_size)
        for batch in torch.split(pool[lengths[pool].argsort(stable=True)], batch_size)
    ]
    for index in torch.randperm(len(batches), generator=generator).tolist():
        yield batches[index]


def _in_order(lengths: Tensor, batch_size: int) -> Iterator[Tensor]:
    yield from torch.split(lengths.argsort(stable=True), batch_size)
