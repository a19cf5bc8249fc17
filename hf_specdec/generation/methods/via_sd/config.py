"""`ViaSDConfig`: the settings of VIA-SD, and the names that they choose from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers.utils import logging

from ....configuration import SpeculationConfig
from .laws import Gate


logger = logging.get_logger(__name__)


MODES = ("lossless", "lossy")
RULES = ("exact", "gate", "prefilter")
SCOPES = ("block", "token")
AUDITS = ("report", "tighten")
SCHEDULES = ("constant", "heuristic")
GRANULARITIES = ("layer", "sublayer")
BUDGETS = ("params", "count")
CACHES = ("shared", "own")

LONGEST_DRAFT = 16
"""Draft tokens that the slim verifier reads at a time, at most."""

_MASK = "a mask belongs to an adapter's folder: write one with `hf-specdec calibrate via_sd` or `save_slim`"
_THRESHOLDS = "`tau_accept` and `tau_escalate`"


@dataclass(frozen=True)
class ViaSDConfig(SpeculationConfig):
    """Settings of VIA-SD.

    In thresholds and confidences `None` says that no value is high enough.

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
        tau_escalate (`float`, *optional*, defaults to 0.5): tier C below this r; `None` escalates all drafts.
        lossy_level (`float`, *optional*, defaults to 1.0): share of the lossy rounds that are tiered; the model
            verifies the others losslessly. 0 is the lossless mode.
        regen_min_conf (`float`, *optional*, defaults to 0.8): tier B only where M is at least this, else C.
        bonus_min_conf (`float`, *optional*, defaults to 0.8): the slim verifier writes a token after drafts that all
            stayed where M is at least this.
        escalate_scope (`str`, *optional*, defaults to `"block"`): the model judges the rest of the block, or with
            `"token"` only the escalated draft.
        coupled (`bool`, *optional*, defaults to `False`): sampling keeps more drafts for the same distribution; there
            is no tier C then.
        max_pending (`int`, *optional*, defaults to 32): tokens that the model has not read, from which on a round is
            verified by it; `None` for no limit.
        eos_guard (`bool`, *optional*, defaults to `True`): a drafted end of the text goes to the model unless the slim
            verifier is sure of it.
        audit (`str`, *optional*, defaults to `"report"`): whenever the model runs, compare the tokens that it had not
            read with its own choices; `"tighten"` also raises thresholds while the share of differences exceeds
            `audit_target`. `None` compares nothing.
        audit_target (`float`, *optional*, defaults to 0.05): that share.
        min_slim_agreement (`float`, *optional*, defaults to 0.85): the lossy mode needs a calibrated mask with at
            least this held-out agreement of the most likely tokens.
        force (`bool`, *optional*, defaults to `False`): decode lossily all the same.
        slim_cache (`str`, *optional*): the slim verifier reads the model's keys and values (`"shared"`, the default),
            or has its own (`"own"`, what a trained adapter needs).
        adapter (`str`, *optional*): folder or Hub repository with the mask of the slim verifier, and perhaps a trained
            LoRA. Without, the slim verifier leaves out evenly spaced layers, with a warning.
    """

    strategy = "via_sd"

    _replaced = {
        "compile": "the slim verifier runs parts of the model, so nothing can be compiled",
        "alpha1": _THRESHOLDS,
        "alpha2": _THRESHOLDS,
        "alpha_convention": _THRESHOLDS,
        "audit_action": "`audit`",
        "keep_mask": _MASK,
        "granularity": _MASK,
        "skip_ratio": _MASK,
        "skip_budget_by": _MASK,
    }

    compile: ClassVar[None] = None  # type: ignore[misc]
    num_assistant_tokens_schedule: str = "constant"
    draft_stop: float = 0.0
    drafter: SpeculationConfig | str | None = None
    mode: str = "lossless"
    lossless_rule: str = "exact"
    stage_len: int = 8
    stage_stop_conf: float = 0.4
    tau_accept: float | None = 0.7
    tau_escalate: float | None = 0.5
    lossy_level: float = 1.0
    regen_min_conf: float | None = 0.8
    bonus_min_conf: float | None = 0.8
    escalate_scope: str = "block"
    coupled: bool = False
    max_pending: int | None = 32
    eos_guard: bool = True
    audit: str | None = "report"
    audit_target: float = 0.05
    min_slim_agreement: float = 0.85
    force: bool = False
    slim_cache: str | None = None
    adapter: str | None = None

    def validate(self) -> None:
        """Raise `ValueError` for a value that is out of range, or settings that exclude each other."""
        self.check_choices(num_assistant_tokens_schedule=SCHEDULES, mode=MODES, lossless_rule=RULES)
        self.check_choices(escalate_scope=SCOPES, audit=(*AUDITS, None), slim_cache=(*CACHES, None))
        if self.num_assistant_tokens > LONGEST_DRAFT:
            raise ValueError(
                f"`num_assistant_tokens` must be at most {LONGEST_DRAFT}, got it as {self.num_assistant_tokens}."
            )
        for name in ("lossy_level", "draft_stop", "stage_stop_conf", "audit_target", "min_slim_agreement"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], got {getattr(self, name)}.")
        for name in ("tau_accept", "tau_escalate", "regen_min_conf", "bonus_min_conf"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], or None for never; got {value}.")
        if not 2 <= self.stage_len <= 64:
            raise ValueError(f"`stage_len` must be in [2, 64], got {self.stage_len}.")
        if self.max_pending is not None and self.max_pending < 1:
            raise ValueError(f"`max_pending` must be at least 1, or None; got {self.max_pending}.")
        if not 0 <= self.gate.escalate <= self.gate.accept or not self.gate.accept:
            raise ValueError(
                "`tau_accept` must be above 0 and at least `tau_escalate` (None is above all values); got "
                f"tau_accept={self.tau_accept} and tau_escalate={self.tau_escalate}."
            )
        open_gate = (self.tau_escalate, self.regen_min_conf) == (0, 0) and not self.eos_guard
        if self.coupled and (self.mode == "lossless" or not open_gate):
            raise ValueError(
                "`coupled=True` has no tier C: it takes mode='lossy', tau_escalate=0, regen_min_conf=0 and "
                "eos_guard=False."
            )
        if self.draft_stop and self.drafter == "slim":
            raise ValueError(f"`draft_stop={self.draft_stop}` stops an assistant; `drafter='slim'` has none.")
        if self.mode == "lossy" and self.drafter == "slim":
            raise ValueError("`drafter='slim'` gives the slim verifier nothing to judge; it takes mode='lossless'.")

    @classmethod
    def _upgraded(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Return settings of the first release in today's form; fields that went stay where they held a choice."""
        found = dict(values)
        for name, usual in _GONE.items():
            if found.get(name) == usual:
                found.pop(name, None)
        if {"alpha1", "alpha_convention"} & set(values):  # always written, and left-out thresholds as None
            found |= _thresholds(values)
        if isinstance(found.get("audit"), bool):
            found["audit"] = values.get("audit_action", "report") if found["audit"] else None
        for name in ("tau_accept", "tau_escalate", "regen_min_conf", "bonus_min_conf"):
            if found.get(name) == _NEVER:
                logger.warning_once(f"{cls.__name__}: `{name}={_NEVER}` is read as None, which says never today.")
                found[name] = None
        return found

    @property
    def gate(self) -> Gate:
        """What the slim verifier may decide by itself."""
        values = (self.tau_accept, self.tau_escalate, self.regen_min_conf)
        return Gate(*(math.inf if value is None else value for value in values))

    @property
    def tiered(self) -> bool:
        """Whether some rounds may be decided without the model."""
        return self.mode == "lossy" and self.lossy_level > 0

    @property
    def lossless(self) -> bool:
        """Whether the model decides every token."""
        return not self.tiered or (self.tau_escalate is None and self.bonus_min_conf is None)


_NEVER = 1.01
"""What the first release wrote for a threshold that no value reaches."""

_GONE: dict[str, Any] = {
    "alpha1": None, "alpha2": None, "alpha_convention": "sorted", "audit_action": "report", "keep_mask": None,
    "granularity": "layer", "skip_ratio": 0.45, "skip_budget_by": "params",
}  # fmt: skip
"""Fields of the first release and their defaults, which chose nothing."""


def _thresholds(values: dict[str, Any]) -> dict[str, float]:
    """Return the thresholds that settings of the first release meant."""
    one, two = values.get("alpha1"), values.get("alpha2")
    if one is None or two is None:
        accept, escalate = values.get("tau_accept"), values.get("tau_escalate")
        accept = 0.7 if accept is None else accept
        return {"tau_accept": accept, "tau_escalate": min(0.5, accept) if escalate is None else escalate}
    convention = values.get("alpha_convention", "sorted")
    if convention == "sorted":
        one, two = 1 - min(one, two), 1 - max(one, two)
    elif convention == "literal":
        one = two = 1 - two
    return {"tau_accept": one, "tau_escalate": two}
