"""Attention of the Triton kernels over the cache and over a side buffer, against `kernels.reference`."""

from __future__ import annotations

import pytest
import torch
from looping import over
from triton_cases import DEVICE, SINKS, assert_no_worse, check, each_dtype, exact, inputs, plain, split_into, vector

from hf_specdec.kernels import triton_attention as attention


pytestmark = [pytest.mark.full, pytest.mark.native]


# attention over the cache


@each_dtype
@over("splits", [1, 3])
@over("length", [1, 63, 64, 65, 127, 200])
def test_lengths(dtype, splits, length, monkeypatch):
    split_into(monkeypatch, splits)
    check([length - 1], 1, dtype)


@each_dtype
@over(
    "starts, m, groups, key_heads, splits",
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
@over("d, d_v", [(16, 32), (64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (64, 80), (192, 128)])
def test_head_sizes(dtype, d, d_v):
    check([70, 33], 2, dtype, groups=4, key_heads=1, d=d, d_v=d_v)


@each_dtype
@over("window, m, splits", [(1, 1, 1), (1, 2, 2), (5, 3, 1), (64, 2, 4), (65, 6, 1), (65, 3, 2), (1000, 3, 2)])
def test_windows(dtype, window, m, splits, monkeypatch):
    split_into(monkeypatch, splits)
    check([0, 150, 67], m, dtype, groups=2, key_heads=1, rules={"window": window})


def test_a_window_narrower_than_a_tile_of_queries():
    check([30], 40, torch.float32, groups=2, key_heads=1, d=16, rules={"window": 3})


@each_dtype
@over("splits", [1, 3])
@over(
    "rules",
    [
        {"softcap": 2.0},
        {"softcap": 0.1, "scaling": 3.0},
        {"sinks": SINKS},
        {"sinks": SINKS.half()},
        {"softcap": 5.0, "sinks": SINKS, "window": 9},
    ],
)
def test_softcap_and_sinks(dtype, splits, rules, monkeypatch):
    split_into(monkeypatch, splits)
    check([130, 2], 2, dtype, rules=rules)


def test_large_scores_stay_finite():
    """Far in the soft-cap's flat part, and without one far from what `exp` can hold."""
    for rules in ({"softcap": 30.0, "scaling": 1e4}, {"scaling": 50.0}):
        check([80], 2, torch.float32, rules=rules)


@over("splits", [1, 8])
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


# attention over a side buffer


@each_dtype
@over("splits", [1, 2])
@over("groups, key_heads, d", [(1, 3, 64), (7, 1, 32), (4, 2, 80)])
@over("softcap, sinks", [(None, False), (3.0, True)])
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


@over("splits", [1, 2])
@over("sinks", [None, SINKS])
def test_side_row_that_reads_nothing(splits, sinks, monkeypatch):
    split_into(monkeypatch, splits)
    query, key, value = inputs([70], 1, torch.float32)
    key[:], value[:] = torch.nan, torch.nan
    output = attention.attend_side(query, key, value, vector([0]), vector([64]), selected=64, scaling=1.0, sinks=sinks)
    assert torch.equal(output, torch.zeros_like(output))
