"""The wrapper of `generate()`: the only place that changes Transformers' classes, and its removal.

Without the keyword and without a strategy on a generation config, the wrapper calls the original with the arguments it
got.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig, GenerationMixin
from transformers.utils import logging

from . import _compat
from .artefacts import HUB_KEYWORDS


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

logger = logging.get_logger(__name__)

_OFF = "off"
_FIELDS = ("assistant_strategy", "assistant_strategy_config")
_POSITIONAL = (
    "inputs",
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "synced_gpus",
    "assistant_model",
    "streamer",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "custom_generate",
)
_MARK = "_hf_specdec_original"
_UNSUPPORTED_FIELDS = {"num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": None}


def decoding_loop(
    strategy: Any,
    *,
    assistant_model: PreTrainedModel | None = None,
    streamer: Any = None,
    tokenizer: Any = None,
    assistant_tokenizer: Any = None,
    settings: dict[str, Any] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Any:
    """Return a callable for `model.generate(custom_generate=...)`: the official hook, no wrapper involved.

    On that path Transformers drops what is not named here, and only the config's `num_assistant_tokens` counts.

    Args:
        strategy (`str` or `SpeculationConfig`): what `assistant_strategy` would be.
        assistant_model (`PreTrainedModel`, *optional*): for strategies that draft with a second model.
        streamer (`BaseStreamer`, *optional*): gets tokens once they are final. Give it to `generate()` as well if it
            is to see the prompt.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): with `assistant_tokenizer`, checked to have the same
            vocabulary.
        assistant_tokenizer (`PreTrainedTokenizerBase`, *optional*): see `tokenizer`.
        settings (`dict`, *optional*): fields of the config that differ from what `strategy` gives.
        revision (`str`, *optional*): of a strategy that is a Hub repository, like the three below.
        token (`str` or `bool`, *optional*): for a private repository; by default that of `hf auth login`.
        cache_dir (`str` or `Path`, *optional*): of the Hub's files.
        local_files_only (`bool`, *optional*, defaults to `False`): read the cache only.

    Raises:
        ValueError: for an unknown strategy, an assistant that it needs and did not get, or got and does not use, or
            a Hub keyword with a strategy that is no Hub repository.
        OSError: if a Hub repository can't be read.
    """
    from .generation.admission import check_tokenizers
    from .generation.loop import DecodingLoop
    from .resolve import resolve_strategy

    _prepare_attention()
    check_tokenizers(tokenizer, assistant_tokenizer)
    hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    config = resolve_strategy(strategy, settings, **hub)
    return DecodingLoop(config, assistant_model=assistant_model, streamer=streamer)


@functools.cache
def _prepare_attention() -> None:
    from .kernels.dispatch import register

    register()


def install() -> None:
    """Add `assistant_strategy=` to `generate()` of every model. Calling it again changes nothing."""
    original = GenerationMixin.generate
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        generation_config = args[1] if len(args) > 1 else kwargs.get("generation_config")
        if not _requested(self, generation_config, kwargs):
            kwargs = {name: value for name, value in kwargs.items() if name not in _FIELDS or value is not None}
            return original(self, *args, **kwargs)
        return _generate(original, self, args, kwargs)

    setattr(generate, _MARK, original)
    mixin: Any = GenerationMixin
    mixin.generate = generate
    for name in _FIELDS:
        setattr(GenerationConfig, name, None)


def uninstall() -> None:
    """Take the wrapper away again; `generate()` is the original function afterwards."""
    original = getattr(GenerationMixin.generate, _MARK, None)
    if original is None:
        return
    mixin: Any = GenerationMixin
    mixin.generate = original
    for name in _FIELDS:
        if name in vars(GenerationConfig):
            delattr(GenerationConfig, name)


def generate_with(strategy: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Do what `model.generate(*args, assistant_strategy=strategy, **kwargs)` does, wrapper or not.

    Args:
        strategy (`str` or `SpeculationConfig`): what `assistant_strategy` would be.
        model (`PreTrainedModel`): the target.
        args: what `generate()` takes by position.
        kwargs: what `generate()` takes by keyword.
    """
    original = getattr(GenerationMixin.generate, _MARK, GenerationMixin.generate)
    return _generate(original, model, args, {**kwargs, "assistant_strategy": strategy})


def _requested(model: Any, generation_config: Any, kwargs: dict[str, Any]) -> bool:
    """Whether any source names a strategy. (Stock's own assistants call `generate` too; they are left alone.)"""
    if getattr(generation_config, "is_assistant", False):
        return False
    if kwargs.get("assistant_strategy") is not None:
        return True
    if kwargs.get("assistant_strategy_config") is not None:
        # without a strategy it may be for a `custom_generate` repository that names one (see `export`)
        return not isinstance(kwargs.get("custom_generate"), str)
    sources = (generation_config, getattr(model, "generation_config", None))
    return any(getattr(source, "assistant_strategy", None) is not None for source in sources)


def _generate(original: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Resolve the strategy and run stock `generate` with our loop in it."""
    from .generation import admission

    kwargs = {**dict(zip(_POSITIONAL, args, strict=False)), **kwargs}
    strategy, settings, explicit = _strategy_of(model, kwargs)
    kwargs.pop("assistant_strategy", None)
    kwargs.pop("assistant_strategy_config", None)
    if strategy == _OFF:
        return original(model, **kwargs)
    settings_of_call = _explicit_config(model, kwargs)
    conflicts = admission.conflicting_modes(settings_of_call)
    if kwargs.get("custom_generate") is not None:
        conflicts.append("custom_generate")
    if conflicts and not explicit:
        logger.warning_once(
            f"`assistant_strategy={strategy!r}` of the saved generation config gives way to {', '.join(conflicts)}."
        )
        return original(model, **kwargs)
    if conflicts:
        raise ValueError(
            f"`assistant_strategy={strategy!r}` can't be combined with {', '.join(conflicts)}; leave one of them out."
        )
    tokens = _explicit_value(model, kwargs, "num_assistant_tokens")
    if tokens is not None:
        settings = {**(settings or {}), "num_assistant_tokens": tokens}
    for name, neutral in _UNSUPPORTED_FIELDS.items():
        value = _explicit_value(model, kwargs, name)
        if value not in (None, neutral):
            raise ValueError(f"`{name}={value!r}` has no effect under `assistant_strategy`; allowed: {neutral!r}.")
    loop = decoding_loop(
        strategy,
        assistant_model=kwargs.pop("assistant_model", None),
        streamer=kwargs.get("streamer"),
        tokenizer=kwargs.get("tokenizer"),
        assistant_tokenizer=kwargs.pop("assistant_tokenizer", None),
        settings=settings,
        **{name: kwargs.pop(name) for name in HUB_KEYWORDS if name in kwargs},
    )
    # here as well as in the loop: stock may run an encoder or build a cache before it calls the loop
    admission.layer_windows(model)
    admission.check_config(settings_of_call)
    admission.check_call(model, {}, bool(kwargs.get("synced_gpus")))
    _bind_stop_strings(model, kwargs)
    kwargs.pop("tokenizer", None)
    return original(model, custom_generate=loop, **kwargs)


def _strategy_of(model: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any] | None, bool]:
    """Return (strategy, settings, whether this call asks): keyword over the call's config over the model's."""
    own = kwargs.get("assistant_strategy_config")
    if own is not None and not isinstance(own, dict):
        raise TypeError(f"`assistant_strategy_config` must be a dict, got {type(own).__name__}.")
    sources: list[Any] = [kwargs.get("generation_config"), getattr(model, "generation_config", None)]
    named = [
        (source.assistant_strategy, source.assistant_strategy_config, place == 0)
        for place, source in enumerate(sources)
        if getattr(source, "assistant_strategy", None) is not None
    ]
    if kwargs.get("assistant_strategy") is None:
        if not named:
            raise ValueError("`assistant_strategy_config` was given without `assistant_strategy`.")
        strategy, settings, explicit = named[0]
        return strategy, {**(settings or {}), **own} if own else settings, explicit or own is not None
    strategy = kwargs["assistant_strategy"]
    saved = next((settings for name, settings, _ in named if isinstance(strategy, str) and name == strategy), None)
    return strategy, {**(saved or {}), **own} if own else saved, True


def _explicit_value(model: Any, kwargs: dict[str, Any], name: str) -> Any:
    """Return the value of a generation field that somebody set, before stock fills in its defaults."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    for source in (kwargs.get("generation_config"), getattr(model, "generation_config", None)):
        if getattr(source, name, None) is not None and not _compat.is_filled_in(source, name):
            return getattr(source, name)
    return None


def _explicit_config(model: Any, kwargs: dict[str, Any]) -> GenerationConfig:
    """Return what the call, its config and the model's set together, without stock's defaults."""
    merged = GenerationConfig()
    for name in vars(merged):
        value = _explicit_value(model, kwargs, name) if not name.startswith("_") else None
        if value is not None:
            setattr(merged, name, value)
    return merged


def _bind_stop_strings(model: Any, kwargs: dict[str, Any]) -> None:
    """Turn `stop_strings` into a criterion here: stock loses the tokenizer when the loop is a callable."""
    strings = _explicit_value(model, kwargs, "stop_strings")
    if strings is None:
        return
    from transformers import StoppingCriteriaList, StopStringCriteria

    if kwargs.get("tokenizer") is None:
        raise ValueError("`stop_strings` needs `tokenizer=` in the call, as without `assistant_strategy`.")
    criteria = StoppingCriteriaList(kwargs.get("stopping_criteria") or [])
    criteria.append(StopStringCriteria(tokenizer=kwargs["tokenizer"], stop_strings=strings))
    kwargs["stopping_criteria"] = criteria
    if getattr(kwargs.get("generation_config"), "stop_strings", None) is not None:
        kwargs["generation_config"] = copy.deepcopy(kwargs["generation_config"])
        kwargs["generation_config"].stop_strings = None
    if kwargs.get("stop_strings") is not None or getattr(model.generation_config, "stop_strings", None) is not None:
        kwargs["stop_strings"] = None
