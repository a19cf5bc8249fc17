"""What SpecBound's tests share: towers of layers, heads, and three instruments.

`rounds` notes what every round ran, `scripted` replaces the exit heads by a script, so that exits and wrong drafts
come where a test wants them, and `Paths` goes through every random choice of a sampled call.
"""

from __future__ import annotations

import functools
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import families
import pytest
import torch
from families import FAMILIES, SEEDS, SINGLE, Family, build
from transformers import DynamicCache
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper

from hf_specdec import SpecBoundConfig
from hf_specdec.generation.methods.specbound.exit_heads import ExitHeads, ExitReader
from hf_specdec.generation.methods.specbound.method import SpecBoundStrategy
from hf_specdec.generation.models.layerwise import Staircase
from hf_specdec.generation.models.surgery import decoder_layers


LAYERS = 8
BOUND = 5
OUTPUTS = ("o_proj", "down_proj", "c_proj", "attention.dense", "dense_4h_to_h")
NORMED_OUTPUTS = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
# confidences differ between families; with these some rows exit, and some of their drafts are right
TAU = {"gpt_neox": 0.4}


def lower_deep_layers(model, share=0.3, first=4):
    """Make the layers from depth `first` on matter less, so that shallow guesses are often right."""
    normed = model.config.model_type.startswith("gemma")  # its norms after the outputs would undo the factor
    with torch.no_grad():
        for layer in decoder_layers(model)[first - 1 :]:
            for name, value in layer.named_parameters():
                if normed and name in NORMED_OUTPUTS:
                    value.copy_((1 + value) * share - 1)
                elif any(part in name for part in OUTPUTS):
                    value.mul_(share)


@functools.cache
def tower(name="llama", layers=LAYERS):
    """Return a deep model of a family, whose deep layers matter less, with the ragged batch of prompts."""
    prefix, changes = FAMILIES[name]
    changes = {**changes, "num_hidden_layers": layers}
    if "layer_types" in changes:
        changes["layer_types"] = (changes["layer_types"] * layers)[:layers]
    model = build(prefix, seed=SEEDS.get(name, 0), **changes)
    if name in SINGLE:
        model.float()
    lower_deep_layers(model)
    ids, mask = families.prompts()
    text = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False)[:, ids.shape[1] :]
    return Family(name, model, model, ids, mask, families.choose_eos(text))


def bounded(name="llama", **settings):
    return SpecBoundConfig(**{"max_depth": BOUND, "tau": TAU.get(name, 0.12), **settings})


def ours(case, config, rows=1, **kwargs):
    kwargs = {"do_sample": False, "return_dict_in_generate": True, **case.inputs(rows), **kwargs}
    return case.model.generate(assistant_strategy=config, **kwargs)


@functools.cache
def truth(name="llama", layers=LAYERS, rows=1, new=50, **kwargs):
    """Return stock's greedy text."""
    case = tower(name, layers)
    return case.stock(**case.inputs(rows), max_new_tokens=new, **kwargs)


def random_heads(model, layers, kind, vocabulary=None, rank=None, noise=0.1, seed=3):
    """Return heads whose own weights are what a fresh head has, and noise."""
    heads = ExitHeads(model, layers, kind, vocabulary, rank)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in heads.own.parameters():
            spread = value.std() if value.dim() > 1 and value.any() else 0.3
            value += noise * spread * torch.randn(value.shape, generator=generator).to(value.dtype)
    return heads


# instruments


@dataclass
class Round:
    """What one round did.

    Args:
        committed (`int`): tokens at its start, the pending one included.
        lengths (`list[int]`): that each layer's cache held at its start.
        calls (`list[tuple[int, int, int]]`): of decoder layers: depth reached, first row (where known), rows.
        parked (`list[int]`): depth of each drafted row when drafting went on with its guess.
        rows (`int`): rows of the deep pass.
        stop (`str`): why drafting ended.
    """

    committed: int
    lengths: list[int]
    calls: list[tuple[int, int, int]] = field(default_factory=list)
    parked: list[int] = field(default_factory=list)
    rows: int = 0
    stop: str = ""
    drafted: int = 0
    accepted: int = 0

    @property
    def token_layers(self):
        return sum(rows for *_, rows in self.calls)


@dataclass
class Rounds:
    """All rounds, and the layer calls before the first one."""

    rounds: list[Round] = field(default_factory=list)
    prompt: list[tuple[int, int, int]] = field(default_factory=list)
    open: Round | None = None


@contextmanager
def rounds(model):
    """Note all rounds inside; the model must have been used before, because its first call runs a check."""
    seen = Rounds()
    step, verify, push = SpecBoundStrategy.step, SpecBoundStrategy.verify, Staircase.push

    def noted_step(self, state):
        lengths = [layer.lengths.tolist() for layer in state.target.cache.layers]
        assert all(len(rows) == 1 for rows in lengths)
        seen.open = Round(state.committed[0], [rows[0] for rows in lengths])
        seen.rounds.append(seen.open)
        before = Counter(state.stats.method.get("stop_reasons"))
        result = step(self, state)
        (seen.open.stop,) = Counter(state.stats.method["stop_reasons"]) - before
        seen.open.drafted, seen.open.accepted = result.drafted[0], result.accepted[0]
        seen.open = None
        return result

    def noted_verify(self, state, draft):
        seen.open.rows = len(self.staircase.depths)
        if len(seen.open.parked) < draft.tokens.shape[1]:
            seen.open.parked.append(self.staircase.depths[-1])  # the draft after it ended the text, so it has no row
        return verify(self, state, draft)

    def noted_push(self, token):
        if self.depths:
            seen.open.parked.append(self.depths[-1])
        return push(self, token)

    def called(depth):
        def note(_, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            where = kwargs.get("position_ids")
            first = -1 if where is None else int(where[0, 0])
            if seen.open is None:
                seen.prompt.append((depth, first, hidden.shape[1]))
            else:
                seen.open.calls.append((depth, first - seen.open.committed + 1, hidden.shape[1]))

        return note

    handles = [
        layer.register_forward_pre_hook(called(index + 1), with_kwargs=True)
        for index, layer in enumerate(decoder_layers(model))
    ]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SpecBoundStrategy, "step", noted_step)
            patch.setattr(SpecBoundStrategy, "verify", noted_verify)
            patch.setattr(Staircase, "push", noted_push)
            yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def scripted(script):
    """Let `script(position, depth)` say which token the head at `depth` guesses after the token at `position`.

    `None` for no guess; a tensor `[V]` stands for logits as they are. Gives the list of all questions.
    """
    propose, strategies, asked = SpecBoundStrategy.propose, [], []

    def noted_propose(self, state):
        strategies[:] = [self]
        return propose(self, state)

    def logits(self, layer, *_):
        rows = strategies[0].staircase
        assert rows.depths[-1] == layer
        position = rows.start + len(rows.depths) - 1
        asked.append((position, layer))
        answer = script(position, layer)
        if isinstance(answer, torch.Tensor):
            return answer[None].float()
        found = torch.zeros(1, self.heads.width)
        if answer is not None:
            found[0, answer] = 60.0
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpecBoundStrategy, "propose", noted_propose)
        patch.setattr(ExitReader, "logits", logits)
        yield asked


def exits(plan, text, wrong=()):
    """Return a script: the row at position p exits at depth `plan[p]`, with the right guess unless p is in `wrong`."""

    def script(position, depth):
        if plan.get(position) != depth:
            return None
        right = int(text[0, position + 1])
        return (right + 1) % families.VOCAB if position in wrong else right

    return script


def everywhere(depth, text, wrong=False):
    plan = dict.fromkeys(range(text.shape[1]), depth)
    return exits(plan, text, wrong=set(plan) if wrong else ())


ALL = {"exit_layers": "all", "tau": 0.8}


@functools.cache
def stock_text(name, rows, new):
    case = tower(name, 6)
    return case.stock(**case.inputs(rows), max_new_tokens=new)


@functools.cache
def token_by_token(model, text):
    """Return stock's cache after the tokens of `text`, fed one at a time."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for token in text:
            model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
    return cache


def same_as_token_by_token(case, out):
    """Compare each layer's keys and values with those of stock, fed one token at a time."""
    cache = token_by_token(case.model, tuple(out.sequences[0, :-1].tolist()))
    assert out.past_key_values.get_seq_length() == out.sequences.shape[1] - 1
    for ours_, theirs in zip(out.past_key_values.layers, cache.layers, strict=True):
        for name in ("keys", "values"):
            torch.testing.assert_close(getattr(ours_, name), getattr(theirs, name), rtol=0, atol=10 * case.tolerance)


# every round


def check_round(one, bound, layers=LAYERS):
    """Check what holds for every round, whatever stopped it."""
    assert one.lengths == [one.committed - 1] * layers
    assert one.rows == one.drafted + (one.stop != "eos")
    assert len(one.parked) == one.drafted
    assert all(1 <= depth <= bound for depth in one.parked)
    calls = layers + sum(one.parked) - (one.parked[-1] if one.stop == "eos" else 0)
    assert len(one.calls) == calls
    assert one.token_layers == one.rows * layers
    deep = [call for call in one.calls if call[0] > bound]
    assert deep == [(depth, 0, one.rows) for depth in range(bound + 1, layers + 1)]
    assert one.calls[-len(deep) :] == deep or not deep
    # each row passes each depth once, in its order, and rows above it have been there before
    depths = [0] * one.rows
    for depth, first, count in one.calls:
        for row in range(first, first + count):
            assert depths[row] == depth - 1
            depths[row] = depth
        assert depths == sorted(depths, reverse=True)
    assert depths == [layers] * one.rows


class Question(NamedTuple):
    """What a head was asked, and what it said.

    Args:
        text (`torch.Tensor` of shape `[1, n]`): up to the newest row.
        pending (`int`): place of the round's first row.
        layer (`int`): depth of the head.
        state (`torch.Tensor` of shape `[1, 1, H]`): of the newest row.
        logits (`torch.Tensor` of shape `[1, F]`): the answer.
    """

    text: torch.Tensor
    pending: int
    layer: int
    state: torch.Tensor
    logits: torch.Tensor


@contextmanager
def questions():
    """Note all questions to heads."""
    found, now = [], {}
    propose, push, logits = SpecBoundStrategy.propose, Staircase.push, ExitReader.logits

    def noted_propose(self, state):
        now.update(text=[state.text.tokens[:1, : state.committed[0] - 1]], strategy=self)
        return propose(self, state)

    def noted_push(self, token):
        if "text" in now:
            now["text"].append(token)
        return push(self, token)

    def noted_logits(self, layer, *args):
        answer, rows = logits(self, layer, *args), now["strategy"].staircase
        newest = len(rows.depths)
        state = rows.states[:, newest - 1 : newest].clone()
        found.append(Question(torch.cat(now["text"], dim=1), rows.start, layer, state, answer.clone()))
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpecBoundStrategy, "propose", noted_propose)
        patch.setattr(Staircase, "push", noted_push)
        patch.setattr(ExitReader, "logits", noted_logits)
        yield found


# sampling: every way in which a call can go


SMALL = torch.tensor([[2, 1, 0, 3, 1]])
WARPED = (TemperatureLogitsWarper(0.7), TopKLogitsWarper(3))


# heads


@functools.cache
def hidden_after(name, layer):
    """Return the states of a text after `layer` layers, before any norm that is not the layers' own."""
    case, found = tower(name), []
    handle = decoder_layers(case.model)[layer - 1].register_forward_hook(
        lambda _, __, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        logits = case.model(case.ids[:1]).logits
    handle.remove()
    return found[0], logits


# what is refused, before anything has run


def refused(model, config, error=ValueError, names=(), **kwargs):
    """Check that a call raises `error` before any layer has run, and says all of `names`."""
    calls = []
    watched = [model, *decoder_layers(model)]
    handles = [module.register_forward_pre_hook(lambda *_: calls.append(1)) for module in watched]
    try:
        with pytest.raises(error) as caught:
            model.generate(
                torch.arange(3, 15)[None], assistant_strategy=config, max_new_tokens=5, do_sample=False, **kwargs
            )
    finally:
        for handle in handles:
            handle.remove()
    assert not calls
    for name in names:
        assert name in str(caught.value)
