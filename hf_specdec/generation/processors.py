"""The caller's logits processors, applied so that each (row, position) sees the prefix of plain decoding.

Processors that ignore `input_ids` run once over all rows and positions, and so do some that read it (`BLOCK_RULES`).
Any other runs once per column of text: it gets the full left-padded matrix `[b, t]` in the caller's row order, as in
stock decoding, and only rows whose prefix has t columns are read.

Processors that may remember something between calls (`purity.may_remember`) are called as in stock decoding too: once
per column, in order, with all rows. Where their memory can be saved and put back (*copied*), they are called on drafts
as well, and what they remember of drafts that don't stay is undone. Otherwise (*in order*) drafts are made without
them, and each column is judged before they see the next one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from transformers.generation import logits_process as stock
from transformers.generation.logits_process import LogitsProcessor
from transformers.utils import logging

from .. import _compat
from .call_path import CallPath
from .memory import Copied, Memory, Opaque, Undone
from .prefixes import BLOCK_RULES, Prefixes
from .purity import has_rollback, is_row_wise, may_remember, mixes_rows


logger = logging.get_logger(__name__)


def _types(*names: str) -> set[type]:
    return {getattr(stock, name) for name in names if hasattr(stock, name)}


_SUPPRESS = _types("SuppressTokensLogitsProcessor")
_IGNORES_IDS = _SUPPRESS | _types(
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TopHLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "LogitNormalization",
    "InfNanRemoveLogitsProcessor",
)
_ROW_BY_ROW = set(BLOCK_RULES) | _types(
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "ExponentialDecayLengthPenalty",
    "SuppressTokensAtBeginLogitsProcessor",
    "WatermarkLogitsProcessor",
)
"""Stock processors that do the same to a row whatever its number and the other rows are."""
_BANS_NO_TEXT = (_IGNORES_IDS - _SUPPRESS) | _types(
    "RepetitionPenaltyLogitsProcessor",
    "EncoderRepetitionPenaltyLogitsProcessor",
    "ExponentialDecayLengthPenalty",
    "WatermarkLogitsProcessor",
)
"""Warpers, and others that make no token impossible because of the text."""


def _name(processor: LogitsProcessor) -> str:
    if _compat.allowed_tokens_function(processor):
        return "`prefix_allowed_tokens_fn`"
    return f"`logits_processor` {getattr(processor, '__name__', type(processor).__name__)}"


class JudgeInOrder(Exception):
    """What processors remember can't be copied any more: the round is to be judged column by column."""


class ProcessorChain:
    """The processors of one call.

    Args:
        processors (`Sequence[LogitsProcessor]`): as prepared by `generate()`.

    Attributes:
        remembering (`list`): those that may remember something between calls.
        in_order (`bool`): whether they can only be called on what is emitted, once per column.
        may_judge_in_order (`bool`): whether whoever decodes could go on like that.
        may_go_plain (`bool`): whether it could go on without drafts.
        plain (`bool`): whether it has to.
        reached (`int`): columns of text up to which all scores of this round are processed.
        width (`int`): words that have a score, once some have been processed.

    Raises:
        ValueError: for a processor that runs a model of its own with a cache.
    """

    def __init__(self, processors: Sequence[LogitsProcessor]) -> None:
        for processor in processors:
            if type(processor).__name__ == "UnbatchedClassifierFreeGuidanceLogitsProcessor":
                raise ValueError(
                    f"`logits_processor` {type(processor).__name__} reads the text with a cache of its own, so it "
                    "can't be used with `assistant_strategy`; remove the guidance scale, or decode with "
                    '`assistant_strategy="off"`.'
                )
        self.processors = list(processors)
        self._banning = [processor for processor in self.processors if type(processor) not in _BANS_NO_TEXT]
        self.remembering = [processor for processor in self.processors if may_remember(processor)]
        self._together = [p for p in self.processors if not is_row_wise(p) or any(p is r for r in self.remembering)]
        self.in_order, self.may_judge_in_order = False, True
        self.plain, self.may_go_plain = False, True
        self._asked = self.width = 0
        self.reached = sys.maxsize
        self._path: CallPath
        undone = [processor for processor in self.remembering if has_rollback(processor)]
        copied = [processor for processor in self.remembering if not has_rollback(processor)]
        memories: list[Memory] = [*map(Undone, undone), *([Copied(copied)] if copied else [])]
        try:
            self._path = CallPath(memories, self._replay)
        except Opaque:
            self.in_order = True

    def __len__(self) -> int:
        return len(self.processors)

    @property
    def names(self) -> str:
        """The names of the processors that may remember something or mix rows, for messages."""
        return ", ".join(map(_name, self._together))

    @property
    def whole_columns(self) -> bool:
        """Whether some processor may have to see all rows at a time, so that rows have to stay level."""
        return bool(self._together)

    def check_rows(self, ids: torch.Tensor, width: int) -> None:
        """Raise `ValueError` for a processor whose result for a row depends on other rows' scores `[width]`.

        It is tried on the prompts `ids` `[b, T]` with random scores, and what it remembers of that is put back.
        """
        for processor in self._together:
            if not has_rollback(processor) and mixes_rows(processor, ids, width):
                raise ValueError(
                    f"{_name(processor)} mixes the scores of the rows, and rows may end apart. Rows that have ended "
                    "have no scores under `assistant_strategy`. Let all rows be of one length (`eos_token_id=None` "
                    'in a generation config), pass one row per call, or `assistant_strategy="off"`.'
                )

    @property
    def reads_text(self) -> bool:
        """Whether some processor looks at the tokens before the scores."""
        return any(type(processor) not in _IGNORES_IDS for processor in self.processors)

    @property
    def bans(self) -> bool:
        """Whether some processor makes tokens impossible by the text, or may."""
        return bool(self._banning)

    def __call__(
        self,
        logits: torch.Tensor,
        ids: torch.Tensor,
        rows: list[int],
        columns: list[int],
        drafts: torch.Tensor,
        counts: Sequence[int] | None = None,
        *,
        drafting: bool = False,
        stops: bool = True,
    ) -> torch.Tensor:
        """Return the processed logits.

        Entries behind a row's real drafts, or behind a draft that is impossible, are not processed by those who would
        have to be asked about such a text. Nor are, in a batch with processors that remember, entries behind the
        drafts that all rows have.

        Args:
            logits (`torch.Tensor` of shape `[n, m, V]`): raw logits; entry (i, j) predicts the token after j drafts.
            ids, rows, columns, drafts, counts: see `Prefixes`.
            drafting (`bool`, *optional*, defaults to `False`): whether the result only helps to draft.
            stops (`bool`, *optional*, defaults to `True`): whether a draft that is impossible ends its row's entries.

        Returns:
            `torch.Tensor` of shape `[n, m, V]`, float32, as in stock decoding.

        Raises:
            JudgeInOrder: if what processors remember has become something that can't be copied.
            ValueError: if whoever decodes can neither judge in order then nor go on without drafts.
        """
        prefixes, self.width = Prefixes(ids, rows, columns, drafts, counts, logits.shape[1]), logits.shape[-1]
        return self._apply(self.processors, logits.float(), prefixes, drafting, stops)

    def first_bans(
        self, ids: torch.Tensor, rows: list[int], columns: list[int], drafts: torch.Tensor, counts: list[int]
    ) -> list[int]:
        """Return how many drafts of each row are possible, up to the first one that the processors ban.

        The scores are not known yet, so zeros stand in for them. The arguments are those of `Prefixes`.
        """
        scores = torch.zeros(*drafts.shape, self.width, device=drafts.device)
        prefixes = Prefixes(ids, rows, columns, drafts, counts, drafts.shape[1])
        found = self._apply(self._banning, scores, prefixes, drafting=True)
        possible = found.gather(2, drafts[..., None])[..., 0] > -torch.inf
        leading = possible.long().cumprod(dim=1).sum(dim=1).tolist()
        return [min(whole, count) for whole, count in zip(leading, counts, strict=True)]

    def without_memory(
        self, logits: torch.Tensor, ids: torch.Tensor, rows: list[int], columns: list[int], drafts: torch.Tensor
    ) -> torch.Tensor:
        """Return the logits processed by those that remember nothing; for the arguments see `__call__`."""
        prefixes = Prefixes(ids, rows, columns, drafts, None, logits.shape[1])
        return self._block(self._pure(self.processors), logits.float(), prefixes)

    def commit(self, column: int, text: torch.Tensor, back: int = 0) -> None:
        """Take note that `text` `[b, >= column]` is final up to `column`, of which the last `back` are read again."""
        self.reached = sys.maxsize
        if self.remembering and not self.in_order:
            self._path.commit(column, text, back)

    def restart(self) -> None:
        """Leave the processors as they were when the text was last committed, as far as they can be."""
        if self.remembering and not self.in_order:
            self._path.restart()

    # who is called with what

    def _pure(self, processors: list[LogitsProcessor]) -> list[LogitsProcessor]:
        return [part for part in processors if not any(part is other for other in self.remembering)]

    def _apply(
        self,
        processors: list[LogitsProcessor],
        scores: torch.Tensor,
        prefixes: Prefixes,
        drafting: bool,
        stops: bool = True,
    ) -> torch.Tensor:
        if not self.remembering:
            return self._block(processors, scores, prefixes, stops)
        level = len(set(prefixes.columns)) == 1
        if drafting and (self.in_order or not level):
            return self._block(self._pure(processors), scores, prefixes, stops)
        if not level:
            raise RuntimeError("Processors that remember are called with all rows, which must have equal columns.")
        try:
            if self.in_order:
                return self._in_order(scores, prefixes)
            return self._copied(processors, scores, prefixes, drafting, stops)
        except Opaque as error:
            self._path.restart(certain=True)
            self._go_on_in_order(error)
            if not drafting and scores.shape[1] > 1:
                raise JudgeInOrder from error
            return self._apply(processors, scores, prefixes, drafting, stops)

    def _go_on_in_order(self, error: Opaque) -> None:
        """Call processors in order from here on, since what they remember can't be copied any more."""
        found = f"{self.names} has begun to keep something that can't be copied ({error})"
        if not self.may_judge_in_order:
            if not self.may_go_plain:
                raise ValueError(
                    f'{found}, so it can\'t be used here; decode with `assistant_strategy="off"`, or see `stateless` '
                    "and `rollback` in the documentation."
                ) from error
            logger.warning_once(f"{found}, so the call takes plain steps from here on.")
        self.in_order, self.plain = True, not self.may_judge_in_order

    def _block(
        self, processors: list[LogitsProcessor], scores: torch.Tensor, prefixes: Prefixes, stops: bool = True
    ) -> torch.Tensor:
        """Apply processors that remember nothing, one after the other; `stops` says whether a ban ends a row."""
        before, limits = scores, list(prefixes.limits)
        for processor in processors:
            if type(processor) in _IGNORES_IDS:
                flat = processor(prefixes.ids[:1], scores.reshape(-1, scores.shape[-1]))
                scores = flat.view(scores.shape)
                continue
            rule = BLOCK_RULES.get(type(processor))
            found = None if rule is None else rule(processor, scores, prefixes)
            scores = self._by_column(processor, scores, prefixes, limits, stops) if found is None else found
        for i, limit in enumerate(limits):
            # a later processor may have made possible what an earlier one had banned
            if limit < prefixes.limits[i] and bool(scores[i, limit - 1, prefixes.drafts[i, limit - 1]] > -torch.inf):
                return self._block(processors, before, prefixes, stops=False)
        return scores

    @staticmethod
    def _by_column(
        processor: LogitsProcessor, scores: torch.Tensor, prefixes: Prefixes, limits: list[int], stops: bool
    ) -> torch.Tensor:
        """Apply one processor column by column, to the first `limits[i]` entries of each row.

        A processor of the caller's need not know a text that it has banned, so there it ends a row's limit.
        """
        text, rows, whole = prefixes.text, prefixes.rows, type(processor) not in _ROW_BY_ROW
        result = scores.clone()
        for t, entries in prefixes.by_length():
            entries = [(i, j) for i, j in entries if j < limits[i]]
            if not entries:
                continue
            slots, places = torch.tensor(entries, device=scores.device).T
            given = scores[slots, places]
            owners = [rows[i] for i, _ in entries]
            if not whole:
                result[slots, places] = processor(prefixes.own[slots, :t], given)
                continue
            if owners != list(range(len(text))):
                batch = scores.new_zeros(len(text), scores.shape[-1])
                batch[owners] = given
                given = batch
            found = _compat.for_rows(processor, set(owners))(text[:, :t], given)[owners]
            result[slots, places] = found
            if stops:
                _stop_at_bans(found, entries, prefixes.drafts, limits)
        return result

    def _column(self, processors: Sequence[LogitsProcessor], text: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Call processors as stock does, on one column of all rows `[b, V]`."""
        for processor in processors:
            scores = processor(text, scores)
        return scores

    def _all_rows(
        self, processors: Sequence[LogitsProcessor], text: torch.Tensor, scores: torch.Tensor, rows: list[int]
    ) -> torch.Tensor:
        """Call processors on one column of `rows` `[n, V]`; the others, which have finished, have scores of zero."""
        batch = scores.new_zeros(len(text), scores.shape[-1])
        batch[rows] = scores
        return self._column(processors, text, batch)[rows]

    def _copied(
        self,
        processors: list[LogitsProcessor],
        scores: torch.Tensor,
        prefixes: Prefixes,
        drafting: bool,
        stops: bool,
    ) -> torch.Tensor:
        """Call the processors on one column after the other, and save what they remember after each."""
        text, start, result = prefixes.text, prefixes.columns[0], scores.clone()
        limits = [min(prefixes.limits)] * len(prefixes.rows)
        j = 0
        while j < limits[0]:
            self._path.go(start + j, text)
            found = self._all_rows(processors, text[:, : start + j], scores[:, j], prefixes.rows)
            self._path.record(text[:, : start + j])
            result[:, j] = found
            if stops:
                _stop_at_bans(found, [(i, j) for i in range(len(found))], prefixes.drafts, limits)
            limits, j = [min(limits)] * len(limits), j + 1
        if not drafting:
            self.reached = min(self.reached, start + j)
            if prefixes.m == 1:
                self._path.ascertain()
        return result

    def _replay(self, text: torch.Tensor) -> None:
        self._column(self.remembering, text, torch.zeros(len(text), self.width, device=text.device))

    def _in_order(self, scores: torch.Tensor, prefixes: Prefixes) -> torch.Tensor:
        """Call the processors on one column, which must be the next one."""
        column = prefixes.columns[0]
        if scores.shape[1] != 1 or column <= self._asked:
            raise RuntimeError(f"{self.names} can be asked about each column once, in order: {column} was not next.")
        self._asked, self.reached = column, column + 1
        return self._all_rows(self.processors, prefixes.text[:, :column], scores[:, 0], prefixes.rows)[:, None]


def _stop_at_bans(
    found: torch.Tensor, entries: list[tuple[int, int]], drafts: torch.Tensor, limits: list[int]
) -> None:
    """End each row's limits at the entry whose draft is impossible by its scores `found` `[len(entries), V]`."""
    open_ = [(place, i, j) for place, (i, j) in enumerate(entries) if j + 1 < limits[i]]
    if not open_:
        return
    places, slots, columns = torch.tensor(open_, device=found.device).T
    banned = (found[places, drafts[slots, columns]] == -torch.inf).tolist()
    for (_, i, j), ban in zip(open_, banned, strict=True):
        if ban:
            limits[i] = j + 1
