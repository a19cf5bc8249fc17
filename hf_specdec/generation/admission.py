"""What can be decoded, checked before any forward. A refusal names the argument, the value and what is allowed."""

from __future__ import annotations

from collections.abc import Collection
from inspect import signature
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .. import _compat


logger = logging.get_logger(__name__)

OFF = '`assistant_strategy="off"`'
_IGNORED_KWARGS = {
    "input_ids",
    "attention_mask",  # read into the prompt
    "position_ids",  # checked against the mask
    "past_key_values",
    "use_cache",  # these three are read from the generation config
    "output_attentions",
    "output_hidden_states",
    "logits_to_keep",  # prepared by stock for its own prefill
    "return_dict",
}
ALLOWED = {
    "cache_implementation": "dynamic",
    "use_cache": True,
    "output_attentions": False,
    "output_hidden_states": False,
}
"""Settings of which a strategy can honour one value, beside None."""
_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
_NEUTRAL = {"num_beams": 1, "num_beam_groups": 1, "penalty_alpha": 0}
_MODE_FIELDS = (
    "num_beams",
    "num_beam_groups",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "assistant_ensemble_weight",
    "speculation_type",
    "use_mtp",
    "dola_layers",
    "constraints",
    "force_words_ids",
    "penalty_alpha",
    "token_healing",  # stock heals in the middle of `generate()`, where a decoding loop's tokenizer is not known
)


def conflicting_modes(generation_config: GenerationConfig) -> list[str]:
    """Return the fields of `generation_config` that ask for a stock decoding mode of their own, as `name=value`."""
    found = []
    for name in _MODE_FIELDS:
        value = getattr(generation_config, name, None)
        if value is not None and value is not False and value != _NEUTRAL.get(name):
            found.append(f"{name}={value}")
    return found


def refusal(subject: str, conflicts: list[str]) -> ValueError:
    """Return the error for a call that asks for `subject` and for a stock mode as well, as `name=value`."""
    names = [conflict.partition("=")[0] for conflict in conflicts]
    instead = ", ".join(f"`{name}={_NEUTRAL.get(name)}`" for name in names)
    healed = " Text can be healed before: `model.heal_tokens(input_ids, tokenizer)`." * ("token_healing" in names)
    return ValueError(
        f"{subject} can't be combined with {', '.join(conflicts)}; pass {instead} in the call, or {OFF}.{healed}"
    )


def give_way(
    generation_config: GenerationConfig,
    saved: GenerationConfig,
    asked: Collection[str] = (),
    allowed: dict[str, Any] = ALLOWED,
) -> dict[str, Any]:
    """Replace settings of `generation_config` that come from the model's `saved` one only by what is allowed.

    Stock unsets "hybrid" itself, which checkpoints carry whose users never chose it; other values are warned of.

    Args:
        asked (`Collection[str]`, *optional*): the settings that the call's keywords ask for.
        allowed (`dict[str, Any]`, *optional*): what may be set beside None.

    Returns:
        What was changed, with its new values.
    """
    changed, told = {}, []
    for name, neutral in allowed.items():
        value = getattr(generation_config, name, None)
        hybrid = name == "cache_implementation" and value == "hybrid"
        mere = name not in asked and value == getattr(saved, name, None)
        if value in (None, neutral) or not (hybrid or mere):
            continue
        setattr(generation_config, name, neutral)
        changed[name] = neutral
        told += [] if hybrid else [f"`{name}={value!r}`"]
    if told:
        logger.warning_once(f"{', '.join(told)} of the saved generation config: no effect under `assistant_strategy`.")
    return changed


def check_config(generation_config: GenerationConfig) -> None:
    """Raise `ValueError` for settings of `generate()` that a strategy can't honour."""
    modes = conflicting_modes(generation_config)
    if modes:
        raise refusal("`assistant_strategy` decodes greedily or by sampling, one sequence per row; it", modes)
    for name, allowed in ALLOWED.items():
        value = getattr(generation_config, name, None)
        if value not in (None, allowed):
            raise ValueError(
                f"`{name}={value!r}` is not available under `assistant_strategy`, which decodes from a cache of its "
                f"own with attention of its own; allowed: None or {allowed!r}, or {OFF}."
            )
    if generation_config.max_new_tokens == 0:
        raise ValueError("`max_new_tokens` must be at least 1 under `assistant_strategy`, got 0.")


def admit(model: PreTrainedModel, generation_config: GenerationConfig, synced_gpus: bool) -> list[int | None]:
    """Raise `ValueError` for a model or a call that no strategy can serve; return the layers' `layer_windows`.

    It runs once per call: in the wrapper before stock `generate()` prepares anything, or in the loop where there is
    no wrapper. So `generation_config` is what was set, with or without stock's defaults.
    """
    windows = layer_windows(model)
    check_config(generation_config)
    if synced_gpus:
        raise ValueError(
            "`synced_gpus=True` (ZeRO-3 or FSDP generation) is not supported under `assistant_strategy`; pass "
            f"`synced_gpus=False` where each rank has all weights, or {OFF}."
        )
    if any(type(module).__module__.startswith("torch.ao.nn.quantized.dynamic") for module in model.modules()):
        raise ValueError(
            f"`model` {type(model).__name__} is not supported under `assistant_strategy`: torch.ao has quantised it "
            "dynamically, by one scale for all tokens of a forward, so its logits depend on what else is fed. "
            "Quantise the weights only (torchao's Int8WeightOnlyConfig, for instance)."
        )
    # PEFT binds its own input preparation to the base model for the time of the call
    owner = getattr(model.prepare_inputs_for_generation, "__self__", model)
    adapter: Any = getattr(owner, "active_peft_config", None)
    if owner is not model and getattr(adapter, "is_prompt_learning", False):
        raise ValueError(
            f"The PEFT adapter of type {adapter.peft_type} prepends virtual tokens (prompt learning), which "
            f"`assistant_strategy` does not support; LoRA-like adapters are supported. Or pass {OFF}."
        )
    return windows


def row_adapters(model: PreTrainedModel, batch: int, compile: str | None) -> list[str] | None:
    """Return PEFT's `adapter_names` of the call, if it has them; raise `ValueError` if they are not one per row."""
    found = (_compat.adapters_of_rows(module) for module in model.modules() if module._forward_pre_hooks)
    names = next((names for names in found if names is not None), None)
    if names is not None and compile is not None:
        raise ValueError(
            f"`adapter_names` can't be used with `compile={compile!r}`, whose forwards always run the same rows; "
            "allowed: None."
        )
    if names is not None and len(names) != batch:
        raise ValueError(
            f"`adapter_names` has {len(names)} names for {batch} rows (after `num_return_sequences`); "
            "`assistant_strategy` needs one per row."
        )
    return names


def check_inputs(model: PreTrainedModel, keywords: dict[str, Any]) -> None:
    """Raise `ValueError` for keywords of a call that would reach the model, before stock encodes an image."""
    taken = signature(model.forward).parameters
    check_arguments(model, {name: value for name, value in keywords.items() if name in taken})


def check_arguments(model: PreTrainedModel, model_kwargs: dict[str, Any]) -> None:
    """Raise `ValueError` for something that `generate()` would pass to the model, and a strategy can't."""
    for name, value in model_kwargs.items():
        if value is None or name in _IGNORED_KWARGS or _says_text(model, name, value):
            continue
        if name == "mm_encoder_outputs":  # stock may have made them
            name = "`, `".join((name, *(_PIXELS[kind] for kind in value if kind in _PIXELS)))
        raise ValueError(
            f"The model argument `{name}` is not supported under `assistant_strategy`, which reads text only: leave "
            f"it out, or pass {OFF}."
        )


def _says_text(model: PreTrainedModel, name: str, value: Any) -> bool:
    """Whether a model argument only says that the input is text."""
    if name == "mm_encoder_outputs":
        return not value
    # zeros are text in Gemma-3; other models embed them, or read them as a prefix of mutual attention
    if name == "mm_token_type_ids" or (name == "token_type_ids" and model.config.model_type == "gemma3"):
        return not bool(torch.as_tensor(value).any())
    return False


def check_position_ids(position_ids: torch.Tensor | None, mask: torch.Tensor, width: int) -> None:
    """Raise `ValueError` unless `position_ids` count each row's real tokens, as our cache does.

    Args:
        position_ids (`torch.Tensor` of shape `[b or 1, <= width]`, *optional*): what the model would be given; may
            have the axes of M-RoPE before these.
        mask (`torch.Tensor` of shape `[b, width]`, bool): real tokens.
    """
    if position_ids is None:
        return
    if position_ids.dim() == 3 and bool((position_ids == position_ids[:1]).all()):
        position_ids = position_ids[0]  # M-RoPE of text: the same number on every axis
    if position_ids.dim() != 2 or position_ids.shape[1] > width:
        raise ValueError(
            f"`position_ids` of shape {tuple(position_ids.shape)} are not supported; allowed: [batch, length]."
        )
    tail = mask[:, width - position_ids.shape[1] :]
    expected = (mask.cumsum(dim=1) - 1)[:, width - position_ids.shape[1] :]
    if not bool(((position_ids == expected) | ~tail).all()):
        raise ValueError(
            "`position_ids` that don't count each row's tokens from 0 are not supported under `assistant_strategy`."
        )


def layer_windows(model: PreTrainedModel, argument: str = "model") -> list[int | None]:
    """Return each decoder layer's sliding window, `None` for full attention; raise `ValueError` if it can't run.

    `argument` is what the caller calls the model, for the message.
    """
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)

    def refuse(reason: str) -> ValueError:
        return ValueError(f"`{argument}` {name} is not supported under `assistant_strategy`: {reason}.")

    if model.config.is_encoder_decoder:
        raise refuse("it is an encoder-decoder model; decoder-only models are supported")
    if model.get_output_embeddings() is None:
        raise refuse("it has no language modeling head")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise refuse(
            f"it has layers of type {', '.join(sorted(kinds))}; full and sliding attention are supported, recurrent "
            "and chunked layers are not"
        )
    if getattr(model, "_is_stateful", False):
        raise refuse("its layers keep a recurrent state, which can't be rolled back")
    if not _compat.attention_can_be_replaced(model):
        raise refuse("its attention does not go through Transformers' AttentionInterface")
    if getattr(config, "num_kv_shared_layers", 0):
        raise refuse(f"its layers share keys and values (num_kv_shared_layers={config.num_kv_shared_layers})")
    if getattr(config, "cross_attention_layers", None):
        raise refuse("some of its layers attend to an image (cross_attention_layers)")
    if getattr(config, "kv_lora_rank", None):
        raise refuse("its attention is latent (MLA), which has not been tested")
    if getattr(config, "use_bidirectional_attention", False):
        raise refuse("its attention is not causal (use_bidirectional_attention)")
    try:
        return [_compat.layer_window(layer) for layer in _compat.dynamic_layers(model.config)]
    except TypeError as error:
        raise refuse(f"its cache has layers of the kind {error}") from error


def check_rope(config: PreTrainedConfig, shortest: int, longest: int) -> None:
    """Raise `ValueError` where rotary frequencies would change during the call, so that cached keys go stale.

    The call begins with `shortest` tokens in some row, and can reach `longest`.
    """
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for rope in [parameters, *(value for value in parameters.values() if isinstance(value, dict))]:
        kind = rope.get("rope_type", rope.get("type"))
        limit = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        limit = limit or config.max_position_embeddings
        if (kind == "dynamic" and longest > limit) or (kind == "longrope" and shortest <= limit < longest):
            raise ValueError(
                f"This call can reach {longest} tokens, past the {limit} at which {kind!r} RoPE changes its "
                "frequencies; `assistant_strategy` needs a `max_length` on one side of it."
            )


def check_assistant(model: PreTrainedModel, assistant: PreTrainedModel) -> None:
    """Raise `ValueError` unless `assistant` can draft for `model`: supported, of the same vocabulary up to padding."""
    layer_windows(assistant, "assistant_model")
    ours, theirs = (m.config.get_text_config(decoder=True).vocab_size for m in (model, assistant))
    if abs(ours - theirs) > 1024:
        raise ValueError(
            f"`assistant_model` has a vocabulary of {theirs} tokens, the model {ours}; they must be the same up to "
            "at most 1024 rows of padding."
        )


def check_tokenizers(tokenizer: Any, assistant_tokenizer: Any) -> None:
    """Raise `ValueError` if both are given and their vocabularies differ."""
    if tokenizer is None or assistant_tokenizer is None:
        return
    if tokenizer.get_vocab() != assistant_tokenizer.get_vocab():
        raise ValueError(
            "`tokenizer` and `assistant_tokenizer` have different vocabularies; the assistant must share the model's. "
            f"Stock decodes with such a pair: pass {OFF}."
        )


def given_by_caller(past: Any) -> bool:
    """Whether a cache is the caller's own, not one that stock made for the call."""
    return bool(getattr(past, "_is_user_defined", False))


def check_cache(past: Any, batch: int) -> DynamicCache | None:
    """Return `past` if it can be imported, `None` if it is empty; raise `TypeError` or `ValueError` otherwise."""
    if past is None or not (given_by_caller(past) or past.get_seq_length()):
        return None  # what stock has made for a saved `cache_implementation` is never used
    if type(past) is not DynamicCache:
        raise TypeError(
            f"`past_key_values` must be a DynamicCache under `assistant_strategy`, got {type(past).__name__}."
        )
    if not past.get_seq_length():
        return None
    layers: list[Any] = past.layers
    rows = next(layer.keys.shape[0] for layer in layers if layer.is_initialized)
    if rows != batch:
        raise ValueError(f"`past_key_values` has {rows} rows, the prompt {batch} (after `num_return_sequences`).")
    return past


def check_partial(past: Any, generation_config: GenerationConfig, batch: int) -> None:
    """Raise `ValueError` for what only a process that runs all layers can honour."""
    if given_by_caller(past) or (past is not None and past.get_seq_length()):
        raise ValueError(
            "`past_key_values` can't be used where the model's layers lie on several ranks: none holds a whole cache."
        )
    scores = [name for name in ("output_scores", "output_logits") if getattr(generation_config, name, False)]
    if scores and batch > 1:
        raise ValueError(
            f"`{scores[0]}=True` with {batch} rows is not available where the model's layers lie on several ranks; "
            "pass one row per call."
        )
