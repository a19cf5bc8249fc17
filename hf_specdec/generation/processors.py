"""The caller's logits processors, applied so that each (row, position) sees the prefix of plain decoding.

Processors that ignore `input_ids` run once over all rows and positions. Any other runs once per column of text: it
gets the full left-padded matrix `[b, t]` in the caller's row order, as in stock decoding, and only rows whose prefix
has t columns are read. It must be a pure function of ids, scores and row.
"""

from __future__ import annotations

import torch
from transformers.generation import logits_process as stock
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from .. import _compat


_IGNORES_IDS = {
    getattr(stock, name)
    for name in (
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
        "SuppressTokensLogitsProcessor",
    )
    if hasattr(stock, name)
}
_KEEPS_STATE = ("SynthIDTextWatermarkLogitsProcessor", "UnbatchedClassifierFreeGuidanceLogitsProcessor")


class ProcessorChain:
    """The processors of one call.

    Args:
        processors (`LogitsProcessorList`): as prepared by `generate()`.

    Raises:
        ValueError: for a processor that keeps state between calls, which speculation would call out of order.
    """

    def __init__(self, processors: LogitsProcessorList) -> None:
        for processor in processors:
            if type(processor).__name__ in _KEEPS_STATE:
                raise ValueError(
                    f"`logits_processor` {type(processor).__name__} keeps state between calls, so it can't be used "
                    "with `assistant_strategy`; remove the watermark or the guidance scale, or decode with "
                    '`assistant_strategy="off"`.'
                )
        self.processors = list(processors)

    def __len__(self) -> int:
        return len(self.processors)

    @property
    def reads_text(self) -> bool:
        """Whether some processor looks at the tokens before the scores."""
        return any(type(processor) not in _IGNORES_IDS for processor in self.processors)

    def __call__(
        self, logits: torch.Tensor, ids: torch.Tensor, rows: list[int], columns: list[int], drafts: torch.Tensor
    ) -> torch.Tensor:
        """Return the processed logits.

        Args:
            logits (`torch.Tensor` of shape `[n, m, V]`): raw logits; entry (i, j) predicts the token after j drafts.
            ids (`torch.Tensor` of shape `[b, >= max(columns)]`, int64): the text, in the caller's row order.
            rows (`list[int]` of length n): the caller's row of each i.
            columns (`list[int]` of length n): columns of committed text of each i.
            drafts (`torch.Tensor` of shape `[n, >= m - 1]`, int64): draft tokens that follow the committed text.

        Returns:
            `torch.Tensor` of shape `[n, m, V]`, float32, as in stock decoding.
        """
        scores = logits.float()
        for processor in self.processors:
            if type(processor) in _IGNORES_IDS:
                flat = processor(ids[:1], scores.reshape(-1, scores.shape[-1]))
                scores = flat.view(scores.shape)
            else:
                scores = self._by_column(processor, scores, ids, rows, columns, drafts)
        return scores

    @staticmethod
    def _by_column(
        processor: LogitsProcessor,
        scores: torch.Tensor,
        ids: torch.Tensor,
        rows: list[int],
        columns: list[int],
        drafts: torch.Tensor,
    ) -> torch.Tensor:
        m, device = scores.shape[1], scores.device
        starts = torch.tensor(columns)[:, None]
        places, entries = (starts + torch.arange(m)).flatten().sort(stable=True)  # on the host, where rows are known
        width = int(places[-1])
        text = ids.new_zeros(ids.shape[0], width)
        text[:, : min(width, ids.shape[1])] = ids[:, :width]
        drafted = (torch.tensor(rows)[:, None] * width + starts + torch.arange(m - 1)).to(device)
        text.view(-1)[drafted] = drafts[:, : m - 1]
        lengths, counts = places.unique_consecutive(return_counts=True)
        owners = torch.tensor(rows)[entries // m]
        real = [set(part.tolist()) for part in owners.split(counts.tolist())]
        flat, result = scores.flatten(0, 1), torch.empty_like(scores)
        parts = torch.stack([entries, owners]).to(device).split(counts.tolist(), dim=1)
        for t, present, (entry, row) in zip(lengths.tolist(), real, parts, strict=True):
            batch = scores.new_zeros(ids.shape[0], scores.shape[-1])
            batch[row] = flat[entry]
            result.view_as(flat)[entry] = _compat.for_rows(processor, present)(text[:, :t], batch)[row]
        return result
