"""`Prefixes`: the texts that the entries of one forward follow; and stock processors that take all of them at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from transformers.generation import logits_process as stock

from ..kernels.address import upload


class Prefixes:
    """Of each entry (i, j) of scores `[n, m, V]` the text that it follows: a row's text and its first j drafts.

    Args:
        ids (`torch.Tensor` of shape `[b, >= max(columns)]`, int64): the text, in the caller's row order.
        rows (`list[int]` of length n): the caller's row of each i.
        columns (`list[int]` of length n): columns of committed text of each i.
        drafts (`torch.Tensor` of shape `[n, >= m - 1]`, int64): draft tokens that follow the committed text.
        counts (`Sequence[int]`, *optional*): how many of each row's drafts are real; all by default. -1 says that not
            even the first entry is asked for.
        m (`int`): entries of each row.

    Attributes:
        limits (`list[int]`): entries of each row that follow a real text.
    """

    def __init__(
        self,
        ids: torch.Tensor,
        rows: Sequence[int],
        columns: Sequence[int],
        drafts: torch.Tensor,
        counts: Sequence[int] | None,
        m: int,
    ) -> None:
        self.ids, self.rows, self.columns, self.drafts, self.m = ids, list(rows), list(columns), drafts, m
        self.limits = [m] * len(self.rows) if counts is None else [min(count + 1, m) for count in counts]

    @functools.cached_property
    def text(self) -> torch.Tensor:
        """The text with all drafts, `[b, max(columns) + m - 1]`; zeros behind a row's end."""
        width = max(self.columns) + self.m - 1
        text = self.ids.new_zeros(self.ids.shape[0], width)
        text[:, : min(width, self.ids.shape[1])] = self.ids[:, :width]
        starts = torch.tensor(self.rows)[:, None] * width + torch.tensor(self.columns)[:, None]
        text.view(-1)[(starts + torch.arange(self.m - 1)).to(text.device)] = self.drafts[:, : self.m - 1]
        return text

    @functools.cached_property
    def own(self) -> torch.Tensor:
        """Each i's own row of `text`, `[n, width]`."""
        return self.text if self.rows == list(range(len(self.text))) else self.text[self.rows]

    @functools.cached_property
    def ends(self) -> torch.Tensor:
        """Columns of each prefix, `[n, m]`, on the text's device."""
        return upload(self.columns, self.ids.device)[:, None] + torch.arange(self.m, device=self.ids.device)

    def suffixes(self, width: int) -> torch.Tensor:
        """Return the last `width` tokens of each prefix, `[n, m, width]`; meaningless where it has fewer."""
        places = (self.ends[..., None] + torch.arange(-width, 0, device=self.ids.device)).clamp(min=0)
        return self.own[torch.arange(len(self.own), device=self.ids.device)[:, None, None], places]

    def by_length(self) -> list[tuple[int, list[tuple[int, int]]]]:
        """Return the entries (i, j) by the length of their prefix, shortest first."""
        entries = sorted((start + j, i, j) for i, start in enumerate(self.columns) for j in range(self.m))
        return [(t, [(i, j) for _, i, j in part]) for t, part in groupby(entries, key=lambda entry: entry[0])]


# stock processors over all entries


def _repetition_penalty(processor: Any, scores: torch.Tensor, prefixes: Prefixes) -> torch.Tensor | None:
    """Penalise what each prefix contains; the order of its tokens does not matter, nor how often each one comes."""
    ignored = processor.prompt_ignore_length
    if isinstance(ignored, int):
        return None
    own, places = prefixes.own[:, None], torch.arange(prefixes.own.shape[1], device=scores.device)
    inside, filling = places < prefixes.ends[..., None], own[..., :1]  # a token that every prefix has
    if ignored is not None:  # by row: what stock masks with an id that has no score
        inside = inside & (places >= ignored.to(scores.device)[prefixes.rows, None, None])
        processor, filling = type(processor)(processor.penalty), own.new_full((), scores.shape[-1])
    padded = torch.where(inside, own, filling)
    return processor(padded.flatten(0, 1), scores.flatten(0, 1)).view(scores.shape)


def _no_repeat_ngram(processor: Any, scores: torch.Tensor, prefixes: Prefixes) -> torch.Tensor | None:
    """Ban what would complete an n-gram of the prefix, by comparing its end with every window."""
    size, own, vocabulary = processor.ngram_size, prefixes.own, scores.shape[-1]
    if own.shape[1] < size:
        return scores
    windows = own.unfold(1, size, 1)[:, None]
    same = windows[..., 0].new_ones((*prefixes.ends.shape, windows.shape[2]), dtype=torch.bool)
    same &= torch.arange(size, size + windows.shape[2], device=own.device) <= prefixes.ends[..., None]
    for place, token in enumerate(prefixes.suffixes(size - 1).unbind(dim=-1)):
        same &= windows[..., place] == token[..., None]
    spare = vocabulary  # a column for windows that ban nothing, and for words that have no score
    banned = torch.where(same, windows[..., -1].clamp(max=spare), spare)
    mask = torch.zeros(*banned.shape[:2], vocabulary + 1, dtype=torch.bool, device=scores.device)
    return scores.masked_fill(mask.scatter_(2, banned, True)[..., :vocabulary], -torch.inf)


def _sequence_bias(processor: Any, scores: torch.Tensor, prefixes: Prefixes) -> torch.Tensor | None:
    """Bias what would complete a sequence: nothing before the longest one's length matters."""
    width = max(map(len, processor.sequence_bias))
    if min(prefixes.columns) < width:
        return None
    return processor(prefixes.suffixes(width).flatten(0, 1), scores.flatten(0, 1)).view(scores.shape)


def _least_length(processor: Any, scores: torch.Tensor, prefixes: Prefixes) -> torch.Tensor | None:
    """Treat all texts that are too short alike, and the others not at all."""
    if type(processor) is stock.MinLengthLogitsProcessor:
        least = processor.min_length
    else:
        least = processor.prompt_length_to_skip + processor.min_new_tokens
    short = [(i, j) for i, start in enumerate(prefixes.columns) for j in range(min(prefixes.m, least - start))]
    if not short:
        return scores
    slots, places = torch.tensor(short, device=scores.device).T
    return scores.index_put((slots, places), processor(prefixes.own[:1, : least - 1], scores[slots, places]))


BLOCK_RULES: dict[type, Callable[[Any, torch.Tensor, Prefixes], torch.Tensor | None]] = {
    stock.RepetitionPenaltyLogitsProcessor: _repetition_penalty,
    stock.NoRepeatNGramLogitsProcessor: _no_repeat_ngram,
    stock.SequenceBiasLogitsProcessor: _sequence_bias,
    stock.NoBadWordsLogitsProcessor: _sequence_bias,
    stock.MinLengthLogitsProcessor: _least_length,
    stock.MinNewTokensLengthLogitsProcessor: _least_length,
}
"""By type, what gives a processor's result for all entries, or `None` where it has to go column by column."""
