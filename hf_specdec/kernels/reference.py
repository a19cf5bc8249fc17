"""The specification of attention over a ragged cache and of Vegas' token scores: plain, slow, complete."""

from __future__ import annotations

import torch


def attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    starts: torch.Tensor,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention weights of every query over every slot, and the raw products `q . k`.

    Args:
        query (`torch.Tensor` of shape `[n, h_q, m, d]`): queries; row j's query i has the position `starts[j] + i`.
        key (`torch.Tensor` of shape `[n, h_kv, S, d]`): row j's token at position p in slot p; query head h reads
            key head `h // (h_q / h_kv)`.
        starts (`torch.Tensor` of shape `[n]`, int64): position of each row's first query.
        scaling, window, softcap, sinks: as in `AttentionRules`; with sinks the weights sum to less than 1.

    Returns:
        `tuple` of two `torch.Tensor` of shape `[n, h_q, m, S]`, float32 (float64 for float64 inputs).
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    groups = query.shape[1] // key.shape[1]
    key = key.to(dtype).repeat_interleave(groups, dim=1)
    raw = query.to(dtype) @ key.transpose(-1, -2)
    scores = raw * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    positions = starts[:, None, None, None] + torch.arange(query.shape[2], device=query.device)[:, None]
    slots = torch.arange(key.shape[2], device=query.device)
    visible = slots <= positions
    if window is not None:
        visible = visible & (slots > positions - window)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        extra = sinks.to(dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.softmax(torch.cat([scores, extra], dim=-1), dim=-1)[..., :-1], raw
    return torch.softmax(scores, dim=-1), raw


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, **rules: object
) -> torch.Tensor:
    """Return the attention output `[n, h_q, m, d_v]`, in the query's dtype; arguments as for `attention_weights`."""
    weights, _ = attention_weights(query, key, starts, **rules)  # type: ignore[arg-type]
    value = value.to(weights.dtype).repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return (weights @ value).to(query.dtype)


def token_scores(
    weights: torch.Tensor,
    raw: torch.Tensor,
    last: torch.Tensor,
    *,
    queries: str,
    metric: str,
    key_heads: int | None = None,
) -> torch.Tensor:
    """Return Vegas' importance of each slot, the mean over query heads and chosen queries (arXiv 2602.07223).

    Args:
        weights, raw (`torch.Tensor` of shape `[n, h_q, m, S]`): from `attention_weights`.
        last (`torch.Tensor` of shape `[n]`, int64): index of each row's last real query.
        queries, metric: as in `ScoreRequest`.
        key_heads (`int`, *optional*): keep the key heads apart, each the mean over its own query heads.

    Returns:
        `torch.Tensor` of shape `[n, S]`, or `[n, key_heads, S]`. With `"logit"`, slots that a query may not read are
        not marked; the caller chooses among those that both rows may read.
    """
    index = torch.arange(weights.shape[2], device=weights.device)
    chosen = {
        "first_last": (index == 0) | (index == last[:, None]),
        "last": index == last[:, None],
        "all": index <= last[:, None],
    }[queries]
    source = weights if metric == "weight" else raw
    share = chosen.to(source.dtype) / chosen.sum(dim=1, keepdim=True)
    per_head = torch.einsum("nhms,nm->nhs", source, share)
    if key_heads is None:
        return per_head.mean(dim=1)
    return per_head.unflatten(1, (key_heads, -1)).mean(dim=2)
