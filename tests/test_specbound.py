"""SpecBound: the table of pitfalls of its description, its round layer call by layer call, its heads and its
distribution.

Three instruments: `rounds` notes what every round ran, `scripted` replaces the exit heads by a script, so that exits
and wrong drafts come where a test wants them, and `Paths` goes through every random choice of a sampled call.
"""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import json
import pickle
import threading
import weakref
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import families
import pytest
import torch
from families import FAMILIES, NAMES, SEEDS, SINGLE, SLIDING, Family, build, letter, tokenizer
from safetensors.torch import load_file, save_file
from scipy import stats
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper
from transformers.generation.streamers import BaseStreamer

import hf_specdec
from hf_specdec import SpecBoundConfig, SpeculationConfig
from hf_specdec.cache.speculative import SpeculativeCache
from hf_specdec.configuration import ADAPTER_NAME, CONFIG_NAME
from hf_specdec.generation import acceptance
from hf_specdec.generation.methods.specbound import method as specbound
from hf_specdec.generation.methods.specbound.exit_heads import ExitHeads, ExitReader, load_exit_heads
from hf_specdec.generation.methods.specbound.method import SpecBoundStrategy, annealed_confidence
from hf_specdec.generation.models.layerwise import Layerwise, Rows
from hf_specdec.generation.models.surgery import decoder_layers, place_layer
from hf_specdec.generation.state import DecodingState


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


@pytest.fixture
def llama():
    return tower()


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


@pytest.fixture(scope="session")
def adapter(tmp_path_factory):
    """Return a function that saves random heads for a model, once, and gives their folder."""
    folders = {}

    def save(model, kind, layers=(2, 3, 5), words=None, rank=None, **settings):
        key = (id(model), kind, tuple(layers), words, rank)
        if key not in folders:
            folder = tmp_path_factory.mktemp("heads")
            # a part of the words, of which some texts lack a few
            chosen = None if words is None else torch.arange(0, model.config.vocab_size, 1)[:-words]
            heads = random_heads(model, list(layers), kind, chosen, rank)
            heads.save(folder, SpecBoundConfig(**settings), model)
            folders[key] = str(folder)
        return folders[key]

    return save


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
    def row_layers(self):
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
    step, verify, push = SpecBoundStrategy.step, SpecBoundStrategy.verify, Rows.push

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
        seen.open.rows = len(self.rows.depths)
        if len(seen.open.parked) < draft.tokens.shape[1]:
            seen.open.parked.append(self.rows.depths[-1])  # the draft after it ended the text, so it has no row
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
            patch.setattr(Rows, "push", noted_push)
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
        rows = strategies[0].rows
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


@pytest.fixture
def warm(llama):
    """The deep Llama after a first call."""
    ours(llama, bounded(), max_new_tokens=2)
    return llama


# losslessness

KINDS = {
    "final": {},
    "adapter": {"kind": "adapter", "words": 6},
    "block": {"kind": "block"},
    "lag": {"lag": True},
}


@functools.cache
def stock_text(name, rows, new):
    case = tower(name, 6)
    return case.stock(**case.inputs(rows), max_new_tokens=new)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_ids_and_cache_equal_stock(name, kind, adapter):
    case, settings = tower(name, 6), dict(KINDS[kind])
    if "kind" in settings:
        layers = (2, 3, 4)
        settings = {"adapter": adapter(case.model, layers=layers, **settings), "alpha": 0.1}
    config = bounded(name, max_depth=4, num_assistant_tokens=5, **settings)
    for new in (1, 2, 3, 50):
        out = ours(case, config, max_new_tokens=new)
        assert torch.equal(out.sequences, stock_text(name, 1, new)), f"max_new_tokens={new}"
    same_as_token_by_token(case, out)
    assert out.speculation.num_draft_tokens > 0
    if name in SLIDING:  # rejections past the window
        assert out.speculation.num_accepted_tokens < out.speculation.num_draft_tokens
    for new in (2, 12):
        out = ours(case, config, rows=4, max_new_tokens=new)
        assert torch.equal(out.sequences, stock_text(name, 4, new)), f"max_new_tokens={new}, batch"


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


def test_the_towers_try_something():
    """Over all families and kinds of round, drafts are neither all right nor all wrong."""
    for name in NAMES:
        case = tower(name, 6)
        seen = ours(case, bounded(name, max_depth=4), rows=4, max_new_tokens=8).speculation
        assert 0.1 < seen.acceptance_rate < 0.9, name
        assert sum(1 for count in seen.method["exits"].values() if count) > 1, name
        assert set(seen.method["stop_reasons"]) == {"depth", "width"}, name


# the worked example, call by call

TRACE = [
    (1, 0, 1), (2, 0, 1),
    (1, 1, 1), (2, 1, 1), (3, 0, 2), (4, 0, 2),
    (1, 2, 1), (2, 2, 1), (3, 2, 1),
    (1, 3, 1), (2, 3, 1), (3, 3, 1), (4, 2, 2), (5, 0, 4),
    (6, 0, 4), (7, 0, 4), (8, 0, 4),
]  # fmt: skip
TRACE_OF_EOS = TRACE[:9] + [(4, 2, 1), (5, 0, 3), (6, 0, 3), (7, 0, 3), (8, 0, 3)]


def test_the_worked_example_call_by_call(warm):
    text, base = truth(), warm.ids.shape[1]
    plan = {base: 2, base + 1: 4, base + 2: 3}
    with rounds(warm.model) as seen, scripted(exits(plan, text)) as asked:
        out = ours(warm, bounded(**ALL), max_new_tokens=12)
    one = seen.rounds[0]
    assert one.calls == TRACE
    assert (len(one.calls), one.row_layers) == (17, 32)
    assert (one.parked, one.stop, one.rows, one.drafted, one.accepted) == ([2, 4, 3], "depth", 4, 3, 3)
    # shallow to deep, the newest row only, and none after a guess was taken
    tested = [(0, 1), (0, 2)] + [(1, d) for d in range(1, 5)] + [(2, d) for d in range(1, 4)]
    tested += [(3, d) for d in range(1, 6)]
    assert asked[: len(tested)] == [(base + row, depth) for row, depth in tested]
    assert out.speculation.method["exits"] == {"1": 0, "2": 1, "3": 1, "4": 1, "5": 0}
    assert out.speculation.method["accepted_per_exit"] == {"1": 0, "2": 1, "3": 1, "4": 1, "5": 0}
    assert out.speculation.accept_lengths[0][0] == 4
    assert torch.equal(out.sequences, text[:, : base + 12])


def test_the_worked_example_with_a_drafted_eos(warm):
    text, base = truth(), warm.ids.shape[1]
    eos = int(text[0, base + 3])
    assert eos not in text[0, base : base + 3]
    plan = {base: 2, base + 1: 4, base + 2: 3}
    with rounds(warm.model) as seen, scripted(exits(plan, text)):
        out = ours(warm, bounded(**ALL), max_new_tokens=12, eos_token_id=eos)
    (one,) = seen.rounds
    assert one.calls == TRACE_OF_EOS
    assert (len(one.calls), one.row_layers) == (14, 24)
    assert (one.parked, one.stop, one.rows) == ([2, 4, 3], "eos", 3)
    assert torch.equal(out.sequences, text[:, : base + 4])
    assert out.past_key_values.get_seq_length() == base + 3
    same_as_token_by_token(warm, out)


def test_a_drafted_eos_that_is_wrong_ends_nothing(warm):
    """It stops the round only; the model's own token takes its place."""
    text, base = truth(), warm.ids.shape[1]
    eos = next(token for token in range(families.VOCAB) if token not in text[0, base:])
    plan = {base: 2, base + 1: 4, base + 2: 3}

    def script(position, depth):
        answer = exits(plan, text)(position, depth)
        return eos if position == base + 2 and answer is not None else answer

    with rounds(warm.model) as seen, scripted(script):
        out = ours(warm, bounded(**ALL), max_new_tokens=12, eos_token_id=eos)
    assert seen.rounds[0].calls == TRACE_OF_EOS
    assert (seen.rounds[0].stop, seen.rounds[0].accepted) == ("eos", 2)
    assert torch.equal(out.sequences, text[:, : base + 12])
    same_as_token_by_token(warm, out)


def test_three_rows_parked_at_one_depth_stay_in_order(warm):
    text, base = truth(), warm.ids.shape[1]
    with rounds(warm.model) as seen, scripted(exits(dict.fromkeys(range(base, base + 3), 1), text)):
        out = ours(warm, bounded(**ALL), max_new_tokens=12)
    assert seen.rounds[0].calls == [(1, row, 1) for row in range(4)] + [(depth, 0, 4) for depth in range(2, 9)]
    assert seen.rounds[0].accepted == 3
    same_as_token_by_token(warm, out)


# every round


def check_round(one, bound, layers=LAYERS):
    """Check what holds for every round, whatever stopped it."""
    assert one.lengths == [one.committed - 1] * layers
    assert one.rows == one.drafted + (one.stop != "eos")
    assert len(one.parked) == one.drafted
    assert all(1 <= depth <= bound for depth in one.parked)
    calls = layers + sum(one.parked) - (one.parked[-1] if one.stop == "eos" else 0)
    assert len(one.calls) == calls
    assert one.row_layers == one.rows * layers
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


@pytest.mark.parametrize("kind", [*KINDS, "every layer", "shallow", "no bound"])
def test_every_round_runs_each_layer_once_on_each_row(warm, kind, adapter):
    changes = {"every layer": {"exit_layers": "all"}, "shallow": {"max_depth": 1}, "no bound": {"max_depth": LAYERS}}
    settings = {**KINDS.get(kind, {}), **changes.get(kind, {})}
    if "kind" in settings:
        settings = {"adapter": adapter(warm.model, **settings), "alpha": 0.1}
    if kind == "no bound":
        settings["exit_layers"] = [2, 4, 6]
    config, eos = bounded(**settings), warm.eos
    ours(warm, config, max_new_tokens=2)  # loads the heads before the hooks are there
    caches = set()
    update = SpeculativeCache.update
    with rounds(warm.model) as seen, pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpeculativeCache, "update", lambda self, *a, **k: (caches.add(self), update(self, *a, **k))[1])
        outs = [
            ours(warm, config, max_new_tokens=60),
            ours(warm, config, max_new_tokens=60, eos_token_id=eos),
            ours(warm, config, max_new_tokens=20, num_assistant_tokens=2),
        ]
    width = warm.ids.shape[1]
    assert sum(rows for *_, rows in seen.prompt) == 3 * width * LAYERS  # once each, and no second prefill
    for one in seen.rounds:
        check_round(one, config.depth_bound(LAYERS))
    assert {one.stop for one in seen.rounds} >= {"depth", "width"} or kind == "no bound"
    assert len(caches) == (6 if kind == "block" else 3)  # a block has keys and values of its own
    for out in outs:
        method = out.speculation.method
        assert sum(method["stop_reasons"].values()) == out.speculation.num_drafts
        assert sum(method["exits"].values()) == out.speculation.num_draft_tokens
        assert sum(method["accepted_per_exit"].values()) == out.speculation.num_accepted_tokens
    methods = [out.speculation.method for out in outs]
    assert sum(method["layer_calls"] for method in methods) == sum(len(one.calls) for one in seen.rounds)
    assert sum(method["row_layers"] for method in methods) == sum(one.row_layers for one in seen.rounds)


def test_counters_of_a_batch_are_sums_over_its_rows(llama):
    config = bounded()
    whole = ours(llama, config, rows=4, max_new_tokens=12).speculation.method
    parts = []
    for row in range(4):
        ids = llama.ids[row : row + 1, llama.mask[row] == 1]
        parts.append(ours(llama, config, input_ids=ids, max_new_tokens=12).speculation.method)
    for key in ("tests", "layer_calls", "row_layers"):
        assert whole[key] == sum(part[key] for part in parts)
    for key in ("stop_reasons", "exits", "accepted_per_exit"):
        assert Counter(whole[key]) == sum((Counter(part[key]) for part in parts), Counter())
    json.dumps(whole)


@pytest.mark.parametrize("lag", [False, True])
def test_the_states_that_heads_see_are_the_models_own(warm, lag):
    """After catching up, rejections and roll-back, a head reads what a fresh forward over the same text has there."""
    with questions() as asked:
        out = ours(warm, bounded(exit_layers="all", lag=lag), max_new_tokens=30)
    assert 0 < out.speculation.num_accepted_tokens < out.speculation.num_draft_tokens
    assert len({question.layer for question in asked}) == BOUND
    model = copy.deepcopy(warm.model)  # asked for hidden states, a model keeps hooks
    for text, _, layer, state, logits in asked:
        with torch.no_grad():
            hidden = model.model(text, output_hidden_states=True).hidden_states[layer][:, -1:]
            expected = model.lm_head(model.model.norm(hidden))[:, 0].float()
        torch.testing.assert_close(state, hidden, rtol=0, atol=1e-10)
        torch.testing.assert_close(logits, expected)


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
    propose, push, logits = SpecBoundStrategy.propose, Rows.push, ExitReader.logits

    def noted_propose(self, state):
        now.update(text=[state.text[:1, : state.committed[0] - 1]], strategy=self)
        return propose(self, state)

    def noted_push(self, token):
        if "text" in now:
            now["text"].append(token)
        return push(self, token)

    def noted_logits(self, layer, *args):
        answer, rows = logits(self, layer, *args), now["strategy"].rows
        newest = len(rows.depths)
        state = rows.states[:, newest - 1 : newest].clone()
        found.append(Question(torch.cat(now["text"], dim=1), rows.start, layer, state, answer.clone()))
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpecBoundStrategy, "propose", noted_propose)
        patch.setattr(Rows, "push", noted_push)
        patch.setattr(ExitReader, "logits", noted_logits)
        yield found


# bounds


@pytest.mark.parametrize("width", [1, 3, 6])
def test_the_width_bound_and_the_bonus_token(warm, width):
    text, start = truth(), warm.ids.shape[1]
    new = 1 + 3 * (width + 1)
    with rounds(warm.model) as seen, scripted(everywhere(2, text)):
        out = ours(warm, bounded(**ALL, num_assistant_tokens=width), max_new_tokens=new)
    assert [(one.drafted, one.rows, one.stop) for one in seen.rounds] == [(width, width + 1, "width")] * 3
    assert out.speculation.accept_lengths == [[width + 1] * 3]
    assert torch.equal(out.sequences, text[:, : start + new])
    for one in seen.rounds:
        check_round(one, BOUND)


def test_wrong_drafts_cost_rounds_and_change_nothing(warm):
    text, start = truth(), warm.ids.shape[1]
    with rounds(warm.model) as seen, scripted(everywhere(2, text, wrong=True)):
        out = ours(warm, bounded(**ALL), max_new_tokens=15)
    assert out.speculation.accept_lengths == [[1] * 14]
    assert out.speculation.num_accepted_tokens == 0
    assert torch.equal(out.sequences, text[:, : start + 15])
    for one in seen.rounds:
        check_round(one, BOUND)
    same_as_token_by_token(warm, out)


@pytest.mark.parametrize("place", range(4))
def test_one_wrong_draft_cuts_the_block_there(warm, place):
    text, base = truth(), warm.ids.shape[1]
    plan = {base: 2, base + 1: 4, base + 2: 3, base + 3: 1}
    with rounds(warm.model) as seen, scripted(exits(plan, text, wrong={base + place})):
        out = ours(warm, bounded(**ALL), max_new_tokens=12)
    assert seen.rounds[0].accepted == place
    assert seen.rounds[1].committed == base + 1 + place + 1
    assert torch.equal(out.sequences, text[:, : base + 12])
    for one in seen.rounds:
        check_round(one, BOUND)
    same_as_token_by_token(warm, out)


@pytest.mark.parametrize("place", range(4))
def test_a_difficult_row_ends_the_round_at_the_depth_bound(warm, place):
    text, base = truth(), warm.ids.shape[1]
    plan = dict.fromkeys([base + row for row in range(10) if row != place], 3)
    with rounds(warm.model) as seen, scripted(exits(plan, text)):
        ours(warm, bounded(**ALL), max_new_tokens=12)
    one = seen.rounds[0]
    assert (one.drafted, one.stop) == (place, "depth")
    # nothing above the bound before the deep pass, and that in one go
    assert one.calls[-4:] == [(BOUND, 0, place + 1)] + [(depth, 0, place + 1) for depth in (6, 7, 8)]
    check_round(one, BOUND)


def test_a_guess_at_the_depth_bound_counts(warm):
    text = truth()
    with rounds(warm.model) as seen, scripted(everywhere(BOUND, text)):
        ours(warm, bounded(**ALL), max_new_tokens=8)
    assert seen.rounds[0].parked == [BOUND] * 6
    assert seen.rounds[0].stop == "width"


def test_the_last_token_of_the_budget_is_not_drafted(warm):
    """One token less than may be emitted: with room for one token, no head is asked."""
    text = truth()
    for new in range(2, 9):
        with rounds(warm.model) as seen, scripted(everywhere(2, text)) as asked:
            out = ours(warm, bounded(**ALL), max_new_tokens=new)
        (one,) = seen.rounds
        assert (one.drafted, one.rows) == (new - 2, new - 1)
        assert len(asked) == 2 * (new - 2)
        assert out.speculation.method["tests"] == len(asked)
        assert torch.equal(out.sequences, text[:, : warm.ids.shape[1] + new])
        check_round(one, BOUND)


def test_the_full_depth_bounds_nothing(warm):
    text = truth()
    with rounds(warm.model) as seen, scripted(everywhere(LAYERS - 1, text)):
        out = ours(warm, bounded(**{**ALL, "exit_layers": [2, LAYERS - 1], "max_depth": LAYERS}), max_new_tokens=9)
    assert seen.rounds[0].parked == [LAYERS - 1] * 6
    assert torch.equal(out.sequences, text[:, : warm.ids.shape[1] + 9])
    with rounds(warm.model) as seen, scripted(lambda *_: None):
        out = ours(warm, bounded(**{**ALL, "exit_layers": [2, LAYERS - 1], "max_depth": LAYERS}), max_new_tokens=9)
    assert [(one.drafted, one.stop) for one in seen.rounds] == [(0, "depth")] * 7 + [(0, "width")]
    assert torch.equal(out.sequences, text[:, : warm.ids.shape[1] + 9])


# the confidence test


def test_temperatures_fall_linearly_to_one():
    table = [1.4375, 1.375, 1.3125, 1.25, 1.1875, 1.125, 1.0625, 1.0]
    config = SpecBoundConfig(alpha=0.5)
    assert [config.temperature(layer, 8, True) for layer in range(1, 9)] == table
    assert [config.temperature(layer, 8, False) for layer in range(1, 9)] == table
    # what is not set is on for trained heads and off for the model's own
    default = SpecBoundConfig()
    assert default.temperature(4, 8, True) == pytest.approx(1.15)
    assert default.temperature(4, 8, False) == 1.0
    assert SpecBoundConfig(alpha=0).temperature(1, 8, True) == 1.0


def test_annealed_confidence_is_the_largest_probability():
    logits = 4 * torch.randn(5, 97)
    logits[0, 3] = 300.0  # no overflow
    logits[1] = 7.0
    logits[2, :] = -1e4  # words outside a draft vocabulary
    logits[2, 5] = 1.0
    kept = logits.clone()
    for temperature in (1.0, 1.2, 3.0):
        expected = torch.softmax(logits.double() / temperature, dim=-1).amax(dim=-1)
        torch.testing.assert_close(annealed_confidence(logits, temperature).double(), expected, rtol=1e-5, atol=0)
    assert torch.equal(logits, kept)  # drafts are chosen from them afterwards


@pytest.mark.parametrize("depth", range(1, BOUND + 1))
@pytest.mark.parametrize("lag", [False, True])
def test_each_depth_is_tested_at_its_own_temperature(warm, depth, lag):
    """The same logits at all depths pass from the depth on at which the temperature has fallen far enough."""
    logits = torch.zeros(families.VOCAB)
    logits[5] = 6.0

    def confidence(at):
        return float(torch.softmax(logits.double() / (1 + 0.5 * (1 - at / LAYERS)), dim=0).max())

    tau = (confidence(depth) + confidence(depth - 1)) / 2
    with rounds(warm.model) as seen, scripted(lambda *_: logits):
        out = ours(warm, bounded(exit_layers="all", tau=tau, alpha=0.5, lag=lag), max_new_tokens=6)
    assert out.speculation.method["exits"][str(depth)] == sum(out.speculation.method["exits"].values()) > 0
    assert seen.rounds[0].parked[0] == min(depth + lag, BOUND)


def test_the_bound_of_confidence_is_reached_by_equality(warm):
    """Two words of equal logits, all others impossible: a confidence of exactly one half."""
    logits = torch.full((families.VOCAB,), -1e4)
    logits[[5, 6]] = 0.0
    for tau, taken in ((0.5, True), (0.51, False)):
        with scripted(lambda *_: logits):
            out = ours(warm, bounded(exit_layers=[2], tau=tau), max_new_tokens=6)
        assert bool(out.speculation.num_draft_tokens) is taken


def test_exits_shrink_with_alpha_and_tau(warm):
    """Rows are the same for all settings, because every guess is right and the width does not bind."""
    text, generator = truth(), torch.Generator().manual_seed(5)
    table = 2.5 + 5 * torch.rand(text.shape[1], BOUND + 1, generator=generator)

    def script(position, depth):
        logits = torch.zeros(families.VOCAB)
        if position + 1 < text.shape[1]:
            logits[text[0, position + 1]] = table[position, depth]
        return logits

    def exits_at(**settings):
        with scripted(script):
            config = bounded(**{"exit_layers": "all", "tau": 0.4, "num_assistant_tokens": 60, **settings})
            out = ours(warm, config, max_new_tokens=50)
        assert torch.equal(out.sequences, text)
        return sum(out.speculation.method["exits"].values())

    by_alpha = [exits_at(alpha=alpha) for alpha in (0, 0.25, 0.5, 1, 2)]
    by_tau = [exits_at(tau=tau) for tau in (0.1, 0.4, 0.6, 0.8, 0.9)]
    for counts in (by_alpha, by_tau):
        assert counts == sorted(counts, reverse=True)
        assert counts[0] > counts[-1] + 10


@pytest.mark.parametrize("mode", ["greedy", "sample", "match"])
def test_the_temperature_touches_the_test_only(warm, mode):
    """Drafts and their declared distribution come from the logits as they are, after the caller's processors."""
    logits = torch.randn(families.VOCAB)
    logits[[7, 9]] = torch.tensor([5.0, 4.8])
    seen = []
    settings = {} if mode == "greedy" else {"sampling_draft": mode}
    kwargs = {} if mode == "greedy" else {"do_sample": True, "top_k": 0, "temperature": 0.8}
    with scripted(lambda *_: logits), noted_drafts(seen):
        config = bounded(exit_layers=[2], tau=0.05, alpha=3.0, **settings)
        for _ in range(3):
            ours(warm, config, max_new_tokens=12, logits_processor=[Against(7)], **kwargs)
    drafted = [draft for draft in seen if draft.tokens.shape[1]]
    assert drafted
    changed = logits.clone()
    changed[7] -= 1.0
    expected = torch.softmax(changed / 0.8, dim=0)
    for draft in drafted:
        if mode == "sample":
            torch.testing.assert_close(draft.distributions[0], expected.expand_as(draft.distributions[0]))
        else:
            assert draft.distributions is None
            assert draft.tokens.unique().tolist() == [9]
    if mode == "sample":
        assert len(torch.cat([draft.tokens for draft in drafted], dim=1).unique()) > 1


def test_drafts_follow_processors_of_their_own_prefix(warm):
    """A processor that fixes the whole text by its prefix: drafts that were shown theirs are always right."""

    class Fixes(LogitsProcessor):
        def __call__(self, input_ids, scores):
            weights = torch.arange(1, input_ids.shape[1] + 1)
            chosen = (input_ids * weights).sum(dim=1) % scores.shape[1]
            return scores.scatter_add(1, chosen[:, None], torch.full_like(scores[:, :1], 500.0))

    expected = warm.stock(**warm.one, max_new_tokens=24, logits_processor=[Fixes()])
    with scripted(lambda *_: 3):
        out = ours(warm, bounded(**ALL), max_new_tokens=24, logits_processor=[Fixes()])
    assert torch.equal(out.sequences, expected)
    assert out.speculation.num_accepted_tokens == out.speculation.num_draft_tokens > 12


@contextmanager
def noted_drafts(found):
    propose = SpecBoundStrategy.propose

    def noted(self, state):
        found.append(propose(self, state))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpecBoundStrategy, "propose", noted)
        yield


class Against(LogitsProcessor):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.token] -= 1.0
        return scores


# sampling: every way in which a call can go


SMALL = torch.tensor([[2, 1, 0, 3, 1]])
WARPED = (TemperatureLogitsWarper(0.7), TopKLogitsWarper(3))


class AgainstLastPair(LogitsProcessor):
    """Depends on the last two tokens and on the length of the text."""

    def __call__(self, input_ids, scores):
        index = (input_ids[:, -1] + 2 * input_ids[:, -2] + input_ids.shape[1]) % scores.shape[1]
        return scores.scatter_add(1, index[:, None], torch.full_like(scores[:, :1], 1.5))


LAWS = {
    "plain": ({"top_k": 0}, ()),
    "temperature and top_k": ({"temperature": 0.7, "top_k": 3}, WARPED),
    "of the prefix": ({"top_k": 0, "logits_processor": [AgainstLastPair()]}, (AgainstLastPair(),)),
}


@functools.cache
def sampler(vocab=4, seed=8):
    """Return a model of few words whose rows exit at depth 1, at depth 2 or not at all."""
    changes = {"vocab_size": vocab, "hidden_size": 16, "num_hidden_layers": 4, "initializer_range": 0.3}
    model = build("Llama", seed=seed, **changes)
    lower_deep_layers(model, share=0.5, first=3)
    model.generation_config.pad_token_id = None
    return model


class Paths:
    """Enumerates sampled calls of one row: a plan has one number per random choice."""

    def __init__(self, monkeypatch):
        self.patch = monkeypatch

    def choose(self, chances):
        chances = chances.double() / chances.double().sum()
        if len(self.done) == len(self.plan):
            possible = chances.nonzero()[:, 0].tolist()
            self.plan.append(possible[0])
            self.queue += [[*self.done, other] for other in possible[1:]]
        self.done.append(self.plan[len(self.done)])
        self.mass *= float(chances[self.done[-1]])
        return self.done[-1]

    def multinomial(self, distribution, number, **_):
        return torch.tensor([[self.choose(distribution[0])]])

    def rand(self, *size, **_):
        """Give coins by which the first so many drafts are accepted and the next is not."""
        accept = self.chance[0].double().clamp(0, 1)
        stay = [accept[:j].prod() * (1 - accept[j] if j < len(accept) else 1) for j in range(len(accept) + 1)]
        coins = torch.full(self.chance.shape, 2.0, dtype=torch.float64)
        coins[0, : self.choose(torch.stack(stay))] = -1.0
        return coins

    def distribution(self, model, config, length, **kwargs):
        """Return what a call emits, as a dictionary from tokens to probability, and the last call's statistics."""
        rule = acceptance.acceptance_probability
        found, self.queue, self.stats = {}, [[]], []

        def noted_rule(*args):
            self.chance = rule(*args)
            return self.chance

        with self.patch.context() as patch:
            patch.setattr(acceptance, "acceptance_probability", noted_rule)
            patch.setattr(torch, "multinomial", self.multinomial)
            patch.setattr(torch, "rand", self.rand)
            while self.queue:
                self.plan, self.done, self.mass = self.queue.pop(), [], 1.0
                out = model.generate(
                    SMALL % model.config.vocab_size, assistant_strategy=config, do_sample=True, max_new_tokens=length,
                    return_dict_in_generate=True, **kwargs,
                )  # fmt: skip
                self.stats.append(out.speculation)
                key = tuple(out.sequences[0, SMALL.shape[1] :].tolist())
                found[key] = found.get(key, 0.0) + self.mass
        return found


def exact(model, length, processors):
    """Return the distribution of the model's own text by forwards without a cache."""
    chain, found = LogitsProcessorList(processors), {(): 1.0}
    for _ in range(length):
        more = torch.tensor(list(found), dtype=torch.int64).view(len(found), -1)
        text = torch.cat([(SMALL % model.config.vocab_size).expand(len(found), -1), more], dim=1)
        with torch.no_grad():
            distributions = torch.softmax(chain(text, model(text).logits[:, -1].float()).double(), dim=-1).tolist()
        found = {
            (*prefix, token): mass * chance
            for (prefix, mass), distribution in zip(found.items(), distributions, strict=True)
            for token, chance in enumerate(distribution)
            if chance
        }
    return found


def distance(one, other):
    """Return the total variation distance of two distributions."""
    return sum(abs(one.get(key, 0.0) - other.get(key, 0.0)) for key in {*one, *other}) / 2


SAMPLED = {"max_depth": 2, "exit_layers": [1, 2], "tau": 0.5, "alpha": 0.5}
EXACT = 3e-6  # distributions are float32


@pytest.mark.parametrize("setting", LAWS)
@pytest.mark.parametrize("mode", ["sample", "match"])
def test_sampled_sequences_have_the_models_distribution(mode, setting, monkeypatch):
    kwargs, processors = LAWS[setting]
    paths = Paths(monkeypatch)
    tau = 0.4 if "top_k" in setting else SAMPLED["tau"]  # other texts are met there
    config = SpecBoundConfig(**{**SAMPLED, "tau": tau, "sampling_draft": mode})
    found = paths.distribution(sampler(), config, 3, **kwargs)
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-6)
    assert distance(found, exact(sampler(), 3, processors)) < EXACT
    met_everything(paths)


def met_everything(paths):
    """Check that rows exited at both depths and at none, and that drafts were right and wrong."""
    exited = sum((Counter(found.method["exits"]) for found in paths.stats), Counter())
    stopped = sum((Counter(found.method["stop_reasons"]) for found in paths.stats), Counter())
    assert exited["1"] and exited["2"] and stopped["depth"] and stopped["width"]
    drafted = sum(found.num_draft_tokens for found in paths.stats)
    assert 0 < sum(found.num_accepted_tokens for found in paths.stats) < drafted


@pytest.mark.parametrize("mode", ["sample", "match"])
def test_longer_sampled_sequences_have_the_models_distribution(mode, monkeypatch):
    """Two drafts in a round, so that a rejected one may lie between others."""
    model, paths = sampler(3, seed=10), Paths(monkeypatch)
    config = SpecBoundConfig(**{**SAMPLED, "tau": 0.6, "sampling_draft": mode})
    found = paths.distribution(model, config, 4, top_k=0)
    assert distance(found, exact(model, 4, ())) < EXACT
    assert max(len(seen.num_accepted_tokens_per_pos) for seen in paths.stats) == 2
    met_everything(paths)


@pytest.mark.parametrize("kind", ["adapter", "block"])
def test_heads_that_lack_words_sample_by_the_models_distribution(kind, monkeypatch):
    model, paths = sampler(), Paths(monkeypatch)
    heads = random_heads(model, [1, 2], kind, torch.tensor([0, 2, 3]))
    with loaded(heads) as name:
        found = paths.distribution(model, SpecBoundConfig(**{**SAMPLED, "tau": 0.45, "adapter": name}), 3, top_k=0)
    assert distance(found, exact(model, 3, ())) < EXACT
    assert sum(seen.num_accepted_tokens for seen in paths.stats) > 0


@contextmanager
def loaded(heads, name="nobody/heads"):
    """Let `adapter=name` stand for heads that are in no file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(specbound, "load_exit_heads", lambda model, name: heads)
        yield name


def test_a_test_of_the_sampled_token_has_another_distribution(monkeypatch):
    """The forbidden variant: draw first, and exit if the drawn token is likely. The enumeration tells them apart."""
    drawn = []

    def own_confidence(logits, temperature):
        drawn[:] = [torch.multinomial(torch.softmax(logits, dim=-1), 1)[:, 0]]
        return torch.softmax(logits / temperature, dim=-1)[0, drawn[0]]

    monkeypatch.setattr(specbound, "annealed_confidence", own_confidence)
    monkeypatch.setattr(DecodingState, "choose", lambda self, scores: (drawn[0], self.distribution(scores)))
    model = sampler(3, seed=10)
    found = Paths(monkeypatch).distribution(model, SpecBoundConfig(**SAMPLED), 3, top_k=0)
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-6)
    assert distance(found, exact(model, 3, ())) > 0.01


@pytest.mark.parametrize("mode", ["sample", "match"])
def test_sampling_by_chi_square(mode):
    """Real draws: whole sequences against their exact probabilities."""
    model, length, calls = sampler(), 3, 300
    config = SpecBoundConfig(**SAMPLED, sampling_draft=mode)
    torch.manual_seed(17)
    out = model.generate(
        SMALL, assistant_strategy=config, do_sample=True, max_new_tokens=length, num_return_sequences=calls,
        return_dict_in_generate=True, temperature=0.7, top_k=3,
    )  # fmt: skip
    counts = Counter(map(tuple, out.sequences[:, SMALL.shape[1] :].tolist()))
    distribution = exact(model, length, WARPED)
    assert set(counts) <= set(distribution)
    cells, rest = [], [0.0, 0.0]
    for key, chance in distribution.items():
        if chance * calls >= 5:
            cells.append((counts[key], chance * calls))
        else:
            rest = [rest[0] + counts[key], rest[1] + chance * calls]
    cells.append(rest)
    assert len(cells) > 10
    assert stats.chisquare(*zip(*cells, strict=True), sum_check=False).pvalue > 1e-3


@pytest.mark.parametrize("refuse", [False, True])
def test_equal_distributions_of_draft_and_model_never_give_nan(refuse, monkeypatch):
    """Deep layers that do nothing: q is p, and what a refusal by rounding would leave has no mass."""
    model = copy.deepcopy(sampler())
    lower_deep_layers(model, share=0.0, first=3)
    draw, seen = torch.multinomial, []

    def noted(distribution, number, **kwargs):
        assert distribution.isfinite().all() and distribution.sum() > 0.99
        seen.append(distribution)
        return draw(distribution, number, **kwargs)

    monkeypatch.setattr(torch, "multinomial", noted)
    if refuse:
        monkeypatch.setattr(torch, "rand", lambda size, **kwargs: torch.ones(size, **kwargs))
    out = model.generate(
        SMALL, assistant_strategy=SpecBoundConfig(max_depth=2, exit_layers=[2], tau=0.1), do_sample=True,
        max_new_tokens=12, num_return_sequences=5, return_dict_in_generate=True, top_k=0,
    )  # fmt: skip
    assert seen and out.speculation.num_draft_tokens
    assert out.speculation.num_accepted_tokens == (0 if refuse else out.speculation.num_draft_tokens)


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


@pytest.mark.parametrize("name", NAMES)
def test_the_models_own_head_on_the_last_states_gives_its_logits(name):
    """The final norm once, the head, soft-caps and scales: all that the model does after its layers."""
    case = tower(name)
    hidden, logits = hidden_after(name, LAYERS)
    with torch.no_grad():
        for kind, vocabulary in (("final", None), ("final", torch.arange(3, 40)), ("adapter", None), ("full", None)):
            heads = ExitHeads(case.model, [2, LAYERS - 1], kind, vocabulary)  # fresh ones change nothing
            found = heads.read(LAYERS - 1, hidden)
            expected = logits if vocabulary is None else logits[..., vocabulary]
            torch.testing.assert_close(found, expected, rtol=0, atol=10 * case.tolerance)
    assert not torch.allclose(heads.read(2, hidden_after(name, 2)[0]), logits, atol=1e-2)


def test_a_soft_cap_of_the_logits_reaches_the_heads():
    model = build("Gemma2", num_hidden_layers=2, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=2.0)
    with torch.no_grad():
        logits = ExitHeads(model.float(), [1], "final").read(1, 50 * torch.randn(1, 3, 32))
    assert 1.5 < logits.abs().max() <= 2.0


def test_what_each_kind_of_head_computes(llama):
    model = llama.model
    hidden = hidden_after("llama", 3)[0]
    norm, weight = model.model.norm, model.lm_head.weight
    words = torch.tensor([4, 9, 10, 33])
    with torch.no_grad():
        for chosen in (None, words):
            rows = weight if chosen is None else weight[chosen]
            heads = random_heads(model, [2, 3], "adapter", chosen)
            expected = (norm(hidden) + norm(hidden) @ heads.own["3"].weight.T) @ rows.T
            torch.testing.assert_close(heads.read(3, hidden), expected)
            heads = random_heads(model, [2, 3], "adapter", chosen, rank=4)
            down, up = heads.own["3"]
            assert down.weight.shape == (4, 32) and up.weight.shape == (32, 4)
            expected = (norm(hidden) + norm(hidden) @ down.weight.T @ up.weight.T) @ rows.T
            torch.testing.assert_close(heads.read(3, hidden), expected)
            heads = random_heads(model, [2, 3], "full", chosen)
            torch.testing.assert_close(heads.read(3, hidden), norm(hidden) @ heads.own["3"].weight.T)
            assert heads.read(3, hidden).shape[-1] == len(rows)
    heads = ExitHeads(model, [2], "final", words)
    assert heads.tokens(torch.tensor([0, 3])).tolist() == [4, 33]
    scattered = heads.scatter(torch.ones(1, 4))
    assert scattered.shape == (1, families.VOCAB)
    assert torch.softmax(scattered, dim=-1)[0, words].tolist() == [0.25] * 4


def test_heads_hold_nothing_of_the_model_that_could_be_trained(llama):
    theirs = {id(value) for value in llama.model.parameters()}
    for kind, count in (("final", 0), ("adapter", 2), ("full", 2)):
        heads = ExitHeads(llama.model, [2, 3], kind)
        assert len(list(heads.parameters())) == count
        assert not theirs & {id(value) for value in heads.parameters()}
    assert not theirs & {id(value) for value in ExitHeads(llama.model, [2, 3], "block").parameters()}


@pytest.mark.parametrize(
    "kind, vocabulary, rank",
    [
        ("final", None, None), ("final", [3, 5, 60], None), ("adapter", None, None), ("adapter", [3, 5, 60], 4),
        ("full", None, None), ("full", [3, 5, 60], None), ("block", None, None), ("block", [3, 5, 60], None),
    ],
)  # fmt: skip
def test_heads_come_back_from_their_folder(llama, kind, vocabulary, rank, tmp_path):
    words = None if vocabulary is None else torch.tensor(vocabulary)
    heads = random_heads(llama.model, [2, 4], kind, words, rank)
    heads.save(tmp_path, bounded(alpha=0.25, exit_layers=[4]), llama.model, steps=7)
    back = load_exit_heads(llama.model, str(tmp_path))
    assert (back.layers, back.kind, back.rank) == ([2, 4], kind, rank)
    assert back.record["steps"] == 7
    assert not back.training and not any(value.requires_grad for value in back.parameters())
    saved, found = dict(heads.own.named_parameters()), dict(back.own.named_parameters())
    assert saved.keys() == found.keys()
    for key, value in saved.items():
        assert torch.equal(found[key], value.bfloat16().double()), key
    assert back.tokens(torch.arange(3)).tolist() == heads.tokens(torch.arange(3)).tolist()
    with torch.no_grad():
        for value in heads.own.parameters():
            value.copy_(value.bfloat16())
        hidden = hidden_after("llama", 4)[0]
        assert torch.equal(back.read(4, hidden), heads.read(4, hidden))
    # read once per model, until it is forgotten or the file changes
    assert load_exit_heads(llama.model, str(tmp_path)) is back
    hf_specdec.unload(llama.model)
    assert load_exit_heads(llama.model, str(tmp_path)) is not back
    # the folder alone is a strategy
    config = SpeculationConfig.from_pretrained(tmp_path)
    assert config == bounded(alpha=0.25, exit_layers=[4], adapter=str(tmp_path))
    out = ours(llama, str(tmp_path), max_new_tokens=12)
    assert torch.equal(out.sequences, truth()[:, : llama.ids.shape[1] + 12])
    assert list(out.speculation.method["exits"]) == ["4"]


def test_heads_of_another_model_are_refused(llama, tmp_path):
    random_heads(llama.model, [2, 3], "adapter").save(tmp_path, SpecBoundConfig(), llama.model)
    other = copy.deepcopy(llama.model)
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(1.3)
    for model in (other, tower(layers=6).model, tower("qwen2", 6).model):
        refused(model, SpecBoundConfig(adapter=str(tmp_path)), names=["made for"])


def edited(folder, record=None, tensors=None):
    """Change a saved adapter's record and tensors by functions of them."""
    path = folder / CONFIG_NAME
    values = json.loads(path.read_text())
    if record is not None:
        record(values["adapter"])
    path.write_text(json.dumps(values))
    if tensors is not None:
        found = load_file(folder / ADAPTER_NAME)
        tensors(found)
        save_file(found, folder / ADAPTER_NAME, {"format": "pt"})


@pytest.mark.parametrize(
    "record, tensors",
    [
        *((lambda r, key=key: r.pop(key), None) for key in ("head", "layers", "rank", "model", "kind")),
        (lambda r: r.update(kind="draft"), None),
        (lambda r: r.update(head="unheard"), None),
        (lambda r: r.update(head="full"), None),
        (lambda r: r.update(layers=[2, 4]), None),
        (lambda r: r.update(layers=[2]), None),
        (lambda r: r.update(layers=[3, 2]), None),
        (lambda r: r.update(layers=[2, 99]), None),
        (lambda r: r.update(rank=4), None),
        (lambda r: r.update(format_version=99), None),
        (None, lambda t: t.clear()),
        (None, lambda t: t.update(more=torch.ones(2))),
        (None, lambda t: t.update({key: value[:-1] for key, value in t.items()})),
        (None, lambda t: t.update({key: value.flatten() for key, value in t.items()})),
        (None, lambda t: t.update(vocabulary=torch.tensor([3, 2, 1]))),
        (None, lambda t: t.update(vocabulary=torch.tensor([3, families.VOCAB]))),
    ],
)
def test_a_damaged_adapter_is_refused(llama, record, tensors, tmp_path):
    random_heads(llama.model, [2, 3], "adapter").save(tmp_path, SpecBoundConfig(), llama.model)
    edited(tmp_path, record, tensors)
    refused(llama.model, SpecBoundConfig(adapter=str(tmp_path)))


def test_bad_heads_are_refused(llama):
    for layers in ([], [0, 2], [3, 2], [2, 2], [2, LAYERS + 1]):
        with pytest.raises(ValueError, match="layers"):
            ExitHeads(llama.model, layers, "adapter")
    with pytest.raises(ValueError, match="kind"):
        ExitHeads(llama.model, [2], "linear")
    for kind, rank in (("full", 4), ("adapter", 0), ("adapter", 33)):
        with pytest.raises(ValueError, match="rank"):
            ExitHeads(llama.model, [2], kind, rank=rank)
    for words in ([], [3, 2], [-1, 2], [2, families.VOCAB]):
        with pytest.raises(ValueError, match="vocabulary"):
            ExitHeads(llama.model, [2], "adapter", torch.tensor(words))


@pytest.mark.parametrize("kwargs", [{}, {"lag": True}, {"chunk": 5}, {"turn": 2}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_blocks_read_what_a_forward_over_the_whole_text_gives(name, kwargs, adapter):
    """Over rejections: a block's own keys and values are those of the text that this call ran, and nothing else."""
    case = tower(name, 6)
    folder = adapter(case.model, "block", (1, 2, 4))
    config = bounded(name, max_depth=4, alpha=0, lag=kwargs.get("lag", False), adapter=folder)
    text, past, first = case.ids[:1], None, 0
    if "turn" in kwargs:
        before = case.stock(text, max_new_tokens=3, return_dict_in_generate=True)
        past, first = before.past_key_values, before.sequences.shape[1] - 1
        text = torch.cat([before.sequences, families.prompts((6,), seed=7)[0]], dim=1)
    options = {"attention_mask": torch.ones_like(text), "prefill_chunk_size": kwargs.get("chunk")}
    with questions() as asked:
        out = ours(case, config, input_ids=text, past_key_values=past, max_new_tokens=24, **options)
    assert 0 < out.speculation.num_accepted_tokens < out.speculation.num_draft_tokens
    assert len({question.layer for question in asked}) == 3
    heads, model = load_exit_heads(case.model, folder), copy.deepcopy(case.model)
    alone = {layer: of_one_layer(case.model, heads, layer) for layer in heads.layers}
    guesses = {}
    for text, pending, layer, _, logits in asked:
        with torch.no_grad():
            states = model.model(text, output_hidden_states=True).hidden_states
            # the head's true input before each token up to the pending one; for the drafts what they were guessed from
            before = torch.nn.functional.pad(states[-1][:, first:-1], (0, 0, 1, 0))
            for place in range(pending + 1, text.shape[1]):
                before[:, place - first] = guesses[tuple(text[0, :place].tolist())]
            own = heads.own[str(layer)]
            hidden = own.fuse(torch.cat([states[layer][:, first:], before], dim=-1))
            places = torch.arange(first, text.shape[1])[None]
            found = alone[layer](inputs_embeds=hidden, position_ids=places, output_hidden_states=True)
        guesses[tuple(text[0].tolist())] = found.hidden_states[-1][:, -1]
        torch.testing.assert_close(logits, found.logits[:, -1].float(), rtol=0, atol=1e-5)


def of_one_layer(model, heads, layer):
    """Return a stock model whose only layer and norm are those of a block."""
    alone = copy.deepcopy(model)
    config = alone.config
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[-1:]
    block = copy.deepcopy(heads.own[str(layer)].layer)
    place_layer(block, 0)
    alone.model.layers = torch.nn.ModuleList([block])
    alone.model.norm = copy.deepcopy(heads.own[str(layer)].norm)
    for module in alone.modules():
        if hasattr(module, "config"):
            module.config = config
    return alone


@pytest.mark.parametrize("words", [None, 6])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_block_heads_over_a_second_turn(name, words, adapter):
    """Their own keys and values begin with the turn; the model's are those of the whole text."""
    case = tower(name, 6)
    config = bounded(name, max_depth=4, alpha=0.0, adapter=adapter(case.model, "block", (2, 4), words))
    first = {"max_new_tokens": 11, "return_dict_in_generate": True, "do_sample": False}
    expected, out = case.stock(**case.one, **first), ours(case, config, **first)
    assert torch.equal(out.sequences, expected.sequences)
    for said in (families.prompts((5,), seed=7)[0], torch.zeros(1, 0, dtype=torch.int64)):
        text = torch.cat([expected.sequences, said], dim=1)
        kwargs = {**first, "attention_mask": torch.ones_like(text), "max_new_tokens": 20}
        expected = case.stock(text, past_key_values=expected.past_key_values, **kwargs)
        out = ours(case, config, input_ids=text, past_key_values=out.past_key_values, **kwargs)
        assert torch.equal(out.sequences, expected.sequences)
        assert out.speculation.num_draft_tokens
    same_as_token_by_token(case, out)


def test_block_heads_carry_no_hooks_of_the_layer_that_they_were_copied_from(llama, tmp_path):
    calls = []
    handle = llama.model.model.layers[-1].register_forward_hook(lambda *_: calls.append(1))
    try:
        ExitHeads(llama.model, [2, 3], "block").save(tmp_path, SpecBoundConfig(), llama.model)
        ours(llama, bounded(adapter=str(tmp_path)), max_new_tokens=2)
    finally:
        handle.remove()
    calls.clear()
    ours(llama, bounded(adapter=str(tmp_path)), max_new_tokens=6)
    assert not calls


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


@pytest.mark.parametrize(
    "settings, name",
    [
        ({"exit_layers": [2, LAYERS], "max_depth": LAYERS}, "exit_layers"),
        ({"exit_layers": [2, LAYERS + 1], "max_depth": LAYERS}, "exit_layers"),
        ({"exit_layers": [2, 4], "max_depth": 3}, "exit_layers"),
        ({"exit_layers": [2, 6]}, "exit_layers"),
        ({"exit_layers": []}, "exit_layers"),
        ({"exit_layers": [0, 2]}, "exit_layers"),
        ({"exit_layers": [-1]}, "exit_layers"),
        ({"exit_layers": [3, 2]}, "exit_layers"),
        ({"exit_layers": (2, 2)}, "exit_layers"),
        ({"max_depth": LAYERS + 1}, "max_depth"),
    ],
    ids=str,
)
def test_depths_that_do_not_fit_the_model(llama, settings, name):
    refused(llama.model, SpecBoundConfig(**settings), names=[name])


@pytest.mark.parametrize(
    "settings, error",
    [
        *(({"tau": value}, ValueError) for value in (0, 1, -0.1, 1.5, float("nan"))),
        *(({"alpha": value}, ValueError) for value in (-0.1, float("inf"), float("nan"))),
        *(({"max_depth": value}, ValueError) for value in (0, -1)),
        ({"num_assistant_tokens": 0}, ValueError),
        ({"exit_layers": "some"}, ValueError),
        ({"sampling_draft": "greedy"}, ValueError),
        *(({"tau": value}, TypeError) for value in ("0.5", None, True)),
        ({"alpha": "0"}, TypeError),
        *(({"max_depth": value}, TypeError) for value in (2.5, True, "4")),
        *(({"exit_layers": value}, TypeError) for value in (3, {2, 3}, True, 2.5)),
        *(({"exit_layers": value}, (TypeError, ValueError)) for value in ([2.5], ["2"], [None], [True], [[2]])),
        ({"adapter": 3}, TypeError),
        ({"lag": 1}, TypeError),
        ({"sampling_draft": None}, TypeError),
        ({"width": 3}, TypeError),
    ],
    ids=str,
)
def test_bad_settings(settings, error):
    with pytest.raises(error, match=next(iter(settings))):
        SpecBoundConfig(**settings)


def test_exits_that_no_head_was_trained_for(llama, adapter):
    folder = adapter(llama.model, "adapter", (4, 6))
    refused(llama.model, SpecBoundConfig(adapter=folder, exit_layers=[3, 4]), names=["exit_layers", "[4, 6]"])
    refused(llama.model, SpecBoundConfig(adapter=folder, max_depth=3), names=["max_depth", "[4, 6]"])
    out = ours(llama, bounded(adapter=folder), max_new_tokens=6)
    assert list(out.speculation.method["exits"]) == ["4"]  # of the trained ones, those up to the bound
    out = ours(llama, bounded(adapter=folder, max_depth=7, exit_layers="all"), max_new_tokens=6)
    assert list(out.speculation.method["exits"]) == ["4", "6"]


def test_models_that_have_no_single_stack_of_layers(llama):
    import transformers

    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    calls = []
    handle = model.encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match="encoder-decoder"):
        model.generate(torch.arange(3, 15)[None], assistant_strategy="specbound", max_new_tokens=3)
    handle.remove()
    assert not calls
    refused(llama.model, SpecBoundConfig(), names=["assistant_model"], assistant_model=llama.model)


def test_a_missing_folder_or_file(llama, tmp_path):
    refused(llama.model, SpecBoundConfig(adapter="no such folder"), error=FileNotFoundError, names=["no such folder"])
    refused(llama.model, SpecBoundConfig(adapter=str(tmp_path)), error=FileNotFoundError, names=[CONFIG_NAME])


def test_a_model_that_does_more_after_its_layers_is_refused(llama):
    """The check of a model's first call compares logits, so that nothing wrong is ever emitted."""
    model = copy.deepcopy(llama.model)

    def doubled(_, __, output):
        output.last_hidden_state = output.last_hidden_state.flip(-1)
        return output

    model.model.register_forward_hook(doubled)
    with pytest.raises(ValueError, match="LlamaForCausalLM can't be run by layers"):
        model.generate(**llama.one, assistant_strategy=bounded(), max_new_tokens=5, do_sample=False)


def test_without_heads_a_call_warns_and_runs(llama, adapter, monkeypatch):
    said = []
    monkeypatch.setattr("hf_specdec.generation.methods.specbound.method.logger.warning_once", said.append)
    out = ours(llama, "specbound", max_new_tokens=12)
    assert torch.equal(out.sequences, truth()[:, : llama.ids.shape[1] + 12])
    (message,) = said
    assert "adapter" in message and "specbound" in message
    ours(llama, bounded(adapter=adapter(llama.model, "adapter")), max_new_tokens=2)
    assert len(said) == 1


def test_nothing_is_said_of_padding_that_is_not_there(monkeypatch):
    """Taking a model apart feeds it no token of the caller's, and the caller hears nothing of it."""
    case, said = tower("gpt2", 6), []
    monkeypatch.setattr("transformers.modeling_utils.logger.warning_once", lambda text, *_: said.append(text))
    ours(case, bounded(max_depth=4), max_new_tokens=4, attention_mask=torch.ones_like(case.ids[:1]))
    assert not said


# settings


def test_default_settings():
    config = SpecBoundConfig()
    assert (config.num_assistant_tokens, config.tau, config.sampling_draft) == (6, 0.8, "sample")
    assert [config.depth_bound(layers) for layers in (1, 2, 6, 8, 24, 32)] == [1, 1, 3, 4, 12, 16]
    assert config.lossless
    for layers in (6, 12, 24, 32):
        found = config.exits(layers, None)
        assert found == sorted(set(found)) and 1 < len(found) <= 4
        assert max(2, layers // 8) == found[0] and found[-1] == layers // 2
        gaps = [b - a for a, b in itertools.pairwise(found)]
        assert max(gaps) - min(gaps) <= 1
        assert config.exits(layers, [1, 3, layers - 1]) == [1, 3]
        assert config.override(exit_layers="all").exits(layers, None) == list(range(1, layers // 2 + 1))


def test_the_width_follows_num_assistant_tokens_of_the_call(warm):
    text = truth()
    for kwargs in ({"num_assistant_tokens": 2}, {"generation_config": GenerationConfig(num_assistant_tokens=2)}):
        with rounds(warm.model) as seen, scripted(everywhere(2, text)):
            ours(warm, bounded(**ALL), max_new_tokens=10, **kwargs)
        assert [one.drafted for one in seen.rounds] == [2, 2, 2]


@pytest.mark.parametrize("layers", [[2, 4], (2, 4), "all", None], ids=repr)
def test_settings_survive_a_folder(layers, tmp_path, llama):
    config = SpecBoundConfig(
        num_assistant_tokens=3, alpha=0.2, tau=0.3, max_depth=5, exit_layers=layers, sampling_draft="match", lag=False
    )
    config.save_pretrained(tmp_path)
    back = SpeculationConfig.from_pretrained(tmp_path)
    assert type(back) is SpecBoundConfig
    assert back.exits(LAYERS, None) == config.exits(LAYERS, None)
    assert back.to_dict() == json.loads(json.dumps(config.to_dict()))
    assert back.override(exit_layers=None) == config.override(exit_layers=None)
    assert SpeculationConfig.from_dict(config.to_dict()) == config
    out = ours(llama, str(tmp_path), max_new_tokens=6)
    assert torch.equal(out.sequences, truth()[:, : llama.ids.shape[1] + 6])


# a test read one layer late


def test_lag_parks_a_row_one_layer_deeper(warm):
    text, base = truth(), warm.ids.shape[1]
    plan = {base: 2, base + 1: 4, base + 2: 5, base + 3: 1}
    results = []
    for lag in (False, True):
        with rounds(warm.model) as seen, scripted(exits(plan, text)) as asked:
            out = ours(warm, bounded(**ALL, lag=lag), max_new_tokens=12)
        one = seen.rounds[0]
        check_round(one, BOUND)
        results.append((one.drafted, one.accepted, one.stop, asked, out.speculation.method["exits"]))
        # at the bound there is no layer to launch meanwhile
        assert one.parked == ([3, 5, 5, 2] if lag else [2, 4, 5, 1])
        assert torch.equal(out.sequences, text[:, : base + 12])
        same_as_token_by_token(warm, out)
    assert results[0] == results[1]


# afterwards


class Fails:
    def __init__(self, at):
        self.left = at

    def __call__(self, *_, **__):
        self.left -= 1
        if self.left < 0:
            raise KeyError("raised on purpose")


class FailingProcessor(LogitsProcessor):
    def __init__(self, at):
        self.fails = Fails(at)

    def __call__(self, input_ids, scores):
        self.fails()
        return scores


def shape_of(model):
    """Return what must be the same objects afterwards, and the numbers of hooks."""
    return [
        (name, id(module), type(module), sorted(vars(module)), len(module._forward_hooks),
         len(module._forward_pre_hooks), module.training, id(module.forward.__func__))
        for name, module in model.named_modules()
    ], model.config._attn_implementation, model.config.to_dict()  # fmt: skip


@pytest.mark.parametrize("kind", ["final", "block"])
@pytest.mark.parametrize("where", ["layer 2", "layer 4", "layer 8", "head", "processor", "norm"])
@pytest.mark.parametrize("at", [1, 17])
def test_an_exception_leaves_the_model_as_it_was(llama, kind, where, at, adapter, monkeypatch):
    model, fails, handle, kwargs = llama.model, Fails(at), None, {}
    config = bounded(**({"adapter": adapter(model, "block"), "alpha": 0} if kind == "block" else {}))
    ours(llama, config, max_new_tokens=2)
    before = shape_of(model)
    if where.startswith("layer"):
        handle = model.model.layers[int(where[-1]) - 1].register_forward_hook(fails)
    elif where == "norm":
        handle = model.model.norm.register_forward_hook(fails)
    elif where == "head":
        logits = ExitReader.logits
        monkeypatch.setattr(ExitReader, "logits", lambda *args: (fails(), logits(*args))[1])
    else:
        kwargs["logits_processor"] = [FailingProcessor(at)]
    try:
        with pytest.raises(KeyError, match="on purpose"):
            ours(llama, config, max_new_tokens=50, **kwargs)
    finally:
        if handle is not None:
            handle.remove()
    monkeypatch.undo()
    assert shape_of(model) == before
    expected = truth()[:, : llama.ids.shape[1] + 8]
    assert torch.equal(llama.stock(**llama.one, max_new_tokens=8), expected)
    assert torch.equal(ours(llama, config, max_new_tokens=8).sequences, expected)


def test_the_pieces_of_a_model_share_its_modules(llama):
    """A recording, the norm and the tail change nothing in the model and hold no copies of its weights."""
    before = shape_of(llama.model)
    parts = Layerwise(llama.model)
    assert parts.layers is llama.model.model.layers
    assert list(parts.norm) == [llama.model.model.norm]
    hidden, logits = hidden_after("llama", LAYERS)
    calls = []
    handles = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in parts.layers]
    with torch.no_grad():
        torch.testing.assert_close(parts.tail()(parts.norm(hidden)), logits)
    for handle in handles:
        handle.remove()
    assert not calls
    assert shape_of(llama.model) == before


@pytest.mark.parametrize("kind", ["adapter", "block"])
def test_copies_of_a_model_and_its_end(llama, kind, tmp_path):
    model = copy.deepcopy(llama.model)
    random_heads(model, [2, 3], kind, torch.arange(2, 60)).save(tmp_path, SpecBoundConfig(), model)
    config = bounded(adapter=str(tmp_path), alpha=0)
    kwargs = {**llama.one, "max_new_tokens": 15, "do_sample": False}
    model.generate(**kwargs, assistant_strategy=config)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other.lm_head.weight.copy_(other.lm_head.weight.flip(0))
        expected = other.generate(**kwargs)
        assert torch.equal(other.generate(**kwargs, assistant_strategy=config), expected)
        assert not torch.equal(expected, truth()[:, : expected.shape[1]])
    # what is kept per model does not keep the model
    gone = weakref.ref(model)
    del model, other
    gc.collect()
    assert gone() is None


def test_two_threads_with_two_models(adapter):
    cases = [tower("llama", 6), tower("gemma3", 6)]
    configs = [
        bounded(case.name, max_depth=4, alpha=0, adapter=adapter(case.model, kind, (2, 3, 4)))
        for case, kind in zip(cases, ("adapter", "block"), strict=True)
    ]
    results, barrier = [None, None], threading.Barrier(2)

    def run(index):
        barrier.wait()
        for _ in range(3):
            results[index] = ours(cases[index], configs[index], max_new_tokens=20).sequences

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for case, found in zip(cases, results, strict=True):
        assert torch.equal(found, stock_text(case.name, 1, 50)[:, : case.ids.shape[1] + 20])
