"""Finding and moving the decoder layers of a model."""

from __future__ import annotations

from collections import OrderedDict

import torch
from transformers import PreTrainedModel


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """Return the model's list of decoder layers, as long as its config says; raise `ValueError` if there is none."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    found = [m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    if not found:
        raise ValueError(f"{type(model).__name__} has no list of {count} decoder layers.")
    return found[0]


def unhook(module: torch.nn.Module) -> None:
    """Take from a copied module what was hung on the original: hooks, and a wrapped forward, which is bound to it."""
    module.__dict__.pop("forward", None)
    module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()


def place_layer(layer: torch.nn.Module, place: int) -> None:
    """Make a copied decoder layer one of its own: its keys and values are those of the cache's layer `place`."""
    for module in layer.modules():
        unhook(module)
        if hasattr(module, "layer_idx"):
            module.layer_idx = place  # type: ignore[assignment]
