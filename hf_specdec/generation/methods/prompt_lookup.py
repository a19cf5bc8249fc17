"""Prompt lookup: the text itself drafts, by what followed the last words the last time they came.

Idea      answers repeat their prompts: what followed the newest n-gram before is likely to follow it again.
Drafts    a look-up in the row's own text; no model.
Verifies  losslessly, each draft being a point mass.
Trained   nothing.
Paper     https://arxiv.org/abs/2304.04487
New here  stock's `prompt_lookup_num_tokens` takes one row; here are batches, and a drafter that other methods can use.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...configuration import SpeculationConfig
from ...kernels.address import upload
from ..state import DecodingState
from ..strategy import Draft, Drafter, SpeculationStrategy


@dataclass(frozen=True)
class PromptLookupConfig(SpeculationConfig):
    """Settings of prompt lookup.

    Args:
        num_assistant_tokens (`int`, *optional*, defaults to 10): draft tokens per round and row at most.
        max_matching_ngram_size (`int`, *optional*, defaults to 2): words that are looked up; fewer where so many were
            not found.
    """

    strategy = "prompt_lookup"

    num_assistant_tokens: int = 10
    max_matching_ngram_size: int = 2

    def validate(self) -> None:
        """Raise `ValueError` for a value that is out of range."""
        if self.max_matching_ngram_size < 1:
            raise ValueError(f"`max_matching_ngram_size` must be at least 1, got {self.max_matching_ngram_size}.")


class LookupDrafter(Drafter):
    """Drafts what followed the newest n-gram at an earlier place in the row's text."""

    compiles = True
    limit: int

    def __init__(self, config: PromptLookupConfig) -> None:
        self.limit, self.longest = config.num_assistant_tokens, config.max_matching_ngram_size

    def propose(self, state: DecodingState) -> Draft:
        """Look up each row's newest words."""
        rows = [
            self._follow(state.text.host[row, :length], room)  # on the CPU, so that no device is waited for
            for row, length, room in zip(state.active, state.committed, state.draft_room(self.limit), strict=True)
        ]
        counts = [len(found) for found in rows]
        tokens = upload(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), state.device)
        counts = state.possible_drafts(tokens, counts)
        return Draft(tokens[:, : max(counts)], counts)

    def _follow(self, text: torch.Tensor, room: int) -> torch.Tensor:
        """Return up to `room` tokens that followed the newest words of `text` `[t]` before, most words first."""
        for size in range(min(self.longest, len(text) - 1), 0, -1):
            windows = text[:-1].unfold(0, size, 1)  # the newest n-gram itself is no earlier place
            places = (windows == text[-size:]).all(dim=1).nonzero()[:, 0]
            if len(places):
                # the latest place that enough words follow, so that a text which repeats itself is drafted in full
                enough = places[places + size + room <= len(text)]
                start = int(enough[-1] if len(enough) else places[0]) + size
                return text[start : start + room]
        return text[:0]


class PromptLookupStrategy(SpeculationStrategy):
    """Draft by look-up, verify losslessly."""

    config_class = PromptLookupConfig
    page = "baselines.md"
    compiles = True
    paper = "https://arxiv.org/abs/2304.04487"
    config: PromptLookupConfig

    def make_drafter(self) -> Drafter:
        """Return the look-up."""
        return LookupDrafter(self.config)
