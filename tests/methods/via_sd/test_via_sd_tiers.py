"""VIA-SD's tiers: greedy and sampled calls against a cache-free reference, and the distributions by themselves."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from prefixes import AgainstLastPair
from transformers.generation.logits_process import (
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)
from via_sd_cases import (
    ALARM,
    BARE,
    CALLS,
    LAYERS,
    LENGTH,
    MIXED,
    OFF,
    PER_CALL,
    Reference,
    check_greedy,
    generate,
    lossy,
    mask,
    measured,
    p_value,
    sampled,
)

from hf_specdec.generation import acceptance
from hf_specdec.generation.methods.via_sd import laws
from hf_specdec.generation.methods.via_sd.laws import Gate


LOSSY = {
    "mixed": MIXED,
    "paper": {"tau_accept": 0.7, "tau_escalate": 0.5, **BARE},
    "safe": {"regen_min_conf": 0.15, "bonus_min_conf": 0.15, "max_pending": 6},
    "token": {**MIXED, "tau_accept": 0.9, "tau_escalate": 0.6, "escalate_scope": "token"},
    "block": {**MIXED, "tau_accept": 0.9, "tau_escalate": 0.6},
    "half": {**MIXED, "lossy_level": 0.5},
    "one pending": {**MIXED, "max_pending": 1},
    "rare": {**OFF, "tau_accept": 0.7, "tau_escalate": 0.01},
}


@pytest.mark.parametrize("gamma", [1, 4])
@pytest.mark.parametrize("cache", ["shared", "own"])
@pytest.mark.parametrize("name", LOSSY)
def test_greedy_tiers_are_the_published_ones(pair, prompt, name, cache, gamma):
    config = lossy(**LOSSY[name], slim_cache=cache, num_assistant_tokens=gamma)
    found = check_greedy(pair, prompt, config)
    tiers = found.method["tiers"]
    assert sum(tiers.values()) == 40 and Counter(found.method["tier_ids"][0]) == {k: v for k, v in tiers.items() if v}
    if name in ("mixed", "block", "token") and gamma > 1:
        assert min(tiers[letter] for letter in "ABC") > 0


@pytest.mark.parametrize("cache", ["shared", "own"])
def test_greedy_tiers_under_processors_that_read_the_prefix(pair, prompt, cache):
    chain = (RepetitionPenaltyLogitsProcessor(1.4), NoRepeatNGramLogitsProcessor(2), AgainstLastPair())
    config = lossy(**MIXED, slim_cache=cache)
    reference = Reference(pair, prompt, shared=cache == "shared", processors=chain)
    kwargs = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "logits_processor": [AgainstLastPair()]}
    with_them = check_greedy(pair, prompt, config, reference=reference, **kwargs)
    assert with_them.method["tier_ids"] != measured(pair, prompt, config, max_new_tokens=40)[1].method["tier_ids"]


@pytest.mark.parametrize("skip", [(4, 7), (1, 5, 6)])
@pytest.mark.parametrize("cache", ["shared", "own"])
def test_greedy_tiers_without_halves_of_layers(pair, prompt, cache, skip):
    config = lossy(**MIXED, slim_cache=cache, adapter=mask(skip, 2 * LAYERS, "sublayer"))
    reference = Reference(pair, prompt, skip, "sublayer", shared=cache == "shared")
    check_greedy(pair, prompt, config, reference=reference)


# settings under which all tiers come up for flat distributions of four words
FLAT = {**OFF, "tau_accept": 0.8, "tau_escalate": 0.4, "num_assistant_tokens": 2, "adapter": mask((2, 3), 5)}
SAMPLED = {
    "tiers": {"bonus_min_conf": 0.4},
    "token scope": {"escalate_scope": "token", "bonus_min_conf": 0.4, "tau_escalate": 0.5},
    "own confidence": {"regen_min_conf": 0.45, "bonus_min_conf": 0.45},
    "half": {"lossy_level": 0.5},
}


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_tokens_and_tiers_follow_the_distribution(tiny, name):
    config = lossy(**{**FLAT, **SAMPLED[name]}, slim_cache="own")
    distribution = Reference(*tiny, skip=(2, 3), shared=False, sample=True).lossy(config, LENGTH)
    shares = Counter()
    for (_, letters), mass in distribution.items():
        shares.update({letter: mass * count for letter, count in Counter(letters).items()})
    assert all(shares[letter] > 0.05 for letter in "ABC")
    torch.manual_seed(5)
    assert p_value(sampled(tiny, config), distribution) > ALARM


def test_sampled_tiers_with_warpers(tiny):
    config = lossy(**{**FLAT, **SAMPLED["tiers"]}, slim_cache="own")
    chain = (TemperatureLogitsWarper(0.7), TopKLogitsWarper(3))
    distribution = Reference(*tiny, skip=(2, 3), shared=False, sample=True, processors=chain).lossy(config, LENGTH)
    torch.manual_seed(6)
    assert p_value(sampled(tiny, config, temperature=0.7, top_k=3), distribution) > ALARM


@pytest.mark.parametrize("mutant", ["gate", "residual"])
def test_a_wrong_distribution_of_tiers_is_found(tiny, mutant, monkeypatch):
    config = lossy(**{**FLAT, **SAMPLED["tiers"]}, slim_cache="own")
    distribution = Reference(*tiny, skip=(2, 3), shared=False, sample=True).lossy(config, LENGTH)
    if mutant == "gate":
        original = laws.tiers

        def wider(log_ratio, confidence, gate, **kwargs):
            gate = gate._replace(accept=0.9 * gate.accept, escalate=0.9 * gate.escalate)
            return original(log_ratio, confidence, gate, **kwargs)

        monkeypatch.setattr(laws, "tiers", wider)
    else:
        monkeypatch.setattr(acceptance, "residual_distribution", lambda target, draft: target)
    torch.manual_seed(5)
    found = sampled(tiny, config)
    assert set(found) - set(distribution) or p_value(found, distribution) < ALARM


def test_the_coupled_distribution_is_that_of_tiers_a_and_b(tiny):
    """Rounds end elsewhere, tokens have one distribution: drafts in T, the slim verifier's draws for all others."""
    settings = {**FLAT, "tau_escalate": 0.0, "bonus_min_conf": None, "slim_cache": "own", "num_assistant_tokens": 1}
    distribution = {}
    for (tokens, _), mass in (
        Reference(*tiny, skip=(2, 3), shared=False, sample=True).lossy(lossy(**settings), LENGTH).items()
    ):
        distribution[tokens, ""] = distribution.get((tokens, ""), 0.0) + mass
    stayed = []
    for coupled in (True, False):
        config = lossy(**settings, coupled=coupled)
        found, accepted, drafted = Counter(), 0, 0
        torch.manual_seed(7)
        for _ in range(CALLS):
            out = generate(
                tiny[0], tiny[1], config, do_sample=True, top_k=0, max_new_tokens=LENGTH,
                num_return_sequences=PER_CALL, return_dict_in_generate=True,
            )  # fmt: skip
            found.update((tuple(row), "") for row in out.sequences[:, tiny[1].shape[1] :].tolist())
            accepted += out.speculation.num_accepted_tokens
            drafted += out.speculation.num_draft_tokens
        assert p_value(found, distribution) > ALARM
        stayed.append(accepted / drafted)
    assert stayed[0] > stayed[1] + 0.02, "coupling keeps more drafts"


# the distributions by themselves


def random_distributions(seed, vocab=8, rows=50):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(rows, vocab, generator=generator, dtype=torch.float64).pow(3).mul(4).softmax(-1) for _ in "psq"]


def tiers_of(s, accept, escalate, regen=0.0):
    """Return tiers of all words by the definition: 0, 1 and 2 for A, B and C."""
    top = s.max(dim=-1, keepdim=True).values
    ratio = s / top
    below = torch.where((ratio >= escalate) & (top >= regen), 1, 2)
    return torch.where(ratio >= accept, 0, below)


@pytest.mark.parametrize(
    "accept, escalate, regen", [(0.7, 0.5, 0.0), (0.9, 0.1, 0.2), (0.5, 0.0, 0.0), (1.0, 1.0, 0.0)]
)
def test_tiers_and_distributions_by_enumeration(accept, escalate, regen):
    p, s, q = random_distributions(3)
    tier = tiers_of(s, accept, escalate, regen)
    log_ratio, confidence = laws.slim_ratio(s.log() + 3.0)
    found = laws.tiers(log_ratio, confidence[:, None], Gate(accept, escalate, regen))
    assert torch.equal(found, tier)
    torch.testing.assert_close(confidence.double(), s.max(-1).values, rtol=1e-6, atol=0)
    lossy, gate = torch.zeros_like(p), torch.zeros_like(p)
    for row, word in itertools.product(range(len(p)), range(p.shape[1])):
        mass, distribution = float(p[row, word]), torch.zeros(p.shape[1], dtype=torch.float64)
        if tier[row, word] == 1:
            distribution += s[row]
            gate[row] += mass * s[row]
        else:
            gate[row, word] += mass
        if tier[row, word] == 0:
            distribution[word] += 1
        if tier[row, word] == 2:
            stay = min(1.0, float(q[row, word]) / mass)
            rest = (q[row] - p[row]).clamp(min=0)
            distribution[word] += stay
            distribution += (1 - stay) * rest / rest.sum()
        lossy[row] += mass * distribution
    torch.testing.assert_close(laws.tiered_distribution(p, s, q, tier), lossy, rtol=0, atol=1e-12)
    torch.testing.assert_close(laws.gate_distribution(p, s, tier), gate, rtol=0, atol=1e-12)
    assert torch.equal(laws.prefilter_distribution(p, tier), torch.where(tier == 0, p, 0))
    if not escalate:
        torch.testing.assert_close(laws.coupled_distribution(p, s, tier), lossy, rtol=0, atol=1e-12)
        # speculative sampling against it keeps at least the drafts of tier A, and emits this distribution
        both = laws.coupled_distribution(p, s, tier)
        keep = torch.minimum(p, both)
        out = keep + (1 - keep.sum(-1, keepdim=True)) * acceptance.residual_distribution(both, p)
        torch.testing.assert_close(out, lossy, rtol=0, atol=1e-12)
        assert bool((keep[tier == 0] >= p[tier == 0] - 1e-12).all())
        assert float(keep.sum()) > float(p[tier == 0].sum()) + 1


def test_extreme_logits_have_a_ratio():
    """No softmax, so nothing underflows: a word 200 nats below the best one has log r = -200."""
    log_ratio, confidence = laws.slim_ratio(torch.tensor([[300.0, 100.0, -torch.inf]], dtype=torch.float64))
    assert log_ratio.tolist() == [[0.0, -200.0, -math.inf]] and confidence.item() == 1.0
    found = laws.tiers(log_ratio, confidence[:, None], Gate(math.exp(-150), math.exp(-250)))
    assert found.tolist() == [[0, 1, 2]]


def test_what_no_value_reaches_is_never_decided_by_the_slim_verifier():
    log_ratio, confidence = laws.slim_ratio(torch.tensor([[9.0, 8.9, 0.0]]))
    never = math.inf
    for gate, expected in (
        (Gate(never, never, 0.0), [2, 2, 2]), (Gate(never, 0.0, 0.0), [1, 1, 1]), (Gate(0.9, 0.5, never), [0, 0, 2]),
        (Gate(never, 0.5, 0.0), [1, 1, 2]), (Gate(1.0, 0.5, never), [0, 2, 2]),
    ):  # fmt: skip
        assert laws.tiers(log_ratio, confidence[:, None], gate).tolist() == [expected]
