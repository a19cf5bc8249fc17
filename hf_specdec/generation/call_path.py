"""`CallPath`: the calls of processors that remember, one per column, of which those behind the text can be undone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .memory import Memory


class CallPath:
    """What processors remember after each of their newest calls.

    Call i was made on the first `first + i` columns. `saved[i]` is what was remembered before it, so the last entry is
    what is remembered now.

    Args:
        memories (`Sequence[Memory]`): what to save and restore together.
        call (`Callable`): `call(text)` calls the processors on a prefix `[b, t]` as if nothing were known of its
            scores. That happens for tokens that were emitted without the target.
    """

    def __init__(self, memories: Sequence[Memory], call: Callable[[torch.Tensor], Any]) -> None:
        self.memories, self.call = memories, call
        self.first: int | None = None
        self.final = self.certain = self._save()  # what was remembered when the text was last committed
        self.saved = [self.final]
        self.read: list[tuple[int, ...]] = []  # columns from `first` on that the last call has seen

    def _save(self) -> list[Any]:
        return [memory.save() for memory in self.memories]

    def _restore(self, saved: list[Any]) -> None:
        for memory, content in zip(self.memories, saved, strict=True):
            memory.restore(content)

    def go(self, column: int, text: torch.Tensor) -> None:
        """Make the processors remember the calls on all prefixes of `text` `[b, >= column]` shorter than `column`."""
        self.first = first = column if self.first is None else self.first
        wanted = list(map(tuple, text[:, first:column].T.tolist()))
        same = next((i for i, (a, b) in enumerate(zip(self.read, wanted, strict=False)) if a != b), None)
        same = min(len(self.read), len(wanted)) if same is None else same
        # a call stands while it was made on the same columns
        calls = min(len(self.saved) - 1, same + 1, column - first)
        if calls < 0:
            raise RuntimeError(f"Processors are asked about column {column}, and can go back to {first} only.")
        self._restore(self.saved[calls])
        del self.saved[calls + 1 :], self.read[max(0, calls - 1) :]
        for end in range(first + calls, column):
            self.call(text[:, :end])
            self.record(text[:, :end])

    def record(self, text: torch.Tensor) -> None:
        """Take note of a call that was made on `text` `[b, t]`, right after `go(t)`."""
        for memory in self.memories:
            memory.called()
        if len(self.saved) > 1:
            self.read.append(tuple(text[:, -1].tolist()))
        self.saved.append(self._save())

    def commit(self, column: int, text: torch.Tensor, back: int) -> None:
        """Keep the calls on prefixes shorter than `column`, such that the last `back` of them can be undone."""
        if self.first is None:
            return
        self.go(column, text)
        surplus = max(0, column - back - self.first)
        del self.saved[:surplus], self.read[:surplus]
        self.first += surplus
        self.final = self.certain = self.saved[-1]

    def ascertain(self) -> None:
        """Note that the last call was made on a text that is certain, though not committed yet."""
        self.certain = self.saved[-1]

    def restart(self, certain: bool = False) -> None:
        """Go back to what was last committed, or to what is `certain`, for good."""
        self._restore(self.certain if certain else self.final)
