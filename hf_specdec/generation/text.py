"""`Text`: the tokens of all rows, the only owner of what has been emitted.

A *column* counts the caller's padded matrix, a *position* a row's own tokens. The text is kept by position, without
padding: on the host, where drafters look things up, and where the model reads it, on its device. On a CPU both are one
tensor. What a round writes travels to the device once, when the next round first reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ..kernels.address import upload
from .prompt import Prompt


class Text:
    """The text of one call.

    Args:
        prompt (`Prompt`): what it begins with.
        max_length (`int`): columns that a row can have at most.
        pad_token (`int`): id of the padding.

    Attributes:
        host (`torch.Tensor` of shape `[b, longest]`, int64): the text by position, on the CPU; padding behind it.
        longest (`int`): tokens that a row can have at most, those of an earlier turn included.
        columns (`list[int]`): columns that each row has.
    """

    def __init__(self, prompt: Prompt, max_length: int, pad_token: int) -> None:
        self.pad_token, self._max_length, self._prompt = pad_token, max_length, prompt.ids
        rows, given = prompt.ids.shape
        # `max_length` counts columns of `input_ids`, which may be the new tokens only, behind a longer cache
        self.longest = max(max_length, max(prompt.lengths) + max_length - given)
        self._tokens = prompt.ids.new_full((rows, self.longest), pad_token)
        self._tokens[:, : prompt.tokens.shape[1]] = prompt.tokens
        for row, length in enumerate(prompt.lengths):
            self._tokens[row, length:] = pad_token
        self.host = self._tokens.cpu()
        self.columns = [given] * rows
        # position = column - offset for generated tokens; negative where a cache holds columns that `input_ids` lacks
        self._offsets = [given - length for length in prompt.lengths]
        self._shifts = torch.tensor(self._offsets, device=prompt.ids.device)[:, None]
        self._waiting: dict[tuple[int, int], int] = {}  # by row and position, tokens that the device lacks
        self._located: tuple[list[int], list[int]] | None = None
        self._places: torch.Tensor

    @property
    def device(self) -> torch.device:
        """Where the caller's ids are."""
        return self._tokens.device

    @property
    def tokens(self) -> torch.Tensor:
        """The text by position on the model's device, `[b, longest]`, int64."""
        if self._waiting:
            self._send([])
        return self._tokens

    def lengths(self, rows: Sequence[int]) -> list[int]:
        """Return how many tokens each of `rows` has."""
        return [self.columns[row] - self._offsets[row] for row in rows]

    def tail(self, rows: Sequence[int], width: int) -> torch.Tensor:
        """Return the newest `width` tokens of `rows`, `[n, width]`, on the model's device."""
        located = list(rows), self.lengths(rows)
        if self._waiting or self._located != located:
            self._places = self._send([*located[0], *located[1]]).view(2, -1, 1)
            self._located = located
        index, ends = self._places
        return self._tokens[index, ends + torch.arange(-width, 0, device=self.device)]

    def by_column(self, end: int) -> torch.Tensor:
        """Return a copy of the first `end` columns as stock has them, left-padded, `[b, end]`."""
        given = self._prompt.shape[1]
        positions = torch.arange(given, max(given, end), device=self.device) - self._shifts
        # drafts of a batch may pass the end of a row that has no room for them
        tokens = torch.nn.functional.pad(self.tokens, (0, max(0, end - self._max_length)), value=self.pad_token)
        return torch.cat([self._prompt, tokens.gather(1, positions)], dim=1)[:, :end]

    def column(self, index: int) -> torch.Tensor:
        """Return a generated column as stock has it, `[b]`, on the CPU."""
        return self.host[range(len(self.columns)), [index - offset for offset in self._offsets]]

    def write(self, new: dict[int, list[int]]) -> None:
        """Append tokens to rows."""
        for row, tokens in new.items():
            self._put(row, self.columns[row] - self._offsets[row], tokens)
            self.columns[row] += len(tokens)

    def cut(self, row: int, column: int) -> None:
        """Drop what `row` has from `column` on."""
        surplus = self.columns[row] - column
        self._put(row, column - self._offsets[row], [self.pad_token] * surplus)
        self.columns[row] = column

    @contextmanager
    def speculated(self, new: dict[int, list[int]]) -> Iterator[None]:
        """Append tokens to rows for as long as the context lasts, for whoever drafts or reads behind them.

        They are no part of the text, and are taken back when the context ends, also by an exception. Contexts nest.
        """
        before = {row: self.columns[row] for row in new}
        self.write(new)
        try:
            yield
        finally:
            for row, column in before.items():
                self.cut(row, column)

    def replace(self, tokens: torch.Tensor, columns: list[int]) -> None:
        """Become what another process has decoded: `tokens` as `host`, `[b, longest]`, and the rows' columns."""
        self.host.copy_(tokens)
        self._tokens.copy_(tokens)
        self._waiting, self.columns = {}, columns

    def _put(self, row: int, start: int, tokens: list[int]) -> None:
        if not tokens:
            return
        self.host[row, start : start + len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        if self.host.data_ptr() != self._tokens.data_ptr():
            self._waiting |= {(row, start + index): token for index, token in enumerate(tokens)}

    def _send(self, numbers: list[int]) -> torch.Tensor:
        """Return `numbers` on the device, and write there what it lacks of the text: one upload for both."""
        waiting, self._waiting = self._waiting, {}
        sent = upload([*numbers, *(part for place, token in waiting.items() for part in (*place, token))], self.device)
        if waiting:
            rows, positions, tokens = sent[len(numbers) :].view(-1, 3).unbind(dim=1)
            self._tokens[rows, positions] = tokens
        return sent[: len(numbers)]
