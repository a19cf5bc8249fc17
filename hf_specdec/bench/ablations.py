"""Arms that leave out one part of a method each."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..generation.methods.specbound.exit_heads import load_exit_heads
from ..generation.methods.specbound.method import SpecBoundConfig
from ..generation.models.surgery import decoder_layers
from ..resolve import resolve_strategy
from .run import Arm, make_arm


_NO_WIDTH = 16


def specbound_arms(model: PreTrainedModel, strategy: str) -> list[Arm]:
    """Return SpecBound as configured, without each of its parts, and stock's early exit at the same exits.

    Args:
        model (`PreTrainedModel`): the target.
        strategy (`str`): anything that `assistant_strategy` takes and that is SpecBound.

    Raises:
        ValueError: for another strategy.
    """
    config = resolve_strategy(strategy, None)
    if not isinstance(config, SpecBoundConfig):
        raise ValueError(f"`--ablate` takes settings of 'specbound', got {strategy!r}, which is {config.strategy!r}.")
    depth = len(decoder_layers(model))
    trained = None if config.adapter is None else load_exit_heads(model, config.adapter).layers
    exits = config.exits(depth, trained)
    everywhere = trained or list(range(1, depth))
    deeper = config.override(max_depth=depth, exit_layers=everywhere)
    variants = {"complete": config}
    if config.temperature(1, depth, trained is not None) > 1:
        variants["without annealing"] = config.override(alpha=0.0)
    variants["without depth bound"] = deeper
    variants["without width bound"] = config.override(num_assistant_tokens=_NO_WIDTH)
    for layer in exits if len(exits) > 1 else []:
        variants[f"exit {layer} only"] = config.override(exit_layers=[layer], max_depth=layer)
    arms = [Arm(name, {"assistant_strategy": value}, fresh=True) for name, value in variants.items()]
    return arms + [make_arm(f"stock_early_exit@layer={layer}", None) for layer in exits]
