"""Whether a third tier pays: VIA-SD's planner. Measured costs and acceptance in, predicted times out.

All times are in units of one plain token of the model, for one row. A drafter whose tokens the model accepts at a rate
`a` (the slim verifier at `a1`, and the slim verifier's by the model at `a2`) takes, per emitted token,

    two tiers   (g c_p + 1) (1 - a) / (1 - a^(g+1))
    lossless    (m (g c_p + c_s) + 1) (1 - a2) / (1 - a2^(K'+1)),   e1 = (1 - a1^(g+1)) / (1 - a1),
                m = ceil(K / e1) rounds of the slim verifier, K' = m e1 candidates
    lossy       (g c_p + c_s + P) / E,   E = (1 - pi_A^(g+1)) / (1 - pi_A),   P = pi_C (1 - pi_A^g) / (1 - pi_A)

where 1 and c_s grow with the width of the pass as measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..cache.speculative import SpeculativeCache
from ..generation import admission
from ..generation.methods.via_sd import laws
from ..generation.methods.via_sd.slim_model import Slim, Units, slim_model
from ..generation.models.surgery import decoder_layers
from ..generation.models.vocabulary import pad_vocabulary
from ..generation.runner import ModelRunner
from ..kernels.dispatch import register
from ..training.scoring import SlimScorer, margin_cost
from .calibrate_specbound import clocked


GAMMAS = range(1, 17)
STAGES = range(2, 33)


@dataclass(frozen=True)
class Costs:
    """Times in units of a plain token.

    Args:
        draft (`float`): one draft token (c_p).
        slim (`list[float]`): one pass of the slim verifier over 1, 2, ... tokens (c_s); the last counts for more.
        full (`list[float]`): the same of the model.
        overhead (`float`, *optional*, defaults to 0.0): added to every forward, drafts included; only where the other
            figures don't hold it (those that come from bytes).
    """

    draft: float
    slim: Sequence[float]
    full: Sequence[float] = (1.0,)
    overhead: float = 0.0

    def of(self, passes: Sequence[float], width: float) -> float:
        """Return the cost of a pass over `width` tokens."""
        return self.overhead + passes[min(math.ceil(width), len(passes)) - 1]


@dataclass(frozen=True)
class Rates:
    """Acceptance along text that the model wrote.

    Args:
        two_tier (`float`): the drafter's tokens by the model (a).
        inner (`float`): the drafter's by the slim verifier (a1).
        outer (`float`): the slim verifier's by the model (a2).
        tiers (`tuple[float, float, float]`): shares of the drafter's tokens in A, B and C.
        delta (`float`, *optional*): the paper's criterion for a tier in between (Eq. 7), in its cost; a diagnostic.
    """

    two_tier: float
    inner: float
    outer: float
    tiers: tuple[float, float, float]
    delta: float = 0.0


@dataclass(frozen=True)
class Plan:
    """The best settings and the speed-ups over plain decoding that are predicted for them.

    Args:
        two_tier, lossless, lossy (`float`): speed-ups.
        two_tier_gamma, lossless_gamma, stage_len, lossy_gamma (`int`): draft tokens, and candidates per stage.
    """

    two_tier: float
    two_tier_gamma: int
    lossless: float
    lossless_gamma: int
    stage_len: int
    lossy: float
    lossy_gamma: int

    @property
    def advice(self) -> str:
        """What to use, in a sentence."""
        best = max(self.two_tier, self.lossless)
        if best <= 1:
            return "Plain decoding is faster than any lossless setting."
        if self.lossless <= self.two_tier:
            return f'Two-tier is faster: use "assisted" with num_assistant_tokens={self.two_tier_gamma}.'
        return f"The slim tier pays: use num_assistant_tokens={self.lossless_gamma} and stage_len={self.stage_len}."


class ViaSDPlanner:
    """Predicts times per token.

    Args:
        costs (`Costs`): of the device.
        rates (`Rates`): of the models and the text.
    """

    def __init__(self, costs: Costs, rates: Rates) -> None:
        self.costs, self.rates = costs, rates

    def two_tier(self, gamma: int) -> float:
        """Return the time per token of ordinary speculative decoding."""
        costs = self.costs
        return (self._drafts(gamma) + costs.of(costs.full, gamma + 1)) / _tokens(self.rates.two_tier, gamma)

    def lossless(self, gamma: int, stage_len: int) -> float:
        """Return the time per token of the lossless rule `exact`."""
        costs = self.costs
        per_round = _tokens(self.rates.inner, gamma)
        rounds = math.ceil(stage_len / per_round)
        candidates = rounds * per_round
        spent = rounds * (self._drafts(gamma) + costs.of(costs.slim, gamma + 1))
        return (spent + costs.of(costs.full, candidates + 1)) / _tokens(self.rates.outer, candidates)

    def lossy(self, gamma: int) -> float:
        """Return the time per token of the lossy mode, with the slim verifier's own token after whole blocks."""
        costs, (kept, _, escalated) = self.costs, self.rates.tiers
        emitted = _tokens(kept, gamma)
        passes = escalated * (emitted - kept**gamma)  # the sum of kept^j over the drafts, without the bonus
        return (
            self._drafts(gamma) + costs.of(costs.slim, gamma + 1) + passes * costs.of(costs.full, gamma + 1)
        ) / emitted

    def plan(self) -> Plan:
        """Return the best settings of each."""
        gamma = min(GAMMAS, key=self.two_tier)
        pair = min(((g, k) for g in GAMMAS for k in STAGES), key=lambda pair: self.lossless(*pair))
        lossy = min(GAMMAS, key=self.lossy)
        return Plan(1 / self.two_tier(gamma), gamma, 1 / self.lossless(*pair), *pair, 1 / self.lossy(lossy), lossy)

    def _drafts(self, gamma: int) -> float:
        return gamma * (self.costs.draft + self.costs.overhead)


def _tokens(rate: float, drafts: float) -> float:
    """Return the tokens that a round emits: 1 + a + ... + a^drafts."""
    return drafts + 1 if rate >= 1 else (1 - rate ** (drafts + 1)) / (1 - rate)


def costs_by_bytes(layers: float, head: float, skipped: float, draft: float) -> Costs:
    """Return the costs of a device that is bound by reading weights, in parameters (or bytes) of one unit.

    Args:
        layers (`float`): all decoder layers of the model.
        head (`float`): its LM head.
        skipped (`float`): share of the layers that the slim verifier leaves out.
        draft (`float`): the drafter, head included.
    """
    whole = layers + head
    return Costs(draft / whole, [(layers * (1 - skipped) + head) / whole], [1.0])


@torch.no_grad()
def measure_costs(
    model: PreTrainedModel,
    assistant: PreTrainedModel,
    slim: Slim,
    prompt: torch.Tensor,
    width: int = 12,
    repeats: int = 11,
    progress: Callable[[str], None] = lambda _: None,
) -> Costs:
    """Time the parts behind a prompt `[1, T]`, caches warm: medians of interleaved runs."""
    register()
    units, length, room = Units(model, slim.granularity), prompt.shape[1], prompt.shape[1] + width + 2
    runners: dict[str, Any] = {}
    for name, base in (("full", model), ("draft", assistant)):
        windows = admission.layer_windows(base)
        runners[name] = ModelRunner(base, SpeculativeCache(windows, 1, room), room)
        runners[name].prefill(prompt, 0, None)
    times: dict[str, list[float]] = {}
    without = slim_model(model, units, slim.keep, slim.terms)
    runners["slim"] = ModelRunner(without, runners["full"].cache, room, units.attentions(slim.keep))
    cases = [("draft", 1), *((name, count) for count in range(1, width + 1) for name in ("full", "slim"))]
    for _ in range(repeats + 1):
        for name, count in cases:
            tokens = prompt[:, -1:].expand(1, count)
            if prompt.device.type == "cuda":
                torch.cuda.synchronize()
            with clocked(times, f"{name} {count}"):
                runners[name].forward(tokens, [length]).logits.argmax(dim=-1).tolist()
        progress("costs")
    middle = {name: statistics.median(values[1:]) for name, values in times.items()}
    one = middle["full 1"]
    full, lean = ([middle[f"{name} {count}"] / one for count in range(1, width + 1)] for name in ("full", "slim"))
    return Costs(middle["draft 1"] / one, lean, full)


@torch.no_grad()
def measure_rates(
    scorer: SlimScorer, assistant: PreTrainedModel, slim: Slim, gate: laws.Gate, *, sampling: bool = False
) -> Rates:
    """Measure acceptance along the answers of the scorer's texts, which the model wrote.

    Args:
        scorer (`SlimScorer`): texts, and the model's logits of them.
        assistant (`PreTrainedModel`): the drafter.
        slim (`Slim`): mask and adapter.
        gate (`Gate`): of the tiers.
        sampling (`bool`, *optional*, defaults to `False`): rates of sampling at temperature 1 instead of greedy ones.
    """
    sums = torch.zeros(7, dtype=torch.float64)
    for index, text in enumerate(scorer.texts):
        theirs = scorer.teacher[index].float()
        mine = scorer.logits(tuple(slim.keep), index, slim.terms).float()
        ids = text.ids[None, :-1].to(scorer.model.device)
        drafts = assistant(input_ids=ids, use_cache=False).logits[0, text.prompt_length - 1 :].float()
        drafts = pad_vocabulary(drafts, theirs.shape[-1])
        p, s, q = (logits.softmax(-1) for logits in (drafts, mine, theirs))
        log_ratio, confidence = laws.slim_ratio(mine)
        tier = laws.tiers(log_ratio, confidence[:, None], gate)
        if sampling:
            shares = [torch.minimum(x, y).sum() for x, y in ((p, q), (p, s), (s, q))]
            shares += [(p * (tier == kind)).sum() for kind in range(3)]
        else:
            x, y, z = (logits.argmax(-1) for logits in (drafts, mine, theirs))
            of_draft = tier.gather(1, x[:, None])[:, 0]
            shares = [(one == two).sum() for one, two in ((x, z), (x, y), (y, z))]
            shares += [(of_draft == kind).sum() for kind in range(3)]
        delta = margin_cost(q, p).sum() - margin_cost(s, p).sum() - margin_cost(q, s).sum()
        sums += torch.stack([*shares, delta]).double().cpu()
    a, inner, outer, *tiers, delta = (sums / sum(len(t) for t in scorer.teacher)).tolist()
    return Rates(a, inner, outer, (tiers[0], tiers[1], tiers[2]), delta)


def read_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Return the parameters of a model's layers, and of its LM head."""
    layers = sum(p.numel() for layer in decoder_layers(model) for p in layer.parameters())
    head: Any = model.get_output_embeddings().weight
    return layers, head.numel()
