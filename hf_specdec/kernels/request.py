"""What a forward, and each attention in it, is asked for beside tokens: records, and protocols of those who watch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from .address import Address


class ScoreRequest(NamedTuple):
    """Which token scores an attention returns beside its output.

    Attributes:
        queries (`str`): queries that count: `"first_last"` (the two may be one and the same), `"last"`, or `"all"`
            up to the last real one.
        metric (`str`): the mean of the attention `"weight"`, or of the raw products, `"logit"`.
        per_head (`bool`): keep the key heads apart, each the mean over its own query heads.
    """

    queries: str = "first_last"
    metric: str = "weight"
    per_head: bool = False


class AttentionRules(NamedTuple):
    """How an attention weighs what it reads, and whether it returns scores.

    Attributes:
        scaling (`float`): factor on the products.
        window (`int`, *optional*): a query at position i reads the positions `(i - window, i]`; `None` for `[0, i]`.
        softcap (`float`, *optional*): scores become `softcap * tanh(score / softcap)` (Gemma-2).
        sinks (`torch.Tensor` of shape `[h_q]`, *optional*): a learned logit per head that takes part in the softmax
            and attends to nothing (gpt-oss).
        score (`ScoreRequest`, *optional*): the token scores to return.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    score: ScoreRequest | None = None


class Request(NamedTuple):
    """What a kernel must be able to do for an attention; every kernel judges by itself whether it can.

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
    def read(cls, query: torch.Tensor, value: torch.Tensor, rules: AttentionRules) -> Request:
        """Return the request that tensors `[n, h, m, d]` and the rules of an attention make."""
        capped, sinks = rules.softcap is not None, rules.sinks is not None
        size, queries = query.shape[3], query.shape[2]
        return cls(query.device.type, query.dtype, size, value.shape[3], queries, capped, sinks, rules.score)


class SideRange(NamedTuple):
    """What each row reads of a side buffer: the columns `[0, counts[j])` and `[selected, ends[j])`.

    Attributes:
        counts (`torch.Tensor` of shape `[n]`, int64): end of the first range.
        ends (`torch.Tensor` of shape `[n]`, int64): end of the second.
        selected (`int`): where the second begins.
        whole (`bool`): whether all rows are known to read all columns.
    """

    counts: torch.Tensor
    ends: torch.Tensor
    selected: int
    whole: bool = False


class DraftView(Protocol):
    """A side store that draft forwards read instead of the cache's layers (`cache.sparse.SparseView`)."""

    def covers(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` reads the view in a draft forward."""

    def append(self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store one draft token's keys and values and return those that it attends to."""

    def reads(self, device: torch.device) -> SideRange:
        """Return which columns of what `append` returned each row reads, in any layer."""


class ScoreSink(Protocol):
    """Takes the scores of one layer's cached tokens, those that its `request` names, during a target forward."""

    request: ScoreRequest

    def begin(self, starts: Sequence[int], last: Sequence[int]) -> None:
        """Prepare for a forward; per row the position of its first token and the index of its last real query."""

    def wants(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` is to be scored."""

    def take(
        self, layer_idx: int, metric: torch.Tensor, address: Address, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Receive `metric` `[n, S]` (or `[n, h_kv, S]`), float32, and the layer's storage `[n, h_kv, capacity, d]`.

        Entries of `metric` that a row may not choose are undefined.
        """

    def finish(self, address: Address) -> None:
        """Learn that every layer has run."""


class ForwardRequest(NamedTuple):
    """What a forward is asked beside its tokens.

    Attributes:
        score (`ScoreSink`, *optional*): takes the attention of the two scored queries.
        last (`list[int]`, *optional*): per row, the index of its last real query when it is scored; by default the
            last token's.
        view (`DraftView`, *optional*): read instead of the cache by the layers that it covers.
        hidden (`bool`): whether the LM head's input is returned too.
    """

    score: ScoreSink | None = None
    last: Sequence[int] | None = None
    view: DraftView | None = None
    hidden: bool = False


TOKENS_ONLY = ForwardRequest()
"""The request of a forward that is asked for nothing more."""
