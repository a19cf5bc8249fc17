"""What the tests of the Triton kernels share.

The kernels run in Triton's interpreter on CPU, natively where there is a GPU.
"""

from __future__ import annotations

import pytest
import torch


pytest.importorskip("triton")

from hf_specdec.kernels import reference  # noqa: E402
from hf_specdec.kernels import triton_attention as attention  # noqa: E402


CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]
# the interpreter multiplies bfloat16 wrongly
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=gpu)]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
TINY = {torch.float32: 2e-7, torch.float16: 2e-5, torch.bfloat16: 2e-4}


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


SINKS = torch.linspace(-2, 6, 4, device=DEVICE)


# the gather


def storages(dtype, sizes, *, rows=3, heads=2, tokens=40, inside=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, tokens, heads) if inside else (rows, heads, tokens)
    made = [torch.randn(*shape, size, generator=generator).to(DEVICE, dtype) for size in sizes]
    return [tensor.transpose(1, 2) if inside else tensor for tensor in made]
