"""Where SpecBound's text ends: EOS, streamers, stop strings, criteria and the last position."""

from __future__ import annotations

import pytest
import torch
from families import build, letter, tokenizer
from specbound_cases import (
    ALL,
    BOUND,
    bounded,
    check_round,
    everywhere,
    exits,
    ours,
    random_heads,
    rounds,
    same_as_token_by_token,
    scripted,
    truth,
)
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from hf_specdec import SpecBoundConfig


# where a text ends


@pytest.mark.parametrize("lag", [False, True])
def test_eos_at_every_offset_of_a_draft(warm, lag):
    """A drafted end of the text stops the round wherever it is; the cache holds all but the last token."""
    text, base = truth(), warm.ids.shape[1]
    seen = set()
    for place in range(1, 9):
        eos = int(text[0, base + place])
        if eos in text[0, base : base + place]:
            continue
        expected = text[:, : base + place + 1]
        for wrong in ((), {base + place - 1}):
            with rounds(warm.model) as noted, scripted(exits(dict.fromkeys(range(base, base + 60), 2), text, wrong)):
                out = ours(warm, bounded(**ALL, lag=lag), max_new_tokens=30, eos_token_id=eos)
            assert torch.equal(out.sequences, expected)
            assert out.past_key_values.get_seq_length() == expected.shape[1] - 1
            assert sum(out.speculation.accept_lengths[0]) == place
            for one in noted.rounds:
                check_round(one, BOUND)
            same_as_token_by_token(warm, out)
            seen.add((place, noted.rounds[-1].stop))
    assert len({place for place, _ in seen}) >= 6
    assert {stop for _, stop in seen} == {"eos", "width"}


class Streamer(BaseStreamer):
    def __init__(self):
        self.got, self.ended = [], 0

    def put(self, value):
        self.got += value.reshape(-1).tolist()

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("wrong", [(), range(0, 99, 3)])
def test_the_streamer_gets_final_tokens_only(warm, wrong):
    text, base = truth(), warm.ids.shape[1]
    eos = int(text[0, base + 14])
    expected = warm.stock(**warm.one, max_new_tokens=30, eos_token_id=eos)
    streamer = Streamer()
    with scripted(exits(dict.fromkeys(range(99), 2), text, set(wrong))):
        out = ours(warm, bounded(**ALL), max_new_tokens=30, eos_token_id=eos, streamer=streamer)
    assert out.speculation.num_accepted_tokens > 0
    assert (out.speculation.num_accepted_tokens < out.speculation.num_draft_tokens) is bool(wrong)
    assert streamer.got == out.sequences[0].tolist() == expected[0].tolist()
    assert streamer.ended == 1


@pytest.mark.parametrize("place", range(2, 9))
def test_stop_strings_and_criteria_cut_inside_a_block(warm, place):
    text, base = truth(), warm.ids.shape[1]

    class Long(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= base + place)

    string = "".join(letter(int(token)) for token in text[0, base + place - 2 : base + place])
    for kwargs in ({"stop_strings": string, "tokenizer": tokenizer()}, {"stopping_criteria": [Long()]}):
        expected = warm.stock(**warm.one, max_new_tokens=30, **kwargs)
        with scripted(everywhere(2, text)):
            out = ours(warm, bounded(**ALL), max_new_tokens=30, **kwargs)
        assert torch.equal(out.sequences, expected)
        assert out.past_key_values.get_seq_length() == expected.shape[1] - 1
        same_as_token_by_token(warm, out)


@pytest.mark.parametrize("place", range(2, 7))
def test_counters_leave_out_what_a_criterion_cut(warm, place):
    text, base = truth(), warm.ids.shape[1]

    class Long(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= base + place)

    with scripted(everywhere(2, text)):
        out = ours(warm, bounded(**ALL), max_new_tokens=30, stopping_criteria=[Long()])
    assert out.speculation.num_accepted_tokens == place - 1
    assert out.speculation.method["accepted_per_exit"]["2"] == place - 1


@pytest.mark.parametrize("kind", ["final", "block"])
def test_texts_up_to_the_last_learned_position(kind, tmp_path):
    model = build("GPT2", max_position_embeddings=32, num_hidden_layers=4)
    random_heads(model, [1, 2], kind).save(tmp_path, SpecBoundConfig(), model)
    config = SpecBoundConfig(adapter=str(tmp_path), tau=0.1, alpha=0)
    for ids, new in ((torch.tensor([[5]]), 31), (torch.arange(3, 34)[None], 1), (torch.arange(3, 32)[None], 3)):
        expected = model.generate(ids, max_new_tokens=new, do_sample=False)
        out = model.generate(ids, max_new_tokens=new, do_sample=False, assistant_strategy=config)
        assert torch.equal(out, expected)
