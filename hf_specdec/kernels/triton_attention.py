"""Attention over the cache and over a side buffer in Triton: one pass over the keys, split among programs.

A program takes the queries of one key head, packed as rows of one tile, so that the whole query group shares each key
that is read. It goes over one part of the row's slots; `_combine` merges the parts. How long a row is stands in device
memory only, so a captured graph serves every length. `kernels.reference` is the specification.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .triton_select import INTERPRETED, Scores, capped, on_device, properties


DTYPES = (torch.float16, torch.float32, torch.bfloat16)
LARGEST_HEAD = 256
_F32 = torch.float32
MOST_SPLITS = 128
"""Parts per row at most: `_combine` holds one number per part in registers."""
_FEWEST_KEYS = 128
"""Keys per part at least, or writing and merging partial outputs costs more than the parallel reads bring."""

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_LARGEST_SCORE = tl.constexpr(65000.0)  # a bit below what float16 holds


# what changes from step to step is not specialised: code for each residue and for 1 would be compiled on the way
@triton.jit(do_not_specialize=["capacity", "score_width", "window", "selected"])
def _attend(  # type: ignore[no-untyped-def]
    # inputs; `starts` and `last` with the cache, `counts` and `ends` with a side buffer
    query, key, value, sinks, starts, last, counts, ends,
    # outputs: `output` and `logs` hold one entry per part
    output, logs, products, score_logs,
    # strides in elements
    q_row, q_head, q_step, k_row, k_head, k_slot, v_row, v_head, v_slot,
    # sizes and rules
    m, capacity, score_width, window, selected, scaling, softcap,
    GROUP: tl.constexpr, HEAD: tl.constexpr, VALUE_HEAD: tl.constexpr,
    BLOCK_HEAD: tl.constexpr, BLOCK_VALUE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    SIDE: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr,
    EXPORT: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Attend with one tile of packed rows over one part of its slots; grid (key heads x tiles, parts, n)."""
    tiles = tl.cdiv(m * GROUP, ROWS)
    tile, key_head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    split, splits = tl.program_id(1), tl.num_programs(1)
    row = tl.program_id(2).to(tl.int64)  # storage may hold more than 2**31 elements

    # queries outside, group inside: a tile of many queries then ends at its own last position
    packed = tile * ROWS + tl.arange(0, ROWS)
    real = packed < m * GROUP
    step = packed // GROUP
    head, heads = key_head * GROUP + packed % GROUP, tl.num_programs(0) // tiles * GROUP

    oldest = 0
    if SIDE:
        count, end = tl.load(counts + row).to(tl.int32), tl.load(ends + row).to(tl.int32)
        stop = tl.minimum(tl.maximum(count, end), capacity)
    else:
        start = tl.load(starts + row).to(tl.int32)
        position = start + step
        stop = tl.minimum(start + tl.minimum(m, (tile * ROWS + ROWS - 1) // GROUP + 1), capacity)
        if WINDOWED:
            oldest = tl.maximum(start + tile * ROWS // GROUP - window + 1, 0)
    # whole blocks per part; parts beyond a short row's blocks stay empty
    first = oldest // KEYS * KEYS
    part = tl.cdiv(tl.cdiv(tl.maximum(stop - first, 0), KEYS), splits) * KEYS
    low = first + split * part
    high = tl.minimum(low + part, stop)

    dims, value_dims = tl.arange(0, BLOCK_HEAD), tl.arange(0, BLOCK_VALUE)[None, :]
    at = query + row * q_row + head.to(tl.int64) * q_head + step.to(tl.int64) * q_step
    queries = tl.load(at[:, None] + dims[None, :], mask=real[:, None] & (dims < HEAD)[None, :], other=0.0)
    dims, key_head = dims[:, None], key_head.to(tl.int64)
    key_at = key + row * k_row + key_head * k_head + dims
    value_at = value + row * v_row + key_head * v_head + value_dims
    if EXPORT:
        final = tl.load(last + row).to(tl.int32)
        score_row = (row * heads + head) * 2

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if SINKS:  # counts once, whatever the number of parts
        sink = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * _LOG2E
        peak, total = tl.where(split == 0, sink, peak), tl.where(split == 0, 1.0, total)
    sums = tl.zeros([ROWS, BLOCK_VALUE], tl.float32)
    for base in range(low, high, KEYS):
        columns = base + tl.arange(0, KEYS)
        readable = columns < high
        if SIDE:
            readable = readable & ((columns < count) | ((columns >= selected) & (columns < end)))
        if WINDOWED:
            readable = readable & (columns >= oldest)
        slots = columns.to(tl.int64)
        # what may not be read can be NaN, and 0 * NaN is NaN: such keys and values must not be loaded at all
        keys = tl.load(key_at + slots[None, :] * k_slot, mask=readable[None, :] & (dims < HEAD), other=0.0)
        read = readable[:, None] & (value_dims < VALUE_HEAD)
        values = tl.load(value_at + slots[:, None] * v_slot, mask=read, other=0.0)
        scores = tl.dot(queries, keys, input_precision="ieee") * scaling
        if EXPORT:
            kept = scores
            if products.dtype.element_ty == tl.float16:
                kept = tl.minimum(tl.maximum(scores, -_LARGEST_SCORE), _LARGEST_SCORE).to(tl.float16)
            place = products + score_row[:, None] * score_width + columns[None, :]
            fits = (real[:, None] & readable[None, :]) & (columns < score_width)[None, :]
            tl.store(place, kept, mask=fits & (step == 0)[:, None])
            tl.store(place + score_width, kept, mask=fits & (step == final)[:, None])
        if CAPPED:
            scores = capped(scores, softcap)
        visible = readable[None, :]
        if not SIDE:
            visible = visible & (columns[None, :] <= position[:, None])
        if WINDOWED:
            visible = visible & (columns[None, :] > position[:, None] - window)
        scores = tl.where(visible, scores * _LOG2E, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
        weights = tl.exp2(scores - level[:, None])
        shrink = tl.exp2(peak - level)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        peak = higher

    seen = total > 0
    divisor = tl.where(seen, total, 1.0)
    log = tl.where(seen, peak + tl.log2(divisor), float("-inf"))
    entry = ((row * m + step) * heads + head) * splits + split  # outputs are laid out [n, m, h_q, parts]
    kept_dims = real[:, None] & (value_dims < VALUE_HEAD)
    if SINGLE:
        if EXPORT:
            tl.store(score_logs + score_row, log * _LN2, mask=real & (step == 0))
            tl.store(score_logs + score_row + 1, log * _LN2, mask=real & (step == final))
    else:
        tl.store(logs + entry, log, mask=real)
        kept_dims = kept_dims & seen[:, None]  # `_combine` reads no output beside a log of -inf
    result = (sums / divisor[:, None]).to(output.dtype.element_ty)
    tl.store(output + entry[:, None] * VALUE_HEAD + value_dims, result, mask=kept_dims)


@triton.jit(do_not_specialize=["splits"])
def _combine(  # type: ignore[no-untyped-def]
    partial, logs, last, output, score_logs, m, heads, splits,
    VALUE_HEAD: tl.constexpr, BLOCK_VALUE: tl.constexpr, SPLITS: tl.constexpr, SOME: tl.constexpr,
    EXPORT: tl.constexpr,
):  # fmt: skip
    """Merge one query's parts, each weighed by its share of the softmax denominator; grid (n * m * h_q)."""
    entry = tl.program_id(0).to(tl.int64)
    each = tl.arange(0, SPLITS)
    parts = tl.load(logs + entry * splits + each, mask=each < splits, other=float("-inf"))
    peak = tl.max(parts, 0)
    level = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp2(parts - level), 0)

    dims = tl.arange(0, BLOCK_VALUE)
    sums = tl.zeros([BLOCK_VALUE], tl.float32)
    for base in range(0, splits, SOME):
        some = base + tl.arange(0, SOME)
        share = tl.exp2(tl.load(logs + entry * splits + some, mask=some < splits, other=float("-inf")) - level)
        rows = tl.load(
            partial + (entry * splits + some)[:, None] * VALUE_HEAD + dims[None, :],
            mask=(share > 0)[:, None] & (dims < VALUE_HEAD)[None, :],
            other=0.0,
        )
        sums += tl.sum(rows * share[:, None], 0)
    divisor = tl.where(total > 0, total, 1.0)
    tl.store(output + entry * VALUE_HEAD + dims, (sums / divisor).to(output.dtype.element_ty), mask=dims < VALUE_HEAD)
    if EXPORT:
        head, step, row = entry % heads, entry // heads % m, entry // heads // m
        log = tl.where(total > 0, (level + tl.log2(divisor)) * _LN2, float("-inf"))
        place = score_logs + (row * heads + head) * 2
        tl.store(place, log, mask=step == 0)
        tl.store(place + 1, log, mask=step == tl.load(last + row))


def unsupported(device: str, dtype: torch.dtype, size: int, value_size: int) -> str | None:
    """Return what keeps the kernels from serving a device type, dtype and head sizes; `None` if they can."""
    if device != "cuda" and not INTERPRETED:
        return f"the tensors are on {device!r}, but must be on 'cuda'"
    if device == "cuda" and properties(torch.device("cuda")).major < 8:
        return "the CUDA device has a compute capability below 8.0, which is the least"
    allowed = DTYPES[:2] if INTERPRETED else DTYPES  # the interpreter multiplies bfloat16 wrongly
    if dtype not in allowed:
        return f"the dtype is {dtype}, but must be one of {', '.join(map(str, allowed))}"
    for head in (size, value_size):
        if head % 16 or not 16 <= head <= LARGEST_HEAD:
            return f"a head size is {head}, but must be a multiple of 16 up to {LARGEST_HEAD}"
    return None


def lacks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str | None:
    """Return what keeps `attend_cache` and `attend_side` from serving these tensors, `None` if nothing does."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            return f"`{name}` has {tensor.ndim} dimensions, but must have 4: rows, heads, tokens, head size"
        if tensor.dtype != query.dtype or tensor.device != query.device:
            return f"`{name}` is {tensor.dtype} on {tensor.device}, but must be {query.dtype} on {query.device}"
        if tensor.stride(3) != 1:
            return f"`{name}` has stride {tensor.stride(3)} in its last dimension, but must have 1"
        if torch.is_grad_enabled() and tensor.requires_grad:
            return f"`{name}` requires a gradient, but the kernels have none"
    if key.shape[:3] != value.shape[:3] or key.shape[0] != query.shape[0] or key.shape[3] != query.shape[3]:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (query, key, value))
        return f"`query`, `key` and `value` have the shapes {shapes}, which do not belong together"
    if query.shape[1] % key.shape[1]:
        return f"`query` has {query.shape[1]} heads, but must have a multiple of the {key.shape[1]} heads of `key`"
    reason = unsupported(query.device.type, query.dtype, query.shape[3], value.shape[3])
    return None if reason is None else f"`query`, `key` and `value` do not suit the kernels: {reason}"


def tile(rows: int, head: int, value_head: int, itemsize: int) -> tuple[int, int, int, int]:
    """Return how much one program holds, such that it fits sm_80: packed rows, keys, warps, and loads in flight.

    Args:
        rows (`int`): queries that there are, packed over the heads of a group.
        head, value_head (`int`): head sizes.
        itemsize (`int`): bytes per element.
    """
    size = triton.next_power_of_2(max(head, value_head))
    if itemsize == 4:  # no tensor cores: products are kept in registers, of which there are few
        most, keys, stages = 32, 32 if size <= 128 else 16, 2
    else:
        most, keys, stages = (128, 64, 3) if size <= 128 else (64, 32, 3)
    rows = min(max(16, triton.next_power_of_2(rows)), most)
    return rows, keys, 8 if rows == most else 4, stages


def choose_splits(programs: int, longest: int, processors: int) -> int:
    """Return into how many parts each row's slots are split: as many as can run at once, each of enough keys.

    Args:
        programs (`int`): programs that one part needs: rows x key heads x query tiles.
        longest (`int`): upper bound of the keys that a query reads.
        processors (`int`): multiprocessors of the device; each runs two programs at a time.
    """
    return max(1, min(2 * processors // max(programs, 1), longest // _FEWEST_KEYS, MOST_SPLITS))


def attend_cache(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    *,
    longest: int,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    last: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Scores | None]:
    """Attend over the cache's storage; `kernels.reference` says what this computes.

    Args:
        query (`torch.Tensor` of shape `[n, h_q, m, d]`): queries; row j's query i has the position `starts[j] + i`.
        key (`torch.Tensor` of shape `[n, h_kv, C, d]`): row j's token at position p in slot p. Any strides, except 1
            in the last dimension; slots that no query may read may hold anything, NaN included.
        value (`torch.Tensor` of shape `[n, h_kv, C, d_v]`): the same for values.
        starts (`torch.Tensor` of shape `[n]`, int64): position of each row's first query, on the device.
        longest (`int`): upper bound of `starts + m`; it sizes the grid and the scores, and nothing else. A captured
            graph passes the capacity.
        scaling, window, softcap, sinks: as in `AttentionRules`; sinks in any floating dtype.
        last (`torch.Tensor` of shape `[n]`, int64, *optional*): index of each row's last real query, on the device;
            with it the scores of the first and the last query are returned.

    Returns:
        The output `[n, h_q, m, d_v]` in the query's dtype (a view of `[n, m, h_q, d_v]`), and the `Scores`, `None`
        without `last`.

    Raises:
        ValueError: if an argument has a dtype, device, size or stride that the kernels can't serve; see `lacks`.
    """
    _check(query, key, value, sinks, softcap, starts=starts, last=last)
    for name, number in (("longest", longest), ("window", window)):
        if number is not None and number < 1:
            raise ValueError(f"`{name}` is {number}, but must be at least 1.")
    n, heads, m, _ = query.shape
    scores = None
    if last is not None:
        width = triton.cdiv(longest, 16) * 16  # even rows let the compiler merge stores
        dtype = torch.float32 if query.dtype == torch.float32 else torch.float16
        scores = Scores(query.new_empty(n, heads, 2, width, dtype=dtype), query.new_empty(n, heads, 2, dtype=_F32))
    reach = longest if window is None else min(longest, window + m - 1)
    bounds = {"starts": starts, "last": last, "counts": None, "ends": None, "selected": 0, "window": window or 0}
    return _launch(query, key, value, bounds, reach, scaling, softcap, sinks, scores), scores


def attend_side(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    counts: torch.Tensor,
    ends: torch.Tensor,
    *,
    selected: int,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend with one query per row over the columns `[0, counts[j])` and `[selected, ends[j])` of a side buffer.

    Args:
        query (`torch.Tensor` of shape `[n, h_q, 1, d]`): the draft token's query.
        key (`torch.Tensor` of shape `[n, h_kv, W, d]`): gathered keys, then those of the draft tokens; strides and
            unread columns as for `attend_cache`.
        value (`torch.Tensor` of shape `[n, h_kv, W, d_v]`): the same for values.
        counts (`torch.Tensor` of shape `[n]`, int64): gathered columns that each row reads, on the device.
        ends (`torch.Tensor` of shape `[n]`, int64): where each row's draft tokens end, on the device.
        selected (`int`): column at which draft tokens begin.
        scaling, softcap, sinks: as for `attend_cache`.

    Returns:
        `torch.Tensor` of shape `[n, h_q, 1, d_v]` in the query's dtype; 0 for a row that reads nothing.

    Raises:
        ValueError: as for `attend_cache`, and for more than one query per row.
    """
    _check(query, key, value, sinks, softcap, counts=counts, ends=ends)
    if query.shape[2] != 1:
        raise ValueError(f"`query` has {query.shape[2]} queries per row, but must have 1.")
    if not 0 <= selected <= key.shape[2]:
        raise ValueError(f"`selected` is {selected}, but must be from 0 to the {key.shape[2]} columns of `key`.")
    bounds = {"starts": None, "last": None, "counts": counts, "ends": ends, "selected": selected, "window": 0}
    return _launch(query, key, value, bounds, key.shape[2], scaling, softcap, sinks, None)


def _launch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: dict[str, Any], reach: int, scaling: float,
    softcap: float | None, sinks: torch.Tensor | None, scores: Scores | None,
) -> torch.Tensor:  # fmt: skip
    """Run the kernels and return `[n, h_q, m, d_v]`; `reach` bounds the keys that a query reads."""
    (n, heads, m, head), (key_heads, capacity), value_head = query.shape, key.shape[1:3], value.shape[3]
    # laid out as the layer's output projection wants it: transposing costs no copy there
    output = query.new_empty(n, m, heads, value_head)
    if not output.numel():
        return output.transpose(1, 2)
    group = heads // key_heads
    rows, keys, warps, stages = tile(group * m, head, value_head, query.element_size())
    tiles = triton.cdiv(group * m, rows)
    # the interpreter runs the programs in turn, so it has one processor
    processors = properties(query.device).multi_processor_count if query.is_cuda else 1
    splits = choose_splits(n * key_heads * tiles, reach, processors)
    target, logs = output, None
    if splits > 1:
        target = query.new_empty(n, m, heads, splits, value_head, dtype=_F32)
        logs = query.new_empty(n, m, heads, splits, dtype=_F32)
    products, score_logs = scores if scores is not None else (None, None)
    flags = {"EXPORT": scores is not None, "BLOCK_VALUE": triton.next_power_of_2(value_head)}
    with on_device(query.device):
        _attend[(key_heads * tiles, splits, n)](
            query, key, value, sinks, output=target, logs=logs, products=products, score_logs=score_logs, **bounds,
            q_row=query.stride(0), q_head=query.stride(1), q_step=query.stride(2),
            k_row=key.stride(0), k_head=key.stride(1), k_slot=key.stride(2),
            v_row=value.stride(0), v_head=value.stride(1), v_slot=value.stride(2),
            m=m, capacity=capacity, score_width=0 if products is None else products.shape[-1],
            scaling=float(scaling), softcap=float(softcap or 1), GROUP=group, HEAD=head, VALUE_HEAD=value_head,
            BLOCK_HEAD=triton.next_power_of_2(head), ROWS=rows, KEYS=keys, SINGLE=splits == 1,
            SIDE=bounds["counts"] is not None, WINDOWED=bounds["window"] > 0, CAPPED=softcap is not None,
            SINKS=sinks is not None, num_warps=warps, num_stages=stages, **flags,
        )  # fmt: skip
        if logs is not None:
            _combine[(n * m * heads,)](
                target, logs, bounds["last"], output, score_logs, m, heads, splits,
                VALUE_HEAD=value_head, SPLITS=triton.next_power_of_2(splits), SOME=16, num_warps=4, **flags,
            )  # fmt: skip
    return output.transpose(1, 2)


def _check(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None, softcap: float | None,
    **bounds: torch.Tensor | None,
) -> None:  # fmt: skip
    """Raise for arguments that the kernels can't serve; `bounds` are the vectors of one number per row."""
    reason = lacks(query, key, value)
    if reason is not None:
        raise ValueError(f"{reason}.")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"`softcap` is {softcap}, but must be positive.")
    for name, tensor in ({"sinks": sinks} | bounds).items():
        if tensor is None:
            continue
        length = query.shape[1 if name == "sinks" else 0]
        fits = tensor.is_floating_point() if name == "sinks" else tensor.dtype == torch.int64
        if not (fits and tensor.shape == (length,) and tensor.is_contiguous() and tensor.device == query.device):
            raise ValueError(
                f"`{name}` is {tensor.dtype} of shape {list(tensor.shape)} on {tensor.device}, but must be contiguous "
                f"{'floats' if name == 'sinks' else 'torch.int64'} of shape [{length}] on {query.device}."
            )
