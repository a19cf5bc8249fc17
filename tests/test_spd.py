"""SPD in one process: its schedule against a simulation with lists, its drafts against a forward from scratch."""

from __future__ import annotations

import copy
import functools
import time
import zlib
from collections import Counter
from contextlib import contextmanager

import families
import pytest
import torch
from test_contract import Streamer
from torch.nn.functional import one_hot
from transformers import LogitsProcessor

from hf_specdec import SPDConfig
from hf_specdec.generation.methods.spd.depth_map import DepthMap
from hf_specdec.generation.methods.spd.draft_module import KIND, PipelineDraftModule
from hf_specdec.generation.methods.spd.method import SPDStrategy
from hf_specdec.generation.models.adapters import remember
from hf_specdec.generation.models.surgery import decoder_layers


UNEVEN = (1, 3, 2, 2)


@functools.cache
def target(name="llama", layers=8, dtype="float64", **changes):
    """Return a random model of a family; no test may change it."""
    prefix, own = families.FAMILIES[name]
    own = {"initializer_range": 0.3, **own, "num_hidden_layers": layers}  # for texts that don't settle on one word
    if "layer_types" in own:
        own["layer_types"] = own["layer_types"] * (layers // 2)
    model = families.build(prefix, seed=families.SEEDS.get(name, 1), **{**own, **changes})
    if name in families.SINGLE:
        model.set_attn_implementation("eager")
        dtype = "float32" if dtype == "float64" else dtype
    return model.to(getattr(torch, dtype))


def prompt(length, seed=2, vocab=families.VOCAB):
    return torch.randint(3, vocab, (1, length), generator=torch.Generator().manual_seed(seed))


def spd(model, module, ids, new, *, schedule="serial", **kwargs):
    """Generate greedily, unless said otherwise, with a module that lies in no file."""
    remember(model, KIND, "module", module)
    config = SPDConfig(adapter="module", schedule=schedule)
    kwargs = {"do_sample": False, "return_dict_in_generate": True, **kwargs}
    return model.generate(ids, assistant_strategy=config, max_new_tokens=new, **kwargs)


def stock(model, ids, new, **kwargs):
    return model.generate(ids, max_new_tokens=new, **{"do_sample": False, **kwargs})


@torch.no_grad()
def raw_states(model, ids):
    """Return hidden states 0 to L of a stock forward: the first layer's input, and every layer's raw output."""
    found, layers = [], decoder_layers(model)
    take = [layers[0].register_forward_pre_hook(lambda _, args, kwargs: found.append(args[0]), with_kwargs=True)]
    take += [
        layer.register_forward_hook(
            lambda _, __, output: found.append(output if torch.is_tensor(output) else output[0])
        )
        for layer in layers
    ]
    model(ids, use_cache=False)
    for handle in take:
        handle.remove()
    return found


@functools.cache
def twin(model):
    """Return a copy for looking things up, so that a count of the model's own layer calls stays right."""
    return copy.deepcopy(model)


@functools.cache
def words(model):
    """Return the first layer's input for every word (of families that add no positions to it)."""
    return raw_states(twin(model), torch.arange(model.config.get_text_config().vocab_size)[None])[0][0]


@torch.no_grad()
def following_logits(model, text):
    return twin(model)(torch.tensor([text]), use_cache=False).logits[:, -1]


@functools.cache
def following(model, text):
    """Return the model's own next word after a tuple of words."""
    return int(following_logits(model, text).argmax())


class Noted:
    """A reader that says which words it has been handed, recovered from their states, and keeps everything."""

    def __init__(self, module, inner):
        self.module, self.inner = module, inner

    def start(self, features, first):
        self.rows, self.first = features[0], first
        self.module.prompts.append(features)
        if self.inner is not None:
            self.inner.start(features, first)

    def draft(self, finished, flying):
        self.rows = torch.cat([self.rows, *(features[0] for features in finished)], dim=1)
        rows = torch.cat([self.rows, *(features[0] for _, features in flying)], dim=1)
        self.module.events.append("draft")
        if self.inner is not None:
            logits = self.inner.draft(finished, flying)
        else:
            guess = self.module.guess(self.first + rows.shape[1], rows)
            logits = guess if torch.is_tensor(guess) else 50.0 * one_hot(torch.tensor([guess]), self.module.width)
        self.module.calls.append((rows, finished, flying, logits))
        return logits


class Module(PipelineDraftModule):
    """A draft module with random weights, or one that guesses what `guess(place, rows)` returns; notes its calls."""

    def __init__(self, model, stages, guess=None, stage_layers=None, features=None, templates=(1, 0), **options):
        layers = model.config.get_text_config().num_hidden_layers
        super().__init__(model, DepthMap(layers, stages, stage_layers, features), templates, **options)
        noise = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=noise, dtype=torch.float64).to(parameter)
        self.requires_grad_(False)
        twin(model)
        self.guess, self.prompts, self.calls, self.events = guess, [], [], []

    def reader(self, model, capacity):
        return Noted(self, None if self.guess else super().reader(model, capacity))


def says(text, wrong=lambda place: False):
    """Return a guess that knows the text, and misses it where `wrong`."""
    return lambda place, rows: (int(text[0, min(place, text.shape[1] - 1)]) + bool(wrong(place))) % families.VOCAB


def ids_of(model, rows):
    return torch.cdist(rows[0], words(model)).argmin(dim=1).tolist()


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


# the schedule

STAGES = [(2, None), (4, None), (8, None), (4, UNEVEN)]
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
    assert out.speculation.method["ticks"] == len(ticks) == new + stages - 2
    assert out.speculation.method["rejections"] == 0
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
            assert (out.speculation is None) is (new == 1)


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


@pytest.mark.parametrize("name, stages, stage_layers, dtype", CASES, ids=str)
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
