"""Every attention kernel against `kernels.reference`, and the switch that makes a model use them."""

from __future__ import annotations

import pytest
import torch
from families import tiny_llama
from looping import over
from transformers import LlamaForCausalLM

from hf_specdec.cache.speculative import SpeculativeCache
from hf_specdec.generation.runner import ModelRunner
from hf_specdec.integration import decoding_loop
from hf_specdec.kernels import choice, dispatch, explicit, packed, reference
from hf_specdec.kernels.address import Address, once
from hf_specdec.kernels.request import AttentionRules, ScoreRequest
from hf_specdec.kernels.step import Step
from hf_specdec.kernels.twin import twin_of


CPU = torch.device("cpu")
KERNELS = {"explicit": explicit.cached_attention, "packed": packed.cached_attention}
TIGHT = {torch.float64: 1e-12, torch.float32: 2e-5}
LARGE = 1e4  # finite, as stale storage is, and ruinous if it is read


def inputs(starts, m, *, groups=2, key_heads=2, capacity=None, d=8, d_v=8, dtype=torch.float64, spread=2.0, seed=0):
    """Queries at `starts`, and storage whose unused slots hold large stale values."""
    generator = torch.Generator().manual_seed(seed)
    n, capacity = len(starts), capacity or max(starts) + m
    query = spread * torch.randn(n, groups * key_heads, m, d, generator=generator, dtype=torch.float64)
    key = torch.randn(n, key_heads, capacity, d, generator=generator, dtype=torch.float64)
    value = torch.randn(n, key_heads, capacity, d_v, generator=generator, dtype=torch.float64)
    for row, start in enumerate(starts):
        key[row, :, start + m :] = LARGE
        value[row, :, start + m :] = -LARGE
    return query.to(dtype), key.to(dtype), value.to(dtype)


def expected(query, key, value, starts, **rules):
    return reference.attention(query, key, value, torch.tensor(starts), **rules)


@pytest.mark.parametrize("kernel", KERNELS)
@over("dtype", [torch.float64, torch.float32])
@over("starts", [[0], [1], [12], [37, 37], [5, 31, 18], [0, 40, 3]])
@over("m", [1, 2, 7, 16, 17])
@over("groups, key_heads", [(1, 3), (2, 2), (3, 3), (8, 1)])
def test_full_attention(kernel, dtype, starts, m, groups, key_heads):
    query, key, value = inputs(
        starts, m, groups=groups, key_heads=key_heads, capacity=max(starts) + m + 3, dtype=dtype
    )
    output, metric = KERNELS[kernel](query, key, value, Address(starts, m), AttentionRules(0.3))
    assert metric is None and output.dtype == dtype
    torch.testing.assert_close(output, expected(query, key, value, starts, scaling=0.3), atol=TIGHT[dtype], rtol=0)


@pytest.mark.parametrize("kernel", KERNELS)
@over("window", [1, 2, 5, 16, 100])
@over("starts", [[0], [23], [0, 9, 30], [29, 30]])
@over("m", [1, 3, 9])
def test_sliding_window(kernel, window, starts, m):
    query, key, value = inputs(starts, m)
    output, _ = KERNELS[kernel](query, key, value, Address(starts, m), AttentionRules(0.4, window=window))
    wanted = expected(query, key, value, starts, scaling=0.4, window=window)
    torch.testing.assert_close(output, wanted, atol=1e-12, rtol=0)


@over("starts", [[11], [3, 19]])
@over("m", [1, 4, 17])
@over("window", [None, 6])
@over("softcap, sinks", [(2.0, False), (None, True), (2.0, True)])
@over("groups", [1, 3])
def test_softcap_and_sinks(starts, m, window, softcap, sinks, groups):
    query, key, value = inputs(starts, m, groups=groups)
    rules = {"scaling": 0.5, "window": window, "softcap": softcap}
    rules["sinks"] = torch.linspace(-1, 2, 2 * groups, dtype=torch.float64) if sinks else None
    output, _ = explicit.cached_attention(query, key, value, Address(starts, m), AttentionRules(**rules))
    torch.testing.assert_close(output, expected(query, key, value, starts, **rules), atol=1e-12, rtol=0)


@over("rules", [{"softcap": 2.0}, {"sinks": torch.zeros(4)}])
def test_packed_refuses_what_it_cannot_do(rules):
    query, key, value = inputs([3], 1)
    with pytest.raises(ValueError, match="soft-cap"):
        packed.cached_attention(query, key, value, Address([3], 1), AttentionRules(1.0, **rules))


@pytest.mark.parametrize("kernel", KERNELS)
@over("capacity", [20, 21, 33, 34, 400])
@over("starts", [[17], [2, 17]])
def test_capacity_does_not_matter(kernel, capacity, starts):
    """Storage much larger than the text, about as large, and either side of the share from which all of it is read."""
    query, key, value = inputs(starts, 3, capacity=capacity)
    output, metric = KERNELS[kernel](query, key, value, Address(starts, 3), AttentionRules(0.3, score=ScoreRequest()))
    used = key[:, :, :20], value[:, :, :20]
    torch.testing.assert_close(output, expected(query, *used, starts, scaling=0.3), atol=1e-12, rtol=0)
    weights, raw = reference.attention_weights(query, used[0], torch.tensor(starts), scaling=0.3)
    wanted = reference.token_scores(weights, raw, torch.full((len(starts),), 2), queries="first_last", metric="weight")
    torch.testing.assert_close(metric[:, :20], wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_key_and_value_sizes_may_differ(kernel):
    query, key, value = inputs([4, 11], 3, d=6, d_v=10)
    output, _ = KERNELS[kernel](query, key, value, Address([4, 11], 3), AttentionRules(0.3))
    assert output.shape == (2, 4, 3, 10)
    torch.testing.assert_close(output, expected(query, key, value, [4, 11], scaling=0.3), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_do_not_disturb_each_other(kernel):
    """What stands in one row's storage, NaN included, never reaches another row."""
    starts = [9, 14, 6]
    query, key, value = inputs(starts, 2)
    clean, _ = KERNELS[kernel](query, key, value, Address(starts, 2), AttentionRules(0.3))
    key[1], value[1] = torch.nan, torch.nan
    poisoned, _ = KERNELS[kernel](query, key, value, Address(starts, 2), AttentionRules(0.3))
    torch.testing.assert_close(poisoned[[0, 2]], clean[[0, 2]], atol=0, rtol=0)
    assert poisoned[1].isnan().all()


@pytest.mark.parametrize("kernel", KERNELS)
@over("m", [1, 6])
def test_bfloat16_error(kernel, m):
    """No worse than a small multiple of what stock's fused attention loses in bf16 on the same numbers."""
    starts = [200, 200]
    query, key, value = inputs(starts, m, groups=3, key_heads=3, d=64, d_v=64, spread=1.0, dtype=torch.bfloat16)
    wanted = expected(query.double(), key.double(), value.double(), starts, scaling=0.125)
    output, _ = KERNELS[kernel](query, key, value, Address(starts, m), AttentionRules(0.125))
    mask = torch.arange(200 + m) <= (200 + torch.arange(m))[:, None]
    stock = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(3, 1), value.repeat_interleave(3, 1), attn_mask=mask, scale=0.125
    )
    ours, theirs = ((result.double() - wanted).square().mean().sqrt() for result in (output, stock))
    assert output.dtype == torch.bfloat16
    assert ours < 3 * theirs + 1e-6


@pytest.mark.parametrize("kernel", KERNELS)
@over("queries", ["first_last", "last", "all"])
@over("metric", ["weight", "logit"])
@over("per_head", [False, True])
@over("starts, last", [([20], [4]), ([20], [2]), ([20], [0]), ([3, 20, 11], [4, 0, 2])])
@over("groups, key_heads", [(1, 2), (2, 3), (4, 1)])
def test_token_scores(kernel, queries, metric, per_head, starts, last, groups, key_heads):
    """Table rows 3, 5 and 16: the mean over query heads and chosen rows, in float64."""
    query, key, value = inputs(starts, 5, groups=groups, key_heads=key_heads, capacity=max(starts) + 6)
    address = Address(starts, 5, last)
    rules = AttentionRules(0.3, score=ScoreRequest(queries, metric, per_head))
    _, scores = KERNELS[kernel](query, key, value, address, rules)
    weights, raw = reference.attention_weights(query, key, torch.tensor(starts), scaling=0.3)
    wanted = reference.token_scores(
        weights, raw, torch.tensor(last), queries=queries, metric=metric, key_heads=key_heads if per_head else None
    )
    assert scores.shape[:-1] == wanted.shape[:-1]
    for row, start in enumerate(starts):
        torch.testing.assert_close(scores[row, ..., : start + 1], wanted[row, ..., : start + 1], atol=1e-10, rtol=0)


@over("softcap", [None, 3.0])
@over("with_sinks", [False, True])
@over("metric", ["weight", "logit"])
def test_token_scores_with_softcap_and_sinks(softcap, with_sinks, metric):
    starts, last = [4, 13], [3, 1]
    query, key, value = inputs(starts, 4, groups=2)
    rules = {"scaling": 0.5, "softcap": softcap, "sinks": torch.arange(4).double() if with_sinks else None}
    address = Address(starts, 4, last)
    asked = AttentionRules(**rules, score=ScoreRequest(metric=metric))
    _, scores = explicit.cached_attention(query, key, value, address, asked)
    weights, raw = reference.attention_weights(query, key, torch.tensor(starts), **rules)
    wanted = reference.token_scores(weights, raw, torch.tensor(last), queries="first_last", metric=metric)
    for row, start in enumerate(starts):
        torch.testing.assert_close(scores[row, : start + 1], wanted[row, : start + 1], atol=1e-10, rtol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_token_scores_in_low_precision_are_float32(kernel):
    query, key, value = inputs([50], 4, d=32, dtype=torch.bfloat16, spread=1.0)
    _, scores = KERNELS[kernel](query, key, value, Address([50], 4), AttentionRules(0.2, score=ScoreRequest("all")))
    assert scores.dtype == torch.float32
    weights, raw = reference.attention_weights(query, key, torch.tensor([50]), scaling=0.2)
    wanted = reference.token_scores(weights, raw, torch.tensor([3]), queries="all", metric="weight")
    assert (scores[0, :51] - wanted[0, :51]).abs().max() < 0.02 * wanted.max()


@pytest.mark.parametrize("kernel", KERNELS)
@over("starts", [[13], [2, 13]])
def test_row_15_weights_sum_to_one_over_what_a_query_sees(kernel, starts):
    """Per head and row; seen through values that are 1 on visible slots, and through the scores of one query."""
    query, key, value = inputs(starts, 3)
    value[:] = 7e5
    for row, start in enumerate(starts):
        value[row, :, : start + 3] = 1
    output, _ = KERNELS[kernel](query, key, value, Address(starts, 3), AttentionRules(0.6))
    torch.testing.assert_close(output, torch.ones_like(output), atol=1e-12, rtol=0)
    for queries, total in (("last", 1.0), ("first_last", 1.0), ("all", 1.0)):
        rule = ScoreRequest(queries, per_head=True)
        _, scores = KERNELS[kernel](query, key, value, Address(starts, 3), AttentionRules(0.6, score=rule))
        torch.testing.assert_close(scores.sum(-1), torch.full_like(scores[..., 0], total), atol=1e-12, rtol=0)


def test_reference_equals_a_loop_over_single_queries():
    """The specification itself, against the formula written out for one query at a time."""
    starts, m, window, cap = [2, 7], 3, 4, 1.5
    query, key, value = inputs(starts, m, groups=2, key_heads=2)
    sinks = torch.tensor([0.1, -0.5, 1.0, 0.3], dtype=torch.float64)
    output = reference.attention(
        query, key, value, torch.tensor(starts), scaling=0.7, window=window, softcap=cap, sinks=sinks
    )
    for row, start in enumerate(starts):
        for head in range(4):
            for i in range(m):
                position = start + i
                seen = range(max(0, position - window + 1), position + 1)
                scores = [cap * torch.tanh(0.7 * query[row, head, i] @ key[row, head // 2, t] / cap) for t in seen]
                weights = torch.softmax(torch.stack([*scores, sinks[head]]), 0)[:-1]
                wanted = sum(w * value[row, head // 2, t] for w, t in zip(weights, seen, strict=True))
                torch.testing.assert_close(output[row, head, i], wanted)


@pytest.mark.parametrize("kernel", KERNELS)
@over("size", [1, 4, 5, 100])
@over("window", [None, 6])
def test_in_pieces(kernel, size, window):
    starts = [3, 21]
    query, key, value = inputs(starts, 13)
    pieces = packed.in_pieces(KERNELS[kernel], size)
    output, metric = pieces(query, key, value, Address(starts, 13), AttentionRules(0.3, window=window))
    wanted = expected(query, key, value, starts, scaling=0.3, window=window)
    assert metric is None
    torch.testing.assert_close(output, wanted, atol=1e-12, rtol=0)


def test_in_pieces_takes_no_scores():
    query, key, value = inputs([3], 4)
    with pytest.raises(ValueError, match="scores"):
        packed.in_pieces(explicit.cached_attention, 2)(
            query, key, value, Address([3], 4), AttentionRules(1.0, score=ScoreRequest("last"))
        )


@over("dtype", [torch.float64, torch.float32])
@over("groups, key_heads", [(1, 2), (2, 2), (3, 3), (8, 1)])
@over("softcap, sinks", [(None, False), (2.0, False), (None, True), (2.0, True)])
@over("masked", [False, True])
def test_side_attention(dtype, groups, key_heads, softcap, sinks, masked):
    n, width = 3, 11
    query, key, value = inputs([width - 1] * n, 1, groups=groups, key_heads=key_heads, dtype=dtype)
    rules = {"scaling": 0.4, "softcap": softcap}
    rules["sinks"] = torch.linspace(-1, 1, groups * key_heads, dtype=dtype) if sinks else None
    read = torch.ones(n, width, dtype=torch.bool)
    bias = None
    if masked:
        read[0, 3:6], read[1, 0] = False, False
        bias = torch.zeros(n, 1, 1, width, dtype=dtype).masked_fill_(~read[:, None, None], -torch.inf)
        key = torch.where(read[:, None, :, None], key, LARGE)
    output = explicit.side_attention(query, key, value, bias, AttentionRules(**rules))
    for row in range(n):
        chosen = (states[row : row + 1, :, read[row]] for states in (key, value))
        wanted = expected(query[row : row + 1], *chosen, [int(read[row].sum()) - 1], **rules)
        torch.testing.assert_close(output[row : row + 1], wanted, atol=TIGHT[dtype], rtol=0)


def test_row_13_side_columns_may_stand_in_any_order():
    query, key, value = inputs([16], 1)
    order = torch.randperm(17)
    rules = AttentionRules(0.4)
    one = explicit.side_attention(query, key, value, None, rules)
    other = explicit.side_attention(query, key[:, :, order], value[:, :, order], None, rules)
    torch.testing.assert_close(one, other, atol=1e-13, rtol=0)


# the address


def test_address():
    address = Address([3, 8], 4)
    assert (address.low, address.high, address.uniform, address.rows) == (3, 12, False, 2)
    assert address.positions_on(CPU).tolist() == [[3, 4, 5, 6], [8, 9, 10, 11]]
    assert address.ends_on(CPU).tolist() == [7, 12]
    assert address.last == (3, 3)
    assert Address([5, 5], 2).uniform


@over("window", [None, 1, 3])
@over("starts", [[4], [4, 4], [0, 6]])
def test_hidden_positions(window, starts):
    hidden = Address(starts, 3).hidden(2, 9, window, CPU).expand(len(starts), -1, -1)
    for row, start in enumerate(starts):
        for i in range(3):
            for index, read in enumerate(range(2, 9)):
                position = start + i
                visible = read <= position and (window is None or read > position - window)
                assert bool(hidden[row, i, index]) is not visible


def test_what_is_computed_once():
    """Kept per object, method and arguments, `None` included, until the object forgets."""

    class Counter:
        def __init__(self):
            self.made, self.calls = {}, []

        @once
        def of(self, number):
            self.calls.append(number)
            return None if number else self.calls

        @once
        def other(self, number):
            return number + 1

    one, two = Counter(), Counter()
    for _ in range(3):
        assert one.of(0) is one.calls and one.of(1) is None and one.other(1) == 2
    assert (one.calls, two.calls) == ([0, 1], [])
    one.made.clear()
    one.of(1)
    assert one.calls == [0, 1, 1]
    address = Address([4, 2], 3)
    assert address.starts_on(CPU) is address.starts_on(CPU)
    assert address.hidden(0, 7, None, CPU) is address.hidden(0, 7, None, CPU)
    assert address.hidden(0, 7, 3, CPU) is not address.hidden(0, 7, None, CPU)


# the switch


def llama(attention: str = "sdpa") -> LlamaForCausalLM:
    return tiny_llama(max_position_embeddings=64, attn_implementation=attention)


@pytest.fixture(autouse=True)
def registered():
    decoding_loop("plain")  # registers the attention and mask functions, as a first call does


def forward(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_twin_attends_by_our_kernels(attention, monkeypatch):
    model, ids = llama(attention), torch.arange(9)[None]
    wanted = forward(model, ids)
    calls = []
    original = explicit.cached_attention
    monkeypatch.setattr(explicit, "cached_attention", lambda *arguments: calls.append(1) or original(*arguments))
    with torch.no_grad():
        logits = ModelRunner(model, SpeculativeCache([None, None], 1, 16), 64).forward(ids, [0]).logits
    assert len(calls) == 2
    # stock's eager attention takes its softmax in float32
    torch.testing.assert_close(logits, wanted, atol=1e-12 if attention == "sdpa" else 1e-6, rtol=0)


def test_our_attention_needs_a_step():
    with pytest.raises(RuntimeError, match="LlamaAttention was not given the forward's keyword `specdec_step`"):
        forward(twin_of(llama()), torch.arange(5)[None])


def attend(**kwargs):
    module = llama().model.layers[0].self_attn
    query, key, value = inputs([3], 1, groups=2, key_heads=2)
    mask = kwargs.pop("mask", None)
    return dispatch.attention_function(module, query, key, value, mask, specdec_step=Step(Address([3], 1)), **kwargs)


def test_an_unknown_tensor_keyword_is_refused():
    with pytest.raises(ValueError, match="alibi"):
        attend(alibi=torch.zeros(1))
    attend(position_ids=torch.zeros(1), other=3)


def test_an_unknown_mask_is_refused():
    with pytest.raises(ValueError, match="mask"):
        attend(mask=torch.zeros(1, 1, 1, 4))
    with pytest.raises(ValueError, match="causal"):
        attend(mask=dispatch.mask_function(use_vmap=True))


def test_a_module_without_a_layer_index_is_refused():
    query, key, value = inputs([3], 1)
    with pytest.raises(ValueError, match="layer_idx"):
        dispatch.attention_function(torch.nn.Linear(1, 1), query, key, value, None, specdec_step=Step(Address([3], 1)))


@over(
    "m, rules, name",
    [
        (1, {}, "explicit"),
        (16, {}, "explicit"),
        (17, {}, "sdpa"),
        (16, {"softcap": True}, "explicit"),
        (17, {"softcap": True}, "explicit"),
        (17, {"sinks": True}, "explicit"),
    ],
)
def test_which_kernel_is_chosen(m, rules, name):
    assert choice.choose("auto", choice.Request("cpu", torch.float32, 64, 64, m, **rules)) == name
