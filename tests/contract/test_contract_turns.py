"""The contract on caches: what comes back, second turns, a cache of the caller, and every round's cache."""

from __future__ import annotations

import functools

import families
import pytest
import torch
from contract_cases import BASES, VARIANTS, every_base, grown, in_families, new_tokens, some_families, stock_tokens
from families import SLIDING, family
from transformers import (
    DynamicCache,
)

from hf_specdec.registry import strategy_class


# calls that are made under stock and under every preset


def with_cache(model):
    """Return a call whose cache comes back."""
    return {**model.batch, "max_new_tokens": 20, "eos_token_id": model.eos, "return_dict_in_generate": True}


def second_turn(model, text):
    """Return what goes with `text` and a returned cache."""
    mask = grown(model.mask, text.shape[1])
    return {"attention_mask": mask, "max_new_tokens": 20, "return_dict_in_generate": True}


@functools.cache
def stock_caches(name):
    """Return stock's output with its cache, which nothing may write to."""
    model = family(name)
    return model.stock(**with_cache(model))


@functools.cache
def stock_turns(name):
    """Return the text of a second turn over stock's own cache, and stock's answer; nothing may write to its cache."""
    model = family(name)
    first = model.stock(**model.batch, max_new_tokens=11, return_dict_in_generate=True)
    text = torch.cat([first.sequences, families.prompts((5, 5, 5, 5), seed=7)[0]], dim=1)
    return text, model.stock(text, past_key_values=first.past_key_values, **second_turn(model, text))


@torch.no_grad()
def fresh_keys(model, tokens):
    """Return keys and values of each layer from one stock forward over a single row."""
    cache = DynamicCache()
    model(tokens[None], past_key_values=cache, use_cache=True)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def same_cache(cache, expected, mask, tolerance):
    """Compare two caches in stock's layout at the real columns of `mask`."""
    assert type(cache) is type(expected)
    assert cache.get_seq_length() == expected.get_seq_length()
    for ours, theirs in zip(cache.layers, expected.layers, strict=True):
        assert type(ours) is type(theirs)
        assert ours.keys.shape == theirs.keys.shape
        real = mask[:, : cache.get_seq_length()][:, -ours.keys.shape[2] :].bool()[:, None, :, None]
        for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            torch.testing.assert_close(a * real, torch.where(real, b, 0), rtol=0, atol=tolerance)


@in_families(BASES)
def test_returned_cache_equals_stock(strategy, name):
    model = family(name)
    expected, out = stock_caches(name), model.ours(strategy, **with_cache(model))
    assert torch.equal(out.sequences, expected.sequences)
    mask = grown(model.mask, out.sequences.shape[1])
    same_cache(out.past_key_values, expected.past_key_values, mask, 10 * model.tolerance)


@in_families([*BASES, *VARIANTS])
def test_second_turn_with_the_returned_cache(strategy, name):
    model = family(name)
    text, theirs = stock_turns(name)
    out = model.ours(strategy, **model.batch, max_new_tokens=11, return_dict_in_generate=True)
    assert torch.equal(out.sequences, text[:, : out.sequences.shape[1]])
    ours = model.ours(strategy, text, past_key_values=out.past_key_values, **second_turn(model, text))
    assert torch.equal(ours.sequences, theirs.sequences)
    assert ours.past_key_values is out.past_key_values
    mask = grown(model.mask, ours.sequences.shape[1])
    same_cache(ours.past_key_values, theirs.past_key_values, mask, 100 * model.tolerance)


@every_base
@some_families
def test_a_cache_of_the_caller_is_updated_in_place_over_turns(strategy, name):
    model = family(name)
    caches = [DynamicCache(config=model.model.config) for _ in range(2)]
    text, mask = model.ids, model.mask
    for turn in range(3):
        kwargs = {"attention_mask": mask, "max_new_tokens": 7}
        expected = model.stock(text, past_key_values=caches[0], **kwargs)
        out = model.ours(strategy, text, past_key_values=caches[1], **kwargs)
        assert torch.equal(out, expected), f"turn {turn}"
        assert caches[1].get_seq_length() == caches[0].get_seq_length() == out.shape[1] - 1
        text = torch.cat([out, families.prompts((4, 4, 4, 4), seed=turn)[0]], dim=1)
        mask = grown(mask, text.shape[1])
    same_cache(caches[1], caches[0], mask, 100 * model.tolerance)


@every_base
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_second_turn_over_a_cache_with_masked_columns_inside(strategy, name):
    """Rows that ended early are padded in the middle of the text; the next turn's mask leaves that out."""
    assert name not in SLIDING  # stock counts a window in columns, so masked ones shorten it there
    model = family(name)
    first = {**model.batch, "max_new_tokens": 24, "eos_token_id": model.eos, "return_dict_in_generate": True}
    expected, out = model.stock(**first), model.ours(strategy, **first)
    text = torch.cat([expected.sequences, families.prompts((5, 5, 5, 5), seed=7)[0]], dim=1)
    mask = grown(model.mask, text.shape[1])
    width = model.ids.shape[1]
    for row, kept in enumerate(new_tokens(expected.sequences, width, model.eos)):
        mask[row, width + len(kept) : expected.sequences.shape[1]] = 0
    assert not mask[:, width:].all()
    turn = {"attention_mask": mask, "max_new_tokens": 20}
    theirs = model.stock(text, past_key_values=expected.past_key_values, **turn)
    ours = model.ours(strategy, text, past_key_values=out.past_key_values, **turn)
    assert torch.equal(ours, theirs)


@every_base
def test_second_turn_from_a_cache_that_holds_all_but_one_token(strategy, llama):
    """The shortest legal continuation: nothing but the pending token is new."""
    first = {**llama.one, "max_new_tokens": 6, "return_dict_in_generate": True}
    expected, out = llama.stock(**first), llama.ours(strategy, **first)
    theirs = llama.stock(expected.sequences, past_key_values=expected.past_key_values, max_new_tokens=10)
    ours = llama.ours(strategy, out.sequences, past_key_values=out.past_key_values, max_new_tokens=10)
    assert torch.equal(ours, theirs)


@in_families([*BASES, *VARIANTS])
def test_cache_after_every_round_equals_a_fresh_forward(strategy, name, monkeypatch):
    model, cls = family(name), strategy_class(strategy.partition(":")[0])
    original, seen, texts = cls.commit, [], {}
    in_flight = cls.config_class.strategy == "spd"  # tokens that no round has judged yet stay in its caches

    def commit(self, state, kept):
        original(self, state, kept)
        for slot, row in enumerate(state.active):
            texts[row] = state.text.tokens[row, : state.committed[slot]].clone()
            for index, layer in enumerate(state.target.cache.layers):
                clean = self.clean_length(state, index, row)
                assert 0 < clean <= len(texts[row])
                length = int(layer.lengths[slot])
                assert length == clean or (in_flight and length > clean)
                held = (layer.keys[slot, :, :clean].clone(), layer.values[slot, :, :clean].clone())
                seen.append((row, index, *held))

    monkeypatch.setattr(cls, "commit", commit)
    out = model.ours(strategy, **model.batch, max_new_tokens=16, eos_token_id=model.eos)
    assert torch.equal(out, stock_tokens(name, 4, 16))
    # nothing looks ahead, so what one forward over a row's whole text gives is also right for each shorter one
    fresh = {row: fresh_keys(model.model, text) for row, text in texts.items()}
    assert len(fresh) == 4
    for row, index, *held in seen:
        for ours, theirs in zip(held, fresh[row][index], strict=True):
            torch.testing.assert_close(ours, theirs[:, : ours.shape[1]], rtol=0, atol=10 * model.tolerance)
