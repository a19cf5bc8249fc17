"""The Triton kernels against `kernels.reference`: in Triton's interpreter on CPU, natively where there is a GPU.

Run as a program, the file compiles them for two GPU generations instead, which needs no GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch


CUDA = torch.cuda.is_available()
if not CUDA and __name__ != "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

triton = pytest.importorskip("triton")

from hf_specdec.kernels import reference  # noqa: E402
from hf_specdec.kernels import triton_attention as attention  # noqa: E402
from hf_specdec.kernels import triton_select as select  # noqa: E402


DEVICE = torch.device("cuda" if CUDA else "cpu")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]
# the interpreter multiplies bfloat16 wrongly
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=gpu)]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
TINY = {torch.float32: 2e-7, torch.float16: 2e-5, torch.bfloat16: 2e-4}


@pytest.fixture(autouse=True)
def kernels_run():
    """Fail with the reason where neither a GPU nor the interpreter can run the kernels."""
    late = isinstance(triton.language.cdiv, triton.runtime.JITFunction)
    if not CUDA and (late or not attention.INTERPRETED):
        pytest.fail("triton was imported before TRITON_INTERPRET=1 was set; conftest.py must set it", pytrace=False)


def inputs(starts, m, dtype, *, groups=2, key_heads=2, capacity=None, d=32, d_v=None, window=None, seed=0):
    """Queries at `starts`, and storage that holds NaN wherever no query reads."""
    generator = torch.Generator().manual_seed(seed)
    n, capacity = len(starts), capacity or max(starts) + m + 3
    query = 2 * torch.randn(n, groups * key_heads, m, d, generator=generator)
    key = torch.randn(n, key_heads, capacity, d, generator=generator)
    value = torch.randn(n, key_heads, capacity, d_v or d, generator=generator)
    for row, start in enumerate(starts):
        for storage in (key, value):
            storage[row, :, start + m :] = torch.nan
            if window is not None:
                storage[row, :, : max(0, start + 1 - window)] = torch.nan
    return tuple(tensor.to(DEVICE, dtype) for tensor in (query, key, value))


def vector(numbers):
    return torch.tensor(numbers, device=DEVICE)


def exact(query, key, value, starts, **rules):
    """Return the reference's output in float64."""
    if rules.get("sinks") is not None:
        rules["sinks"] = rules["sinks"].double()
    clean = (tensor.double().nan_to_num() for tensor in (query, key, value))
    return reference.attention(*clean, vector(starts), **rules)


def plain(query, key, value, starts, *, scaling, window=None, softcap=None, sinks=None):
    """Return attention and its weights in the inputs' dtype, one PyTorch operation after the other."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.nan_to_num().repeat_interleave(groups, 1) for tensor in (key, value))
    scores = (query @ key.transpose(-1, -2)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    positions = vector(starts)[:, None, None, None] + torch.arange(query.shape[2], device=DEVICE)[:, None]
    slots = torch.arange(key.shape[2], device=DEVICE)
    hidden = slots > positions
    if window is not None:
        hidden = hidden | (slots <= positions - window)
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        extra = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.softmax(torch.cat([scores, extra], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    return weights @ value, weights


def assert_no_worse(ours, theirs, wanted, dtype):
    """The error of `ours` is at most about twice that of `theirs`, on average and at the worst entry."""
    assert ours.isfinite().all()
    ours, theirs = ((result.double() - wanted).abs() for result in (ours, theirs))
    assert ours.square().mean().sqrt() <= 2 * theirs.square().mean().sqrt() + TINY[dtype]
    assert ours.max() <= 2.5 * theirs.max() + 4 * TINY[dtype]


def split_into(monkeypatch, splits):
    monkeypatch.setattr(attention, "choose_splits", lambda *_: splits)


def check(starts, m, dtype, *, longest=None, rules=None, **sizes):
    rules = {"scaling": sizes.get("d", 32) ** -0.5} | (rules or {})
    query, key, value = inputs(starts, m, dtype, window=rules.get("window"), **sizes)
    longest = longest or max(starts) + m
    output, scores = attention.attend_cache(query, key, value, vector(starts), longest=longest, **rules)
    assert scores is None and output.dtype == dtype
    wanted = exact(query, key, value, starts, **rules)
    assert output.shape == wanted.shape
    assert_no_worse(output, plain(query, key, value, starts, **rules)[0], wanted, dtype)


# attention over the cache


@each_dtype
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 200])
def test_lengths(dtype, splits, length, monkeypatch):
    split_into(monkeypatch, splits)
    check([length - 1], 1, dtype)


@each_dtype
@pytest.mark.parametrize(
    ("starts", "m", "groups", "key_heads", "splits"),
    [
        ([40, 7], 2, 1, 3, 1),
        ([40, 7], 2, 1, 3, 2),
        ([0, 90], 6, 2, 2, 1),
        ([0, 90], 6, 2, 1, 3),
        ([3, 70, 31], 2, 4, 1, 2),
        ([50], 6, 7, 2, 1),
        ([0], 17, 8, 1, 1),  # more rows than one tile holds
        ([61, 5], 17, 7, 1, 1),
        ([61], 10, 8, 1, 2),
    ],
)
def test_groups_and_ragged_rows(dtype, starts, m, groups, key_heads, splits, monkeypatch):
    split_into(monkeypatch, splits)
    check(starts, m, dtype, groups=groups, key_heads=key_heads, d=16)


@each_dtype
@pytest.mark.parametrize(
    ("d", "d_v"), [(16, 32), (64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (64, 80), (192, 128)]
)
def test_head_sizes(dtype, d, d_v):
    check([70, 33], 2, dtype, groups=4, key_heads=1, d=d, d_v=d_v)


@each_dtype
@pytest.mark.parametrize(
    ("window", "m", "splits"), [(1, 1, 1), (1, 2, 2), (5, 3, 1), (64, 2, 4), (65, 6, 1), (65, 3, 2), (1000, 3, 2)]
)
def test_windows(dtype, window, m, splits, monkeypatch):
    split_into(monkeypatch, splits)
    check([0, 150, 67], m, dtype, groups=2, key_heads=1, rules={"window": window})


def test_a_window_narrower_than_a_tile_of_queries():
    check([30], 40, torch.float32, groups=2, key_heads=1, d=16, rules={"window": 3})


SINKS = torch.linspace(-2, 6, 4, device=DEVICE)


@each_dtype
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    "rules",
    [
        {"softcap": 2.0},
        {"softcap": 0.1, "scaling": 3.0},
        {"sinks": SINKS},
        {"sinks": SINKS.half()},
        {"softcap": 5.0, "sinks": SINKS, "window": 9},
    ],
    ids=lambda rules: "-".join(rules),
)
def test_softcap_and_sinks(dtype, splits, rules, monkeypatch):
    split_into(monkeypatch, splits)
    check([130, 2], 2, dtype, rules=rules)


def test_large_scores_stay_finite():
    """Far in the soft-cap's flat part, and without one far from what `exp` can hold."""
    for rules in ({"softcap": 30.0, "scaling": 1e4}, {"scaling": 50.0}):
        check([80], 2, torch.float32, rules=rules)


@pytest.mark.parametrize("splits", [1, 8])
def test_longest_may_exceed_all_lengths(splits, monkeypatch):
    """As in a captured graph; with eight parts most are empty."""
    split_into(monkeypatch, splits)
    check([10, 70], 2, torch.float32, longest=5000, capacity=90)


def test_scratch_may_hold_anything(monkeypatch):
    """Uninitialised memory is NaN here, as it may be on a GPU."""
    split_into(monkeypatch, 5)
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *size, **options):
        tensor = new_empty(self, *size, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    check([10, 70], 2, torch.float16)


def test_many_parts_give_what_one_gives(monkeypatch):
    starts, last, results = [180, 20], vector([1, 0]), []
    query, key, value = inputs(starts, 2, torch.float32, key_heads=1)
    for splits in (1, 2, 5, 17):
        split_into(monkeypatch, splits)
        results.append(attention.attend_cache(query, key, value, vector(starts), longest=182, scaling=0.2, last=last))
    for output, scores in results[1:]:
        torch.testing.assert_close(output, results[0][0], atol=1e-6, rtol=0)
        torch.testing.assert_close(scores.logs, results[0][1].logs, atol=2e-6, rtol=0)


def test_strides():
    """Queries as a model's projection lays them out, and storage that keeps heads inside tokens."""
    query, key, value = inputs([40, 66], 3, torch.float32, d=48)
    wanted, _ = attention.attend_cache(query, key, value, vector([40, 66]), longest=69, scaling=0.2)
    query, key, value = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (query, key, value))
    more = torch.nn.functional.pad(key, (0, 16, 0, 0, 0, 0, 0, 1), value=torch.nan)[:2, ..., :48]
    for keys in (key, more):
        output, _ = attention.attend_cache(query, keys, value, vector([40, 66]), longest=69, scaling=0.2)
        torch.testing.assert_close(output, wanted, atol=0, rtol=0)


def test_rows_do_not_disturb_each_other():
    query, key, value = inputs([9, 14, 6], 2, torch.float32)
    clean, _ = attention.attend_cache(query, key, value, vector([9, 14, 6]), longest=16, scaling=0.3)
    key[1], value[1] = torch.nan, torch.nan
    poisoned, _ = attention.attend_cache(query, key, value, vector([9, 14, 6]), longest=16, scaling=0.3)
    assert torch.equal(poisoned[[0, 2]], clean[[0, 2]]) and poisoned[1].isnan().all()


def test_nothing_to_do():
    query, key, value = inputs([3], 2, torch.float32)
    output, _ = attention.attend_cache(query[:0], key[:0], value[:0], vector([3])[:0], longest=5, scaling=1.0)
    assert output.shape == (0, 4, 2, 32)


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
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    "rules", [{}, {"window": 7}, {"softcap": 2.0, "sinks": SINKS}], ids=lambda rules: "-".join(rules)
)
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


# attention over a side buffer


@each_dtype
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize(("groups", "key_heads", "d"), [(1, 3, 64), (7, 1, 32), (4, 2, 80)])
@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (3.0, True)])
def test_side(dtype, splits, groups, key_heads, d, softcap, sinks, monkeypatch):
    split_into(monkeypatch, splits)
    counts, ends, selected, width = [100, 3, 0, 100], [103, 102, 101, 100], 100, 106
    query, key, value = inputs([width - 1] * 4, 1, dtype, groups=groups, key_heads=key_heads, d=d)
    rules = {"scaling": d**-0.5, "softcap": softcap}
    rules["sinks"] = torch.linspace(-1, 2, groups * key_heads, device=DEVICE) if sinks else None
    read = [[*range(counts[row]), *range(selected, ends[row])] for row in range(4)]
    for row in range(4):
        hidden = torch.ones(key.shape[2], dtype=torch.bool)
        hidden[read[row]] = False
        key[row, :, hidden], value[row, :, hidden] = torch.nan, torch.nan
    output = attention.attend_side(query, key, value, vector(counts), vector(ends), selected=selected, **rules)
    assert output.shape == query.shape and output.dtype == dtype
    for row in range(4):
        one = query[row : row + 1], key[row : row + 1, :, read[row]], value[row : row + 1, :, read[row]]
        wanted, theirs = (function(*one, [len(read[row]) - 1], **rules) for function in (exact, plain))
        assert_no_worse(output[row : row + 1], theirs[0], wanted, dtype)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("sinks", [None, SINKS])
def test_side_row_that_reads_nothing(splits, sinks, monkeypatch):
    split_into(monkeypatch, splits)
    query, key, value = inputs([70], 1, torch.float32)
    key[:], value[:] = torch.nan, torch.nan
    output = attention.attend_side(query, key, value, vector([0]), vector([64]), selected=64, scaling=1.0, sinks=sinks)
    assert torch.equal(output, torch.zeros_like(output))


# token scores


@pytest.mark.parametrize("queries", ["first_last", "last"])
@pytest.mark.parametrize("metric", ["weight", "logit"])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(
    "rules", [{}, {"window": 9}, {"softcap": 2.0, "sinks": SINKS.repeat(5)[:18]}], ids=lambda rules: "-".join(rules)
)
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


@pytest.mark.parametrize("cap", [0.5, 4.0])
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
@pytest.mark.parametrize("queries", ["first_last", "last"])
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


# the gather


def storages(dtype, sizes, *, rows=3, heads=2, tokens=40, inside=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, tokens, heads) if inside else (rows, heads, tokens)
    made = [torch.randn(*shape, size, generator=generator).to(DEVICE, dtype) for size in sizes]
    return [tensor.transpose(1, 2) if inside else tensor for tensor in made]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("sizes", "inside", "per_head"),
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


# arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q.double(), k.double(), v.double()), "the dtype is torch.float64, but must be one of"),
        (lambda q, k, v: (q, k.half(), v), "`key` is torch.float16 on .*, but must be torch.float32 on"),
        (lambda q, k, v: (q[..., :24], k[..., :24], v), "a head size is 24, but must be a multiple of 16 up to 256"),
        (lambda q, k, v: (q, k, torch.cat([v] * 9, -1)), "a head size is 288, but must be"),
        (lambda q, k, v: (q[..., ::2], k[..., ::2], v), "`query` has stride 2 in its last dimension, but must have 1"),
        (lambda q, k, v: (q[:, :3], k, v), "`query` has 3 heads, but must have a multiple of the 2 heads"),
        (lambda q, k, v: (q, k[:, :, :4], v), "shapes .* do not belong together"),
        (lambda q, k, v: (q[0], k, v), "`query` has 3 dimensions, but must have 4"),
        (lambda q, k, v: (q, k, v.requires_grad_()), "`value` requires a gradient"),
    ],
)
def test_unsupported_tensors(change, message):
    tensors = inputs([5], 1, torch.float32)
    assert attention.lacks(*tensors) is None
    tensors = change(*tensors)
    with pytest.raises(ValueError, match=message):
        attention.attend_cache(*tensors, vector([5]), longest=6, scaling=1.0)
    with pytest.raises(ValueError, match=message):
        attention.attend_side(*tensors, vector([5]), vector([5]), selected=5, scaling=1.0)


def test_what_is_supported():
    for size in (64, 80, 96, 128, 256):
        assert attention.unsupported(DEVICE.type, torch.float16, size, 16) is None
    refused = attention.unsupported(DEVICE.type, torch.bfloat16, 64, 64)
    assert refused is None if CUDA else "must be one of torch.float16, torch.float32" in refused


def test_tensors_on_the_cpu_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(attention, "INTERPRETED", False)
    monkeypatch.setattr(select, "INTERPRETED", False)
    tensors = [tensor.cpu() for tensor in inputs([5], 1, torch.float32)]
    with pytest.raises(ValueError, match="the tensors are on 'cpu', but must be on 'cuda'"):
        attention.attend_cache(*tensors, torch.tensor([5]), longest=6, scaling=1.0)
    with pytest.raises(ValueError, match="`sources` are on cpu, but must be on a CUDA device"):
        select.addresses([tensors[1]] * 2, [tensors[1]] * 2)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"window": 0}, "`window` is 0, but must be at least 1"),
        ({"longest": 0}, "`longest` is 0, but must be at least 1"),
        ({"softcap": 0.0}, "`softcap` is 0.0, but must be positive"),
        ({"sinks": torch.zeros(3, device=DEVICE)}, r"`sinks` .* \[3\] .* must be contiguous floats of shape \[4\]"),
        ({"last": vector([0, 0])}, r"`last` .* \[2\] .* must be contiguous torch.int64 of shape \[1\]"),
        ({"last": vector([0]).float()}, "`last` is torch.float32 "),
    ],
)
def test_bad_arguments(rules, message):
    tensors = inputs([5], 1, torch.float32)
    with pytest.raises(ValueError, match=message):
        attention.attend_cache(*tensors, vector([5]), **{"longest": 6, "scaling": 1.0} | rules)


def test_bad_side_arguments():
    query, key, value = inputs([5], 2, torch.float32)
    with pytest.raises(ValueError, match="`query` has 2 queries per row, but must have 1"):
        attention.attend_side(query, key, value, vector([1]), vector([1]), selected=1, scaling=1.0)
    with pytest.raises(ValueError, match="`selected` is 99, but must be from 0 to the 10 columns"):
        attention.attend_side(query[:, :, :1], key, value, vector([1]), vector([1]), selected=99, scaling=1.0)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"queries": "all"}, "`queries` is 'all', but must be one of 'first_last', 'last'"),
        ({"metric": "sum"}, "`metric` is 'sum', but must be one of 'weight', 'logit'"),
        ({"key_heads": 3}, "`key_heads` is 3, but must divide the 4 query heads"),
        ({"length": 65}, "`length` is 65, but must be from 0 to the 64 slots"),
    ],
)
def test_bad_token_score_arguments(rules, message):
    scores = select.Scores(torch.zeros(1, 4, 2, 64, device=DEVICE), torch.zeros(1, 4, 2, device=DEVICE))
    with pytest.raises(ValueError, match=message):
        select.token_scores(scores, vector([5]), vector([0]), **{"length": 6, "scaling": 1.0} | rules)


def test_bad_gather_arguments():
    sources, targets = storages(torch.float16, [32, 32]), storages(torch.float16, [32, 32], tokens=9)
    index = torch.zeros(1, 3, 9, dtype=torch.int64, device=DEVICE)
    for bad, message in [
        ((sources[:1], targets, index, 2), "`sources` has 1 and `targets` 2 tensors"),
        ((sources, targets, index, 1), "`heads` is 1, but must be the 2 heads"),
        ((sources, targets, index.int(), 2), "`index` is torch.int32 .* must be int64"),
        (
            (sources, targets, index.expand(2, 3, 9), 2),
            r"`index` has the shape \[2, 3, 9\], but must have \[1, up to 3",
        ),
        ((sources, targets, index.new_zeros(1, 3, 10), 2), r"`index` has the shape \[1, 3, 10\]"),
        ((sources, [targets[0], targets[1].float()], index, 2), r"`targets\[1\]` is torch.float32"),
        ((sources, [targets[0], targets[1][..., :16]], index, 2), r"`targets\[1\]` has the shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            select.gather_layers(*bad[:3], heads=bad[3])


# how the work is divided


@pytest.mark.parametrize("processors", [1, 108, 132])
@pytest.mark.parametrize("programs", [1, 8, 60, 131, 132, 264, 5000])
def test_choice_of_parts(processors, programs):
    choices = [attention.choose_splits(programs, longest, processors) for longest in range(1, 200_000, 997)]
    assert choices == sorted(choices) and choices[0] == 1 and choices[-1] <= attention.MOST_SPLITS
    for longest, splits in zip(range(1, 200_000, 997), choices, strict=True):
        assert splits == 1 or (longest / splits >= 128 and programs * splits <= 2 * processors)
    if 2 * processors <= programs:
        assert choices[-1] == 1
    elif programs > 2:
        assert programs * choices[-1] > processors


def test_tiles():
    for rows in (1, 6, 16, 17, 136, 9000):
        for size, itemsize in ((16, 2), (80, 2), (256, 2), (64, 4), (256, 4)):
            held, *_ = attention.tile(rows, size, size, itemsize)
            assert held >= 16 and held & (held - 1) == 0
            assert held >= min(rows, 32) and held < max(2 * rows, 17)


# compiled for GPUs that need not be there


def compile_kernels(arch):
    """Compile what the public functions launch, without launching it, and print one line per kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def record(kernel, *args, **options):
        made = run(kernel, *args, **options | {"warmup": True})
        line = {"case": case, "arch": arch, "kernel": kernel.__name__, "shared": made.metadata.shared}
        print(json.dumps(line | {"cubin": len(made.asm["cubin"])}))

    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", arch, 32),
        )
    )
    JITFunction.run = record
    attention.lacks = lambda *_: None  # the tensors are on the CPU, and nothing is launched
    select.INTERPRETED = True
    for case in VARIANTS:
        launch(**VARIANTS[case])


def launch(dtype, d, m, splits=1, side=False, export=False, **rules):
    attention.choose_splits = lambda *_: splits
    query, key = torch.zeros(2, 16, m, d, dtype=dtype), torch.zeros(2, 2, 128, d, dtype=dtype)
    row = torch.zeros(2, dtype=torch.int64)
    if "sinks" in rules:
        rules["sinks"] = torch.zeros(16, dtype=dtype)
    if side:
        attention.attend_side(query, key, key, row, row, selected=100, scaling=0.1, **rules)
        return
    last = row if export else None
    _, scores = attention.attend_cache(query, key, key, row, longest=128, scaling=0.1, last=last, **rules)
    if scores is not None:
        rules = {"scaling": 0.1, "window": rules.get("window"), "softcap": rules.get("softcap")}
        select.token_scores(scores, row, row, length=128, key_heads=2, **rules)
        select.gather_layers([key] * 2, [key] * 2, row.expand(1, 2, 2), heads=2)


VARIANTS = {
    "verification": {"dtype": torch.bfloat16, "d": 128, "m": 6, "splits": 16, "export": True},
    "draft": {"dtype": torch.bfloat16, "d": 64, "m": 1, "side": True, "sinks": True},
    "long prompt": {"dtype": torch.float16, "d": 80, "m": 64, "window": 64},
    "large head": {
        "dtype": torch.float16,
        "d": 256,
        "m": 17,
        "splits": 2,
        "export": True,
        "softcap": 2.0,
        "window": 64,
    },
    "float32": {"dtype": torch.float32, "d": 256, "m": 6, "splits": 2, "export": True},
}
SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that one program may use, by architecture."""


@pytest.mark.slow
def test_kernels_compile_and_fit(tmp_path):
    pytest.importorskip("triton.backends.nvidia")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment}
    runs = [subprocess.Popen([sys.executable, __file__, str(arch)], **pipes) for arch in SHARED]
    lines = []
    for run in runs:
        printed, errors = run.communicate()
        assert run.returncode == 0, errors.decode()
        lines += [json.loads(line) for line in printed.splitlines()]
    kernels = {(line["case"], line["arch"], line["kernel"]) for line in lines}
    assert len({(case, arch) for case, arch, kernel in kernels if kernel == "_attend"}) == 2 * len(VARIANTS)
    assert {kernel for _, _, kernel in kernels} == {"_attend", "_combine", "_reduce", "_gather"}
    for line in lines:
        assert line["cubin"] > 0 and line["shared"] <= SHARED[line["arch"]], line


# natively only


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("m", [1, 6, 17, 300])
def test_long_rows(dtype, d, m):
    """With the number of parts that the device is given."""
    check([3000, 9, 4777], m, dtype, groups=4, key_heads=2, d=d)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("inside", [False, True])
def test_storage_of_more_than_2_to_the_31_elements(inside):
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free device memory")
    length = 70_000
    shape = (2, length, 128, 128) if inside else (2, 128, length, 128)
    storage = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
    storage = storage.transpose(1, 2) if inside else storage
    storage[:, -1] = torch.randn(2, length, 128, device=DEVICE)
    query = torch.randn(2, 128, 1, 128, dtype=torch.bfloat16, device=DEVICE)
    storage[:, :-1, -64:] = 0
    starts = vector([length - 1] * 2)
    output, _ = attention.attend_cache(query, storage, storage, starts, longest=length, scaling=0.1, window=64)
    last = query[:, -1:], storage[:, -1:, -64:], storage[:, -1:, -64:]
    wanted = exact(*last, [63, 63], scaling=0.1)
    assert_no_worse(output[:, -1:], plain(*last, [63, 63], scaling=0.1)[0], wanted, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_captured_graph_serves_other_lengths():
    query, key, value = (tensor.nan_to_num() for tensor in inputs([2040, 2040], 4, torch.bfloat16, d=64))
    starts, last = vector([7, 30]), vector([3, 1])
    targets = [key.new_zeros(2, 2, 5, 64) for _ in range(2)]
    table = select.addresses([key, value], targets)
    rules = {"scaling": 0.125}

    def step():
        output, scores = attention.attend_cache(query, key, value, starts, longest=2044, last=last, **rules)
        tokens = select.token_scores(scores, starts, last, length=2044, **rules)
        index = tokens.topk(5).indices[None]
        select.gather_layers([key, value], targets, index, heads=2, table=table)
        return output, tokens, index

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for now in ([7, 30], [2040, 0], [600, 1999]):
        starts.copy_(vector(now))
        graph.replay()
        gathered = [target.clone() for target in targets]
        output, tokens, index = (tensor.clone() for tensor in captured)
        again = step()
        for found, wanted in zip((output, tokens, index, *gathered), (*again, *targets), strict=True):
            assert torch.equal(found, wanted)
        wanted = exact(query, key, value, now, **rules)
        assert_no_worse(output, plain(query, key, value, now, **rules)[0], wanted, torch.bfloat16)


if __name__ == "__main__":
    compile_kernels(int(sys.argv[1]))
