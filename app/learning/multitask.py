"""One representation trained on several source tasks at once: a shared prefix, or the whole backbone.

What independently trained prefixes are compared with (Huang et al. 2023, arXiv 2305.13499). Batches of the tasks
alternate, in proportion to the square root of their sizes. Knows studies of texts; nothing of targets or reports.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from app.domain import BackboneSpec, ProblemType, ReadoutKind
from app.engine.artifact import flatten_prefix
from app.engine.artifact_checks import FORMAT_VERSION, PROMPT, prefix_digest
from app.learning import writer
from app.learning.finetune import FinetuneSettings, PaddedTexts, Texts, WholeModel, whole_logits
from app.learning.model import TaskModel, position_offset
from app.learning.prepare import Frozen, cache_plan, initial_prefix
from app.learning.problems import dev_figure, loss_of
from app.learning.recipe import Recipe
from app.learning.rows import LayerPrefix
from app.learning.steps import Group, Loss, Steps
from app.learning.study import Study
from app.learning.trainer import predict_logits, shuffled

Report = Callable[[int, float], None]  # of each epoch: its number, the mean dev measure


@dataclass(frozen=True, slots=True, eq=False)
class Together:
    """What was trained on all tasks at once, and what it took."""

    logits: Callable[[str, str], Tensor]  # of (task, table): by the task's own head
    dev: Mapping[str, float]  # task → its measure in the best epoch
    num_parameters: int  # of the representation, heads left out
    seconds: float
    tokens: int  # that went through the whole backbone in training, parts of it counted as parts


@dataclass(frozen=True, slots=True)
class _Pace:
    epochs: int
    batch_size: int
    warmup: float
    seed: int
    patience: int = 0  # epochs without a better mean dev measure before training ends; 0: never


@dataclass(frozen=True, slots=True, eq=False)
class _Member:
    """One task in the training of all."""

    lengths: Tensor  # tokens of each training text
    loss: Loss
    dev: Callable[[], float]
    is_resident: bool = True  # all that the loss reads lies on the device


# -- a shared prefix ---------------------------------------------------------------------------------------------------


def train_shared_prefix(
    studies: Mapping[str, Study], recipes: Mapping[str, Recipe], report: Report = lambda *_: None
) -> tuple[Tensor, Together]:
    """A prefix [layers, 2, heads, virtual tokens, head size] that the heads of all tasks train together.

    `recipes`: for each task that of its own prefix, all from one layer on. The shared one has as many virtual tokens
    and steps as those have together, at the lowest of their rates, and starts where their combination would.
    """
    began = time.perf_counter()
    lead = min(recipes.values(), key=lambda recipe: recipe.prefix_learning_rate)
    torch.manual_seed(lead.seed)
    backbone = next(iter(studies.values())).backbone
    plan = cache_plan(lead, Frozen())
    splits = {name: (study.split(plan, "train"), study.split(plan, "dev")) for name, study in studies.items()}
    starts = [initial_prefix(recipe, backbone, splits[name][0].cache) for name, recipe in recipes.items()]
    start = torch.cat([part for part in starts if part is not None], dim=3)
    prefix = nn.Parameter(start.float().to(backbone.device))
    models = {}
    for name, study in studies.items():
        recipe = study.completed(replace(lead, task=name, num_virtual_tokens=prefix.shape[3], measure=""))
        models[name] = TaskModel(recipe, backbone, study.tables.num_outputs, start).to(backbone.device)
        models[name].prefix = prefix

    def logits(task: str, table: str) -> Tensor:
        return predict_logits(models[task], studies[task].split(plan, table), _kind(studies[task]))[0]

    def member(name: str) -> _Member:
        study, model, (train, dev) = studies[name], models[name], splits[name]
        here = train.to(backbone.device)

        def loss(texts: Tensor, width: int | None) -> Tensor:
            found = model(here.cache, here.cache.gather(texts, width))
            return loss_of(_kind(study), found, here.targets[texts])

        def look() -> float:
            return _dev(study, logits(name, "dev"), dev.targets)

        return _Member(train.cache.lengths, loss, look, train.cache.is_on(backbone.device))

    modules = nn.ModuleList(models.values())
    heads = [parameter for parameter in modules.parameters() if parameter is not prefix]
    groups = [
        {"params": heads, "lr": lead.learning_rate, "weight_decay": lead.weight_decay},
        {"params": [prefix], "lr": lead.prefix_learning_rate, "weight_decay": 0.0},
    ]
    rows = {name: len(train.cache) for name, (train, _) in splits.items()}
    epochs = math.ceil(sum(recipes[name].epochs * count for name, count in rows.items()) / sum(rows.values()))
    pace = _Pace(epochs, lead.batch_size, lead.warmup, lead.seed, lead.patience)
    figures, tokens = _alternate(modules, {name: member(name) for name in studies}, groups, pace, report)
    trunk = lead.first_layer / backbone.spec.num_layers
    once = sum(train.cache.num_tokens for train, _ in splits.values())
    passed = round(once * trunk + tokens * (1 - trunk))
    done = Together(logits, figures, prefix.numel(), time.perf_counter() - began, passed)
    return prefix.detach().cpu(), done


def write_prefix(out: Path, name: str, vectors: Tensor, first_layer: int, spec: BackboneSpec) -> None:
    """An artifact that is a prefix alone: the mean of the last layer behind it, as an embedding."""
    flat = flatten_prefix(vectors.detach().cpu()).to(writer.STORED)
    entry = {
        "num_virtual_tokens": flat.shape[0],
        "first_layer": first_layer,
        "digest": prefix_digest(flat, first_layer),
    }
    manifest = {
        "format_version": FORMAT_VERSION,
        "task": name,
        "problem_type": ProblemType.EMBEDDING,
        "labels": [],
        "readout": {"kind": ReadoutKind.MEAN, "layers": [spec.num_layers]},
        "prefixes": [entry],
        "position_offset": position_offset([LayerPrefix(first_layer, vectors)]),
        "backbone": {"name": spec.name, "fingerprint": spec.fingerprint},
    }
    with writer.new_folder(out) as folder:
        writer.write_tensors(folder, {PROMPT: flat})
        writer.write_manifest(folder, manifest)


# -- the whole backbone ------------------------------------------------------------------------------------------------


def finetune_together(
    studies: Mapping[str, Study], settings: FinetuneSettings, report: Report = lambda *_: None
) -> tuple[PreTrainedModel, Together]:
    """A copy of the encoder with all of its weights trained on all tasks."""
    began = time.perf_counter()
    torch.manual_seed(settings.seed)
    backbone = next(iter(studies.values())).backbone
    device = backbone.device
    models = {
        n: WholeModel(backbone.path, s.tables.num_outputs, is_token=False, dtype=backbone.dtype)
        for n, s in studies.items()
    }
    network: PreTrainedModel = next(iter(models.values())).network
    for model in models.values():
        model.network = network
        model.to(device)

    def logits(task: str, table: str) -> Tensor:
        return whole_logits(models[task], Texts(*studies[task].texts(table)), device)[0]

    def member(name: str) -> _Member:
        study, model = studies[name], models[name]
        train, (_, dev_targets) = Texts(*study.texts("train")), study.texts("dev")
        batches = PaddedTexts(train, device)

        def loss(texts: Tensor, width: int | None) -> Tensor:
            ids, types, mask, targets = batches.of(texts, width)
            return loss_of(_kind(study), model(ids, types, mask), targets)

        return _Member(train.lengths, loss, lambda: _dev(study, logits(name, "dev"), dev_targets))

    modules = nn.ModuleList(models.values())
    weights = list(network.parameters())
    heads = [parameter for model in models.values() for parameter in model.out.parameters()]
    groups = [{"params": weights, "lr": settings.learning_rate}, {"params": heads, "lr": settings.head_learning_rate}]
    groups = [group | {"weight_decay": settings.weight_decay} for group in groups]
    pace = _Pace(settings.epochs, settings.batch_size, settings.warmup, settings.seed)
    figures, tokens = _alternate(modules, {name: member(name) for name in studies}, groups, pace, report)
    num_parameters = sum(weight.numel() for weight in weights)
    return network, Together(logits, figures, num_parameters, time.perf_counter() - began, tokens)


# -- what both share ---------------------------------------------------------------------------------------------------


def _alternate(
    modules: nn.Module, members: Mapping[str, _Member], groups: Sequence[Group], pace: _Pace, report: Report
) -> tuple[dict[str, float], int]:
    """Train; leave the parameters of the epoch with the best mean dev measure. Its measures, and tokens trained on."""
    generator = torch.Generator().manual_seed(pace.seed)
    each = [math.ceil(len(member.lengths) / pace.batch_size) for member in members.values()]
    drawn = _draw(members, pace.batch_size, generator)
    best: dict[str, float] = {}
    kept: list[Tensor] = []
    tokens = best_epoch = 0
    steps = Steps(modules, groups, pace.epochs * sum(each), pace.warmup, fused=True)
    for epoch in range(1, pace.epochs + 1):
        if pace.patience and epoch - best_epoch > pace.patience:
            break
        modules.train()
        with steps.round():
            for name, texts in islice(drawn, sum(each)):
                member = members[name]
                shape = steps.shape(texts, member.lengths, name) if member.is_resident else None
                steps.take(texts, member.loss, shape)
                tokens += int(member.lengths[texts].sum())
        figures = {name: member.dev() for name, member in members.items()}
        report(epoch, _mean(figures))
        if not best or _mean(figures) > _mean(best):
            best_epoch, best, kept = epoch, figures, [parameter.detach().clone() for parameter in modules.parameters()]
    steps.close()
    with torch.no_grad():
        for parameter, value in zip(modules.parameters(), kept, strict=True):
            parameter.copy_(value)
    modules.eval()
    return best, tokens


def _draw(members: Mapping[str, _Member], batch_size: int, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Batches without end: a task by the square root of its size, then its next batch."""
    batches = {name: _endless(member.lengths, batch_size, generator) for name, member in members.items()}
    weights = torch.tensor([float(len(member.lengths)) for member in members.values()]).sqrt()
    names = list(members)
    while True:
        name = names[int(torch.multinomial(weights, 1, generator=generator))]
        yield name, next(batches[name])


def _endless(lengths: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield from shuffled(lengths, batch_size, generator)


def _dev(study: Study, logits: Tensor, targets: Tensor) -> float:
    return dev_figure(_kind(study), logits, targets, study.tables.labels, (), measure=study.measure)


def _mean(figures: Mapping[str, float]) -> float:
    return sum(figures.values()) / len(figures)


def _kind(study: Study) -> ProblemType:
    return study.tables.problem_type
