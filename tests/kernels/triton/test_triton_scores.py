"""The scores that the Triton kernels export, the token scores made of them, and the gather."""

from __future__ import annotations

import pytest
import torch
from looping import over
from triton_cases import DEVICE, SINKS, assert_no_worse, each_dtype, exact, inputs, plain, split_into, storages, vector

from hf_specdec.kernels import reference
from hf_specdec.kernels import triton_attention as attention
from hf_specdec.kernels import triton_select as select


pytestmark = [pytest.mark.full, pytest.mark.native]


# the scores


def visible(starts, last, width, window=None):
    """Return which slots each row's two scored queries may read, `[n, 1, 2, width]`."""
    positions = vector([[start, start + index] for start, index in zip(starts, last, strict=True)])[:, None, :, None]
    slots = torch.arange(width, device=DEVICE)
    seen = slots <= positions
    return seen if window is None else seen & (slots > positions - window)


def chosen(tensor, last):
    """Return the first and the last real query of `[n, h, m, S]`."""
    return torch.stack([torch.stack([row[:, 0], row[:, index]], 1) for row, index in zip(tensor, last, strict=True)])


@each_dtype
@over("splits", [1, 3])
@over("rules", [{}, {"window": 7}, {"softcap": 2.0, "sinks": SINKS}])
def test_scores(dtype, splits, rules, monkeypatch):
    split_into(monkeypatch, splits)
    starts, last, m = [3, 80, 41], [2, 0, 1], 3
    query, key, value = inputs(starts, m, dtype, window=rules.get("window"))
    rules = {"scaling": 0.2} | rules
    output, scores = attention.attend_cache(query, key, value, vector(starts), longest=90, last=vector(last), **rules)
    wanted = exact(query, key, value, starts, **rules)
    assert_no_worse(output, plain(query, key, value, starts, **rules)[0], wanted, dtype)
    narrow = torch.float32 if dtype == torch.float32 else torch.float16
    assert (
        scores.products.dtype == narrow and scores.products.shape[:3] == (3, 4, 2) and scores.products.shape[3] >= 90
    )

    key = key.double().nan_to_num().repeat_interleave(2, 1)
    products = chosen(query.double() @ key.transpose(-1, -2) * 0.2, last)
    width = key.shape[2]
    seen = visible(starts, last, width, rules.get("window")).expand_as(products)
    rounded = (chosen(query.float(), last) @ key.float().transpose(-1, -2) * 0.2).to(narrow)
    assert_no_worse(scores.products[..., :width][seen], rounded[seen], products[seen], torch.float32)

    logits = products if "softcap" not in rules else 2 * torch.tanh(products / 2)
    logs = logits.masked_fill(~seen, -torch.inf).logsumexp(-1)
    if "sinks" in rules:
        logs = torch.logaddexp(logs, SINKS.double()[:, None])
    torch.testing.assert_close(scores.logs.double(), logs, atol=3e-6, rtol=1e-6)


def test_products_of_16_bits_are_clamped():
    query, key, value = inputs([20], 1, torch.float16)
    _, scores = attention.attend_cache(query, key, value, vector([20]), longest=21, scaling=1e5, last=vector([0]))
    seen = scores.products[..., :21]
    assert seen.isfinite().all() and seen.max() == 64992 and seen.min() == -64992  # the nearest to 65000


def test_scores_of_more_rows_than_one_tile_holds():
    query, key, value = inputs([30], 17, torch.float32, groups=8, key_heads=1, d=16)
    _, scores = attention.attend_cache(query, key, value, vector([30]), longest=47, scaling=0.2, last=vector([15]))
    products = chosen(query @ key.nan_to_num().transpose(-1, -2) * 0.2, [15])
    seen = visible([30], [15], 50).expand_as(products)[..., :48]
    torch.testing.assert_close(scores.products[seen], products[..., :48][seen], atol=1e-5, rtol=0)


# token scores


@over("queries", ["first_last", "last"])
@over("metric", ["weight", "logit"])
@over("per_head", [False, True])
@over("rules", [{}, {"window": 9}, {"softcap": 2.0, "sinks": SINKS.repeat(5)[:18]}])
def test_token_scores(queries, metric, per_head, rules):
    """From scores made in float64, NaN where a query may not read."""
    starts, last, length, key_heads = [3, 140], [4, 2], 146, 2
    query, key, _ = inputs(starts, 5, torch.float32, groups=9, key_heads=key_heads, capacity=150)
    query, key = query.double(), key.double().nan_to_num()
    rules = {"scaling": 0.2} | rules
    sinks = rules.pop("sinks", None)
    sinks = None if sinks is None else sinks.double()
    weights, raw = reference.attention_weights(query, key, vector(starts), sinks=sinks, **rules)
    kept = per_head and key_heads or None
    wanted = reference.token_scores(weights, raw, vector(last), queries=queries, metric=metric, key_heads=kept)

    seen = visible(starts, last, 150, rules.get("window")).expand(2, 18, 2, 150)
    products = chosen(raw * 0.2, last)
    logits = products if "softcap" not in rules else 2 * torch.tanh(products / 2)
    logs = logits.masked_fill(~seen, -torch.inf).logsumexp(-1)
    if sinks is not None:
        logs = torch.logaddexp(logs, sinks[:, None])
    scores = select.Scores(products.masked_fill(~seen, torch.nan).float(), logs.float())
    found = select.token_scores(
        scores, vector(starts), vector(last), length=length, queries=queries, metric=metric, key_heads=kept, **rules
    )
    wanted = wanted[..., :length]
    assert found.dtype == torch.float32 and found.shape == wanted.shape and found.isfinite().all()
    if metric == "logit":  # means something where both queries read
        both = seen[:, :1, :, :length].all(2).expand(2, 2, length) if kept else seen[:, 0, :, :length].all(1)
        found, wanted = found[both], wanted[both]
    torch.testing.assert_close(found.double(), wanted, atol=2e-6 if metric == "logit" else 2e-7, rtol=1e-5)


@over("cap", [0.5, 4.0])
def test_softcap_is_exact_near_zero_and_far_from_it(cap):
    products = (
        torch.cat([torch.linspace(-1.5, 1.5, 101), torch.tensor([-1e4, -20.0, 9.0, 1e4, 3e38])]).to(DEVICE) * cap
    )
    products = products.clamp(-3e38, 3e38)
    scores = select.Scores(products.expand(1, 1, 2, -1).contiguous(), torch.zeros(1, 1, 2, device=DEVICE))
    rules = {"length": len(products), "scaling": 1.0, "softcap": cap}
    found = select.token_scores(scores, vector([len(products)]), vector([0]), **rules)
    wanted = cap * torch.tanh(products.double() / cap)
    torch.testing.assert_close(found[0].double().log(), wanted, atol=3e-7 * max(cap, 1), rtol=0)


@each_dtype
@over("queries", ["first_last", "last"])
def test_token_scores_of_the_attention_kernel(dtype, queries):
    starts, last = [30, 120], [2, 0]
    query, key, value = inputs(starts, 3, dtype, groups=4, d=64)
    rules = {"scaling": 0.125}
    _, scores = attention.attend_cache(query, key, value, vector(starts), longest=123, last=vector(last), **rules)
    found = select.token_scores(scores, vector(starts), vector(last), length=123, queries=queries, **rules)
    weights, raw = reference.attention_weights(query.double(), key.double().nan_to_num(), vector(starts), **rules)
    wanted = reference.token_scores(weights, raw, vector(last), queries=queries, metric="weight")[:, :123]
    _, theirs = plain(query, key, value, starts, **rules)
    theirs = reference.token_scores(theirs.float(), raw, vector(last), queries=queries, metric="weight")[:, :123]
    assert_no_worse(found, theirs, wanted, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@over(
    "sizes, inside, per_head",
    [
        ([64, 64], False, False),
        ([80, 32, 16, 256], True, False),
        ([80, 32, 16, 256], False, True),
        ([5, 3], True, True),
    ],
)
def test_gather(dtype, sizes, inside, per_head):
    sources, targets = storages(dtype, sizes, inside=inside), storages(dtype, sizes, rows=4, tokens=21, seed=1)
    before = [target.clone() for target in targets]
    shape = (len(sizes) // 2, 2, 2, 17) if per_head else (len(sizes) // 2, 2, 17)
    index = torch.randint(40, shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    select.gather_layers(sources, targets, index, heads=2)
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        slots = index[i // 2] if per_head else index[i // 2][:, None].expand(-1, 2, -1)
        wanted = source[:2].gather(2, slots[..., None].expand(-1, -1, -1, source.shape[3]))
        assert torch.equal(target[:2, :, :17], wanted)
        assert torch.equal(target[:, :, 17:], before[i][:, :, 17:]) and torch.equal(target[2:], before[i][2:])


def test_gather_with_a_table_made_before():
    sources, targets = storages(torch.float16, [32, 32]), storages(torch.float16, [32, 32], tokens=9)
    table = select.addresses(sources, targets)
    index = torch.arange(9, device=DEVICE).expand(1, 3, 9)
    for offset in (0, 20):
        views = [source[:3] for source in sources]
        select.gather_layers(views, targets, index + offset, heads=2, table=table)
        assert torch.equal(targets[1], sources[1][:, :, offset : offset + 9])
    sources[0] = sources[0].clone()
    with pytest.raises(ValueError, match="`table` belongs to other tensors"):
        select.gather_layers(sources, targets, index, heads=2, table=table)


def test_gather_of_slots_outside_the_storage_gives_zeros():
    sources, targets = storages(torch.float32, [16, 16]), storages(torch.float32, [16, 16], tokens=3)
    select.gather_layers(sources, targets, vector([[[-1, 0, 40]] * 3]), heads=2)
    assert not targets[0][:, :, [0, 2]].any() and torch.equal(targets[0][:, :, 1], sources[0][:, :, 0])
