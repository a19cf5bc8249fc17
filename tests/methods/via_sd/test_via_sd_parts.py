"""The parts of VIA-SD's lossy rounds by themselves: the schedule, the audit and its tightening, a row's decision."""

from __future__ import annotations

import math

import pytest
import torch

from hf_specdec.generation.methods.via_sd.audit import Audit, tightened
from hf_specdec.generation.methods.via_sd.laws import ACCEPT, ESCALATE, REGENERATE, Gate, Scored
from hf_specdec.generation.methods.via_sd.tiers import RoundSchedule, _common, _decided


@pytest.mark.parametrize("level", [0.0, 0.1, 0.25, 1 / 3, 0.5, 0.9, 1.0])
def test_the_schedule_spreads_the_share_evenly(level):
    schedule = RoundSchedule(level, None)
    kinds = [schedule.next([10**6]) for _ in range(60)]
    for count in range(1, 61):
        assert kinds[:count].count("strict") == math.floor(count * (1 - level) + 1e-9)
    assert set(kinds) <= {"strict", "tiered"}


def test_the_limit_is_one_of_tokens_in_any_row():
    schedule = RoundSchedule(1.0, 4)
    assert [schedule.next(unread) for unread in ([0, 3], [4, 0], [0, 5], [3, 3])] == [
        "tiered", "forced", "forced", "tiered",
    ]  # fmt: skip
    assert RoundSchedule(0.0, 4).next([9]) == "strict", "a round that the share takes is not counted as forced"


def test_an_audit_counts_by_definition():
    audit = Audit(2)
    scores = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, -torch.inf], [0.0, 0.0, 9.0]])
    q = scores.softmax(-1)
    audit.compare([], scores)
    assert audit.to_dict() == {"audited": 0}
    audit.compare([(0, 0.9), (2, 0.5)], scores)
    missed = 0.0
    for match in (1, 0):
        missed += 0.1 * ((1 - match) - missed)
    assert audit.missed == pytest.approx(missed)
    found = audit.to_dict()
    assert (found["audited"], found["match_rate"]) == (2, 0.5)
    assert found["mean_overshoot"] == pytest.approx((0.9 - float(q[0, 0]) + 0.5) / 2)
    assert found["worst_log_probability"] == -1e4, "the model excludes it"


def test_tightening_stays_between_what_is_configured_and_one():
    configured = gate = Gate(0.4, 0.2, 0.1)
    for _ in range(20):
        gate = tightened(gate, configured, 0.3, 0.1)
    assert gate == Gate(1.0, 0.2, 1.0)
    assert tightened(gate, configured, 0.08, 0.1) == gate, "between half the target and the target nothing moves"
    gate = tightened(gate, configured, 0.0, 0.1)
    assert gate == pytest.approx((0.99, 0.2, 0.99))
    for _ in range(100):
        gate = tightened(gate, configured, 0.0, 0.1)
    assert gate == configured
    never = Gate(math.inf, math.inf, math.inf)
    assert tightened(never, never, 0.0, 0.1) == tightened(never, never, 1.0, 0.1) == never


SLIM = Scored(torch.zeros(0), torch.zeros(0))


@pytest.mark.parametrize(
    "tier, own, ends, bonus, tokens, letters, escalate",
    [
        ([ACCEPT] * 3, [9] * 4, [], True, [1, 2, 3, 9], "AAAS", None),
        ([ACCEPT] * 3, [9] * 4, [], False, [1, 2, 3], "AAA", None),
        ([ACCEPT, REGENERATE, ACCEPT], [9, 2, 9, 8], [], True, [1, 2, 3, 8], "ABAS", None),
        ([ACCEPT, REGENERATE, ACCEPT], [9] * 4, [], True, [1, 9], "AB", None),
        ([ACCEPT, ESCALATE, ACCEPT], [9] * 4, [], True, [1], "A", 1),
        ([ESCALATE] * 3, [9] * 4, [], True, [], "", 0),
        ([ACCEPT] * 3, [9] * 4, [2], True, [1, 2], "AA", None),
        ([], [9], [], True, [9], "S", None),
        ([], [9], [], False, [], "", 0),
    ],
)
def test_a_row_is_decided_up_to_where_its_text_parts(tier, own, ends, bonus, tokens, letters, escalate):
    drafted, k = [1, 2, 3][: len(tier)], len(tier)
    given, drawn = [0.5] * k, [0.25] * (k + 1)
    decision = _decided(SLIM, tier, drafted, given, [t in ends for t in drafted], own, drawn, [bonus] * (k + 1), k)
    assert (decision.tokens, decision.letters, decision.escalate) == (tokens, letters, escalate)
    assert decision.shares == [0.5 if letter == "A" else 0.25 for letter in letters]
    assert [index for _, index in decision.sources] == list(range(len(tokens)))
    assert decision.emitted == list(zip(tokens, decision.shares, strict=True))


def test_common_tokens_lead():
    assert [_common(*pair) for pair in (([], [1]), ([1, 2], [1]), ([1, 2], [1, 3]), ([2], [1]))] == [0, 1, 1, 0]
