"""What the Triton kernels take and refuse, and how their work is divided."""

from __future__ import annotations

import pytest
import torch
from looping import over
from triton_cases import CUDA, DEVICE, inputs, storages, vector

from hf_specdec.kernels import triton_attention as attention
from hf_specdec.kernels import triton_select as select


# arguments


@over(
    "change, message",
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


@over(
    "rules, message",
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


@over(
    "rules, message",
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


@over("processors", [1, 108, 132])
@over("programs", [1, 8, 60, 131, 132, 264, 5000])
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
