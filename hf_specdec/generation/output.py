"""`Emitter`: what leaves the loop. It cuts new tokens, runs criteria and streamer by column, and collects scores.

The column clock: column t goes to the stopping criteria and the streamer, as the `[b, t]` matrix of stock decoding,
once every unfinished row has it. Rows that are ahead lose what lies past the verdict.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

from .state import DecodingState
from .strategy import StepResult


def custom_criteria(criteria: Iterable[StoppingCriteria]) -> list[StoppingCriteria]:
    """Return the criteria that have to be called on each column."""
    return [rule for rule in criteria if type(rule) not in (EosTokenCriteria, MaxLengthCriteria)]


class Emitter:
    """Emits the tokens of one call; if it `returns` more than them, collects the scores and logits asked for."""

    def __init__(self, state: DecodingState, criteria: StoppingCriteriaList, streamer: Any, returns: bool) -> None:
        self.state, self.criteria, self.streamer = state, criteria, streamer
        config = state.generation_config
        wanted = {"scores": config.output_scores, "logits": config.output_logits}
        self.collects = {name: returns and bool(asked) for name, asked in wanted.items()}
        self.collected: dict[str, list[list[torch.Tensor]]] = {
            name: [[] for _ in range(state.batch)] for name, wanted in self.collects.items() if wanted
        }
        self.first = state.text.columns[0]
        self.clock = self.first
        self.done = [False] * state.batch
        self.flagged = [False] * state.batch
        self.eos = frozenset(
            int(token) for rule in criteria if type(rule) is EosTokenCriteria for token in rule.eos_token_id.flatten()
        )
        # stock pads finished rows only if some criterion knows EOS; otherwise they go on until all are finished
        self.pads = any(hasattr(rule, "eos_token_id") for rule in criteria)
        self.custom = custom_criteria(criteria)

    def emit(self, result: StepResult, *, count: bool = True) -> list[int]:
        """Append a step's tokens to the active rows and return how many each kept.

        With `count` the step counts in the statistics; the prefill's token does not.
        """
        state, kept, written = self.state, [], {}
        if state.processors.remembering or (state.processors.whole_columns and len(state.active) > 1):
            self._level(result)
        for slot, (row, tokens) in enumerate(zip(state.active, result.tokens.tolist(), strict=True)):
            new = tokens[: min(result.counts[slot], state.max_length - state.text.columns[row])]
            for place, token in enumerate(new):
                if token in self.eos:
                    new, self.done[row] = new[: place + 1], True
                    break
            written[row] = new
        state.text.write(written)
        for slot, (row, new) in enumerate(written.items()):
            if state.text.columns[row] >= state.max_length:
                self.done[row] = True
            for name, rows in self.collected.items():
                values = getattr(result, name)[slot, : len(new)]
                rows[row].append(values.float())
            if count:
                state.stats.record(row, result.drafted[slot], result.accepted[slot], len(new))
            kept.append(len(new))
        return kept

    def _level(self, result: StepResult) -> None:
        """Cut a step's result to columns that all rows have, for processors that have to see whole columns.

        Earlier columns alone decide whether another column comes, so dropping the other rows' later drafts biases
        nothing. The token that a row drew after a refusal must stay: without it only accepted drafts would be kept.
        """
        state, ends = self.state, []
        for slot, tokens in enumerate(result.tokens.tolist()):
            new = tokens[: result.counts[slot]]
            ends.append(next((place + 1 for place, token in enumerate(new) if token in self.eos), len(new)))
        width = min(ends)
        if state.processors.remembering:  # a lossy rule can keep what was not processed
            width = min(width, state.processors.reached - state.text.columns[state.active[0]])
        result.counts = [width] * len(ends)
        result.accepted = [min(width, count) for count in result.accepted]

    def advance(self, rows: list[int]) -> None:
        """Run the column clock as far as the given rows allow."""
        if not self.custom and self.streamer is None:
            return
        columns = self.state.text.columns
        while True:
            unfinished = [row for row in rows if not self.done[row]]
            if self.clock >= min((columns[row] for row in unfinished), default=max(columns[row] for row in rows)):
                return
            self.clock += 1
            if self.custom:
                self._judge(self.state.text.by_column(self.clock), rows)
            if self.streamer is not None:
                self.streamer.put(self.state.text.column(self.clock - 1))

    def _judge(self, text: torch.Tensor, rows: list[int]) -> None:
        verdict = self.criteria(text, self._columns_of("scores", self.clock)).tolist()
        state = self.state
        for row in rows:
            if not verdict[row] or (self.done[row] and state.text.columns[row] <= self.clock):
                continue
            self.flagged[row] = True
            if self.pads:
                self._finish(row)
        if not self.pads and all(self.flagged[row] for row in rows):
            for row in rows:
                self._finish(row)

    def _finish(self, row: int) -> None:
        """End `row` at the clock's column."""
        surplus = self.state.text.columns[row] - self.clock
        if surplus > 0:
            self.state.stats.forget(row, surplus)
            self.state.text.cut(row, self.clock)
            for rows in self.collected.values():
                rows[row] = [torch.cat(rows[row])[:-surplus]]
        self.done[row] = True

    def _columns_of(self, name: str, end: int) -> tuple[torch.Tensor, ...] | None:
        """Return what was collected up to column `end` as stock's tuple of `[b, V]`, `None` if nothing is."""
        if name not in self.collected:
            return None
        width = end - self.first
        rows = [torch.cat(parts)[:width] if parts else None for parts in self.collected[name]]
        size = next(row.shape[1] for row in rows if row is not None)
        table = torch.zeros(width, len(rows), size, device=self.state.device)
        for index, row in enumerate(rows):
            if row is not None:
                table[: len(row), index] = row
        return tuple(table)

    def complete(self, row: int, values: dict[str, torch.Tensor]) -> None:
        """Add what a finished row's padding would have scored, `[m, V]` by name."""
        for name, rows in self.collected.items():
            rows[row].append(values[name].float())

    def tables(self, end: int) -> dict[str, Any]:
        """Return the collected scores and logits up to column `end`, by name."""
        return {name: self._columns_of(name, end) for name in self.collects}
