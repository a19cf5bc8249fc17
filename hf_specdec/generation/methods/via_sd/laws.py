"""The tiers of VIA-SD's slim verifier, the distributions that they give, and what a pass of it says of drafts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ...acceptance import residual_distribution


ACCEPT, REGENERATE, ESCALATE = 0, 1, 2
"""The paper's tiers A, B and C."""


class Gate(NamedTuple):
    """What the slim verifier may decide by itself; infinity is for never."""

    accept: float  # r from which a token is in tier A
    escalate: float  # r below which it is in tier C
    sure: float = 0.0  # M below which tier C takes the place of B


def slim_ratio(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `log r` `[..., V]`, float32, and the confidence M `[...]` of a slim verifier's raw logits `[..., V]`.

    `r` is a token's probability over the largest one, M that largest one.
    """
    logits = logits.float()
    log_ratio = logits - logits.amax(dim=-1, keepdim=True)
    return log_ratio, log_ratio.exp().sum(dim=-1).reciprocal()


def tiers(
    log_ratio: torch.Tensor,
    confidence: torch.Tensor,
    gate: Gate,
    *,
    possible: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the tier of tokens: accept, regenerate or escalate; int64, of the shape of `log_ratio`.

    Args:
        log_ratio (`torch.Tensor`): as returned by `slim_ratio`, of the whole vocabulary or of some tokens.
        confidence (`torch.Tensor`): M, of a shape that broadcasts.
        gate (`Gate`): where the tiers begin.
        possible (`torch.Tensor`, bool, *optional*): tokens that the caller's processors leave to the slim verifier;
            the others are escalated.
        ends (`torch.Tensor`, bool, *optional*): tokens that end the text; they are escalated unless they are the most
            likely ones and M is at least `gate.sure`.
    """
    accept, escalate = _log(gate.accept), _log(gate.escalate)
    sure = confidence >= gate.sure
    below = torch.where((log_ratio >= escalate) & sure, REGENERATE, ESCALATE)
    found = torch.where(log_ratio >= accept, ACCEPT, below)
    if possible is not None:
        found = torch.where(possible, found, ESCALATE)
    if ends is not None:
        found = torch.where(ends & ~((log_ratio == 0) & sure), ESCALATE, found)
    return found


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def gate_distribution(draft: torch.Tensor, slim: torch.Tensor, tier: torch.Tensor) -> torch.Tensor:
    """Return the distribution `[..., V]` of a candidate that is the draft, or in tier B a draw from the slim verifier.

    All arguments are `[..., V]`: the drafter's distribution, the slim verifier's, and each token's tier.
    """
    redrawn = tier == REGENERATE
    return draft * ~redrawn + (draft * redrawn).sum(dim=-1, keepdim=True) * slim


def prefilter_distribution(draft: torch.Tensor, tier: torch.Tensor) -> torch.Tensor:
    """Return the distribution `[..., V]`, of mass below 1, of a candidate: the draft in tier A, else nothing."""
    return draft * (tier == ACCEPT)


def coupled_distribution(draft: torch.Tensor, slim: torch.Tensor, tier: torch.Tensor) -> torch.Tensor:
    """Return the distribution `[..., V]` of tiers A and B without C: the draft in A, else the slim verifier's draw."""
    kept = prefilter_distribution(draft, tier)
    return kept + (1 - kept.sum(dim=-1, keepdim=True)) * slim


def tiered_distribution(
    draft: torch.Tensor, slim: torch.Tensor, target: torch.Tensor, tier: torch.Tensor
) -> torch.Tensor:
    """Return the distribution `[..., V]` of a token that the tiers decide (lossy): what the published method emits.

    Tier A keeps the draft, B draws from the slim verifier, C is speculative sampling of the draft against `target`.
    """
    kept = torch.minimum(draft, target) * (tier == ESCALATE)
    refused = (draft * (tier == ESCALATE)).sum(dim=-1, keepdim=True) - kept.sum(dim=-1, keepdim=True)
    redrawn = (draft * (tier == REGENERATE)).sum(dim=-1, keepdim=True)
    return prefilter_distribution(draft, tier) + redrawn * slim + kept + refused * residual_distribution(target, draft)


@dataclass
class Scored:
    """What a forward says of a block."""

    logits: torch.Tensor  # raw, `[n, m, V]`
    scores: torch.Tensor  # the same after the caller's processors


@dataclass
class SlimPass(Scored):
    """What the slim verifier says of a block of drafts `[n, m - 1]`, and of what follows it; see `slim_ratio`."""

    distribution: torch.Tensor | None  # S `[n, m, V]`, when sampling
    log_ratio: torch.Tensor  # log r `[n, m, V]`
    confidence: torch.Tensor  # M `[n, m]`

    def tiers_of(self, drafts: torch.Tensor, gate: Gate, ends: torch.Tensor | None = None) -> torch.Tensor:
        """Return the tiers `[n, k]` of the drafts `[n, k]`; for `ends` see `tiers`."""
        parts = (self.log_ratio[:, :-1], self.scores[:, :-1] > -torch.inf)
        log_ratio, possible = (part.gather(2, drafts[..., None])[..., 0] for part in parts)
        return tiers(log_ratio, self.confidence[:, :-1], gate, possible=possible, ends=ends)

    def tiers_of_all(self, gate: Gate) -> torch.Tensor:
        """Return the tiers `[n, k, V]` of the whole vocabulary in place of each draft."""
        possible = self.scores[:, :-1] > -torch.inf
        return tiers(self.log_ratio[:, :-1], self.confidence[:, :-1, None], gate, possible=possible)

    def draw(self, width: int) -> torch.Tensor:
        """Return the slim verifier's own tokens `[n, width]`: the most likely ones, or drawn when sampling."""
        if self.distribution is None or not width:
            return self.scores[:, :width].argmax(dim=-1)
        distribution = self.distribution[:, :width]
        return torch.multinomial(distribution.flatten(0, 1), 1).view(distribution.shape[:2])
