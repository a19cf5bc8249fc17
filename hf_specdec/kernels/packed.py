"""Attention through `scaled_dot_product_attention`, the query group packed as rows; token scores by a second product.

Used on CUDA, and for many queries at once (a second turn's prompt), where a score tensor for all of them would be too
large.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch

from .address import Address
from .explicit import token_scores
from .request import AttentionRules, ScoreRequest


Attention = Callable[..., "tuple[torch.Tensor, torch.Tensor | None]"]
"""A function with the arguments and results of `explicit.cached_attention`."""


def cached_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, address: Address, rules: AttentionRules
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend over the cache's storage; arguments and results as for `explicit.cached_attention`.

    Raises:
        ValueError: with `softcap` or `sinks`, which the fused operation can't apply.
    """
    if rules.softcap is not None or rules.sinks is not None:
        raise ValueError("`scaled_dot_product_attention` supports neither a soft-cap nor sinks.")
    n, heads, m, size = query.shape
    key_heads, window, scaling = key.shape[1], rules.window, rules.scaling
    first = 0 if window is None else max(0, address.low + 1 - window)
    keys, values = key[:, :, first : address.high], value[:, :, first : address.high]
    visible = None
    if m > 1 or not address.uniform or window is not None:
        # rows of the packed group are (group, query), so the mask repeats per group
        visible = address.visible(first, window, heads // key_heads, query.device)
    packed = query.reshape(n, key_heads, -1, size)
    output = torch.nn.functional.scaled_dot_product_attention(packed, keys, values, attn_mask=visible, scale=scaling)
    metric = None if rules.score is None else _recomputed_scores(packed, keys, visible, address, rules, m)
    return output.reshape(n, heads, m, -1), metric


def _recomputed_scores(
    packed: torch.Tensor,
    keys: torch.Tensor,
    visible: torch.Tensor | None,
    address: Address,
    rules: AttentionRules,
    m: int,
) -> torch.Tensor:
    """Return the token scores from one more product over the keys (the fused operation keeps its own to itself)."""
    dtype = torch.float64 if packed.dtype == torch.float64 else torch.float32
    raw = (packed @ keys.transpose(-1, -2)).to(dtype)
    score = cast(ScoreRequest, rules.score)
    if score.metric == "logit":
        return token_scores(raw.unflatten(2, (-1, m)), address, score)
    scores = raw * rules.scaling
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return token_scores(torch.softmax(scores, dim=-1).unflatten(2, (-1, m)), address, score)


def in_pieces(attention: Attention, size: int) -> Attention:
    """Return `attention` run over at most `size` queries at a time, to bound its score tensor."""

    def run(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, address: Address, rules: AttentionRules
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if rules.score is not None:
            raise ValueError("Token scores are taken from forwards of few tokens only.")
        outputs = []
        for first in range(0, query.shape[2], size):
            part = query[:, :, first : first + size]
            piece = Address([start + first for start in address.starts], part.shape[2])
            outputs.append(attention(part, key, value, piece, rules)[0])
        return torch.cat(outputs, dim=2), None

    return run
