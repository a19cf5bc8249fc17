"""The tiny trained target and draft: drafts that are often right, so that acceptance takes every value from 0 to k."""

from __future__ import annotations

import pytest
import torch
from families import TINY
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_specdec import VegasConfig


@pytest.fixture(scope="module")
def family():
    return [
        AutoModelForCausalLM.from_pretrained(TINY / name, dtype=torch.float32).eval() for name in ("target", "draft")
    ]


@pytest.fixture(scope="module")
def prompts():
    """Four held-out passages of different lengths, left-padded."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ids = tokenizer((TINY / "heldout.txt").read_text(encoding="utf-8"), verbose=False)["input_ids"]
    lengths = (300, 250, 180, 64)
    rows = [ids[5000 * place : 5000 * place + length] for place, length in enumerate(lengths)]
    return {
        "input_ids": torch.tensor([[0] * (lengths[0] - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (lengths[0] - len(row)) + [1] * len(row) for row in rows]),
    }


@pytest.mark.parametrize("drafts", [1, 4, 8])
def test_assisted_greedy_text_is_the_targets_and_half_of_the_drafts_are_accepted(family, prompts, drafts):
    target, draft = family
    options = {**prompts, "max_new_tokens": 60, "do_sample": False, "pad_token_id": 0}
    out = target.generate(
        **options,
        assistant_strategy="assisted",
        assistant_model=draft,
        num_assistant_tokens=drafts,
        return_dict_in_generate=True,
    )
    assert torch.equal(out.sequences, target.generate(**options))
    stats = out.speculation
    # the draft agrees with the target at 69 % of held-out positions (tiny/README.md)
    assert stats.num_accepted_tokens_per_pos[0] / stats.num_drafts > 0.5
    if drafts == 4:
        lengths = {length for row in stats.accept_lengths for length in row}
        assert lengths == {1, 2, 3, 4, 5}, "every number of accepted drafts is to come up"


def test_sampled_drafts_are_accepted_as_often_as_the_distributions_overlap(family, prompts):
    target, draft = family
    torch.manual_seed(0)
    options = {**prompts, "max_new_tokens": 60, "do_sample": True, "top_k": 0, "pad_token_id": 0}
    one = {"assistant_strategy": "assisted", "num_assistant_tokens": 1, "return_dict_in_generate": True}
    stats = target.generate(**options, **one, assistant_model=draft).speculation
    itself = target.generate(**options, **one, assistant_model=target).speculation
    assert 0.4 < stats.acceptance_rate < 1
    assert itself.acceptance_rate == 1, "a draft with the target's own distribution is always accepted"


def test_vegas_drafts_of_a_trained_model_are_mostly_accepted(family, prompts):
    target, _ = family
    options = {**prompts, "max_new_tokens": 60, "do_sample": False, "pad_token_id": 0}
    config = VegasConfig(min_context=0, kv_ratio=0.2, min_tokens=16)
    out = target.generate(**options, assistant_strategy=config, return_dict_in_generate=True)
    assert torch.equal(out.sequences, target.generate(**options))
    assert out.speculation.acceptance_rate > 0.5
