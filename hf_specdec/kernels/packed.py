"""Attention through `scaled_dot_product_attention`, the query group packed as rows; token scores by a second product.

Used on CUDA, and for many queries at once (a second turn's prompt), where a score tensor for all of them would be too
large.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .explicit import token_scores
from .request import ScoreRequest
from .step import Step


def cached_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    step: Step,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    score: ScoreRequest | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend over the cache's storage; arguments and results as for `explicit.cached_attention`.

    Raises:
        ValueError: with `softcap` or `sinks`, which the fused operation can't apply.
    """
    if softcap is not None or sinks is not None:
        raise ValueError("`scaled_dot_product_attention` supports neither a soft-cap nor sinks.")
    n, heads, m, size = query.shape
    key_heads = key.shape[1]
    first = 0 if window is None else max(0, step.low + 1 - window)
    keys, values = key[:, :, first : step.high], value[:, :, first : step.high]
    visible = None
    if m > 1 or not step.uniform or window is not None:
        # rows of the packed group are (group, query), so the mask repeats per group
        visible = step.memo(
            ("visible", first, window, query.device),
            lambda: (
                ~step.hidden_slots(first, step.high, window, query.device)[:, None].repeat(1, 1, heads // key_heads, 1)
            ),
        )
    packed = query.reshape(n, key_heads, -1, size)
    output = torch.nn.functional.scaled_dot_product_attention(packed, keys, values, attn_mask=visible, scale=scaling)
    metric = None if score is None else _recomputed_scores(packed, keys, visible, step, scaling, score, m)
    return output.reshape(n, heads, m, -1), metric


def _recomputed_scores(
    packed: torch.Tensor,
    keys: torch.Tensor,
    visible: torch.Tensor | None,
    step: Step,
    scaling: float,
    score: ScoreRequest,
    m: int,
) -> torch.Tensor:
    """Return the token scores from one more product over the keys (the fused operation keeps its own to itself)."""
    dtype = torch.float64 if packed.dtype == torch.float64 else torch.float32
    raw = (packed @ keys.transpose(-1, -2)).to(dtype)
    if score.metric == "logit":
        return token_scores(raw.unflatten(2, (-1, m)), step, score)
    scores = raw * scaling
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return token_scores(torch.softmax(scores, dim=-1).unflatten(2, (-1, m)), step, score)


def in_pieces(
    attention: Callable[..., tuple[torch.Tensor, torch.Tensor | None]], size: int
) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """Return `attention` run over at most `size` queries at a time, to bound its score tensor."""

    def run(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: Step, **rules: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if rules.get("score") is not None:
            raise ValueError("Token scores are taken from forwards of few tokens only.")
        outputs = []
        for begin in range(0, query.shape[2], size):
            part = query[:, :, begin : begin + size]
            piece = Step([start + begin for start in step.starts], part.shape[2], query.device)
            outputs.append(attention(part, key, value, piece, **rules)[0])
        return torch.cat(outputs, dim=2), None

    return run
