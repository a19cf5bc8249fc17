"""Which lossy rounds of VIA-SD the tiers decide, and which the model verifies."""

from __future__ import annotations

import math
from collections.abc import Sequence


class RoundSchedule:
    """Says of each round in turn whether it is tiered.

    Args:
        level (`float`): share of the rounds that are tiered; the others are spread evenly.
        limit (`int`, *optional*): tokens of a row that the model has not read, from which on it has to.
    """

    def __init__(self, level: float, limit: int | None) -> None:
        self.level, self.limit, self.rounds = level, limit, 0

    def next(self, unread: Sequence[int]) -> str:
        """Return what the next round is: `"tiered"`, or verified by the model, `"strict"` by the share or `"forced"`.

        Args:
            unread (`list[int]`): per row, tokens that the model has not read.
        """
        share = 1 - self.level
        before, after = (math.floor(rounds * share + 1e-9) for rounds in (self.rounds, self.rounds + 1))
        self.rounds += 1
        if after > before:
            return "strict"
        return "forced" if self.limit is not None and max(unread) >= self.limit else "tiered"
