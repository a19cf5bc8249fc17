"""Attention in plain torch operations, laid out for speed: whole storage, the query group packed as rows.

The scores exist as a tensor here, so Vegas' token scores cost one reduction and no second pass over the keys. On CPU
in bf16 this beats `scaled_dot_product_attention` on few queries by about two, if the score product runs as `K @ q` and
both products run over whole contiguous storage instead of a slice (measured; see docs/architecture.md).
"""

from __future__ import annotations

import torch

from .address import Address
from .request import AttentionRules, ScoreRequest


_WHOLE_SHARE = 0.6
"""Share of the storage in use from which reading all of it beats reading a slice."""

GRAIN = 64
"""Slices begin and end at multiples of this: oneDNN prepares a bf16 product anew for every shape, and the two of one
attention then take about as long as a decoder layer of a small model. So shapes should repeat from step to address."""


def cached_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, address: Address, rules: AttentionRules
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend over the cache's storage; `kernels.reference` says what this computes.

    Args:
        query (`torch.Tensor` of shape `[n, h_q, m, d]`): queries of the fed tokens.
        key (`torch.Tensor` of shape `[n, h_kv, C, d]`): storage of the active rows, all slots.
        value (`torch.Tensor` of shape `[n, h_kv, C, d_v]`): the same for values.
        address (`Address`): where the queries are.
        rules (`AttentionRules`): how they attend, and which token scores to return.

    Returns:
        The output `[n, h_q, m, d_v]` and the token scores `[n, S]` or `[n, h_kv, S]` in float32, `None` unless asked
        for. Slots that some row may not choose hold undefined scores, and S may be less than C.
    """
    n, heads, m, _ = query.shape
    key_heads, capacity = key.shape[1], key.shape[2]
    groups, window, score = heads // key_heads, rules.window, rules.score
    first = 0 if window is None else max(0, address.low + 1 - window) // GRAIN * GRAIN
    whole = first == 0 and address.high >= _WHOLE_SHARE * capacity
    end = capacity if whole else min(capacity, -(-address.high // GRAIN) * GRAIN)
    rows = groups * m

    # [n * h_kv, S, d] @ [n * h_kv, d, rows]; the packed group shares each key that is read
    packed = (query * rules.scaling).reshape(n * key_heads, rows, -1)
    keys = key[:, :, first:end].reshape(n * key_heads, end - first, -1)
    scores = torch.bmm(keys, packed.transpose(1, 2))
    raw = None
    if score is not None and score.metric == "logit":
        raw = token_scores(scores.view(n, key_heads, -1, groups, m).movedim(2, -1), address, score) / rules.scaling
    if rules.softcap is not None:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
    _hide(scores.view(n, key_heads, end - first, groups, m), address, first, end, window)
    weights = _softmax(scores.transpose(1, 2), rules.sinks, n, key_heads, groups, m)

    metric = raw
    if score is not None and score.metric == "weight":
        metric = token_scores(weights.view(n, key_heads, groups, m, -1), address, score)
    output = torch.bmm(weights, value[:, :, first:end].reshape(n * key_heads, end - first, -1))
    return output.view(n, heads, m, -1), metric


def _hide(scores: torch.Tensor, address: Address, first: int, end: int, window: int | None) -> None:
    """Set to -inf what a query may not read, in place; `scores` is `[n, h_kv, S, groups, m]`."""
    # without a window every slot below the shortest row's start is visible to all
    masked = first if window is not None else address.low
    if masked == address.high - 1 and end == address.high:
        return  # one query of one length: it reads everything, itself included
    hidden = address.hidden_columns(masked, end, window, scores.device)
    scores[:, :, masked - first :].masked_fill_(hidden, -torch.inf)


def _softmax(
    scores: torch.Tensor, sinks: torch.Tensor | None, n: int, key_heads: int, groups: int, m: int
) -> torch.Tensor:
    """Return the softmax over the last dimension of `[n * h_kv, groups * m, S]`, accumulated in float32 or better."""
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    extra = sinks.to(scores.dtype).view(1, key_heads, groups, 1).expand(n, -1, -1, m).reshape(n * key_heads, -1, 1)
    return torch.softmax(torch.cat([scores, extra], dim=-1), dim=-1)[..., :-1].contiguous()


def token_scores(source: torch.Tensor, address: Address, score: ScoreRequest) -> torch.Tensor:
    """Return the mean of `source` `[n, h_kv, groups, m, S]` over heads and chosen queries, float32 (or float64)."""
    queries = score.queries
    dtype = torch.float64 if source.dtype == torch.float64 else torch.float32
    dims = (2, 3) if score.per_head else (1, 2, 3)
    heads = source.shape[2] * (1 if score.per_head else source.shape[1])
    last = address.same_last
    if last is not None:
        chosen = {"first_last": [0, last] if last else [0], "last": [last], "all": list(range(last + 1))}[queries]
        # evenly spaced rows as a strided view: one reduction, no copy
        spaced = source[:, :, :, chosen[0] : chosen[-1] + 1 : max(1, chosen[-1]) if queries == "first_last" else 1]
        return spaced.sum(dims, dtype=dtype).div_(heads * len(chosen))
    index = torch.arange(source.shape[3], device=source.device)
    newest = address.last_on(source.device)[:, None]
    picked = {"first_last": (index == 0) | (index == newest), "last": index == newest, "all": index <= newest}[queries]
    share = picked.to(dtype) / (heads * picked.sum(dim=1, keepdim=True))
    return (source.to(dtype) * share[:, None, None, :, None]).sum(dims)


def side_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, rules: AttentionRules
) -> torch.Tensor:
    """Attend with one query per row over a small side buffer.

    Args:
        query (`torch.Tensor` of shape `[n, h_q, 1, d]`): the draft token's query.
        key (`torch.Tensor` of shape `[n, h_kv, w, d]`): gathered keys.
        value (`torch.Tensor` of shape `[n, h_kv, w, d_v]`): gathered values.
        bias (`torch.Tensor` of shape `[n, 1 or h_kv, 1, w]`, *optional*): 0, or -inf for columns that a row does not
            read.
        rules (`AttentionRules`): without a window and scores.

    Returns:
        `torch.Tensor` of shape `[n, h_q, 1, d_v]`.
    """
    n, heads, _, size = query.shape
    scaling, softcap, sinks = rules.scaling, rules.softcap, rules.sinks
    packed = query.reshape(n, key.shape[1], -1, size)
    if softcap is None and sinks is None:
        output = torch.nn.functional.scaled_dot_product_attention(packed, key, value, attn_mask=bias, scale=scaling)
        return output.reshape(n, heads, 1, -1)
    scores = (packed * scaling) @ key.transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    groups = packed.shape[2]
    weights = _softmax(scores.flatten(0, 1), sinks, n, key.shape[1], groups, 1)
    return (weights.view(n, -1, groups, key.shape[2]) @ value).reshape(n, heads, 1, -1)
