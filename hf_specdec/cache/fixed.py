"""`FixedView`: a view whose shapes never change, so that the forwards that use it can be captured.

Buffers have room for the budget of a text that fills the cache's storage, and are made anew when that has grown.
What differs from forward to forward (candidates, counts, columns) are numbers on the device, which are written before
a captured forward runs. The layers' scores are kept until all have run; then one selection and one copy serve all of
them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kernels.address import Address, upload
from ..kernels.request import SideRange
from .selection import FixedSelector
from .sparse import ChosenView
from .speculative import SpeculativeCache


class FixedView(ChosenView):
    """The draft view of a cache, for captured forwards.

    Args:
        cache, recents: as for `ChosenView`.
        selector (`FixedSelector`): which tokens are chosen.

    Attributes:
        layers (`list[int]`): the layers that it covers.
        metrics (`torch.Tensor` of shape `[layers, rows, (h_kv,) S]`): their scores in the last target forward.
        numbers (`torch.Tensor` of shape `[2, rows]`, int64): columns that rows write, and where what they read ends.
    """

    selector: FixedSelector

    def __init__(self, cache: SpeculativeCache, selector: FixedSelector, recents: int) -> None:
        super().__init__(cache, selector, recents)
        self.cache = cache
        self.layers = [index for index, covered in enumerate(self.covered) if covered]
        self.metrics = torch.empty(0)
        self.numbers = torch.zeros(2, cache.rows, dtype=torch.int64, device=selector.numbers.device)

    def begin(self, starts: Sequence[int], last: Sequence[int]) -> None:
        """Prepare for a target forward, dropping buffers that are too narrow since the storage has grown."""
        if self.selector.fit(self.cache.layers[0].capacity):
            self.buffers.reserve(self.selected + self.recents)
        super().begin(starts, last)

    def take(
        self, layer_idx: int, metric: torch.Tensor, address: Address, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Keep the layer's scores `[n, S]` (or `[n, h_kv, S]`) until every layer has run."""
        if layer_idx not in self.keys:
            self.buffers.allocate(layer_idx, (keys, values), self.selected + self.recents)
        if self.metrics.shape[-1] != keys.shape[2]:
            shape = (len(self.layers), self.buffers.rows, *metric.shape[1:-1], keys.shape[2])
            self.metrics = metric.new_zeros(shape)
        self.metrics[self.layers.index(layer_idx), : address.rows, ..., : metric.shape[-1]] = metric
        self.waiting[layer_idx] = keys, values

    def finish(self, address: Address) -> None:
        """Choose for all layers at once, and copy what was chosen."""
        if self.waiting:
            chosen = self.selector.choose(self.metrics[:, : address.rows])
            self.chosen = dict(zip(self.layers, chosen, strict=True))
            self.gather(address)

    def place(self, positions: Sequence[int]) -> None:
        """Say at which position each row's next draft token stands; idle rows keep theirs."""
        super().place(positions)
        self.numbers[:, : len(positions)].copy_(upload([self.columns, self.ends], self.numbers.device))

    def append(self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one draft token's states `[n, h_kv, 1, d]` and return the whole buffers, `[n, h_kv, w, d]`."""
        n = keys.shape[0]
        rows, columns = torch.arange(n, device=keys.device), self.numbers[0, :n]
        sides = self.keys[layer_idx], self.values[layer_idx]
        for side, states in zip(sides, (keys, values), strict=True):
            side[rows, :, columns] = states[:, :, 0]
        return sides[0][:n], sides[1][:n]

    def reads(self, device: torch.device) -> SideRange:
        """Return what each row reads."""
        return SideRange(self.selector.numbers[1], self.numbers[1], self.selected)

    def swap(self, i: int, j: int) -> None:
        """Exchange the active rows i and j."""
        self.chosen = {}  # a captured forward's own memory
        super().swap(i, j)
