"""SpecBound's rounds, layer call by layer call: the text, the worked example, counters and bounds."""

from __future__ import annotations

import copy
import json
from collections import Counter

import families
import pytest
import torch
from families import NAMES, SLIDING
from specbound_cases import (
    ALL,
    BOUND,
    LAYERS,
    bounded,
    check_round,
    everywhere,
    exits,
    ours,
    questions,
    rounds,
    same_as_token_by_token,
    scripted,
    stock_text,
    tower,
    truth,
)
from tiers import tiered

from hf_specdec.cache.speculative import SpeculativeCache


# losslessness

KINDS = {
    "final": {},
    "adapter": {"kind": "adapter", "words": 6},
    "block": {"kind": "block"},
    "lag": {"lag": True},
}


@pytest.mark.parametrize("name", tiered(NAMES))
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_ids_and_cache_equal_stock(name, kind, adapter):
    case, settings = tower(name, 6), dict(KINDS[kind])
    if "kind" in settings:
        layers = (2, 3, 4)
        settings = {"adapter": adapter(case.model, layers=layers, **settings), "alpha": 0.1}
    config = bounded(name, max_depth=4, num_assistant_tokens=5, **settings)
    for new in (1, 2, 3, 50):
        out = ours(case, config, max_new_tokens=new)
        assert torch.equal(out.sequences, stock_text(name, 1, new)), f"max_new_tokens={new}"
    same_as_token_by_token(case, out)
    assert out.speculation.num_draft_tokens > 0
    if name in SLIDING:  # rejections past the window
        assert out.speculation.num_accepted_tokens < out.speculation.num_draft_tokens
    for new in (2, 12):
        out = ours(case, config, rows=4, max_new_tokens=new)
        assert torch.equal(out.sequences, stock_text(name, 4, new)), f"max_new_tokens={new}, batch"


def test_the_towers_try_something():
    """Over all families and kinds of round, drafts are neither all right nor all wrong."""
    for name in NAMES:
        case = tower(name, 6)
        seen = ours(case, bounded(name, max_depth=4), rows=4, max_new_tokens=8).speculation
        assert 0.1 < seen.acceptance_rate < 0.9, name
        assert sum(1 for count in seen.method["exits"].values() if count) > 1, name
        assert set(seen.method["stop_reasons"]) == {"depth", "width"}, name


# the worked example, call by call

TRACE = [
    (1, 0, 1), (2, 0, 1),
    (1, 1, 1), (2, 1, 1), (3, 0, 2), (4, 0, 2),
    (1, 2, 1), (2, 2, 1), (3, 2, 1),
    (1, 3, 1), (2, 3, 1), (3, 3, 1), (4, 2, 2), (5, 0, 4),
    (6, 0, 4), (7, 0, 4), (8, 0, 4),
]  # fmt: skip
TRACE_OF_EOS = TRACE[:9] + [(4, 2, 1), (5, 0, 3), (6, 0, 3), (7, 0, 3), (8, 0, 3)]


def test_the_worked_example_call_by_call(warm):
    text, base = truth(), warm.ids.shape[1]
    plan = {base: 2, base + 1: 4, base + 2: 3}
    with rounds(warm.model) as seen, scripted(exits(plan, text)) as asked:
        out = ours(warm, bounded(**ALL), max_new_tokens=12)
    one = seen.rounds[0]
    assert one.calls == TRACE
    assert (len(one.calls), one.token_layers) == (17, 32)
    assert (one.parked, one.stop, one.rows, one.drafted, one.accepted) == ([2, 4, 3], "depth", 4, 3, 3)
    # shallow to deep, the newest row only, and none after a guess was taken
    tested = [(0, 1), (0, 2)] + [(1, d) for d in range(1, 5)] + [(2, d) for d in range(1, 4)]
    tested += [(3, d) for d in range(1, 6)]
    assert asked[: len(tested)] == [(base + row, depth) for row, depth in tested]
    assert out.speculation.method["exits"] == {"1": 0, "2": 1, "3": 1, "4": 1, "5": 0}
    assert out.speculation.method["accepted_per_exit"] == {"1": 0, "2": 1, "3": 1, "4": 1, "5": 0}
    assert out.speculation.accept_lengths[0][0] == 4
    assert torch.equal(out.sequences, text[:, : base + 12])


def test_the_worked_example_with_a_drafted_eos(warm):
    text, base = truth(), warm.ids.shape[1]
    eos = int(text[0, base + 3])
    assert eos not in text[0, base : base + 3]
    plan = {base: 2, base + 1: 4, base + 2: 3}
    with rounds(warm.model) as seen, scripted(exits(plan, text)):
        out = ours(warm, bounded(**ALL), max_new_tokens=12, eos_token_id=eos)
    (one,) = seen.rounds
    assert one.calls == TRACE_OF_EOS
    assert (len(one.calls), one.token_layers) == (14, 24)
    assert (one.parked, one.stop, one.rows) == ([2, 4, 3], "eos", 3)
    assert torch.equal(out.sequences, text[:, : base + 4])
    assert out.past_key_values.get_seq_length() == base + 3
    same_as_token_by_token(warm, out)


def test_a_drafted_eos_that_is_wrong_ends_nothing(warm):
    """It stops the round only; the model's own token takes its place."""
    text, base = truth(), warm.ids.shape[1]
    eos = next(token for token in range(families.VOCAB) if token not in text[0, base:])
    plan = {base: 2, base + 1: 4, base + 2: 3}

    def script(position, depth):
        answer = exits(plan, text)(position, depth)
        return eos if position == base + 2 and answer is not None else answer

    with rounds(warm.model) as seen, scripted(script):
        out = ours(warm, bounded(**ALL), max_new_tokens=12, eos_token_id=eos)
    assert seen.rounds[0].calls == TRACE_OF_EOS
    assert (seen.rounds[0].stop, seen.rounds[0].accepted) == ("eos", 2)
    assert torch.equal(out.sequences, text[:, : base + 12])
    same_as_token_by_token(warm, out)


def test_three_rows_parked_at_one_depth_stay_in_order(warm):
    text, base = truth(), warm.ids.shape[1]
    with rounds(warm.model) as seen, scripted(exits(dict.fromkeys(range(base, base + 3), 1), text)):
        out = ours(warm, bounded(**ALL), max_new_tokens=12)
    assert seen.rounds[0].calls == [(1, row, 1) for row in range(4)] + [(depth, 0, 4) for depth in range(2, 9)]
    assert seen.rounds[0].accepted == 3
    same_as_token_by_token(warm, out)


@pytest.mark.parametrize("kind", [*KINDS, "every layer", "shallow", "no bound"])
def test_every_round_runs_each_layer_once_on_each_row(warm, kind, adapter):
    changes = {"every layer": {"exit_layers": "all"}, "shallow": {"max_depth": 1}, "no bound": {"max_depth": LAYERS}}
    settings = {**KINDS.get(kind, {}), **changes.get(kind, {})}
    if "kind" in settings:
        settings = {"adapter": adapter(warm.model, **settings), "alpha": 0.1}
    if kind == "no bound":
        settings["exit_layers"] = [2, 4, 6]
    config, eos = bounded(**settings), warm.eos
    ours(warm, config, max_new_tokens=2)  # loads the heads before the hooks are there
    caches = set()
    update = SpeculativeCache.update
    with rounds(warm.model) as seen, pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpeculativeCache, "update", lambda self, *a, **k: (caches.add(self), update(self, *a, **k))[1])
        outs = [
            ours(warm, config, max_new_tokens=60),
            ours(warm, config, max_new_tokens=60, eos_token_id=eos),
            ours(warm, config, max_new_tokens=20, num_assistant_tokens=2),
        ]
    width = warm.ids.shape[1]
    assert sum(rows for *_, rows in seen.prompt) == 3 * width * LAYERS  # once each, and no second prefill
    for one in seen.rounds:
        check_round(one, config.depth_bound(LAYERS))
    assert {one.stop for one in seen.rounds} >= {"depth", "width"} or kind == "no bound"
    assert len(caches) == (6 if kind == "block" else 3)  # a block has keys and values of its own
    for out in outs:
        method = out.speculation.method
        assert sum(method["stop_reasons"].values()) == sum(map(len, out.speculation.accept_lengths))
        assert sum(method["exits"].values()) == out.speculation.num_draft_tokens
        assert sum(method["accepted_per_exit"].values()) == out.speculation.num_accepted_tokens
    methods = [out.speculation.method for out in outs]
    assert sum(method["layer_calls"] for method in methods) == sum(len(one.calls) for one in seen.rounds)
    assert sum(method["token_layers"] for method in methods) == sum(one.token_layers for one in seen.rounds)


def test_counters_of_a_batch_are_sums_over_its_rows(llama):
    config = bounded()
    whole = ours(llama, config, rows=4, max_new_tokens=12).speculation.method
    parts = []
    for row in range(4):
        ids = llama.ids[row : row + 1, llama.mask[row] == 1]
        parts.append(ours(llama, config, input_ids=ids, max_new_tokens=12).speculation.method)
    for key in ("tests", "layer_calls", "token_layers"):
        assert whole[key] == sum(part[key] for part in parts)
    for key in ("stop_reasons", "exits", "accepted_per_exit"):
        assert Counter(whole[key]) == sum((Counter(part[key]) for part in parts), Counter())
    json.dumps(whole)


@pytest.mark.parametrize("lag", [False, True])
def test_the_states_that_heads_see_are_the_models_own(warm, lag):
    """After catching up, rejections and roll-back, a head reads what a fresh forward over the same text has there."""
    with questions() as asked:
        out = ours(warm, bounded(exit_layers="all", lag=lag), max_new_tokens=30)
    assert 0 < out.speculation.num_accepted_tokens < out.speculation.num_draft_tokens
    assert len({question.layer for question in asked}) == BOUND
    model = copy.deepcopy(warm.model)  # asked for hidden states, a model keeps hooks
    for text, _, layer, state, logits in asked:
        with torch.no_grad():
            hidden = model.model(text, output_hidden_states=True).hidden_states[layer][:, -1:]
            expected = model.lm_head(model.model.norm(hidden))[:, 0].float()
        torch.testing.assert_close(state, hidden, rtol=0, atol=1e-10)
        torch.testing.assert_close(logits, expected)


# bounds


@pytest.mark.parametrize("width", [1, 3, 6])
def test_the_width_bound_and_the_bonus_token(warm, width):
    text, start = truth(), warm.ids.shape[1]
    new = 1 + 3 * (width + 1)
    with rounds(warm.model) as seen, scripted(everywhere(2, text)):
        out = ours(warm, bounded(**ALL, num_assistant_tokens=width), max_new_tokens=new)
    assert [(one.drafted, one.rows, one.stop) for one in seen.rounds] == [(width, width + 1, "width")] * 3
    assert out.speculation.accept_lengths == [[width + 1] * 3]
    assert torch.equal(out.sequences, text[:, : start + new])
    for one in seen.rounds:
        check_round(one, BOUND)


def test_wrong_drafts_cost_rounds_and_change_nothing(warm):
    text, start = truth(), warm.ids.shape[1]
    with rounds(warm.model) as seen, scripted(everywhere(2, text, wrong=True)):
        out = ours(warm, bounded(**ALL), max_new_tokens=15)
    assert out.speculation.accept_lengths == [[1] * 14]
    assert out.speculation.num_accepted_tokens == 0
    assert torch.equal(out.sequences, text[:, : start + 15])
    for one in seen.rounds:
        check_round(one, BOUND)
    same_as_token_by_token(warm, out)


@pytest.mark.parametrize("place", range(4))
def test_one_wrong_draft_cuts_the_block_there(warm, place):
    text, base = truth(), warm.ids.shape[1]
    plan = {base: 2, base + 1: 4, base + 2: 3, base + 3: 1}
    with rounds(warm.model) as seen, scripted(exits(plan, text, wrong={base + place})):
        out = ours(warm, bounded(**ALL), max_new_tokens=12)
    assert seen.rounds[0].accepted == place
    assert seen.rounds[1].committed == base + 1 + place + 1
    assert torch.equal(out.sequences, text[:, : base + 12])
    for one in seen.rounds:
        check_round(one, BOUND)
    same_as_token_by_token(warm, out)


@pytest.mark.parametrize("place", range(4))
def test_a_difficult_row_ends_the_round_at_the_depth_bound(warm, place):
    text, base = truth(), warm.ids.shape[1]
    plan = dict.fromkeys([base + row for row in range(10) if row != place], 3)
    with rounds(warm.model) as seen, scripted(exits(plan, text)):
        ours(warm, bounded(**ALL), max_new_tokens=12)
    one = seen.rounds[0]
    assert (one.drafted, one.stop) == (place, "depth")
    # nothing above the bound before the deep pass, and that in one go
    assert one.calls[-4:] == [(BOUND, 0, place + 1)] + [(depth, 0, place + 1) for depth in (6, 7, 8)]
    check_round(one, BOUND)


def test_a_guess_at_the_depth_bound_counts(warm):
    text = truth()
    with rounds(warm.model) as seen, scripted(everywhere(BOUND, text)):
        ours(warm, bounded(**ALL), max_new_tokens=8)
    assert seen.rounds[0].parked == [BOUND] * 6
    assert seen.rounds[0].stop == "width"


def test_the_last_token_of_the_budget_is_not_drafted(warm):
    """One token less than may be emitted: with room for one token, no head is asked."""
    text = truth()
    for new in range(2, 9):
        with rounds(warm.model) as seen, scripted(everywhere(2, text)) as asked:
            out = ours(warm, bounded(**ALL), max_new_tokens=new)
        (one,) = seen.rounds
        assert (one.drafted, one.rows) == (new - 2, new - 1)
        assert len(asked) == 2 * (new - 2)
        assert (out.speculation is None) is (new == 2), "nothing is drafted"
        assert out.speculation is None or out.speculation.method["tests"] == len(asked)
        assert torch.equal(out.sequences, text[:, : warm.ids.shape[1] + new])
        check_round(one, BOUND)


def test_the_full_depth_bounds_nothing(warm):
    text = truth()
    with rounds(warm.model) as seen, scripted(everywhere(LAYERS - 1, text)):
        out = ours(warm, bounded(**{**ALL, "exit_layers": [2, LAYERS - 1], "max_depth": LAYERS}), max_new_tokens=9)
    assert seen.rounds[0].parked == [LAYERS - 1] * 6
    assert torch.equal(out.sequences, text[:, : warm.ids.shape[1] + 9])
    with rounds(warm.model) as seen, scripted(lambda *_: None):
        out = ours(warm, bounded(**{**ALL, "exit_layers": [2, LAYERS - 1], "max_depth": LAYERS}), max_new_tokens=9)
    assert [(one.drafted, one.stop) for one in seen.rounds] == [(0, "depth")] * 7 + [(0, "width")]
    assert torch.equal(out.sequences, text[:, : warm.ids.shape[1] + 9])
