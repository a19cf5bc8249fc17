"""Every test of a library's version, and every private name of Transformers that the package touches.

Each entry says which releases need it, so that it can be dropped when the supported range moves on.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.logits_process import LogitsProcessor, PrefixConstrainedLogitsProcessor


if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel


def attention_name(config: PreTrainedConfig) -> str | None:
    """Return the attention implementation that `config` names, without the checks of the public property."""
    return config._attn_implementation_internal  # private in 5.17 to 5.23; the public setter re-validates every module


def set_attention_name(config: PreTrainedConfig, name: str | None) -> None:
    """Make `config` name the attention implementation `name`."""
    config._attn_implementation_internal = name


def attention_can_be_replaced(model: PreTrainedModel) -> bool:
    """Whether `model`'s attention goes through `AttentionInterface` (the public setter only warns otherwise)."""
    return bool(model._can_set_attn_implementation())


def device_of(module: torch.nn.Module) -> torch.device:
    """Return where `module` takes its input, also where Accelerate keeps its weights elsewhere between forwards."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    hook = next(m._hf_hook for m in module.modules() if hasattr(m, "_hf_hook"))  # private in all releases of it
    hooks: Any = getattr(hook, "hooks", [hook])
    return torch.device(next(each.execution_device for each in hooks if hasattr(each, "execution_device")))


def input_device(model: PreTrainedModel) -> torch.device:
    """Return where `model` takes its tokens."""
    return device_of(model.get_input_embeddings())


def adapters_of_rows(module: torch.nn.Module) -> list[str] | None:
    """Return the adapter of each row in a mixed batch of PEFT (`adapter_names=`), if the model's call has one."""
    # private in PEFT 0.13 to 0.21, but the names reach us no other way; the last hook decides, as a call that raised
    # leaves its hooks
    for hook in reversed(module._forward_pre_hooks.values()):
        if isinstance(hook, functools.partial) and hook.keywords.get("adapter_names") is not None:
            return list(hook.keywords["adapter_names"])
    return None


def hooks_for_rows(module: torch.nn.Module, names: list[str]) -> OrderedDict[int, Any]:
    """Return the hooks of `module` with other adapters of the rows, read at each forward."""
    hooks = OrderedDict(module._forward_pre_hooks)
    for key, hook in hooks.items():
        if isinstance(hook, functools.partial):
            hooks[key] = functools.partial(hook.func, adapter_names=names)
    return hooks


def is_tensor_parallel(model: PreTrainedModel) -> bool:
    """Whether `model` was loaded with a `tp_plan`, so that this process holds a share of each layer."""
    return bool(getattr(model, "_tp_size", None))  # private in 5.17 to 5.23; the public `tp_size` is a copy of it


def cached_mask_length(generation_config: GenerationConfig) -> int | None:
    """Return the columns of an all-ones attention mask that `generate` dropped, `None` where it was not recorded."""
    return getattr(generation_config, "_mask_length", None)  # recorded by releases that slice a second turn by it


def dynamic_layers(config: PreTrainedConfig) -> list[Any]:
    """Return the cache layers that stock generation would use for a model of `config`."""
    return list(DynamicCache(config=config).layers)


def layer_window(layer: Any) -> int | None:
    """Return a stock cache layer's sliding window, `None` for full attention; raise `TypeError` for any other kind."""
    if type(layer) is DynamicLayer:
        return None
    if type(layer) is DynamicSlidingWindowLayer:
        return int(layer.sliding_window)
    raise TypeError(type(layer).__name__)


def fill_dynamic_layer(layer: Any, keys: torch.Tensor, values: torch.Tensor, seen: int) -> None:
    """Make `layer` hold the newest columns of `keys` and `values` `[b, h_kv, seen, d]`, as if it had seen them all."""
    layer.lazy_initialization(keys, values)
    kept = seen if not layer.is_sliding else min(seen, layer.sliding_window - 1)
    layer.keys = keys[:, :, seen - kept :].contiguous()
    layer.values = values[:, :, seen - kept :].contiguous()
    if layer.is_sliding:
        layer.cumulative_length = seen


def allowed_tokens_function(processor: Any) -> Callable[..., Any] | None:
    """Return the caller's `prefix_allowed_tokens_fn` in a processor, `None` if it is another one."""
    # private in 5.17 to 5.23; the only way to the caller's function
    wraps = isinstance(processor, PrefixConstrainedLogitsProcessor)
    return processor._prefix_allowed_tokens_fn if wraps else None


def for_rows(processor: LogitsProcessor, rows: set[int]) -> LogitsProcessor:
    """Return `processor` such that a caller's `prefix_allowed_tokens_fn` is asked about `rows` only.

    The other rows of the matrix have no text of that length, and a grammar need not have an answer for them.
    """
    allowed = allowed_tokens_function(processor)
    if allowed is None or type(processor) is not PrefixConstrainedLogitsProcessor:
        return processor
    return PrefixConstrainedLogitsProcessor(lambda row, ids: allowed(row, ids) if row in rows else [0], 1)


_ASSISTANT_DEFAULTS = {
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
}


def is_filled_in(generation_config: Any, name: str) -> bool:
    """Whether stock, not the caller, gave `generation_config` its value of the assistant's field `name`.

    The `pipeline()` of 5.17 hands over a config with stock's defaults in it; all of them together say so.
    """
    if name not in _ASSISTANT_DEFAULTS:
        return False
    return all(getattr(generation_config, key, None) == value for key, value in _ASSISTANT_DEFAULTS.items())


def serve_command() -> type:
    """Return the class behind `transformers serve`; its constructor runs the server.

    Raises:
        ImportError: if what it needs is not installed.
    """
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ImportError("Serving needs FastAPI, Uvicorn and the OpenAI client: pip install 'hf-specdec[serve]'")
    from transformers.cli.serve import Serve

    return Serve


@contextmanager
def extended_server(extend: Callable[[Any, Any], None]) -> Iterator[None]:
    """Call `extend(app, model_manager)` on each app that `transformers serve` builds inside this context.

    5.17 to 5.23 build the app inside the command's constructor, from a function that it looks up by name.
    """
    from transformers.cli.serving import server

    build = server.build_server

    @functools.wraps(build)
    def build_and_extend(model_manager: Any, *args: Any, **kwargs: Any) -> Any:
        app = build(model_manager, *args, **kwargs)
        extend(app, model_manager)
        return app

    server.build_server = build_and_extend
    try:
        yield
    finally:
        server.build_server = build


def on_model_load(model_manager: Any, prepare: Callable[[Any], None]) -> None:
    """Call `prepare(model)` for the models that `transformers serve` holds, and whenever it hands one to a request."""
    load = model_manager.load_model_and_processor  # also loads again what `POST /reset` dropped

    @functools.wraps(load)
    def load_and_prepare(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        prepare(loaded[0])
        return loaded

    model_manager.load_model_and_processor = load_and_prepare
    for timed in model_manager.loaded_models.values():
        prepare(timed.model)
