"""Twins: copies that attend by our kernels, while the model itself is never changed."""

from __future__ import annotations

import copy
import functools
import gc
import types
import weakref

import pytest
import torch
from families import tiny_llama
from torch import nn
from transformers import LlamaForCausalLM

from hf_specdec.generation.models.surgery import decoder_layers
from hf_specdec.kernels.dispatch import ATTENTION
from hf_specdec.kernels.twin import exchanged, original_of, twin_of, without_checkpointing


def names(model):
    return {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")}


def test_a_twin_shares_all_weights_and_changes_nothing():
    model = tiny_llama()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    twin = twin_of(model)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert names(twin) == {ATTENTION} and names(model) == {"sdpa"}
    # not a subclass: torch.compile of some releases refuses it
    assert {type(name) for name in names(twin)} == {str}
    for (name, one), (other, two) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert name == other and one is two
    assert all(one.layer_idx == index for index, one in enumerate(layer.self_attn for layer in decoder_layers(twin)))


def test_models_may_share_a_config():
    model = tiny_llama()
    other = LlamaForCausalLM(model.config).double().eval()
    assert other.config is model.config
    twin_of(model)
    assert other.config._attn_implementation == "sdpa"


def test_copies_know_their_original_and_do_not_keep_it():
    model = tiny_llama()
    assert original_of(model) is model
    twin = twin_of(exchanged(model, {id(model.model.norm): nn.Identity()}))
    assert original_of(twin) is model and isinstance(twin.model.norm, nn.Identity)
    assert original_of(decoder_layers(twin)[0]) is decoder_layers(model)[0]
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_hooks_are_called_with_the_models_own_modules():
    """Recorders and steering look modules up, and write on them; a hook that is gone is not called any more."""
    model, ids = tiny_llama(), torch.arange(3, 9)[None]
    settings = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    names, seen = {module: name for name, module in model.named_modules()}, set()
    target = model.model.layers[1]

    def steer(module, inputs, output):
        seen.add(names[module])
        module.calls = getattr(module, "calls", 0) + 1
        return output + 1.0 if module is target else output

    for module in (model, target, target.self_attn, target.mlp.up_proj):
        module.register_forward_hook(steer if module is target else lambda m, *_: seen.add(names[m]))
    once = target.register_forward_pre_hook(lambda m, args, kwargs: once.remove(), with_kwargs=True)
    expected = model.generate(ids, **settings)
    every, seen, target.calls = set(seen), set(), 0
    once = target.register_forward_pre_hook(lambda m, args, kwargs: once.remove(), with_kwargs=True)
    assert torch.equal(model.generate(ids, **settings, assistant_strategy="prompt_lookup"), expected)
    assert seen == every and target.calls > 1


def test_what_hangs_on_the_twins_head_is_not_the_models():
    model, seen = tiny_llama(), []
    twin_of(model).lm_head.register_forward_pre_hook(lambda *_: seen.append("head"))
    model(torch.arange(3)[None])
    assert seen == []


def test_heads_without_a_plain_weight():
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for change in (
        lambda model: torch.nn.utils.parametrizations.weight_norm(model.lm_head),
        lambda model: model.set_output_embeddings(nn.Sequential(model.lm_head, nn.Tanh())),
    ):
        model, ids = tiny_llama(), torch.arange(3, 9)[None]
        change(model)
        for strategy in ("prompt_lookup", "specbound"):
            found = model.generate(ids, **settings, assistant_strategy=strategy)
            assert torch.equal(found, model.generate(ids, **settings))


def bound(function):
    def replace(module):
        module.forward = types.MethodType(function(type(module).forward), module)

    return replace


def counting(calls):
    """Wrap a function such that it counts its calls."""

    def wrap(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            calls.append(1)
            return function(*args, **kwargs)

        return wrapper

    return wrap


def replacements(calls):
    """Ways in which people replace `forward` on a module, by name."""

    def closure(module):
        module.forward = counting(calls)(counting(calls[:0])(module.forward))

    def partial(module):
        module.forward = functools.partial(counting(calls)(type(module).forward), module)

    def compiled(module):
        module.forward = torch.compile(module.forward, backend="eager")
        calls.append(1)

    def children(module):
        """A closure over a part of the module, which may be copied too."""
        name, part = next(module.named_children())

        def forward(*args, **kwargs):
            calls.append(1)
            assert getattr(module, name) is part
            return type(module).forward(module, *args, **kwargs)

        module.forward = forward

    def as_module(module):
        module.compile(backend="eager")
        calls.append(1)

    method = bound(counting(calls))
    ways = {"method": method, "closure": closure, "partial": partial, "children": children}
    return {**ways, "compiled": compiled, "module": as_module}


@pytest.mark.parametrize("where", ["model", "attention"])
@pytest.mark.parametrize("way", ["method", "closure", "partial", "children", "compiled", "module"])
def test_replaced_forwards_run_the_copy(way, where):
    model, ids, calls = tiny_llama(), torch.arange(3, 9)[None], []
    expected = model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
    replacements(calls)[way](model if where == "model" else model.model.layers[1].self_attn)
    before = vars(model).get("forward")
    found = model.generate(
        ids, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0, assistant_strategy="prompt_lookup"
    )
    assert torch.equal(found, expected) and calls
    assert vars(model).get("forward") is before


def test_compiled_layers_run_as_they_are_written():
    model, ids = tiny_llama(), torch.arange(3, 9)[None]
    settings = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, **settings)
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer, backend="eager")
    for strategy in ("prompt_lookup", "specbound"):
        assert torch.equal(model.generate(ids, **settings, assistant_strategy=strategy), expected)


def test_a_forward_that_cannot_be_followed_is_refused_before_any_forward():
    model, calls = tiny_llama(), []
    attention = model.model.layers[0].self_attn
    kept["forward"] = attention.forward
    attention.forward = through_a_global
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match="`forward` of LlamaAttention has been replaced by through_a_global"):
        model.generate(torch.arange(3, 9)[None], max_new_tokens=3, pad_token_id=0, assistant_strategy="plain")
    assert not calls


kept = {}


def through_a_global(*args, **kwargs):
    return kept["forward"](*args, **kwargs)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_checkpointing_is_left_out_of_a_copy_in_training_only():
    model = tiny_llama()
    model.gradient_checkpointing_enable()
    assert without_checkpointing(model) is model
    model.train()
    found = without_checkpointing(model)
    assert found is not model and found.training
    assert not any(getattr(module, "gradient_checkpointing", False) for module in found.modules())
    assert model.is_gradient_checkpointing


def test_copies_of_a_model_that_was_called_are_models():
    model = tiny_llama()
    model.generate(torch.arange(3, 9)[None], max_new_tokens=3, pad_token_id=0, assistant_strategy="plain")
    assert names(copy.deepcopy(model)) == {"sdpa"}
