"""`Request`: what an attention is asked for, which every kernel judges by itself; and `ScoreRequest`, a part of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class ScoreRequest(NamedTuple):
    """Which token scores an attention returns beside its output.

    Attributes:
        queries (`str`): query rows that count: `"first_last"` (the two may be one and the same), `"last"`, or `"all"`
            up to the last real one.
        metric (`str`): the mean of the attention `"weight"`, or of the raw products, `"logit"`.
        per_head (`bool`): keep the key heads apart, each the mean over its own query heads.
    """

    queries: str = "first_last"
    metric: str = "weight"
    per_head: bool = False


class Request(NamedTuple):
    """What an attention is asked for.

    Attributes:
        device (`str`): type of the device.
        dtype (`torch.dtype`): of query, keys and values.
        size (`int`): head size of query and keys.
        value_size (`int`): head size of the values.
        queries (`int`): queries per row.
        softcap, sinks (`bool`): whether the scores have a cap, or the softmax learned sinks.
        score (`ScoreRequest`, *optional*): token scores that are wanted.
    """

    device: str
    dtype: torch.dtype
    size: int
    value_size: int
    queries: int = 1
    softcap: bool = False
    sinks: bool = False
    score: ScoreRequest | None = None

    @classmethod
    def read(cls, query: torch.Tensor, value: torch.Tensor, rules: dict[str, Any]) -> Request:
        """Return the request that tensors `[n, h, m, d]` and the keywords of an attention make."""
        return cls(
            query.device.type,
            query.dtype,
            query.shape[3],
            value.shape[3],
            query.shape[2],
            rules.get("softcap") is not None,
            rules.get("sinks") is not None,
            rules.get("score"),
        )
