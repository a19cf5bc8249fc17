"""VIA-SD in lossless mode: every rule gives the model's own text, greedy and sampled."""

from __future__ import annotations

import families
import pytest
import torch
from via_sd_cases import ALARM, RULES, SKIP, Reference, generate, lossless, mask, own, p_value, sampled, stock

from hf_specdec.generation import acceptance
from hf_specdec.generation.methods.via_sd import laws


# lossless: every rule gives the model's own text


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gamma, stage", [(1, 2), (4, 8)])
@pytest.mark.parametrize("kind", ["usual", "useless", "whole"])
def test_greedy_lossless_equals_stock(pair, rule, gamma, stage, kind):
    """Also with a slim verifier that resembles the model in nothing, and with one that is the model."""
    skip = {"usual": SKIP, "useless": (1, 4), "whole": ()}[kind]
    ids, attention = families.prompts((14, 6))
    config = lossless(lossless_rule=rule, num_assistant_tokens=gamma, stage_len=stage, adapter=mask(skip))
    expected = stock(pair[0], ids, attention)
    out = generate(pair, ids, config, attention_mask=attention, max_new_tokens=40, return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected)
    method = out.speculation.method
    assert min(method["slim_forwards"], method["stages"], method["candidates"]) > 0
    if kind == "whole":  # what the model itself has chosen stands, whatever the drafter is worth
        assert out.speculation.num_accepted_tokens == out.speculation.num_draft_tokens or rule != "exact"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cache", ["shared", "own"])
def test_greedy_lossless_under_processors_that_read_the_prefix(pair, rule, cache):
    ids, attention = families.prompts((19, 6))
    kwargs = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
    expected = stock(pair[0], ids, attention, **kwargs)
    assert not torch.equal(expected, stock(pair[0], ids, attention))
    config = lossless(lossless_rule=rule, slim_cache=cache)
    out = generate(pair, ids, config, attention_mask=attention, max_new_tokens=40, **kwargs)
    assert torch.equal(out, expected)


@pytest.fixture(scope="module")
def target_distribution(tiny):
    return own(Reference(*tiny, skip=(2, 3), sample=True).q)


FLAT_RULE = {"num_assistant_tokens": 2, "adapter": mask((2, 3), 5), "tau_accept": 0.8, "tau_escalate": 0.4}
LAW_OF = {
    "exact": {},
    "exact, long stages": {"stage_len": 3, "num_assistant_tokens": 1},
    "exact, own cache": {"slim_cache": "own"},
    "exact, stop": {"stage_stop_conf": 0.4},
    "gate": {"lossless_rule": "gate", "regen_min_conf": 0.0},
    "gate, all drawn anew": {"lossless_rule": "gate", "regen_min_conf": 0.0, "tau_accept": 1.0, "tau_escalate": 0.0},
    "gate, own confidence": {"lossless_rule": "gate", "regen_min_conf": 0.4, "num_assistant_tokens": 1},
    "prefilter": {"lossless_rule": "prefilter"},
    "slim": {"drafter": "slim"},
    "draft stop": {"draft_stop": 0.4, "lossless_rule": "gate", "regen_min_conf": 0.0},
}


@pytest.mark.parametrize("name", LAW_OF)
def test_sampled_lossless_text_follows_the_models_distribution(tiny, target_distribution, name):
    torch.manual_seed(11)
    found = sampled(tiny, lossless(**{**FLAT_RULE, **LAW_OF[name]}), calls=8)
    assert p_value(found, target_distribution) > ALARM


def test_sampled_lossless_text_under_point_drafts(tiny, target_distribution):
    torch.manual_seed(11)
    config = lossless(**FLAT_RULE, lossless_rule="gate", regen_min_conf=0.0, drafter="prompt_lookup")
    assert p_value(sampled(tiny, config, calls=8), target_distribution) > ALARM


MUTANTS = {
    "gate: P instead of u": ("gate", "gate_distribution", lambda draft, slim, tier: draft),
    "gate: S instead of u": ("gate", "gate_distribution", lambda draft, slim, tier: slim),
    "gate: tier B not counted": ("gate", "gate_distribution", lambda draft, slim, tier: draft * (tier != 1)),
    "prefilter: P instead of u": ("prefilter", "prefilter_distribution", lambda draft, tier: draft),
    "prefilter: dropped, then drawn from Q": ("prefilter", "prefilter_distribution", None),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_proposal_distribution_is_found(tiny, target_distribution, name, monkeypatch):
    rule, function, mutant = MUTANTS[name]
    sharp = {"tau_accept": 1.0 if rule == "gate" else 0.5, "tau_escalate": 0.0}
    if mutant is None:
        original = acceptance.draw_next

        def from_target(drafts, counts, accepted, target, draft):
            verdict = original(drafts, counts, accepted, target, draft)
            distribution = target.gather(1, accepted[:, None, None].expand(-1, 1, target.shape[-1]))[:, 0]
            plain = acceptance._assemble(drafts, accepted, torch.multinomial(distribution, 1)[:, 0])
            tokens = torch.where((accepted < counts)[:, None], verdict.tokens, plain.tokens)
            return acceptance.Verdict(accepted, tokens)

        monkeypatch.setattr(acceptance, "draw_next", from_target)
    else:
        monkeypatch.setattr(laws, function, mutant)
    torch.manual_seed(11)
    config = lossless(**{**FLAT_RULE, **sharp}, lossless_rule=rule, regen_min_conf=0.0)
    found = sampled(tiny, config, calls=10)
    assert p_value(found, target_distribution) < ALARM
