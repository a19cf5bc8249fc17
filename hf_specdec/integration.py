"""The wrapper of `generate()`: the only place that changes Transformers' classes, and its removal.

Without the keyword and without a strategy on a generation config, the wrapper calls the original with the arguments it
got.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig, GenerationMixin
from transformers.utils import logging

from . import _compat
from .artefacts import HUB_KEYWORDS


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from .configuration import SpeculationConfig
    from .generation.loop import DecodingLoop

logger = logging.get_logger(__name__)

_OFF = "off"
_FIELDS = ("assistant_strategy", "assistant_strategy_config")
_MARK = "_hf_specdec_original"
_TAKEN = ("assistant_model", "assistant_tokenizer", "tokenizer")
_UNSUPPORTED_FIELDS = {"num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": None}


def decoding_loop(
    strategy: str | SpeculationConfig,
    *,
    assistant_model: PreTrainedModel | None = None,
    streamer: Any = None,
    tokenizer: Any = None,
    assistant_tokenizer: Any = None,
    settings: dict[str, Any] | None = None,
    num_assistant_tokens: int | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> DecodingLoop:
    """Return a callable for `model.generate(custom_generate=...)`: the official hook, no wrapper involved.

    On that path Transformers drops what is not named here; a `num_assistant_tokens` that `generate()` gets counts for
    nothing.

    Args:
        strategy (`str` or `SpeculationConfig`): what `assistant_strategy` would be.
        assistant_model (`PreTrainedModel`, *optional*): for strategies that draft with a second model.
        streamer (`BaseStreamer`, *optional*): gets tokens once they are final. Give it to `generate()` as well if it
            is to see the prompt.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): with `assistant_tokenizer`, checked to have the same
            vocabulary.
        assistant_tokenizer (`PreTrainedTokenizerBase`, *optional*): see `tokenizer`.
        settings (`dict`, *optional*): fields of the config that differ from what `strategy` gives.
        num_assistant_tokens (`int`, *optional*): what `generate()` would be given, over all settings.
        revision (`str`, *optional*): of a strategy that is a Hub repository; this and the next three are those of
            `SpeculationConfig.from_pretrained`.
        token (`str` or `bool`, *optional*): for a private repository.
        cache_dir (`str` or `Path`, *optional*): of the Hub's files.
        local_files_only (`bool`, *optional*, defaults to `False`): read the cache only.

    Raises:
        ValueError: for an unknown strategy, an assistant that it needs and did not get, or got and does not use, or
            a Hub keyword with a strategy that is no Hub repository.
        OSError: if a Hub repository can't be read.
    """
    from .generation.admission import check_tokenizers
    from .generation.loop import DecodingLoop
    from .kernels.dispatch import register
    from .resolve import resolve_strategy

    register()
    check_tokenizers(tokenizer, assistant_tokenizer)
    hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    config = resolve_strategy(strategy, settings, num_assistant_tokens=num_assistant_tokens, **hub)
    return DecodingLoop(config, assistant_model=assistant_model, streamer=streamer)


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


def generate_with(strategy: str | SpeculationConfig, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Do what `model.generate(*args, assistant_strategy=strategy, **kwargs)` does, wrapper or not."""
    original = getattr(GenerationMixin.generate, _MARK, GenerationMixin.generate)
    return _generate(original, model, args, {**kwargs, "assistant_strategy": strategy})


def _requested(model: PreTrainedModel, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> bool:
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


@dataclass(frozen=True)
class _Call:
    """One call of `generate()` that a strategy was named for."""

    model: PreTrainedModel
    keywords: dict[str, Any]  # all that stock would take, positional arguments included
    strategy: str | SpeculationConfig
    settings: dict[str, Any] | None  # fields of its config that differ
    asked: bool  # whether this call names it; a saved generation config does otherwise

    @classmethod
    def read(cls, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        """Read the arguments: keyword over the call's generation config over the model's."""
        names = list(inspect.signature(GenerationMixin.generate).parameters)[1:]
        keywords = {**dict(zip(names, args, strict=False)), **kwargs}
        strategy, own = (keywords.pop(name, None) for name in _FIELDS)
        if own is not None and not isinstance(own, dict):
            raise TypeError(f"`assistant_strategy_config` must be a dict, got {type(own).__name__}.")
        sources: list[Any] = [keywords.get("generation_config"), getattr(model, "generation_config", None)]
        named = [
            (source.assistant_strategy, source.assistant_strategy_config, place == 0)
            for place, source in enumerate(sources)
            if getattr(source, "assistant_strategy", None) is not None
        ]
        if strategy is not None:
            saved = next((found for name, found, _ in named if isinstance(strategy, str) and name == strategy), None)
            asked = True
        elif named:
            strategy, saved, asked = named[0]
        else:
            raise ValueError("`assistant_strategy_config` was given without `assistant_strategy`.")
        settings = {**(saved or {}), **own} if own else saved
        return cls(model, keywords, strategy, settings, asked or own is not None)

    def value(self, name: str) -> Any:
        """Return the value of a generation field that somebody set, before stock fills in its defaults."""
        if self.keywords.get(name) is not None:
            return self.keywords[name]
        for source in (self.keywords.get("generation_config"), getattr(self.model, "generation_config", None)):
            if getattr(source, name, None) is not None and not _compat.is_filled_in(source, name):
                return getattr(source, name)
        return None

    def generation_config(self) -> GenerationConfig:
        """Return what the call, its config and the model's set together, without stock's defaults."""
        merged = GenerationConfig()
        for name in vars(merged):
            value = self.value(name) if not name.startswith("_") else None
            if value is not None:
                setattr(merged, name, value)
        return merged

    def for_stock(self) -> dict[str, Any]:
        """Return the keywords for stock when our loop decodes: without what the loop has taken over.

        `stop_strings` become a criterion here, because stock loses the tokenizer when the loop is a callable.
        """
        ours = (*_TAKEN, *HUB_KEYWORDS, "custom_generate")
        keywords = {name: value for name, value in self.keywords.items() if name not in ours}
        strings = self.value("stop_strings")
        if strings is None:
            return keywords
        from transformers import StoppingCriteriaList, StopStringCriteria

        if self.keywords.get("tokenizer") is None:
            raise ValueError("`stop_strings` needs `tokenizer=` in the call, as without `assistant_strategy`.")
        criteria = StoppingCriteriaList(keywords.get("stopping_criteria") or [])
        criteria.append(StopStringCriteria(tokenizer=self.keywords["tokenizer"], stop_strings=strings))
        keywords["stopping_criteria"] = criteria
        given = keywords.get("generation_config")
        if getattr(given, "stop_strings", None) is not None:
            keywords["generation_config"] = copy.deepcopy(given)
            keywords["generation_config"].stop_strings = None
        own = getattr(self.model.generation_config, "stop_strings", None)
        if keywords.get("stop_strings") is not None or own is not None:
            keywords["stop_strings"] = None
        return keywords


def _generate(
    original: Callable[..., Any], model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Resolve the strategy and run stock `generate` with our loop in it."""
    from .generation import admission

    call = _Call.read(model, args, kwargs)
    if call.strategy == _OFF:
        return original(model, **call.keywords)
    config = call.generation_config()
    conflicts = admission.conflicting_modes(config)
    if call.keywords.get("custom_generate") is not None:
        conflicts.append("custom_generate")
    named = f"`assistant_strategy={call.strategy!r}`"
    if conflicts and not call.asked:
        logger.warning_once(f"{named} of the saved generation config gives way to {', '.join(conflicts)}.")
        return original(model, **call.keywords)
    if conflicts:
        raise ValueError(f"{named} can't be combined with {', '.join(conflicts)}; leave one of them out.")
    for name, neutral in _UNSUPPORTED_FIELDS.items():
        value = call.value(name)
        if value not in (None, neutral):
            raise ValueError(f"`{name}={value!r}` has no effect under `assistant_strategy`; allowed: {neutral!r}.")
    given = call.keywords
    loop = decoding_loop(
        call.strategy,
        settings=call.settings,
        num_assistant_tokens=call.value("num_assistant_tokens"),
        **{name: given[name] for name in (*_TAKEN, "streamer", *HUB_KEYWORDS) if name in given},
    )
    # before stock, which may run an encoder or build a cache; the loop takes the result
    windows = admission.admit(model, config, bool(given.get("synced_gpus")))
    return original(model, custom_generate=functools.partial(loop, windows=windows), **call.for_stock())
