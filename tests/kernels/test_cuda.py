"""Whole calls on a CUDA device: kernels, captured forwards, how often the host waits. Skipped where there is none."""

from __future__ import annotations

import copy
import warnings

import families
import pytest
import torch

from hf_specdec import on_speculation


pytestmark = [
    pytest.mark.native,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STRATEGIES = ["plain", "assisted", "prompt_lookup", "vegas", "vegas:window", "diversed", "diversed:mixture"]


@pytest.fixture(scope="module")
def pair():
    """Return a model in float32 with heads that the kernels take, and its assistant."""
    model = families.build("Llama", seed=3, head_dim=64)
    return model.float().cuda(), families.perturbed(model).float().cuda()


def generate(pair, strategy, **changes):
    """Return greedy text of four ragged rows."""
    model, assistant = pair
    ids, mask = (tensor.cuda() for tensor in families.prompts())
    config = families.configured(strategy).override(**changes)
    extras = families.extras(strategy, assistant)
    options = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": 5}
    return model.generate(ids, attention_mask=mask, assistant_strategy=config, **extras, **options)


def stock(pair):
    model, _ = pair
    ids, mask = (tensor.cuda() for tensor in families.prompts())
    return model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=40, eos_token_id=5)


@pytest.mark.parametrize("kernels", ["auto", "triton", "sdpa", "explicit"])
@pytest.mark.parametrize("mode", [None, "graphs"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_greedy_text_equals_stock(pair, strategy, mode, kernels):
    assert torch.equal(generate(pair, strategy, compile=mode, kernels=kernels), stock(pair))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["inductor", "graphs+inductor"])
@pytest.mark.parametrize("strategy", ["vegas", "assisted"])
def test_compiled_text_equals_stock(pair, strategy, mode):
    assert torch.equal(generate(pair, strategy, compile=mode), stock(pair))


@pytest.mark.parametrize("strategy", STRATEGIES[:-1])  # the mixture's bonus asks whether it is needed
def test_the_host_waits_once_a_round(pair, strategy):
    generate(pair, strategy, compile="graphs")
    stats = []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught, on_speculation(stats.append):
            warnings.simplefilter("always")
            generate(pair, strategy, compile="graphs")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchronizing" in str(warning.message) for warning in caught)
    # prompts are read and caches filled with what the host knows, rows that end exchange places, and the text is cut
    assert waits <= stats[0].target_forwards + 60


def test_bfloat16_and_a_long_context(pair):
    """Texts in bf16 may part at near-ties only, so the statistics of one text are compared, not the text itself."""
    model = copy.deepcopy(pair[0]).bfloat16()
    ids = torch.randint(3, families.VOCAB, (2, 200), generator=torch.Generator().manual_seed(0)).cuda()
    found = []
    for changes in ({}, {"compile": "graphs"}):
        config = families.configured("vegas").override(kernels="triton", **changes)
        options = {"do_sample": False, "max_new_tokens": 30, "return_dict_in_generate": True}
        found.append(model.generate(ids, assistant_strategy=config, **options))
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert found[0].speculation.to_dict() == found[1].speculation.to_dict()
