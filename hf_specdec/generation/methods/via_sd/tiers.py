"""The lossy rounds of VIA-SD: a slim verifier decides what it can, the model what it must."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ....kernels.address import upload
from ... import acceptance
from ...state import DecodingState
from ...strategy import Draft, StepResult
from . import laws
from .audit import Audit, Emitted, tightened
from .config import ViaSDConfig
from .laws import ACCEPT, ESCALATE, REGENERATE, Scored, SlimPass
from .slim_drafter import SlimDrafter


class RoundSchedule:
    """Says of each round in turn whether it is tiered: a share `level` of them is, the others are spread evenly.

    From `limit` tokens of a row on that the model has not read, it has to read them.
    """

    def __init__(self, level: float, limit: int | None) -> None:
        self.level, self.limit, self.rounds = level, limit, 0

    def next(self, unread: Sequence[int]) -> str:
        """Return what the next round is, for how many tokens of each row the model has not read.

        It is `"tiered"`, or verified by the model: `"strict"` by the share or `"forced"` by the limit.
        """
        share = 1 - self.level
        before, after = (math.floor(rounds * share + 1e-9) for rounds in (self.rounds, self.rounds + 1))
        self.rounds += 1
        if after > before:
            return "strict"
        return "forced" if self.limit is not None and max(unread) >= self.limit else "tiered"


@dataclass
class Decision:
    """What one row's tiers decided in a round: new tokens, and of each who decided it.

    Letters say who: A, B, C (the model, after an escalation), S (the slim verifier's own token after a whole block) or
    Q (the model, in a round without tiers).
    """

    tokens: list[int] = field(default_factory=list)
    letters: str = ""
    sources: list[tuple[Scored, int]] = field(default_factory=list)  # the forward that decided, and the index in it
    shares: list[float] = field(default_factory=list)  # probability under the distribution that the token came from
    escalate: int | None = None  # index of the draft from which the model decides

    def add(self, token: int, letter: str, source: Scored, index: int, share: float = 1.0) -> None:
        """Add a token."""
        self.tokens.append(token)
        self.letters += letter
        self.sources.append((source, index))
        self.shares.append(share)

    @property
    def emitted(self) -> list[Emitted]:
        """The tokens with their shares."""
        return list(zip(self.tokens, self.shares, strict=True))


class Tiers:
    """Rounds of tiers, for the rows of one call.

    Attributes:
        gate (`Gate`): as the audit has tightened it.
        read (`list[int]`): per row of the batch, tokens that the model has read.
        letters (`list[str]`): per row of the batch, who decided each token.
        decided (`list[Decision]`): per slot, what the last round decided.
    """

    def __init__(self, config: ViaSDConfig, drafter: SlimDrafter, state: DecodingState) -> None:
        self.config, self.drafter, self.gate = config, drafter, config.gate
        self.schedule = RoundSchedule(config.lossy_level, config.max_pending)
        self.audit = Audit(state.batch)
        self.read, self.letters = [0] * state.batch, [""] * state.batch
        self.decided: list[Decision] = []
        self.whole = True  # whether the model ran in the last round
        state.stats.method.update(tiered_rounds=0, strict_rounds=0, forced_rounds=0, escalations=0)

    def start(self, state: DecodingState) -> None:
        """Note that the model has read the prompts, and gives each row's first token."""
        for row, count in zip(state.active, state.committed, strict=True):
            self.read[row] = count - 1
        self.decided = [Decision(letters="Q") for _ in state.active]

    def step(self, state: DecodingState) -> StepResult:
        """Draft, let the slim verifier decide, and the model where it has to."""
        with state.timed("draft"):
            draft = self.drafter.inner.propose(state)
        kind = self.schedule.next(self._unread(state))
        state.stats.method[f"{kind}_rounds"] += 1
        if kind == "tiered":
            with state.timed("slim"):
                self.decided = self._decide(state, draft)
        else:
            self.decided = [Decision(escalate=0) for _ in state.active]
        self.whole = any(row.escalate is not None for row in self.decided)
        if self.whole:
            with state.timed("verify"):
                self._escalate(state, draft, "C" if kind == "tiered" else "Q")
        result = self._result(state, draft)
        self.drafter.reschedule(draft.counts, result.accepted)
        return result

    def _unread(self, state: DecodingState) -> list[int]:
        """Return how many tokens of each active row, beside the pending one, the model has not read."""
        return [count - 1 - self.read[row] for row, count in zip(state.active, state.committed, strict=True)]

    # the slim verifier decides

    def _decide(self, state: DecodingState, draft: Draft) -> list[Decision]:
        """Decide each row's drafts by the slim verifier, up to where the model has to."""
        slim = self.drafter.read(state, draft.tokens, draft.counts)
        tier, own = self._tiers(state, draft, slim)
        given = torch.ones_like(draft.tokens, dtype=torch.float32)
        if draft.distributions is not None:
            given = draft.distributions.gather(2, draft.tokens[..., None])[..., 0]
        drawn = torch.ones_like(own, dtype=torch.float32)
        if slim.distribution is not None:
            drawn = slim.distribution.gather(2, own[..., None])[..., 0]
        # the slim verifier may end the text of its own accord only where it is sure
        ending = state.is_eos(slim.logits.argmax(dim=-1))
        least = torch.where(ending, self.gate.sure if self.config.eos_guard else 0.0, 0.0)
        if self.config.bonus_min_conf is not None:
            bonus = slim.confidence >= least.clamp(min=self.config.bonus_min_conf)
        else:
            bonus = torch.zeros_like(ending)
        columns = (tier, draft.tokens, given, state.is_eos(draft.tokens), own, drawn, bonus)
        blocks = zip(*(column.tolist() for column in columns), draft.counts, strict=True)
        decided = [_decided(slim, *block) for block in blocks]
        escalated = [row.escalate for row, count in zip(decided, draft.counts, strict=True) if count]
        state.stats.method["escalations"] += sum(escalate is not None for escalate in escalated)
        return decided

    def _tiers(self, state: DecodingState, draft: Draft, slim: SlimPass) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the drafts' tiers `[n, k]`, and the slim verifier's own tokens `[n, k + 1]`."""
        tokens, k = draft.tokens, draft.tokens.shape[1]
        ends = state.is_eos(tokens) if self.config.eos_guard else None
        tier, own = slim.tiers_of(tokens, self.gate, ends), slim.draw(k + 1)
        if not self.config.coupled:
            return tier, own
        if slim.distribution is None or not k:
            # what the processors exclude is drawn anew
            return torch.where(tier == ACCEPT, ACCEPT, REGENERATE), own
        # speculative sampling against the distribution of tiers A and B
        p = draft.distributions_over(slim.scores.shape[-1])
        both = laws.coupled_distribution(p, slim.distribution[:, :k], slim.tiers_of_all(self.gate))
        judge = torch.cat([both, slim.distribution[:, k:]], dim=1)
        verdict = acceptance.speculative_sample(tokens, draft.counts_on_device, judge, p)
        refused = torch.arange(k, device=tokens.device) >= verdict.accepted[:, None]
        instead = torch.where(refused, verdict.tokens[:, :k], own[:, :k])
        return torch.where(refused, REGENERATE, ACCEPT), torch.cat([instead, own[:, k:]], dim=1)

    # the model decides

    def _escalate(self, state: DecodingState, draft: Draft, letter: str) -> None:
        """Run the model over all that it has not read and the drafts in question; let it decide those."""
        rows, back = self.decided, self._unread(state)
        starts = [self.read[row] for row in state.active]
        block, counts = self._unread_block(state, draft, starts)
        logits = state.forward(block, starts).logits
        scores = state.process(logits, block[:, 1:], back, counts, stops=False)
        target = Scored(logits.to(state.device), scores)
        if self.config.audit is not None:
            self._compare(state, target.scores)
        alone = self.config.escalate_scope == "token" and letter == "C"
        limit = 1 if alone else draft.tokens.shape[1]
        left = [
            0 if row.escalate is None else min(limit, count - row.escalate)
            for row, count in zip(rows, draft.counts, strict=True)
        ]
        # where the model's judgement of the drafts begins in its forward
        first = [unread + len(row.tokens) for unread, row in zip(back, rows, strict=True)]
        verdict = self._judge(state, draft, target, first, left)
        for slot, (accepted, new) in enumerate(zip(verdict.accepted.tolist(), verdict.tokens.tolist(), strict=True)):
            if rows[slot].escalate is None:
                continue
            count = accepted + (not (alone and accepted))  # what follows a draft that was judged alone is left open
            for index, token in enumerate(new[:count], start=first[slot]):
                rows[slot].add(token, letter if left[slot] else "Q", target, index)

    def _unread_block(
        self, state: DecodingState, draft: Draft, starts: Sequence[int]
    ) -> tuple[torch.Tensor, list[int]]:
        """Return what the model is to read, `[n, m]`: unread text, what was decided, and the drafts behind it.

        Beside it, how many of each row's tokens follow the first one.
        """
        fed = []
        for slot, (row, decision) in enumerate(zip(state.active, self.decided, strict=True)):
            text = state.text.tokens[row, starts[slot] : state.committed[slot]]
            new = torch.tensor(decision.tokens, dtype=torch.int64, device=state.device)
            count = draft.counts[slot]
            open_from = count if decision.escalate is None else decision.escalate
            fed.append(torch.cat([text, new, draft.tokens[slot, open_from:count]]))
        return torch.nn.utils.rnn.pad_sequence(fed, batch_first=True), [len(part) - 1 for part in fed]

    def _judge(
        self, state: DecodingState, draft: Draft, target: Scored, first: list[int], left: list[int]
    ) -> acceptance.Verdict:
        """Let the model judge `left` drafts of each row by its scores from the index `first` on."""
        width = max(left)
        skipped = [decision.escalate or 0 for decision in self.decided]
        behind, starts, counts = upload([skipped, first, left], state.device)
        drafts, scores = _window(draft.tokens, behind, width), _window(target.scores, starts, width + 1)
        if not state.do_sample:
            return acceptance.greedy_match(drafts, counts, scores.argmax(dim=-1))
        distributions = None if draft.distributions is None else _window(draft.distributions, behind, width)
        return acceptance.speculative_sample(drafts, counts, state.distribution(scores), distributions)

    def _compare(self, state: DecodingState, scores: torch.Tensor) -> None:
        """Audit what the tiers emitted since the model's last pass, and in this round."""
        for slot, (row, decision) in enumerate(zip(state.active, self.decided, strict=True)):
            self.audit.compare(self.audit.unread[row] + decision.emitted, scores[slot])
        if self.config.audit == "tighten":
            self.gate = tightened(self.gate, self.config.gate, self.audit.missed, self.config.audit_target)

    # the result

    def _result(self, state: DecodingState, draft: Draft) -> StepResult:
        """Put the rows' decisions together."""
        rows = self.decided
        tokens = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row.tokens, dtype=torch.int64, device=state.device) for row in rows], batch_first=True
        )
        accepted = [
            _common(row.tokens, drafted[:count])
            for row, drafted, count in zip(rows, draft.tokens.tolist(), draft.counts, strict=True)
        ]
        result = StepResult(tokens, [len(row.tokens) for row in rows], draft.counts, accepted)
        config = state.generation_config
        if config.return_dict_in_generate and (config.output_logits or config.output_scores):
            result.logits = self._gathered(lambda source: source.logits)
            result.scores = self._gathered(lambda source: source.scores)
        return result

    def _gathered(self, part: Callable[[Scored], torch.Tensor]) -> torch.Tensor:
        """Return a part of the forwards that decided the tokens, at each token, `[n, m, V]`."""
        rows = [
            torch.stack([part(source)[slot, index].float() for source, index in decision.sources])
            for slot, decision in enumerate(self.decided)
        ]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def commit(self, state: DecodingState, kept: list[int]) -> None:
        """Note who decided what was emitted, and how far the model has read."""
        decided = zip(state.active, state.committed, self.decided, kept, strict=True)
        for row, committed, decision, count in decided:
            self.letters[row] += decision.letters[:count]
            if self.whole:
                self.read[row], self.audit.unread[row] = committed - 1, []
            else:
                self.audit.unread[row] += decision.emitted[:count]
        state.target.cache.set_lengths([self.read[row] for row in state.active])
        state.unread = max(self._unread(state), default=0)

    def report(self, state: DecodingState) -> None:
        """Add to the statistics who decided what, and what the audit found."""
        given = state.prompt.ids.shape[1]
        final = [letters[: column - given] for letters, column in zip(self.letters, state.text.columns, strict=True)]
        counts = Counter("".join(final))
        state.stats.method.update(
            tier_ids=final, tiers={tier: counts[tier] for tier in "ABCSQ"}, audit=self.audit.to_dict()
        )


def _decided(
    slim: Scored,
    tier: list[int],
    drafted: list[int],
    given: list[float],
    ends: list[bool],
    own: list[int],
    drawn: list[float],
    bonus: list[bool],
    count: int,
) -> Decision:
    """Return what the slim verifier decides of one row's `count` drafts.

    Args:
        slim (`Scored`): its forward, for the record.
        tier, drafted, given, ends (`list`, k entries): of each draft its tier, token, probability, and whether it
            ends the text.
        own, drawn, bonus (`list`, k + 1 entries): the slim verifier's own token at each index, its probability, and
            whether it may be emitted after drafts that all stayed.
    """
    decision = Decision()
    for j in range(count):
        if tier[j] == ESCALATE:
            decision.escalate = j
            return decision
        if tier[j] == ACCEPT:
            decision.add(drafted[j], "A", slim, j, given[j])
        else:
            decision.add(own[j], "B", slim, j, drawn[j])
            if own[j] != drafted[j]:
                return decision  # the drafts behind it continued another text
        if ends[j]:
            return decision
    if bonus[count]:
        decision.add(own[count], "S", slim, count, drawn[count])
    elif not decision.tokens:
        decision.escalate = 0  # nothing was drafted
    return decision


def _common(one: Sequence[int], two: Sequence[int]) -> int:
    """Return how many leading tokens two texts have in common."""
    shared = min(len(one), len(two))
    return next((index for index in range(shared) if one[index] != two[index]), shared)


def _window(values: torch.Tensor, starts: torch.Tensor, width: int) -> torch.Tensor:
    """Return `values[i, starts[i] : starts[i] + width]` of each row `[n, width, ...]`; past the end is meaningless."""
    indices = starts[:, None] + torch.arange(width, device=values.device)
    rows = torch.arange(len(starts), device=values.device)[:, None]
    return values[rows, indices.clamp(max=max(values.shape[1] - 1, 0))]
