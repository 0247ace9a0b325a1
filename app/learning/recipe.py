"""What to learn and how: every choice of one training, checked against a backbone before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from app.domain import BackboneSpec, InputKind, ProblemType, Readout, ReadoutKind
from app.engine.artifact_checks import MOST_MEMBERS, NAME
from app.errors import SettingsError
from app.learning.problems import CHOICES, MEASURES


@dataclass(frozen=True, slots=True)
class Recipe:
    """None: what suits the problem and the backbone, filled in by `completed`."""

    task: str
    readout: ReadoutKind | None = None
    read_layers: tuple[int, ...] = ()
    num_queries: int | None = None  # a layer
    num_members: int = 1  # readouts that are learned beside each other, and whose logits are averaged
    hidden: int | None = None  # width of the hidden layer; 0: a linear head
    activation: str = "gelu"
    first_layer: int = 0
    num_virtual_tokens: int = 0  # of a prefix of the task's own; 0: none
    prefixes: tuple[Path, ...] = ()  # artifacts whose frozen prefixes are combined, in order
    epochs: int = 10
    batch_size: int = 32
    learning_rate: float = 1e-3
    query_learning_rate: float = 1e-2
    prefix_learning_rate: float = 1e-1
    weight_decay: float = 0.01
    dropout: float = 0.3
    warmup: float = 0.06  # share of all steps
    patience: int = 3  # epochs without a better dev score before training ends; 0: never
    class_weight_power: float = 0.0  # loss weights by label frequency to this power; 0: none
    measure: str = ""  # of dev, by which epochs, settings and arrangements are chosen; "": the problem's usual one
    seed: int = 0

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any], **changes: Any) -> Recipe:
        """The recipe that an artifact of ours states; what its prefixes were is not among it."""
        known = {f.name for f in fields(cls)} - {"task", "prefixes"}
        stated = {name: value for name, value in manifest.get("training", {}).items() if name in known}
        stated |= {"readout": ReadoutKind(stated["readout"]), "read_layers": tuple(stated["read_layers"])}
        return replace(cls(manifest["task"], **stated), **changes)

    def completed(
        self,
        problem_type: ProblemType,
        num_outputs: int,
        spec: BackboneSpec,
        input_kind: InputKind,
    ) -> Recipe:
        """With every choice made. Raises SettingsError where one cannot work."""
        is_token = problem_type is ProblemType.TOKEN
        kind = self.readout or usual_readout(problem_type, input_kind)
        many = kind.has_queries or kind is ReadoutKind.TOKENS
        layers = self.read_layers or (_thirds(spec.num_layers) if many else (spec.num_layers,))
        num_queries, width = _readout_size(num_outputs)
        recipe = replace(
            self,
            readout=kind,
            read_layers=layers,
            num_queries=num_queries if self.num_queries is None else self.num_queries,
            hidden=(width if many else 0) if self.hidden is None else self.hidden,
            measure=self.measure or MEASURES.get(problem_type, ""),  # a representation is not judged
        )
        if recipe.measure and recipe.measure not in (choices := CHOICES.get(problem_type, ())):
            known = ", ".join(choices)
            raise SettingsError(f"--measure {recipe.measure} is nothing that this problem has: give one of {known}")
        recipe._check(is_token, input_kind, spec)
        return recipe

    @property
    def reads(self) -> Readout:
        """The readout of a completed recipe."""
        assert self.readout is not None and self.num_queries is not None
        queries = self.num_queries if self.readout.has_queries else 0
        return Readout(self.readout, self.read_layers, queries, self.num_members)

    def linear(self, learning_rate: float) -> Recipe:
        """The same with a linear head over the mean, and nothing that such a head has no use for."""
        return replace(self, readout=ReadoutKind.MEAN, hidden=0, num_members=1, learning_rate=learning_rate)

    def settings(self) -> dict[str, Any]:
        """For the manifest: no paths, nothing of the machine."""
        settings = asdict(self)
        del settings["task"], settings["prefixes"]
        return settings | {"read_layers": list(self.read_layers)}

    def applying(self) -> dict[str, Any]:
        """The settings of a completed recipe that its arrangement has a use for."""
        idle = set[str]()
        if not self.num_virtual_tokens:
            idle |= {"num_virtual_tokens", "first_layer", "prefix_learning_rate"}
        if not self.reads.kind.has_queries:
            idle |= {"num_queries", "query_learning_rate"}
        if not self.hidden:
            idle |= {"activation"}
        if self.num_members == 1:
            idle |= {"num_members"}
        return {name: value for name, value in self.settings().items() if name not in idle}

    def _check(self, is_token: bool, input_kind: InputKind, spec: BackboneSpec) -> None:
        faults = _faults(self, is_token, input_kind, spec)
        if faults:
            raise SettingsError(faults[0])


def usual_readout(problem_type: ProblemType, input_kind: InputKind) -> ReadoutKind:
    if problem_type is ProblemType.TOKEN:
        return ReadoutKind.TOKENS
    return ReadoutKind.MATCHING if input_kind is InputKind.PAIR else ReadoutKind.ATTENTION


def epochs_for(steps: int, rows: int, batch_size: int) -> int:
    """Epochs of so many rows that have as many steps at least."""
    return -(-steps // -(-rows // batch_size))


def _readout_size(num_outputs: int) -> tuple[int, int]:
    """(queries a layer, width of the hidden layer): few labels need little, and small readouts are served faster."""
    if num_outputs <= 8:
        return 2, 32
    return (4, 64) if num_outputs <= 100 else (4, 96)


def _thirds(num_layers: int) -> tuple[int, ...]:
    return tuple(sorted({max(1, round(num_layers * part / 3)) for part in (1, 2, 3)}))


def _faults(recipe: Recipe, is_token: bool, input_kind: InputKind, spec: BackboneSpec) -> list[str]:
    layers, top = recipe.read_layers, spec.num_layers
    checks = {
        "--task must be a name of a-z, 0-9, _, . and -, 64 characters at most": not NAME.fullmatch(recipe.task),
        f"--read-layers must rise from 1 to {top} at most": sorted(set(layers)) != list(layers)
        or not 1 <= layers[0] <= layers[-1] <= top,
        "tags of tokens need --readout tokens, and nothing else reads tokens": is_token
        != (recipe.readout is ReadoutKind.TOKENS),
        "--readout matching compares the texts of a pair, and these rows have one text each: leave it out": (
            recipe.readout is ReadoutKind.MATCHING and input_kind is not InputKind.PAIR
        ),
        "this backbone has no pooler: choose another --readout": recipe.readout is ReadoutKind.POOLER
        and not spec.has_pooler,
        f"a pooler reads layer {top} alone": recipe.readout is ReadoutKind.POOLER and layers != (top,),
        f"--first-layer must be in 0 … {top - 1}": not 0 <= recipe.first_layer < top,
        "--num-members averages readouts that have queries and a hidden layer, and these have not": (
            recipe.num_members > 1 and not (recipe.reads.kind.has_queries and recipe.hidden)
        ),
        "--num-virtual-tokens trains a prefix and --prefixes reads trained ones: give one of them": bool(
            recipe.num_virtual_tokens and recipe.prefixes
        ),
        f"--num-virtual-tokens must be in 0 … {spec.max_tokens // 2}": not 0
        <= recipe.num_virtual_tokens
        <= spec.max_tokens // 2,
        "nothing reads above the prefix's first layer": bool(recipe.num_virtual_tokens)
        and layers[-1] <= recipe.first_layer,
    }
    return [sentence for sentence, wrong in checks.items() if wrong] + _number_faults(recipe)


def _number_faults(recipe: Recipe) -> list[str]:
    checks = {  # option → (its range, whether the recipe is in it)
        "--epochs": ("1 or more", recipe.epochs >= 1),
        "--batch-size": ("1 or more", recipe.batch_size >= 1),
        "--num-queries": ("1 or more", recipe.num_queries is not None and recipe.num_queries >= 1),
        "--num-members": (f"1 to {MOST_MEMBERS}", 1 <= recipe.num_members <= MOST_MEMBERS),
        "--hidden": ("0 or more", recipe.hidden is not None and recipe.hidden >= 0),
        "--learning-rate": ("more than 0", recipe.learning_rate > 0),
        "--query-learning-rate": ("more than 0", recipe.query_learning_rate > 0),
        "--prefix-learning-rate": ("more than 0", recipe.prefix_learning_rate > 0),
        "--weight-decay": ("0 or more", recipe.weight_decay >= 0),
        "--dropout": ("0 or more and less than 1", 0 <= recipe.dropout < 1),
        "--patience": ("0 or more", recipe.patience >= 0),
        "--class-weight-power": ("0 to 1", 0 <= recipe.class_weight_power <= 1),
    }
    return [f"{name} is out of range: give {limits}" for name, (limits, good) in checks.items() if not good]
