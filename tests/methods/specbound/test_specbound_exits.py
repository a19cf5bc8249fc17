"""SpecBound's test of confidence: temperatures, thresholds, processors, and a test one layer late."""

from __future__ import annotations

from contextlib import contextmanager

import families
import pytest
import torch
from specbound_cases import (
    ALL,
    BOUND,
    LAYERS,
    bounded,
    check_round,
    exits,
    ours,
    rounds,
    same_as_token_by_token,
    scripted,
    truth,
)
from transformers import LogitsProcessor

from hf_specdec import SpecBoundConfig
from hf_specdec.generation.methods.specbound.method import SpecBoundStrategy, annealed_confidence


# the confidence test


def test_temperatures_fall_linearly_to_one():
    table = [1.4375, 1.375, 1.3125, 1.25, 1.1875, 1.125, 1.0625, 1.0]
    config = SpecBoundConfig(alpha=0.5)
    assert [config.temperature(layer, 8, True) for layer in range(1, 9)] == table
    assert [config.temperature(layer, 8, False) for layer in range(1, 9)] == table
    # what is not set is on for trained heads and off for the model's own
    default = SpecBoundConfig()
    assert default.temperature(4, 8, True) == pytest.approx(1.15)
    assert default.temperature(4, 8, False) == 1.0
    assert SpecBoundConfig(alpha=0).temperature(1, 8, True) == 1.0


def test_annealed_confidence_is_the_largest_probability():
    logits = 4 * torch.randn(5, 97)
    logits[0, 3] = 300.0  # no overflow
    logits[1] = 7.0
    logits[2, :] = -1e4  # words outside a draft vocabulary
    logits[2, 5] = 1.0
    kept = logits.clone()
    for temperature in (1.0, 1.2, 3.0):
        expected = torch.softmax(logits.double() / temperature, dim=-1).amax(dim=-1)
        torch.testing.assert_close(annealed_confidence(logits, temperature).double(), expected, rtol=1e-5, atol=0)
    assert torch.equal(logits, kept)  # drafts are chosen from them afterwards


@pytest.mark.parametrize("depth", range(1, BOUND + 1))
@pytest.mark.parametrize("lag", [False, True])
def test_each_depth_is_tested_at_its_own_temperature(warm, depth, lag):
    """The same logits at all depths pass from the depth on at which the temperature has fallen far enough."""
    logits = torch.zeros(families.VOCAB)
    logits[5] = 6.0

    def confidence(at):
        return float(torch.softmax(logits.double() / (1 + 0.5 * (1 - at / LAYERS)), dim=0).max())

    tau = (confidence(depth) + confidence(depth - 1)) / 2
    with rounds(warm.model) as seen, scripted(lambda *_: logits):
        out = ours(warm, bounded(exit_layers="all", tau=tau, alpha=0.5, lag=lag), max_new_tokens=6)
    assert out.speculation.method["exits"][str(depth)] == sum(out.speculation.method["exits"].values()) > 0
    assert seen.rounds[0].parked[0] == min(depth + lag, BOUND)


def test_the_bound_of_confidence_is_reached_by_equality(warm):
    """Two words of equal logits, all others impossible: a confidence of exactly one half."""
    logits = torch.full((families.VOCAB,), -1e4)
    logits[[5, 6]] = 0.0
    for tau, taken in ((0.5, True), (0.51, False)):
        with scripted(lambda *_: logits):
            out = ours(warm, bounded(exit_layers=[2], tau=tau), max_new_tokens=6)
        assert (out.speculation is not None) is taken


def test_exits_shrink_with_alpha_and_tau(warm):
    """Rows are the same for all settings, because every guess is right and the width does not bind."""
    text, generator = truth(), torch.Generator().manual_seed(5)
    table = 2.5 + 5 * torch.rand(text.shape[1], BOUND + 1, generator=generator)

    def script(position, depth):
        logits = torch.zeros(families.VOCAB)
        if position + 1 < text.shape[1]:
            logits[text[0, position + 1]] = table[position, depth]
        return logits

    def exits_at(**settings):
        with scripted(script):
            config = bounded(**{"exit_layers": "all", "tau": 0.4, "num_assistant_tokens": 60, **settings})
            out = ours(warm, config, max_new_tokens=50)
        assert torch.equal(out.sequences, text)
        return sum(out.speculation.method["exits"].values())

    by_alpha = [exits_at(alpha=alpha) for alpha in (0, 0.25, 0.5, 1, 2)]
    by_tau = [exits_at(tau=tau) for tau in (0.1, 0.4, 0.6, 0.8, 0.9)]
    for counts in (by_alpha, by_tau):
        assert counts == sorted(counts, reverse=True)
        assert counts[0] > counts[-1] + 10


@pytest.mark.parametrize("mode", ["greedy", "sample", "match"])
def test_the_temperature_touches_the_test_only(warm, mode):
    """Drafts and their declared distribution come from the logits as they are, after the caller's processors."""
    logits = torch.randn(families.VOCAB)
    logits[[7, 9]] = torch.tensor([5.0, 4.8])
    seen = []
    settings = {} if mode == "greedy" else {"sampling_draft": mode}
    kwargs = {} if mode == "greedy" else {"do_sample": True, "top_k": 0, "temperature": 0.8}
    with scripted(lambda *_: logits), noted_drafts(seen):
        config = bounded(exit_layers=[2], tau=0.05, alpha=3.0, **settings)
        for _ in range(3):
            ours(warm, config, max_new_tokens=12, logits_processor=[Against(7)], **kwargs)
    drafted = [draft for draft in seen if draft.tokens.shape[1]]
    assert drafted
    changed = logits.clone()
    changed[7] -= 1.0
    expected = torch.softmax(changed / 0.8, dim=0)
    for draft in drafted:
        if mode == "sample":
            torch.testing.assert_close(draft.distributions[0], expected.expand_as(draft.distributions[0]))
        else:
            assert draft.distributions is None
            assert draft.tokens.unique().tolist() == [9]
    if mode == "sample":
        assert len(torch.cat([draft.tokens for draft in drafted], dim=1).unique()) > 1


def test_drafts_follow_processors_of_their_own_prefix(warm):
    """A processor that fixes the whole text by its prefix: drafts that were shown theirs are always right."""

    class Fixes(LogitsProcessor):
        def __call__(self, input_ids, scores):
            weights = torch.arange(1, input_ids.shape[1] + 1)
            chosen = (input_ids * weights).sum(dim=1) % scores.shape[1]
            return scores.scatter_add(1, chosen[:, None], torch.full_like(scores[:, :1], 500.0))

    expected = warm.stock(**warm.one, max_new_tokens=24, logits_processor=[Fixes()])
    with scripted(lambda *_: 3):
        out = ours(warm, bounded(**ALL), max_new_tokens=24, logits_processor=[Fixes()])
    assert torch.equal(out.sequences, expected)
    assert out.speculation.num_accepted_tokens == out.speculation.num_draft_tokens > 12


@contextmanager
def noted_drafts(found):
    propose = SpecBoundStrategy.propose

    def noted(self, state):
        found.append(propose(self, state))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpecBoundStrategy, "propose", noted)
        yield


class Against(LogitsProcessor):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.token] -= 1.0
        return scores


# a test read one layer late


def test_lag_parks_a_row_one_layer_deeper(warm):
    text, base = truth(), warm.ids.shape[1]
    plan = {base: 2, base + 1: 4, base + 2: 5, base + 3: 1}
    results = []
    for lag in (False, True):
        with rounds(warm.model) as seen, scripted(exits(plan, text)) as asked:
            out = ours(warm, bounded(**ALL, lag=lag), max_new_tokens=12)
        one = seen.rounds[0]
        check_round(one, BOUND)
        results.append((one.drafted, one.accepted, one.stop, asked, out.speculation.method["exits"]))
        # at the bound there is no layer to launch meanwhile
        assert one.parked == ([3, 5, 5, 2] if lag else [2, 4, 5, 1])
        assert torch.equal(out.sequences, text[:, : base + 12])
        same_as_token_by_token(warm, out)
    assert results[0] == results[1]
