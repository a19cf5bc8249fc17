"""DIMR: which units of a model its slim verifier can do without (VIA-SD). Searched offline, once per model.

Every candidate mask is scored on text that the model wrote, at the positions of the answers, against the model's own
cached logits, in the cache mode of decoding: with `"own"` the slim model reads the whole text, with `"shared"` blocks
of it, over keys and values of the whole model. Candidates race: one that is worse than the best so far by two standard
errors is dropped before it has seen all texts.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..generation.methods.via_sd.config import BUDGETS, CACHES
from ..generation.methods.via_sd.slim_model import SKIP_RATIO
from .scoring import OBJECTIVES, Mask, SlimScorer
from .settings import at_least, option


_POOL, _NEIGHBOURS, _RANDOM_SEEDS = 256, 8, 20
_FAR = 100_003  # between the numbers of a step's random proposals


@dataclass(frozen=True, kw_only=True)
class MaskSearch:
    """Settings of `search_mask`.

    Args:
        objective (`str`, *optional*, defaults to `"tv"`): what is minimised: the total variation distance of the two
            distributions (right for the lossless mode), `"kl"`, `"margin"` (the paper's cost, right for the lossy
            mode) or `"top1"` (the share of different most likely words).
        skip_ratio (`float`, *optional*, defaults to 0.45): share to leave out, in [0.1, 0.7].
        skip_budget_by (`str`, *optional*, defaults to `"params"`): share of the layers' parameters, or of the units
            (`"count"`).
        granularity (`str`, *optional*, defaults to `"layer"`): or `"sublayer"`: attention and MLP apart.
        alpha, beta (`float`, *optional*, default to 0.5): leniency of the paper's cost.
        slim_cache (`str`, *optional*, defaults to `"shared"`): cache mode of decoding.
        max_steps (`int`, *optional*, defaults to 1000): masks scored at most.
        patience (`int`, *optional*, defaults to 300): masks scored without an improvement.
        theta (`int`, *optional*, defaults to 25): every theta-th proposal is Bayesian, the others are random.
        window (`int`, *optional*, defaults to 64): answer tokens read per text.
        mini_batch (`int`, *optional*, defaults to 4): texts between two looks at a race.
        stop_agreement (`float`, *optional*, defaults to 0.95): the search ends at this share of equal most likely
            tokens.
        minutes (`float`, *optional*): the search ends by the clock.
        seed (`int`, *optional*, defaults to 0): of the proposals.
    """

    objective: str = option("tv", "tv or kl (lossless mode), margin (lossy mode), top1.")
    skip_ratio: float = option(SKIP_RATIO, "Share to leave out.")
    skip_budget_by: str = option("params", "Share of the params, or the count, of the units.")
    granularity: str = option("layer", "layer or sublayer.")
    alpha: float = 0.5
    beta: float = 0.5
    slim_cache: str = option("shared", "Cache mode of decoding: shared, or own (with an adapter).")
    max_steps: int = option(1000, "Masks scored at most.", "steps")
    patience: int = option(300, "Masks scored without an improvement.")
    theta: int = 25
    window: int = option(64, "Answer tokens read per text.")
    mini_batch: int = 4
    stop_agreement: float = 0.95
    minutes: float | None = option(None, "Stop by the clock; 0 for never.")
    seed: int = option(0, "Of the proposals.")

    def __post_init__(self) -> None:
        if not 0.1 <= self.skip_ratio <= 0.7:
            raise ValueError(f"`skip_ratio` must be in [0.1, 0.7], got {self.skip_ratio}.")
        choices = (("skip_budget_by", BUDGETS), ("objective", OBJECTIVES), ("slim_cache", CACHES))
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        if not 0 <= self.alpha < 1 or not 1 - self.alpha <= self.beta <= 1:
            raise ValueError(f"`alpha` must be in [0, 1) and `beta` in [1 - alpha, 1], got {self.alpha}, {self.beta}.")
        if self.theta < 2 or not 16 <= self.window <= 512:
            raise ValueError(
                f"`theta` must be at least 2 and `window` in [16, 512], got {self.theta} and {self.window}."
            )
        at_least(self, 1, "max_steps", "patience", "mini_batch")
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"`minutes` must be above 0, got {self.minutes}.")


@dataclass
class _Seen:
    """What the search knows: per mask its mean cost on the texts that it saw, and the best mask's cost on each."""

    costs: dict[Mask, float] = field(default_factory=dict)
    best: Mask = ()
    best_costs: list[float] = field(default_factory=list)
    best_agreement: float = 0.0
    steps: int = 0
    last_gain: int = 0
    seconds: float = 0.0

    @property
    def best_cost(self) -> float:
        return sum(self.best_costs) / len(self.best_costs)


Report = Callable[[dict[str, Any]], None]


def search_mask(
    scorer: SlimScorer,
    settings: MaskSearch,
    folder: str | Path,
    *,
    resume: bool = False,
    report: Report = lambda _: None,
) -> Mask:
    """Return the best mask found.

    Args:
        scorer (`SlimScorer`): scores masks, in the cache mode of `settings`.
        settings (`MaskSearch`): how.
        folder (`str` or `Path`): gets `search.json`, to resume from.
        resume (`bool`, *optional*, defaults to `False`): go on from that file.
        report (`Callable[[dict], None]`, *optional*): gets `step`, `cost` of the mask scored and `best` after each.

    Raises:
        ValueError: if nothing can be left out of the model, or the file was made with other settings.
        FileNotFoundError: if there is nothing to resume from.
    """
    return _Search(scorer, settings, Path(folder), resume, report).run()


class _Search:
    def __init__(self, scorer: SlimScorer, settings: MaskSearch, folder: Path, resume: bool, report: Report) -> None:
        self.scorer, self.settings, self.report = scorer, settings, report
        self.units, self.file = scorer.units, folder / "search.json"
        if not self.units.free:
            raise ValueError(f"A model of {len(self.units.layers)} layers has none that could be left out.")
        self.seen = _Seen()
        self.repeated = 0  # proposals in a row that had been scored before
        self.made_with = {**asdict(settings), "max_steps": None, "patience": None, "minutes": None}
        folder.mkdir(parents=True, exist_ok=True)
        if resume:
            self._load()
        self.start = time.perf_counter() - self.seen.seconds

    def run(self) -> Mask:
        for mask in self._seeds():
            self._race(mask)
        self.repeated = 0
        while not self._over():
            self._race(self._propose())
        self._descend()
        self._save()
        return self.seen.best

    def _seeds(self) -> list[Mask]:
        """Return what the search begins with: even, the later middle, attention first, and random masks."""
        free, ratio, by = self.units.free, self.settings.skip_ratio, self.settings.skip_budget_by
        middle = sorted(free, key=lambda unit: abs(unit / len(self.units) - 0.65))
        orders = [middle]
        if self.units.halves:
            orders.append([unit for unit in middle if unit % 2 == 0] + [unit for unit in middle if unit % 2])
        masks = [self.units.even(ratio, by)] + [self.units.filled(order, ratio, by) for order in orders]
        return [tuple(mask) for mask in masks] + [self._random(-number) for number in range(1, _RANDOM_SEEDS + 1)]

    def _random(self, number: int) -> Mask:
        order = list(self.units.free)
        random.Random(self.settings.seed * 1_000_003 + number).shuffle(order)
        return tuple(self.units.filled(order, self.settings.skip_ratio, self.settings.skip_budget_by))

    def _propose(self) -> Mask:
        step = self.seen.steps
        if step % self.settings.theta or self.repeated:
            return self._random(step + self.repeated * _FAR)
        return self._bayesian(step)

    def _swaps(self, mask: Mask) -> list[Mask]:
        """Return the masks that leave out one other unit instead of one, within the budget."""
        found = []
        for out in self.units.skipped(mask):
            for into in (unit for unit in self.units.free if mask[unit]):
                swapped = list(mask)
                swapped[out], swapped[into] = True, False
                if self.units.fits(swapped, self.settings.skip_ratio, self.settings.skip_budget_by):
                    found.append(tuple(swapped))
        return found

    def _bayesian(self, step: int) -> Mask:
        """Return the mask of greatest expected improvement under a Gaussian process over the masks seen."""
        known = list(self.seen.costs)
        best = sorted(known, key=self.seen.costs.__getitem__)[:_NEIGHBOURS]
        pool = {self._random(step * _POOL + number) for number in range(_POOL)}
        pool |= {swap for mask in best for swap in self._swaps(mask)}
        candidates = sorted(pool - set(known))
        if not candidates:
            return self._random(step)
        values = torch.tensor([self.seen.costs[mask] for mask in known], dtype=torch.float64)
        mean, spread = values.mean(), values.std().clamp(min=1e-9)
        x, y = (torch.tensor(masks, dtype=torch.float64) for masks in (known, candidates))
        scale = 0.15 * len(self.units)
        within, across = (torch.exp(-torch.cdist(a, x, p=1) / scale) for a in (x, y))
        factor = torch.linalg.cholesky(within + 1e-2 * torch.eye(len(x), dtype=torch.float64))
        weights = torch.cholesky_solve(((values - mean) / spread)[:, None], factor)
        middle = (across @ weights)[:, 0]
        half = torch.linalg.solve_triangular(factor, across.T, upper=False)
        deviation = (1 - (half**2).sum(0)).clamp(min=1e-9).sqrt()
        normal, gap = torch.distributions.Normal(0.0, 1.0), (values.min() - mean) / spread - middle
        gain = gap * normal.cdf(gap / deviation) + deviation * normal.log_prob(gap / deviation).exp()
        return candidates[int(gain.argmax())]

    def _race(self, mask: Mask) -> bool:
        """Score a mask, as long as it may still be the best; return whether it is."""
        seen = self.seen
        if mask in seen.costs:
            self.repeated += 1
            return False
        self.repeated = 0
        name, found = self.settings.objective, []
        agreement = 0.0
        for index in range(len(self.scorer)):
            costs = self.scorer(mask, index)
            found.append(costs[name])
            agreement += 1 - costs["top1"]
            if seen.best and (index + 1) % self.settings.mini_batch == 0 and self._lost(found):
                break
        mean, better = sum(found) / len(found), False
        seen.costs[mask] = mean
        seen.steps += 1
        if len(found) == len(self.scorer) and (not seen.best or mean < seen.best_cost):
            seen.best, seen.best_costs, seen.last_gain, better = mask, found, seen.steps, True
            seen.best_agreement = agreement / len(found)
        self.report({"step": seen.steps, "cost": mean, "best": seen.best_cost, "agreement": seen.best_agreement})
        if seen.steps % 10 == 0 or better:
            self._save()
        return better

    def _lost(self, found: Sequence[float]) -> bool:
        """Whether a mask is worse than the best by two standard errors on the texts that it has seen."""
        gaps = torch.tensor(found, dtype=torch.float64) - torch.tensor(self.seen.best_costs[: len(found)])
        return len(found) > 1 and bool(gaps.mean() > 2 * gaps.std() / len(found) ** 0.5)

    def _descend(self) -> None:
        """Exchange single units while that helps."""
        tried = 0
        while tried < 2 * len(self.units) and not self._out_of_time():
            order = self._swaps(self.seen.best)
            random.Random(self.settings.seed + self.seen.steps).shuffle(order)
            fresh = [mask for mask in order if mask not in self.seen.costs]
            if not fresh:
                return
            for mask in fresh:
                tried += 1
                if self._race(mask):
                    tried = 0
                    break
                if tried >= 2 * len(self.units) or self._out_of_time():
                    return

    def _over(self) -> bool:
        seen, settings = self.seen, self.settings
        return (
            seen.steps >= settings.max_steps
            or seen.steps - seen.last_gain >= settings.patience
            or seen.best_agreement >= settings.stop_agreement
            or self.repeated >= _POOL  # a small model has few masks
            or self._out_of_time()
        )

    def _out_of_time(self) -> bool:
        minutes = self.settings.minutes
        return minutes is not None and time.perf_counter() - self.start >= 60 * minutes

    def _save(self) -> None:
        seen = self.seen
        seen.seconds = time.perf_counter() - self.start
        masks = [["".join("01"[kept] for kept in mask), cost] for mask, cost in seen.costs.items()]
        state = {**asdict(seen), "costs": masks, "best": [bool(kept) for kept in seen.best]}
        text = json.dumps({"settings": self.made_with, "texts": len(self.scorer), **state})
        self.file.write_text(text, encoding="utf-8")

    def _load(self) -> None:
        noted = json.loads(self.file.read_text(encoding="utf-8"))
        if noted.pop("settings") != self.made_with or noted.pop("texts") != len(self.scorer):
            raise ValueError(f"{str(self.file)!r} was made with other settings or texts.")
        noted["costs"] = {tuple(kept == "1" for kept in mask): cost for mask, cost in noted["costs"]}
        self.seen = _Seen(**{**noted, "best": tuple(noted["best"])})
