"""The contract, part one: greedy ids equal stock's, and so does what comes beside them."""

from __future__ import annotations

import functools

import families
import pytest
import torch
from contract_cases import (
    BASES,
    VARIANTS,
    every_base,
    every_preset_and_some_families,
    in_families,
    new_tokens,
    some_families,
    stock_text,
    stock_tokens,
)
from families import NAMES, family


LOSSLESS = [name for name in [*BASES, *VARIANTS] if families.configured(name).lossless]


def scored(model):
    """Return a call with scores, which a processor changes, and logits."""
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    return {**model.batch, **wanted, "max_new_tokens": 24, "eos_token_id": model.eos, "repetition_penalty": 1.3}


@functools.cache
def stock_scores(name):
    """Return stock's output with scores and logits."""
    return family(name).stock(**scored(family(name)))


# tokens


@in_families(LOSSLESS)
@pytest.mark.parametrize("rows, tokens", [(1, 3), (4, 5)])
def test_greedy_ids_equal_stock(strategy, name, rows, tokens):
    model = family(name)
    for new in (1, 2, 3, 50):
        expected = stock_tokens(name, rows, new)
        out = model.ours(strategy, **model.inputs(rows), tokens=tokens, max_new_tokens=new, eos_token_id=model.eos)
        assert torch.equal(out, expected), f"max_new_tokens={new}"


@pytest.mark.parametrize("name", NAMES)
def test_the_families_try_something(name):
    """Texts are varied, rows end at different columns, and drafts are accepted now and then."""
    model = family(name)
    text = model.stock(**model.batch, max_new_tokens=50)[:, model.ids.shape[1] :]
    assert sum(len(row.unique()) for row in text) >= 24
    ended = model.stock(**model.batch, max_new_tokens=50, eos_token_id=model.eos)
    ends = [len(row) for row in new_tokens(ended, model.ids.shape[1], model.eos)]
    assert min(ends) < 50
    assert len(set(ends)) > 1
    out = model.ours("assisted", **model.batch, max_new_tokens=50, return_dict_in_generate=True)
    per_pos = out.speculation.num_accepted_tokens_per_pos
    assert 0 < per_pos[-1] <= per_pos[0] < out.speculation.num_drafts


@every_preset_and_some_families
def test_eos_inside_a_draft_and_eos_lists(strategy, name):
    model, text = family(name), stock_text(name, 4)
    # tokens of the text as EOS in turn meet every place of a draft, and every other one stands in a list
    for index, token in enumerate(text[1].unique().tolist()[:8]):
        ends = [token, int(text[0, 9])] if index % 2 else [token]
        eos = ends if index % 2 else token
        out = model.ours(strategy, **model.batch, max_new_tokens=24, eos_token_id=eos, tokens=5)
        assert torch.equal(out, stock_tokens(name, 4, 24, *ends)), eos


@every_base
def test_prompt_of_one_token(strategy, llama):
    ids = torch.tensor([[5]])
    expected = llama.stock(ids, max_new_tokens=12)
    assert torch.equal(llama.ours(strategy, ids, max_new_tokens=12), expected)


@every_base
def test_max_length_instead_of_max_new_tokens(strategy, llama):
    expected = llama.stock(**llama.batch, max_length=31)
    assert torch.equal(llama.ours(strategy, **llama.batch, max_length=31), expected)


@every_base
def test_positional_arguments(strategy, llama):
    expected = llama.stock(llama.ids[:1], max_new_tokens=9)
    assert torch.equal(llama.ours(strategy, llama.ids[:1], max_new_tokens=9), expected)


# what comes beside the tokens


@every_base
@some_families
def test_scores_and_logits_equal_stock(strategy, name):
    model = family(name)
    expected, out = stock_scores(name), model.ours(strategy, **scored(model))
    assert torch.equal(out.sequences, expected.sequences)
    for field in ("scores", "logits"):
        ours, theirs = getattr(out, field), getattr(expected, field)
        assert isinstance(ours, tuple)
        assert len(ours) == len(theirs) == out.sequences.shape[1] - model.ids.shape[1]
        for column, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m, c=column, f=field: f"{f} {c}: {m}")


@every_base
def test_return_dict_on_and_off(strategy, llama):
    kwargs = {**llama.batch, "max_new_tokens": 9}
    out = llama.ours(strategy, **kwargs, return_dict_in_generate=True)
    assert torch.equal(llama.ours(strategy, **kwargs), out.sequences)
    assert out.scores is None and out.logits is None
    assert out.attentions is None and out.hidden_states is None
    assert (out.speculation is None) == (strategy == "plain")
