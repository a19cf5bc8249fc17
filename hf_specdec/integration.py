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
_ASSISTANT_FIELDS = {"num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": None}


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
        if name in self.keywords:
            return self.keywords[name]  # None too: stock takes it over what is saved
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

    def resolve(self) -> SpeculationConfig:
        """Return the strategy's config with the call's settings in it."""
        from .resolve import resolve_strategy

        hub = {name: self.keywords[name] for name in HUB_KEYWORDS if name in self.keywords}
        tokens = self.value("num_assistant_tokens")
        return resolve_strategy(self.strategy, self.settings, num_assistant_tokens=tokens, **hub)

    def give_way(self, config: GenerationConfig) -> dict[str, Any]:
        """Do `admission.give_way` for `config`; raise `ValueError` for fields of stock's assistants in the call.

        The official hook does not read these fields, as stock drops them there.
        """
        from .generation import admission

        asked = [name for name, value in self.keywords.items() if value is not None]
        allowed = {**admission.ALLOWED, **_ASSISTANT_FIELDS}
        changed = admission.give_way(config, self.model.generation_config, asked, allowed)
        for name, neutral in _ASSISTANT_FIELDS.items():
            value = getattr(config, name, None)
            if value not in (None, neutral):
                raise ValueError(
                    f"`{name}={value!r}` has no effect under `assistant_strategy`; allowed: {neutral!r}, or "
                    f"{admission.OFF}."
                )
        return changed

    def for_stock(self, changed: dict[str, Any]) -> dict[str, Any]:
        """Return the keywords for stock when our loop decodes: without what the loop has taken over.

        `stop_strings` become a criterion here, because stock loses the tokenizer when the loop is a callable.

        Args:
            changed (`dict[str, Any]`): what stands in for saved settings (see `admission.give_way`).
        """
        ours = (*_TAKEN, *HUB_KEYWORDS, "custom_generate")
        keywords = {name: value for name, value in self.keywords.items() if name not in ours}
        changes = {name: value for name, value in changed.items() if value is not None}
        if keywords.get("past_key_values") is not None and keywords.get("cache_implementation") in (None, "hybrid"):
            changes["cache_implementation"] = None  # stock takes one of the two
        strings = self.value("stop_strings")
        if strings is not None:
            from transformers import StoppingCriteriaList, StopStringCriteria

            if self.keywords.get("tokenizer") is None:
                raise ValueError("`stop_strings` needs `tokenizer=` in the call, as without `assistant_strategy`.")
            criteria = StoppingCriteriaList(keywords.get("stopping_criteria") or [])
            criteria.append(StopStringCriteria(tokenizer=self.keywords["tokenizer"], stop_strings=strings))
            keywords["stopping_criteria"] = criteria
            changes["stop_strings"] = None
        return self._changed(keywords, changes)

    def _changed(self, keywords: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
        """Return keywords under which stock's settings are `changes`, and the caller's config is as it was.

        A config of the call is copied and changed, since stock warns of keywords beside one; but where it says None,
        the model's own counts.
        """
        given = copy.deepcopy(keywords.get("generation_config"))
        if given is None:
            return {**keywords, **changes}
        for name, value in changes.items():
            setattr(given, name, value)
            if name in keywords or (value is None and getattr(self.model.generation_config, name, None) is not None):
                keywords[name] = value
        return {**keywords, "generation_config": given}


def _generate(
    original: Callable[..., Any], model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Resolve the strategy and run stock `generate` with our loop in it."""
    from .generation import admission
    from .registry import strategy_class

    call = _Call.read(model, args, kwargs)
    given = call.keywords
    if call.strategy == _OFF:
        return original(model, **given)
    config = call.generation_config()
    conflicts = admission.conflicting_modes(config)
    if given.get("custom_generate") is not None:
        conflicts.append("custom_generate")
    named = f"`assistant_strategy={call.strategy!r}`"
    if conflicts and call.asked:
        raise admission.refusal(named, conflicts)
    if not conflicts:
        strategy = call.resolve()
        unused = given.get("assistant_model") is not None and not strategy_class(strategy.strategy).needs_assistant
        conflicts = ["assistant_model"] if unused and not call.asked else []
    if conflicts:
        logger.warning_once(f"{named} of the saved generation config gives way to {', '.join(conflicts)}.")
        return original(model, **given)
    changed = call.give_way(config)
    # before stock, which may run an encoder or build a cache; the loop takes the result
    windows = admission.admit(model, config, bool(given.get("synced_gpus")))
    admission.check_inputs(model, given)
    own = {name: given[name] for name in (*_TAKEN, "streamer") if name in given}
    loop = functools.partial(decoding_loop(strategy, **own), windows=windows)
    return original(model, custom_generate=loop, **call.for_stock(changed))
