"""VIA-SD at the ends of its settings and of the text: streams, processors, EOS, lengths, batches and scores."""

from __future__ import annotations

import families
import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer
from via_sd_cases import (
    LONG,
    MIXED,
    OFF,
    RULES,
    SKIP,
    Reference,
    Spy,
    check_greedy,
    generate,
    lossless,
    lossy,
    measured,
    slim_logits,
    stock,
    without,
)

from hf_specdec.generation.methods.via_sd import laws
from hf_specdec.generation.runner import ModelRunner


class Watcher(BaseStreamer):
    """Checks at each token that the model has read what comes before it."""

    def __init__(self, spy, start):
        self.spy, self.place, self.seen, self.waited = spy, start, [], 0

    def put(self, value):
        if value.numel() > 1:  # the prompt
            return
        self.waited = max(self.waited, sum(kind == "s" for kind, *_ in self.spy.calls))
        ends = [start + tokens.shape[1] for _, tokens, (start,), _ in self.spy.of("q")]
        assert max(ends) >= self.place, "a token that the model has not judged"
        self.place += 1
        self.seen.append(int(value))

    def end(self):
        pass


@pytest.mark.parametrize("rule", RULES)
def test_streams_get_judged_tokens_only(pair, prompt, rule):
    config = lossless(lossless_rule=rule, stage_len=12)
    spy = Spy(*pair)
    watcher = Watcher(spy, prompt.shape[1])
    with spy():
        out = generate(pair, prompt, config, max_new_tokens=40, streamer=watcher)
    assert watcher.seen == out[0, prompt.shape[1] :].tolist()
    assert torch.equal(out, stock(pair[0], prompt, torch.ones_like(prompt)))
    with pytest.raises(AssertionError, match="not judged"), spy():
        spy.calls.clear()
        generate(pair, prompt, lossy(**LONG), max_new_tokens=40, streamer=Watcher(spy, prompt.shape[1]))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.8, 1.0])
def test_the_level_is_the_share_of_tiered_rounds(pair, prompt, share):
    config = lossy(**MIXED, lossy_level=share)
    new, found = measured(pair, prompt, config, max_new_tokens=60)
    again, _ = measured(pair, prompt, config, max_new_tokens=60)
    assert new == again
    text = torch.cat([prompt, torch.tensor([new])], dim=1)
    choices = pair[0](text).logits[0, prompt.shape[1] - 1 : -1].argmax(-1).tolist()
    assert config.lossless == (share == 0)
    if share == 0:
        assert new == choices and "tier_ids" not in found.method
        return
    tiered, strict = found.method["tiered_rounds"], found.method["strict_rounds"]
    assert tiered + strict == len(found.accept_lengths[0]) and abs(tiered - share * (tiered + strict)) <= 1
    (letters,) = found.method["tier_ids"]
    own_choice = [new[i] == choices[i] for i in range(60)]
    assert all(same for same, letter in zip(own_choice, letters, strict=True) if letter in "CQ")
    assert not all(own_choice)


@pytest.mark.parametrize(
    "config",
    [
        lossy(**MIXED).override(num_assistant_tokens=6),
        lossless(lossless_rule="gate", num_assistant_tokens=6),
        lossless(lossless_rule="prefilter", num_assistant_tokens=6, tau_escalate=0.2, regen_min_conf=0.0),
    ],
    ids=["lossy", "gate", "prefilter"],
)
def test_gate_does_not_move_with_the_temperature(pair, prompt, config, monkeypatch):
    seen = []
    original = laws.tiers
    monkeypatch.setattr(torch, "multinomial", lambda distribution, number, **_: distribution.argmax(-1, keepdim=True))

    def noted(log_ratio, confidence, *args, **kwargs):
        seen.append((original(log_ratio, confidence, *args, **kwargs).tolist(), confidence.tolist()))
        return original(log_ratio, confidence, *args, **kwargs)

    monkeypatch.setattr(laws, "tiers", noted)
    found = []
    for temperature in (0.3, 1.0, 1.5):
        seen.clear()
        generate(
            pair, prompt, config, do_sample=True, temperature=temperature, top_k=0,
            max_new_tokens=20,
        )  # fmt: skip
        found.append(seen[0])
    assert found[0] == found[1] == found[2] and len(set(found[0][0][0])) > 1


@pytest.mark.parametrize("config", [lossy(**MIXED), lossy(**OFF, tau_escalate=0.0), lossless(lossless_rule="gate")])
@pytest.mark.parametrize("sample", [False, True])
def test_words_that_a_processor_excludes_are_never_emitted(pair, prompt, config, sample):
    kwargs = {"do_sample": sample, "max_new_tokens": 40}
    torch.manual_seed(1)
    new, _ = measured(pair, prompt, config, **kwargs)
    banned = sorted(set(new))[: len(set(new)) // 2]
    torch.manual_seed(1)
    other, _ = measured(pair, prompt, config, suppress_tokens=banned, **kwargs)
    assert set(new) & set(banned) and not set(other) & set(banned)


class OnlyForSlim(LogitsProcessor):
    """Excludes a word from one call on to the next: whoever drafted it knew nothing of that."""

    def __init__(self, word):
        self.word, self.on = word, False

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        if self.on:
            scores[:, self.word] = -torch.inf
        return scores


def test_a_draft_that_the_processors_exclude_is_escalated(pair, prompt):
    config = lossy(**OFF, tau_accept=0.5, tau_escalate=0.0)
    new, found = measured(pair, prompt, config, max_new_tokens=12)
    word = new[1]
    assert found.method["tier_ids"][0][1] == "A"
    ban = OnlyForSlim(word)
    original = ModelRunner.forward

    def forward(runner, *args, **kwargs):
        ban.on = runner.model not in pair
        return original(runner, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelRunner, "forward", forward)
        _, found = measured(pair, prompt, config, max_new_tokens=12, logits_processor=LogitsProcessorList([ban]))
    assert found.method["tier_ids"][0][1] == "C"


@pytest.mark.parametrize("mode", ["lossy", "lossless"])
@pytest.mark.parametrize("sample", [False, True])
def test_ids_that_only_the_drafter_has_are_never_emitted(pair, prompt, mode, sample):
    draft = families.build("Llama", seed=5, num_hidden_layers=2, vocab_size=families.VOCAB + 8)
    with torch.no_grad():
        draft.lm_head.weight[families.VOCAB :] *= 6  # it would say them often
    new = draft.generate(prompt, max_new_tokens=20, do_sample=False)[0, prompt.shape[1] :]
    assert (new >= families.VOCAB).sum() > 4
    config = lossy(**OFF, tau_accept=0.01, tau_escalate=0.0) if mode == "lossy" else lossless(lossless_rule="gate")
    new, _ = measured((pair[0], draft), prompt, config, max_new_tokens=40, do_sample=sample, top_k=0)
    assert max(new) < families.VOCAB
    if mode == "lossless" and not sample:
        assert new == stock(pair[0], prompt, torch.ones_like(prompt))[0, prompt.shape[1] :].tolist()


# the end of the text


@pytest.mark.parametrize("gamma", [2, 5])
@pytest.mark.parametrize("guard", [True, False])
def test_ends_of_the_text_in_tiers(pair, prompt, gamma, guard):
    """Every word of the text as the end of it in turn, so that it comes at every place of a block."""
    config = lossy(**{**MIXED, "eos_guard": guard, "regen_min_conf": 0.15}, num_assistant_tokens=gamma)
    reference = Reference(pair, prompt)
    ((tokens, _),) = reference.lossy(config, 18)
    ends = {len(tokens)}
    for word in sorted(set(tokens)):
        found = check_greedy(pair, prompt, config, 18, (word,), reference)
        ends.add(len(found.method["tier_ids"][0]))
    assert len(ends) > 5


def test_an_unsure_end_is_left_to_the_model(pair, prompt):
    """A drafted end that is no argmax of the slim verifier is kept without the guard, and escalated with it."""
    open_settings = {**OFF, "tau_accept": 0.05, "tau_escalate": 0.0, "bonus_min_conf": None}
    reference = Reference(pair, prompt)
    ((tokens, letters),) = reference.lossy(lossy(**open_settings), 24)
    places = [
        i for i in range(1, 23)
        if letters[i] == "A" and tokens[i] not in tokens[:i]
        and int(slim_logits(pair[0], reference.slim, reference.text(tokens[:i]), prompt.shape[1])[0, -1].argmax())
        != tokens[i]
    ]  # fmt: skip
    assert places
    end = tokens[places[0]]
    found = {}
    for guard in (False, True):
        config = lossy(**{**open_settings, "eos_guard": guard})
        found[guard] = measured(pair, prompt, config, max_new_tokens=24, eos_token_id=end)[1].method["tier_ids"][0]
    assert found[False] == letters[: places[0]] + "A"
    assert found[True][places[0]] == "C"


@pytest.mark.parametrize("config", [lossy(**LONG), lossless(stage_len=12), lossy(**LONG, slim_cache="own")])
def test_lengths_are_never_exceeded(pair, config):
    ids, attention = families.prompts((14, 6, 9))
    for new in (1, 2, 3, 7, 19):
        out = generate(pair, ids, config, attention_mask=attention, max_new_tokens=new, return_dict_in_generate=True)
        assert out.sequences.shape[1] == ids.shape[1] + new
        assert all(layer.get_seq_length() == ids.shape[1] + new - 1 for layer in out.past_key_values.layers)


# batches


def test_rows_of_a_lossy_batch_with_caches_of_their_own_are_those_of_single_calls(pair):
    ids, attention = families.prompts((19, 3, 12, 7))
    config = lossy(**MIXED, slim_cache="own")
    end = families.choose_eos(generate(pair, ids, config, attention_mask=attention, max_new_tokens=40)[:, 19:])
    kwargs = {"max_new_tokens": 40, "eos_token_id": end, "pad_token_id": 0, "return_dict_in_generate": True}
    out = generate(pair, ids, config, attention_mask=attention, **kwargs)
    lengths = set()
    for row in range(4):
        one = generate(pair, ids[row : row + 1, 19 - int(attention[row].sum()) :], config, **kwargs)
        new = one.sequences[0, -len(one.speculation.method["tier_ids"][0]) :].tolist()
        lengths.add(len(new))
        assert out.sequences[row, 19 : 19 + len(new)].tolist() == new
        assert not out.sequences[row, 19 + len(new) :].any()
        assert out.speculation.method["tier_ids"][row] == one.speculation.method["tier_ids"][0]
    assert len(lengths) > 1, "rows end at different columns"


@pytest.mark.parametrize("cache", ["shared", "own"])
def test_scores_are_those_of_whoever_decided(pair, prompt, cache):
    config = lossy(**MIXED, slim_cache=cache)
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    out = generate(pair, prompt, config, max_new_tokens=30, repetition_penalty=1.2, **wanted)
    (letters,) = out.speculation.method["tier_ids"]
    assert {"A", "B", "C"} <= set(letters)
    text, slim = out.sequences, without(pair[0], SKIP)
    start, penalty = prompt.shape[1], RepetitionPenaltyLogitsProcessor(1.2)
    whole, alone = pair[0](text).logits[0], slim(text).logits[0]
    for place, letter in enumerate(letters):
        if letter not in "CQ" and cache == "shared":
            continue  # what the slim verifier reads there depends on what the model had read
        expected = (whole if letter in "CQ" else alone)[start + place - 1]
        torch.testing.assert_close(out.logits[place][0], expected.float(), rtol=1e-5, atol=1e-5)
        scores = penalty(text[:, : start + place], expected[None].float())[0]
        torch.testing.assert_close(out.scores[place][0], scores, rtol=1e-5, atol=1e-5)
