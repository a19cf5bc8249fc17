"""Attention as one opaque operation, for forwards that `torch.compile` compiles: it runs as it is written, uncompiled.

A compiled forward may not depend on Python objects that change from run to run. So it gets the *number* of an `Entry`
in place of a step, and an empty cache; the operation looks the entry up, writes the real cache and attends, exactly as
an uncompiled forward does. Everything around it, which is where the weights are, is compiled.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from transformers.cache_utils import Cache

from .choice import attend_layer
from .step import Step


class Entry:
    """A cache and the step in progress, under a number that a compiled forward can carry.

    Args:
        cache (`SpeculativeCache`): where the operation writes.

    Attributes:
        step (`Step`, *optional*): set before every forward.
        number (`torch.Tensor`, int64, no dimensions, on the CPU): what the forward is given as `specdec_step`.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.step: Step | None = None
        key = next(_count)
        self.number = torch.tensor(key)
        _entries[key] = self


_count = itertools.count(1)
_entries: weakref.WeakValueDictionary[int, Entry] = weakref.WeakValueDictionary()


class EmptyCache(Cache):
    """Stands in for the cache inside a compiled forward: has no layers, and returns what it is given.

    Args:
        windows (`list[int | None]`): per layer its sliding window; only whether there is one is ever read.
    """

    def __init__(self, windows: list[int | None]) -> None:
        super().__init__(layers=[])
        self.sliding = [window is not None for window in windows]

    @property
    def is_sliding(self) -> list[bool]:
        """Whether each layer has a sliding window."""
        return self.sliding

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the states as they are."""
        return key_states, value_states


@torch.library.custom_op("hf_specdec::attend", mutates_args=())
def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    number: torch.Tensor,
    layer_idx: int,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Return the attention `[n, h_q, m, d_v]` of an entry, whose cache is written first.

    Args:
        query (`torch.Tensor` of shape `[n, h_q, m, d]`): queries of the fed tokens.
        key (`torch.Tensor` of shape `[n, h_kv, m, d]`): their keys, not yet in the cache.
        value (`torch.Tensor` of shape `[n, h_kv, m, d_v]`): their values.
        number (`torch.Tensor`, int64): of an `Entry`.
        layer_idx (`int`): the layer.
        scaling, softcap, sinks: as in `AttentionRules`.
    """
    entry = _entries[int(number)]
    step = entry.step
    if step is None:
        raise RuntimeError("A compiled forward ran outside the decoding loop.")
    n, m = step.address.rows, step.address.width
    keys, values = entry.cache.update(key[:n, :, :m], value[:n, :, :m], layer_idx)
    output = attend_layer(query[:n, :, :m], keys, values, step, layer_idx, scaling, softcap, sinks)
    missing = (0, 0, 0, query.shape[2] - m, 0, 0, 0, query.shape[0] - n)
    return torch.nn.functional.pad(output, missing).contiguous() if any(missing) else output.contiguous()


@attend.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any) -> torch.Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])
