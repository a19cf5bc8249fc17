"""The slim model of VIA-SD: a model with some of its layers, or halves of layers, left out.

It is a shallow copy that shares every weight with the model, in which the left-out units pass their input on; the
model itself is not touched, so nothing has to be put back. Layers keep their indices, hence their places in the cache.
A trained low-rank adapter (LoRA) works inside the copy only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from .... import _compat
from ....kernels.twin import Proxy, exchanged
from ... import admission
from ...models.adapters import Adapter, AdapterKind, describe, load_adapter, read_tensors, write_record
from ...models.surgery import decoder_layers
from .config import GRANULARITIES, ViaSDConfig


SKIP_RATIO = 0.45
"""Share that masks leave out where nothing else is said: the paper's."""


class Units:
    """What can be left out of a model: its layers, or the attention and the MLP of each.

    Unit l is layer l; with `"sublayer"`, unit 2 l is the attention of layer l and unit 2 l + 1 its MLP.

    Args:
        model (`PreTrainedModel`): a supported decoder.
        granularity (`str`): `"layer"` or `"sublayer"`.

    Attributes:
        names (`list[str]`): of the units, for messages and cards.
        sizes (`list[int]`): their parameters.
        protected (`dict[int, str]`): units that must stay, with the reason.
    """

    def __init__(self, model: PreTrainedModel, granularity: str) -> None:
        if granularity not in GRANULARITIES:
            raise ValueError(f"`granularity` must be one of {', '.join(GRANULARITIES)}, got {granularity!r}.")
        self.granularity, self.layers = granularity, decoder_layers(model)
        self.width = model.config.get_text_config(decoder=True).hidden_size
        self.halves = [_halves(layer) for layer in self.layers] if granularity == "sublayer" else []
        parts = [half for pair in self.halves for half in pair] or list(self.layers)
        self.sizes = [sum(parameter.numel() for parameter in part.parameters()) for part in parts]
        self._step = step = 2 if self.halves else 1
        count = len(self.layers)
        kinds = ("attention of layer", "MLP of layer") if self.halves else ("layer",)
        self.names = [f"{kind} {layer}" for layer in range(count) for kind in kinds]
        windows = admission.layer_windows(model)
        self.protected = {(count - 1) * step + half: "the last layer always stays" for half in range(step)}
        for layer in (windows.index(window) for window in set(windows)):
            kind = "full" if windows[layer] is None else "sliding"
            self.protected[layer * step] = f"masks and positions are read from the first layer with {kind} attention"
        self.protected[0] = "positions are read from the first layer's attention"

    def __len__(self) -> int:
        return len(self.names)

    def of(self, model: PreTrainedModel) -> Units:
        """Return the units of `model`, which may be a copy of the one that these are of."""
        return self if decoder_layers(model) is self.layers else Units(model, self.granularity)

    def check(self, keep: Sequence[bool]) -> None:
        """Raise `ValueError` unless `keep` has an entry per unit and leaves out no protected one."""
        if len(keep) != len(self):
            raise ValueError(
                f"`keep_mask` has {len(keep)} entries; with granularity={self.granularity!r} this model has "
                f"{len(self)} units."
            )
        for unit in self.skipped(keep):
            if unit in self.protected:
                raise ValueError(
                    f"`keep_mask` leaves out unit {unit} ({self.names[unit]}), which is protected: "
                    f"{self.protected[unit]}."
                )

    @staticmethod
    def skipped(keep: Sequence[bool]) -> list[int]:
        """Return the units that a mask leaves out."""
        return [unit for unit, kept in enumerate(keep) if not kept]

    @property
    def free(self) -> list[int]:
        """The units that may be left out. The first layer stays whole, as in the paper, where whole layers are."""
        return [unit for unit in range(len(self)) if unit not in self.protected and unit // self._step > 0]

    def _weights(self, by: str) -> list[int]:
        return self.sizes if by == "params" else [1] * len(self)

    def share(self, keep: Sequence[bool], by: str = "params") -> float:
        """Return which share of the layers' parameters (or, by `"count"`, of the units) a mask leaves out."""
        sizes = self._weights(by)
        return sum(sizes[unit] for unit in self.skipped(keep)) / sum(sizes)

    def fits(self, keep: Sequence[bool], ratio: float, by: str) -> bool:
        """Whether a mask leaves out `ratio`, to within half of the largest unit that may be left out."""
        sizes = self._weights(by)
        slack = max((sizes[unit] for unit in self.free), default=0) / sum(sizes)
        return abs(self.share(keep, by) - ratio) <= slack / 2 + 1e-9

    def filled(self, order: Iterable[int], ratio: float, by: str) -> list[bool]:
        """Return the mask that leaves out units in the given order, up to a share of `ratio`."""
        sizes = self._weights(by)
        keep, spent, room = [True] * len(self), 0, ratio * sum(sizes)
        for unit in order:
            if abs(spent + sizes[unit] - room) < abs(spent - room):  # nearer to the budget than without it
                keep[unit], spent = False, spent + sizes[unit]
        return keep

    def even(self, ratio: float = SKIP_RATIO, by: str = "params") -> list[bool]:
        """Return a mask that leaves out evenly spaced units."""
        free = self.free
        count = min(len(free), round(ratio * len(self)))
        spread = [free[int((index + 0.5) * len(free) / count)] for index in range(count)]
        return self.filled(spread + [unit for unit in free if unit not in spread], ratio, by)

    def attentions(self, keep: Sequence[bool]) -> int:
        """Return how many layers keep their attention."""
        return sum(keep[:: self._step])


def _halves(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the attention and the MLP of a layer."""
    children = list(layer.children())
    attention = next((child for child in children if hasattr(child, "layer_idx")), None)
    others = [child for child in children if child is not attention]
    if attention is None or not others:
        raise ValueError(f"{type(layer).__name__} has no attention and MLP that can be told apart; use whole layers.")
    return attention, max(others, key=lambda child: sum(parameter.numel() for parameter in child.parameters()))


def mask_hash(keep: Sequence[bool], granularity: str) -> str:
    """Return what names a mask: an adapter belongs to one mask only."""
    text = granularity + ":" + "".join("1" if kept else "0" for kept in keep)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class LowRank(nn.Module):
    """A linear module with a low-rank term beside it: `base(x) + scale * B A x`, with A `[r, in]` and B `[out, r]`.

    `base` is shared, and not changed.
    """

    def __init__(self, base: nn.Module, down: torch.Tensor, up: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.down, self.up = base, down, up * scale

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)  # some attention reads the weight's dtype

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return `[..., out]` for `hidden` `[..., in]`."""
        linear = nn.functional.linear
        output: torch.Tensor = self.base(hidden)
        return output + linear(linear(hidden, self.down), self.up)


LowRankTerms = dict[str, tuple[torch.Tensor, torch.Tensor, float]]
"""By the name of a linear module in the model: A `[r, in]`, B `[out, r]` and the scale of the term."""


def slim_model(
    model: PreTrainedModel, units: Units, keep: Sequence[bool], terms: LowRankTerms | None = None
) -> PreTrainedModel:
    """Return the model without the units that `keep` leaves out. It shares all weights; the model is not changed.

    `terms` are an adapter, for linear modules of units that stay.
    """
    changes: dict[int, nn.Module] = {}
    for name, (down, up, scale) in (terms or {}).items():
        base = model.get_submodule(name)
        weight = cast(torch.Tensor, base.weight)
        changes[id(base)] = LowRank(base, down.to(weight), up.to(weight), scale)
    if units.halves:
        for unit in units.skipped(keep):
            half = units.halves[unit // 2][unit % 2]
            changes[id(half)] = Proxy(half, _no_mlp(half, units.width) if unit % 2 else _no_attention)
    else:
        layers = [exchanged(layer, changes) for layer in units.layers]
        changes[id(units.layers)] = nn.ModuleList(
            layer if kept else Proxy(layer, _pass) for layer, kept in zip(layers, keep, strict=True)
        )
    return exchanged(model, changes)


def _pass(_: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden_states


def _no_attention(_: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    hidden = args[0] if args else kwargs["hidden_states"]
    return torch.zeros_like(hidden), None


@torch.no_grad()
def _no_mlp(module: nn.Module, width: int) -> Any:
    """Return what stands in for an MLP: zeros in the structure that it returns, which mixtures of experts extend."""
    dtype = next(module.parameters()).dtype
    example = module(torch.zeros(1, 1, width, dtype=dtype, device=_compat.device_of(module)))

    def silent(_: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        zeros = torch.zeros_like(hidden_states)
        return zeros if isinstance(example, torch.Tensor) else (zeros, *(None for _ in example[1:]))

    return silent


# the adapter's file is PEFT's

LORA_FOLDER = "via_sd_slim"
"""Name of the adapter, and of the folder that PEFT writes it to."""

_PREFIX = "base_model.model."


def read_terms(folder: Path, model: PreTrainedModel) -> LowRankTerms:
    """Read a LoRA in PEFT's format.

    Raises:
        ValueError: for a kind of adapter other than plain LoRA, or modules that the model doesn't have.
    """
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    strange = [name for name in ("use_dora", "use_rslora", "modules_to_save", "lora_bias") if settings.get(name)]
    if settings.get("peft_type") != "LORA" or strange or settings.get("bias", "none") != "none":
        raise ValueError(
            f"{str(folder)!r} must hold a plain LoRA, got peft_type={settings.get('peft_type')!r}"
            f"{' with ' + ', '.join(strange) if strange else ''}."
        )
    tensors, scale = read_tensors(folder / "adapter_model.safetensors"), settings["lora_alpha"] / settings["r"]
    terms: LowRankTerms = {}
    known = {name for name, _ in model.named_modules()}
    for key in sorted(tensors):
        name, _, part = key.removeprefix(_PREFIX).partition(".lora_")
        if name not in known or part not in ("A.weight", "B.weight"):
            raise ValueError(f"The adapter in {str(folder)!r} has {key!r}, for which the model has no module.")
        if part == "A.weight":
            terms[name] = (tensors[key], tensors[key.replace("lora_A", "lora_B")], scale)
    return terms


# a folder holds the settings, the mask with what calibration found, and perhaps an adapter

KIND = "slim"


@dataclass
class Slim:
    """A mask as it was saved, perhaps with an adapter."""

    granularity: str
    keep: list[bool]  # per unit, whether it stays
    calibration: dict[str, Any]  # what the search measured on held-out text, `agreement` among it
    terms: LowRankTerms | None = None  # the adapter
    cache_mode: str | None = None  # that the adapter was trained for


def save_slim(
    folder: str | Path,
    model: PreTrainedModel,
    keep_mask: Sequence[bool],
    granularity: str = "layer",
    *,
    config: ViaSDConfig | None = None,
    calibration: dict[str, Any] | None = None,
    lora: dict[str, Any] | None = None,
) -> None:
    """Write a mask to a folder that `assistant_strategy=` and `ViaSDConfig(adapter=...)` take.

    Args:
        folder (`str` or `Path`): made where needed.
        model (`PreTrainedModel`): that the mask is for.
        keep_mask (`list[bool]`): per unit, whether the slim verifier has it.
        granularity (`str`, *optional*, defaults to `"layer"`): what a unit is; see `Units`.
        config (`ViaSDConfig`, *optional*): the settings to use it with.
        calibration (`dict`, *optional*): held-out figures.
        lora (`dict`, *optional*): what to note of an adapter whose files PEFT has written into the folder.

    Raises:
        TypeError: for a mask that does not hold bools.
        ValueError: for a mask that does not fit the model.
    """
    if any(type(kept) is not bool for kept in keep_mask):
        raise TypeError(f"`keep_mask` must hold bools, got {list(keep_mask)!r}.")
    units = Units(model, granularity)
    units.check(keep_mask)
    record: dict[str, Any] = {
        "kind": KIND,
        "target": describe(model),
        "granularity": granularity,
        "keep_mask": list(keep_mask),
        "skipped": [units.names[unit] for unit in units.skipped(keep_mask)],
        "calibration": calibration or {},
        "files": [],
    }
    if lora is not None:
        record["lora"] = {**lora, "name": LORA_FOLDER, "mask_hash": mask_hash(keep_mask, granularity)}
        record["files"] = [f"{LORA_FOLDER}/{name}" for name in ("adapter_config.json", "adapter_model.safetensors")]
    write_record(folder, config or ViaSDConfig(), record)


def load_slim(model: PreTrainedModel, name_or_path: str) -> Slim:
    """Return what `save_slim` wrote, read once per model.

    Raises:
        ValueError: for a mask of another model, or an adapter of another mask.
    """
    return load_adapter(model, _SLIM, name_or_path)


def _build(model: PreTrainedModel, adapter: Adapter) -> Slim:
    record, lora = adapter.record, adapter.record.get("lora")
    keep, granularity = record["keep_mask"], record["granularity"]
    if lora is None:
        return Slim(granularity, keep, record["calibration"])
    if lora["mask_hash"] != mask_hash(keep, granularity):
        raise ValueError(
            f"The adapter in {adapter.place} was trained for another mask (hash {lora['mask_hash']}) than "
            f"the one beside it ({mask_hash(keep, granularity)})."
        )
    terms = read_terms(adapter.folder / LORA_FOLDER, model)
    return Slim(granularity, keep, record["calibration"], terms, lora["trained_cache_mode"])


_SLIM = AdapterKind(KIND, _build, needs=("keep_mask", "granularity", "calibration"), model="target")
