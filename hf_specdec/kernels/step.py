"""`Step`: what one forward does to the cache, and who watches it. The cache writes by it and attention reads by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch


class DraftView(Protocol):
    """A side store that draft forwards read instead of the cache's layers (`cache.sparse.SparseView`)."""

    def covers(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` reads the view in a draft forward."""

    def append(self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store one draft token's keys and values and return those that it attends to."""

    def bias(self, layer_idx: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Return the mask of what `append` returned, `[n, 1, 1, w]` and added to the scores, `None` if all count."""


class ScoreSink(Protocol):
    """Takes the scores of one layer's cached tokens during a target forward.

    Attributes:
        wanted (`tuple[str, str, bool]`): query rows, metric, and whether key heads are kept apart.
    """

    wanted: tuple[str, str, bool]

    def wants(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` is to be scored."""

    def take(self, layer_idx: int, metric: torch.Tensor, step: Step, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Receive `metric` `[n, S]` (or `[n, h_kv, S]`), float32, and the layer's storage `[n, h_kv, capacity, d]`.

        Entries of `metric` that a row may not choose are undefined.
        """


class Step:
    """What one forward does to the cache; it travels to the attention function as the keyword `specdec_step`.

    Args:
        starts (`list[int]`): per active row, the position (and slot) of its first fed token.
        width (`int`): tokens fed per row.
        device (`torch.device`): where position tensors are built first.
        score (`ScoreSink`, *optional*): wants the two scored query rows' attention.
        last (`list[int]`, *optional*): per row, the index of its last real query when it is scored.
        view (`DraftView`, *optional*): read instead of the cache by the layers that it covers.
    """

    def __init__(
        self,
        starts: Sequence[int],
        width: int,
        device: torch.device,
        score: ScoreSink | None = None,
        last: Sequence[int] | None = None,
        view: DraftView | None = None,
    ) -> None:
        self.starts = list(starts)
        self.rows = len(self.starts)
        self.width = width
        self.low, self.high = min(self.starts), max(self.starts) + width
        self.uniform = self.low + width == self.high
        self.score, self.view = score, view
        self.last = [width - 1] * self.rows if last is None else list(last)
        self.layers_seen = self.layers_attended = 0
        self._tensors: dict[Any, Any] = {(torch.device("cpu"), "starts"): torch.tensor(self.starts)}
        self._home = device

    def starts_on(self, device: torch.device) -> torch.Tensor:
        """Return `starts` as int64 `[n]` on `device`."""
        key = (device, "starts")
        if key not in self._tensors:
            self._tensors[key] = self._tensors[torch.device("cpu"), "starts"].to(device)
        return self._tensors[key]

    def ends_on(self, device: torch.device) -> torch.Tensor:
        """Return the rows' lengths after the forward, int64 `[n]`, on `device`."""
        key = (device, "ends")
        if key not in self._tensors:
            self._tensors[key] = self.starts_on(device) + self.width
        return self._tensors[key]

    def slots_on(self, device: torch.device) -> torch.Tensor:
        """Return the slot of every fed token, int64 `[n, width]`, on `device`."""
        key = (device, "slots")
        if key not in self._tensors:
            steps = torch.arange(self.width, device=device)
            self._tensors[key] = self.starts_on(device)[:, None] + steps
        return self._tensors[key]

    def hidden_slots(self, first: int, end: int, window: int | None, device: torch.device) -> torch.Tensor:
        """Return which slots in `[first, end)` a query may *not* read, bool `[n or 1, width, end - first]`."""
        key = (device, first, end, window)
        if key not in self._tensors:
            slots = torch.arange(first, end, device=device)
            positions = self.slots_on(device)[: 1 if self.uniform else self.rows, :, None]
            hidden = slots > positions
            if window is not None:
                hidden |= slots <= positions - window
            self._tensors[key] = hidden
        return self._tensors[key]

    def memo(self, key: Any, build: Callable[[], Any]) -> Any:
        """Return `build()`, computed once per forward for `key`."""
        if key not in self._tensors:
            self._tensors[key] = build()
        return self._tensors[key]
