"""`Request`: what an attention is asked for, which every kernel judges by itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Request(NamedTuple):
    """What an attention is asked for.

    Attributes:
        device (`str`): type of the device.
        dtype (`torch.dtype`): of query, keys and values.
        size (`int`): head size of query and keys.
        value_size (`int`): head size of the values.
        queries (`int`): queries per row.
        softcap, sinks (`bool`): whether the scores have a cap, or the softmax learned sinks.
        score (`tuple[str, str, bool]`, *optional*): token scores that are wanted; see `explicit.cached_attention`.
    """

    device: str
    dtype: torch.dtype
    size: int
    value_size: int
    queries: int = 1
    softcap: bool = False
    sinks: bool = False
    score: tuple[str, str, bool] | None = None

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
