"""`FixedView`: a `SparseView` whose shapes never change, so that the forwards that use it can be captured.

Room for the longest text's budget is allocated at once. What differs from forward to forward (candidates, counts,
columns) are numbers on the device, which are written before a captured forward runs. The layers' scores are kept until
all have run; then one selection and one copy serve all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..kernels.request import ScoreRequest
from ..kernels.step import SideRange, Step, upload
from .sparse import SparseView
from .speculative import SpeculativeCache


class FixedView(SparseView):
    """The draft view of a cache, for captured forwards; arguments as for `SparseView`.

    Args:
        longest (`int`, keyword): tokens that a row can have at most.
    """

    def __init__(
        self,
        cache: SpeculativeCache,
        rows: int,
        budget: Any,
        recents: int,
        request: ScoreRequest,
        *,
        longest: int,
        **options: Any,
    ) -> None:
        super().__init__(cache, rows, budget, recents, request, **options)
        self.selected = budget(longest, longest)
        self.order = [index for index, covered in enumerate(self.covered) if covered]
        self.metrics: torch.Tensor
        self._numbers: torch.Tensor
        self._ready = False  # the two are made when the first scores come

    # numbers: valid, counts, columns and ends of the rows

    def _write(self, first: int, numbers: list[list[int]]) -> None:
        """Write lists of one number per row to the device, from line `first` on."""
        if self._ready:
            self._numbers[first : first + len(numbers), : len(numbers[0])].copy_(upload(numbers, self._numbers.device))

    def _size(self, n: int) -> None:
        self._write(0, [self.valid[:n], self.counts[:n]])

    def place(self, positions: Sequence[int]) -> None:
        """Say at which position each slot's next draft token stands; rows that are idle write the last column."""
        super().place(positions)
        self._write(2, [self._columns, self._ends])

    # scores of a target forward

    def _allocate(self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        for sides, states in ((self.keys, keys), (self.values, values)):
            sides[layer_idx] = states.new_zeros(
                self.rows, states.shape[1], self.selected + self.recents, states.shape[-1]
            )

    def take(self, layer_idx: int, metric: torch.Tensor, step: Step, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keep the layer's scores `[n, S]` (or `[n, h_kv, S]`) until every layer has run."""
        if layer_idx not in self.keys:
            self._allocate(layer_idx, keys, values)
        if not self._ready:
            device, last = keys.device, self.selected + self.recents - 1
            self._numbers = torch.zeros(4, self.rows, dtype=torch.int64, device=device)
            self._numbers[2:] = torch.tensor([[last], [last + 1]], device=device)
            self.metrics, self._ready = metric.new_empty(0), True
            self._size(step.rows)
        if self.metrics.shape[-1] != keys.shape[2]:
            self.metrics = metric.new_zeros(len(self.order), self.rows, *metric.shape[1:-1], keys.shape[2])
        self.metrics[self.order.index(layer_idx), : step.rows, ..., : metric.shape[-1]] = metric
        self._waiting[layer_idx] = keys, values

    def finish(self, step: Step) -> None:
        """Choose for all layers at once, and copy what was chosen."""
        if self._waiting:
            self.chosen = dict(zip(self.order, self._best(step.rows), strict=True))
            self._gather(step)

    def _best(self, n: int) -> torch.Tensor:
        """Return the chosen positions of all layers, `[layers, n, (h_kv,) selected]`, sorted by falling score."""
        metrics = self.metrics[:, :n]
        valid, counts = self._numbers[0, :n, None], self._numbers[1, :n, None]
        if self.by_position:
            columns = torch.arange(self.selected, device=metrics.device)
            sinks = counts.clamp(max=self.sinks)
            places = torch.where(columns < sinks, columns, (valid - counts + columns).clamp(min=0))
            shape = (1, n, *[1] * (metrics.dim() - 3), self.selected)
            return places.view(shape).expand(*metrics.shape[:-1], -1)
        slots = torch.arange(metrics.shape[-1], device=metrics.device)
        shape = (n, *[1] * (metrics.dim() - 3), metrics.shape[-1])
        if self.sinks or self.locals:
            always = (slots < self.sinks) | (slots >= valid - self.locals)
            metrics = metrics.masked_fill(always.view(shape), torch.inf)
        metrics = metrics.masked_fill((slots >= valid).view(shape), -torch.inf)
        return metrics.topk(self.selected, dim=-1).indices

    # draft forwards

    def append(self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one draft token's states `[n, h_kv, 1, d]` and return the whole buffers, `[n, h_kv, w, d]`."""
        n = keys.shape[0]
        rows, columns = torch.arange(n, device=keys.device), self._numbers[2, :n]
        sides = self.keys[layer_idx], self.values[layer_idx]
        for side, states in zip(sides, (keys, values), strict=True):
            side[rows, :, columns] = states[:, :, 0]
        return sides[0][:n], sides[1][:n]

    def reads(self, layer_idx: int) -> SideRange:
        """Return what each row reads, as numbers."""
        return SideRange(self._numbers[1], self._numbers[3], self.selected)

    def bias(self, layer_idx: int, dtype: torch.dtype) -> torch.Tensor:
        """Return -inf for columns that a row does not read, `[rows, 1, 1, w]`."""
        counts, ends, selected = self.reads(layer_idx)
        columns = torch.arange(self.selected + self.recents, device=counts.device)
        read = (columns < counts[:, None]) | ((columns >= selected) & (columns < ends[:, None]))
        hidden = torch.zeros(read.shape, dtype=dtype, device=counts.device).masked_fill_(~read, -torch.inf)
        return hidden[:, None, None]

    def swap(self, i: int, j: int) -> None:
        """Exchange the slots i and j."""
        self.chosen = {}  # a captured forward's own memory
        super().swap(i, j)
        self._write(0, [self.valid, self.counts])
