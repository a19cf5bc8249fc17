"""Vegas: draft with sparse attention over the cached tokens that the last verification found important.

Idea      verification attends to the whole cache anyway, so the importance of every cached token is a by-product.
Drafts    the model itself; each full-attention layer reads a few per cent of the cache, chosen once per round.
Verifies  losslessly, with one full forward over the pending token and the drafts, which also rewrites their keys and
          values.
Trained   nothing.
Paper     https://arxiv.org/abs/2602.07223
New here  stock assisted decoding has no sparse drafts, no second use of one cache, and no batches.

Names are the paper's: `B` the tokens chosen per row and layer, `S_k` the keys of the verification forward, `valid` the
candidates, recents the tokens after them, which drafts always read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers.utils import logging

from ...cache.fixed import FixedView
from ...cache.selection import FixedSelector, Selector
from ...cache.sparse import SparseView
from ...configuration import SpeculationConfig
from ...kernels.request import TOKENS_ONLY, ForwardRequest, ScoreRequest
from ..state import DecodingState
from ..strategy import Draft, Drafter, SpeculationStrategy


logger = logging.get_logger(__name__)

_WINDOW_SINKS = 4


@dataclass(frozen=True)
class VegasConfig(SpeculationConfig):
    """Settings of Vegas.

    Args:
        num_assistant_tokens (`int`, *optional*, defaults to 6): draft tokens per round and row (gamma).
        kv_ratio (`float`, *optional*, defaults to 0.07): share of the cached tokens that drafts read, in (0, 1] (rho).
        min_tokens (`int`, *optional*, defaults to 256): tokens chosen at least; contexts up to this length are drafted
            densely.
        max_tokens (`int`, *optional*): tokens chosen at most; `None` for no cap.
        min_context (`int`, *optional*, defaults to 2048): rows with fewer tokens take plain steps, because drafting
            them costs more than it gains; `hf-specdec calibrate vegas` measures the value for a device.
        selection (`str`, *optional*, defaults to `"verification"`): `"window"` reads the first and the newest tokens
            instead, as many of them (the baseline of MagicDec and StreamingLLM).
        metric (`str`, *optional*, defaults to `"weight"`): rank by attention weight, or by `"logit"`.
        queries (`str`, *optional*, defaults to `"first_last"`): queries of the verification that rank; `"last"` and
            `"all"` are the paper's ablations.
        per_key_head (`bool`, *optional*, defaults to `False`): a list for each key head instead of one per layer and
            row.
        num_sink (`int`, *optional*): first tokens that are always chosen; defaults to 0, and to 4 with
            `selection="window"`.
        num_recent (`int`, *optional*, defaults to 0): newest candidates that are always chosen.
    """

    strategy = "vegas"

    num_assistant_tokens: int = 6
    kv_ratio: float = 0.07
    min_tokens: int = 256
    max_tokens: int | None = None
    min_context: int = 2048
    selection: str = "verification"
    metric: str = "weight"
    queries: str = "first_last"
    per_key_head: bool = False
    num_sink: int | None = None
    num_recent: int = 0

    def validate(self) -> None:
        """Raise `ValueError` for a value that is out of range."""
        if not 0 < self.kv_ratio <= 1:
            raise ValueError(f"`kv_ratio` must be in (0, 1], got {self.kv_ratio}.")
        for name, least in (("min_tokens", 1), ("min_context", 0), ("num_recent", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ValueError(f"`max_tokens` must be at least `min_tokens` ({self.min_tokens}), got {self.max_tokens}.")
        if self.num_sink is not None and self.num_sink < 0:
            raise ValueError(f"`num_sink` must be at least 0, got {self.num_sink}.")
        self.check_choices(selection=("verification", "window"), metric=("weight", "logit"))
        self.check_choices(queries=("first_last", "last", "all"))

    def budget(self, keys: int, valid: int) -> int:
        """Return `B`, how many of `valid` candidates to choose when the forward has `keys` keys, drafts included."""
        # 0.07 * 5000 is 350.00000000000006 in floats
        count = max(math.ceil(self.kv_ratio * keys - 1e-9), self.min_tokens)
        if self.max_tokens is not None:
            count = min(count, self.max_tokens)
        return min(count, valid)


_warned: set[int] = set()


def _warn_of_plain_steps(longest: int, least: int) -> None:
    """Say that nothing is drafted yet, once per process and `min_context` whatever the contexts are."""
    if least not in _warned:
        _warned.add(least)
        logger.warning(
            f"The longest context has {longest} tokens, and Vegas drafts from `min_context={least}` on: until then it "
            "takes plain steps. To draft earlier, lower `min_context`; `hf-specdec calibrate vegas` measures the "
            "value from which drafts pay on this device."
        )


class VegasDrafter(Drafter):
    """Drafts with the target itself, over a `SparseView` of its cache."""

    compiles = True
    needs_target_pass_every_round = True  # which chooses what the next drafts read

    def __init__(self, config: VegasConfig) -> None:
        self.config = config
        self.view: SparseView | FixedView

    def setup(self, state: DecodingState) -> None:
        """Make the draft view of the target's cache."""
        config = self.config
        sinks = config.num_sink
        if sinks is None:
            sinks = _WINDOW_SINKS if config.selection == "window" else 0
        request = ScoreRequest(config.queries, config.metric, config.per_key_head)
        rules: Any = {"sinks": sinks, "newest": config.num_recent, "by_position": config.selection == "window"}
        cache, recents, rows = state.target.cache, 2 * config.num_assistant_tokens + 1, len(state.active)
        if state.target.fixed:  # selection is a part of the captured verification, and not timed apart
            rules |= {"longest": state.longest, "device": state.target.device}
            selector = FixedSelector(rows, config.budget, request, **rules)
            self.view = FixedView(cache, selector, recents)
        else:
            stats, device = state.stats, state.device  # not the state: it holds the view
            timed = partial(stats.phase, "select", device)
            self.view = SparseView(cache, Selector(rows, config.budget, request, **rules), recents, timed)
        if not any(self.view.covered):
            logger.warning_once(
                f"{type(state.model).__name__} has sliding-window layers only: Vegas has nothing to leave out, so "
                "the call takes plain steps."
            )
        elif max(state.committed) < config.min_context:
            _warn_of_plain_steps(max(state.committed), config.min_context)
        state.followers.append(self.view)
        state.stats.method.update(plain_rows=0, selections=0, mean_kv_budget=0.0)

    def prefill_request(self, state: DecodingState) -> ForwardRequest:
        """Let the last prompt token's forward make the first selection."""
        return self._scoring(state, [0] * len(state.active))

    def propose(self, state: DecodingState) -> Draft:
        """Draft in lock-step, every full-attention layer reading the chosen tokens and what came after them."""
        view, committed = self.view, state.committed
        room = state.draft_room(self.config.num_assistant_tokens)
        # a row drafts if it is long enough and the last forward has chosen for it
        counts = [
            count if length >= self.config.min_context and view.fresh(index, length - 1) else 0
            for index, (count, length) in enumerate(zip(room, committed, strict=True))
        ]
        state.stats.method["plain_rows"] += sum(
            not count and left > 0 for count, left in zip(counts, room, strict=True)
        )
        if not max(counts):
            return Draft.empty(state)
        token, drafts = state.pending, state.pending[:, :0]
        distributions = []
        for ahead in range(max(counts)):
            # a row that drafts less repeats its last column: computed, never used, and no column past the buffer is
            # written
            positions = [
                length - 1 + min(ahead, max(count - 1, 0)) for length, count in zip(committed, counts, strict=True)
            ]
            view.place(positions)
            state.stats.draft_forwards += 1
            logits = state.target.forward(token, positions, ForwardRequest(view=view)).logits[:, -1]
            logits = logits.to(state.device)
            choice, distribution, _, counts = state.draft_next(logits, drafts, counts)
            if ahead >= max(counts):
                break
            token = choice[:, None]
            drafts = torch.cat([drafts, token], dim=1)
            if distribution is not None:
                distributions.append(distribution)
        return Draft(drafts, counts, torch.stack(distributions, dim=1) if distributions else None)

    def verify_request(self, state: DecodingState, draft: Draft) -> ForwardRequest:
        """Let the verification choose the tokens of the next round, by each row's first and last real query."""
        return self._scoring(state, draft.counts)

    def _scoring(self, state: DecodingState, last: list[int]) -> ForwardRequest:
        longest = max(length + count for length, count in zip(state.committed, last, strict=True))
        if longest + 1 < self.config.min_context or not any(self.view.covered):
            return TOKENS_ONLY  # no row can draft in the next round
        return ForwardRequest(self.view, last)

    def commit(self, state: DecodingState) -> None:
        """Count what the last forward chose."""
        method, view = state.stats.method, self.view
        method["selections"] = view.selections
        if view.selections and view.counts:
            method["mean_kv_budget"] = sum(view.counts) / len(view.counts)


class VegasStrategy(SpeculationStrategy):
    """Draft sparsely, verify densely, choose from the verification's attention."""

    config_class = VegasConfig
    compiles = True
    paper = "https://arxiv.org/abs/2602.07223"
    presets = {
        "": {},
        "window": {"selection": "window"},
        "logit": {"metric": "logit"},
        "per_key_head": {"per_key_head": True},
    }
    config: VegasConfig

    def make_drafter(self) -> Drafter:
        """Return the sparse drafter."""
        return VegasDrafter(self.config)
