"""The ensemble head of DIVERSED: how far to trust the target at a position, by both models' last hidden states."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ....artefacts import AdapterReference
from ....configuration import SpeculationConfig
from ...models.adapters import Adapter, AdapterKind, check_model, describe, load_adapter, write_adapter


KIND = "diversed_head"

logger = logging.get_logger(__name__)


class DiversedHead(nn.Module):
    """The target's weight as a sigmoid of one linear function of both hidden states, in float32.

    Args:
        draft_size (`int`): width of the draft model's hidden state.
        target_size (`int`): width of the target's.
        init_weight (`float`, *optional*, defaults to 0.5): weight that the untrained head returns everywhere.
        input_norm (`str`, *optional*, defaults to `"none"`): `"rms"` scales each hidden state to unit RMS first.
        record (`dict`, *optional*): what is known of the head: its models, how it was trained.

    Raises:
        ValueError: for an `init_weight` outside (0, 1), or another `input_norm`.
    """

    def __init__(
        self,
        draft_size: int,
        target_size: int,
        init_weight: float = 0.5,
        input_norm: str = "none",
        record: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not 0 < init_weight < 1:
            raise ValueError(f"`init_weight` must be in (0, 1), got {init_weight}.")
        if input_norm not in ("none", "rms"):
            raise ValueError(f"`input_norm` must be none or rms, got {input_norm!r}.")
        self.draft_size, self.target_size, self.input_norm = draft_size, target_size, input_norm
        self.record = record or {}
        self.weight = nn.Parameter(torch.zeros(1, draft_size + target_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.full((1,), math.log(init_weight / (1 - init_weight)), dtype=torch.float32))

    def logit(self, features: torch.Tensor) -> torch.Tensor:
        """Return the weight's logit `[...]` for features `[..., H_d + H_t]`."""
        return nn.functional.linear(features.float(), self.weight.float(), self.bias.float())[..., 0]

    def features(self, draft: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the input `[..., H_d + H_t]`, draft first, of hidden states `[..., H_d]` and `[..., H_t]`."""
        parts = [draft.float(), target.float()]
        if self.input_norm == "rms":
            parts = [part * part.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt() for part in parts]
        return torch.cat(parts, dim=-1)

    def forward(self, draft: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the target's weight `[...]`, float32, of hidden states `[..., H_d]` and `[..., H_t]`."""
        return torch.sigmoid(self.logit(self.features(draft, target)))

    def save(
        self,
        folder: str | Path,
        config: SpeculationConfig,
        draft_model: PreTrainedModel,
        target_model: PreTrainedModel,
        train: dict[str, Any] | None = None,
    ) -> None:
        """Write the head to a folder that `DiversedConfig(adapter=folder)` and `assistant_strategy=folder` take.

        Args:
            folder (`str` or `Path`): made where needed.
            config (`DiversedConfig`): settings to use it with.
            draft_model (`PreTrainedModel`): the pair's draft,
            target_model (`PreTrainedModel`): and its target.
            train (`dict`, *optional*): how it was trained: `temperature`, `top_p`, `top_k`, and whatever is known.

        Raises:
            ValueError: for settings with a fixed weight, which exclude a head.
        """
        weight = getattr(config, "weight", None)
        if weight is not None:
            raise ValueError(f"`config` has the fixed weight {weight}, which excludes a head.")
        record = {
            "kind": KIND,
            **_LAYOUT,
            "draft_hidden_size": self.draft_size,
            "target_hidden_size": self.target_size,
            "input_norm": self.input_norm,
            "draft_model": describe(draft_model),
            "target_model": describe(target_model),
            "train": train or self.record.get("train", {}),
        }
        write_adapter(folder, config, record, {"weight": self.weight.detach(), "bias": self.bias.detach()})


def load_head(target: PreTrainedModel, draft: PreTrainedModel, name_or_path: str) -> DiversedHead:
    """Return the head saved in a folder or Hub repository, for this pair of models.

    Raises:
        ValueError: for a head of another pair or a swapped one, of a layout that this release doesn't know, or whose
            tensors have other sizes than its record says.
    """
    head = load_adapter(target, _HEAD, name_or_path)
    where = AdapterReference(name_or_path)
    for role, model, size in (("model", target, head.target_size), ("assistant_model", draft, head.draft_size)):
        key = "target_model" if role == "model" else "draft_model"
        noted, width = head.record.get(key), model.config.get_text_config(decoder=True).hidden_size
        if width != size:
            raise ValueError(
                f"The head in {name_or_path!r} reads hidden states of size {size} from the `{role}`; this one's have "
                f"{width}."
            )
        if noted is not None:
            check_model(model, noted, where, role)
    return head


def _build(_: PreTrainedModel, adapter: Adapter) -> DiversedHead:
    record = adapter.record
    for key, value in _LAYOUT.items():
        if record.get(key) != value:
            raise ValueError(
                f"The head in {adapter.place} has {key} {record.get(key)!r}; this release reads {value!r}."
            )
    sizes = record["draft_hidden_size"], record["target_hidden_size"]
    head = DiversedHead(*sizes, input_norm=record["input_norm"], record=record)
    adapter.fill(head, dict(head.named_parameters()), f"the tensors of a head for hidden states of sizes {sizes}")
    return head.eval()


_LAYOUT = {
    "head_type": "linear",
    "input_order": ["draft", "target"],
    "weight_semantics": "target",
    "activation": "sigmoid",
    "hidden_source": "lm_head_input",
}
_HEAD = AdapterKind(KIND, _build, needs=("draft_hidden_size", "target_hidden_size", "input_norm"))


def import_reference_head(path: str | Path, draft_size: int | None = None) -> DiversedHead:
    """Return a head from the reference implementation's `ensemble_head.bin`, for `DiversedHead.save`.

    That file holds a layer with two outputs, the draft's logit and the target's; their difference is our one logit. It
    was trained with logit mixing, which is noted in the record.

    Args:
        path (`str` or `Path`): the file. Only tensors are read from it; any other pickle is refused.
        draft_size (`int`, *optional*): width of the draft's hidden state; by default that of a JSON file beside it
            (`draft_hidden_size`).

    Raises:
        ValueError: for other tensors than `summary.weight` `[2, H_d + H_t]` and `summary.bias` `[2]`, or an unknown
            split of the width.
    """
    import json

    path = Path(path)
    state = torch.load(path, weights_only=True, map_location="cpu")
    found = state.items() if isinstance(state, dict) else ()
    shapes = {name: tuple(value.shape) for name, value in found if isinstance(value, torch.Tensor)}
    width = shapes.get("summary.weight", (0, 0))[-1]
    if shapes != {"summary.weight": (2, width), "summary.bias": (2,)}:
        raise ValueError(f"{str(path)!r} must hold summary.weight [2, H] and summary.bias [2], got {shapes}.")
    if draft_size is None:
        for beside in sorted(path.parent.glob("*.json")):
            values = json.loads(beside.read_text(encoding="utf-8"))
            if isinstance(values, dict) and "draft_hidden_size" in values:
                draft_size = int(values["draft_hidden_size"])
    if draft_size is None or not 0 < draft_size < width:
        raise ValueError(f"`draft_size` must be below the head's width {width}, got {draft_size}.")
    record = {"train": {"mix_space": "logit", "source": "reference ensemble_head.bin"}}
    head = DiversedHead(draft_size, width - draft_size, record=record)
    with torch.no_grad():
        head.weight.copy_((state["summary.weight"][1].float() - state["summary.weight"][0].float())[None])
        head.bias.copy_((state["summary.bias"][1].float() - state["summary.bias"][0].float())[None])
    return head
