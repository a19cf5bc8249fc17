"""`SideBuffers`: copies of the keys and values that were chosen, per layer `[rows, h_kv, width, d]`."""

from __future__ import annotations

from typing import Any

import torch

from ..kernels import choice
from ..kernels.request import Request
from .speculative import exchange


Storage = tuple[torch.Tensor, torch.Tensor]


class SideBuffers:
    """The layers' side buffers, and what fills them from the layers' storage.

    Args:
        rows (`int`): rows of the batch.
        kernels (`str`): which implementation copies, as for attention; see `kernels.choice`.

    Attributes:
        keys, values (`dict[int, torch.Tensor]`): per layer its buffers.
    """

    def __init__(self, rows: int, kernels: str) -> None:
        self.rows, self.kernels = rows, kernels
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self._tables: dict[Any, tuple[list[int], Any]] = {}

    def reserve(self, width: int) -> None:
        """Drop the buffers if they have fewer than `width` columns."""
        if self.keys and next(iter(self.keys.values())).shape[2] < width:
            self.keys.clear()
            self.values.clear()
            self._tables.clear()

    def allocate(self, layer_idx: int, storage: Storage, width: int) -> None:
        """Make a layer's buffers, for keys and values like its `storage`: zeros, as padding is read and masked."""
        for sides, states in zip((self.keys, self.values), storage, strict=True):
            sides[layer_idx] = states.new_zeros(self.rows, states.shape[1], width, states.shape[-1])

    def at_once(self, keys: torch.Tensor) -> bool:
        """Whether all layers are copied together: by Triton, where a launch costs more than a copy."""
        return choice.uses_triton(self.kernels, Request(keys.device.type, keys.dtype, keys.shape[3], keys.shape[3]))

    def fill(self, slots: dict[int, torch.Tensor], storages: dict[int, Storage]) -> None:
        """Copy `slots` `[n, w]` (or `[n, h_kv, w]`) of each layer's storage `[n, h_kv, C, d]` to its first columns."""
        if storages and self.at_once(next(iter(storages.values()))[0]):
            self._fill_at_once(slots, storages)
            return
        for layer_idx, picked in slots.items():
            storage = storages[layer_idx]
            index = flat_index(picked, storage[0])
            for side, states in zip((self.keys[layer_idx], self.values[layer_idx]), storage, strict=True):
                gather_slots(states, index, side[: len(picked), :, : picked.shape[-1]])

    def _fill_at_once(self, slots: dict[int, torch.Tensor], storages: dict[int, Storage]) -> None:
        from ..kernels import triton_select  # triton is optional

        groups: dict[Any, list[int]] = {}
        for layer_idx, (keys, _) in storages.items():
            groups.setdefault((keys.device, keys.shape[1]), []).append(layer_idx)
        for group, layers in groups.items():
            sources = [states for layer_idx in layers for states in storages[layer_idx]]
            targets = [side for layer_idx in layers for side in (self.keys[layer_idx], self.values[layer_idx])]
            pointers = [states.data_ptr() for states in (*sources, *targets)]
            # addresses are sent to the device only when they change, which they don't inside a captured forward
            if self._tables.get(group, (None, None))[0] != pointers:
                self._tables[group] = pointers, triton_select.addresses(sources, targets)
            stacked = torch.stack([slots[layer_idx] for layer_idx in layers])
            table = self._tables[group][1]
            triton_select.gather_layers(sources, targets, stacked, heads=group[1], table=table)

    def swap(self, i: int, j: int) -> None:
        """Exchange the active rows i and j."""
        for side in (*self.keys.values(), *self.values.values()):
            exchange(side, i, j)


def flat_index(slots: torch.Tensor, storage: torch.Tensor) -> torch.Tensor:
    """Return where slots lie in the flat table `[n * h_kv * C, d]` that a storage is.

    Args:
        slots (`torch.Tensor` of shape `[n, w]` or `[n, h_kv, w]`, int64): slots.
        storage (`torch.Tensor` of shape `[n, h_kv, C, d]`): contiguous.

    Returns:
        `torch.Tensor` of shape `[n * h_kv * w]`, int64.
    """
    n, heads, capacity, _ = storage.shape
    bases = torch.arange(n * heads, device=slots.device).view(n, heads, 1) * capacity
    return ((slots[:, None] if slots.dim() == 2 else slots) + bases).flatten()


def gather_slots(storage: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    """Copy chosen tokens out of a layer's storage.

    Args:
        storage (`torch.Tensor` of shape `[n, h_kv, C, d]`): contiguous.
        index (`torch.Tensor` of shape `[n * h_kv * w]`, int64): from `flat_index`.
        out (`torch.Tensor` of shape `[n, h_kv, w, d]`): destination, any strides.
    """
    # whole vectors of a flat table: twenty times faster on CPU than `gather` with an expanded index
    flat = storage.view(-1, storage.shape[-1]).index_select(0, index)
    out.copy_(flat.view(*storage.shape[:2], -1, storage.shape[-1]))
