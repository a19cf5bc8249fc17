"""Acceptance rules: which draft tokens stay, and what follows them. Pure functions of tensors.

Notation, per row: `p_i` the target's distribution at draft position i (i = 0 .. k, the last is the bonus position),
`q_i` the distribution that draft token `x_i` was really drawn from, `w_i` a weight on the target. Distributions are
float32 `[n, k or k + 1, V]`.

One rule covers every method here. Token `x_i` is accepted with the probability
`min(1, 1 - w_i + w_i p_i(x_i) / q_i(x_i))`; the first refusal is replaced by a draw from
`normalise(max(0, p_i - q_i))`; after the last accepted draft a token follows `p`. `w = 1` is speculative sampling
(Leviathan et al., arXiv 2211.17192), `0 <= w < 1` the ensemble of DIVERSED, and a `q` whose mass is below 1 a proposal
that may also propose nothing (VIA-SD): then the token after the last draft comes from the residual of that position's
`q` as well. A draft without a distribution is a point mass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Verdict(NamedTuple):
    """What verification decided.

    Attributes:
        accepted (`torch.Tensor` of shape `[n]`, int64): leading draft tokens that stay.
        tokens (`torch.Tensor` of shape `[n, k + 1]`, int64): the accepted drafts, then the next token; what follows is
            meaningless.
    """

    accepted: torch.Tensor
    tokens: torch.Tensor

    def on_host(self) -> Verdict:
        """Return the same on the CPU, by one transfer: the only time in a round that the host waits for the device."""
        both = torch.cat([self.accepted[:, None], self.tokens], dim=1).cpu()
        return Verdict(both[:, 0], both[:, 1:])


def _assemble(drafts: torch.Tensor, accepted: torch.Tensor, following: torch.Tensor) -> Verdict:
    tokens = torch.cat([drafts, following[:, None]], dim=1)
    return Verdict(accepted, tokens.scatter_(1, accepted[:, None], following[:, None]))


def _leading(keep: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return how many leading entries of `keep` `[n, k]` hold, at most `counts` `[n]`."""
    return torch.minimum(keep.long().cumprod(dim=1).sum(dim=1), counts)


def greedy_match(drafts: torch.Tensor, counts: torch.Tensor, choices: torch.Tensor) -> Verdict:
    """Accept drafts while they equal the target's own choices `[n, k + 1]`, int64.

    The other arguments are those of `speculative_sample`.
    """
    accepted = _leading(drafts == choices[:, :-1], counts)
    return _assemble(drafts, accepted, choices.gather(1, accepted[:, None])[:, 0])


def acceptance_probability(
    drafts: torch.Tensor, target: torch.Tensor, draft: torch.Tensor | None, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the probability `[n, k]` that each draft token is accepted, given that the ones before it were.

    The arguments are those of `speculative_sample`; `target` and `draft` may end at the last draft.
    """
    columns = drafts.shape[1]
    p = target[:, :columns].gather(2, drafts[..., None])[..., 0]
    if draft is None:
        ratio = p
    else:
        q = draft[:, :columns].gather(2, drafts[..., None])[..., 0]
        ratio = torch.where(q > 0, p / q, torch.zeros_like(p))  # q(x) = 0 means that x was not drawn from q: refuse
    if weight is not None:
        ratio = 1 - weight + weight * ratio
    return ratio.clamp(max=1.0)


def residual_distribution(target: torch.Tensor, draft: torch.Tensor) -> torch.Tensor:
    """Return `normalise(max(0, target - draft))`, or `target` where that has no mass (the two agree up to rounding).

    Both are `[n, V]`, float32. The weight of a mixture drops out of its residual, so it is not needed here.
    """
    rest = (target - draft).clamp(min=0)
    mass = rest.sum(dim=-1, keepdim=True)
    return torch.where(mass > 1e-12, rest / mass.clamp(min=1e-12), target)


def accept_drafts(
    drafts: torch.Tensor,
    counts: torch.Tensor,
    target: torch.Tensor,
    draft: torch.Tensor | None,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return how many leading drafts of each row stay `[n]`, by uniforms from torch's global generator.

    The arguments are those of `speculative_sample`.
    """
    chance = acceptance_probability(drafts, target, draft, weight)
    # float64 uniforms: in float32 an exact 0 would accept an impossible token once in 2**24 draws
    keep = torch.rand(drafts.shape, dtype=torch.float64, device=drafts.device) < chance
    return _leading(keep, counts)


def draw_next(
    drafts: torch.Tensor,
    counts: torch.Tensor,
    accepted: torch.Tensor,
    target: torch.Tensor,
    draft: torch.Tensor | None,
) -> Verdict:
    """Draw the token after the accepted drafts: from the residual after a refusal, else from `target`.

    Args:
        accepted (`torch.Tensor` of shape `[n]`, int64): as returned by `accept_drafts`; the other arguments are those
            of `speculative_sample`.
    """
    columns = drafts.shape[1]
    distribution = target.gather(1, accepted[:, None, None].expand(-1, 1, target.shape[-1]))[:, 0]
    refused = accepted < counts
    if draft is None:
        proposal = torch.zeros_like(distribution)
        if columns:
            proposal.scatter_(1, drafts.gather(1, accepted.clamp(max=columns - 1)[:, None]), 1.0)
        use = refused
    elif draft.shape[1]:
        index = accepted.clamp(max=draft.shape[1] - 1)
        proposal = draft.gather(1, index[:, None, None].expand(-1, 1, draft.shape[-1]))[:, 0]
        use = refused if draft.shape[1] == columns else torch.ones_like(refused)
    else:
        proposal, use = torch.zeros_like(distribution), refused
    distribution = torch.where(use[:, None], residual_distribution(distribution, proposal), distribution)
    return _assemble(drafts, accepted, torch.multinomial(distribution, 1)[:, 0])


def speculative_sample(
    drafts: torch.Tensor,
    counts: torch.Tensor,
    target: torch.Tensor,
    draft: torch.Tensor | None,
    weight: torch.Tensor | None = None,
) -> Verdict:
    """Accept drafts by the rule above and draw the token that follows, from torch's global generator.

    Args:
        drafts (`torch.Tensor` of shape `[n, k]`, int64): draft tokens.
        counts (`torch.Tensor` of shape `[n]`, int64): how many of a row's drafts are real.
        target (`torch.Tensor` of shape `[n, k + 1, V]`, float32): `p`.
        draft (`torch.Tensor` of shape `[n, k, V]` or `[n, k + 1, V]`, float32, *optional*): `q`. With `k + 1`
            positions, the one after a row's last draft holds a distribution of mass below 1, of a proposal that
            proposed nothing there.
        weight (`torch.Tensor` of shape `[n, k]`, float32, *optional*): `w`; 1 everywhere by default.
    """
    return draw_next(drafts, counts, accept_drafts(drafts, counts, target, draft, weight), target, draft)


def judge_column(
    column: int,
    drafts: torch.Tensor,
    counts: torch.Tensor,
    scores: torch.Tensor,
    draft: torch.Tensor | None,
    sample: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Judge the drafts of one column, all before which have stayed.

    Args:
        column (`int`): which one; with k, the token that follows drafts that all stayed.
        scores (`torch.Tensor` of shape `[n, V]`, float32): the target's processed scores in that column.
        sample (`bool`): whether by speculative sampling; the other arguments are those of `speculative_sample`.

    Returns:
        The column's tokens `[n]`, int64, and whether each is the draft that stayed, bool `[n]`.
    """
    here = drafts[:, column : column + 1]
    real = (counts > column).long()
    if not sample:
        choice = scores.argmax(dim=-1)
        stays = (here == choice[:, None]).any(dim=1) & (real > 0)
        return choice, stays
    p, q = torch.softmax(scores, dim=-1)[:, None], None if draft is None else draft[:, column : column + 1]
    stays = accept_drafts(here, real, p, q) > 0
    # where `draft` also says what proposed nothing, both that and a refusal leave the residual
    open_ = here if draft is None or draft.shape[1] == drafts.shape[1] else here[:, :0]
    drawn = draw_next(open_, real, torch.zeros_like(real), p, q).tokens[:, 0]
    return torch.where(stays, here[:, 0], drawn) if here.shape[1] else drawn, stays
