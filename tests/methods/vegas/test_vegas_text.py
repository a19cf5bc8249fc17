"""Vegas's text, caches and statistics: rows 7, 9, 11, 14, 21 and 22 of the pitfalls, and which rows draft."""

from __future__ import annotations

import pytest
import torch
from vegas_cases import build, generate, plain, prompts, recorded_drafts, vegas, wrapped

from hf_specdec import VegasConfig, on_speculation
from hf_specdec.generation.methods import vegas as method
from hf_specdec.generation.methods.vegas import VegasDrafter
from hf_specdec.generation.state import DecodingState
from hf_specdec.generation.strategy import SpeculationStrategy


# row 7


@pytest.mark.parametrize("ratio", [1.0, 0.05])
@pytest.mark.parametrize("lengths", [(31,), (12, 31, 20)], ids=["one", "ragged"])
def test_row_7_the_cache_holds_what_a_fresh_forward_gives(llama, ratio, lengths):
    """After every round; nothing made by a draft stays."""
    rounds = 0

    def commit(original, strategy, state, kept):
        nonlocal rounds
        original(strategy, state, kept)
        for slot, committed in enumerate(state.committed):
            row = state.active[slot]
            text = state.text.tokens[row : row + 1, : committed - 1]
            with torch.no_grad():
                fresh = torch.nn.Module.__call__(fresh_model, input_ids=text, use_cache=True).past_key_values
            for layer, wanted in zip(state.target.cache.layers, fresh.layers, strict=True):
                for ours, theirs in ((layer.keys, wanted.keys), (layer.values, wanted.values)):
                    torch.testing.assert_close(ours[slot, :, : committed - 1], theirs[0], atol=1e-10, rtol=0)
        rounds += 1

    fresh_model = build()
    fresh_model.load_state_dict(llama.state_dict())
    with wrapped(SpeculationStrategy, "commit", commit):
        config = vegas(kv_ratio=ratio, num_assistant_tokens=4)
        generate(llama, prompts(*lengths), assistant_strategy=config)
    assert rounds > 3


# row 9


@pytest.mark.parametrize("ratio", [1.0, 0.3, 0.07, 1e-6])
@pytest.mark.parametrize("gamma", [1, 2, 6, 9])
@pytest.mark.parametrize("lengths", [(50,), (50, 8, 33)], ids=["one", "ragged"])
def test_row_9_greedy_text_is_stocks(llama, ratio, gamma, lengths):
    for seed, new in ((1, 1), (2, 2), (3, 37)):
        inputs = prompts(*lengths, seed=seed)
        config = vegas(kv_ratio=ratio, num_assistant_tokens=gamma)
        out = generate(llama, inputs, new, assistant_strategy=config)
        assert torch.equal(out.sequences, plain(llama, inputs, new))


@pytest.mark.parametrize("settings", [{"metric": "logit"}, {"per_key_head": True}, {"selection": "window"},
                                      {"queries": "last"}, {"queries": "all"}, {"num_sink": 3, "num_recent": 5},
                                      {"min_tokens": 4, "max_tokens": 5}], ids=str)  # fmt: skip
def test_row_9_under_every_setting(llama, settings):
    inputs = prompts(45, 20)
    assert torch.equal(
        generate(llama, inputs, 30, assistant_strategy=vegas(**settings)).sequences, plain(llama, inputs, 30)
    )


@pytest.mark.parametrize("ratio", [1.0, 0.07])
@pytest.mark.parametrize("place", [1, 3, 6, 9])
def test_row_9_eos_inside_a_draft(llama, ratio, place):
    """The call ends at the first EOS, wherever in a draft it stands, while the other rows go on."""
    inputs = prompts(40, 17, 28)
    text = plain(llama, inputs)
    eos = int(text[0, 40 + place])
    wanted = plain(llama, inputs, eos_token_id=eos)
    out = generate(llama, inputs, eos_token_id=eos, assistant_strategy=vegas(kv_ratio=ratio))
    assert torch.equal(out.sequences, wanted)
    assert (wanted == eos).any()
    emitted = [sum(lengths) for lengths in out.speculation.accept_lengths]
    generated = [(row[40:] == eos).nonzero()[:1].flatten().tolist() for row in wanted]
    assert emitted == [hit[0] if hit else wanted.shape[1] - 41 for hit in generated]


# row 11


@pytest.mark.parametrize("settings", [{}, {"per_key_head": True}, {"metric": "logit"}], ids=str)
@pytest.mark.parametrize("lengths", [(30,), (30, 7, 19)], ids=["one", "ragged"])
@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
def test_row_11_dense_drafts_are_all_accepted(llama, settings, lengths, sample):
    """With `kv_ratio=1` drafts are the model's own: every one is accepted and each round gives gamma + 1 tokens."""
    config = vegas(kv_ratio=1.0, num_assistant_tokens=5, **settings)
    torch.manual_seed(0)
    out = generate(llama, prompts(*lengths), 25, assistant_strategy=config, do_sample=sample)
    stats = out.speculation
    assert stats.num_draft_tokens > 0 and stats.acceptance_rate == 1
    assert stats.accept_lengths == [[6] * 4] * len(lengths)


def test_row_11_and_13_dense_drafts_have_the_dense_logits(llama):
    """Positions are absolute: draft logits at `kv_ratio=1` equal those of a full forward."""
    inputs = prompts(40)
    with recorded_drafts() as drafts:
        text = generate(llama, inputs, 14, assistant_strategy=vegas(kv_ratio=1.0)).sequences
    with torch.no_grad():
        logits = llama(input_ids=text).logits
    places = [40 + place for start in (0, 7) for place in range(start, start + 6)][: len(drafts)]
    assert len(drafts) >= 6
    for place, draft in zip(places, drafts, strict=True):
        torch.testing.assert_close(draft[0, -1], logits[0, place], atol=1e-10, rtol=0)


def test_a_budget_above_the_context_drafts_densely(llama):
    """Contexts up to `min_tokens` are drafted densely, whatever the ratio."""
    inputs = prompts(40, 25)
    stats = generate(llama, inputs, 22, assistant_strategy=vegas(kv_ratio=0.01, min_tokens=256)).speculation
    assert stats.acceptance_rate == 1 and stats.num_draft_tokens > 0
    config = VegasConfig(min_context=0, kv_ratio=0.01)  # the default floor
    assert generate(llama, inputs, 22, assistant_strategy=config).speculation.acceptance_rate == 1


# row 14


@pytest.mark.parametrize("ends", [False, True], ids=["", "eos"])
@pytest.mark.parametrize("ratio", [1.0, 0.3, 0.05])
def test_row_14_rows_of_a_batch_equal_rows_alone(llama, ratio, ends):
    """Not the text only, but every accepted length; also of rows that move to the place of one that ended."""
    config, lengths = vegas(kv_ratio=ratio, num_assistant_tokens=4), (64, 11, 37, 50)
    inputs = prompts(*lengths)
    eos = int(plain(llama, inputs, 30)[0, 64 + 8]) if ends else None
    options = {"eos_token_id": eos, "assistant_strategy": config}
    together = generate(llama, inputs, 30, **options)
    assert len({sum(row) for row in together.speculation.accept_lengths}) > 1 or not ends
    for row, length in enumerate(lengths):
        alone = {name: value[row : row + 1, -length:] for name, value in inputs.items()}
        out = generate(llama, alone, 30, **options)
        new = out.sequences[0, length:]
        assert torch.equal(new, together.sequences[row, 64 : 64 + len(new)])
        assert out.speculation.accept_lengths[0] == together.speculation.accept_lengths[row]


# row 21


def test_row_21_finished_rows_are_not_read(llama):
    """NaN in all that belongs to a finished row, storage and side buffers, changes nothing for the others."""
    inputs = prompts(40, 17, 28, 33)
    text = plain(llama, inputs)
    eos = int(text[0, 43])
    options = {
        "eos_token_id": eos,
        "return_dict_in_generate": False,
        "assistant_strategy": vegas(num_assistant_tokens=3),
    }
    clean = generate(llama, inputs, **options)
    retired = 0

    def retire(original, state, slot):
        nonlocal retired
        original(state, slot)
        end = len(state.active)
        if not end:
            return
        retired += 1
        for layer in state.target.cache.layers:
            layer.keys[end:], layer.values[end:] = torch.nan, torch.nan
        view = state.followers[1]
        for sides in (view.keys, view.values):
            for side in sides.values():
                side[end:] = torch.nan

    with wrapped(DecodingState, "retire", retire):
        assert torch.equal(generate(llama, inputs, **options), clean)
    assert retired > 0
    assert torch.equal(clean, plain(llama, inputs, eos_token_id=eos))


# row 22


def test_row_22_calls_leave_nothing_behind(llama):
    inputs, other = prompts(40, 25), prompts(12, 30, seed=9)
    first = generate(llama, inputs, assistant_strategy=vegas())
    stock = plain(llama, inputs)
    generate(llama, other, assistant_strategy=vegas(kv_ratio=0.02, num_assistant_tokens=2))
    again = generate(llama, inputs, assistant_strategy=vegas())
    assert torch.equal(first.sequences, stock) and torch.equal(again.sequences, stock)
    assert first.speculation.to_dict() == again.speculation.to_dict()
    assert llama.config._attn_implementation == "sdpa" and type(llama.config._attn_implementation) is str


@pytest.mark.parametrize("calls", [0, 1, 4, 9])
def test_row_22_an_exception_leaves_nothing_behind(llama, calls):
    inputs, count = prompts(40), 0
    stock = plain(llama, inputs)
    names = set(vars(llama))

    def explode(_, scores):
        nonlocal count
        count += 1
        if count > calls:
            raise KeyError("stop here")
        return scores

    with pytest.raises(KeyError, match="stop here"):
        generate(llama, inputs, assistant_strategy=vegas(), logits_processor=[explode])
    assert type(llama.config._attn_implementation) is str and llama.config._attn_implementation == "sdpa"
    assert set(vars(llama)) == names
    assert torch.equal(plain(llama, inputs), stock)
    assert torch.equal(generate(llama, inputs, assistant_strategy=vegas()).sequences, stock)


# which rows draft


def test_rows_below_min_context_take_plain_steps(llama):
    inputs = prompts(40, 20)
    found = []
    with on_speculation(found.append):
        out = generate(llama, inputs, 15, assistant_strategy=vegas(min_context=1000))
    assert out.speculation is None
    stats = found[0]
    assert torch.equal(out.sequences, plain(llama, inputs, 15))
    assert stats.num_draft_tokens == stats.draft_forwards == stats.method["selections"] == 0
    assert stats.accept_lengths == [[1] * 14] * 2
    # the last step has no room for a draft, so it is not the threshold that made it plain
    assert stats.method["plain_rows"] == 2 * 13
    assert stats.num_drafts == 0


def test_a_context_below_min_context_is_warned_of_once(llama, monkeypatch):
    """One warning per process and threshold, whatever the contexts; none where a row is long enough."""
    told = []
    monkeypatch.setattr(method.logger, "warning", told.append)
    monkeypatch.setattr(method, "_warned", set())
    for lengths in ((40, 20), (41,), (60, 9)):
        generate(llama, prompts(*lengths), 8, assistant_strategy=vegas(min_context=50))
    assert len(told) == 1
    for part in ("40 tokens", "min_context=50", "plain steps", "calibrate vegas"):
        assert part in told[0]
    generate(llama, prompts(60), 8, assistant_strategy=vegas(min_context=60))
    assert len(told) == 1
    generate(llama, prompts(60), 8, assistant_strategy=vegas(min_context=61))
    assert len(told) == 2 and "min_context=61" in told[1]


@pytest.mark.parametrize("threshold", [41, 42, 43, 47, 50])
def test_a_row_that_crosses_min_context_starts_to_draft(llama, threshold):
    """Drafting starts with the first round whose text has `min_context` tokens, after one scored forward."""
    inputs, events = prompts(40), []

    def propose(original, drafter, state):
        draft = original(drafter, state)
        events.append((state.committed[0], draft.counts[0]))
        return draft

    with wrapped(VegasDrafter, "propose", propose):
        out = generate(llama, inputs, 30, assistant_strategy=vegas(min_context=threshold, kv_ratio=1.0))
    assert torch.equal(out.sequences, plain(llama, inputs, 30))
    assert all((count > 0) is (committed >= threshold) for committed, count in events if committed < 69)
    plain_rounds = max(threshold - 41, 0)
    assert out.speculation.method["plain_rows"] == plain_rounds
    assert out.speculation.method["selections"] == 3 * (len(events) - max(plain_rounds - 1, 0) + (plain_rounds == 0))


def test_mixed_rows_draft_apart(llama):
    """A short row takes plain steps beside a long one that drafts; each counts its own."""
    inputs = prompts(60, 15)
    out = generate(llama, inputs, 12, assistant_strategy=vegas(min_context=50, kv_ratio=1.0, num_assistant_tokens=5))
    stats = out.speculation
    assert torch.equal(out.sequences, plain(llama, inputs, 12))
    assert stats.accept_lengths[0] == [6, 5] and stats.accept_lengths[1] == [1] * 11
    assert stats.num_draft_tokens == stats.num_accepted_tokens == 9
    assert stats.method["plain_rows"] == 10


@pytest.mark.parametrize("threshold", [20, 22, 30, 41])
@pytest.mark.parametrize("ratio", [1.0, 0.1])
def test_the_long_row_finishes_first(llama, threshold, ratio):
    """The short row goes on, and drafts once it is long enough, though the scoring paused in between."""
    inputs = prompts(60, 15)
    text = plain(llama, inputs, 40)
    eos = next(int(t) for t in text[0, 62:75] if t not in text[1, 15 + 45 :])
    config = vegas(min_context=threshold, kv_ratio=ratio, num_assistant_tokens=4)
    out = generate(llama, inputs, 40, eos_token_id=eos, assistant_strategy=config)
    assert torch.equal(out.sequences, plain(llama, inputs, 40, eos_token_id=eos))
    short = out.speculation.accept_lengths[1]
    assert sum(short) == 39 and short[0] == 1
    if ratio == 1:
        assert max(short) == 5 and out.speculation.acceptance_rate > 0.85


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 10, "eos_token_id": 5},
        {"bad_words_ids": [[7], [9, 11]]},
        {"temperature": 0.7, "top_k": 12, "top_p": 0.9, "do_sample": True, "repetition_penalty": 1.3},
        {"do_sample": True, "min_p": 0.05, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
def test_processors_reach_drafts_and_verification(llama, options):
    """Greedy text equals stock's; dense drafts are accepted throughout, so both sides were processed alike."""
    inputs = prompts(40, 21)
    out = []
    for ratio in (1.0, 0.1):
        torch.manual_seed(5)
        out.append(generate(llama, inputs, 25, assistant_strategy=vegas(kv_ratio=ratio), **options))
        if not options.get("do_sample"):
            assert torch.equal(out[-1].sequences, plain(llama, inputs, 25, **options))
        if options.get("no_repeat_ngram_size"):
            for row in out[-1].sequences:
                pairs = list(zip(row[-25:].tolist(), row[-24:].tolist(), strict=False))
                assert len(set(pairs)) == len(pairs)
    if "eos_token_id" not in options:
        assert out[0].speculation.acceptance_rate == 1


def test_a_seed_reproduces_a_sampled_call(llama):
    texts = []
    for _ in range(2):
        torch.manual_seed(3)
        texts.append(generate(llama, prompts(30, 12), assistant_strategy=vegas(), do_sample=True).sequences)
    assert torch.equal(*texts)


def test_one_prompt_token(llama):
    """The shortest prompt: nothing to prefill, one candidate."""
    inputs = prompts(1, 1)
    out = generate(llama, inputs, assistant_strategy=vegas())
    assert torch.equal(out.sequences, plain(llama, inputs))


def test_statistics_add_up(llama):
    stats = generate(llama, prompts(50, 30), 30, assistant_strategy=vegas(kv_ratio=0.2)).speculation
    assert [sum(lengths) for lengths in stats.accept_lengths] == [29, 29]
    assert stats.num_accepted_tokens == sum(stats.num_accepted_tokens_per_pos)
    assert stats.num_accepted_tokens + sum(map(len, stats.accept_lengths)) == 58
    assert stats.method["mean_kv_budget"] > 5
