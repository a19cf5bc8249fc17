"""Speculative decoding inside `model.generate(..., assistant_strategy=...)`.

Importing the package adds the keyword to every Transformers model; `HF_SPECDEC_NO_INSTALL=1` leaves that to
`install()`.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from .configuration import SpeculationConfig
    from .generation.adapters import unload
    from .generation.assisted import AssistedConfig
    from .generation.diversed import DiversedConfig
    from .generation.draft_model import load_draft
    from .generation.ensemble_head import DiversedHead
    from .generation.loop import DecodingLoop
    from .generation.plain import PlainConfig
    from .generation.prompt_lookup import PromptLookupConfig
    from .generation.ranks import PipelineRankError
    from .generation.registry import register_strategy
    from .generation.slim_drafter import ViaSDQualityError
    from .generation.spd import SPDConfig
    from .generation.specbound import SpecBoundConfig
    from .generation.stage_loading import load_stage
    from .generation.stats import SpeculationOutput, SpeculationStats, on_speculation
    from .generation.vegas import VegasConfig
    from .generation.via_sd import ViaSDConfig
    from .hub import save_strategy
    from .integration import decoding_loop, install, uninstall

_EXPORTS = {
    "AssistedConfig": "generation.assisted",
    "DecodingLoop": "generation.loop",
    "DiversedConfig": "generation.diversed",
    "DiversedHead": "generation.ensemble_head",
    "PipelineRankError": "generation.ranks",
    "PlainConfig": "generation.plain",
    "PromptLookupConfig": "generation.prompt_lookup",
    "SPDConfig": "generation.spd",
    "SpecBoundConfig": "generation.specbound",
    "SpeculationConfig": "configuration",
    "SpeculationOutput": "generation.stats",
    "SpeculationStats": "generation.stats",
    "VegasConfig": "generation.vegas",
    "ViaSDConfig": "generation.via_sd",
    "ViaSDQualityError": "generation.slim_drafter",
    "decoding_loop": "integration",
    "install": "integration",
    "load_draft": "generation.draft_model",
    "load_stage": "generation.stage_loading",
    "on_speculation": "generation.stats",
    "register_strategy": "generation.registry",
    "save_strategy": "hub",
    "uninstall": "integration",
    "unload": "generation.adapters",
}

__all__ = [
    "AssistedConfig",
    "DecodingLoop",
    "DiversedConfig",
    "DiversedHead",
    "PipelineRankError",
    "PlainConfig",
    "PromptLookupConfig",
    "SPDConfig",
    "SpecBoundConfig",
    "SpeculationConfig",
    "SpeculationOutput",
    "SpeculationStats",
    "VegasConfig",
    "ViaSDConfig",
    "ViaSDQualityError",
    "decoding_loop",
    "install",
    "load_draft",
    "load_stage",
    "on_speculation",
    "register_strategy",
    "save_strategy",
    "uninstall",
    "unload",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])


if os.environ.get("HF_SPECDEC_NO_INSTALL", "0") != "1":
    from .integration import install

    install()
