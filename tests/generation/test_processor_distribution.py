"""Samples under processors that remember follow the model's distribution: in lock-step, and column by column."""

from __future__ import annotations

import functools

import pytest
import torch
from families import build, generate, perturbed
from prefixes import AgainstLastPair
from scipy import stats
from tiers import FULL
from transformers import LogitsProcessor


class LastPair(LogitsProcessor):
    """Depends on the last two tokens and the length, like `AgainstLastPair`, but only knows what it has been shown."""

    def __init__(self, opaque):
        self.pair, self.length, self.hidden = None, 0, iter(()) if opaque else None

    def __call__(self, input_ids, scores):
        self.pair = input_ids[:, -2:] if self.pair is None else torch.stack([self.pair[:, 1], input_ids[:, -1]], dim=1)
        self.length = self.length + 1 if self.length else input_ids.shape[1]
        index = (self.pair[:, 1] + 2 * self.pair[:, 0] + self.length) % scores.shape[1]
        return scores.scatter_add(1, index[:, None], torch.full_like(scores[:, :1], 1.5))


VOCAB, LENGTH, SAMPLES = 5, 3, 1200
PROMPT = torch.tensor([[3, 1, 4, 1, 2, 0, 3, 3, 4, 2, 1, 0]])


@functools.cache
def small():
    """Return a target, a poor assistant and the exact probabilities of every continuation, in lexical order."""
    changes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.25}
    target = build("Llama", seed=VOCAB, **changes)
    target.generation_config.pad_token_id = None
    probabilities, text = torch.ones(1, dtype=torch.float64), PROMPT
    with torch.no_grad():
        for _ in range(LENGTH):
            step = torch.softmax(AgainstLastPair()(text, target(text).logits[:, -1]), dim=-1)
            probabilities = (probabilities[:, None] * step).flatten()
            text = torch.cat([text.repeat_interleave(VOCAB, 0), torch.arange(VOCAB).repeat(len(text))[:, None]], dim=1)
    return target, perturbed(target, noise=0.7), probabilities


SAMPLED = [
    ("assisted", False, 3),
    ("assisted", True, 3),
    pytest.param("assisted", True, 1, marks=FULL),
    pytest.param("assisted", False, 1, marks=FULL),
    pytest.param("prompt_lookup", True, 2, marks=FULL),
    pytest.param("via_sd:prefilter", True, 3, marks=FULL),
    pytest.param("via_sd:prefilter", False, 3, marks=FULL),
    pytest.param("vegas", True, 2, marks=FULL),
]


@pytest.mark.parametrize("strategy, opaque, rows", SAMPLED)
def test_sampled_sequences_follow_the_distribution(strategy, opaque, rows):
    """In lock-step, judged at once or column by column, each row still follows the model's own distribution."""
    target, assistant, probabilities = small()
    torch.manual_seed(5)
    places, found, accepted = VOCAB ** torch.arange(LENGTH - 1, -1, -1), [], 0
    for _ in range(SAMPLES // rows):
        out = generate(
            target, strategy, PROMPT.expand(rows, -1), assistant=assistant, tokens=2, do_sample=True, top_k=0,
            max_new_tokens=LENGTH, logits_processor=[LastPair(opaque)], return_dict_in_generate=True,
        )  # fmt: skip
        found.append((out.sequences[:, PROMPT.shape[1] :] * places).sum(dim=1))
        accepted += 0 if out.speculation is None else out.speculation.num_accepted_tokens
    assert accepted > 0
    counts, expected = torch.bincount(torch.cat(found), minlength=VOCAB**LENGTH).double(), probabilities * SAMPLES
    rare = expected < 6
    cells = [torch.cat([part[~rare], part[rare].sum()[None]]) for part in (counts, expected)]
    assert len(cells[0]) > 20
    assert stats.chisquare(*cells, sum_check=False).pvalue > 1e-3
