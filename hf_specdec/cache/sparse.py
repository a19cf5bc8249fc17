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

from ..kernels import choice
from ..kernels.request import Request, ScoreRequest
from ..kernels.step import SideRange, Step, upload
from .speculative import SpeculativeCache, exchange


class SparseView:
    """The draft view of a cache; it is the `ScoreSink` of target forwards and the `DraftView` of draft forwards.

    Args:
        cache (`SpeculativeCache`): the storage that it views. Layers with a sliding window are left out: they read the
            cache.
        rows (`int`): rows of the batch.
        budget (`Callable[[int, int], int]`): tokens to choose, from the keys in the forward and the tokens to choose
            from.
        recents (`int`): columns of the second part, at least twice the draft length plus one.
        request (`ScoreRequest`): which scores rank; whether each key head has its own list.
        sinks (`int`): first tokens that are always chosen.
        locals_ (`int`): newest candidates that are always chosen.
        by_position (`bool`): ignore the scores and choose `sinks` first tokens and the newest ones.
        timed (`Callable[[], AbstractContextManager]`): returns a context around each layer's selection.

    Attributes:
        valid (`list[int]`): per slot, positions `[0, valid)` were the candidates of the last selection; 0 before the
            first.
        counts (`list[int]`): per slot, tokens that were chosen.
        chosen (`dict[int, torch.Tensor]`): per layer the chosen positions, `[n, selected]` or `[n, h_kv, selected]`.
        selections (`int`): layers' selections made so far.
    """

    def __init__(
        self,
        cache: SpeculativeCache,
        rows: int,
        budget: Callable[[int, int], int],
        recents: int,
        request: ScoreRequest,
        *,
        sinks: int = 0,
        locals_: int = 0,
        by_position: bool = False,
        timed: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.cache, self.rows, self.budget, self.recents, self.request = cache, rows, budget, recents, request
        self.sinks, self.locals, self.by_position, self.timed = sinks, locals_, by_position, timed
        self.covered = [layer.window is None for layer in cache.layers]
        self.valid: list[int] = [0] * rows
        self.counts: list[int] = [0] * rows
        self.selected = 0
        self.selections = 0
        self.chosen: dict[int, torch.Tensor] = {}
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self._waiting: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._tables: dict[Any, tuple[list[int], Any]] = {}
        self._columns: list[int] = []
        self._ends: list[int] = []
        self._memo: dict[object, torch.Tensor | None] = {}

    # scores of a target forward

    def begin(self, starts: Sequence[int], last: Sequence[int]) -> None:
        """Begin a selection: sizes per row, common to all layers."""
        n = len(starts)
        self.valid[:n] = [start + 1 for start in starts]
        self.counts[:n] = [
            self.budget(start + newest + 1, start + 1) for start, newest in zip(starts, last, strict=True)
        ]
        self.selections += sum(self.covered)
        self._size(n)

    def _size(self, n: int) -> None:
        self.selected = max(self.counts[:n])
        if self.selected + self.recents > self._width():
            self.keys.clear()
            self.values.clear()
            self._tables.clear()

    def wants(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` is scored: the layers that the view covers."""
        return self.covered[layer_idx]

    def take(self, layer_idx: int, metric: torch.Tensor, step: Step, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Choose the layer's tokens by `metric` `[n, S]` (or `[n, h_kv, S]`) and gather them from its storage."""
        with self.timed():
            self.chosen[layer_idx] = self._choose(metric, step)
            if layer_idx not in self.keys:
                self._allocate(layer_idx, keys, values)
            self._waiting[layer_idx] = keys, values
            if not self._at_once(keys):
                self._gather(step)  # while the layer's keys are in the processor's cache

    def finish(self, step: Step) -> None:
        """Gather what is still to be gathered: by Triton all layers at once, as a launch costs more than a copy."""
        with self.timed():
            self._gather(step)

    def _at_once(self, keys: torch.Tensor) -> bool:
        request = Request(keys.device.type, keys.dtype, keys.shape[3], keys.shape[3])
        return choice.uses_triton(self.cache.kernels, request)

    def _gather(self, step: Step) -> None:
        waiting, self._waiting = self._waiting, {}
        fed = min(step.width - 1, self.recents)
        index = {layer_idx: self._places(self.chosen[layer_idx], fed, step) for layer_idx in waiting}
        if waiting and self._at_once(next(iter(waiting.values()))[0]):
            self._gather_at_once(index, waiting)
            return
        for layer_idx, picked in index.items():
            rows = flat_rows(picked, waiting[layer_idx][0])
            for side, storage in zip((self.keys[layer_idx], self.values[layer_idx]), waiting[layer_idx], strict=True):
                gather_rows(storage, rows, side[: step.rows, :, : picked.shape[-1]])

    def _gather_at_once(
        self, index: dict[int, torch.Tensor], waiting: dict[int, tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        from ..kernels import triton_select  # triton is optional

        groups: dict[Any, list[int]] = {}
        for layer_idx, (keys, _) in waiting.items():
            groups.setdefault((keys.device, keys.shape[1]), []).append(layer_idx)
        for group, layers in groups.items():
            sources = [states for layer_idx in layers for states in waiting[layer_idx]]
            targets = [side for layer_idx in layers for side in (self.keys[layer_idx], self.values[layer_idx])]
            pointers = [states.data_ptr() for states in (*sources, *targets)]
            # addresses are sent to the device only when they change, which they don't inside a captured forward
            if self._tables.get(group, (None, None))[0] != pointers:
                self._tables[group] = pointers, triton_select.addresses(sources, targets)
            stacked = torch.stack([index[layer_idx] for layer_idx in layers])
            table = self._tables[group][1]
            triton_select.gather_layers(sources, targets, stacked, heads=group[1], table=table)

    def _places(self, chosen: torch.Tensor, fed: int, step: Step) -> torch.Tensor:
        """Return the slots that fill a side buffer: the chosen ones, then those of the tokens fed after the first."""
        if not fed:
            return chosen
        recent = step.slots_on(chosen.device)[:, 1 : 1 + fed]
        if chosen.dim() == 3:
            recent = recent[:, None].expand(-1, chosen.shape[1], -1)
        return torch.cat([chosen, recent], dim=-1)

    def _width(self) -> int:
        return next((side.shape[2] for side in self.keys.values()), 0)

    def _allocate(self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        # room for the context to grow a while before the next allocation; zeros, because padding columns are read
        # masked
        width = self.selected + self.selected // 4 + self.recents + 16
        for sides, states in ((self.keys, keys), (self.values, values)):
            sides[layer_idx] = states.new_zeros(self.rows, states.shape[1], width, states.shape[-1])

    def _choose(self, metric: torch.Tensor, step: Step) -> torch.Tensor:
        """Return the chosen positions, sorted by falling score; past a row's count they do not matter."""
        n = step.rows
        if self.by_position:
            chosen = step.memo(("window", metric.device), lambda: self._window(n).to(metric.device))
            return chosen[:, None].expand(-1, metric.shape[1], -1) if metric.dim() == 3 else chosen
        longest = max(self.valid[:n])
        metric = metric[..., :longest]
        if min(self.valid[:n]) != longest or self.sinks or self.locals:
            never, always = step.memo(("choice", metric.device), lambda: self._rules(n, longest, metric.device))
            shape = (n, *[1] * (metric.dim() - 2), longest)
            if self.sinks or self.locals:
                metric = metric.masked_fill(always.view(shape), torch.inf)
            metric = metric.masked_fill(never.view(shape), -torch.inf)
        if self.selected == longest:
            ordered = metric.argsort(dim=-1, descending=True) if min(self.counts[:n]) != longest else None
            return torch.arange(longest, device=metric.device).expand(metric.shape) if ordered is None else ordered
        # equal counts need no order; ragged ones cut the sorted list
        ragged = min(self.counts[:n]) != self.selected
        return metric.topk(self.selected, dim=-1, sorted=ragged).indices

    def _rules(self, n: int, longest: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which slots can't be chosen, and which must be, `[n, longest]` each."""
        slots = torch.arange(longest, device=device)
        valid = torch.tensor(self.valid[:n], device=device)[:, None]
        return slots >= valid, (slots < self.sinks) | (slots >= valid - self.locals)

    def _window(self, n: int) -> torch.Tensor:
        """Return first and newest candidates, `[n, selected]`: a fixed sink plus sliding window."""
        rows = []
        for valid, count in zip(self.valid[:n], self.counts[:n], strict=True):
            sinks = min(self.sinks, count)
            row = torch.cat([torch.arange(sinks), torch.arange(valid - (count - sinks), valid)])
            rows.append(torch.nn.functional.pad(row, (0, self.selected - count)))
        return torch.stack(rows)

    # draft forwards

    def fresh(self, slot: int, position: int) -> bool:
        """Whether a burst may start at `position`: the last selection was made by the forward just before it."""
        return 0 < self.valid[slot] <= position and position - self.valid[slot] <= self.recents // 2

    def place(self, positions: Sequence[int]) -> None:
        """Say at which position each slot's next draft token stands; its column follows.

        A slot that is not `fresh` writes the last column: its draft is computed for the batch's sake and never used.
        """
        n, last = len(positions), self.recents - 1
        self._columns = [
            self.selected + min(p - valid, last) for p, valid in zip(positions, self.valid[:n], strict=True)
        ]
        self._ends = [column + 1 for column in self._columns]
        self._memo = {}

    def covers(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` reads the view in draft forwards."""
        return self.covered[layer_idx]

    def append(self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one draft token's states `[n, h_kv, 1, d]` and return the columns in use, `[n, h_kv, w, d]`."""
        n, end = keys.shape[0], max(self._ends)
        same = min(self._ends) == end
        sides = self.keys[layer_idx], self.values[layer_idx]
        for side, states in zip(sides, (keys, values), strict=True):
            if same:
                side[:n, :, end - 1 : end] = states
            else:
                side[self._index("rows", keys.device), :, self._index("columns", keys.device)] = states[:, :, 0]
        return sides[0][:n, :, :end], sides[1][:n, :, :end]

    def bias(self, layer_idx: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Return -inf for columns that a row does not read, `[n, 1, 1, w]`; `None` if all rows read all."""
        device = self.keys[layer_idx].device
        key = ("bias", device, dtype)
        if key not in self._memo:
            n, end = len(self._ends), max(self._ends)
            if min(self._ends) == end and min(self.counts[:n]) == self.selected:
                self._memo[key] = None
            else:
                columns = torch.arange(end)
                counts, ends = (torch.tensor(values)[:, None] for values in (self.counts[:n], self._ends))
                read = (columns < counts) | ((columns >= self.selected) & (columns < ends))
                bias = torch.zeros(read.shape, dtype=dtype).masked_fill_(~read, -torch.inf)
                self._memo[key] = bias[:, None, None].to(device)
        return self._memo[key]

    def reads(self, layer_idx: int) -> SideRange:
        """Return what each row reads, as numbers."""
        device = self.keys[layer_idx].device
        counts, ends = self._index("counts", device), self._index("ends", device)
        return SideRange(counts, ends, self.selected)

    def _index(self, name: str, device: torch.device) -> torch.Tensor:
        if (name, device) not in self._memo:
            n = len(self._columns)
            values = {
                "rows": list(range(n)), "columns": self._columns, "counts": self.counts[:n], "ends": self._ends
            }[name]  # fmt: skip
            self._memo[name, device] = upload(values, device)
        found = self._memo[name, device]
        return found  # type: ignore[return-value]

    def swap(self, i: int, j: int) -> None:
        """Exchange the slots i and j."""
        for values in (self.valid, self.counts):
            values[i], values[j] = values[j], values[i]
        for sides in (self.keys, self.values, self.chosen):
            for side in sides.values():
                if max(i, j) < len(side):
                    exchange(side, i, j)

    def shrink(self, rows: int) -> None:
        """Forget the slots from `rows` on."""
        del self.valid[rows:], self.counts[rows:]


def flat_rows(index: torch.Tensor, storage: torch.Tensor) -> torch.Tensor:
    """Return slots as rows of the flat table `[n * h_kv * C, d]` that a storage is.

    Args:
        index (`torch.Tensor` of shape `[n, w]` or `[n, h_kv, w]`, int64): slots.
        storage (`torch.Tensor` of shape `[n, h_kv, C, d]`): contiguous.

    Returns:
        `torch.Tensor` of shape `[n * h_kv * w]`, int64.
    """
    n, heads, capacity, _ = storage.shape
    bases = torch.arange(n * heads, device=index.device).view(n, heads, 1) * capacity
    return ((index[:, None] if index.dim() == 2 else index) + bases).flatten()


def gather_rows(storage: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> None:
    """Copy chosen tokens out of a layer's storage.

    Args:
        storage (`torch.Tensor` of shape `[n, h_kv, C, d]`): contiguous.
        rows (`torch.Tensor` of shape `[n * h_kv * w]`, int64): from `flat_rows`.
        out (`torch.Tensor` of shape `[n, h_kv, w, d]`): destination, any strides.
    """
    # whole rows of a flat table: twenty times faster on CPU than `gather` with an expanded index
    flat = storage.view(-1, storage.shape[-1]).index_select(0, rows)
    out.copy_(flat.view(*storage.shape[:2], -1, storage.shape[-1]))
