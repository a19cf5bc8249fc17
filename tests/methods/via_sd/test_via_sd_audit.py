"""VIA-SD's audit is what whole passes say, and thresholds and lengths follow what it finds."""

from __future__ import annotations

import math

import families
import pytest
import torch
from via_sd_cases import LONG, MIXED, OFF, Reference, lossless, lossy, mask, measured, spied

from hf_specdec.generation.methods.via_sd.tiers import Tiers


# audit


def audited(pair, prompt, config, new, found, sample=False):
    """Return what an audit must say of a single row, from passes over the whole text."""
    (letters,) = found.method["tier_ids"]
    reference = Reference(pair, prompt, shared=False, sample=sample)
    last = max(i for i, letter in enumerate(letters) if letter in "CQ")
    rows = []
    with torch.no_grad():
        text = torch.cat([prompt, torch.tensor([new])], dim=1)
        q = torch.softmax(pair[0](text).logits[0, prompt.shape[1] - 1 : -1].double(), dim=-1)
    for place in range(last):
        if letters[place] not in "ABS":
            continue
        before, token = tuple(new[:place]), new[place]
        distribution = reference.p(before) if letters[place] == "A" else reference.s(before, 0)[0]
        rows.append((int(q[place].argmax()) == token, float(q[place, token]), float(distribution[token])))
    over = sorted(share - chance for _, chance, share in rows)
    return {
        "audited": len(rows),
        "match_rate": sum(match for match, _, _ in rows) / len(rows),
        "mean_overshoot": sum(over) / len(over),
        "p99_overshoot": over[min(len(over) - 1, int(0.99 * len(over)))],
        "worst_log_probability": min(math.log(chance) for _, chance, _ in rows),
    }


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("settings", [MIXED, LONG, {**MIXED, "lossy_level": 0.6}])
def test_the_audit_is_what_a_whole_pass_says(pair, prompt, sample, settings):
    config = lossy(**settings, slim_cache="own")
    torch.manual_seed(3)
    new, found = measured(pair, prompt, config, max_new_tokens=60, do_sample=sample, top_k=0)
    expected = audited(pair, prompt, config, new, found, sample)
    assert 0 < expected["match_rate"] < 1 and expected["audited"] > 10
    assert found.method["audit"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    quiet = measured(pair, prompt, config.override(audit=None), max_new_tokens=60)[1].method["audit"]
    assert quiet == {"audited": 0}


def thresholds_over_time(pair, prompt, config, **kwargs):
    """Return tau_accept, regen_min_conf and the running share of misses after every audit."""
    noted, original = [], Tiers._compare

    def compare(self, *args):
        original(self, *args)
        noted.append((self.gate.accept, self.gate.sure, self.audit.missed))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tiers, "_compare", compare)
        measured(pair, prompt, config, **kwargs)
    return noted


def test_tightening_follows_the_audit(pair, prompt):
    start = {"tau_accept": 0.4, "tau_escalate": 0.2, "regen_min_conf": 0.1, "max_pending": 3}
    config = lossy(**{**OFF, **start})
    assert {noted[:2] for noted in thresholds_over_time(pair, prompt, config, max_new_tokens=60)} == {(0.4, 0.1)}
    config = config.override(audit="tighten", audit_target=0.3)
    both = 0
    for noted in (
        thresholds_over_time(pair, prompt, config, max_new_tokens=100),
        # drafts that the model itself would have made: nothing to complain of
        thresholds_over_time(
            (pair[0], pair[0]), prompt, config.override(adapter=mask(()), audit_target=0.1), max_new_tokens=60
        ),
    ):
        accept, regen = 0.4, 0.1
        for new_accept, new_regen, missed in noted:
            target = 0.3 if noted[-1][2] else 0.1
            step = 0.05 if missed > target else -0.01 if missed < target / 2 else 0.0
            accept = max(0.4, min(1.0, accept + step))
            regen = max(0.1, min(1.0, regen + step))
            assert (new_accept, new_regen) == pytest.approx((accept, regen))
            both |= 1 if step > 0 else 2 if step < 0 else 0
    assert both == 3


def test_a_tightened_gate_decides(pair, prompt):
    """The thresholds that rise are the ones in use: fewer tokens of tier A than under the configured ones."""
    config = lossy(**{**OFF, "tau_accept": 0.3, "tau_escalate": 0.25, "max_pending": 3, "bonus_min_conf": None})
    loose = measured(pair, prompt, config, max_new_tokens=100)[1].method["tiers"]
    config = config.override(audit="tighten", audit_target=0.01)
    tight = measured(pair, prompt, config, max_new_tokens=100)[1].method["tiers"]
    assert tight["A"] < loose["A"] - 5


@pytest.mark.parametrize("mode", ["lossy", "lossless"])
def test_the_heuristic_drafts_more_after_whole_blocks(pair, prompt, mode):
    """+2 after a block that stayed whole, -1 after any other, at most 16."""
    target = pair[0]
    for draft, expected in ((target, [3, 5, 7, 9]), (families.build("Llama", seed=9), [3, 2, 1, 1])):
        changes = {"num_assistant_tokens_schedule": "heuristic", "num_assistant_tokens": 3, "adapter": mask(())}
        if mode == "lossy":
            config = lossy(**OFF, tau_accept=1.0, tau_escalate=1.0, **changes)
        else:
            config = lossless(**changes, stage_len=2)
        spy = spied((target, draft), prompt, config, max_new_tokens=60)[2]
        assert [tokens.shape[1] - 1 for _, tokens, _, _ in spy.of("s")[:4]] == expected
