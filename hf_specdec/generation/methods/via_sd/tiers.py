"""The lossy rounds of VIA-SD: a slim verifier decides what it can, the model what it must."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch

from ... import acceptance
from ...runner import Forward
from ...state import DecodingState
from ...strategy import Draft, StepResult
from . import laws
from .laws import ACCEPT, ESCALATE, REGENERATE
from .slim_drafter import SlimDrafter, point_masses


if TYPE_CHECKING:
    from .config import ViaSDConfig

_LEAST = -1e4
"""Log-probability of a word that the model excludes."""


@dataclass
class _Decided:
    """What one row's tiers decided in a round.

    Args:
        tokens (`list[int]`): new tokens,
        tiers (`str`): and who decided each: A, B, C (the model, after an escalation), S (the slim verifier's own token
            after a whole block) or Q (the model, in a round without tiers).
        sources (`list[tuple[bool, int]]`): the logits of each: whether the model's, and their place in its forward.
        shares (`list[float]`): the probability that the token had under the distribution that it came from, for the
            audit.
        escalate (`int`, *optional*): index of the draft from which the model decides.
    """

    tokens: list[int] = field(default_factory=list)
    tiers: str = ""
    sources: list[tuple[bool, int]] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    escalate: int | None = None

    def add(self, token: int, tier: str, place: int, share: float = 1.0) -> None:
        self.tokens.append(token)
        self.tiers += tier
        self.sources.append((tier in "CQ", place))
        self.shares.append(share)


class Tiers:
    """Rounds of tiers, for the rows of one call.

    Args:
        config (`ViaSDConfig`): the settings.
        drafter (`SlimDrafter`): what drafts, and the slim verifier.
        state (`DecodingState`): the call.

    Attributes:
        read (`dict[int, int]`): per row, tokens that the model has read.
        decided (`list[_Decided]`): per slot, what the last round decided.
    """

    def __init__(self, config: ViaSDConfig, drafter: SlimDrafter, state: DecodingState) -> None:
        self.config, self.drafter = config, drafter
        self.thresholds, self.regen_min_conf = config.thresholds, config.regen_min_conf
        self.rounds, self.whole, self.missed = 0, True, 0.0
        self.letters = [""] * state.batch
        self.audit = _Audit()
        self.read: dict[int, int] = {}
        self.decided: list[_Decided] = []
        # per row: what was emitted since the model's last pass, with the probability that it was emitted by
        self.unread: dict[int, list[tuple[int, float]]] = {row: [] for row in state.active}
        state.stats.method.update(tiered_rounds=0, strict_rounds=0, forced_rounds=0, escalations=0)

    def begin(self, state: DecodingState) -> None:
        """Note that the model has read the prompts, and gives each row's first token."""
        self.read = {row: count - 1 for row, count in zip(state.active, state.committed, strict=True)}
        self.decided = [_Decided(tiers="Q") for _ in state.active]

    def step(self, state: DecodingState) -> StepResult:
        """Draft, let the slim verifier decide, and the model where it has to."""
        with state.timed("draft"):
            draft = self.drafter.inner.propose(state)
        target = slim = None
        if self._strict(state):
            self.decided = [_Decided(escalate=0) for _ in state.active]
            tier = "Q"
        else:
            with state.timed("slim"):
                slim = self._tier(state, draft)
            tier = "C"
        self.whole = any(row.escalate is not None for row in self.decided)
        if self.whole:
            with state.timed("verify"):
                target = self._escalate(state, draft, tier)
        result = self._result(state, draft, slim, target)
        self.drafter.reschedule(draft.counts, result.accepted)
        return result

    def _strict(self, state: DecodingState) -> bool:
        """Whether the model verifies this round as in ordinary speculative decoding: by the schedule, or the limit."""
        number, share, method = self.rounds, 1 - self.config.lossy_level, state.stats.method
        self.rounds += 1
        limit = self.config.max_pending
        strict = math.floor((number + 1) * share + 1e-9) > math.floor(number * share + 1e-9)
        forced = limit is not None and any(
            count - 1 - self.read[row] >= limit for row, count in zip(state.active, state.committed, strict=True)
        )
        method["tiered_rounds" if not (strict or forced) else "strict_rounds" if strict else "forced_rounds"] += 1
        return strict or forced

    def _tier(self, state: DecodingState, draft: Draft) -> Forward:
        """Decide each row's drafts by the slim verifier, up to where the model has to; return its logits."""
        config, tokens, k = self.config, draft.tokens, draft.tokens.shape[1]
        logits = self.drafter.slim.read(state, tokens)
        scores = state.process(logits, tokens)
        distribution = state.distribution(scores) if state.do_sample else None
        log_ratio, confidence = laws.slim_ratio(logits)
        rules = self.thresholds, self.regen_min_conf, config.eos_guard
        tier = self.drafter.tiers(state, log_ratio[:, :k], confidence[:, :k], scores[:, :k], tokens, *rules)
        redrawn = self.drafter.draw(scores, distribution)
        if config.coupled:
            tier = torch.where(tier == ACCEPT, ACCEPT, REGENERATE)  # what the processors exclude is drawn anew
            if distribution is not None:
                tier, redrawn = self._couple(state, draft, log_ratio, confidence, scores, distribution, redrawn)
        given = (
            None if draft.distributions is None else draft.distributions.gather(2, tokens[..., None])[..., 0].tolist()
        )
        drawn = None if distribution is None else distribution.gather(2, redrawn[..., None])[..., 0].tolist()
        # the slim verifier may end the text of its own accord only where it is sure
        ending = state.is_eos(logits.argmax(dim=-1)).tolist()
        columns = zip(
            tier.tolist(), tokens.tolist(), redrawn.tolist(), state.is_eos(tokens).tolist(), confidence.tolist(),
            draft.counts, strict=True,
        )  # fmt: skip
        self.decided = []
        for slot, (tier_of, drafted, instead, ends, sure, count) in enumerate(columns):
            row = _Decided()
            self.decided.append(row)
            for j in range(count):
                if tier_of[j] == ESCALATE:
                    row.escalate = j
                    state.stats.method["escalations"] += 1
                    break
                if tier_of[j] == ACCEPT:
                    row.add(drafted[j], "A", j, 1.0 if given is None else given[slot][j])
                else:
                    row.add(instead[j], "B", j, 1.0 if drawn is None else drawn[slot][j])
                    if instead[j] != drafted[j]:
                        break  # the drafts behind it continued another text
                if ends[j]:
                    break
            else:
                guarded = config.eos_guard and ending[slot][count]
                if sure[count] >= max(config.bonus_min_conf, self.regen_min_conf if guarded else 0):
                    row.add(instead[count], "S", count, 1.0 if drawn is None else drawn[slot][count])
                elif not row.tokens:
                    row.escalate = 0  # nothing was drafted
        return Forward(logits, scores)

    def _couple(
        self,
        state: DecodingState,
        draft: Draft,
        log_ratio: torch.Tensor,
        confidence: torch.Tensor,
        scores: torch.Tensor,
        distribution: torch.Tensor,
        redrawn: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tiers and redrawn tokens of speculative sampling against the distribution of tiers A and B."""
        tokens, k = draft.tokens, draft.tokens.shape[1]
        if not k:
            return tokens, redrawn
        every = self.drafter.tiers(
            state, log_ratio[:, :k], confidence[:, :k, None], scores[:, :k], None, self.thresholds, self.regen_min_conf
        )
        p = draft.distributions if draft.distributions is not None else point_masses(tokens, distribution.shape[-1])
        both = laws.coupled_distribution(p, distribution[:, :k], every)
        counts = draft.counts_on_device
        verdict = acceptance.speculative_sample(tokens, counts, torch.cat([both, distribution[:, k:]], dim=1), p)
        refused = torch.arange(k, device=tokens.device) >= verdict.accepted[:, None]
        instead = torch.cat([torch.where(refused, verdict.tokens[:, :k], redrawn[:, :k]), redrawn[:, k:]], dim=1)
        return torch.where(refused, REGENERATE, ACCEPT), instead

    def _escalate(self, state: DecodingState, draft: Draft, tier: str) -> Forward:
        """Run the model over all that it has not read and the drafts in question; let it decide those."""
        rows, tokens = self.decided, draft.tokens
        read = [self.read[row] for row in state.active]
        back = [count - 1 - known for count, known in zip(state.committed, read, strict=True)]
        fed = []
        for slot, row in enumerate(rows):
            own = tokens[slot, row.escalate : draft.counts[slot]] if row.escalate is not None else tokens[slot, :0]
            new = torch.tensor(row.tokens, dtype=torch.int64, device=state.device)
            text = state.text.tokens[state.active[slot], read[slot] : state.committed[slot]]
            fed.append(torch.cat([text, new, own]))
        block = torch.nn.utils.rnn.pad_sequence(fed, batch_first=True)
        output = state.forward(block, read)
        scores = state.process(output.logits, block[:, 1:], back)
        if self.config.audit:
            self._audit(state, scores)
        first = torch.tensor([b + len(row.tokens) for b, row in zip(back, rows, strict=True)], device=state.device)
        begins = torch.tensor([row.escalate or 0 for row in rows], device=state.device)
        alone = self.config.escalate_scope == "token" and tier == "C"
        limit = 1 if alone else tokens.shape[1]
        left = [
            0 if row.escalate is None else min(limit, count - row.escalate)
            for row, count in zip(rows, draft.counts, strict=True)
        ]
        width, counts = max(left), torch.tensor(left, device=state.device)
        drafts, judges = _window(tokens, begins, width), _window(scores, first, width + 1)
        if state.do_sample:
            distribution = None if draft.distributions is None else _window(draft.distributions, begins, width)
            verdict = acceptance.speculative_sample(drafts, counts, state.distribution(judges), distribution)
        else:
            verdict = acceptance.greedy_match(drafts, counts, judges.argmax(dim=-1))
        for slot, (accepted, new) in enumerate(zip(verdict.accepted.tolist(), verdict.tokens.tolist(), strict=True)):
            if rows[slot].escalate is None:
                continue
            count = accepted + (not (alone and accepted))  # what follows a draft that was judged alone is left open
            for j, token in enumerate(new[:count]):
                rows[slot].add(token, tier if left[slot] else "Q", int(first[slot]) + j)
        return Forward(output.logits.to(state.device), scores)

    def _audit(self, state: DecodingState, scores: torch.Tensor) -> None:
        """Compare what the tiers emitted since the model's last pass, and in this round, with its own choices."""
        for slot, row in enumerate(self.decided):
            seen = self.unread[state.active[slot]] + list(zip(row.tokens, row.shares, strict=True))
            if not seen:
                continue
            distribution = scores[slot, : len(seen)].float().log_softmax(dim=-1).clamp(min=_LEAST)
            tokens = torch.tensor([token for token, _ in seen], device=distribution.device)
            matches = (distribution.argmax(dim=-1) == tokens).tolist()
            found = distribution.gather(1, tokens[:, None])[:, 0].tolist()
            for match, log_q, (_, share) in zip(matches, found, seen, strict=True):
                self.audit.add(match, log_q, share)
                self.missed += 0.1 * ((not match) - self.missed)
        config = self.config
        if config.audit_action == "tighten":
            if self.missed > config.audit_target:
                self._tighten(0.05)
            elif self.missed < config.audit_target / 2:
                self._tighten(-0.01)

    def _tighten(self, step: float) -> None:
        """Move the thresholds, never under the configured ones."""
        accept, escalate = self.thresholds
        self.thresholds = max(self.config.thresholds[0], min(max(1.0, accept), accept + step)), escalate
        self.regen_min_conf = max(
            self.config.regen_min_conf, min(max(1.0, self.regen_min_conf), self.regen_min_conf + step)
        )

    def _result(self, state: DecodingState, draft: Draft, slim: Forward | None, target: Forward | None) -> StepResult:
        """Put the rows' decisions together."""
        rows = self.decided
        tokens = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row.tokens, dtype=torch.int64, device=state.device) for row in rows], batch_first=True
        )
        accepted = []
        for row, drafted, count in zip(rows, draft.tokens.tolist(), draft.counts, strict=True):
            same = (new == old for new, old in zip(row.tokens, drafted[:count], strict=False))
            accepted.append(sum(1 for _ in itertools.takewhile(bool, same)))
        logits = scores = None
        config = state.generation_config
        if config.return_dict_in_generate and (config.output_logits or config.output_scores):
            logits, scores = (self._gathered(slim, target, part) for part in (0, 1))
        return StepResult(tokens, [len(row.tokens) for row in rows], draft.counts, accepted, logits, scores)

    def _gathered(self, slim: Forward | None, target: Forward | None, part: int) -> torch.Tensor:
        """Return the logits (part 0) or scores (part 1) that decided each token, `[n, m, V]`."""
        rows = []
        for slot, row in enumerate(self.decided):
            places = [cast(Any, target if whole else slim)[part][slot, place] for whole, place in row.sources]
            rows.append(torch.stack([place.float() for place in places]))
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def commit(self, state: DecodingState, kept: list[int]) -> None:
        """Note who decided what was emitted, and how far the model has read."""
        for row, decided, count, length in zip(state.active, self.decided, kept, state.committed, strict=True):
            self.letters[row] += decided.tiers[:count]
            if self.whole:
                self.read[row], self.unread[row] = length - 1, []
            else:
                self.unread[row] += list(zip(decided.tokens, decided.shares, strict=True))[:count]
        state.target.cache.set_lengths([self.read[row] for row in state.active])

    def report(self, state: DecodingState) -> None:
        """Add to the statistics who decided what, and what the audit found."""
        given = state.prompt.ids.shape[1]
        final = [letters[: column - given] for letters, column in zip(self.letters, state.text.columns, strict=True)]
        counts = Counter("".join(final))
        state.stats.method.update(
            tier_ids=final, tiers={tier: counts[tier] for tier in "ABCSQ"}, audit=self.audit.to_dict()
        )


class _Audit:
    """What the model would have said of the tokens that were emitted without it."""

    def __init__(self) -> None:
        self.matches: list[bool] = []
        self.log_q: list[float] = []
        self.overshoot: list[float] = []

    def add(self, match: bool, log_q: float, share: float) -> None:
        self.matches.append(match)
        self.log_q.append(log_q)
        self.overshoot.append(share - math.exp(log_q))

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


def _window(values: torch.Tensor, begins: torch.Tensor, width: int) -> torch.Tensor:
    """Return `values[i, begins[i] : begins[i] + width]` of each row `[n, width, ...]`; past the end is meaningless."""
    places = begins[:, None] + torch.arange(width, device=values.device)
    rows = torch.arange(len(begins), device=values.device)[:, None]
    return values[rows, places.clamp(max=max(values.shape[1] - 1, 0))]
