"""Running part of a model's depth, for any decoder: the model prepares its layers' arguments, we call the layers.

A *recording* runs the model's own forward over some tokens on a shallow copy whose layers only note what they are
given: embeddings and position tables, masks, rotary tables and side inputs come from the model itself, none of its
layers runs, and the model is not touched. Afterwards any layer can be called with the noted arguments, on any hidden
state. Recordings of single tokens are joined to those of longer blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, cast
from weakref import WeakSet

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from ... import _compat
from ...kernels.address import Address
from ...kernels.dispatch import MaskSpec
from ...kernels.step import Step
from ...kernels.twin import Proxy, exchanged, original_of
from ..runner import ModelRunner
from .surgery import decoder_layers


class LayerCall(NamedTuple):
    """What the model passes to one layer beside the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Recording(NamedTuple):
    """What a forward would do first."""

    hidden: torch.Tensor  # the first layer's input, `[n, m, H]`
    calls: list[LayerCall]  # per layer


def run_layer(layer: nn.Module, hidden: torch.Tensor, call: LayerCall) -> torch.Tensor:
    """Return `layer`'s output `[n, m, H]` for `hidden` `[n, m, H]`."""
    return _states(layer(hidden, *call.args, **call.kwargs))


def placed(call: LayerCall, cache: Cache, step: Step, mask: Any = None) -> LayerCall:
    """Return a layer's arguments on another cache, at another step and, if given, with another mask."""
    args = tuple(_at(value, cache, step, mask) for value in call.args)
    return LayerCall(args, {key: _at(value, cache, step, mask) for key, value in call.kwargs.items()})


def _at(value: Any, cache: Cache, step: Step, mask: Any = None) -> Any:
    if isinstance(value, Cache):
        return cache
    if isinstance(value, Step):
        return step
    return mask if mask is not None and isinstance(value, MaskSpec) else value


def _states(output: Any) -> torch.Tensor:
    """Return the hidden states in what a decoder layer returned, which some families wrap in a tuple."""
    return output[0] if isinstance(output, tuple) else output


_checked: WeakSet[PreTrainedModel] = WeakSet()


class Layerwise:
    """A decoder taken apart: arguments of its layers, its layers, what follows them, its head.

    Args:
        model (`PreTrainedModel`): a causal language model with a list of decoder layers. Its twin attends by the
            package's kernels, the model itself by its own attention.

    Attributes:
        layers (`nn.ModuleList`): the model's own layers.
        norm (`nn.Sequential`): what the model applies between the last layer and the head, nearly always one norm.

    Raises:
        ValueError: if the model does something between its layers and its head that is no call of a module.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.layers = model, decoder_layers(model)
        base = model.base_model
        if base is model:
            raise ValueError(
                f"{type(model).__name__} has no base model below its head, so it can't be run by layers under "
                "`assistant_strategy`."
            )
        self._noted: list[Any] = []
        recorders = nn.ModuleList(Proxy(layer, self._note) for layer in self.layers)
        self._recorder = cast(Callable[..., Any], exchanged(base, {id(self.layers): recorders}))
        self._autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.norm = self._probe(base, recorders)
        self._token_dims: list[Any] = []
        if "forward" in vars(original_of(model)):
            self._autocast = self._autocast_inside()

    def record(self, **inputs: Any) -> Recording:
        """Return what the base model's forward over `inputs` (its own keywords) would pass to each layer."""
        self._noted.clear()
        with self._autocast():
            self._recorder(**inputs, return_dict=True)
        noted = list(self._noted)
        return Recording(noted[0][0], [LayerCall(args, kwargs) for _, args, kwargs in noted])

    def run(self, layer: int, hidden: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """Return the output `[n, m, H]` of the layer of that index."""
        with self._autocast():
            return run_layer(self.layers[layer], hidden, call)

    def join(self, layer: int, recordings: Sequence[Recording], cache: Cache, step: Step) -> LayerCall:
        """Return a layer's arguments for the consecutive tokens of several recordings, on `cache` at `step`."""
        parts = [recording.calls[layer] for recording in recordings]
        return cast(LayerCall, _joined(parts, self._token_dims[layer], cache, step))

    def tail(self, head: nn.Module | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return a function from the LM head's input `[..., H]` to logits, soft-caps and scales included.

        A `head` takes the place of the model's own.
        """
        changes: dict[int, nn.Module] = {id(self.model.base_model): _Passes()}
        if head is not None:
            changes[id(self.model.get_output_embeddings())] = head
        model = cast(Callable[..., Any], exchanged(self.model, changes))

        def run(hidden: torch.Tensor) -> torch.Tensor:
            states = hidden.reshape(1, -1, hidden.shape[-1])
            logits = model(inputs_embeds=states, use_cache=False, return_dict=True).logits
            return logits.view(*hidden.shape[:-1], -1)

        return run

    def record_at(self, runner: ModelRunner, tokens: torch.Tensor, start: int) -> Recording:
        """Return the recording of `tokens` `[1, m]` that lie from position `start` on, over the runner's cache."""
        step = runner.cache.begin(Address([start], tokens.shape[1]))
        return self.record(**runner.inputs(tokens, step))

    def check(self, runner: ModelRunner, token: torch.Tensor, position: int, logits: torch.Tensor) -> None:
        """Learn how to join recordings, and compare a run by layers with the model's own, once per model.

        Args:
            token (`torch.Tensor` of shape `[1, 1]`): the newest token that the cache holds,
            position (`int`): and its position.
            logits (`torch.Tensor` of shape `[1, 1, V]`): the model's own of what follows it.

        Raises:
            ValueError: if the layers, called one by one, don't give the same logits.
        """
        one, two = (self.record_at(runner, token.expand(1, m), position).calls for m in (1, 2))
        self._token_dims = [_token_dims(*calls) for calls in zip(one, two, strict=True)]
        if original_of(self.model) in _checked:
            return
        staircase = Staircase(self, runner, 1)
        staircase.restart(position)
        staircase.push(token)
        while staircase.depths[0] < len(self.layers):
            staircase.advance()
        found = self.tail()(self.norm(staircase.states))
        if not torch.allclose(found, logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max())):
            raise ValueError(
                f"{type(self.model).__name__} can't be run by layers under `assistant_strategy`: its logits differ by "
                f"{float((found - logits).abs().max()):.3g} from its own forward's."
            )
        _checked.add(original_of(self.model))

    def _note(self, _: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._noted.append((hidden_states, args, kwargs))
        return hidden_states

    def _autocast_inside(self) -> Callable[[], AbstractContextManager[Any]]:
        """Return the autocast that a forward that was wrapped on the model runs in (Accelerate's mixed precision)."""
        passes = _Passes()
        model = cast(Callable[..., Any], exchanged(self.model, {id(self.model.base_model): passes}))
        device, width = _compat.input_device(self.model), self.model.config.get_text_config(decoder=True).hidden_size
        states = torch.zeros(1, 1, width, device=device, dtype=self.model.dtype)
        with torch.no_grad():
            model(inputs_embeds=states, use_cache=False, return_dict=True)
        enabled, dtype = passes.autocast
        return partial(torch.autocast, device.type, dtype, enabled) if enabled else nullcontext

    def _probe(self, base: nn.Module, recorders: nn.ModuleList) -> nn.Sequential:
        """Find what follows the layers, by watching a forward without layers."""
        after: list[tuple[nn.Module, Any, Any]] = []

        def watch(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            output = module(*args, **kwargs)
            if len(self._noted) == len(self.layers):
                after.append((module, args[0] if args else None, output))
            return output

        outside = {id(module): Proxy(module, watch) for module in _beside(base, self.layers)}
        watched = cast(Callable[..., Any], exchanged(base, {**outside, id(self.layers): recorders}))
        self._noted.clear()
        with torch.no_grad():
            tokens = torch.zeros(1, 1, dtype=torch.long, device=_compat.input_device(self.model))
            # the mask says that the token, which may be the padding's, is none
            output = watched(input_ids=tokens, attention_mask=tokens + 1, use_cache=False, return_dict=True)
        last = output.last_hidden_state
        hidden, norms = self._noted[-1][0] if self._noted else last, []
        for module, given, result in after:
            if given is hidden:
                norms.append(module)
                hidden = result
        same = hidden.data_ptr() == last.data_ptr() and hidden.shape == last.shape  # some reshape it to what it was
        if not same or len(self._noted) != len(self.layers):
            raise ValueError(
                f"{type(self.model).__name__} can't be run by layers under `assistant_strategy`: its forward does "
                "more around them than call one module after the other."
            )
        return nn.Sequential(*norms)


class Staircase:
    """Neighbouring tokens of one text at unequal depths, with their states parked in one buffer.

    The catch-up rule: a layer call takes the newest token and every earlier token that is exactly as deep. So depths
    never increase from token to token, tokens of one depth are neighbours, and every token passes every layer once,
    when the keys and values of all earlier tokens are there: states and cache are those of a plain forward.

    Attributes:
        depths (`list[int]`): layers that each token has passed.
        recordings (`list[Recording]`): of each token.
        states (`torch.Tensor` of shape `[1, limit, H]`): each token's state at its depth.
        layer_calls, token_layers (`int`): layers called, and the sum of the tokens that they took.
    """

    def __init__(self, parts: Layerwise, runner: ModelRunner, limit: int) -> None:
        self.parts, self.runner, self.limit = parts, runner, limit
        self.depths: list[int] = []
        self.recordings: list[Recording] = []
        self.layer_calls = self.token_layers = self.start = 0
        self.states: Any = None  # allocated for the first token's dtype and device
        self._steps: dict[int, Step] = {}

    def restart(self, start: int) -> None:
        """Forget the tokens; the next one lies at position `start`."""
        self.start, self.depths, self.recordings = start, [], []

    def push(self, token: torch.Tensor) -> None:
        """Add a token `[1, 1]` at depth 0, behind the last one."""
        newest = len(self.depths)
        recording = self.parts.record_at(self.runner, token, self.start + newest)
        self._steps = {newest: cast(Step, self.runner.cache.step)}  # steps end at the newest token
        if self.states is None:
            self.states = recording.hidden.new_empty(1, self.limit, recording.hidden.shape[-1])
        self.states[:, newest : newest + 1] = recording.hidden
        self.depths.append(0)
        self.recordings.append(recording)

    def advance(self) -> int:
        """Run the next layer on the newest token and on all tokens as deep; return the index of the first."""
        layer, count = self.depths[-1], len(self.depths)
        first = self.depths.index(layer)
        if first not in self._steps:
            self._steps[first] = self.runner.cache.begin(Address([self.start + first], count - first))
        step = self.runner.cache.step = self._steps[first]
        if first == count - 1:
            call = self.recordings[first].calls[layer]
        else:
            call = self.parts.join(layer, self.recordings[first:], self.runner.cache, step)
        states = self.states[:, first:count]
        states.copy_(self.parts.run(layer, states, call))
        self.depths[first:] = [layer + 1] * (count - first)
        self.layer_calls += 1
        self.token_layers += count - first
        return first


def watching(model: PreTrainedModel, depths: Sequence[int], found: dict[int, torch.Tensor]) -> PreTrainedModel:
    """Return a copy of `model` that adds the states `[n, m, H]` after some numbers of layers to `found`, by depth."""

    def run(depth: int, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = layer(*args, **kwargs)
        states = _states(output)
        found[depth] = torch.cat([found[depth], states], dim=1) if depth in found else states
        return output

    layers = decoder_layers(model)
    changes: dict[int, nn.Module] = {
        id(layers[depth - 1]): Proxy(layers[depth - 1], partial(run, depth)) for depth in depths
    }
    return exchanged(model, changes, hooks=True)


@contextmanager
def watched(runner: ModelRunner, depths: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Collect the states of all tokens that `runner` is fed inside the context, as `watching` does."""
    found: dict[int, torch.Tensor] = {}
    before = runner.model, runner.twin
    runner.model, runner.twin = (watching(model, depths, found) for model in before)
    try:
        yield found
    finally:
        runner.model, runner.twin = before


class _Passes(nn.Module):
    """Stands in for a base model: its embeddings are its output.

    Attributes:
        autocast (`tuple`): whether the last call was made under autocast, and its dtype.
    """

    autocast: tuple[bool, torch.dtype]

    def forward(self, *args: Any, inputs_embeds: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPast:
        """Return the embeddings."""
        kind = inputs_embeds.device.type
        self.autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        return _Output(last_hidden_state=cast(torch.FloatTensor, inputs_embeds))


class _Output(BaseModelOutputWithPast):
    """An output in which whatever a family adds to it is `None`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def _beside(module: nn.Module, layers: nn.Module) -> list[nn.Module]:
    """Return the modules next to `layers`, at its own level and those above."""
    if not any(child is layers for child in module.modules()):
        return [module]
    return [m for child in module.children() if child is not layers for m in _beside(child, layers)]


def _token_dims(one: Any, two: Any) -> Any:
    """Return, in the structure of a layer's arguments, the dimension that differs between one token and two."""
    if isinstance(one, torch.Tensor):
        differs = [dim for dim in range(one.dim()) if one.shape[dim] != two.shape[dim]]
        return differs[0] if differs else None
    if isinstance(one, dict):
        return {key: _token_dims(value, two[key]) for key, value in one.items()}
    if isinstance(one, (tuple, list)):
        return tuple(_token_dims(a, b) for a, b in zip(one, two, strict=True))
    return None


def _joined(parts: Sequence[Any], dims: Any, cache: Cache, step: Step) -> Any:
    """Join the same argument of several recordings; what does not depend on the token is taken from the last."""
    last = parts[-1]
    if isinstance(last, torch.Tensor) and dims is not None and len(parts) > 1:
        return step.joined(dims, *parts)
    if isinstance(last, dict):
        return {key: _joined([p[key] for p in parts], dims[key], cache, step) for key in last}
    if isinstance(last, tuple):
        joined = [_joined([p[i] for p in parts], dims[i], cache, step) for i in range(len(last))]
        return type(last)(*joined) if hasattr(last, "_fields") else tuple(joined)
    return _at(last, cache, step)
