"""SPD in one process: its text against plain decoding, where it ends, and what processors see."""

from __future__ import annotations

import families
import pytest
import torch
from spd_cases import STAGES, UNEVEN, Module, following_logits, ids_of, prompt, says, spd, stock, target
from streams import Streamer
from tiers import tiered
from transformers import LogitsProcessor


# the text


DRAFTERS = ("right", "wrong", "random", "untrained")


def drafter(kind, model, stages, text, **options):
    if kind == "untrained":
        return Module(model, stages, **options)
    draw = torch.Generator().manual_seed(4)
    guesses = {
        "right": says(text),
        "wrong": says(text, lambda place: True),
        "random": says(text, lambda place: torch.rand((), generator=draw) < 0.4),
    }
    return Module(model, stages, guesses[kind], **options)


CASES = [
    *[("llama", n, cut, "float64") for n, cut in [(1, None), *STAGES]],
    ("llama", 4, None, "float32"),
    ("llama", 4, UNEVEN, "float32"),
    *[(name, 4, None, "float64") for name in families.NAMES[1:]],
    ("gemma3", 4, UNEVEN, "float32"),
    ("mistral", 8, None, "float32"),
]


@pytest.mark.parametrize("name, stages, stage_layers, dtype", tiered(CASES), ids=str)
def test_text_equals_stocks(name, stages, stage_layers, dtype):
    model = target(name, dtype=dtype)
    for length, new in ((1, 9), (2, 4), (3, 3), (12, 9)):  # the longest is longer than the families' windows
        ids = prompt(length, seed=length)
        text = stock(model, ids, new)
        for kind in DRAFTERS:
            module = drafter(kind, model, stages, text, stage_layers=stage_layers)
            out = spd(model, module, ids, new)
            assert torch.equal(out.sequences, text), (length, kind)
            if stages > 1 and new > 4:
                wanted = {"right": [0], "wrong": [new - 2], "random": range(1, new - 2), "untrained": range(new)}
                assert out.speculation.method["rejections"] in wanted[kind]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name, schedule",
    [("llama", "serial"), ("mistral", "serial"), ("gemma3", "threads"), ("gpt2", "serial"), ("gpt_oss", "serial")],
)
def test_logits_are_plain_decodings_to_the_last_bit(name, dtype, schedule):
    model, ids, new = target(name, dtype=dtype), prompt(11), 16
    wanted = {"return_dict_in_generate": True, "output_logits": True}
    plain = stock(model, ids, new, assistant_strategy="plain", **wanted)
    for kind in ("random", "untrained"):
        module = drafter(kind, model, 4, plain.sequences, stage_layers=UNEVEN)
        out = spd(model, module, ids, new, schedule=schedule, **wanted)
        assert torch.equal(out.sequences, plain.sequences)
        assert all(torch.equal(a, b) for a, b in zip(out.logits, plain.logits, strict=True))


@pytest.mark.parametrize("schedule", ["serial", "threads"])
def test_rows_in_turn_and_a_second_turn(schedule):
    """With a module that reads: its positions and its cache begin anew in each row and each turn."""
    model, module = target(), Module(target(), 4, span=16)
    ids, mask = families.prompts()
    first = {"attention_mask": mask, "eos_token_id": 9, "return_dict_in_generate": True}
    theirs, ours = stock(model, ids, 12, **first), spd(model, module, ids, 12, schedule=schedule, **first)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert [len(features[0][0]) for features in module.prompts] == list(families.LENGTHS)
    text = torch.cat([theirs.sequences, families.prompts((3, 3, 3, 3), seed=7)[0]], dim=1)
    wide = torch.cat([mask, mask.new_ones(4, text.shape[1] - mask.shape[1])], dim=1)
    second = {"attention_mask": wide, "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(text, past_key_values=theirs.past_key_values, **second)
    found = spd(model, module, text, 8, past_key_values=ours.past_key_values, attention_mask=wide, schedule=schedule)
    assert torch.equal(found.sequences, expected)
    # the cached tokens' states are gone: the module begins with those that this call runs
    assert [len(features[0][0]) for features in module.prompts[4:]] == [4] * 4
    stats = found.speculation.method
    assert stats["theoretical_speedup"] == pytest.approx(4 * 4 * 8 / stats["ticks"])


# stops


def test_eos_ends_the_text_when_it_is_verified_and_not_before():
    model, ids, stages = target(), prompt(7), 4
    whole = stock(model, ids, 20)
    tail = whole[0, 7:].tolist()
    assert len(set(tail)) > 6
    never = next(word for word in range(3, 60) if word not in tail)
    for eos in (tail[0], tail[6], [never, tail[9]], [tail[3], tail[12]], never, [tail[-1]]):
        ends = eos if isinstance(eos, list) else [eos]
        for guess in (
            says(whole),
            lambda place, rows, ends=ends: ends[place % len(ends)],  # drafted everywhere, right in few places
            says(whole, lambda place: place % 3 == 0),
        ):
            module, streamer = Module(model, stages, guess), Streamer()
            expected = stock(model, ids, 20, eos_token_id=eos)
            out = spd(model, module, ids, 20, eos_token_id=eos, streamer=streamer)
            assert torch.equal(out.sequences, expected), eos
            assert torch.cat([part.reshape(-1) for part in streamer.parts]).tolist() == expected[0].tolist()
            assert streamer.ended == 1
            assert (out.speculation is None) is (expected.shape[1] == 8)
    # the ticks end with the text: tokens in flight behind the end cost no more
    new = tail.index(tail[6]) + 1
    out = spd(model, Module(model, stages, says(whole)), ids, 20, eos_token_id=tail[6])
    assert out.speculation.method["ticks"] == new + stages - 2
    assert out.sequences.shape[1] == 7 + new


def test_a_draft_vocabulary_with_gaps_and_a_text_that_ends():
    model, ids = target(), prompt(5)
    text = stock(model, ids, 24)
    words_ = torch.tensor(sorted({*text[0, 5:].tolist()} - {int(text[0, 9])}))
    assert words_.tolist() != list(range(len(words_)))
    module = Module(model, 4, vocabulary=words_)
    assert module.lm_head.weight.shape[0] == len(words_)
    eos = int(text[0, 20])
    out = spd(model, module, ids, 24, eos_token_id=eos)
    assert torch.equal(out.sequences, stock(model, ids, 24, eos_token_id=eos))
    followed = 0
    for (_, _, _, logits), (rows, _, flying, _) in zip(module.calls, module.calls[1:], strict=False):
        newest, drafted = ids_of(model, rows)[-1], int(words_[logits.argmax()])
        if len(flying) > 1:  # else the newest one is a replacement
            assert newest == drafted
            followed += 1
    assert followed > 10
    # a guess inside the vocabulary is served as the word that it stands for
    inside = Module(model, 4, vocabulary=words_, guess=lambda place, rows: 0)
    inside.guess = lambda place, rows: words_.tolist().index(w) if (w := int(text[0, place])) in words_ else 0
    inside.width = len(words_)
    out = spd(model, inside, ids, 10)
    assert torch.equal(out.sequences, text[:, :15])


class PushOld(LogitsProcessor):
    """Depends on the whole prefix."""

    def __call__(self, input_ids, scores):
        key = (input_ids * torch.arange(1, input_ids.shape[1] + 1)).sum(dim=1)
        return scores.scatter_add(1, (key % scores.shape[1])[:, None], torch.full_like(scores[:, :1], 4.0))


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.6},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 9, "eos_token_id": list(range(3, 20))},
        {"bad_words_ids": [[4], [9, 11], [20, 3]]},
        {"logits_processor": [PushOld()]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_processors_see_verified_text(options):
    model, ids = target(), prompt(7)
    text = stock(model, ids, 18, **options)
    for kind in DRAFTERS:
        out = spd(model, drafter(kind, model, 4, text), ids, 18, **options)
        assert torch.equal(out.sequences, text), kind
    # the model's own logits are right guesses if they are processed behind the tokens in flight
    module = Module(model, 4, lambda _, rows: following_logits(model, ids_of(model, rows)))
    out = spd(model, module, ids, 18, **options)
    assert torch.equal(out.sequences, text)
    assert out.speculation.method["rejections"] == 0
