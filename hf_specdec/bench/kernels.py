"""Timing the kernels one by one: every implementation on the same random tensors, against the reference.

Bytes are what a task must move, whatever an implementation does, so that its rate compares implementations as their
times do: keys and values that are read once, queries, outputs, exported scores. A rate is set against the rate of a
large copy on the same device, in which the bytes read and the bytes written both count.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..cache.side import flat_index, gather_slots
from ..kernels import explicit, flash, packed, reference
from ..kernels.address import Address
from ..kernels.request import AttentionRules, Request
from .cases import (
    RECENTS,
    SCORED,
    Case,
    Inputs,
    Lists,
    deviation,
    expected,
    make_inputs,
    moved_bytes,
    needed_bytes,
)


Run = Callable[[], Any]

_COPIED = {"cuda": 1 << 30, "cpu": 1 << 26}
_FLUSHED = 1 << 30
"""Bytes read before each timed launch: more than any L2 holds, for longer than the launch takes to be queued."""
_REPEATS = {"cuda": 20, "cpu": 3}


@dataclass
class KernelRow:
    """What one implementation did with one case.

    Args:
        case (`Case`): the task.
        implementation (`str`): what did it.
        ms (`float`): median milliseconds of a launch, memory caches cold on CUDA.
        error (`float`): largest absolute difference from the reference in float32.
        relative_error (`float`): the same over the largest absolute value of the reference.
        bytes (`int`): see `moved_bytes`.
        gb_per_second (`float`): bytes over time, in 1e9 bytes per second.
        copy_share (`float`): that over the rate of a copy.
    """

    case: Case
    implementation: str
    ms: float
    error: float
    relative_error: float
    bytes: int
    gb_per_second: float
    copy_share: float

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-safe dictionary: the case's fields, `case` for its name, and the figures."""
        values = {**asdict(self.case), **asdict(self), "case": self.case.name, "dtype": str(self.case.dtype)[6:]}
        values["task"] = values.pop("kind")
        return {"kind": "kernel", **{key: value for key, value in values.items() if key != "name"}}


def timed(run: Run, device: torch.device, repeats: int | None = None, cold: bool = True) -> float:
    """Return the median milliseconds of `run()` on the device.

    On CUDA each launch lies between two events. A large read before it empties the caches and keeps the device busy
    until the launch is queued, so that no launch overhead is in the time; what a write leaves in the caches would go
    back to memory during the launch. Elsewhere the wall clock counts, caches warm.

    Args:
        repeats (`int`, *optional*): timed launches, after two that are not; by default 20 on CUDA and 3 elsewhere.
        cold (`bool`, *optional*, defaults to `True`): empty the caches; without it, launches follow each other.
    """
    repeats = repeats or _REPEATS[device.type]
    run(), run()
    if device.type != "cuda":
        found = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            found.append(1000 * (time.perf_counter() - start))
        return statistics.median(found)
    flush = torch.ones(_FLUSHED // 4 if cold else 1, dtype=torch.float32, device=device)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    with torch.cuda.device(device):
        for before, after in pairs:
            flush.amax()
            before.record()
            run()
            after.record()
        torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in pairs)


def copy_bandwidth(device: torch.device, size: int | None = None) -> float:
    """Return the rate of a copy in 1e9 bytes per second; bytes read and bytes written both count.

    Args:
        device (`torch.device`): where.
        size (`int`, *optional*): bytes to copy; by default 1 GiB on CUDA and 64 MiB elsewhere.
    """
    size = size or _COPIED[device.type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)  # written once, so that its pages exist
    return 2 * size / timed(lambda: target.copy_(source), device, 10) / 1e6


# implementations: each builder returns the launch, or the reason why it can't serve the case


def _triton(case: Case, inputs: Any) -> Run | str:
    device = (inputs.slots if case.kind == "gather" else inputs.query).device
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton kernels run on CUDA devices, not on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'hf-specdec[cuda]')"
    from ..kernels import triton_attention, triton_select  # triton is optional

    if case.kind == "gather":
        table = triton_select.addresses(inputs.sources, inputs.targets)
        return lambda: triton_select.gather_layers(*inputs, heads=case.key_heads, table=table)
    query, key, value = inputs
    reason = triton_attention.lacks(query, key, value)
    if reason is not None:
        return reason
    rules: dict[str, Any] = {"scaling": case.scaling}
    if case.kind == "draft":
        ends = torch.tensor(case.lengths, device=device)
        selected = case.context - RECENTS
        counts = torch.full_like(ends, selected)
        sides = {"selected": selected, **rules}
        return lambda: (triton_attention.attend_side(query, key, value, counts, ends, **sides), None)
    starts = torch.tensor(case.starts, device=device)
    last = torch.full_like(starts, case.queries - 1)

    def attend(scored: bool) -> Any:
        return triton_attention.attend_cache(
            query, key, value, starts, longest=case.context, last=last if scored else None, **rules
        )

    def reduce(scores: Any) -> torch.Tensor:
        return triton_select.token_scores(scores, starts, last, length=case.context, **rules)

    if case.kind == "reduce":
        exported = attend(True)[1]
        return lambda: (None, reduce(exported))
    if case.kind != "scored":
        return lambda: (attend(case.kind == "export")[0], None)

    def both() -> Any:
        output, scores = attend(True)
        return output, reduce(scores)

    return both


def _ours(module: Any, case: Case, inputs: Inputs) -> Run:
    """Launch one of the package's attention functions over the cache's storage."""
    address = Address(case.starts, case.queries)
    rules = AttentionRules(case.scaling, score=SCORED if case.kind == "scored" else None)
    return lambda: module.cached_attention(*inputs, address, rules)


def _dense(case: Case, inputs: Inputs) -> Run | str:
    """Dense flash attention through PyTorch: what stock decoding could have at best, rows of one length only."""
    if case.ragged:
        return "it reads rows of one length only"
    query, key, value = inputs
    rules: dict[str, Any] = {"scale": case.scaling, "enable_gqa": True}
    if query.device.type != "cuda":
        visible = torch.ones(case.queries, case.context, dtype=torch.bool).tril(case.context - case.queries)
        return lambda: (scaled_dot_product_attention(query, key, value, visible, **rules), None)
    if case.dtype not in (torch.float16, torch.bfloat16):
        return f"PyTorch's flash attention takes float16 and bfloat16, not {case.dtype}"
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    mask: Any = None if case.queries == 1 else causal_lower_right(case.queries, case.context)

    def run() -> Any:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # no silent change to a slower one
            return scaled_dot_product_attention(query, key, value, attn_mask=mask, **rules), None

    return run


def _flash(case: Case, inputs: Inputs) -> Run | str:
    request = Request.read(inputs.query, inputs.value, AttentionRules(case.scaling))
    return flash.lacks(request) or _ours(flash, case, inputs)


def _reference(case: Case, inputs: Inputs) -> Run:
    def run() -> Any:
        output, metric = expected(case, inputs)
        return output, metric if case.kind == "scored" else None

    return run


def _reduction(fast: bool, case: Case, inputs: Inputs) -> Run:
    """Launch a reduction in plain torch operations, from products as large as the kernel's."""
    starts = torch.tensor(case.starts, device=inputs.query.device)
    weights, _ = reference.attention_weights(inputs.query, inputs.key, starts, scaling=case.scaling)
    # products up to a constant, which the softmax takes out again; -inf where a query may not read
    products = weights[:, :, [0, -1]].log()
    products = (products - products.amax(dim=-1, keepdim=True)).to(case.score_dtype)
    address, last = Address(case.starts, 2), torch.ones_like(starts)

    def run() -> Any:
        found = torch.softmax(products.float(), dim=-1)
        if fast:
            return None, explicit.token_scores(found.unflatten(1, (case.key_heads, -1)), address, SCORED)
        return None, reference.token_scores(found, products, last, queries=SCORED.queries, metric=SCORED.metric)

    return run


def _gather(fast: bool, case: Case, inputs: Lists) -> Run:
    """Launch a gather layer by layer, as the draft view does it or by `torch.gather`."""

    def run() -> list[torch.Tensor]:
        for at, (source, target) in enumerate(zip(inputs.sources, inputs.targets, strict=True)):
            if fast:
                gather_slots(source, flat_index(inputs.slots[at // 2], source), target)
            else:
                target.copy_(_chosen(case, inputs, at))
        return inputs.targets

    return run


def _chosen(case: Case, inputs: Lists, at: int) -> torch.Tensor:
    """Return the chosen tokens `[n, h_kv, w, d]` of one source: the reference of a gather."""
    index = inputs.slots[at // 2][:, None, :, None]
    return inputs.sources[at].gather(2, index.expand(-1, case.key_heads, -1, case.size))


Builder = Callable[[Case, Any], "Run | str"]
_WITH_SCORES: dict[str, Builder] = {
    "triton": _triton, "explicit": partial(_ours, explicit), "sdpa": partial(_ours, packed), "reference": _reference,
}  # fmt: skip
_ATTEND = {**_WITH_SCORES, "sdpa_dense": _dense, "flash_attn": _flash}
IMPLEMENTATIONS: dict[str, dict[str, Builder]] = {
    "draft": _ATTEND,
    "verify": _ATTEND,
    "scored": _WITH_SCORES,
    "export": {"triton": _triton},
    "reduce": {"triton": _triton, "explicit": partial(_reduction, True), "reference": partial(_reduction, False)},
    "gather": {"triton": _triton, "explicit": partial(_gather, True), "reference": partial(_gather, False)},
}
"""Implementations by kind of case: `triton` (this package's kernels), `explicit` (plain products), `sdpa` (PyTorch's
fused attention, query group packed), `sdpa_dense` and `flash_attn` (dense flash attention), `reference`."""


def measure_kernels(
    cases: Sequence[Case],
    device: torch.device,
    bandwidth: float,
    memory: int,
    note: Callable[[str], None] = lambda _: None,
    only: Sequence[str] | None = None,
) -> list[KernelRow]:
    """Time every implementation of every case, and compare its result with the reference in float32.

    Args:
        cases (`list[Case]`): tasks.
        device (`torch.device`): where.
        bandwidth (`float`): rate of a copy, from `copy_bandwidth`.
        memory (`int`): bytes that may be used; a case that needs more is left out.
        note (`Callable[[str], None]`, *optional*): told what was left out, and why.
        only (`list[str]`, *optional*): names of `IMPLEMENTATIONS` that are timed; all by default.
    """
    rows, said = [], set()
    for case in cases:
        needed = needed_bytes(case) + (_FLUSHED if device.type == "cuda" else 0)
        if needed > memory:
            note(f"left out: {case.name!r} needs {needed / 1e9:.4f} GB of {memory / 1e9:.4f}")
            continue
        inputs = make_inputs(case, device)
        for name, build in IMPLEMENTATIONS[case.kind].items():
            if only is not None and name not in only:
                continue
            run = build(case, inputs)
            if isinstance(run, str):
                if (name, run) not in said:
                    said.add((name, run))
                    note(f"left out: {name} (of {case.name!r}, and wherever the same holds): {run}")
                continue
            rows.append(_measure(case, name, run, inputs, device, bandwidth))
        del inputs
    return rows


def _measure(case: Case, name: str, run: Run, inputs: Any, device: torch.device, bandwidth: float) -> KernelRow:
    for target in inputs.targets if isinstance(inputs, Lists) else ():
        target.zero_()  # what another implementation copied must not count for this one
    found = run()
    if isinstance(inputs, Lists):
        both = [deviation(case, [got], [_chosen(case, inputs, at)]) for at, got in enumerate(inputs.targets)]
        error, relative = max(each[0] for each in both), max(each[1] for each in both)
    else:
        error, relative = deviation(case, found, expected(case, inputs))
    ms, moved = timed(run, device), moved_bytes(case)
    rate = moved / ms / 1e6
    return KernelRow(case, name, ms, error, relative, moved, rate, rate / bandwidth)
