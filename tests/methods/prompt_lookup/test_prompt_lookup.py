"""Prompt lookup drafts what followed the newest words; the contract suite tests the rest."""

from __future__ import annotations

import families
import pytest
import torch

from hf_specdec import DiversedConfig, PromptLookupConfig
from hf_specdec.generation.methods.prompt_lookup import LookupDrafter


def follow(text, room=10, size=2):
    drafter = LookupDrafter(PromptLookupConfig(max_matching_ngram_size=size))
    return drafter._follow(torch.tensor(text), room).tolist()


@pytest.mark.parametrize(
    "text, expected",
    [
        ([1, 2, 3, 4, 1, 2], [3, 4, 1, 2]),  # the pair came before
        ([1, 2, 3, 5, 2, 9, 7, 2], [3, 5, 2, 9, 7, 2]),  # the pair did not, the newest word did
        ([1, 2, 3], []),
        ([7], []),
        ([5, 5], [5]),
        ([5, 5, 5, 5], [5, 5]),
    ],
)
def test_what_followed(text, expected):
    assert follow(text) == expected


def test_room_and_length_are_kept():
    assert follow([1, 2, 3, 4, 5, 1, 2], room=2) == [3, 4]
    assert follow([1, 2, 3, 4, 5, 1, 2], room=0) == []
    assert follow([8, 2, 3, 1, 2, 4, 8, 2], size=2) == [3, 1, 2, 4, 8, 2]
    assert follow([8, 2, 3, 1, 2, 4, 8, 2], room=3, size=1) == [4, 8, 2]  # the latest place that enough words follow
    assert follow([8, 2, 3, 1, 2, 4, 8, 2], room=4, size=1) == [3, 1, 2, 4]


def test_repeating_text_is_accepted_in_long_runs():
    """A model that repeats its prompt for ever takes whole drafts, of rows that differ in length."""
    model = families.build("Llama", tie_word_embeddings=True, initializer_range=0.05)
    ids, mask = families.prompts()
    out = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=40, assistant_strategy="prompt_lookup",
        return_dict_in_generate=True,
    )  # fmt: skip
    assert torch.equal(out.sequences, model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=40))
    assert out.speculation.mean_tokens_per_step > 3
    assert out.speculation.draft_forwards == 0


def test_it_drafts_for_another_strategy():
    llama = families.family("llama")
    config = DiversedConfig(drafter=PromptLookupConfig(), weight=1.0)
    out = llama.model.generate(**llama.batch, do_sample=False, max_new_tokens=30, assistant_strategy=config)
    assert torch.equal(out, llama.stock(**llama.batch, max_new_tokens=30))


def test_bad_sizes():
    with pytest.raises(ValueError, match="max_matching_ngram_size.*at least 1, got 0"):
        PromptLookupConfig(max_matching_ngram_size=0)
