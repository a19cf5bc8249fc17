"""Our attention and mask functions, registered under one name, and the switch that makes a model use them for a while.

The attention function serves forwards that carry a `specdec_step` keyword. Any other forward of the model (by a
caller's processor or criterion, say) runs the implementation that the config named before.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from transformers import AttentionInterface, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import _compat
from . import choice, opaque
from .step import Step


ATTENTION = "hf_specdec"
_ALLOWED_TENSORS = {"position_ids", "s_aux", "cache_position"}


class MaskSpec:
    """What Transformers asked a mask for: enough to read the window, or to build the original mask."""

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
        specdec_step (`Step` or `torch.Tensor`, *optional*): the forward's step, or the number of an `opaque.Entry`;
            without it the model's own implementation runs.

    Returns:
        The output `[n, m, h_q, d_v]`, and `None` for the weights.

    Raises:
        ValueError: if the model's attention depends on something that this function does not know.
    """
    if specdec_step is None:
        kwargs |= {name: own for name, own in (("softcap", softcap), ("s_aux", s_aux)) if own is not None}
        return _original(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer_idx = cast(int, getattr(module, "layer_idx", None))
    if isinstance(specdec_step, torch.Tensor):  # a forward that is compiled: the step is only named
        return opaque.attend(query, key, value, specdec_step, layer_idx, scaling, softcap, s_aux).transpose(1, 2), None
    specdec_step.windows[layer_idx] = _admit(module, layer_idx, attention_mask, kwargs)
    output = choice.attend_layer(query, key, value, specdec_step, layer_idx, scaling, softcap, s_aux)
    return output.transpose(1, 2), None


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


def _original(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
) -> Any:
    original = _switched.get(id(module.config), ("sdpa", None))[0]
    if original == "eager":
        function = __import__(type(module).__module__, fromlist=["x"]).eager_attention_forward
    else:
        function = ALL_ATTENTION_FUNCTIONS[original]
    if isinstance(mask, MaskSpec):
        build = ALL_MASK_ATTENTION_FUNCTIONS.get(original)
        mask = None if build is None else build(**mask.arguments)
    return function(module, query, key, value, mask, **kwargs)


class _Switch:
    """What one model's switch changed, and how many contexts rely on it; the last one to end changes it back."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.users = 0
        self.owners: list[tuple[Any, PreTrainedConfig]] = []
        self.copies: dict[int, PreTrainedConfig] = {}
        module: Any
        for module in model.modules():
            config = module.__dict__.get("config")
            if isinstance(config, PreTrainedConfig):
                self.owners.append((module, config))
                module.config = self.copy(config)

    def leave(self) -> None:
        """End one context's use."""
        self.users -= 1
        if not self.users:
            for module, config in self.owners:
                module.config = config
            for copied in self.copies.values():
                del _switched[id(copied)]

    def copy(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Return the one copy of `config` that names our attention, its sub-configs included."""
        if id(config) not in self.copies:
            copied = self.copies[id(config)] = copy.copy(config)
            name = _compat.attention_name(config) or "eager"
            _switched[id(copied)] = "sdpa" if name == ATTENTION else name, self
            _compat.set_attention_name(copied, ATTENTION)
            for key in config.sub_configs:
                inner = getattr(config, key, None)
                if isinstance(inner, PreTrainedConfig):
                    setattr(copied, key, self.copy(inner))
        return self.copies[id(config)]


_lock = threading.Lock()

# By the id of a config copy, which lives as long as its entry: the implementation that ours stands in for, and the
# switch. The name in the copy is a plain string: torch.compile of some releases refuses a subclass.
_switched: dict[int, tuple[str, _Switch]] = {}


@contextmanager
def speculative_attention(model: torch.nn.Module) -> Iterator[None]:
    """Make `model` use our attention inside the context; afterwards, and after an exception, its own again.

    The model's modules (or those beside a model that have its config) are given copies of their configs that name our
    attention. The configs themselves stay, because other models, in other threads, may share them. Contexts of one
    model may overlap.
    """
    with _lock:
        known = _switched.get(id(model.config))
        switch = _Switch(model) if known is None else known[1]
        switch.users += 1
    try:
        yield
    finally:
        with _lock:
            switch.leave()


def register() -> None:
    """Register the attention and mask functions with Transformers (additive: nothing that exists is replaced)."""
    AttentionInterface.register(ATTENTION, attention_function)
    AttentionMaskInterface.register(ATTENTION, mask_function)
