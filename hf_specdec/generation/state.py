"""`DecodingState`: what a strategy sees of one `generate()` call.

Rows have two numbers: a *row* is the caller's, a *slot* is the place among the active rows (`active[slot] = row`).
Active rows occupy the slots `[0, n)` of every cache; a row that finishes is exchanged with the last active one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Protocol

import torch
from transformers import GenerationConfig, PreTrainedModel

from ..kernels.request import TOKENS_ONLY, ForwardRequest
from ..kernels.twin import with_adapters
from .models.vocabulary import OUTSIDE
from .processors import ProcessorChain
from .prompt import Prompt
from .runner import Forward, ModelRunner
from .stats import SpeculationStats
from .text import Text


_EXTEND_CHUNK = 256
"""Columns per forward when a later turn's prompt is read with our own attention."""


class Follower(Protocol):
    """Anything that keeps something per slot."""

    def swap(self, i: int, j: int) -> None:
        """Exchange what is kept of the slots i and j."""

    def shrink(self, rows: int) -> None:
        """Forget what is kept of the slots from `rows` on: their rows have finished."""


class DecodingState:
    """The call as strategies see it.

    Args:
        model (`PreTrainedModel`): the target, or a copy of it where rows have adapters of their own.
        prompt (`Prompt`): its input.
        generation_config (`GenerationConfig`): as prepared by `generate()`.
        processors (`ProcessorChain`): the caller's logits processors.
        windows (`list[int | None]`): per layer its sliding window.
        stats (`SpeculationStats`): counters.
        adapters (`list[str]`, *optional*): adapter of each row, where they differ (PEFT's `adapter_names`).

    Attributes:
        text (`Text`): the tokens of all rows, in the caller's order.
        active (`list[int]`): the row in each slot.
        greedy_temperature (`float`, *optional*): temperature of the distributions that greedy drafts are to keep;
            `None` for no distributions.
        unread (`int`): newest columns of text, beside the pending one, that the target has not read.
        contexts (`ExitStack`): temporary changes to models; closed when the active rows end, also by an exception.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompt: Prompt,
        generation_config: GenerationConfig,
        processors: ProcessorChain,
        windows: list[int | None],
        stats: SpeculationStats,
        adapters: list[str] | None = None,
    ) -> None:
        self.prompt, self.generation_config = prompt, generation_config
        self._adapters, self._fed = adapters, list[str]()
        self.model = model if self._adapters is None else with_adapters(model, self._fed)
        self.processors, self.windows, self.stats = processors, windows, stats
        self.do_sample = bool(generation_config.do_sample)
        self.greedy_temperature: float | None = None
        self.max_length = int(generation_config.max_length)
        self.batch, given = prompt.ids.shape
        self.device = prompt.ids.device
        pad = generation_config._pad_token_tensor
        self.pad_token = int(pad) if pad is not None else 0
        self.text = Text(prompt, self.max_length, self.pad_token)
        self.active: list[int] = []
        self.unread = 0
        self.followers: list[Follower] = []
        self.contexts = ExitStack()
        self.target: ModelRunner
        self._eos: frozenset[int] = frozenset()

    # what a strategy may ask

    @property
    def longest(self) -> int:
        """Tokens that a row can have at most, those of an earlier turn included."""
        return self.text.longest

    @property
    def committed(self) -> list[int]:
        """Tokens per slot, the pending one included."""
        return self.text.lengths(self.active)

    @property
    def remaining(self) -> list[int]:
        """Tokens that each slot may still emit."""
        return [self.max_length - self.text.columns[row] for row in self.active]

    @property
    def pending(self) -> torch.Tensor:
        """The newest token of each slot, `[n, 1]`: emitted, not yet in any cache."""
        return self.tail(1)

    def tail(self, width: int) -> torch.Tensor:
        """Return the newest `width` tokens of each slot, `[n, width]`."""
        return self.text.tail(self.active, width)

    def draft_room(self, limit: int) -> list[int]:
        """Return how many tokens each slot may draft: at most `limit`, and one less than it may emit."""
        return [0 if self.processors.plain else max(0, min(limit, left - 1)) for left in self.remaining]

    def is_eos(self, ids: torch.Tensor) -> torch.Tensor:
        """Return which of `ids` end a row; bool, of the same shape."""
        return torch.isin(ids, torch.tensor(sorted(self._eos), dtype=ids.dtype, device=ids.device))

    def forward(
        self,
        tokens: torch.Tensor,
        starts: Sequence[int] | None = None,
        request: ForwardRequest = TOKENS_ONLY,
    ) -> Forward:
        """Run the target over `tokens` `[n, m]`, each slot's pending token first (see `ModelRunner.forward`).

        Args:
            starts (`list[int]`, *optional*): where each slot's tokens lie instead.
        """
        self.stats.target_forwards += 1
        starts = [count - 1 for count in self.committed] if starts is None else starts
        return self.target.forward(tokens, starts, request)

    def process(
        self,
        logits: torch.Tensor,
        drafts: torch.Tensor,
        back: Sequence[int] | None = None,
        counts: Sequence[int] | None = None,
        drafting: bool = False,
        stops: bool = True,
    ) -> torch.Tensor:
        """Return `logits` `[n, m, V]` after the caller's processors, on the text's device.

        Args:
            logits: entry (i, j) predicts what follows slot i's text and its first j drafts.
            drafts (`torch.Tensor` of shape `[n, >= m - 1]`, int64): draft tokens.
            back (`list[int]`, *optional*): newest tokens of each slot that count as drafts, and come first in
                `drafts`.
            counts (`list[int]`, *optional*): how many of each slot's drafts are real.
            drafting, stops (`bool`, *optional*): as for `ProcessorChain`. Whoever may emit a draft that is impossible
                needs `stops=False`.
        """
        logits = logits.to(self.device)
        if not len(self.processors) and not self.do_sample:
            return logits  # greedy decoding reads the argmax only, which no cast changes
        columns = [self.text.columns[row] for row in self.active]
        if back is not None:
            columns = [column - less for column, less in zip(columns, back, strict=True)]
        return self.processors(
            logits, self._seen(max(columns)), self.active, columns, drafts, counts, drafting=drafting, stops=stops
        )

    def process_next(
        self,
        logits: torch.Tensor,
        drafts: torch.Tensor,
        counts: Sequence[int] | None = None,
        drafting: bool = True,
    ) -> torch.Tensor:
        """Return `logits` `[n, V]` of what follows the text and `drafts` `[n, j]`, after the caller's processors.

        With `counts`, slots whose real drafts are fewer than j are left out. For the others see `process`.
        """
        if not len(self.processors) and not self.do_sample:
            return logits
        width = drafts.shape[1]
        columns = [self.text.columns[row] + width for row in self.active]
        ids = self._seen(max(columns))
        if width and self.processors.reads_text:
            for slot, row in enumerate(self.active):
                ids[row, columns[slot] - width : columns[slot]] = drafts[slot]
        ahead = None if counts is None else [min(0, count - width) for count in counts]
        rest = drafts[:, :0]
        return self.processors(logits[:, None], ids, self.active, columns, rest, ahead, drafting=drafting)[:, 0]

    def draft_next(
        self, logits: torch.Tensor, drafts: torch.Tensor, counts: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, list[int]]:
        """Choose the draft tokens `[n]` that follow the text and `drafts` `[n, j]`, by a drafter's logits `[n, V]`.

        Returns:
            The tokens, their distributions (see `choose`), the processed scores `[n, V]`, and `counts`, which end at
            j for slots of which the processors leave no word that the drafter knows. No token has been drawn there,
            so that nothing is biased by ending.
        """
        scores = self.process_next(logits, drafts, counts)
        if self.processors.bans:
            scores, possible = self.usable(logits, scores)
            made = drafts.shape[1]
            counts = [n if known else min(n, made) for n, known in zip(counts, possible.tolist(), strict=True)]
        return *self.choose(scores), scores, counts

    @staticmethod
    def usable(logits: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return processed scores `[..., V]` that have a distribution, and where they are a drafter's own, `[...]`.

        Where the processors leave none of the words that its `logits` know, the scores are zeros.
        """
        # far above the logit of words outside a reduced vocabulary, which low precision may have rounded
        possible = ((scores > -torch.inf) & (logits > OUTSIDE / 2)).any(dim=-1)
        return torch.where(possible[..., None], scores, 0.0), possible

    def possible_drafts(self, drafts: torch.Tensor, counts: list[int]) -> list[int]:
        """Return `counts` up to the first of each slot's `drafts` `[n, k]` that the caller's processors ban.

        It may drop a token that is certain, but not one that was drawn: that has to be refused to stay unbiased.
        """
        if not self.processors.bans or not max(counts):
            return counts
        columns = [self.text.columns[row] for row in self.active]
        return self.processors.first_bans(self._seen(max(columns)), self.active, columns, drafts, counts)

    def _seen(self, columns: int) -> torch.Tensor:
        """Return the text that processors see, `[b, columns]`; the prompts where none of them reads it."""
        return self.text.by_column(columns) if self.processors.reads_text else self.prompt.ids

    def commit_processors(self) -> None:
        """Let the caller's processors remember what has been emitted, and forget the drafts."""
        if self.processors.remembering:
            column = max(self.text.columns[row] for row in self.active)
            self.processors.commit(column, self._seen(column), self.unread)

    def choose(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return a token `[n]` from processed scores `[n, V]`, and its distribution `[n, V]`.

        The distribution is `None` for greedy decoding, unless `greedy_temperature` asks for it.
        """
        if not self.do_sample:
            return scores.argmax(dim=-1), None if self.greedy_temperature is None else self.distribution(scores)
        distribution = self.distribution(scores)
        return torch.multinomial(distribution, 1)[:, 0], distribution

    def distribution(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the float32 distribution `[..., V]` of processed scores."""
        scale = 1.0 if self.do_sample or self.greedy_temperature is None else self.greedy_temperature
        return torch.softmax(scores.float() / scale, dim=-1)

    def timed(self, phase: str) -> AbstractContextManager[None]:
        """Return a context that counts the time of a phase, where statistics are timed."""
        return self.stats.phase(phase, self.device)

    # prefill

    def prefill(self, request: ForwardRequest = TOKENS_ONLY) -> Forward:
        """Run the active rows' prompts and return the forward over each row's last prompt token, `[n, 1, V]`.

        The model's own attention reads the prompts if all rows start from equally many cached tokens (none, in a first
        turn); ragged rows of an earlier turn's cache read theirs with our attention.
        """
        cache = self.target.cache
        lengths = [self.prompt.lengths[row] for row in self.active]
        cached = [self.prompt.cached[row] for row in self.active]
        ends = [length - 1 for length in lengths]
        tokens = self.text.tokens[self.active]
        chunk = self.generation_config.prefill_chunk_size
        self.prompt.load_past(cache, self.active)
        cache.set_lengths(cached)
        level = len(set(cached)) == 1
        if level and max(ends) > cached[0]:
            self.target.prefill(tokens[:, : max(ends)], cached[0], chunk)
        if not level:
            self.target.extend(tokens, cached, ends, chunk or _EXTEND_CHUNK)
        cache.set_lengths(ends)
        last = tokens.gather(1, torch.tensor(ends, device=tokens.device)[:, None])
        first = self.target.forward(last, ends, request)
        self.target.warm_up(last, ends, request)
        return first

    # what the loop does

    def activate(self, rows: Sequence[int], target: ModelRunner, eos: frozenset[int]) -> None:
        """Make `rows` active, with a fresh cache."""
        self.active, self.target, self.followers, self._eos = list(rows), target, [target.cache], eos
        self.feed(rows)

    def feed(self, rows: Sequence[int]) -> None:
        """Say which rows the next forwards run, for adapters that differ from row to row."""
        if self._adapters is not None:
            self._fed[:] = [self._adapters[row] for row in rows]

    def retire(self, slot: int) -> None:
        """Take the row in `slot` out of the active ones; its storage stays in the last active slot."""
        last = len(self.active) - 1
        if slot != last:
            self.active[slot], self.active[last] = self.active[last], self.active[slot]
        self.active.pop()
        self.feed(self.active)
        for follower in self.followers:
            if slot != last:
                follower.swap(slot, last)
            follower.shrink(last)
