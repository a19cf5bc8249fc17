"""Sampled sequences follow the target's own distribution: chi-square of whole sequences against exact enumeration."""

from __future__ import annotations

import functools
import itertools

import families
import pytest
import torch
from contract_cases import BASES, VARIANTS
from prefixes import AgainstLastPair
from scipy import stats
from tiers import FULL
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_specdec.generation import acceptance
from hf_specdec.registry import strategy_class


FALSE_ALARM = 1e-3
SAMPLES, PER_CALL = 4000, 500
MOST = ("repetition_penalty", 5, 4)  # four tokens, a processor of the prefix and a warper
PLACES = [*((setting, 8, 3) for setting in ("custom", "temperature", "repetition_penalty", "top_k and top_p")), MOST]
LOSSLESS = [name for name in [*BASES, *VARIANTS] if families.configured(name).lossless]
TOGETHER = [name for name in LOSSLESS if strategy_class(name.partition(":")[0]).batched]


def some_settings():
    """Return who meets what: a base all settings, two of them in `make test`; a preset one."""
    for turn, strategy in enumerate(TOGETHER):
        if strategy in BASES:
            for place, setting in enumerate(PLACES):
                yield pytest.param(strategy, *setting, marks=[] if setting is MOST or place == turn % 4 else FULL)
        else:
            yield pytest.param(strategy, *MOST, marks=FULL)


PROMPT = torch.tensor([[3, 1, 4, 1, 2, 0, 3, 3, 4, 2, 1, 0]])


# (name, keywords of generate, the same in stock's order of processors)
SETTINGS = {
    "temperature": ({"temperature": 1.5}, [TemperatureLogitsWarper(1.5)]),
    "top_k and top_p": (
        {"temperature": 0.8, "top_k": 4, "top_p": 0.9},
        [TemperatureLogitsWarper(0.8), TopKLogitsWarper(4), TopPLogitsWarper(0.9)],
    ),
    "repetition_penalty": (
        {"repetition_penalty": 1.6, "temperature": 1.2},
        [RepetitionPenaltyLogitsProcessor(1.6), TemperatureLogitsWarper(1.2)],
    ),
    "custom": ({"logits_processor": [AgainstLastPair()]}, [AgainstLastPair()]),
}


@functools.cache
def models(vocab):
    """Return a target and a poor assistant."""
    changes = {"vocab_size": vocab, "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.25}
    target = families.build("Llama", seed=vocab, **changes)
    assistant = families.perturbed(target, noise=0.7)
    for model in (target, assistant):
        model.generation_config.pad_token_id = None
    return target, assistant


@functools.cache
def distribution(vocab, length, setting):
    """Return the exact probability of every continuation, in lexical order."""
    processors = LogitsProcessorList(SETTINGS[setting][1])
    target = models(vocab)[0]
    probabilities = torch.ones(1, dtype=torch.float64)
    text = PROMPT
    for _ in range(length):
        logits = target(text).logits[:, -1].float()
        step = torch.softmax(processors(text, logits).double(), dim=-1)
        probabilities = (probabilities[:, None] * step).flatten()
        more = torch.arange(vocab).repeat(len(text))[:, None]
        text = torch.cat([text.repeat_interleave(vocab, dim=0), more], dim=1)
    return probabilities


def sample(strategy, vocab, length, setting, seed, tokens=3, samples=SAMPLES):
    """Return the counts of sampled continuations in the order of `distribution`, and of drafts accepted and made."""
    target, assistant = models(vocab)
    torch.manual_seed(seed)
    found, accepted, drafted = [], 0, 0
    for _ in range(samples // PER_CALL):
        out = families.generate(
            target, strategy, PROMPT, assistant=assistant, tokens=tokens, do_sample=True, max_new_tokens=length,
            num_return_sequences=PER_CALL, return_dict_in_generate=True,
            **{"top_k": 0, **SETTINGS[setting][0]},
        )  # fmt: skip
        found.append(out.sequences[:, PROMPT.shape[1] :])
        if out.speculation is not None:
            accepted += out.speculation.num_accepted_tokens
            drafted += out.speculation.num_draft_tokens
    place = vocab ** torch.arange(length - 1, -1, -1)
    return (torch.cat(found) * place).sum(dim=1), accepted, drafted


def p_value(numbers, probabilities):
    """Return the chi-square test's p-value; outcomes expected fewer than five times are pooled, fewest first."""
    counts = torch.bincount(numbers, minlength=len(probabilities)).double()
    assert not counts[probabilities == 0].any(), "an outcome of probability 0"
    expected = probabilities * len(numbers)
    order = expected.argsort()
    observed_cells, expected_cells, o, e = [], [], 0.0, 0.0
    for index in order.tolist():
        o, e = o + counts[index].item(), e + expected[index].item()
        if e >= 5:
            observed_cells.append(o)
            expected_cells.append(e)
            o = e = 0.0
    observed_cells[-1] += o
    expected_cells[-1] += e
    assert len(observed_cells) > 10
    return stats.chisquare(observed_cells, expected_cells, sum_check=False).pvalue


@pytest.mark.parametrize("strategy, setting, vocab, length", list(some_settings()))
def test_sampled_sequences_follow_the_distribution(strategy, setting, vocab, length):
    numbers, accepted, drafted = sample(strategy, vocab, length, setting, seed=11)
    assert p_value(numbers, distribution(vocab, length, setting)) > FALSE_ALARM
    if strategy != "plain":
        assert 0 < accepted < drafted  # both outcomes of the rule were met


@pytest.mark.parametrize(
    "strategy",
    [pytest.param(name, marks=[] if name in BASES else FULL) for name in LOSSLESS if name not in TOGETHER],
)
def test_sampled_sequences_of_rows_in_turn_follow_the_distribution(strategy):
    """One setting, fewer samples: each is decoded by itself. The methods' own files go through every random path."""
    numbers, accepted, drafted = sample(strategy, 5, 4, "repetition_penalty", seed=11, samples=1500)
    assert p_value(numbers, distribution(5, 4, "repetition_penalty")) > FALSE_ALARM
    assert 0 < accepted < drafted


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_enumeration_is_a_distribution(setting):
    assert distribution(8, 3, setting).sum().item() == pytest.approx(1.0)
    assert distribution(8, 3, setting).shape == (8**3,)


@pytest.mark.parametrize("mutant", ["all drafts accepted", "wrong draft distribution", "residual forgotten"])
def test_a_wrong_rule_is_found(mutant, monkeypatch):
    if mutant == "all drafts accepted":
        monkeypatch.setattr(
            acceptance, "acceptance_probability", lambda drafts, *_: torch.ones(drafts.shape, dtype=torch.float64)
        )
    elif mutant == "wrong draft distribution":
        original = acceptance.speculative_sample

        def wrong(drafts, counts, target, draft):
            return original(drafts, counts, target, None if draft is None else draft.roll(1, dims=-1))

        monkeypatch.setattr(acceptance, "speculative_sample", wrong)
    else:
        monkeypatch.setattr(acceptance, "residual_distribution", lambda target, draft: target)
    numbers, _, _ = sample("assisted", 8, 3, "temperature", seed=11)
    assert p_value(numbers, distribution(8, 3, "temperature")) < FALSE_ALARM


def test_another_distribution_is_found():
    """The test tells distributions apart that differ by a warper only."""
    numbers, _, _ = sample("assisted", 8, 3, "temperature", seed=11)
    assert p_value(numbers, distribution(8, 3, "repetition_penalty")) < FALSE_ALARM


def test_every_outcome_has_its_number():
    table = list(itertools.product(range(5), repeat=4))
    place = 5 ** torch.arange(3, -1, -1)
    assert (torch.tensor(table) * place).sum(dim=1).tolist() == list(range(5**4))
