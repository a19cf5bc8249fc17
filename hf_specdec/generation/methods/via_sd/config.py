"""`ViaSDConfig`: the settings of VIA-SD, and the names that they choose from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from transformers.utils import logging

from ....configuration import SpeculationConfig


logger = logging.get_logger(__name__)


MODES = ("lossless", "lossy")
RULES = ("exact", "gate", "prefilter")
CONVENTIONS = ("sorted", "direct", "literal")
SCOPES = ("block", "token")
ACTIONS = ("report", "tighten")
SCHEDULES = ("constant", "heuristic")
GRANULARITIES = ("layer", "sublayer")
BUDGETS = ("params", "count")
CACHES = ("shared", "own")
_TAU_ACCEPT, _TAU_ESCALATE = 0.7, 0.5

LONGEST_DRAFT = 16
"""Draft tokens that the slim verifier reads at a time, at most."""


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
            ones that follow its own distribution; by the `"gate"` of the paper's tiers; or with `"prefilter"` it only
            drops.
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
        coupled (`bool`, *optional*, defaults to `False`): sampling keeps more drafts for the same distribution; there
            is no tier C then.
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

    _replaced = {"compile": "the slim verifier runs parts of the model, so nothing can be compiled"}

    compile: ClassVar[None] = None  # type: ignore[misc]
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
        if self.draft_stop and self.drafter == "slim":
            raise ValueError(f"`draft_stop={self.draft_stop}` stops an assistant; `drafter='slim'` has none.")
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
