"""Processors that remember something between calls: never another text than stock's, and the same state after it."""

from __future__ import annotations

import itertools
import random
from collections import deque

import numpy as np
import pytest
import torch
from families import configured, family, perturbed
from tiers import FULL
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.logits_process import SynthIDTextWatermarkLogitsProcessor

from hf_specdec import DiversedConfig
from hf_specdec.generation import loop
from hf_specdec.generation.call_path import CallPath
from hf_specdec.generation.memory import Copied, Undone
from hf_specdec.registry import presets


BASES = [name for name in presets() if ":" not in name]
NEW = 18


class Remembering(LogitsProcessor):
    """Bans a token by what it remembers; `state` is all of that."""

    def __init__(self):
        self.calls, self.seen = 0, []

    def __call__(self, input_ids, scores):
        self.advance(input_ids, scores)
        scores = scores.clone()
        scores[:, (7 * self.calls + sum(self.seen)) % scores.shape[1]] += 50.0 if self.calls % 4 == 3 else 0.0
        return scores

    def advance(self, input_ids, scores):
        self.calls += 1
        self.seen.append(int(input_ids[:, -1].sum()))

    @property
    def state(self):
        return self.calls, self.seen


class ByScores(Remembering):
    """Also remembers scores, which drafts must not leave their own in."""

    def __init__(self):
        super().__init__()
        self.best, self.total = deque(maxlen=3), torch.zeros(1)

    def advance(self, input_ids, scores):
        super().advance(input_ids, scores)
        self.best.append(scores.argmax(dim=-1).tolist())
        self.total += scores.argmax(dim=-1).sum()
        self.calls += int(self.total) % 2

    @property
    def state(self):
        return self.calls, self.seen, list(self.best), self.total.tolist()


class Views(Remembering):
    """Counts in arrays and tensors, and reads them by views that can't be written."""

    def __init__(self):
        super().__init__()
        self.number, self.array = torch.zeros(1), np.zeros(1, dtype=int)
        self.expanded, self.broadcast = self.number.expand(4), np.broadcast_to(self.array, (3,))
        self.fixed = np.frombuffer(b"ab", dtype=np.uint8)

    def advance(self, input_ids, scores):
        super().advance(input_ids, scores)
        self.number += 1
        self.array += 2
        self.calls = int(self.expanded[2]) + int(self.broadcast[1]) + int(self.fixed[0])


class Thinking(Remembering):
    """After a token below 20 each row has to end its thought: two fixed tokens, then nothing below 20 for a while."""

    def __init__(self):
        self.queues = {}

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for row, ids in enumerate(input_ids):
            queue = self.queues.setdefault(row, [])
            if not queue and int(ids[-1]) < 20:
                queue.extend([41, 43, None, None])
            if queue:
                token = queue.pop(0)
                if token is None:
                    scores[row, :20] = -torch.inf
                else:
                    scores[row] = torch.full_like(scores[row], -torch.inf)
                    scores[row, token] = 0.0
        return scores

    @property
    def state(self):
        return self.queues


class Iterating(Remembering):
    """Keeps an iterator, which nobody can copy."""

    def __init__(self):
        super().__init__()
        self.numbers = (3 * number for number in itertools.count())

    def advance(self, input_ids, scores):
        super().advance(input_ids, scores)
        self.calls = next(self.numbers)


class Later(Remembering):
    """Makes its iterator at the fourth call only."""

    def advance(self, input_ids, scores):
        super().advance(input_ids, scores)
        if len(self.seen) == 4:
            self.numbers = iter(range(10, 1000))
        if len(self.seen) > 4:
            self.calls = next(self.numbers)


class Drawing(Remembering):
    """Draws from Python's own generator, whose seed the caller has set."""

    def __init__(self):
        super().__init__()
        random.seed(3)

    def advance(self, input_ids, scores):
        super().advance(input_ids, scores)
        self.calls = random.randrange(100)


class RollingBack(Iterating):
    """Can undo its calls by itself, and does not like to undo what it was not asked."""

    def __init__(self):
        super().__init__()
        self.history, self.undone = [], 0

    def advance(self, input_ids, scores):
        self.history.append((self.calls, list(self.seen)))
        Remembering.advance(self, input_ids, scores)

    def rollback(self, n):
        assert 0 < n <= len(self.history)
        self.calls, self.seen = self.history[-n]
        del self.history[-n:]
        self.undone += n


class Function:
    """A plain function with a variable of its own."""

    def __init__(self):
        calls = 0

        def banning(input_ids, scores):
            nonlocal calls
            calls += 1
            return scores.index_fill(1, torch.tensor([calls % 5, int(input_ids[0, -1])]), -torch.inf)

        self.function = banning

    @property
    def state(self):
        return self.function.__closure__[0].cell_contents


COPIED_KINDS = (Remembering, ByScores, Views, Thinking, RollingBack, Function)
COPIED = tuple(cls.__name__ for cls in COPIED_KINDS)
KINDS = {cls.__name__: cls for cls in (*COPIED_KINDS, Iterating, Later, Drawing)}


def called(make, rows, eos=None, strategy=None, **kwargs):
    """Return the tokens and scores of a call and the processor's state after it; stock's without a strategy."""
    model, made = family("llama"), make()
    processor = getattr(made, "function", made)
    kwargs = {**model.inputs(rows), "max_new_tokens": NEW, "eos_token_id": eos, **kwargs}
    kwargs |= {"logits_processor": [processor], "return_dict_in_generate": True, "output_scores": True}
    out = model.stock(**kwargs) if strategy is None else model.ours(strategy, **kwargs)
    return out, made.state


def same(found, wanted, eos=None):
    assert torch.equal(found[0].sequences, wanted[0].sequences)
    assert found[1] == wanted[1]
    width = family("llama").ids.shape[1]
    ended = (wanted[0].sequences[:, width:] == eos).cumsum(dim=1) if eos is not None else None
    for place, (ours, theirs) in enumerate(zip(found[0].scores, wanted[0].scores, strict=True)):
        live = slice(None) if ended is None or not place else ended[:, place - 1] == 0
        torch.testing.assert_close(ours[live], theirs[live], atol=1e-4, rtol=0)


def alternating():
    """Every strategy meets three kinds, and two meet all of them; the rest is for `make test-all`."""
    for strategy, kind in itertools.product(BASES, KINDS):
        first = kind in ("Remembering", "Iterating", "RollingBack") or strategy in ("assisted", "via_sd")
        if (strategy, kind) != ("diversed", "Later"):
            yield pytest.param(strategy, kind, marks=[] if first else FULL)


@pytest.mark.parametrize("strategy", BASES)
def test_what_turns_out_not_to_be_copied(strategy):
    """Where drafts can't be judged one by one, or a criterion may cut them, the call goes on with plain steps."""
    for rows in (1, 4) if strategy not in ("specbound", "spd") else (1,):
        same(called(Later, rows, strategy=strategy), called(Later, rows))
    criteria = [Stop()]
    found, wanted = (called(Later, 1, strategy=name, stopping_criteria=criteria) for name in (strategy, None))
    same(found, wanted)


def test_tiers_that_need_drafts_say_so():
    with pytest.raises(ValueError, match=r"`logits_processor` Later .*copied"):
        called(Later, 1, strategy="via_sd:safe")


@pytest.mark.parametrize("strategy, kind", list(alternating()))
def test_text_scores_and_state_are_stocks(strategy, kind):
    for rows in (1, 4):
        same(called(KINDS[kind], rows, strategy=strategy), called(KINDS[kind], rows))


@pytest.mark.parametrize("kind", ["Thinking", "Iterating", pytest.param("RollingBack", marks=FULL)])
@pytest.mark.parametrize("strategy", BASES)
def test_ends_of_rows(strategy, kind):
    """A row that ends inside a round ends it for the others: their processors would see its padding next."""
    text = called(KINDS[kind], 4)[0].sequences[:, family("llama").ids.shape[1] :]
    for eos in {int(text[0, 6]), int(text[2, 9])}:
        for rows in (1, 4):
            same(called(KINDS[kind], rows, eos, strategy), called(KINDS[kind], rows, eos), eos)


@pytest.mark.parametrize("kind", ["Remembering", "Iterating", "RollingBack"])
def test_an_end_inside_a_round_whose_drafts_are_all_right(kind):
    model = family("llama")
    right = {"assistant_model": perturbed(model.model, noise=0.0), "assistant_strategy": "assisted"}

    def run(eos, **kwargs):
        made = KINDS[kind]()
        options = {**model.batch, "max_new_tokens": NEW, "eos_token_id": eos, "logits_processor": [made]}
        return model.stock(**options, **kwargs), made.state

    text = run(None)[0][:, model.ids.shape[1] :]
    for eos in text[1, 2:9].unique().tolist():
        (found, state), (wanted, then) = run(eos, **right), run(eos)
        assert torch.equal(found, wanted)
        assert state == then


class Stop(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([int(row[-3:].sum()) % 5 == 0 for row in input_ids])


@pytest.mark.parametrize("kind", ["Remembering", "Iterating", pytest.param("RollingBack", marks=FULL)])
@pytest.mark.parametrize("strategy", BASES)
def test_criteria_that_cut_a_round(strategy, kind):
    options = {"stopping_criteria": [Stop()]}
    for rows in (1, 4):  # with an EOS, so that rows end apart
        (found, state), (wanted, then) = (called(KINDS[kind], rows, 2, one, **options) for one in (strategy, None))
        assert torch.equal(found.sequences, wanted.sequences)
        assert state == then


@pytest.mark.parametrize("strategy", ["via_sd:safe", "via_sd:paper", "diversed:mixture", "via_sd:slim"])
@pytest.mark.parametrize("kind", ["Remembering", "Thinking", "Iterating", "RollingBack"])
def test_presets_whose_test_settings_keep_the_text(strategy, kind):
    """Rounds without the target, escalations that read text again, and plain steps where tiers can't be judged."""
    for rows in (1, 4):
        same(called(KINDS[kind], rows, strategy=strategy), called(KINDS[kind], rows))


@pytest.mark.parametrize("strategy", [name for name in BASES if name not in ("plain", "prompt_lookup")])
@pytest.mark.parametrize("kind", ["Remembering", "RollingBack", "Iterating"])
def test_drafts_are_accepted(strategy, kind):
    """Equal text would come from plain steps too."""
    out, _ = called(KINDS[kind], 1, strategy=strategy)
    if kind == "Iterating" and strategy == "diversed":
        assert out.speculation is None
    else:
        assert out.speculation.num_accepted_tokens > 0


LOSSY = {
    "diversed": DiversedConfig(weight=0.3),
    "mixture": DiversedConfig(weight=0.3, bonus="mixture"),
    "tiers": configured("via_sd:paper").override(tau_accept=0.3, tau_escalate=0.05, bonus_min_conf=0.01),
    "audited": configured("via_sd:safe").override(
        tau_accept=0.3, tau_escalate=0.05, audit="tighten", drafter="prompt_lookup"
    ),
}


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
def test_lossy_texts_keep_to_the_processors(name, sample, rows):
    """What is remembered is what was emitted, and every token follows it."""
    model, config = family("llama"), LOSSY[name]
    thinking, counting = Thinking(), Remembering()
    assistant = {} if config.brings_drafter else {"assistant_model": model.assistant}
    out = model.model.generate(
        **model.inputs(rows), max_new_tokens=NEW, do_sample=sample, assistant_strategy=config, **assistant,
        logits_processor=[counting, thinking],
    )  # fmt: skip
    width = model.ids.shape[1]
    assert counting.seen == out[:, width - 1 : -1].sum(dim=0).tolist()
    for text in out[:, width - 1 :].tolist():
        wanted = []
        for token, following in itertools.pairwise(text):
            wanted = wanted or ([41, 43, None, None] if token < 20 else [])
            must, wanted = (wanted[0], wanted[1:]) if wanted else (following, [])
            assert following == must if must is not None else following >= 20


@pytest.mark.parametrize("kind", ["Remembering", "RollingBack"])
@pytest.mark.parametrize("place", range(3, 8))
def test_a_call_stands_while_it_was_made_on_the_same_text(kind, place):
    made = KINDS[kind]()
    memory = Undone(made) if kind == "RollingBack" else Copied([made])
    path = CallPath([memory], lambda text: made(text, torch.zeros(1, 9)))
    text = torch.arange(10)[None]
    other = text.clone()
    other[0, place] = 77
    for now in (text, other):
        for end in range(3, 9):
            path.go(end, now)
            assert made.seen == now[0, 2 : end - 1].tolist()
            made(now[:, :end], torch.zeros(1, 9))
            path.record(now[:, :end])
    path.go(9, text)
    assert made.seen == text[0, 2:8].tolist()
    path.commit(6, text, 0)
    with pytest.raises(RuntimeError, match="can go back to 6"):
        path.go(5, text)
    path.go(8, other)
    path.restart()
    assert made.seen == text[0, 2:5].tolist()


def test_plain_steps_are_said(monkeypatch):
    said = []
    monkeypatch.setattr(loop.logger, "warning_once", said.append)
    called(Iterating, 1, strategy="diversed")
    called(Remembering, 4, strategy="specbound")
    named = [text for text in said if "plain steps" in text]
    assert len(named) == 2 and "Iterating" in named[0] and "Remembering" in named[1] and "stateless" in named[0]


def test_a_watermark_is_stocks():
    model = family("llama").model

    def watermark():
        return SynthIDTextWatermarkLogitsProcessor(3, [5, 9, 12, 4], 128, 32, 0, "cpu")

    class Greedy(LogitsProcessor):
        """Makes sampling certain, so that samples can be compared."""

        def __call__(self, input_ids, scores):
            return torch.where(scores == scores.amax(dim=-1, keepdim=True), 0.0, -torch.inf)

    for rows in (1, 4):
        options = {**family("llama").inputs(rows), "do_sample": False, "max_new_tokens": NEW}
        theirs, ours = watermark(), watermark()
        wanted = model.generate(**options, logits_processor=[theirs])
        found = family("llama").ours("assisted", **options, logits_processor=[ours])
        assert torch.equal(found, wanted)
        assert ours.state.num_calls == theirs.state.num_calls
        assert torch.equal(ours.state.context_history, theirs.state.context_history)


@pytest.mark.parametrize("kind", COPIED)
def test_an_exception_leaves_what_was_emitted(kind):
    """The state after an exception is that of plain decoding which ended there, whatever had been drafted."""
    model = family("llama")

    class Interrupted(Exception):
        pass

    def interrupt(module, args):
        nonlocal left
        left -= 1
        if left < 0:
            raise Interrupted

    for after in (1, 3, 5):
        made, emitted, left = KINDS[kind](), [], after
        with model.model.lm_head.register_forward_pre_hook(interrupt), pytest.raises(Interrupted):
            model.ours(
                "assisted", **model.one, max_new_tokens=NEW, streamer=Collect(emitted),
                logits_processor=[getattr(made, "function", made)],
            )  # fmt: skip
        wanted = called(KINDS[kind], 1, max_new_tokens=len(emitted))[1] if emitted else KINDS[kind]().state
        assert made.state == wanted


class Collect:
    """A streamer that counts the tokens after the prompt."""

    def __init__(self, found):
        self.found, self.started = found, False

    def put(self, value):
        if self.started:
            self.found.extend(value.tolist())
        self.started = True

    def end(self):
        pass
