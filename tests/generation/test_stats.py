"""The counters of a call, and the listeners that get them."""

from __future__ import annotations

import json

import pytest
import torch
from families import tiny_llama

from hf_specdec import PlainConfig, SpeculationStats, VegasConfig, on_speculation
from hf_specdec.generation.stats import report, timings_wanted


CPU = torch.device("cpu")
KEYS = {
    "strategy",
    "num_drafts",
    "num_draft_tokens",
    "num_accepted_tokens",
    "num_accepted_tokens_per_pos",
    "acceptance_rate",
    "mean_tokens_per_step",
    "accept_lengths",
    "target_forwards",
    "draft_forwards",
    "seconds",
    "method",
}
DENSE = VegasConfig(min_context=0, num_assistant_tokens=4)


def fresh(rows: int = 2) -> SpeculationStats:
    return SpeculationStats(strategy="test", accept_lengths=[[] for _ in range(rows)])


def test_nothing_recorded():
    stats = fresh()
    assert stats.acceptance_rate == 0 and stats.mean_tokens_per_step == 0
    assert stats.to_dict().keys() == KEYS


def test_record():
    stats = fresh()
    stats.record(0, drafted=4, accepted=4, emitted=5)
    stats.record(1, drafted=4, accepted=1, emitted=2)
    stats.record(0, drafted=2, accepted=0, emitted=1)
    stats.record(1, drafted=0, accepted=0, emitted=1)
    assert stats.num_drafts == 3  # the fourth round drafted nothing
    assert stats.num_draft_tokens == 10
    assert stats.num_accepted_tokens == 5
    assert stats.num_accepted_tokens_per_pos == [2, 1, 1, 1]
    assert stats.accept_lengths == [[5, 1], [2, 1]]
    assert stats.acceptance_rate == 0.5
    assert stats.mean_tokens_per_step == 9 / 4


def test_a_cut_within_the_drafts_counts_what_was_emitted():
    """EOS as the second of four accepted drafts: two tokens leave, both of them drafts."""
    stats = fresh(1)
    stats.record(0, drafted=4, accepted=4, emitted=2)
    assert stats.num_accepted_tokens == 2
    assert stats.num_accepted_tokens_per_pos == [1, 1, 0, 0]
    assert stats.accept_lengths == [[2]]


def test_places_that_nothing_reached_are_zeros():
    stats = fresh(1)
    stats.record(0, drafted=3, accepted=0, emitted=1)
    assert stats.num_accepted_tokens_per_pos == [0, 0, 0]
    stats.record(0, drafted=5, accepted=1, emitted=2)
    assert stats.num_accepted_tokens_per_pos == [1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("tokens", "left"), [(0, [5, 1, 3]), (2, [5, 1, 1]), (3, [5, 1]), (4, [5]), (7, [2]), (9, []), (12, [])]
)
def test_forget_takes_back_the_newest_tokens(tokens, left):
    """A criterion's cut may reach back over several steps, and beyond the first to the prefill's token."""
    stats = fresh(2)
    for emitted in (5, 1, 3):
        stats.record(0, drafted=4, accepted=emitted - 1, emitted=emitted)
    stats.record(1, drafted=4, accepted=1, emitted=2)
    stats.forget(0, tokens)
    assert stats.accept_lengths == [left, [2]]


@pytest.mark.parametrize(("tokens", "accepted"), [(1, 4), (2, 3), (4, 1), (5, 0)])
def test_forgotten_drafts_are_no_longer_accepted_ones(tokens, accepted):
    """`num_accepted_tokens` are drafted tokens that were emitted; a criterion's cut takes them back like EOS does."""
    stats = fresh(1)
    stats.record(0, drafted=4, accepted=4, emitted=5)
    stats.forget(0, tokens)
    assert stats.num_accepted_tokens == accepted
    assert sum(stats.num_accepted_tokens_per_pos) == accepted


def test_to_dict_is_json_and_a_copy():
    stats = fresh(1)
    stats.record(0, 2, 1, 2)
    stats.method["plain_rows"] = 3
    with stats.phase("draft", CPU):
        pass
    first = stats.to_dict()
    assert json.loads(json.dumps(first)) == first
    assert first["seconds"] == {}
    stats.record(0, 2, 2, 3)
    stats.method["plain_rows"] = 4
    assert first["accept_lengths"] == [[2]] and first["method"] == {"plain_rows": 3}
    assert first["num_accepted_tokens_per_pos"] == [1, 0]


def test_phases_are_timed_where_asked():
    stats = fresh()
    stats.timed = True
    for _ in range(2):
        with stats.phase("verify", CPU):
            torch.ones(10).sum()
    assert set(stats.seconds) == {"verify"} and stats.seconds["verify"] > 0
    assert json.loads(json.dumps(stats.to_dict()))["seconds"].keys() == {"verify"}


# listeners


def test_listeners_come_and_go():
    seen, other = [], []
    report(fresh())
    with on_speculation(seen.append):
        assert not timings_wanted()
        with on_speculation(other.append, timings=True):
            assert timings_wanted()
            report(fresh())
        assert not timings_wanted()
        report(fresh())
    report(fresh())
    assert len(seen) == 2 and len(other) == 1


def test_a_listener_is_removed_after_an_exception():
    seen = []
    with pytest.raises(KeyError), on_speculation(seen.append, timings=True):
        raise KeyError
    report(fresh())
    assert not seen and not timings_wanted()


def test_the_same_callback_twice():
    seen = []
    with on_speculation(seen.append):
        with on_speculation(seen.append):
            report(fresh())
        report(fresh())
    assert len(seen) == 3


# a whole call


@pytest.fixture(scope="module")
def model():
    return tiny_llama(initializer_range=0.3, eos_token_id=None, pad_token_id=0)


def generate(model, strategy, rows=2, **options):
    ids = torch.arange(rows * 7).view(rows, 7) % 39 + 1
    options = {"do_sample": False, "max_new_tokens": 17, "return_dict_in_generate": True, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids), assistant_strategy=strategy, **options)


def test_counters_of_a_call(model):
    """Dense drafts are all accepted: 1 + 3 * 5 tokens, then one more without room for a draft."""
    stats = generate(model, DENSE).speculation
    assert stats.strategy == "vegas"
    assert stats.accept_lengths == [[5, 5, 5, 1]] * 2
    assert stats.num_drafts == 6 and stats.num_draft_tokens == stats.num_accepted_tokens == 24
    assert stats.num_accepted_tokens_per_pos == [6, 6, 6, 6]
    assert stats.acceptance_rate == 1 and stats.mean_tokens_per_step == 4
    assert stats.target_forwards == 4 and stats.draft_forwards == 12
    assert not stats.seconds
    assert json.loads(json.dumps(stats.to_dict())) == stats.to_dict()


def test_counters_without_drafts(model):
    seen = []
    with on_speculation(seen.append):
        assert generate(model, PlainConfig()).speculation is None  # nothing was drafted
    (stats,) = seen
    assert stats.num_drafts == 0
    assert stats.accept_lengths == [[1] * 16] * 2
    assert stats.num_draft_tokens == stats.draft_forwards == 0 and stats.target_forwards == 16


def test_one_token_makes_no_step(model):
    assert generate(model, DENSE, max_new_tokens=1).speculation is None


def test_a_callback_gets_every_call_once(model):
    seen = []
    with on_speculation(seen.append):
        ids = generate(model, DENSE, return_dict_in_generate=False)
        out = generate(model, DENSE, max_new_tokens=9)
        generate(model, "plain")
        model.generate(ids[:, :7], max_new_tokens=2, do_sample=False)  # stock: not a speculative call
    assert isinstance(ids, torch.Tensor)
    assert [stats.strategy for stats in seen] == ["vegas", "vegas", "plain"]
    assert seen[1] is out.speculation
    generate(model, DENSE)
    assert len(seen) == 3


def test_timings_of_a_call(model):
    seen = []
    with on_speculation(seen.append, timings=True):
        generate(model, DENSE)
    assert {"prefill", "draft", "verify"} <= set(seen[0].seconds)
    assert all(seconds > 0 for seconds in seen[0].seconds.values())
    assert not generate(model, DENSE).speculation.seconds


def test_stop_strings_are_not_counted(model):
    """What a criterion cuts inside an accepted draft leaves every counter."""
    text = generate(model, DENSE, rows=1).sequences

    def stop(ids, scores, **kwargs):
        return torch.tensor([ids.shape[1] >= 7 + 3])  # after the third new token, the second of the first draft

    stats = generate(model, DENSE, rows=1, stopping_criteria=[stop])
    assert torch.equal(stats.sequences, text[:, :10])
    stats = stats.speculation
    assert stats.accept_lengths == [[2]]
    assert stats.num_accepted_tokens == 2 and stats.num_accepted_tokens_per_pos == [1, 1, 0, 0]
