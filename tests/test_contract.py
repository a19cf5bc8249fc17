"""The contract that every registered strategy and preset keeps, checked against stock `generate()`."""

from __future__ import annotations

import copy
import functools
import pickle
import threading

import families
import pytest
import torch
from families import NAMES, SLIDING, extras, family, generate, letter, tokenizer
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

from hf_specdec.generation.models.surgery import decoder_layers
from hf_specdec.generation.strategy import SpeculationStrategy
from hf_specdec.registry import presets, strategy_class


PRESETS = presets()
LOSSLESS = [name for name in PRESETS if families.configured(name).lossless]
every_preset = pytest.mark.parametrize("strategy", PRESETS)
lossless_preset = pytest.mark.parametrize("strategy", LOSSLESS)
# families that differ in what matters away from the attention itself: plain, hybrid windows, learned positions
SOME = ["llama", "gemma3", "gpt2"]
some_families = pytest.mark.parametrize("name", SOME)
every_family = pytest.mark.parametrize("name", NAMES)
# what comes back is cut from the cache that is checked after every round in all families; so further presets meet some
every_strategy_and_family = pytest.mark.parametrize(
    "strategy, name", [(preset, name) for preset in PRESETS for name in (SOME if ":" in preset else NAMES)]
)


class Streamer(BaseStreamer):
    """Keeps what it gets, and counts `end`."""

    def __init__(self):
        self.parts, self.ended = [], 0

    def put(self, value):
        assert not self.ended, "a token after `end`"
        self.parts.append(value.clone())

    def end(self):
        self.ended += 1


class Fails:
    """Raises at its n-th call, as processor, criterion, streamer or hook; before that it changes nothing."""

    def __init__(self, at):
        self.left = at

    def tick(self):
        self.left -= 1
        if self.left < 0:
            raise KeyError("raised on purpose")


class FailingProcessor(Fails, LogitsProcessor):
    def __call__(self, input_ids, scores):
        self.tick()
        return scores


class FailingCriterion(Fails, StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        self.tick()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class FailingStreamer(Fails, BaseStreamer):
    def put(self, value):
        self.tick()

    def end(self):
        pass


class Stop(StoppingCriteria):
    """Ends a row at the n-th occurrence of a token in the text that it is shown, and checks what it is shown."""

    def __init__(self, token, times=1):
        self.token, self.times, self.widths = token, times, []

    def __call__(self, input_ids, scores, **kwargs):
        self.widths.append(input_ids.shape[1])
        return (input_ids == self.token).sum(dim=1) >= self.times


class PushPastText(LogitsProcessor):
    """Depends on the whole prefix, its order, its padding and its row."""

    def __call__(self, input_ids, scores):
        weights = torch.arange(1, input_ids.shape[1] + 1)
        key = (input_ids * weights).sum(dim=1) + torch.arange(input_ids.shape[0])
        scores = scores.clone()
        scores[torch.arange(len(key)), key % scores.shape[1]] += 4.0
        return scores


PROCESSORS = {
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[4], [9, 11], [20, 3]],
    "min_new_tokens": 15,
    "suppress_tokens": [5, 6, 7, 8, 9],
    "begin_suppress_tokens": [2, 5, 30, 48],
    "forced_eos_token_id": 3,
    "sequence_bias": [[[7], 4.0], [[8, 9], 6.0]],
    "encoder_repetition_penalty": 1.5,
    "exponential_decay_length_penalty": (4, 1.5),
    "logits_processor": [PushPastText()],
    "prefix_allowed_tokens_fn": lambda row, ids: [t for t in range(2, 60) if (t + row + len(ids)) % 3],
}


def in_turn(strategy, rows):
    """Whether these rows are decoded one after the other, so that nothing can look at all of them column by column."""
    return rows > 1 and not strategy_class(strategy.partition(":")[0]).batched


# calls that are made under stock and under every preset


def with_cache(model):
    """Return a call whose cache comes back."""
    return {**model.batch, "max_new_tokens": 20, "eos_token_id": model.eos, "return_dict_in_generate": True}


def second_turn(model, text):
    """Return what goes with `text` and a returned cache."""
    mask = grown(model.mask, text.shape[1])
    return {"attention_mask": mask, "max_new_tokens": 20, "return_dict_in_generate": True}


def scored(model):
    """Return a call with scores, which a processor changes, and logits."""
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    return {**model.batch, **wanted, "max_new_tokens": 24, "eos_token_id": model.eos, "repetition_penalty": 1.3}


def stopped(rows, with_eos, stop):
    """Return a call under a criterion; where there is an EOS, stock pads the rows that finished."""
    model = family("llama")
    extra = {"eos_token_id": model.eos} if with_eos else {}
    wanted = {"return_dict_in_generate": True, "stopping_criteria": StoppingCriteriaList([stop])}
    return {**model.inputs(rows), **extra, **wanted, "max_new_tokens": 24}


def stopped_by_strings(rows, strings):
    """Return a call under stop strings."""
    call = {"max_new_tokens": 24, "stop_strings": strings, "tokenizer": tokenizer()}
    return {**family("llama").inputs(rows), **call}


def processed(rows, processor):
    """Return a call under one of `PROCESSORS`."""
    model, call = family("llama"), {processor: PROCESSORS[processor], "max_new_tokens": 24}
    return {**model.inputs(rows), **call, "eos_token_id": model.eos}


# what stock gives, once for all presets


@functools.cache
def stock_tokens(name, rows, new, *eos):
    """Return stock's greedy output, up to one of `eos`, or to the family's own."""
    model = family(name)
    return model.stock(**model.inputs(rows), max_new_tokens=new, eos_token_id=list(eos) or model.eos)


@functools.cache
def stock_text(name, rows, new=24):
    """Return the new tokens of stock's greedy output, which nothing ends."""
    model = family(name)
    return model.stock(**model.inputs(rows), max_new_tokens=new)[:, model.ids.shape[1] :]


@functools.cache
def stock_stopped(rows, with_eos, token):
    """Return stock's output under `Stop(token, 2)` and the widths that the criterion was shown."""
    stop = Stop(token, 2)
    return family("llama").stock(**stopped(rows, with_eos, stop)).sequences, stop.widths


@functools.cache
def stock_strings(rows, *strings):
    """Return stock's output under stop strings."""
    return family("llama").stock(**stopped_by_strings(rows, list(strings)))


@functools.cache
def stock_processed(rows, processor):
    """Return stock's output under one of `PROCESSORS`."""
    return family("llama").stock(**processed(rows, processor))


@functools.cache
def stock_scores(name):
    """Return stock's output with scores and logits."""
    return family(name).stock(**scored(family(name)))


@functools.cache
def stock_caches(name):
    """Return stock's output with its cache, which nothing may write to."""
    model = family(name)
    return model.stock(**with_cache(model))


@functools.cache
def stock_turns(name):
    """Return the text of a second turn over stock's own cache, and stock's answer; nothing may write to its cache."""
    model = family(name)
    first = model.stock(**model.batch, max_new_tokens=11, return_dict_in_generate=True)
    text = torch.cat([first.sequences, families.prompts((5, 5, 5, 5), seed=7)[0]], dim=1)
    return text, model.stock(text, past_key_values=first.past_key_values, **second_turn(model, text))


def new_tokens(sequences, width, eos):
    """Return the tokens of each row up to its EOS."""
    rows = []
    for row in sequences[:, width:].tolist():
        rows.append(row[: row.index(eos) + 1] if eos in row else row)
    return rows


@torch.no_grad()
def fresh_keys(model, tokens):
    """Return keys and values of each layer from one stock forward over a single row."""
    cache = DynamicCache()
    model(tokens[None], past_key_values=cache, use_cache=True)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def same_cache(cache, expected, mask, tolerance):
    """Compare two caches in stock's layout at the real columns of `mask`."""
    assert type(cache) is type(expected)
    assert cache.get_seq_length() == expected.get_seq_length()
    for ours, theirs in zip(cache.layers, expected.layers, strict=True):
        assert type(ours) is type(theirs)
        assert ours.keys.shape == theirs.keys.shape
        real = mask[:, : cache.get_seq_length()][:, -ours.keys.shape[2] :].bool()[:, None, :, None]
        for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            torch.testing.assert_close(a * real, torch.where(real, b, 0), rtol=0, atol=tolerance)


def grown(mask, width):
    """Return `mask` with ones appended up to `width` columns."""
    return torch.cat([mask, mask.new_ones(len(mask), width - mask.shape[1])], dim=1)


# tokens


@every_family
@lossless_preset
@pytest.mark.parametrize("rows, tokens", [(1, 3), (4, 5)])
def test_greedy_ids_equal_stock(strategy, name, rows, tokens):
    model = family(name)
    for new in (1, 2, 3, 50):
        expected = stock_tokens(name, rows, new)
        out = model.ours(strategy, **model.inputs(rows), tokens=tokens, max_new_tokens=new, eos_token_id=model.eos)
        assert torch.equal(out, expected), f"max_new_tokens={new}"


@pytest.mark.parametrize("name", NAMES)
def test_the_families_try_something(name):
    """Texts are varied, rows end at different columns, and drafts are accepted now and then."""
    model = family(name)
    text = model.stock(**model.batch, max_new_tokens=50)[:, model.ids.shape[1] :]
    assert sum(len(row.unique()) for row in text) >= 24
    ended = model.stock(**model.batch, max_new_tokens=50, eos_token_id=model.eos)
    ends = [len(row) for row in new_tokens(ended, model.ids.shape[1], model.eos)]
    assert min(ends) < 50
    assert len(set(ends)) > 1
    out = model.ours("assisted", **model.batch, max_new_tokens=50, return_dict_in_generate=True)
    per_pos = out.speculation.num_accepted_tokens_per_pos
    assert 0 < per_pos[-1] <= per_pos[0] < out.speculation.num_drafts


@every_preset
@some_families
def test_eos_inside_a_draft_and_eos_lists(strategy, name):
    model, text = family(name), stock_text(name, 4)
    # tokens of the text as EOS in turn meet every place of a draft, and every other one stands in a list
    for index, token in enumerate(text[1].unique().tolist()[:8]):
        ends = [token, int(text[0, 9])] if index % 2 else [token]
        eos = ends if index % 2 else token
        out = model.ours(strategy, **model.batch, max_new_tokens=24, eos_token_id=eos, tokens=5)
        assert torch.equal(out, stock_tokens(name, 4, 24, *ends)), eos


@every_preset
def test_prompt_of_one_token(strategy, llama):
    ids = torch.tensor([[5]])
    expected = llama.stock(ids, max_new_tokens=12)
    assert torch.equal(llama.ours(strategy, ids, max_new_tokens=12), expected)


@every_preset
def test_max_length_instead_of_max_new_tokens(strategy, llama):
    expected = llama.stock(**llama.batch, max_length=31)
    assert torch.equal(llama.ours(strategy, **llama.batch, max_length=31), expected)


@every_preset
def test_positional_arguments(strategy, llama):
    expected = llama.stock(llama.ids[:1], max_new_tokens=9)
    assert torch.equal(llama.ours(strategy, llama.ids[:1], max_new_tokens=9), expected)


# what comes beside the tokens


@every_preset
@some_families
def test_scores_and_logits_equal_stock(strategy, name):
    model = family(name)
    expected, out = stock_scores(name), model.ours(strategy, **scored(model))
    assert torch.equal(out.sequences, expected.sequences)
    for field in ("scores", "logits"):
        ours, theirs = getattr(out, field), getattr(expected, field)
        assert isinstance(ours, tuple)
        assert len(ours) == len(theirs) == out.sequences.shape[1] - model.ids.shape[1]
        for column, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m, c=column, f=field: f"{f} {c}: {m}")


@every_preset
def test_return_dict_on_and_off(strategy, llama):
    kwargs = {**llama.batch, "max_new_tokens": 9}
    out = llama.ours(strategy, **kwargs, return_dict_in_generate=True)
    assert torch.equal(llama.ours(strategy, **kwargs), out.sequences)
    assert out.scores is None and out.logits is None
    assert out.attentions is None and out.hidden_states is None
    assert out.speculation is not None


@every_strategy_and_family
def test_returned_cache_equals_stock(strategy, name):
    model = family(name)
    expected, out = stock_caches(name), model.ours(strategy, **with_cache(model))
    assert torch.equal(out.sequences, expected.sequences)
    mask = grown(model.mask, out.sequences.shape[1])
    same_cache(out.past_key_values, expected.past_key_values, mask, 10 * model.tolerance)


@every_strategy_and_family
def test_second_turn_with_the_returned_cache(strategy, name):
    model = family(name)
    text, theirs = stock_turns(name)
    out = model.ours(strategy, **model.batch, max_new_tokens=11, return_dict_in_generate=True)
    assert torch.equal(out.sequences, text[:, : out.sequences.shape[1]])
    ours = model.ours(strategy, text, past_key_values=out.past_key_values, **second_turn(model, text))
    assert torch.equal(ours.sequences, theirs.sequences)
    assert ours.past_key_values is out.past_key_values
    mask = grown(model.mask, ours.sequences.shape[1])
    same_cache(ours.past_key_values, theirs.past_key_values, mask, 100 * model.tolerance)


@every_preset
@some_families
def test_a_cache_of_the_caller_is_updated_in_place_over_turns(strategy, name):
    model = family(name)
    caches = [DynamicCache(config=model.model.config) for _ in range(2)]
    text, mask = model.ids, model.mask
    for turn in range(3):
        kwargs = {"attention_mask": mask, "max_new_tokens": 7}
        expected = model.stock(text, past_key_values=caches[0], **kwargs)
        out = model.ours(strategy, text, past_key_values=caches[1], **kwargs)
        assert torch.equal(out, expected), f"turn {turn}"
        assert caches[1].get_seq_length() == caches[0].get_seq_length() == out.shape[1] - 1
        text = torch.cat([out, families.prompts((4, 4, 4, 4), seed=turn)[0]], dim=1)
        mask = grown(mask, text.shape[1])
    same_cache(caches[1], caches[0], mask, 100 * model.tolerance)


@every_preset
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_second_turn_over_a_cache_with_masked_columns_inside(strategy, name):
    """Rows that ended early are padded in the middle of the text; the next turn's mask leaves that out."""
    assert name not in SLIDING  # stock counts a window in columns, so masked ones shorten it there
    model = family(name)
    first = {**model.batch, "max_new_tokens": 24, "eos_token_id": model.eos, "return_dict_in_generate": True}
    expected, out = model.stock(**first), model.ours(strategy, **first)
    text = torch.cat([expected.sequences, families.prompts((5, 5, 5, 5), seed=7)[0]], dim=1)
    mask = grown(model.mask, text.shape[1])
    width = model.ids.shape[1]
    for row, kept in enumerate(new_tokens(expected.sequences, width, model.eos)):
        mask[row, width + len(kept) : expected.sequences.shape[1]] = 0
    assert not mask[:, width:].all()
    turn = {"attention_mask": mask, "max_new_tokens": 20}
    theirs = model.stock(text, past_key_values=expected.past_key_values, **turn)
    ours = model.ours(strategy, text, past_key_values=out.past_key_values, **turn)
    assert torch.equal(ours, theirs)


@every_preset
def test_second_turn_from_a_cache_that_holds_all_but_one_token(strategy, llama):
    """The shortest legal continuation: nothing but the pending token is new."""
    first = {**llama.one, "max_new_tokens": 6, "return_dict_in_generate": True}
    expected, out = llama.stock(**first), llama.ours(strategy, **first)
    theirs = llama.stock(expected.sequences, past_key_values=expected.past_key_values, max_new_tokens=10)
    ours = llama.ours(strategy, out.sequences, past_key_values=out.past_key_values, max_new_tokens=10)
    assert torch.equal(ours, theirs)


@every_preset
@pytest.mark.parametrize("rows", [1, 4])
def test_num_return_sequences(strategy, rows, llama):
    torch.manual_seed(3)
    kwargs = {**llama.inputs(rows), "max_new_tokens": 9, "num_return_sequences": 3, "do_sample": True}
    out = llama.ours(strategy, **kwargs, return_dict_in_generate=True)
    width = llama.ids.shape[1]
    assert out.sequences.shape == (3 * rows, width + 9)
    assert torch.equal(out.sequences[:, :width], llama.inputs(rows)["input_ids"].repeat_interleave(3, dim=0))
    assert len({tuple(row) for row in out.sequences.tolist()}) > rows
    assert len(out.speculation.accept_lengths) == 3 * rows


@every_preset
def test_sampling_follows_the_seed(strategy, llama):
    def sample(seed):
        torch.manual_seed(seed)
        return llama.ours(strategy, **llama.batch, max_new_tokens=16, do_sample=True, temperature=1.4, top_k=30)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


@every_preset
@some_families
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_prefill_chunk_size(strategy, name, chunk):
    model = family(name)
    expected = stock_tokens(name, 4, 8)
    kwargs = {"max_new_tokens": 8, "eos_token_id": model.eos, "prefill_chunk_size": chunk}
    assert torch.equal(model.ours(strategy, **model.batch, **kwargs), expected)


# streams and stops


@every_preset
@pytest.mark.parametrize("new", [1, 2, 30])
def test_streamer_sees_each_returned_token_once(strategy, new, llama):
    kwargs = {**llama.one, "max_new_tokens": new, "eos_token_id": llama.eos}
    theirs, ours = Streamer(), Streamer()
    llama.stock(**kwargs, streamer=theirs)
    out = llama.ours(strategy, **kwargs, streamer=ours)
    assert torch.equal(ours.parts[0], llama.ids[:1])
    assert torch.cat([part.reshape(-1) for part in ours.parts]).tolist() == out[0].tolist()
    assert [part.shape for part in ours.parts] == [part.shape for part in theirs.parts]
    assert ours.ended == 1


@every_preset
def test_streamer_of_a_batch_gets_columns(strategy, llama):
    if not strategy_class(strategy.partition(":")[0]).batched:
        pytest.skip("decodes rows in turn, and refuses a streamer")
    kwargs = {**llama.batch, "max_new_tokens": 30, "eos_token_id": llama.eos}
    theirs, ours = Streamer(), Streamer()
    llama.stock(**kwargs, streamer=theirs)
    out = llama.ours(strategy, **kwargs, streamer=ours)
    assert len(ours.parts) == len(theirs.parts)
    assert all(torch.equal(a, b) for a, b in zip(ours.parts, theirs.parts, strict=True))
    assert torch.equal(torch.stack(ours.parts[1:], dim=1), out[:, llama.ids.shape[1] :])
    assert ours.ended == 1


@every_preset
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("with_eos", [False, True])
def test_custom_criterion_cuts_at_the_exact_token(strategy, rows, with_eos, llama):
    for token in stock_text("llama", rows)[-1].unique().tolist()[:5]:
        stop = Stop(token, 2)
        kwargs = stopped(rows, with_eos, stop)
        if in_turn(strategy, rows):
            with pytest.raises(ValueError, match="Stop.*one row per call"):
                llama.ours(strategy, **kwargs)
            return
        expected, widths = stock_stopped(rows, with_eos, token)
        out = llama.ours(strategy, **kwargs, tokens=5)
        assert torch.equal(out.sequences, expected), token
        assert stop.widths == widths, token
        check_statistics(out, llama, rows, exact_rows=rows == 1)


@every_preset
@pytest.mark.parametrize("rows", [1, 4])
def test_stop_strings(strategy, rows, llama):
    text = stock_text("llama", rows)
    for index, place in enumerate((0, 1, 3, 4, 7, 10)):
        one = letter(int(text[-1, place]))
        two = "".join(letter(int(token)) for token in text[0, place : place + 2])
        strings = ([one, two], one, two)[index % 3]
        kwargs = stopped_by_strings(rows, strings)
        if in_turn(strategy, rows):
            with pytest.raises(ValueError, match="StopString.*one row per call"):
                llama.ours(strategy, **kwargs)
            return
        expected = stock_strings(rows, *(strings if isinstance(strings, list) else [strings]))
        assert torch.equal(llama.ours(strategy, **kwargs, tokens=5), expected), strings


@every_preset
def test_max_time_stops_after_the_first_token(strategy, llama):
    out = llama.ours(strategy, **llama.one, max_new_tokens=30, max_time=1e-9)
    assert torch.equal(out, llama.stock(**llama.one, max_new_tokens=30, max_time=1e-9))
    assert out.shape[1] == llama.ids.shape[1] + 1


@every_preset
def test_criterion_sees_scores_where_they_are_collected(strategy, llama):
    class Sees(StoppingCriteria):
        def __init__(self):
            self.seen = []

        def __call__(self, input_ids, scores, **kwargs):
            self.seen.append(None if scores is None else (len(scores), scores[-1].argmax(dim=-1).tolist()))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    for collect in (False, True):
        theirs, ours = Sees(), Sees()
        kwargs = {**llama.one, "max_new_tokens": 9, "return_dict_in_generate": True, "output_scores": collect}
        llama.stock(**kwargs, stopping_criteria=[theirs])
        llama.ours(strategy, **kwargs, stopping_criteria=[ours])
        assert [x for x in ours.seen if x] == [x for x in theirs.seen if x]


# processors


@every_preset
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_processors_under_greedy_equal_stock(strategy, rows, processor, llama):
    assert torch.equal(llama.ours(strategy, **processed(rows, processor)), stock_processed(rows, processor))


# statistics


def check_statistics(out, model, rows, exact_rows=True):
    stats = out.speculation
    width = model.ids.shape[1]
    if out.sequences.shape[1] == width + 1:
        assert stats is None  # the prompt's forward gave the only token
        return
    assert len(stats.accept_lengths) == rows
    if exact_rows:
        total = out.sequences.shape[1] - width
        assert [sum(row) + 1 for row in stats.accept_lengths] == [total] * rows
    steps = sum(len(row) for row in stats.accept_lengths)
    emitted = sum(map(sum, stats.accept_lengths))
    least = 0 if "ticks" in stats.method else 1  # a pipeline that is filling up emits nothing
    assert all(length >= least for row in stats.accept_lengths for length in row)
    assert stats.num_drafts == steps
    assert stats.num_accepted_tokens == sum(stats.num_accepted_tokens_per_pos) <= stats.num_draft_tokens
    assert stats.num_accepted_tokens <= emitted <= stats.num_accepted_tokens + steps
    per_pos = stats.num_accepted_tokens_per_pos
    assert per_pos == sorted(per_pos, reverse=True)
    assert stats.mean_tokens_per_step == pytest.approx(emitted / steps if steps else 0.0)
    rate = stats.num_accepted_tokens / stats.num_draft_tokens if stats.num_draft_tokens else 0.0
    assert stats.acceptance_rate == pytest.approx(rate)
    assert stats.target_forwards >= max(len([1 for length in row if length]) for row in stats.accept_lengths)


@every_preset
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("new", [1, 2, 40])
@pytest.mark.parametrize("sample", [False, True])
def test_statistics_add_up(strategy, rows, new, sample, llama):
    out = llama.ours(
        strategy, **llama.inputs(rows), max_new_tokens=new, return_dict_in_generate=True, do_sample=sample
    )
    check_statistics(out, llama, rows)


@every_preset
def test_statistics_count_up_to_eos(strategy, llama):
    out = llama.ours(
        strategy, **llama.batch, max_new_tokens=40, return_dict_in_generate=True, eos_token_id=llama.eos, tokens=5
    )
    check_statistics(out, llama, 4, exact_rows=False)
    kept = new_tokens(out.sequences, llama.ids.shape[1], llama.eos)
    assert [sum(row) + 1 for row in out.speculation.accept_lengths] == [len(row) for row in kept]


@every_preset
def test_forwards_are_those_that_ran(strategy, llama):
    """Every pass through all layers is counted, also drafts by the whole model, and one more for the prompt's head."""
    calls, cls = [], strategy_class(strategy.partition(":")[0])
    handle = decoder_layers(llama.model)[-1].register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        out = llama.ours(strategy, **llama.one, max_new_tokens=30)
        calls.clear()
        out = llama.ours(strategy, **llama.one, max_new_tokens=30, return_dict_in_generate=True)
    finally:
        handle.remove()
    stats = out.speculation
    drafts_itself = cls.make_drafter is not SpeculationStrategy.make_drafter and not cls.needs_assistant
    own = stats.draft_forwards if drafts_itself else 0
    own += stats.method.get("slim_forwards", 0)  # the last layer always stays
    prompt = len(calls) - stats.target_forwards - own
    assert prompt in (1, 2)


# the model afterwards


def snapshot(model):
    """Return everything of `model` that a call must leave as it was."""
    probe = torch.arange(2, 12)[None]
    modules = {}
    for path, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if key[0] != "_"}
        hooks = [
            len(getattr(module, key)) for key in ("_forward_hooks", "_forward_pre_hooks", "_buffers", "_parameters")
        ]
        modules[path] = (sorted(vars(module)), repr(own.get("config")), own.get("forward"), hooks, module.training)
    return {
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
        "attention type": type(model.config._attn_implementation),
        "generation config": model.generation_config.to_dict(),
        "config keys": sorted(vars(model.config)),
        "modules": modules,
        "logits": model(probe).logits.tolist(),
    }


@every_preset
@some_families
def test_the_model_is_as_before_after_success(strategy, name):
    model = family(name)
    before, assistant = snapshot(model.model), snapshot(model.assistant)
    model.ours(strategy, **model.batch, max_new_tokens=12)
    model.ours(strategy, **model.one, max_new_tokens=12, do_sample=True)
    assert snapshot(model.model) == before
    assert snapshot(model.assistant) == assistant


@every_preset
@pytest.mark.parametrize("what", ["processor", "criterion", "streamer", "forward", "assistant", "commit"])
@pytest.mark.parametrize("at", [0, 1, 2, 5])
def test_the_model_is_as_before_after_an_exception(strategy, what, at, llama, monkeypatch):
    cls = strategy_class(strategy.partition(":")[0])
    if what == "assistant" and not extras(strategy, llama.assistant):
        pytest.skip("has no assistant")
    before, assistant = snapshot(llama.model), snapshot(llama.assistant)
    kwargs, hook, fails = {}, None, Fails(at)
    if what == "processor":
        kwargs["logits_processor"] = LogitsProcessorList([FailingProcessor(at)])
    elif what == "criterion":
        kwargs["stopping_criteria"] = StoppingCriteriaList([FailingCriterion(at)])
    elif what == "streamer":
        kwargs["streamer"] = FailingStreamer(at)
    elif what == "commit":
        original = cls.commit

        def commit(self, state, kept):
            fails.tick()
            original(self, state, kept)

        monkeypatch.setattr(cls, "commit", commit)
    else:
        target = llama.model if what == "forward" else llama.assistant
        hook = decoder_layers(target)[-1].register_forward_pre_hook(lambda *_: fails.tick())
    try:
        with pytest.raises(KeyError, match="on purpose"):
            llama.ours(strategy, **llama.one, max_new_tokens=30, **kwargs)
    finally:
        if hook is not None:
            hook.remove()
    monkeypatch.undo()
    assert snapshot(llama.model) == before
    assert snapshot(llama.assistant) == assistant
    expected = stock_tokens("llama", 1, 12)
    assert torch.equal(llama.ours(strategy, **llama.one, max_new_tokens=12, eos_token_id=llama.eos), expected)


@every_preset
@every_family
def test_cache_after_every_round_equals_a_fresh_forward(strategy, name, monkeypatch):
    model, cls = family(name), strategy_class(strategy.partition(":")[0])
    original, seen, texts = cls.commit, [], {}

    def commit(self, state, kept):
        original(self, state, kept)
        for slot, row in enumerate(state.active):
            texts[row] = state.text.tokens[row, : state.committed[slot]].clone()
            for index, layer in enumerate(state.target.cache.layers):
                clean = self.clean_length(state, index, row)
                assert 0 < clean <= len(texts[row])
                held = (layer.keys[slot, :, :clean].clone(), layer.values[slot, :, :clean].clone())
                seen.append((row, index, *held))

    monkeypatch.setattr(cls, "commit", commit)
    out = model.ours(strategy, **model.batch, max_new_tokens=16, eos_token_id=model.eos)
    assert torch.equal(out, stock_tokens(name, 4, 16))
    # nothing looks ahead, so what one forward over a row's whole text gives is also right for each shorter one
    fresh = {row: fresh_keys(model.model, text) for row, text in texts.items()}
    assert len(fresh) == 4
    for row, index, *held in seen:
        for ours, theirs in zip(held, fresh[row][index], strict=True):
            torch.testing.assert_close(ours, theirs[:, : ours.shape[1]], rtol=0, atol=10 * model.tolerance)


# several at once, copies, adapters, pipelines


def in_threads(*calls):
    """Run the calls at the same time, several times each, and return their last results."""
    results, errors = [None] * len(calls), []
    barrier = threading.Barrier(len(calls))

    def run(index, call):
        try:
            barrier.wait()
            for _ in range(3):
                results[index] = call()
        except BaseException as error:  # noqa: BLE001 - handed to the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


@every_preset
def test_two_threads_with_two_models(strategy, llama):
    other = family("gemma3")
    results = in_threads(
        lambda: llama.ours(strategy, **llama.batch, max_new_tokens=12),
        lambda: other.ours(strategy, **other.batch, max_new_tokens=12),
    )
    for model, out in zip((llama, other), results, strict=True):
        assert torch.equal(out, model.stock(**model.batch, max_new_tokens=12))


@every_preset
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_two_threads_with_models_that_share_a_config(strategy, attention, llama):
    """One generates under the strategy while the other decodes stock, and while it does so too."""
    model = copy.deepcopy(llama.model)
    model.set_attn_implementation(attention)
    other = type(model)(model.config).double().eval()
    other.generation_config = copy.deepcopy(model.generation_config)
    assert other.config is model.config
    assistant = copy.deepcopy(llama.assistant)  # no model, assistants included, runs in two threads at once
    # float64 and left padding make eager attention NaN in stock, so the prompts are even
    ids = families.prompts((9, 9))[0]
    kwargs = {"max_new_tokens": 12, "do_sample": False}
    expected = [m.generate(ids, **kwargs) for m in (model, other)]
    before = model.config._attn_implementation
    for second in (
        lambda: other.generate(ids, **kwargs),
        lambda: generate(other, strategy, ids, assistant=assistant, max_new_tokens=12),
    ):
        results = in_threads(
            lambda: generate(model, strategy, ids, assistant=llama.assistant, max_new_tokens=12), second
        )
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert model.config._attn_implementation == before
    assert type(model.config._attn_implementation) is str


@every_preset
def test_deepcopy_and_pickle_after_a_call(strategy, llama):
    model = copy.deepcopy(llama.model)
    generate(model, strategy, **llama.one, assistant=llama.assistant, max_new_tokens=6)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other.lm_head.weight.copy_(other.lm_head.weight.flip(0))
        expected = other.generate(**llama.one, max_new_tokens=15, do_sample=False)
        out = generate(other, strategy, **llama.one, assistant=llama.assistant, max_new_tokens=15)
        assert torch.equal(out, expected)
        assert not torch.equal(out, llama.stock(**llama.one, max_new_tokens=15))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@every_preset
def test_peft_lora_model(strategy, llama):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(5)
    model = peft.get_peft_model(copy.deepcopy(llama.model), config).eval()
    expected = model.generate(**llama.batch, max_new_tokens=20, do_sample=False)
    assert not torch.equal(expected, llama.stock(**llama.batch, max_new_tokens=20))
    out = generate(model, strategy, **llama.batch, assistant=llama.assistant, max_new_tokens=20)
    assert torch.equal(out, expected)


@every_preset
def test_pipeline(strategy, llama):
    pipe = pipeline("text-generation", model=llama.model, tokenizer=tokenizer(), device="cpu")
    texts = ["Hello", "you"]
    kwargs = {"max_new_tokens": 12, "do_sample": False, "batch_size": 2}
    ours = {"assistant_strategy": families.configured(strategy), **families.extras(strategy, llama.assistant)}
    assert pipe(texts, **kwargs, **ours) == pipe(texts, **kwargs)
