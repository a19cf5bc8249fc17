"""`SparseView`: the few keys and values per layer that sparse drafts read, gathered once per verification.

Per covered layer a side buffer `[rows, h_kv, width, d]` with two parts:

    columns [0, selected)        the chosen tokens, one list per row (or per row and key head), padded to the longest
    columns [selected, ...)      recents: the token at position `valid + j` in column `selected + j`

A verification forward fills the first part from the scores, and copies the tokens that it was fed after the pending
one into the second. A draft step adds its own token to the second part; a rejected token's column is simply written
again. So nothing in the cache's own storage is touched by drafts, every row writes the column of its position, and
drafting never reads O(S) data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..kernels.address import Address, once, upload
from ..kernels.request import SideRange
from .selection import Selector
from .side import SideBuffers, Storage
from .speculative import SpeculativeCache, exchange


class ChosenView:
    """What a selector chose of a cache: the part of a view that does not depend on how its buffers are read.

    A view is the `ScoreSink` of target forwards and the `DraftView` of draft forwards. Layers with a sliding window
    are left out: they read the cache.

    Args:
        cache (`SpeculativeCache`): the storage that it views.
        selector (`Selector`): which tokens are chosen.
        recents (`int`): columns of the second part, at least twice the draft length plus one.

    Attributes:
        valid, counts (`list[int]`): the selector's.
        chosen (`dict[int, torch.Tensor]`): per layer the chosen positions, `[n, selected]` or `[n, h_kv, selected]`.
        keys, values (`dict[int, torch.Tensor]`): per layer the side buffers.
        selections (`int`): layers' selections made so far.
    """

    def __init__(self, cache: SpeculativeCache, selector: Selector, recents: int) -> None:
        self.selector, self.recents, self.request = selector, recents, selector.request
        self.valid, self.counts = selector.valid, selector.counts
        self.covered = [layer.window is None for layer in cache.layers]
        self.buffers = SideBuffers(cache.rows, cache.kernels)
        self.keys, self.values = self.buffers.keys, self.buffers.values
        self.chosen: dict[int, torch.Tensor] = {}
        self.waiting: dict[int, Storage] = {}
        self.selections = 0
        self.columns: list[int] = []
        self.ends: list[int] = []

    @property
    def selected(self) -> int:
        """Columns of the first part."""
        return self.selector.selected

    def begin(self, starts: Sequence[int], last: Sequence[int]) -> None:
        """Prepare for a target forward."""
        self.selector.begin(starts, last)
        self.selections += sum(self.covered)

    def covers(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` is scored in target forwards, and reads the view in draft forwards."""
        return self.covered[layer_idx]

    wants = covers

    def gather(self, address: Address) -> None:
        """Copy what was chosen for the layers that wait, and the tokens that were fed after the first."""
        waiting, self.waiting = self.waiting, {}
        fed, slots = min(address.width - 1, self.recents), {}
        for layer_idx in waiting:
            chosen = slots[layer_idx] = self.chosen[layer_idx]
            if fed:
                recent = address.positions_on(chosen.device)[:, 1 : 1 + fed]
                recent = recent[:, None].expand(-1, chosen.shape[1], -1) if chosen.dim() == 3 else recent
                slots[layer_idx] = torch.cat([chosen, recent], dim=-1)
        self.buffers.fill(slots, waiting)

    def fresh(self, index: int, position: int) -> bool:
        """Whether active row `index` may draft from `position` on: the last forward before it made the selection."""
        return 0 < self.valid[index] <= position and position - self.valid[index] <= self.recents // 2

    def place(self, positions: Sequence[int]) -> None:
        """Say at which position each active row's next draft token stands; its column follows.

        A row that is not `fresh` writes the last column: its draft is computed for the batch's sake and never used.
        """
        n, last = len(positions), self.recents - 1
        self.columns = [
            self.selected + min(p - valid, last) for p, valid in zip(positions, self.valid[:n], strict=True)
        ]
        self.ends = [column + 1 for column in self.columns]

    def swap(self, i: int, j: int) -> None:
        """Exchange the active rows i and j."""
        self.selector.swap(i, j)
        self.buffers.swap(i, j)
        for layer_idx, chosen in self.chosen.items():
            if max(i, j) < len(chosen):
                self.chosen[layer_idx] = chosen = chosen.contiguous()  # one list may stand for all key heads
                exchange(chosen, i, j)

    def shrink(self, rows: int) -> None:
        """Forget what is known of the rows from number `rows` on, which have finished; the buffers keep their rows."""
        self.selector.shrink(rows)
        self.chosen = {layer_idx: chosen[:rows] for layer_idx, chosen in self.chosen.items()}


class SparseView(ChosenView):
    """The draft view of a cache whose buffers are as wide as what was chosen.

    Args:
        cache, selector, recents: as for `ChosenView`.
        timed (`Callable[[], AbstractContextManager]`, *optional*): returns a context around each layer's selection.
    """

    def __init__(
        self,
        cache: SpeculativeCache,
        selector: Selector,
        recents: int,
        timed: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        super().__init__(cache, selector, recents)
        self.timed = timed
        self.made: dict[Any, Any] = {}

    def begin(self, starts: Sequence[int], last: Sequence[int]) -> None:
        """Prepare for a target forward, dropping buffers that are too narrow for what it chooses."""
        super().begin(starts, last)
        self.buffers.reserve(self.selected + self.recents)

    def take(
        self, layer_idx: int, metric: torch.Tensor, address: Address, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Choose the layer's tokens by `metric` `[n, S]` (or `[n, h_kv, S]`) and gather them from its storage."""
        with self.timed():
            self.chosen[layer_idx] = self.selector.choose(metric)
            if layer_idx not in self.keys:
                # room for the context to grow a while before the next allocation
                width = self.selected + self.selected // 4 + self.recents + 16
                self.buffers.allocate(layer_idx, (keys, values), width)
            self.waiting[layer_idx] = keys, values
            if not self.buffers.at_once(keys):
                self.gather(address)  # while the layer's keys are in the processor's cache

    def finish(self, address: Address) -> None:
        """Gather what is still to be gathered."""
        with self.timed():
            self.gather(address)

    def place(self, positions: Sequence[int]) -> None:
        """Say at which position each active row's next draft token stands."""
        super().place(positions)
        self.made.clear()

    def append(self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one draft token's states `[n, h_kv, 1, d]` and return the columns in use, `[n, h_kv, w, d]`."""
        n, end = keys.shape[0], max(self.ends)
        same = min(self.ends) == end
        sides = self.keys[layer_idx], self.values[layer_idx]
        for side, states in zip(sides, (keys, values), strict=True):
            if same:
                side[:n, :, end - 1 : end] = states
            else:
                rows, columns = self._written(keys.device)
                side[rows, :, columns] = states[:, :, 0]
        return sides[0][:n, :, :end], sides[1][:n, :, :end]

    @once
    def _written(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each row's number and the column that it writes."""
        rows, columns = upload([list(range(len(self.columns))), self.columns], device)
        return rows, columns

    @once
    def reads(self, device: torch.device) -> SideRange:
        """Return what each row reads."""
        chosen = self.counts[: len(self.ends)]
        whole = min(chosen) == self.selected and min(self.ends) == max(self.ends)
        counts, ends = upload([chosen, self.ends], device)
        return SideRange(counts, ends, self.selected, whole)
