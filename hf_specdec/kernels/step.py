"""`Step`: what one forward does to the cache, and who watches it. The cache writes by it and attention reads by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from .request import ScoreRequest


Made = TypeVar("Made")


class SideRange(NamedTuple):
    """What each row reads of a side buffer: the columns `[0, counts[j])` and `[selected, ends[j])`.

    Attributes:
        counts (`torch.Tensor` of shape `[n]`, int64): end of the first range.
        ends (`torch.Tensor` of shape `[n]`, int64): end of the second.
        selected (`int`): where the second begins.
    """

    counts: torch.Tensor
    ends: torch.Tensor
    selected: int


class DraftView(Protocol):
    """A side store that draft forwards read instead of the cache's layers (`cache.sparse.SparseView`)."""

    def covers(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` reads the view in a draft forward."""

    def append(self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store one draft token's keys and values and return those that it attends to."""

    def bias(self, layer_idx: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Return the mask of what `append` returned, `[n, 1, 1, w]` and added to the scores, `None` if all count."""

    def reads(self, layer_idx: int) -> SideRange:
        """Return the same as `bias`, as numbers per row."""


class ScoreSink(Protocol):
    """Takes the scores of one layer's cached tokens during a target forward.

    Attributes:
        request (`ScoreRequest`): which scores it takes.
    """

    request: ScoreRequest

    def begin(self, starts: Sequence[int], last: Sequence[int]) -> None:
        """Prepare for a forward; per row the position of its first token and the index of its last real query."""

    def wants(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` is to be scored."""

    def take(self, layer_idx: int, metric: torch.Tensor, step: Step, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Receive `metric` `[n, S]` (or `[n, h_kv, S]`), float32, and the layer's storage `[n, h_kv, capacity, d]`.

        Entries of `metric` that a row may not choose are undefined.
        """

    def finish(self, step: Step) -> None:
        """Learn that every layer has run."""


class ForwardRequest(NamedTuple):
    """What a forward is asked beside its tokens.

    Attributes:
        score (`ScoreSink`, *optional*): takes the two scored query rows' attention.
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


def upload(values: Any, device: torch.device) -> torch.Tensor:
    """Return `values`, a tensor or nested lists of integers, as int64 on `device`; the host waits for no copy."""
    tensor = torch.as_tensor(values, dtype=torch.int64)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Step:
    """What one forward does to the cache; it travels to the attention function as the keyword `specdec_step`.

    Args:
        starts (`list[int]`): per active row, the position (and slot) of its first fed token.
        width (`int`): tokens fed per row.
        device (`torch.device`): where the model's input goes.
        score (`ScoreSink`, *optional*): wants the two scored query rows' attention.
        last (`list[int]`, *optional*): per row, the index of its last real query when it is scored.
        view (`DraftView`, *optional*): read instead of the cache by the layers that it covers.

    Attributes:
        kernels (`str`): which implementation attends; see `kernels.choice`.
        windows (`dict[int, int | None]`): the window of each layer that has attended.
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
        self.kernels = "auto"
        self.windows: dict[int, int | None] = {}
        self.layers_seen = self.layers_attended = 0
        self._tensors: dict[Any, Any] = {}

    @property
    def same_last(self) -> int | None:
        """The index of the last real query if all rows agree on it."""
        return self.last[0] if len(set(self.last)) == 1 else None

    def starts_on(self, device: torch.device) -> torch.Tensor:
        """Return `starts` as int64 `[n]` on `device`."""
        return self.memo((device, "starts"), lambda: upload(self.starts, device))

    def last_on(self, device: torch.device) -> torch.Tensor:
        """Return `last` as int64 `[n]` on `device`."""
        return self.memo((device, "last"), lambda: upload(self.last, device))

    def ends_on(self, device: torch.device) -> torch.Tensor:
        """Return the rows' lengths after the forward, int64 `[n]`, on `device`."""
        return self.memo((device, "ends"), lambda: self.starts_on(device) + self.width)

    def slots_on(self, device: torch.device) -> torch.Tensor:
        """Return the position of every fed token, int64 `[n, width]`, on `device`."""
        steps = (device, "slots")
        return self.memo(steps, lambda: self.starts_on(device)[:, None] + torch.arange(self.width, device=device))

    def writes_on(self, device: torch.device) -> torch.Tensor:
        """Return the slot that every fed token is written to, int64 `[n, width]`, on `device`."""
        return self.slots_on(device)

    def hidden_slots(self, first: int, end: int, window: int | None, device: torch.device) -> torch.Tensor:
        """Return which slots in `[first, end)` a query may *not* read, bool `[n or 1, width, end - first]`."""

        def build() -> torch.Tensor:
            slots = torch.arange(first, end, device=device)
            positions = self.slots_on(device)[: 1 if self.uniform else self.rows, :, None]
            hidden = slots > positions
            return hidden if window is None else hidden | (slots <= positions - window)

        return self.memo((device, first, end, window), build)

    def memo(self, key: Any, build: Callable[[], Made]) -> Made:
        """Return `build()`, computed once per forward for `key`."""
        if key not in self._tensors:
            self._tensors[key] = build()
        made: Made = self._tensors[key]
        return made


class StaticStep(Step):
    """A step of fixed shape, whose numbers live on the device, so that a captured forward can be run again for others.

    Rows that have finished stay in it, idle: they read their first tokens, and write where nothing is ever read.

    Args:
        rows (`int`): rows of the batch.
        width (`int`): tokens fed per row.
        capacity (`int`): slots of the storage; all of them may be read.
        device (`torch.device`): where the model is.
        score (`ScoreSink`, *optional*): as for `Step`.
        view (`DraftView`, *optional*): as for `Step`.
    """

    def __init__(
        self,
        rows: int,
        width: int,
        capacity: int,
        device: torch.device,
        score: ScoreSink | None = None,
        view: DraftView | None = None,
    ) -> None:
        super().__init__([0] * rows, width, device, score, None, view)
        # nothing about lengths is known to the host when the forward is captured
        self.low, self.high, self.uniform = 0, capacity, False
        self._numbers = torch.zeros(3, rows, dtype=torch.int64, device=device)
        self.forget()

    @property
    def same_last(self) -> None:
        """Always `None`: it changes between runs."""
        return None

    def move(self, starts: Sequence[int], last: Sequence[int]) -> None:
        """Say where the active rows stand; arguments as for `Step`."""
        idle = self.rows - len(starts)
        parking = [self.high - self.width] * idle
        numbers = [[*starts, *[0] * idle], [*last, *[0] * idle], [*starts, *parking]]
        self._numbers.copy_(upload(numbers, self._numbers.device))

    def forget(self) -> None:
        """Drop what was computed from the numbers; a forward that is captured has to compute it itself."""
        device = self._numbers.device
        self._tensors = {(device, "starts"): self._numbers[0], (device, "last"): self._numbers[1]}

    def writes_on(self, device: torch.device) -> torch.Tensor:
        """Return the slot that every fed token is written to: past the text for idle rows."""
        steps = (device, "writes")
        return self.memo(steps, lambda: self._numbers[2, :, None] + torch.arange(self.width, device=device))
