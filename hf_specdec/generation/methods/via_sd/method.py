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

Names are the paper's: `P`, `S` and `Q` the distributions of drafter, slim verifier and model, `r = S(v) / max S` the
gate's measure (of the raw logits, so that it does not move with the temperature), `M = max S`.
"""

from __future__ import annotations

from transformers.utils import logging

from ...drafting import chosen_drafter, drafter_name
from ...runner import Forward
from ...state import DecodingState
from ...stats import SpeculationStats
from ...strategy import Drafter, SpeculationStrategy, StepResult
from .config import ViaSDConfig
from .slim_drafter import SlimDrafter
from .tiers import Tiers


logger = logging.get_logger(__name__)


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
            # the paper asks r >= 1 - 0.3 of all but tier C and r >= 1 - 0.5 of tier A, which leaves B empty; these are
            # the same two thresholds in order
            "tau_accept": 0.7,
            "tau_escalate": 0.5,
            "regen_min_conf": 0.0,
            "bonus_min_conf": None,
            "max_pending": None,
            "eos_guard": False,
        },
    }
    aliases = {"lossless": ""}
    config: ViaSDConfig
    drafter: SlimDrafter
    tiers: Tiers | None = None

    def make_drafter(self) -> Drafter:
        """Return the two tiers before the model."""
        config, chosen = self.config, self.config.drafter
        if chosen == "slim":
            return SlimDrafter(config, Drafter())
        inner = chosen_drafter(chosen, self.assistant_model, config, config.draft_stop)
        if config.tiered and inner.needs_target_pass_every_round:
            raise ValueError(
                f"`drafter={drafter_name(chosen)!r}` learns from every pass of the model, and mode='lossy' leaves "
                "passes out; use it with mode='lossless', or another drafter."
            )
        return SlimDrafter(config, inner)

    @classmethod
    def round_ms(cls, stats: SpeculationStats, draft_ms: float, verify_ms: float) -> float:
        """Return the milliseconds of an average round; one of the tiers need not have a verification."""
        spent = super().round_ms(stats, draft_ms, verify_ms)
        tiered = sum(stats.method.get(f"{kind}_rounds", 0) for kind in ("tiered", "strict", "forced"))
        return (spent * stats.target_forwards + 1000 * stats.seconds.get("slim", 0.0)) / tiered if tiered else spent

    @property
    def judges_in_order(self) -> bool:
        """Whether drafts can be judged one by one: not by tiers."""
        return not self.config.tiered

    @property
    def can_stop_drafting(self) -> bool:
        """Whether rounds may go on without drafts: not those of tiers."""
        return not self.config.tiered

    def setup(self, state: DecodingState) -> None:
        """Prepare the tiers."""
        super().setup(state)
        self.tiers = None
        if self.config.tiered:
            self.tiers = Tiers(self.config, self.drafter, state)

    def prefill(self, state: DecodingState) -> Forward:
        """Run the prompts through all tiers."""
        first = super().prefill(state)
        if self.tiers is not None:
            self.tiers.start(state)
        return first

    def step(self, state: DecodingState) -> StepResult:
        """Advance by one round: of tiers where those may decide, else as usual."""
        return super().step(state) if self.tiers is None else self.tiers.step(state)

    def commit(self, state: DecodingState, kept: list[int]) -> None:
        """Note what was emitted, in the lossy mode also how far the model has read."""
        super().commit(state, kept)
        if self.tiers is not None:
            self.tiers.commit(state, kept)

    def clean_length(self, state: DecodingState, layer_idx: int, row: int) -> int:
        """Return what the model has read: behind it lie the slim verifier's states, in some layers."""
        text = super().clean_length(state, layer_idx, row)
        # a criterion may have cut the text since
        return text if self.tiers is None else min(self.tiers.read[row], text)

    def close(self, state: DecodingState) -> None:
        """Report the tiers."""
        super().close(state)
        if self.tiers is not None:
            self.tiers.report(state)
