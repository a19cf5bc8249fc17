"""VIA-SD: a slim verifier, routed out of the model itself, between the drafter and the model.

Idea      the model without some of its layers tells good drafts from bad ones at part of the cost.
Drafts    any drafter: `assistant_model` by default, another strategy's, or the slim verifier itself.
Verifies  losslessly by default: the slim verifier turns blocks of drafts into better candidates, and one forward of
          the model judges them all. The published mode is lossy: a token that the slim verifier clearly likes is kept
          (tier A), one that it half likes it writes itself (B), and only the others go to the model (C).
Trained   nothing, or a LoRA that works in the slim passes only (`hf-specdec train via_sd`); the mask of left-out
          layers is searched offline (`hf-specdec calibrate via_sd`).
Paper     https://arxiv.org/abs/2606.12243
New here  stock assisted decoding has two tiers; a lossless mode, batches, an adapter and a free audit go beyond the
          paper.

Names are the paper's: `P`, `S` and `Q` the laws of drafter, slim verifier and model, `r = S(v) / max S` the gate's
measure (of the raw logits, so that it does not move with the temperature), `M = max S`.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers.utils import logging

from ..configuration import SpeculationConfig
from . import acceptance
from .acceptance import ACCEPT, ESCALATE, REGENERATE
from .drafting import NoDrafter, chosen_drafter
from .registry import preset
from .runner import Forward
from .slim import BUDGETS, GRANULARITIES
from .slim_drafter import LONGEST_DRAFT, SlimDrafter, point_masses
from .state import DecodingState
from .strategy import Draft, Drafter, SpeculationStrategy, StepResult


logger = logging.get_logger(__name__)

MODES = ("lossless", "lossy")
RULES = ("exact", "gate", "prefilter")
CONVENTIONS = ("sorted", "direct", "literal")
SCOPES = ("block", "token")
CACHES = ("shared", "own")
ACTIONS = ("report", "tighten")
SCHEDULES = ("constant", "heuristic")
_TAU_ACCEPT, _TAU_ESCALATE = 0.7, 0.5


@dataclass(frozen=True)
class ViaSDConfig(SpeculationConfig):
    """Settings of VIA-SD.

    Args:
        num_assistant_tokens (`int`, *optional*, defaults to 5): drafts that the slim verifier reads at a time (gamma).
        num_assistant_tokens_schedule (`str`, *optional*, defaults to `"constant"`): `"heuristic"` drafts two more
            after a block that stayed whole and one less after any other.
        draft_stop (`float`, *optional*, defaults to 0.0): stop drafting after a token that the assistant gives less
            probability.
        drafter (`SpeculationConfig` or `str`, *optional*): what drafts instead of `assistant_model`: settings or name
            of another strategy, such as `"prompt_lookup"`, or `"slim"`: the slim verifier itself (lossless mode only).
        mode (`str`, *optional*, defaults to `"lossless"`): or `"lossy"`, as published.
        lossless_rule (`str`, *optional*, defaults to `"exact"`): how the slim verifier makes candidates: `"exact"`
            ones that follow its own law; by the `"gate"` of the paper's tiers; or with `"prefilter"` it only drops.
        stage_len (`int`, *optional*, defaults to 8): lossless candidates gathered before the model judges (K).
        stage_stop_conf (`float`, *optional*, defaults to 0.4): judge early after a candidate where M is lower.
        tau_accept (`float`, *optional*, defaults to 0.7): tier A from this r on.
        tau_escalate (`float`, *optional*, defaults to 0.5): tier C below this r.
        alpha1, alpha2 (`float`, *optional*): the paper's thresholds, instead of the two above; 0.5 and 0.3 there.
        alpha_convention (`str`, *optional*, defaults to `"sorted"`): how they are read: `"sorted"` sets the thresholds
            1 - min and 1 - max, `"direct"` alpha1 and alpha2, `"literal"` 1 - alpha2 twice, so that B is empty.
        lossy_level (`float`, *optional*, defaults to 1.0): share of the lossy rounds that are tiered; the model
            verifies the others losslessly. 0 is the lossless mode.
        regen_min_conf (`float`, *optional*, defaults to 0.8): tier B only where M is at least this, else C.
        bonus_min_conf (`float`, *optional*, defaults to 0.8): the slim verifier writes a token after drafts that all
            stayed where M is at least this; above 1 never.
        escalate_scope (`str`, *optional*, defaults to `"block"`): the model judges the rest of the block, or with
            `"token"` only the escalated draft.
        coupled (`bool`, *optional*, defaults to `False`): sampling keeps more drafts for the same law; there is no
            tier C then.
        max_pending (`int`, *optional*, defaults to 32): tokens that the model has not read, from which on a round is
            verified by it; `None` for no limit.
        eos_guard (`bool`, *optional*, defaults to `True`): a drafted end of the text goes to the model unless the slim
            verifier is sure of it.
        audit (`bool`, *optional*, defaults to `True`): whenever the model runs, compare the tokens that it had not
            read with its own choices.
        audit_action (`str`, *optional*, defaults to `"report"`): `"tighten"` raises thresholds while the share of
            differences exceeds `audit_target`.
        audit_target (`float`, *optional*, defaults to 0.05): that share.
        min_slim_agreement (`float`, *optional*, defaults to 0.85): the lossy mode needs a calibrated mask with at
            least this held-out agreement of the most likely words.
        force (`bool`, *optional*, defaults to `False`): decode lossily all the same.
        keep_mask (`list[bool]`, *optional*): per unit, whether the slim verifier has it; by default the mask of
            `adapter`, or without one evenly spaced units.
        granularity (`str`, *optional*, defaults to `"layer"`): what a unit is; `"sublayer"`: attention and MLP apart.
        skip_ratio (`float`, *optional*, defaults to 0.45): share that the evenly spaced mask leaves out.
        skip_budget_by (`str`, *optional*, defaults to `"params"`): of parameters, or of the units (`"count"`).
        slim_cache (`str`, *optional*): the slim verifier reads the model's keys and values (`"shared"`, the default),
            or has its own (`"own"`, what a trained adapter needs).
        adapter (`str`, *optional*): folder or Hub repository with a calibrated mask, and perhaps a trained LoRA.
    """

    strategy = "via_sd"

    num_assistant_tokens_schedule: str = "constant"
    draft_stop: float = 0.0
    drafter: SpeculationConfig | str | None = None
    mode: str = "lossless"
    lossless_rule: str = "exact"
    stage_len: int = 8
    stage_stop_conf: float = 0.4
    tau_accept: float | None = None
    tau_escalate: float | None = None
    alpha1: float | None = None
    alpha2: float | None = None
    alpha_convention: str = "sorted"
    lossy_level: float = 1.0
    regen_min_conf: float = 0.8
    bonus_min_conf: float = 0.8
    escalate_scope: str = "block"
    coupled: bool = False
    max_pending: int | None = 32
    eos_guard: bool = True
    audit: bool = True
    audit_action: str = "report"
    audit_target: float = 0.05
    min_slim_agreement: float = 0.85
    force: bool = False
    keep_mask: list[bool] | tuple[bool, ...] | None = None
    granularity: str = "layer"
    skip_ratio: float = 0.45
    skip_budget_by: str = "params"
    slim_cache: str | None = None
    adapter: str | None = None

    def validate(self) -> None:
        """Raise `ValueError` for a value that is out of range, or settings that exclude each other."""
        choices = {
            "num_assistant_tokens_schedule": SCHEDULES, "mode": MODES, "lossless_rule": RULES,
            "alpha_convention": CONVENTIONS, "escalate_scope": SCOPES, "audit_action": ACTIONS,
            "granularity": GRANULARITIES, "skip_budget_by": BUDGETS,
        }  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        if self.slim_cache not in (None, *CACHES):
            raise ValueError(f"`slim_cache` must be one of {', '.join(CACHES)} or None, got {self.slim_cache!r}.")
        if self.num_assistant_tokens > LONGEST_DRAFT:
            raise ValueError(
                f"`num_assistant_tokens` must be at most {LONGEST_DRAFT}, got it as {self.num_assistant_tokens}."
            )
        for name in ("lossy_level", "draft_stop", "stage_stop_conf", "audit_target", "min_slim_agreement"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], got {getattr(self, name)}.")
        for name in ("regen_min_conf", "bonus_min_conf"):  # above 1 switches off
            if not 0 <= getattr(self, name) <= 1.01:
                raise ValueError(f"`{name}` must be in [0, 1], or 1.01 for never; got {getattr(self, name)}.")
        if not 2 <= self.stage_len <= 64:
            raise ValueError(f"`stage_len` must be in [2, 64], got {self.stage_len}.")
        if self.max_pending is not None and self.max_pending < 1:
            raise ValueError(f"`max_pending` must be at least 1, or None; got {self.max_pending}.")
        if not 0.1 <= self.skip_ratio <= 0.7:
            raise ValueError(f"`skip_ratio` must be in [0.1, 0.7], got {self.skip_ratio}.")
        mask = self.keep_mask
        if mask is not None and any(type(kept) is not bool for kept in mask):
            raise TypeError(f"`keep_mask` must hold bools, got {mask!r}.")
        self._check_thresholds()
        accept, escalate = self.thresholds
        if self.coupled and (self.mode == "lossless" or escalate or self.regen_min_conf or self.eos_guard):
            raise ValueError(
                "`coupled=True` has no tier C: it takes mode='lossy', tau_escalate=0, regen_min_conf=0 and "
                "eos_guard=False."
            )
        if self.mode == "lossy" and self.drafter == "slim":
            raise ValueError("`drafter='slim'` gives the slim verifier nothing to judge; it takes mode='lossless'.")

    def _check_thresholds(self) -> None:
        given = [name for name in ("alpha1", "alpha2") if getattr(self, name) is not None]
        if given:
            if len(given) == 1 or (self.tau_accept, self.tau_escalate) != (None, None):
                raise ValueError("`alpha1` and `alpha2` are given together, and instead of the thresholds `tau_*`.")
            for name in given:
                if not 0 <= getattr(self, name) < 1:
                    raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}.")
            accept, escalate = self.thresholds
            empty = "B" if accept == escalate else "C" if not escalate else ""
            if empty:
                logger.warning(
                    f"`alpha1={self.alpha1}` and `alpha2={self.alpha2}` under alpha_convention="
                    f"{self.alpha_convention!r} leave tier {empty} empty: the thresholds are {accept:.3g} and "
                    f"{escalate:.3g}."
                )
        accept, escalate = self.thresholds
        if not 0 <= escalate <= accept <= 1.01 or not accept:
            raise ValueError(
                "`tau_accept` and `tau_escalate` must be 0 <= tau_escalate <= tau_accept <= 1, or 1.01 to escalate "
                f"all; got {accept:.4g} and {escalate:.4g}."
            )

    @property
    def thresholds(self) -> tuple[float, float]:
        """The values of r from which a draft is in tier A, and below which it is in tier C."""
        one, two = self.alpha1, self.alpha2
        if one is None or two is None:
            accept = _TAU_ACCEPT if self.tau_accept is None else self.tau_accept
            return accept, min(_TAU_ESCALATE, accept) if self.tau_escalate is None else self.tau_escalate
        if self.alpha_convention == "sorted":
            return 1 - min(one, two), 1 - max(one, two)
        return (one, two) if self.alpha_convention == "direct" else (1 - two, 1 - two)

    @property
    def tiered(self) -> bool:
        """Whether some rounds may be decided without the model."""
        return self.mode == "lossy" and self.lossy_level > 0

    @property
    def lossless(self) -> bool:
        """Whether the model decides every token."""
        return not self.tiered or (self.thresholds[1] > 1 and self.bonus_min_conf > 1)

    @property
    def brings_drafter(self) -> bool:
        """Whether a drafter is named."""
        return self.drafter is not None


@dataclass
class _Decided:
    """What one row's tiers decided in a round.

    Args:
        tokens (`list[int]`): new tokens,
        tiers (`str`): and who decided each: A, B, C (the model, after an escalation), S (the slim verifier's own token
            after a whole block) or Q (the model, in a round without tiers).
        sources (`list[tuple[bool, int]]`): the logits of each: whether the model's, and their place in its forward.
        shares (`list[float]`): the probability that the token had under the law that it came from, for the audit.
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


class ViaSDStrategy(SpeculationStrategy):
    """Lossless: two-tier drafting, ordinary verification. Lossy: rounds of tiers, the model where they ask for it."""

    config_class = ViaSDConfig
    paper = "https://arxiv.org/abs/2606.12243"
    needs_assistant = True
    presets = {
        "": {},
        "gate": {"lossless_rule": "gate"},
        "prefilter": {"lossless_rule": "prefilter"},
        "slim": {"drafter": "slim"},
        "safe": {"mode": "lossy"},
        "paper": {
            "mode": "lossy",
            "alpha1": 0.5,
            "alpha2": 0.3,
            "regen_min_conf": 0.0,
            "bonus_min_conf": 1.01,
            "max_pending": None,
            "eos_guard": False,
            "skip_budget_by": "count",
        },
    }
    config: ViaSDConfig
    drafter: SlimDrafter

    def make_drafter(self) -> Drafter:
        """Return the two tiers before the model."""
        config, chosen = self.config, self.config.drafter
        if chosen == "slim":
            return SlimDrafter(config, NoDrafter())
        if isinstance(chosen, str):
            chosen = preset(chosen)
        inner = chosen_drafter(chosen, self.assistant_model, config.num_assistant_tokens, config.draft_stop)
        if config.tiered and inner.needs_target_pass_every_round:
            name = chosen.strategy if chosen is not None else "assisted"
            raise ValueError(
                f"`drafter={name!r}` learns from every pass of the model, and mode='lossy' leaves passes out; use it "
                "with mode='lossless', or another drafter."
            )
        return SlimDrafter(config, inner)

    def setup(self, state: DecodingState) -> None:
        """Prepare the tiers."""
        super().setup(state)
        self.decided: list[_Decided] = []
        if not self.config.tiered:
            return
        config = self.config
        self.thresholds, self.regen_min_conf = config.thresholds, config.regen_min_conf
        self.rounds, self.whole, self.missed = 0, True, 0.0
        self.letters = [""] * state.batch
        self.audit = _Audit()
        # per slot: tokens that the model has read, and what the tiers emitted since
        self.read: list[int] = []
        self.unread: list[list[tuple[int, float]]] = [[] for _ in state.active]
        state.followers.append(self)
        state.stats.method.update(tiered_rounds=0, strict_rounds=0, forced_rounds=0, escalations=0)

    def prefill(self, state: DecodingState) -> Forward:
        """Run the prompts through all tiers."""
        first = super().prefill(state)
        if self.config.tiered:
            self.read = [count - 1 for count in state.committed]
            self.decided = [_Decided(tiers="Q") for _ in state.active]
        return first

    def step(self, state: DecodingState) -> StepResult:
        """Advance by one round: of tiers where those may decide, else as usual."""
        if not self.config.tiered:
            return super().step(state)
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
            count - 1 - read >= limit for count, read in zip(state.committed, self.read, strict=False)
        )
        method["tiered_rounds" if not (strict or forced) else "strict_rounds" if strict else "forced_rounds"] += 1
        return strict or forced

    def _tier(self, state: DecodingState, draft: Draft) -> Forward:
        """Decide each row's drafts by the slim verifier, up to where the model has to; return its logits."""
        config, tokens, k = self.config, draft.tokens, draft.tokens.shape[1]
        logits = self.drafter.slim.read(state, tokens)
        scores = state.process(logits, tokens)
        law = state.law(scores) if state.do_sample else None
        log_ratio, confidence = acceptance.slim_ratio(logits)
        rules = self.thresholds, self.regen_min_conf, config.eos_guard
        tier = self.drafter.tiers(state, log_ratio[:, :k], confidence[:, :k], scores[:, :k], tokens, *rules)
        redrawn = self.drafter.draw(scores, law)
        if config.coupled:
            tier = torch.where(tier == ACCEPT, ACCEPT, REGENERATE)  # what the processors exclude is drawn anew
            if law is not None:
                tier, redrawn = self._couple(state, draft, log_ratio, confidence, scores, law, redrawn)
        given = None if draft.law is None else draft.law.gather(2, tokens[..., None])[..., 0].tolist()
        drawn = None if law is None else law.gather(2, redrawn[..., None])[..., 0].tolist()
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
        law: torch.Tensor,
        redrawn: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tiers and redrawn tokens of speculative sampling against the law of tiers A and B."""
        tokens, k = draft.tokens, draft.tokens.shape[1]
        if not k:
            return tokens, redrawn
        every = self.drafter.tiers(
            state, log_ratio[:, :k], confidence[:, :k, None], scores[:, :k], None, self.thresholds, self.regen_min_conf
        )
        p = draft.law if draft.law is not None else point_masses(tokens, law.shape[-1])
        both = acceptance.coupled_law(p, law[:, :k], every)
        counts = torch.tensor(draft.counts, device=tokens.device)
        verdict = acceptance.speculative_sample(tokens, counts, torch.cat([both, law[:, k:]], dim=1), p)
        refused = torch.arange(k, device=tokens.device) >= verdict.accepted[:, None]
        instead = torch.cat([torch.where(refused, verdict.tokens[:, :k], redrawn[:, :k]), redrawn[:, k:]], dim=1)
        return torch.where(refused, REGENERATE, ACCEPT), instead

    def _escalate(self, state: DecodingState, draft: Draft, tier: str) -> Forward:
        """Run the model over all that it has not read and the drafts in question; let it decide those."""
        rows, tokens = self.decided, draft.tokens
        back = [count - 1 - read for count, read in zip(state.committed, self.read, strict=False)]
        fed = []
        for slot, row in enumerate(rows):
            own = tokens[slot, row.escalate : draft.counts[slot]] if row.escalate is not None else tokens[slot, :0]
            new = torch.tensor(row.tokens, dtype=torch.int64, device=state.device)
            fed.append(torch.cat([state.tail(back[slot] + 1)[slot], new, own]))
        block = torch.nn.utils.rnn.pad_sequence(fed, batch_first=True)
        output = state.forward(block, self.read[: len(rows)])
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
            law = None if draft.law is None else _window(draft.law, begins, width)
            verdict = acceptance.speculative_sample(drafts, counts, state.law(judges), law)
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
            seen = self.unread[slot] + list(zip(row.tokens, row.shares, strict=True))
            if not seen:
                continue
            law = state.law(scores[slot, : len(seen)]).log()
            tokens = torch.tensor([token for token, _ in seen], device=law.device)
            matches = (law.argmax(dim=-1) == tokens).tolist()
            found = law.gather(1, tokens[:, None])[:, 0].tolist()
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
        super().commit(state, kept)
        if not self.config.tiered:
            return
        for slot, (row, count) in enumerate(zip(self.decided, kept, strict=True)):
            self.letters[state.active[slot]] += row.tiers[:count]
            if self.whole:
                self.read[slot], self.unread[slot] = state.committed[slot] - 1, []
            else:
                self.unread[slot] += list(zip(row.tokens, row.shares, strict=True))[:count]
        state.target.cache.set_lengths(self.read[: len(kept)])

    def clean_length(self, state: DecodingState, layer_idx: int, slot: int) -> int:
        """Return what the model has read: behind it lie the slim verifier's states, in some layers."""
        text = super().clean_length(state, layer_idx, slot)
        return min(self.read[slot], text) if self.config.tiered else text  # a criterion may have cut the text since

    def swap(self, i: int, j: int) -> None:
        """Exchange the slots i and j."""
        self.read[i], self.read[j] = self.read[j], self.read[i]
        self.unread[i], self.unread[j] = self.unread[j], self.unread[i]

    def close(self, state: DecodingState) -> None:
        """Report the tiers."""
        super().close(state)
        if not self.config.tiered or not hasattr(self, "letters"):
            return
        given = state.prompt.ids.shape[1]
        final = [letters[: column - given] for letters, column in zip(self.letters, state.columns, strict=True)]
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
