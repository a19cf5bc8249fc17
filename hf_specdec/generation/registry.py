"""The table of strategies: one line per method, imported when its name is first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ..configuration import SpeculationConfig


if TYPE_CHECKING:
    from .strategy import SpeculationStrategy

STRATEGIES: dict[str, str | type[SpeculationStrategy]] = {
    "plain": "plain:PlainStrategy",
    "assisted": "assisted:AssistedStrategy",
    "prompt_lookup": "prompt_lookup:PromptLookupStrategy",
    "vegas": "vegas:VegasStrategy",
    "diversed": "diversed:DiversedStrategy",
    "specbound": "specbound:SpecBoundStrategy",
    "via_sd": "via_sd:ViaSDStrategy",
    "spd": "spd:SPDStrategy",
}
"""Strategy name to `module:class` inside `hf_specdec.generation`, or to a class that `register_strategy` was given."""


def register_strategy(cls: type[SpeculationStrategy]) -> type[SpeculationStrategy]:
    """Make a strategy of your own known by its config's name, for this process; usable as a decorator.

    Args:
        cls (`type[SpeculationStrategy]`): its `config_class.strategy` is the name.

    Raises:
        ValueError: if the config class has no name, or another class has it.
    """
    name = cls.config_class.strategy
    if not name or not name.isidentifier():
        raise ValueError(f"`{cls.config_class.__name__}.strategy` must be a name like 'vegas', got {name!r}.")
    known = STRATEGIES.setdefault(name, cls)
    # a notebook's cell that runs again defines its class again
    if isinstance(known, str) or (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"The strategy {name!r} is registered already, as {known}.")
    STRATEGIES[name] = cls
    return cls


def strategy_class(name: str) -> type[SpeculationStrategy]:
    """Return the strategy class called `name`; raise `ValueError` that lists the known names for any other."""
    if name not in STRATEGIES:
        raise ValueError(f"Unknown strategy {name!r}; the known ones are {', '.join(sorted(STRATEGIES))}.")
    entry = STRATEGIES[name]
    if not isinstance(entry, str):
        return entry
    module, _, attribute = entry.partition(":")
    cls: type[SpeculationStrategy] = getattr(importlib.import_module(f".{module}", __package__), attribute)
    if cls.config_class.strategy != name:
        raise RuntimeError(f"{cls.__name__}'s config says {cls.config_class.strategy!r}, the registry says {name!r}.")
    return cls


def config_class(name: str) -> type[SpeculationConfig]:
    """Return the config class of the strategy `name`."""
    return strategy_class(name).config_class


def preset(name: str) -> SpeculationConfig:
    """Return the config of `name`, a strategy (`"vegas"`) or one of its presets (`"vegas:window"`)."""
    strategy, _, variant = name.partition(":")
    cls = strategy_class(strategy)
    if variant not in cls.presets:
        known = ", ".join(sorted(key for key in cls.presets if key)) or "none"
        raise ValueError(f"The strategy {strategy!r} has no preset {variant!r}; its presets: {known}.")
    return cls.config_class(**cls.presets[variant])


def presets() -> list[str]:
    """Return every strategy and preset by name, in the registry's order; tests, docs and cards iterate over these."""
    return [f"{name}:{key}" if key else name for name in STRATEGIES for key in strategy_class(name).presets]
