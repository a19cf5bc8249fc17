"""Vegas' token scores from the attention kernel's `Scores`, and the gather of all layers' chosen tokens, in Triton."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


_LOG2E = tl.constexpr(1.4426950408889634)
_WORDS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
_QUERIES = ("first_last", "last")
_METRICS = ("weight", "logit")


class Scores(NamedTuple):
    """Scores of each row's first and last real query, before the softmax, from `attend_cache`.

    Attributes:
        products (`torch.Tensor` of shape `[n, h_q, 2, S]`): scaled products before any soft-cap, float32 for float32
            inputs, else float16, within 65000 of 0. What a query may not read is undefined. S may exceed the longest
            row.
        logs (`torch.Tensor` of shape `[n, h_q, 2]`): natural logarithm of the two queries' softmax denominators,
            soft-cap and sinks included; float32.
    """

    products: torch.Tensor
    logs: torch.Tensor


@triton.jit
def capped(scores, softcap):  # type: ignore[no-untyped-def]
    """Return `softcap * tanh(scores / softcap)`, by a power series where `1 - exp` would cancel."""
    ratio = scores / softcap
    size = tl.abs(ratio)
    square = ratio * ratio
    fall = tl.exp2(size * (-2 * _LOG2E))  # of a negative number: can't overflow
    near = size * (1 + square * (-0.3333333333 + square * (0.1333333333 - square * 0.0539682540)))
    tanh = tl.where(size < 0.25, near, (1 - fall) / (1 + fall))
    return softcap * tl.where(ratio < 0, -tanh, tanh)


INTERPRETED = not isinstance(capped, triton.runtime.JITFunction)
"""Whether Triton's interpreter runs the kernels, on CPU tensors (`TRITON_INTERPRET=1` before this import)."""


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which kernels start on `device`; Triton looks at the current device only."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@lru_cache
def properties(device: torch.device) -> Any:
    """Return what PyTorch knows of a CUDA device, such as the number of its multiprocessors."""
    return torch.cuda.get_device_properties(device)


@triton.jit(do_not_specialize=["score_width", "length", "window"])
def _reduce(  # type: ignore[no-untyped-def]
    products, logs, starts, last, output, score_width, length, rows, window, softcap, factor,
    TOKENS: tl.constexpr, SOME: tl.constexpr, EACH: tl.constexpr, WEIGHT: tl.constexpr, WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """Write the mean over `rows` scored queries of one block of tokens; grid (blocks, output heads, n).

    The queries of one output head stand together in `products` `[n, output heads * rows * EACH, S]`, of which every
    EACH-th, the last, counts.
    """
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    group, groups = tl.program_id(1), tl.num_programs(1)
    row = tl.program_id(2).to(tl.int64)
    start, final = tl.load(starts + row).to(tl.int32), tl.load(last + row).to(tl.int32)
    sums = tl.zeros([TOKENS], tl.float32)
    for base in range(0, rows, SOME):
        some = base + tl.arange(0, SOME)
        query = (group * rows + some) * EACH + EACH - 1
        entry = row * groups * rows * EACH + query
        position = start + tl.where(query % 2 == 1, final, 0)
        seen = (some < rows)[:, None] & (tokens[None, :] <= position[:, None]) & (tokens < score_width)[None, :]
        if WINDOWED:
            seen = seen & (tokens[None, :] > position[:, None] - window)
        scores = tl.load(products + entry[:, None] * score_width + tokens[None, :], mask=seen, other=0.0)
        scores = scores.to(tl.float32)
        if WEIGHT:
            if CAPPED:
                scores = capped(scores, softcap)
            log = tl.load(logs + entry, mask=some < rows, other=0.0)
            scores = tl.where(seen, tl.exp2((scores - log[:, None]) * _LOG2E), 0.0)
        sums += tl.sum(scores, 0)
    place = (row * groups + group) * length + tokens
    tl.store(output + place, sums * factor, mask=tokens < length)


def token_scores(
    scores: Scores,
    starts: torch.Tensor,
    last: torch.Tensor,
    *,
    length: int,
    scaling: float,
    softcap: float | None = None,
    queries: str = "first_last",
    metric: str = "weight",
    window: int | None = None,
    key_heads: int | None = None,
) -> torch.Tensor:
    """Return Vegas' importance of each slot; `kernels.reference.token_scores` says what this computes.

    Args:
        scores (`Scores`): from `attend_cache`.
        starts, last (`torch.Tensor` of shape `[n]`, int64): as given to `attend_cache`.
        length (`int`): slots to score, from 0.
        scaling, softcap, window: as given to `attend_cache`.
        queries, metric, key_heads: as for the reference, but for `"all"` queries.

    Returns:
        float32 `torch.Tensor` of shape `[n, length]`, or `[n, key_heads, length]`. A query counts as 0 at slots that
        it may not read; with `"logit"` the mean is thus meaningful only where both queries read.

    Raises:
        ValueError: if `queries`, `metric`, `key_heads` or `length` is none of those.
    """
    n, heads, _, score_width = scores.products.shape
    for name, chosen, allowed in (("queries", queries, _QUERIES), ("metric", metric, _METRICS)):
        if chosen not in allowed:
            raise ValueError(f"`{name}` is {chosen!r}, but must be one of {', '.join(map(repr, allowed))}.")
    if key_heads is not None and (key_heads < 1 or heads % key_heads):
        raise ValueError(f"`key_heads` is {key_heads}, but must divide the {heads} query heads.")
    if not 0 <= length <= score_width:
        raise ValueError(f"`length` is {length}, but must be from 0 to the {score_width} slots of `scores`.")
    groups, each = key_heads or 1, 1 if queries == "first_last" else 2
    output = scores.logs.new_empty((n, length) if key_heads is None else (n, key_heads, length))
    if not output.numel():
        return output
    rows = 2 * heads // groups // each
    factor = 1 / rows if metric == "weight" else 1 / rows / scaling
    with on_device(output.device):
        _reduce[(triton.cdiv(length, 128), groups, n)](
            scores.products, scores.logs, starts, last, output, score_width, length, rows, window or 0,
            float(softcap or 1), factor, TOKENS=128, SOME=16, EACH=each, WEIGHT=metric == "weight",
            WINDOWED=window is not None, CAPPED=softcap is not None, num_warps=4,
        )  # fmt: skip
    return output


class Addresses(NamedTuple):
    """Where the tensors of a gather lie, on the device; from `addresses`, and valid as long as they stay there.

    Attributes:
        table (`torch.Tensor` of shape `[2L, 10]`): per pair the two addresses, strides and sizes, in words; int64.
        word (`int`): bytes that are copied at a time; divides all of those.
        widest (`int`): the largest head size, in words.
        limits (`tuple[int, int, int]`): rows, heads and target columns that all of the tensors have.
        pointers (`tuple[int, ...]`): addresses of the sources, then of the targets.
    """

    table: torch.Tensor
    word: int
    widest: int
    limits: tuple[int, int, int]
    pointers: tuple[int, ...]


def addresses(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> Addresses:
    """Return the table of addresses that `gather_layers` needs; the one copy to the device that it would make.

    Args:
        sources, targets: as for `gather_layers`.

    Raises:
        ValueError: if a tensor's shape, dtype, device or innermost stride does not fit the others'.
    """
    if not sources or len(sources) != len(targets) or len(sources) % 2:
        raise ValueError(
            f"`sources` has {len(sources)} and `targets` {len(targets)} tensors, but both must have two per layer."
        )
    like = sources[0]
    if like.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"`sources` are on {like.device}, but must be on a CUDA device.")
    size, lines = like.element_size(), []
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        for name, tensor in (("sources", source), ("targets", target)):
            if tensor.ndim != 4 or tensor.shape[1] != like.shape[1] or tensor.shape[3] != source.shape[3]:
                raise ValueError(f"`{name}[{i}]` has the shape {list(tensor.shape)}, which does not fit the others.")
            if tensor.dtype != like.dtype or tensor.device != like.device or tensor.stride(3) != 1:
                raise ValueError(
                    f"`{name}[{i}]` is {tensor.dtype} on {tensor.device} with innermost stride {tensor.stride(3)}, "
                    f"but must be {like.dtype} on {like.device} with 1."
                )
        strides = [size * stride for tensor in (source, target) for stride in tensor.stride()[:3]]
        lines.append([source.data_ptr(), target.data_ptr(), *strides, source.shape[2], size * source.shape[3]])
    # one word is one load: the wider, the fewer of them
    measures = [number for line in lines for number in (*line[:8], line[9])]
    word = next(width for width in (8, 4, 2, 1) if all(number % width == 0 for number in measures))
    table = [[*line[:2], *(stride // word for stride in line[2:8]), line[8], line[9] // word] for line in lines]
    limits = tuple(min(tensor.shape[dim] for tensor in targets) for dim in range(3))
    rows = min(limits[0], *(tensor.shape[0] for tensor in sources))
    return Addresses(
        torch.tensor(table, dtype=torch.int64, device=like.device),
        word,
        max(line[9] for line in table),
        (rows, limits[1], limits[2]),
        _pointers(sources, targets),
    )


def _pointers(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in (*sources, *targets))


@triton.jit(do_not_specialize=["i_layer", "i_row", "i_head", "width"])
def _gather(  # type: ignore[no-untyped-def]
    table, index, i_layer, i_row, i_head, i_token, heads, width,
    WORD: tl.constexpr, TOKENS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Copy one block of one head's chosen tokens from a source to its target; grid (blocks, n * heads, 2L)."""
    pair, row, head = tl.program_id(2), tl.program_id(1) // heads, tl.program_id(1) % heads
    line = table + pair * 10
    s_row, s_head, s_slot = tl.load(line + 2), tl.load(line + 3), tl.load(line + 4)
    t_row, t_head, t_slot = tl.load(line + 5), tl.load(line + 6), tl.load(line + 7)
    capacity, words = tl.load(line + 8), tl.load(line + 9)
    source = tl.load(line).to(tl.pointer_type(WORD)) + row * s_row + head * s_head
    target = tl.load(line + 1).to(tl.pointer_type(WORD)) + row * t_row + head * t_head

    columns = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    kept = columns < width
    place = index + (pair // 2).to(tl.int64) * i_layer + row.to(tl.int64) * i_row + head.to(tl.int64) * i_head
    slots = tl.load(place + columns * i_token, mask=kept, other=0)
    inside = kept & (slots >= 0) & (slots < capacity)
    each = tl.arange(0, WORDS)
    copied = tl.load(
        source + slots[:, None] * s_slot + each[None, :], mask=inside[:, None] & (each < words)[None, :], other=0
    )
    tl.store(target + columns[:, None] * t_slot + each[None, :], copied, mask=kept[:, None] & (each < words)[None, :])


def gather_layers(
    sources: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    index: torch.Tensor,
    *,
    heads: int,
    table: Addresses | None = None,
) -> None:
    """Copy chosen tokens of all layers in one launch.

    Args:
        sources (`Sequence[torch.Tensor]` of shape `[n, h_kv, C, d]`): storages in the order keys of layer 0, values
            of layer 0, keys of layer 1, and so on; one dtype, head sizes may differ. They may have more rows than
            `index`.
        targets (`Sequence[torch.Tensor]` of shape `[n, h_kv, W, d]`): where the tokens go, in the same order; the
            columns `[0, w)` are written.
        index (`torch.Tensor` of shape `[L, n, w]` or `[L, n, h_kv, w]`, int64): slot of each column's token; a slot
            outside the storage, such as -1, gives zeros.
        heads (`int`): h_kv.
        table (`Addresses`, *optional*): from `addresses` of the same tensors. Required while a CUDA graph is
            captured, and saves a copy to the device otherwise.

    Raises:
        ValueError: if `table` belongs to other tensors, or `index` does not fit.
    """
    if table is None:
        table = addresses(sources, targets)
    elif table.pointers != _pointers(sources, targets):
        raise ValueError("`table` belongs to other tensors than `sources` and `targets`; build it anew.")
    most, key_heads, columns = table.limits
    if heads != key_heads:
        raise ValueError(f"`heads` is {heads}, but must be the {key_heads} heads of `sources`.")
    shape = list(index.shape)
    fits = index.ndim in (3, 4) and 2 * shape[0] == len(sources) and shape[1] <= most and shape[-1] <= columns
    if not fits or (index.ndim == 4 and shape[2] != heads):
        raise ValueError(
            f"`index` has the shape {shape}, but must have [{len(sources) // 2}, up to {most}, (optionally {heads},) "
            f"up to {columns}]."
        )
    if index.dtype != torch.int64 or index.device != table.table.device:
        raise ValueError(f"`index` is {index.dtype} on {index.device}, but must be int64 on {table.table.device}.")
    if not index.numel():
        return
    strides = index.stride() if index.ndim == 4 else (*index.stride()[:2], 0, index.stride(2))
    words = triton.next_power_of_2(table.widest)
    tokens = max(1, 2048 // words)
    with on_device(index.device):
        _gather[(triton.cdiv(shape[-1], tokens), shape[1] * heads, len(sources))](
            table.table, index, *strides, heads, shape[-1],
            WORD=_WORDS[table.word], TOKENS=tokens, WORDS=words, num_warps=4,
        )  # fmt: skip
