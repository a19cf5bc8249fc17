"""The audit of VIA-SD's lossy mode: what the model would have said of the tokens that were emitted without it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .laws import Gate


_LEAST = -1e4
"""Log-probability of a token that the model excludes."""

Emitted = tuple[int, float]
"""A token, and the probability that it had under the distribution that it came from."""


class Audit:
    """Compares tokens with the model's own choices, once the model reads them.

    Attributes:
        unread (`list[list[Emitted]]`): per row, what was emitted since the model's last pass.
        missed (`float`): running share of tokens that the model would not have chosen.
    """

    def __init__(self, rows: int) -> None:
        self.unread: list[list[Emitted]] = [[] for _ in range(rows)]
        self.missed = 0.0
        self.matches: list[bool] = []
        self.log_q: list[float] = []
        self.overshoot: list[float] = []

    def compare(self, emitted: Sequence[Emitted], scores: torch.Tensor) -> None:
        """Take note of tokens and the model's processed scores `[m, V]` at them; m may exceed their number."""
        if not emitted:
            return
        distribution = scores[: len(emitted)].float().log_softmax(dim=-1).clamp(min=_LEAST)
        tokens = torch.tensor([token for token, _ in emitted], device=distribution.device)
        matches = (distribution.argmax(dim=-1) == tokens).tolist()
        found = distribution.gather(1, tokens[:, None])[:, 0].tolist()
        for match, log_q, (_, share) in zip(matches, found, emitted, strict=True):
            self.matches.append(match)
            self.log_q.append(log_q)
            self.overshoot.append(share - math.exp(log_q))
            self.missed += 0.1 * ((not match) - self.missed)

    def to_dict(self) -> dict[str, Any]:
        """Return the share of tokens that the model would have chosen, and by how much the others overshoot."""
        count = len(self.matches)
        if not count:
            return {"audited": 0}
        ranked = sorted(self.overshoot)
        return {
            "audited": count,
            "match_rate": sum(self.matches) / count,
            "mean_overshoot": sum(ranked) / count,
            "p99_overshoot": ranked[min(count - 1, int(0.99 * count))],
            "worst_log_probability": min(self.log_q),
        }


def tightened(gate: Gate, configured: Gate, missed: float, target: float) -> Gate:
    """Return a gate that is narrower while the model misses too much, and wider again where it misses little.

    It never becomes wider than configured, nor does a pass of the model move it by more than 0.05. `missed` is the
    share of tokens that the model would not have chosen, `target` what is allowed.
    """
    step = 0.05 if missed > target else -0.01 if missed < target / 2 else 0.0

    def moved(value: float, least: float) -> float:
        return max(least, min(max(1.0, value), value + step))

    return gate._replace(accept=moved(gate.accept, configured.accept), sure=moved(gate.sure, configured.sure))
