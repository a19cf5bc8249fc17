"""The contract on calls: seeds, prefill, streamers, criteria, stop strings and processors."""

from __future__ import annotations

import functools

import pytest
import torch
from contract_cases import alternating, check_statistics, counted, every_base, stock_text, stock_tokens
from families import family, letter, tokenizer
from streams import Streamer
from tiers import SOME
from transformers import (
    LogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

from hf_specdec.registry import strategy_class


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


def stopped(rows, with_eos, stop):
    """Return a call under a criterion; where there is an EOS, stock pads the rows that finished."""
    model = family("llama")
    extra = {"eos_token_id": model.eos} if with_eos else {}
    wanted = {"stopping_criteria": StoppingCriteriaList([stop])}
    return {**model.inputs(rows), **extra, **wanted, "max_new_tokens": 24}


def stopped_by_strings(rows, strings):
    """Return a call under stop strings."""
    call = {"max_new_tokens": 24, "stop_strings": strings, "tokenizer": tokenizer()}
    return {**family("llama").inputs(rows), **call}


def processed(rows, processor):
    """Return a call under one of `PROCESSORS`."""
    model, call = family("llama"), {processor: PROCESSORS[processor], "max_new_tokens": 24}
    return {**model.inputs(rows), **call, "eos_token_id": model.eos}


@functools.cache
def stock_stopped(rows, with_eos, token):
    """Return stock's output under `Stop(token, 2)` and the widths that the criterion was shown."""
    stop = Stop(token, 2)
    return family("llama").stock(**stopped(rows, with_eos, stop)), stop.widths


@functools.cache
def stock_strings(rows, *strings):
    """Return stock's output under stop strings."""
    return family("llama").stock(**stopped_by_strings(rows, list(strings)))


@functools.cache
def stock_processed(rows, processor):
    """Return stock's output under one of `PROCESSORS`."""
    return family("llama").stock(**processed(rows, processor))


@every_base
@pytest.mark.parametrize("rows", [1, 4])
def test_num_return_sequences(strategy, rows, llama):
    torch.manual_seed(3)
    kwargs = {**llama.inputs(rows), "max_new_tokens": 9, "num_return_sequences": 3, "do_sample": True}
    out, stats = counted(llama, strategy, **kwargs)
    width = llama.ids.shape[1]
    assert out.sequences.shape == (3 * rows, width + 9)
    assert torch.equal(out.sequences[:, :width], llama.inputs(rows)["input_ids"].repeat_interleave(3, dim=0))
    assert len({tuple(row) for row in out.sequences.tolist()}) > rows
    assert len(stats.accept_lengths) == 3 * rows


@every_base
def test_sampling_follows_the_seed(strategy, llama):
    def sample(seed):
        torch.manual_seed(seed)
        return llama.ours(strategy, **llama.batch, max_new_tokens=16, do_sample=True, temperature=1.4, top_k=30)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


@alternating(
    "name, chunk", *(list(zip(SOME, (1, 4, 64)[turn:] + (1, 4, 64)[:turn], strict=True)) for turn in range(3))
)
def test_prefill_chunk_size(strategy, name, chunk):
    model = family(name)
    expected = stock_tokens(name, 4, 8)
    kwargs = {"max_new_tokens": 8, "eos_token_id": model.eos, "prefill_chunk_size": chunk}
    assert torch.equal(model.ours(strategy, **model.batch, **kwargs), expected)


# streams and stops


@every_base
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


@every_base
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


@alternating("rows, with_eos", [(1, False), (4, True)], [(1, True), (4, False)], variants=[(4, True)])
def test_custom_criterion_cuts_at_the_exact_token(strategy, rows, with_eos, llama):
    for token in stock_text("llama", rows)[-1].unique().tolist()[:5]:
        stop = Stop(token, 2)
        kwargs = stopped(rows, with_eos, stop)
        if in_turn(strategy, rows):
            with pytest.raises(ValueError, match="Stop.*one row per call"):
                llama.ours(strategy, **kwargs)
            return
        expected, widths = stock_stopped(rows, with_eos, token)
        out, stats = counted(llama, strategy, **kwargs, tokens=5)
        assert torch.equal(out.sequences, expected), token
        assert stop.widths == widths, token
        check_statistics(out, stats, llama, rows, exact_rows=rows == 1)


@every_base
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


@every_base
def test_max_time_stops_after_the_first_token(strategy, llama):
    out = llama.ours(strategy, **llama.one, max_new_tokens=30, max_time=1e-9)
    assert torch.equal(out, llama.stock(**llama.one, max_new_tokens=30, max_time=1e-9))
    assert out.shape[1] == llama.ids.shape[1] + 1


@every_base
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


@alternating(
    "processor, rows",
    [(name, (1, 4)[place % 2]) for place, name in enumerate(PROCESSORS)],
    [(name, (4, 1)[place % 2]) for place, name in enumerate(PROCESSORS)],
    variants=[("logits_processor", 4)],
)
def test_processors_under_greedy_equal_stock(strategy, processor, rows, llama):
    assert torch.equal(llama.ours(strategy, **processed(rows, processor)), stock_processed(rows, processor))
