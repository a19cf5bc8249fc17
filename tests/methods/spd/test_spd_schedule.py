"""SPD in one process: its schedule against a simulation with lists."""

from __future__ import annotations

import functools
import time
import zlib
from collections import Counter
from contextlib import contextmanager

import families
import pytest
import torch
from spd_cases import STAGES, Module, following_logits, ids_of, prompt, says, spd, stock, target

from hf_specdec.generation.methods.spd.method import SPDStrategy
from hf_specdec.generation.models.surgery import decoder_layers


@functools.cache
def following(model, text):
    """Return the model's own next word after a tuple of words."""
    return int(following_logits(model, text).argmax())


def some_wrong(model, text):
    """Return the guess after words: mostly right, also after wrong ones, and a function of nothing else."""
    key = zlib.crc32(bytes(text))
    return following(model, tuple(text)) if key % 10 < 7 else key // 10 % families.VOCAB


def simulate(stages, start, new, truth, guess):
    """Run the method on lists.

    Returns the text; of each tick the positions by stage, the stages' lengths and whether it rejected; and the guesses
    by how many tokens were in flight before them, and by verdict.
    """
    text, ticks, held = [*start, truth(tuple(start))], [], [len(start)] * stages
    flight, final, judged = [[len(start), 0, 0]], len(start) + 1, Counter()
    end = len(start) + new
    while final < end:
        # no stage is ever fed the last token
        draft = guess(text) if stages > 1 and len(text) < end - 1 else None
        work, rejected = {depth: position for position, depth, _ in flight}, False
        for entry in flight:
            held[entry[1]] = entry[0] + 1
            entry[1] += 1
        if flight[0][1] == stages:
            place = flight.pop(0)[0] + 1
            token = truth(tuple(text[:place]))
            rejected = place < len(text) and text[place] != token
            final = place + 1
            if flight:
                judged[str(flight[0][2]), not rejected] += 1
            if rejected or place == len(text):
                text = [*text[:place], token]
                held, flight, draft = [place] * stages, [[place, 0, 0]], None
        if draft is not None:
            flight.append([len(text), 0, len(flight)])
            text.append(draft)
        ticks.append((work, list(held), rejected))
    return text, ticks, judged


@contextmanager
def watched(model, module):
    """Note of each tick the order of its work and the stages' lengths after it."""
    ticks, events, step = [], module.events, SPDStrategy.step

    def note(index, kwargs):
        events.append((index, *kwargs["position_ids"].flatten().tolist()))

    def stepped(self, state):
        events.clear()  # the prompt's forward passes many positions through the layers
        result = step(self, state)
        ticks.append((list(events), [stage.cache.length for stage in self.pipeline.stages]))
        return result

    hooks = [
        layer.register_forward_pre_hook(lambda _, args, kwargs, i=i: note(i, kwargs), with_kwargs=True)
        for i, layer in enumerate(decoder_layers(model))
    ]
    SPDStrategy.step = stepped
    try:
        yield ticks
    finally:
        SPDStrategy.step = step
        for hook in hooks:
            hook.remove()


every_cut = pytest.mark.parametrize("stages, stage_layers", STAGES, ids=str)


@every_cut
@pytest.mark.parametrize("name, length", [("llama", 5), ("llama", 1), ("gemma3", 12)])
def test_every_tick_does_what_the_specification_says(name, length, stages, stage_layers):
    """Which stage runs which token, what every stage holds, and when: against lists, after mostly right guesses."""
    model, new = target(name), 24
    module = Module(model, stages, lambda _, rows: some_wrong(model, ids_of(model, rows)), stage_layers)
    ids = prompt(length)
    text, expected, judged = simulate(
        stages, ids[0].tolist(), new, functools.partial(following, model), functools.partial(some_wrong, model)
    )
    with watched(model, module) as ticks:
        out = spd(model, module, ids, new)
    assert out.sequences[0].tolist() == text == stock(model, ids, new)[0].tolist()
    bounds = module.depths.bounds
    for (events, lengths), (work, held, _) in zip(ticks, expected, strict=True):
        ran = [event for event in events if event != "draft"]
        wanted = [(layer, place) for s, place in work.items() for layer in range(bounds[s], bounds[s + 1])]
        # each layer at most once, one token in each: no layer of the target drafts
        assert sorted(ran) == sorted(wanted)
        assert lengths == held
        assert events.count("draft") <= 1
        if "draft" in events:
            assert events[0] == "draft"  # it can have read nothing that this tick made
    rejections = sum(rejected for *_, rejected in expected)
    assert 3 < rejections < new - 4
    assert len(ticks) == (new - 1) + (stages - 1) * (1 + rejections)
    found = out.speculation
    fills = sorted({fill for fill, _ in judged})
    assert found.method == {
        "num_stages": stages,
        "ticks": len(ticks),
        "rejections": rejections,
        "rejections_outside_vocabulary": 0,
        "judged_per_fill": {fill: judged[fill, True] + judged[fill, False] for fill in fills},
        "accepted_per_fill": {fill: judged[fill, True] for fill in fills},
        "theoretical_speedup": pytest.approx(stages * new / len(ticks)),
    }
    # the last token is not guessed
    assert found.num_draft_tokens == new - 2 and found.num_accepted_tokens == new - 2 - rejections


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
def test_right_guesses_fill_the_pipeline(stages):
    model, new, ids = target(), 20, prompt(3)
    text = stock(model, ids, new)
    module = Module(model, stages, says(text))
    with watched(model, module) as ticks:
        out = spd(model, module, ids, new)
    assert torch.equal(out.sequences, text)
    assert len(ticks) == new + stages - 2
    assert (out.speculation is None) is (stages == 1), "one stage drafts nothing"
    if stages > 1:
        assert (out.speculation.method["ticks"], out.speculation.method["rejections"]) == (len(ticks), 0)
    places = [{event[1] for event in events if event != "draft"} for events, _ in ticks]
    assert max(map(len, places)) == stages
    assert all(len(found) == stages for found in places[stages - 1 : -stages])
    assert bool(module.calls) is (stages > 1)


@pytest.mark.parametrize("stages", [2, 4])
def test_no_tick_more_than_the_last_token_needs(stages):
    model, ids = target(), prompt(6)
    text = stock(model, ids, stages + 2)
    for new in sorted({1, 2, stages - 1, stages, stages + 1}):
        for wrong in (False, True):
            module = Module(model, stages, says(text, lambda _, wrong=wrong: wrong))
            with watched(model, module) as ticks:
                out = spd(model, module, ids, new)
            assert torch.equal(out.sequences, text[:, : 6 + new])
            again = (stages - 1) * max(new - 2, 0) * wrong
            assert len(ticks) == (0 if new == 1 else new + stages - 2 + again), (new, wrong)
            assert (out.speculation is None) is (new <= 2), "the last token is not guessed"


def test_threads_run_the_stages_and_the_module_at_once(monkeypatch):
    """The only timed test here: sleeps stand for work, which on few cores would take turns anyway."""
    model, new, nap = target(), 11, 0.08
    ids = prompt(5)
    text = stock(model, ids, new)
    best = {}
    for schedule in ("threads", "serial"):
        module = Module(model, 4, says(text))
        guess, spent, step = module.guess, [], SPDStrategy.step
        module.guess = lambda place, rows, guess=guess: (time.sleep(nap), guess(place, rows))[1]

        def stepped(self, state, step=step, spent=spent):
            full, begun = all(parcel is not None for parcel in self.pipeline.waiting), time.perf_counter()
            result = step(self, state)
            if full and len(self.flying) == 4:
                spent.append(time.perf_counter() - begun)
            return result

        monkeypatch.setattr(SPDStrategy, "step", stepped)
        spd(model, module, ids, 2)  # what is made once per model
        layers = [decoder_layers(model)[index] for index in module.depths.bounds[:-1]]
        sleeps = [layer.register_forward_pre_hook(lambda *_: time.sleep(nap)) for layer in layers]
        spent.clear()
        out = spd(model, module, ids, new, schedule=schedule)
        for sleep in sleeps:
            sleep.remove()
        monkeypatch.undo()
        assert torch.equal(out.sequences, text)
        assert len(spent) >= 4
        best[schedule] = min(spent)  # a busy machine makes ticks longer; naps in turn can't be shorter than their sum
    assert nap <= best["threads"] < 2 * nap  # no two of five were taken one after the other
    assert best["serial"] >= 5 * nap
