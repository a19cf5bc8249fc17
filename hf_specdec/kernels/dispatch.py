"""Our attention and mask functions, registered under one name, which the configs of twins name (see `twin`).

The attention function serves forwards that carry a `specdec_step` keyword.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from . import choice, opaque
from .step import Step


ATTENTION = "hf_specdec"
_ALLOWED_TENSORS = {"position_ids", "s_aux", "cache_position"}


class MaskSpec:
    """What Transformers asked a mask for: enough to read the window."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self.window: int | None = arguments.get("local_size")


def mask_function(**arguments: Any) -> MaskSpec | None:
    """Registered with `AttentionMaskInterface`: keep the request instead of building an O(S) mask at every step.

    While a forward is being compiled nothing is kept: windows were learnt before, see `opaque`.
    """
    return None if torch.compiler.is_compiling() else MaskSpec(arguments)


def attention_function(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    specdec_step: Step | torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Registered with `AttentionInterface`; signature and layouts are its convention.

    Args:
        query (`torch.Tensor` of shape `[n, h_q, m, d]`): queries, positions encoded.
        key, value (`torch.Tensor` of shape `[n, h_kv, S, d]`): what `SpeculativeCache.update` returned.
        attention_mask (`MaskSpec` or mask): from `mask_function`.
        specdec_step (`Step` or `torch.Tensor`): the forward's step, or the number of an `opaque.Entry`.

    Returns:
        The output `[n, m, h_q, d_v]`, contiguous as stock's (some families view it), and `None` for the weights.

    Raises:
        RuntimeError: without a step.
        ValueError: if the model's attention depends on something that this function does not know.
    """
    if specdec_step is None:
        raise RuntimeError(
            f"{type(module).__name__} was not given the forward's keyword `specdec_step`, so `assistant_strategy` "
            "can't run this model."
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer_idx = cast(int, getattr(module, "layer_idx", None))
    if isinstance(specdec_step, torch.Tensor):  # a forward that is compiled: the step is only named
        output = opaque.attend(query, key, value, specdec_step, layer_idx, scaling, softcap, s_aux)
    else:
        specdec_step.windows[layer_idx] = _admit(module, layer_idx, attention_mask, kwargs)
        output = choice.attend_layer(query, key, value, specdec_step, layer_idx, scaling, softcap, s_aux)
    return output.transpose(1, 2).contiguous(), None


def _admit(module: torch.nn.Module, layer_idx: int | None, mask: Any, kwargs: dict[str, Any]) -> int | None:
    """Return the layer's window, or raise for a mask or keyword whose meaning is not known here."""
    if layer_idx is None:
        raise ValueError(f"{type(module).__name__} has no `layer_idx`, so its place in the cache is unknown.")
    if mask is not None and not isinstance(mask, MaskSpec):
        raise ValueError(
            f"{type(module).__name__} builds its own attention mask, which `assistant_strategy` can't follow."
        )
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor) and name not in _ALLOWED_TENSORS:
            raise ValueError(
                f"{type(module).__name__} passes the tensor `{name}` to its attention; `assistant_strategy` supports "
                "models whose attention takes positions and sinks only."
            )
    if mask is not None and mask.arguments.get("use_vmap"):
        raise ValueError(
            f"{type(module).__name__} changes the causal mask; `assistant_strategy` supports causal and sliding."
        )
    return None if mask is None else mask.window


def register() -> None:
    """Register the attention and mask functions with Transformers (additive: nothing that exists is replaced)."""
    AttentionInterface.register(ATTENTION, attention_function)
    AttentionMaskInterface.register(ATTENTION, mask_function)
