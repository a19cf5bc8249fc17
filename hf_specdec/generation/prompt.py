"""`Prompt`: what `generate()` was given, with the padding taken out and an earlier turn's cache counted in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import DynamicCache

from ..cache.speculative import SpeculativeCache


@dataclass
class Prompt:
    """The rows of one call. A *column* counts the caller's padded matrix, a *position* a row's own tokens.

    Args:
        ids (`torch.Tensor` of shape `[b, T]`, int64): `input_ids` as given: the text that processors and criteria see.
        mask (`torch.Tensor` of shape `[b, M]`, bool): real tokens; M is T plus the columns that only the cache holds.
        past (`DynamicCache`, *optional*): an earlier turn's cache, as given.
        past_width (`int`): columns that it holds.
        lengths (`list[int]`): real tokens per row, cached ones included.
        cached (`list[int]`): tokens per row that come from `past`; the last token is always fed again.
        tokens (`torch.Tensor` of shape `[b, max(lengths)]`, int64): ids by position; cached tokens that were not given
            are 0.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    past: DynamicCache | None
    past_width: int
    lengths: list[int]
    cached: list[int]
    tokens: torch.Tensor

    @classmethod
    def read(
        cls, ids: torch.Tensor, mask: torch.Tensor | None, past: DynamicCache | None, width: int | None
    ) -> Prompt:
        """Build the prompt of `ids` `[b, T]`: the whole text or, with an earlier turn's cache, only what is new.

        The attention mask `[b, M]` covers the whole text. Without one all is real, in `width` columns where known.

        Raises:
            ValueError: for an empty or right-padded prompt, and for a mask or cache that does not fit `ids`.
        """
        b, given = ids.shape
        if not given:
            raise ValueError("`input_ids` has no tokens; give at least one (a BOS token, for instance).")
        past_width = past.get_seq_length() if past is not None else 0
        if mask is None:
            if width is None:
                width = given if past_width < given else past_width + given
            mask = torch.ones(b, width, dtype=torch.bool, device=ids.device)
        mask = mask.to(device=ids.device, dtype=torch.bool)
        shift = mask.shape[1] - given
        if mask.shape[0] != b or shift < 0 or (shift and shift != past_width):
            raise ValueError(
                f"`attention_mask` has the shape {tuple(mask.shape)} for `input_ids` {tuple(ids.shape)} and "
                f"{past_width} cached tokens; it must cover the whole text."
            )
        if not bool(mask[:, -1].all()):
            raise ValueError("`attention_mask` ends in 0: the prompts are right-padded. Set `padding_side='left'`.")
        if past_width > mask.shape[1]:
            raise ValueError(f"`past_key_values` holds {past_width} tokens, the prompt only {mask.shape[1]}.")
        lengths = mask.sum(dim=1).tolist()
        in_past = mask[:, :past_width].sum(dim=1).tolist()
        cached = [min(seen, length - 1) for seen, length in zip(in_past, lengths, strict=True)]
        tokens = ids.new_zeros(b, max(lengths))
        row, column = mask.nonzero(as_tuple=True)
        position = (mask.cumsum(dim=1) - 1)[row, column]
        known = column >= shift
        tokens[row[known], position[known]] = ids[row[known], column[known] - shift]
        return cls(ids, mask, past, past_width, lengths, cached, tokens)

    def load_past(self, cache: SpeculativeCache, rows: list[int]) -> None:
        """Copy the cached prefix of the given rows into `cache`."""
        if self.past is None or not any(self.cached[row] for row in rows):
            return
        counts = [self.cached[row] for row in rows]
        # column of each row's p-th real token: real columns sort before the masked ones
        columns = torch.argsort((~self.mask[rows]).int(), dim=1, stable=True)[:, : max(counts)]
        columns = columns.clamp(max=self.past_width - 1)  # what follows a row's count may not be in the cache
        cache.load(self.past, columns, counts, self.past_width, rows)

    def slots(self, generated: int) -> torch.Tensor:
        """Return the position in each column after `generated` more, `[b, M + generated]`; -1 for padding."""
        prompt = torch.where(self.mask, self.mask.cumsum(dim=1) - 1, -1)
        extra = torch.arange(generated, device=self.mask.device)
        lengths = torch.tensor(self.lengths, device=self.mask.device)
        return torch.cat([prompt, lengths[:, None] + extra], dim=1)
