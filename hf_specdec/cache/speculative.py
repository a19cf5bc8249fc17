"""`SpeculativeCache`: ragged, grown with the text, and rolled back by changing lengths.

Row j's token at position p has its keys and values in slot p of row j: prompts are stored without padding. A forward
writes the tokens that it is fed at their slots, overwriting whatever a rejected draft left there, and attention reads
slots up to each query's own position. So rollback and commit move no data, and lengths are per row and per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from .. import _compat
from ..kernels.address import Address, upload
from ..kernels.explicit import GRAIN
from ..kernels.request import TOKENS_ONLY, ForwardRequest
from ..kernels.step import Step


_COARSE = 1024
"""Least slots of storage that grows by doubling."""


class SpeculativeLayer(CacheLayerMixin):
    """Keys and values of one layer, `[rows, h_kv, capacity, d]`, and the tokens that each active row has in it.

    Args:
        rows (`int`): rows of the batch.
        capacity (`int`): slots per row.
        window (`int`, *optional*): sliding window; its tokens are all kept and masked when they are read.
    """

    is_croppable = True
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, rows: int, capacity: int, window: int | None) -> None:
        super().__init__()
        self.rows, self.capacity, self.window = rows, capacity, window
        self.is_sliding = window is not None
        self.lengths: torch.Tensor = torch.zeros(rows, dtype=torch.int64)
        self.longest = 0  # of `lengths`, known to the host

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate zeroed storage of the first states' head counts, head sizes, dtype and device."""
        self.device = key_states.device
        # zeros, not empty memory: a masked NaN still poisons a product of probabilities and values
        self.keys, self.values = (
            states.new_zeros(self.rows, states.shape[1], self.capacity, states.shape[-1])
            for states in (key_states, value_states)
        )
        self.lengths = self.lengths.to(self.device)
        self.is_initialized = True

    def grow(self, capacity: int) -> None:
        """Make the storage of `capacity` slots per row, if it has fewer; frees the old keys before new values come."""
        if capacity <= self.capacity:
            return
        self.capacity = capacity
        for name in ("keys", "values") if self.is_initialized else ():
            old = getattr(self, name)
            new = old.new_empty(self.rows, old.shape[1], capacity, old.shape[-1])
            new[:, :, : old.shape[2]] = old
            new[:, :, old.shape[2] :] = 0
            setattr(self, name, new)
            del old

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, address: Address, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the fed tokens' states `[n, h_kv, width, d]` to their slots and return the active rows' storage."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.keys[: address.rows], self.values[: address.rows]
        if address.uniform:
            keys[:, :, address.low : address.high] = key_states
            values[:, :, address.low : address.high] = value_states
        else:
            rows, slots = torch.arange(address.rows, device=self.device)[:, None], address.write_slots_on(self.device)
            keys[rows, :, slots] = key_states.transpose(1, 2)
            values[rows, :, slots] = value_states.transpose(1, 2)
        self.lengths, self.longest = address.ends_on(self.device), address.high
        return keys, values

    def swap(self, i: int, j: int) -> None:
        """Exchange the rows i and j."""
        if self.is_initialized:
            for states in (self.keys, self.values):
                exchange(states, i, j)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (keys, offset of the first key) of a mask; only a prefill, where all rows agree, asks for one."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Return the longest row's length: stock code asks for one number, at every forward."""
        return self.longest

    def get_max_length(self) -> int:
        """Return -1: the layer grows when needed."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest `-tokens_to_remove` tokens of every row (stock's sign: a count to remove, negative)."""
        self.lengths = (self.lengths - abs(tokens_to_remove)).clamp(min=0)
        self.longest = max(0, self.longest - abs(tokens_to_remove))


def exchange(states: torch.Tensor, i: int, j: int) -> None:
    """Exchange two rows of `states` in place; without a list of indices, which a device would be sent and wait for."""
    kept = states[i].clone()
    states[i].copy_(states[j])
    states[j].copy_(kept)


class SpeculativeCache(Cache):
    """Storage under every strategy: one `SpeculativeLayer` per decoder layer.

    Args:
        windows (`list[int | None]`): per layer its sliding window, `None` for full attention.
        rows (`int`): rows of the batch.
        limit (`int`): slots per row that the text can need. Storage grows with the text, up to whole grains above
            this limit (or what is needed, if that is more).
        kernels (`str`, *optional*, defaults to `"auto"`): what attends; see `kernels.choice`.

    Attributes:
        own (`list[SpeculativeLayer]`): the layers whose storage grows with the text; all of them.
        step (`Step`, *optional*): what the forward in progress does.
        coarse (`bool`): grow seldom, as forwards have to be captured again after it: to powers of two from `_COARSE`
            slots on, else to a sixteenth more than is needed. So there are at most twice the slots in use, or
            `_COARSE` or `GRAIN`.
        spare (`int`): slots past the tokens that are never read.
        exact_slices (`bool`): `update` returns only slots in use. Stock attention reads all that it gets, so a prefill
            sets it; the package's own attention takes the whole storage and masks it, which is faster.
    """

    layers: list[SpeculativeLayer]  # type: ignore[assignment]

    def __init__(self, windows: Sequence[int | None], rows: int, limit: int, kernels: str = "auto") -> None:
        super().__init__(layers=[SpeculativeLayer(rows, 0, window) for window in windows])
        self.rows, self.own, self.limit = rows, self.layers, limit
        self.coarse, self.spare = False, 0
        self.step: Step | None = None
        self.exact_slices = False
        self.kernels = kernels

    def begin(self, address: Address, request: ForwardRequest = TOKENS_ONLY) -> Step:
        """Prepare for a forward, growing the storage where needed, and return its step."""
        self.reserve(address.high)
        return self.attach(address, request)

    def reserve(self, slots: int) -> None:
        """Make room for `slots` tokens per row, layer by layer, so that one layer at a time is there twice."""
        slots += self.spare
        if min(layer.capacity for layer in self.own) >= slots:
            return
        # Plain torch attention on CPU reads all slots of the storage, every step: an eighth more than the text made a
        # plain step of SmolLM2 at 4,000 tokens 5 % slower. A sixteenth costs half of that just after growing; the
        # copies, of which finer growth makes more, cost 0.1 % at batch 1 and 0.5 % at batch 4. Kernels on CUDA read
        # the text only, but its allocator can't use freed blocks for larger ones.
        capacity = max(_COARSE, 1 << (slots - 1).bit_length()) if self.coarse else slots + slots // 16
        # products over a multiple of 64 slots are the fastest: on CPU an odd number costs a plain step some 4 %
        capacity = -(-min(capacity, max(slots, self.limit)) // GRAIN) * GRAIN
        self.step = None  # it holds the storage of the layer that has written last
        for layer in self.own:
            layer.grow(capacity)

    def attach(self, address: Address, request: ForwardRequest = TOKENS_ONLY) -> Step:
        """Return the step of a forward for which there is room, and make it the one in progress."""
        self.step = step = Step(address, request, self.kernels)
        return step

    @property
    def windows(self) -> list[int | None]:
        """Per layer its sliding window."""
        return [layer.window for layer in self.layers]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store what the current step feeds and return what it reads (see `Step`)."""
        step = self.step
        if step is None:
            raise RuntimeError("The cache was written outside a forward that the decoding loop began.")
        step.layers_seen += 1
        if step.view is not None and step.view.covers(layer_idx):
            return step.view.append(layer_idx, key_states, value_states)
        keys, values = step.storage = self.layers[layer_idx].update(key_states, value_states, step.address)
        if self.exact_slices:
            return keys[:, :, : step.address.high], values[:, :, : step.address.high]
        return keys, values

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Say that every layer holds `lengths[i]` tokens of active row i: the whole of rollback and commit."""
        tensors: dict[torch.device, torch.Tensor] = {}
        for layer in self.layers:
            device = layer.lengths.device
            if device not in tensors:
                tensors[device] = upload(lengths, device)
            layer.lengths, layer.longest = tensors[device], max(lengths, default=0)

    def swap(self, i: int, j: int) -> None:
        """Exchange the rows i and j in every layer."""
        for layer in self.layers:
            layer.swap(i, j)

    def shrink(self, rows: int) -> None:
        """Do nothing: a forward names its rows, and finished ones are read again before the cache is returned."""

    def load(self, source: Any, columns: torch.Tensor, counts: Sequence[int], width: int, rows: Sequence[int]) -> None:
        """Copy a stock cache's prefix.

        Args:
            source (`DynamicCache`): holds `width` columns per row, in stock's padded layout.
            columns (`torch.Tensor` of shape `[n, max(counts)]`, int64): the source column of each row's p-th token;
                past a row's count the value does not matter.
            counts (`list[int]`): tokens to take per row.
            width (`int`): columns that the source has seen.
            rows (`list[int]`): the source's row for each of the n rows.
        """
        longest = max(counts)
        self.reserve(longest)
        for layer, old in zip(self.layers, source.layers, strict=True) if longest else ():
            if not layer.is_initialized:
                layer.lazy_initialization(old.keys, old.values)
            first = width - old.keys.shape[2]  # a sliding layer has dropped the columns before this one
            index = (columns.to(old.keys.device) - first).clamp(min=0)[:, None, :, None]
            for name in ("keys", "values"):
                states = getattr(old, name)[list(rows)]
                picked = states.gather(2, index.expand(-1, states.shape[1], -1, states.shape[-1]))
                getattr(layer, name)[: len(rows), :, :longest] = picked
        self.set_lengths(counts)

    def store(self, target: Any, slots: torch.Tensor, rows: Sequence[int]) -> None:
        """Write the cache into `target` in stock's padded layout.

        Args:
            target (`DynamicCache`): an empty or older cache of the same model; its content is replaced.
            slots (`torch.Tensor` of shape `[b, width]`, int64): the slot that each column of a row comes from,
                negative for padding.
            rows (`list[int]`): the storage row of each of the b rows.
        """
        for new, layer in zip(target.layers, self.layers, strict=True):
            index = slots.to(layer.keys.device)
            order = torch.tensor(rows, device=layer.keys.device)
            found = []
            for states in (layer.keys, layer.values):
                picked = states[order].gather(
                    2, index.clamp(min=0)[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[-1])
                )
                found.append(picked.masked_fill_(index[:, None, :, None] < 0, 0))
            _compat.fill_dynamic_layer(new, found[0], found[1], slots.shape[1])
