"""The Triton kernels as attention functions: over ragged storage, with token scores where they are wanted."""

from __future__ import annotations

from typing import Any

import torch

from . import triton_attention, triton_select
from .address import Address
from .request import AttentionRules, Request, SideRange


def lacks(request: Request) -> str | None:
    """Return why the Triton kernels can't serve `request`, `None` if they can."""
    if request.score is not None and request.score.queries == "all":
        return "they export the scores of the first and the last query, not of all"
    return triton_attention.unsupported(request.device, request.dtype, request.size, request.value_size)


def cached_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, address: Address, rules: AttentionRules
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend over the cache's storage; arguments and results as for `explicit.cached_attention`."""
    starts, score = address.starts_on(query.device), rules.score
    last = None if score is None else address.last_on(query.device)
    shared: dict[str, Any] = {"scaling": rules.scaling, "window": rules.window, "softcap": rules.softcap}
    output, scores = triton_attention.attend_cache(
        query, key, value, starts, longest=address.high, sinks=rules.sinks, last=last, **shared
    )
    if score is None or scores is None or last is None:
        return output, None
    choice: dict[str, Any] = {"queries": score.queries, "metric": score.metric}
    choice["key_heads"] = key.shape[1] if score.per_head else None
    return output, triton_select.token_scores(scores, starts, last, length=address.high, **shared, **choice)


def side_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, reads: SideRange, rules: AttentionRules
) -> torch.Tensor:
    """Attend with one query per row over a side buffer; as `explicit.side_attention`, masked by numbers per row."""
    shared: dict[str, Any] = {"scaling": rules.scaling, "softcap": rules.softcap, "sinks": rules.sinks}
    return triton_attention.attend_side(query, key, value, reads.counts, reads.ends, selected=reads.selected, **shared)
