"""`Address`: where the tokens of one forward lie. The cache writes by it, and attention reads by it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch


Method = TypeVar("Method", bound=Callable[..., Any])


def once(method: Method) -> Method:
    """Make a method compute its result once for the same arguments, until its object's `made` is emptied."""
    name = method.__name__

    @functools.wraps(method)
    def kept(self: Any, *arguments: Any) -> Any:
        made, key = self.made, (name, *arguments)
        if key not in made:
            made[key] = method(self, *arguments)
        return made[key]

    return cast(Method, kept)


def upload(values: Any, device: torch.device) -> torch.Tensor:
    """Return `values`, a tensor or nested lists of integers, as int64 on `device`; the host waits for no copy."""
    tensor = torch.as_tensor(values, dtype=torch.int64)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Address:
    """Which positions a forward feeds and reads. It stays as it is made; what is computed from it is kept.

    Args:
        starts (`Sequence[int]`): per active row, the position (and slot) of its first fed token.
        width (`int`): tokens fed per row.
        last (`Sequence[int]`, *optional*): per row, the index of its last real query; by default the last one's.

    Attributes:
        rows (`int`): active rows.
        low, high (`int`): least position that is fed, and the end of the farthest.
        uniform (`bool`): whether all rows start at one position.
        same_last (`int`, *optional*): the index of the last real query if all rows are known to agree on it.
    """

    def __init__(self, starts: Sequence[int], width: int, last: Sequence[int] | None = None) -> None:
        self.starts = tuple(starts)
        self.rows = len(self.starts)
        self.width = width
        self.low, self.high = min(self.starts), max(self.starts) + width
        self.uniform = self.low + width == self.high
        self.last = (width - 1,) * self.rows if last is None else tuple(last)
        self.same_last = self.last[0] if len(set(self.last)) == 1 else None
        self.made: dict[Any, Any] = {}

    @once
    def starts_on(self, device: torch.device) -> torch.Tensor:
        """Return `starts` as int64 `[n]` on `device`."""
        return upload(self.starts, device)

    @once
    def last_on(self, device: torch.device) -> torch.Tensor:
        """Return `last` as int64 `[n]` on `device`."""
        return upload(self.last, device)

    @once
    def ends_on(self, device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """Return the rows' lengths after the forward, `[n]`, on `device`."""
        return (self.starts_on(device) + self.width).to(dtype)

    @once
    def positions_on(self, device: torch.device) -> torch.Tensor:
        """Return the position of every fed token, int64 `[n, width]`, on `device`."""
        return self.starts_on(device)[:, None] + torch.arange(self.width, device=device)

    def write_slots_on(self, device: torch.device) -> torch.Tensor:
        """Return the slot that every fed token is written to, int64 `[n, width]`, on `device`."""
        return self.positions_on(device)

    @once
    def hidden(self, first: int, end: int, window: int | None, device: torch.device) -> torch.Tensor:
        """Return which positions in `[first, end)` a query may *not* read, bool `[n or 1, width, end - first]`."""
        read = torch.arange(first, end, device=device)
        own = self.positions_on(device)[: 1 if self.uniform else self.rows, :, None]
        hidden = read > own
        return hidden if window is None else hidden | (read <= own - window)

    @once
    def hidden_columns(self, first: int, end: int, window: int | None, device: torch.device) -> torch.Tensor:
        """Return `hidden` laid out for scores `[n, h_kv, end - first, groups, width]`."""
        return self.hidden(first, end, window, device).transpose(1, 2)[:, None, :, None]

    @once
    def visible(self, first: int, window: int | None, groups: int, device: torch.device) -> torch.Tensor:
        """Return what each of `groups * width` packed queries may read of `[first, high)`, bool `[n or 1, 1, ...]`."""
        return ~self.hidden(first, self.high, window, device)[:, None].repeat(1, 1, groups, 1)


class StaticAddress(Address):
    """An address of fixed shape, whose numbers live on the device, so that a captured forward can be run again.

    Rows that have finished stay in it, idle: they read their first tokens, and write where nothing is ever read.

    Args:
        rows (`int`): rows of the batch.
        width (`int`): tokens fed per row.
        capacity (`int`): slots of the storage; all of them may be read.
        device (`torch.device`): where the model is.
    """

    def __init__(self, rows: int, width: int, capacity: int, device: torch.device) -> None:
        super().__init__([0] * rows, width)
        # nothing about lengths is known to the host when the forward is captured
        self.low, self.high, self.uniform, self.same_last = 0, capacity, False, None
        self._numbers = torch.zeros(3, rows, dtype=torch.int64, device=device)

    def move(self, starts: Sequence[int], last: Sequence[int]) -> None:
        """Say where the active rows stand; arguments as for `Address`."""
        idle = self.rows - len(starts)
        parking = [self.high - self.width] * idle
        numbers = [[*starts, *[0] * idle], [*last, *[0] * idle], [*starts, *parking]]
        self._numbers.copy_(upload(numbers, self._numbers.device))

    def starts_on(self, device: torch.device) -> torch.Tensor:
        """Return the starts as int64 `[n]`."""
        return self._numbers[0]

    def last_on(self, device: torch.device) -> torch.Tensor:
        """Return the index of each row's last real query, int64 `[n]`."""
        return self._numbers[1]

    @once
    def write_slots_on(self, device: torch.device) -> torch.Tensor:
        """Return the slot that every fed token is written to: past the text for idle rows."""
        return self._numbers[2, :, None] + torch.arange(self.width, device=device)
