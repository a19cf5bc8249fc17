"""DIVERSED: verify against a mixture of draft and target whose weight is fixed, or learned per position.

Idea      most positions don't matter to the task, so that drafts may pass there; a linear head learns where they do.
Drafts    any drafter: `assistant_model` by default, with the true distribution of each token.
Verifies  against `v = w p + (1 - w) q`, with `w` the weight on the target. Lossy: the output follows `v`, exactly;
          `w = 1` is lossless speculative decoding.
Trained   nothing for a fixed weight; a head of one linear layer, by REINFORCE, for a learned one.
Paper     https://arxiv.org/abs/2604.07622
New here  stock assisted decoding has the fixed weight for one row; here are learned weights, batches, a bonus token
          that follows the mixture too, and distributions that no processor has warped twice.

Names are the paper's: `p`, `q`, `v` the distributions of target, draft and verifier, `w` the weight on the *target*,
TV the total variation distance of `p` and `q`. A position rejects with probability `w TV` and deviates from the
target by `(1 - w) TV`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ....configuration import SpeculationConfig
from ... import acceptance
from ...drafting import AssistantDrafter, chosen_drafter, drafter_name
from ...runner import Forward
from ...state import DecodingState
from ...strategy import Draft, Drafter, SpeculationStrategy, StepResult
from .head import DiversedHead, load_head


logger = logging.get_logger(__name__)

_DEFAULT_WEIGHT = 0.7


@dataclass(frozen=True)
class DiversedConfig(SpeculationConfig):
    """Settings of DIVERSED.

    Args:
        num_assistant_tokens (`int`, *optional*, defaults to 5): draft tokens per round and row.
        weight (`float`, *optional*): fixed weight on the target, in [0, 1]; 1 is lossless. 0.7 where neither this nor
            `adapter` is given.
        adapter (`str`, *optional*): folder or Hub repository of a trained head, which gives the weight per position.
        bonus (`str`, *optional*, defaults to `"target"`): distribution of the token after drafts that were all
            accepted, and of the first token. With `"mixture"`, one more draft forward, all tokens follow `v`.
        weight_offset (`float`, *optional*, defaults to 0.0): added to the head's logit: slides one trained head along
            its trade-off.
        w_min (`float`, *optional*, defaults to 0.0): weights below are raised to this.
        w_max (`float`, *optional*, defaults to 1.0): weights above are lowered to this.
        mix_space (`str`, *optional*, defaults to `"prob"`): `"logit"` mixes logits, as the reference's trainer did.
        restrict_to_target_support (`bool`, *optional*, defaults to `False`): never emit a token to which the target's
            warped distribution gives no mass; the mixture is renormalised over the others.
        greedy_temperature (`float`, *optional*, defaults to 1.0): temperature of the distributions that greedy
            decoding mixes.
        drafter (`SpeculationConfig` or `str`, *optional*): what drafts instead of `assistant_model`: settings or name
            of another strategy, such as `AssistedConfig(adapter=...)` or `"prompt_lookup"`. Its `num_assistant_tokens`
            gives way to the one here.
    """

    strategy = "diversed"

    weight: float | None = None
    adapter: str | None = None
    bonus: str = "target"
    weight_offset: float = 0.0
    w_min: float = 0.0
    w_max: float = 1.0
    mix_space: str = "prob"
    restrict_to_target_support: bool = False
    greedy_temperature: float = 1.0
    drafter: SpeculationConfig | str | None = None

    def validate(self) -> None:
        """Raise `ValueError` for a value that is out of range, or settings that exclude each other."""
        if self.weight is not None and not 0 <= self.weight <= 1:
            raise ValueError(f"`weight` must be in [0, 1], got {self.weight}.")
        if self.weight is not None and self.adapter is not None:
            raise ValueError(
                f"`weight={self.weight}` and `adapter={self.adapter!r}` exclude each other: a head gives the weight."
            )
        if self.adapter is None and self.weight_offset:
            raise ValueError(f"`weight_offset={self.weight_offset}` shifts a head's logit, and there is no `adapter`.")
        if not 0 <= self.w_min <= self.w_max <= 1:
            raise ValueError(f"`w_min` and `w_max` must be 0 <= w_min <= w_max <= 1, got {self.w_min}, {self.w_max}.")
        self.check_choices(bonus=("target", "mixture"), mix_space=("prob", "logit"))
        if not 0 < self.greedy_temperature < math.inf:
            raise ValueError(f"`greedy_temperature` must be above 0 and finite, got {self.greedy_temperature}.")
        if not math.isfinite(self.weight_offset):
            raise ValueError(f"`weight_offset` must be finite, got {self.weight_offset}.")

    @property
    def lossless(self) -> bool:
        """Whether the weight is 1 everywhere."""
        return self.weight == 1 == self.w_max or self.w_min == 1


class DiversedStrategy(SpeculationStrategy):
    """Draft as configured, verify against the mixture."""

    config_class = DiversedConfig
    compiles = True
    paper = "https://arxiv.org/abs/2604.07622"
    needs_assistant = True
    presets = {"": {}, "mixture": {"bonus": "mixture"}}
    config: DiversedConfig

    def __init__(self, config: SpeculationConfig, assistant_model: PreTrainedModel | None = None) -> None:
        super().__init__(config, assistant_model)
        self.head: DiversedHead | None = None
        self.sums = torch.zeros(4, dtype=torch.float64)  # tested positions, and over them w, TV and (1 - w) TV

    def make_drafter(self) -> Drafter:
        """Return the configured drafter, the assistant's by default."""
        chosen = self.config.drafter
        drafter = chosen_drafter(chosen, self.assistant_model, self.config)
        name = drafter_name(chosen)
        if self.config.adapter is not None and not drafter.gives_hidden:
            raise ValueError(
                f"`adapter` needs a drafter with hidden states of its own, such as an assistant model; "
                f"{name!r} gives none. Use a fixed `weight` with it."
            )
        if self.config.bonus == "mixture" and not drafter.looks_ahead:
            raise ValueError(
                f"`bonus='mixture'` needs one more draft than is verified, which {name!r} can't give; "
                "allowed: 'target'."
            )
        return drafter

    def prepare(self, model: PreTrainedModel) -> None:
        """Load drafter and head."""
        super().prepare(model)
        if self.config.adapter is not None:
            drafter = cast(AssistantDrafter, self.drafter)  # the only one that gives hidden states
            self.head = load_head(model, drafter.model, self.config.adapter)
            self.hidden = drafter.hidden = True

    def setup(self, state: DecodingState) -> None:
        """Ask for distributions of greedy drafts as well, and warn if the head was trained under other warpers."""
        super().setup(state)
        state.greedy_temperature = self.config.greedy_temperature
        state.stats.method.update(tested_tokens=0, mean_weight=0.0, mean_tv=0.0, mean_bias=0.0)
        trained = {} if self.head is None else self.head.record.get("train", {})
        for name, neutral in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0)):
            value = getattr(state.generation_config, name)
            given = neutral if value is None or not state.do_sample else value
            if state.do_sample and trained.get(name, given) != given:
                logger.warning_once(
                    f"The head of `adapter={self.config.adapter!r}` was trained with {name}={trained[name]}; this "
                    f"call has {given}: acceptance and quality may differ from its card."
                )

    def weights(self, state: DecodingState, draft: torch.Tensor | None, target: torch.Tensor | None) -> torch.Tensor:
        """Return the target's weights, `[...]` for hidden states `[..., H]`, or a scalar for a fixed weight."""
        config = self.config
        if self.head is None:
            fixed = _DEFAULT_WEIGHT if config.weight is None else config.weight
            weight = torch.full((), fixed, device=state.device)
        else:
            head = self.head.to(state.device)
            seen = [cast(torch.Tensor, hidden).to(state.device) for hidden in (draft, target)]
            logit = head.logit(head.features(*seen))
            weight = torch.sigmoid(logit + config.weight_offset)
        return weight.clamp(config.w_min, config.w_max)

    def mixture(self, p: torch.Tensor, q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return `v`, of the shape of the distributions `p` and `q` `[..., V]`, for weights `[...]` or a scalar."""
        w = weight[..., None]
        if self.config.mix_space == "prob":
            v = w * p + (1 - w) * q
        else:
            logits = torch.where(w == 0, q.log(), torch.where(w == 1, p.log(), w * p.log() + (1 - w) * q.log()))
            # distributions without a common token have no geometric mean
            v = torch.where(logits.isfinite().any(-1, keepdim=True), torch.softmax(logits, dim=-1), p)
        if self.config.restrict_to_target_support:
            v = v * (p > 0)
            mass = v.sum(dim=-1, keepdim=True)
            v = torch.where(mass > 0, v / mass.clamp(min=1e-30), p)  # none is left where the draft misses it all
        return v

    def accept(self, state: DecodingState, draft: Draft, target: Forward) -> StepResult:
        """Judge the drafts against the mixture, at the positions that predict them."""
        scores = state.process(target.logits, draft.tokens, counts=draft.counts, stops=False)
        p, tokens, k = state.distribution(scores), draft.tokens, draft.tokens.shape[1]
        counts = draft.counts_on_device
        q = draft.distributions_over(p.shape[-1])
        states = None if target.hidden is None else target.hidden[:, :k]
        w = self.weights(state, draft.hidden, states).expand(tokens.shape) if k else p.new_zeros(tokens.shape)
        explicit = self.config.restrict_to_target_support or self.config.mix_space == "logit"
        rows = torch.arange(len(counts), device=p.device)
        if explicit or not state.do_sample:
            # judged as an ordinary target; after the last draft stands the bonus token's distribution
            judge = torch.cat([self.mixture(p[:, :k], q, w), p[:, k:]], dim=1)
            judge[rows, counts] = p[rows, counts]
            judge_weight = None
        else:
            judge, judge_weight = p, w
        if state.do_sample:
            accepted = acceptance.accept_drafts(tokens, counts, judge, q, judge_weight)
        else:
            accepted = acceptance.greedy_match(tokens, counts, judge.argmax(dim=-1)).accepted
        if self.config.bonus == "mixture" and bool((accepted == counts).any()):
            with state.timed("draft"):
                ahead, hidden = self.drafter.look_ahead(state, draft)
            seen = None if target.hidden is None else target.hidden.to(state.device)[rows, counts]
            judge = judge.clone()
            judge[rows, counts] = self.mixture(p[rows, counts], ahead, self.weights(state, hidden, seen))
        if state.do_sample:
            verdict = acceptance.draw_next(tokens, counts, accepted, judge, q)
        else:
            verdict = acceptance.greedy_match(tokens, counts, judge.argmax(dim=-1))
        self._count(state, p[:, :k], q, w, torch.minimum(accepted + 1, counts))
        verdict = verdict.on_host()
        stayed = verdict.accepted.tolist()
        return StepResult(verdict.tokens, [count + 1 for count in stayed], draft.counts, stayed, target.logits, scores)

    def _count(
        self, state: DecodingState, p: torch.Tensor, q: torch.Tensor, w: torch.Tensor, tested: torch.Tensor
    ) -> None:
        """Add the tested positions, up to the first refusal of each row, to the method's means."""
        if not p.shape[1]:
            return
        real = (torch.arange(p.shape[1], device=p.device) < tested[:, None]).double()
        tv = (p - q).abs().sum(dim=-1) / 2
        # masked sums that stay where they are: picking the real ones would make the host wait
        sums = [(real * value).sum() for value in (torch.ones_like(tv), w, tv, (1 - w) * tv)]
        self.sums = self.sums.to(p.device) + torch.stack(sums)

    def close(self, state: DecodingState) -> None:
        """Report the method's means, and release what `setup` took."""
        super().close(state)
        count, *totals = self.sums.tolist()
        names = ("mean_weight", "mean_tv", "mean_bias")
        means = {name: total / max(count, 1) for name, total in zip(names, totals, strict=True)}
        state.stats.method.update(tested_tokens=int(count), **means)
