"""Speculative decoding inside `model.generate(..., assistant_strategy=...)`.

Importing the package adds the keyword to every Transformers model; `HF_SPECDEC_NO_INSTALL=1` leaves that to
`install()`.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from . import registry
from ._version import __version__ as __version__


if TYPE_CHECKING:  # for type checkers; at run time `__getattr__` imports what is asked for
    from .configuration import SpeculationConfig as SpeculationConfig
    from .generation.loop import DecodingLoop as DecodingLoop
    from .generation.methods.assisted import AssistedConfig as AssistedConfig
    from .generation.methods.diversed.head import DiversedHead as DiversedHead
    from .generation.methods.diversed.method import DiversedConfig as DiversedConfig
    from .generation.methods.plain import PlainConfig as PlainConfig
    from .generation.methods.prompt_lookup import PromptLookupConfig as PromptLookupConfig
    from .generation.methods.spd.method import SPDConfig as SPDConfig
    from .generation.methods.spd.ranks import PipelineRankError as PipelineRankError
    from .generation.methods.spd.stage_loading import load_stage as load_stage
    from .generation.methods.specbound.method import SpecBoundConfig as SpecBoundConfig
    from .generation.methods.vegas import VegasConfig as VegasConfig
    from .generation.methods.via_sd.config import ViaSDConfig as ViaSDConfig
    from .generation.methods.via_sd.slim_drafter import ViaSDQualityError as ViaSDQualityError
    from .generation.models.adapters import unload as unload
    from .generation.models.draft_model import load_draft as load_draft
    from .generation.stats import SpeculationOutput as SpeculationOutput
    from .generation.stats import SpeculationStats as SpeculationStats
    from .generation.stats import on_speculation as on_speculation
    from .integration import decoding_loop as decoding_loop
    from .integration import install as install
    from .integration import uninstall as uninstall
    from .registry import register_strategy as register_strategy
    from .resolve import save_strategy as save_strategy

_EXPORTS = {
    "DecodingLoop": "generation.loop",
    "DiversedHead": "generation.methods.diversed.head",
    "PipelineRankError": "generation.methods.spd.ranks",
    "SpeculationConfig": "configuration",
    "SpeculationOutput": "generation.stats",
    "SpeculationStats": "generation.stats",
    "ViaSDQualityError": "generation.methods.via_sd.slim_drafter",
    "decoding_loop": "integration",
    "install": "integration",
    "load_draft": "generation.models.draft_model",
    "load_stage": "generation.methods.spd.stage_loading",
    "on_speculation": "generation.stats",
    "register_strategy": "registry",
    "save_strategy": "resolve",
    "uninstall": "integration",
    "unload": "generation.models.adapters",
}
"""Name to module. The configs of the strategies come from the registry."""

__all__ = sorted([*_EXPORTS, *registry.exported_configs()])  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    configs = registry.exported_configs()
    if name in configs:
        value = registry.config_class(configs[name])
    elif name in _EXPORTS:
        value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if os.environ.get("HF_SPECDEC_NO_INSTALL", "0") != "1":
    from .integration import install

    install()
