"""The table of strategies: one line per method, imported when its name is first used.

The table names classes by dotted strings, and nothing here imports a method, a config or the loop. So every module can
look a strategy up, whatever layer it belongs to.
"""

from __future__ import annotations

import importlib
from typing import Any, TypeVar


STRATEGIES: dict[str, str | type[Any]] = {
    "plain": "generation.methods.plain:PlainStrategy",
    "assisted": "generation.methods.assisted:AssistedStrategy",
    "prompt_lookup": "generation.methods.prompt_lookup:PromptLookupStrategy",
    "vegas": "generation.methods.vegas:VegasStrategy",
    "diversed": "generation.methods.diversed.method:DiversedStrategy",
    "specbound": "generation.methods.specbound.method:SpecBoundStrategy",
    "via_sd": "generation.methods.via_sd.method:ViaSDStrategy",
    "spd": "generation.methods.spd.method:SPDStrategy",
}
"""Strategy name to `module:class` inside `hf_specdec`, or to a class that `register_strategy` was given."""

StrategyClass = TypeVar("StrategyClass", bound=type)


def register_strategy(cls: StrategyClass) -> StrategyClass:
    """Make a strategy of your own known by its config's name, for this process; usable as a decorator.

    Args:
        cls (`type[SpeculationStrategy]`): its `config_class.strategy` is the name.

    Raises:
        ValueError: if the config class has no name, or another class has it.
    """
    settings: Any = cls.config_class  # type: ignore[attr-defined]
    name = settings.strategy
    if not name or not name.isidentifier():
        raise ValueError(f"`{settings.__name__}.strategy` must be a name like 'vegas', got {name!r}.")
    known = STRATEGIES.setdefault(name, cls)
    # a notebook's cell that runs again defines its class again
    if isinstance(known, str) or (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"The strategy {name!r} is registered already, as {known}.")
    STRATEGIES[name] = cls
    return cls


def strategy_class(name: str) -> Any:
    """Return the `SpeculationStrategy` class called `name`; raise `ValueError` for an unknown name."""
    if name not in STRATEGIES:
        raise ValueError(f"Unknown strategy {name!r}; the known ones are {', '.join(sorted(STRATEGIES))}.")
    entry = STRATEGIES[name]
    if not isinstance(entry, str):
        return entry
    module, _, attribute = entry.partition(":")
    cls: Any = getattr(importlib.import_module(f".{module}", __package__), attribute)
    if cls.config_class.strategy != name:
        raise RuntimeError(f"{cls.__name__}'s config says {cls.config_class.strategy!r}, the registry says {name!r}.")
    return cls


def config_class(name: str) -> Any:
    """Return the `SpeculationConfig` class of the strategy `name`."""
    return strategy_class(name).config_class


def exported_configs() -> dict[str, str]:
    """Return the strategy of each config class that the package exports: `VegasStrategy` has a `VegasConfig`."""
    entries = {name: entry for name, entry in STRATEGIES.items() if isinstance(entry, str)}
    return {f"{entry.partition(':')[2].removesuffix('Strategy')}Config": name for name, entry in entries.items()}


def preset(name: str) -> Any:
    """Return the config of `name`: a strategy (`"vegas"`), one of its presets (`"vegas:window"`) or an alias."""
    strategy, _, variant = name.partition(":")
    cls = strategy_class(strategy)
    variant = cls.aliases.get(variant, variant)
    if variant not in cls.presets:
        known = ", ".join(sorted(key for key in (*cls.presets, *cls.aliases) if key)) or "none"
        raise ValueError(f"The strategy {strategy!r} has no preset {variant!r}; its presets: {known}.")
    return cls.config_class(**cls.presets[variant])


def presets() -> list[str]:
    """Return every strategy and preset by name, in the registry's order; tests, docs and cards iterate over these."""
    return [f"{name}:{key}" if key else name for name in STRATEGIES for key in strategy_class(name).presets]
