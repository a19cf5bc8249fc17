"""Counting SPD's ticks on prompts: acceptance, tokens per tick, and the speed-up that the paper calls theoretical.

Nothing is timed here. With n stages, K ticks and N tokens (the prefill's first one included) that speed-up is n N / K:
a tick is taken for 1/n of a plain step, and drafting, verification and messages for nothing.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from ..generation.methods.spd.method import SPDConfig
from ..generation.stats import SpeculationStats, on_speculation
from ..training.data import Sampling


@dataclass
class TickReport:
    """What a draft module did on some prompts.

    Args:
        temperature (`float`): of the sampling; 0 is greedy.
        num_stages (`int`): n.
        tokens (`int`): N, over all prompts.
        ticks (`int`): K, over all prompts.
        judged (`int`): drafts that were verified.
        accepted (`int`): drafts that were right.
        outside (`int`): rejections by a word outside the draft vocabulary.
        speedups (`list[float]`): n N / K of each prompt.
        judged_per_fill, accepted_per_fill (`dict[str, int]`): drafts by how many tokens were in flight before them; 1
            is the first draft after the prompt or a rejection.
    """

    temperature: float
    num_stages: int = 0
    tokens: int = 0
    ticks: int = 0
    judged: int = 0
    accepted: int = 0
    outside: int = 0
    speedups: list[float] = field(default_factory=list)
    judged_per_fill: Counter[str] = field(default_factory=Counter)
    accepted_per_fill: Counter[str] = field(default_factory=Counter)

    def add(self, stats: SpeculationStats) -> None:
        """Add one prompt's counters."""
        method = stats.method
        self.num_stages = method["num_stages"]
        self.tokens += sum(map(sum, stats.accept_lengths)) + 1
        self.ticks += method["ticks"]
        self.judged += stats.num_draft_tokens
        self.accepted += stats.num_accepted_tokens
        self.outside += method["rejections_outside_vocabulary"]
        self.speedups.append(method["theoretical_speedup"])
        self.judged_per_fill.update(method["judged_per_fill"])
        self.accepted_per_fill.update(method["accepted_per_fill"])

    def figures(self) -> dict[str, Any]:
        """Return the counters with what follows from them: the acceptance rate, and the mean and pooled speed-up."""
        rate = self.accepted / max(self.judged, 1)
        per_fill = {
            fill: round(self.accepted_per_fill[fill] / count, 4) for fill, count in self.judged_per_fill.items()
        }
        return {
            "temperature": self.temperature,
            "num_stages": self.num_stages,
            "prompts": len(self.speedups),
            "tokens": self.tokens,
            "ticks": self.ticks,
            "acceptance": rate,
            "acceptance_per_fill": per_fill,
            "judged_per_fill": dict(self.judged_per_fill),
            "rejections_outside_vocabulary": self.outside / max(self.judged - self.accepted, 1),
            "tokens_per_tick": self.tokens / max(self.ticks, 1),
            "theoretical_mean": statistics.mean(self.speedups),
            "theoretical_pooled": self.num_stages * self.tokens / max(self.ticks, 1),
            # what the acceptance rate alone predicts, for a long text
            "theoretical_by_acceptance": self.num_stages / (1 + (1 - rate) * (self.num_stages - 1)),
        }


def count_ticks(
    model: PreTrainedModel,
    prompts: Sequence[torch.Tensor],
    config: SPDConfig,
    *,
    temperature: float = 0.0,
    max_new_tokens: int = 128,
    seed: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> TickReport:
    """Decode each of `prompts` `[1, T]` until its end or `max_new_tokens`, and count.

    Args:
        temperature (`float`): of the sampling, without other warpers; 0 is greedy.
        seed (`int`): set before each prompt.
        progress (`Callable[[int], None]`, *optional*): called with 1 after each prompt.

    Raises:
        ValueError: without prompts.
    """
    if not prompts:
        raise ValueError("`prompts` is empty; ticks are counted on at least one.")
    report = TickReport(temperature)
    options = Sampling(temperature, max_new_tokens=max_new_tokens).options()
    for ids in prompts:
        torch.manual_seed(seed)
        found: list[SpeculationStats] = []
        with on_speculation(found.append):
            mask = torch.ones_like(ids)
            cast(Any, model).generate(ids, attention_mask=mask, assistant_strategy=config, **options)
        if any(found[-1].accept_lengths):  # else the prefill's token was the end
            report.add(found[-1])
        progress(1)
    return report
