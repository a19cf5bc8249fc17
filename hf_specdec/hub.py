"""Strategies by name, folder or Hub repository, and strategies saved with a model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedModel

from .configuration import CONFIG_NAME, SpeculationConfig
from .generation.registry import STRATEGIES, config_class, preset


def resolve_strategy(strategy: Any, settings: dict[str, Any] | None = None) -> SpeculationConfig:
    """Return the config that `assistant_strategy` means.

    Args:
        strategy (`str` or `SpeculationConfig`): a registered name (`"vegas"`, or a preset such as `"vegas:window"`),
            else a folder with a saved config, else a Hub repository.
        settings (`dict`, *optional*): fields of the config that differ from what the name gives.

    Raises:
        TypeError: for anything that is neither a string nor a config.
        ValueError: for a string that is none of the three; the message lists the registered names.
    """
    settings = dict(settings or {})
    settings.pop("strategy", None)
    settings.pop("hf_specdec_version", None)
    if isinstance(strategy, SpeculationConfig):
        return strategy.override(**settings) if settings else strategy
    if not isinstance(strategy, str):
        raise TypeError(
            f"`assistant_strategy` must be a name, a folder, a Hub repository or a config, got "
            f"{type(strategy).__name__}."
        )
    name = strategy.partition(":")[0]
    if name in STRATEGIES:
        config = preset(strategy)
    elif strategy and Path(strategy).is_dir():
        config = SpeculationConfig.from_pretrained(strategy)
    else:
        config = _from_hub(strategy)
    if not settings:
        return config
    return config_class(config.strategy).from_dict({**config.to_dict(), **settings})


def _from_hub(repo_id: str) -> SpeculationConfig:
    known = ", ".join(sorted(STRATEGIES))
    message = (
        f"`assistant_strategy={repo_id!r}` is no registered strategy ({known}), no folder, and no Hub repository "
    )
    if "/" not in repo_id:
        raise ValueError(f"{message}with a {CONFIG_NAME}.")
    try:
        return SpeculationConfig.from_pretrained(repo_id)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(f"{message}with a {CONFIG_NAME}: {error}") from error


def save_strategy(model: PreTrainedModel, folder: str | Path) -> None:
    """Write `model.generation_config`, its `assistant_strategy` included, for `from_pretrained(folder)` to read.

    Args:
        model (`PreTrainedModel`): its `generation_config.assistant_strategy` is set.
        folder (`str` or `Path`): usually the folder of `model.save_pretrained`.

    Raises:
        ValueError: if no strategy is set, or it can't be resolved.
    """
    config: Any = model.generation_config
    if config.assistant_strategy is None:
        raise ValueError("`model.generation_config.assistant_strategy` is None; set it to a strategy's name first.")
    resolve_strategy(config.assistant_strategy, config.assistant_strategy_config)
    config = copy.deepcopy(config)
    # a config that was derived from the model's own loses unknown entries when it is read back
    config._from_model_config = False
    config.save_pretrained(folder)
