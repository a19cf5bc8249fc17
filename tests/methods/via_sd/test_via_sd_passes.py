"""What VIA-SD runs: forwards and their widths, what is left out of slim passes, and the caches."""

from __future__ import annotations

import math
from collections import Counter

import families
import pytest
import torch
from tiers import tiered
from transformers import DynamicCache
from via_sd_cases import (
    BARE,
    LAYERS,
    LONG,
    MIXED,
    OFF,
    RULES,
    SKIP,
    Spy,
    generate,
    lossless,
    lossy,
    mask,
    measured,
    slim_logits,
    spied,
    stock,
    weaken,
    without,
)

from hf_specdec import on_speculation
from hf_specdec.generation.runner import ModelRunner


@pytest.mark.parametrize("name", tiered(["llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt_neox", "gpt2", "phi3"]))
@pytest.mark.parametrize("cache", ["shared", "own"])
def test_forwards_equal_fresh_ones_at_every_round(name, cache):
    """After any lossy past, the model's logits are those of a run without cache; the slim model's likewise."""
    prefix, changes = families.FAMILIES[name]
    changes = dict(changes, num_hidden_layers=5)
    windows = "layer_types" in changes
    if windows:
        changes["layer_types"] = ["sliding_attention", "full_attention"] * 2 + ["full_attention"]
    skip = (2, 3)
    target = weaken(families.build(prefix, seed=families.SEEDS.get(name, 0), **changes), skip, 0.2)
    if name in families.SINGLE:
        target.float()
    pair, ids = (target, families.perturbed(target, 0.04)), families.prompts((19,))[0]
    config = lossy(**LONG, slim_cache=cache, adapter=mask(skip, 5))
    new, found, spy = spied(pair, ids, config, max_new_tokens=40)
    text, slim = torch.cat([ids, torch.tensor([new])], dim=1), without(target, skip)
    tolerance = 2e-4 if name in families.SINGLE else 1e-9
    full, widths = None, []  # tokens that the model has read, as the first slim pass after it shows
    for kind, tokens, (start,), logits in spy.calls[1:]:
        fed = torch.cat([text[:, :start], tokens], dim=1)
        if kind == "q":
            assert cache == "own" or full is None or start == full, "the model goes on where it stopped"
            expected, full = target(fed).logits[:, start:], None
            widths.append(tokens.shape[1])
        elif kind == "s":
            full = start if full is None else full
            expected = slim_logits(target, slim, fed, full if cache == "shared" else 0)[:, -tokens.shape[1] :]
        else:
            continue
        torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)
    assert max(widths) > 6, "much was pending when the model ran"


@pytest.mark.parametrize("granularity, skip", [("layer", (2, 3)), ("layer", (3,)), ("sublayer", (4, 7))])
def test_left_out_modules_are_not_run_in_slim_passes(pair, prompt, granularity, skip):
    target = pair[0]
    units = LAYERS * (1 if granularity == "layer" else 2)
    calls, running = Counter(), [None]
    original = ModelRunner.forward
    spy = Spy(*pair)

    def forward(runner, *args, **kwargs):
        running[0] = spy.kind(runner.model)
        calls[running[0], "forwards"] += 1
        out = original(runner, *args, **kwargs)
        running[0] = None
        return out

    handles = []
    for unit in range(units):
        layer = target.model.layers[unit // (units // LAYERS)]
        module = layer.mlp if granularity == "layer" or unit % 2 else layer.self_attn
        handles.append(module.register_forward_hook(lambda *_, u=unit: calls.update([(running[0], u)])))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ModelRunner, "forward", forward)
            config = lossy(**LONG, adapter=mask(skip, units, granularity))
            measured(pair, prompt, config, max_new_tokens=40)
    finally:
        for handle in handles:
            handle.remove()
    assert calls["s", "forwards"] > 3 and calls["q", "forwards"] > 2
    for unit in range(units):
        assert calls["q", unit] == calls["q", "forwards"]
        assert calls["s", unit] == (0 if unit in skip else calls["s", "forwards"])


def test_slim_logits_differ_unless_nothing_is_left_out(pair, prompt):
    for skip, same in ((SKIP, False), ((), True)):
        spy = spied(pair, prompt, lossy(**LONG, adapter=mask(skip)), max_new_tokens=3)[2]
        _, tokens, (start,), logits = spy.of("s")[0]
        fresh = pair[0](torch.cat([prompt[:, :start], tokens[:, :1]], dim=1)).logits[:, -1]
        gap = (logits[:, 0] - fresh).abs().max()
        assert (gap < 1e-9) if same else (gap > 0.1)


def test_the_model_reads_the_prompt_only_where_nothing_escalates(pair, prompt):
    config = lossy(**OFF, tau_accept=0.7, tau_escalate=0.0)
    _, found, spy = spied(pair, prompt, config, max_new_tokens=40)
    assert found.target_forwards == len(spy.of("q")[1:]) == 0 and found.method["escalations"] == 0
    assert set(found.method["tier_ids"][0][1:]) <= set("ABS")


@pytest.mark.parametrize("limit", [1, 4, 10, None])
@pytest.mark.parametrize("cache", ["shared", "own"])
def test_passes_and_their_widths_are_bounded(pair, prompt, limit, cache):
    gamma, new = 4, 40
    config = lossy(**{**MIXED, "max_pending": limit}, slim_cache=cache, num_assistant_tokens=gamma)
    _, found, spy = spied(pair, prompt, config, max_new_tokens=new)
    escalations, forced = found.method["escalations"], found.method["forced_rounds"]
    assert len(spy.of("q")[1:]) == found.target_forwards
    assert found.target_forwards - escalations - forced in (0, 1)  # the last token may have nothing drafted for it
    assert found.target_forwards <= 1 + escalations + (0 if limit is None else math.ceil(new / limit))
    assert forced > 0 or limit in (10, None)
    last, widths = prompt.shape[1], []
    for _, tokens, (start,), _ in spy.of("q")[1:]:
        assert start >= last, "what the model has read is not fed again"
        last = start
        widths.append(tokens.shape[1])
    if limit is None:
        assert max(widths) > gamma + 1
    else:  # below the limit one round more comes, then the drafts
        assert max(widths) <= limit + 2 * gamma + 2
    slim = max(tokens.shape[1] for _, tokens, _, _ in spy.of("s"))
    assert slim == gamma + 1 if cache == "shared" else gamma + 1 < slim <= 2 * (gamma + 1)


@pytest.mark.parametrize("rule", RULES)
def test_lossless_forwards_are_narrow(pair, prompt, rule):
    config = lossless(lossless_rule=rule, num_assistant_tokens=3, stage_len=6)
    _, found, spy = spied(pair, prompt, config, max_new_tokens=40)
    assert max(tokens.shape[1] for _, tokens, _, _ in spy.of("s")) == 4
    assert max(tokens.shape[1] for _, tokens, _, _ in spy.of("q")) <= 6 + 3 + 1
    assert len(spy.of("q")[1:]) == found.target_forwards < 40
    assert len(spy.of("s")) == found.method["slim_forwards"]


@pytest.mark.parametrize("cache", ["shared", "own"])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_returned_cache_is_the_models_own(pair, cache, rows):
    """Also of rows that ended with tokens that the model had not read."""
    ids, attention = families.prompts((14, 6, 9)[:rows])
    config = lossy(**LONG, slim_cache=cache)
    out = generate(pair, ids, config, attention_mask=attention, max_new_tokens=33, return_dict_in_generate=True)
    assert all(letters[-6:].count("Q") + letters[-6:].count("C") < 6 for letters in out.speculation.method["tier_ids"])
    mask = torch.cat([attention, attention.new_ones(rows, 32)], dim=1)
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    fresh = DynamicCache()
    pair[0](out.sequences[:, :-1], attention_mask=mask, position_ids=places, past_key_values=fresh, use_cache=True)
    assert out.past_key_values.get_seq_length() == out.sequences.shape[1] - 1
    for ours, theirs in zip(out.past_key_values.layers, fresh.layers, strict=True):
        real = mask.bool()[:, None, :, None]
        for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            torch.testing.assert_close(a * real, b * real, rtol=0, atol=1e-9)


@pytest.mark.parametrize("at", [2, 5, 9])
@pytest.mark.parametrize("mode", ["lossy", "lossless"])
def test_an_exception_in_a_slim_pass_leaves_the_model_as_it_was(pair, prompt, at, mode):
    target = pair[0]
    before, state = target(prompt).logits, {name: value.clone() for name, value in target.state_dict().items()}
    children = [list(module._modules.items()) for module in target.modules()]
    implementation = target.config._attn_implementation
    original, count = ModelRunner.forward, [0]
    inside = []

    def fail(*_):
        if inside:
            raise KeyError("raised on purpose")

    def forward(runner, *args, **kwargs):
        if runner.model not in pair:
            count[0] += 1
            if count[0] == at:
                inside.append(True)
        return original(runner, *args, **kwargs)

    handle = target.model.layers[-1].mlp.register_forward_hook(fail)
    config = lossy(**MIXED) if mode == "lossy" else lossless(num_assistant_tokens=1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ModelRunner, "forward", forward)
            with pytest.raises(KeyError, match="on purpose"):
                generate(pair, prompt, config, max_new_tokens=40)
    finally:
        handle.remove()
    assert count[0] == at, "it was a slim pass that failed"
    assert torch.equal(target(prompt).logits, before)
    assert all(torch.equal(value, state[name]) for name, value in target.state_dict().items())
    assert children == [list(module._modules.items()) for module in target.modules()]
    assert target.config._attn_implementation == implementation
    assert not any("forward" in vars(module) for module in target.modules())


# settings at their ends


@pytest.mark.parametrize("gamma", [1, 2, 4])
def test_where_all_escalates_it_is_plain_speculative_decoding(pair, prompt, gamma):
    everything = {"tau_accept": None, "tau_escalate": None, "bonus_min_conf": None}
    new, found = measured(
        pair, prompt, lossy(**{**OFF, **everything, "num_assistant_tokens": gamma}), max_new_tokens=40
    )
    plain = []
    with on_speculation(plain.append):
        out = pair[0].generate(
            prompt, assistant_strategy="assisted", assistant_model=pair[1], num_assistant_tokens=gamma,
            do_sample=False, max_new_tokens=40,
        )  # fmt: skip
    assert new == out[0, prompt.shape[1] :].tolist() and set(found.method["tier_ids"][0]) <= set("CQ")
    for name in ("target_forwards", "accept_lengths", "num_accepted_tokens_per_pos", "num_draft_tokens"):
        assert getattr(found, name) == getattr(plain[0], name), name


def test_the_model_as_drafter_and_slim_verifier_is_kept_always(pair, prompt):
    target = pair[0]
    config = lossy(**BARE, tau_accept=1.0, adapter=mask(()))
    new, found = measured((target, target), prompt, config, max_new_tokens=24)
    assert new == stock(target, prompt, torch.ones_like(prompt), max_new_tokens=24)[0, prompt.shape[1] :].tolist()
    assert found.method["tier_ids"] == ["Q" + 22 * "A" + "Q"]  # nothing is drafted for the last token
    config = lossy(**OFF, tau_accept=1.0, adapter=mask(()))
    _, found = measured((target, target), prompt, config, max_new_tokens=24)
    assert found.method["tier_ids"] == ["Q" + 5 * "AAAS" + "AAS"]
