"""A strategy from a name, a folder or a Hub repository; and strategies saved with a model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from . import artefacts, hub
from .configuration import CONFIG_NAME, SpeculationConfig, load_config
from .registry import STRATEGIES, config_class, preset


def resolve_strategy(
    strategy: str | SpeculationConfig,
    settings: dict[str, Any] | None = None,
    *,
    num_assistant_tokens: int | None = None,
    **hub: Any,
) -> SpeculationConfig:
    """Return the config that `assistant_strategy` means.

    A Hub repository is asked once per process; `hf_specdec.unload(model)` makes the next call ask again.

    Args:
        strategy (`str` or `SpeculationConfig`): a registered name (`"vegas"`, or a preset such as `"vegas:window"`),
            else a folder with a saved config, else a Hub repository.
        settings (`dict`, *optional*): fields of the config that differ from what the name gives.
        num_assistant_tokens (`int`, *optional*): what `generate()` was given, over all settings.
        hub: `revision`, `token`, `cache_dir` and `local_files_only`, for a Hub repository.

    Raises:
        TypeError: for anything that is neither a string nor a config.
        ValueError: for a string that is none of the three, for `hub` beside anything but a Hub repository, and for
            `num_assistant_tokens` with a strategy that has no such setting.
        OSError: if the folder or the repository can't be read.
    """
    given = {name: value for name, value in hub.items() if value is not None and value is not False}
    config = _named(strategy, given)
    changes = {
        name: value for name, value in (settings or {}).items() if name not in ("strategy", "hf_specdec_version")
    }
    if num_assistant_tokens is not None:
        if not config.has_field("num_assistant_tokens"):
            raise ValueError(
                f"`num_assistant_tokens={num_assistant_tokens!r}` has no effect with the strategy "
                f"{config.strategy!r}, which has no such setting; leave it out."
            )
        changes["num_assistant_tokens"] = num_assistant_tokens
    if not changes:
        return config
    if isinstance(strategy, SpeculationConfig):
        return config.override(**changes)
    return config_class(config.strategy).from_dict({**config.to_dict(), **changes})


def _named(strategy: str | SpeculationConfig, hub: dict[str, Any]) -> SpeculationConfig:
    """Return the config that a strategy's name, folder or repository means; `hub` holds keywords that were given."""
    if isinstance(strategy, SpeculationConfig):
        _refuse(hub, "a config")
        return strategy
    if not isinstance(strategy, str):
        raise TypeError(
            f"`assistant_strategy` must be a name, a folder, a Hub repository or a config, got "
            f"{type(strategy).__name__}."
        )
    if strategy.partition(":")[0] in STRATEGIES:
        _refuse(hub, f"the registered strategy {strategy!r}")
        return preset(strategy)
    if strategy and Path(strategy).is_dir():
        _refuse(hub, f"the folder {strategy!r}")
        return load_config(artefacts.locate(strategy))
    return _from_hub(strategy, hub)


def _refuse(hub: dict[str, Any], what: str) -> None:
    if hub:
        names = ", ".join(f"`{name}`" for name in hub)
        raise ValueError(f"{names}: only for an `assistant_strategy` that is a Hub repository; this one is {what}.")


def _from_hub(repo_id: str, hub: dict[str, Any]) -> SpeculationConfig:
    known = ", ".join(sorted(STRATEGIES))
    message = f"`assistant_strategy={repo_id!r}` is no registered strategy ({known}), no folder"
    if repo_id.count("/") != 1:
        raise ValueError(f"{message}, and no Hub repository with a {CONFIG_NAME}.")
    try:
        folder = artefacts.locate(repo_id, remember=True, **hub)
    except OSError as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        raise kind(f"{message}, and can't be had from the Hub. {error}") from error
    return load_config(folder)


def save_strategy(model: PreTrainedModel, folder: str | Path) -> None:
    """Write `model.generation_config`, its `assistant_strategy` included, for `from_pretrained(folder)` to read.

    Then `generate()` of the loaded model speculates without an argument. A strategy that is a config is written as
    its name and its settings. Names stay names, of the Hub too. A local folder, and an adapter in one, are written as
    absolute paths: the model's folder may be moved on this machine, but before it is pushed or copied elsewhere, the
    strategy has to be pushed and named by its repository.

    Args:
        model (`PreTrainedModel`): its `generation_config.assistant_strategy` is set.
        folder (`str` or `Path`): usually the folder of `model.save_pretrained`.

    Raises:
        ValueError: if no strategy is set, or it can't be resolved.
        OSError: if its folder or repository can't be read.
    """
    config: Any = copy.deepcopy(model.generation_config)
    strategy, settings = config.assistant_strategy, config.assistant_strategy_config
    if strategy is None:
        raise ValueError("`model.generation_config.assistant_strategy` is None; set it to a strategy's name first.")
    resolved = resolve_strategy(strategy, settings)
    if isinstance(strategy, SpeculationConfig):
        strategy, settings = resolved.strategy, resolved.to_dict()
    elif strategy.partition(":")[0] not in STRATEGIES:
        strategy = _absolute(strategy)
    config.assistant_strategy = strategy
    config.assistant_strategy_config = None if settings is None else _absolute_adapters(settings)
    # a config that was derived from the model's own loses unknown entries when it is read back
    config._from_model_config = False
    config.save_pretrained(folder)


def _absolute(name_or_path: str) -> str:
    return str(Path(name_or_path).resolve()) if Path(name_or_path).is_dir() else name_or_path


def _absolute_adapters(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings, those nested in them included, that find local adapters from anywhere."""
    plain = {name: v.to_dict() if isinstance(v, SpeculationConfig) else v for name, v in settings.items()}
    return artefacts.with_adapters(plain, Path(), lambda adapter: _absolute(adapter.name))


def push_folder(folder: str | Path, repo_id: str, **options: Any) -> str:
    """Upload a folder of saved settings to a Hub repository, and return the commit's address.

    Args:
        folder (`str` or `Path`): as `save_pretrained` or a training writes it.
        repo_id (`str`): the repository, made where needed.
        options: those of `hub.push_folder`, whose errors are raised, too.

    Raises:
        FileNotFoundError: if there is no such folder, or no settings in it.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"{str(path)!r} is no folder; push one that `save_pretrained` or a training wrote.")
    return hub.push_folder(path, load_config(artefacts.locate(path)), repo_id, **options)
