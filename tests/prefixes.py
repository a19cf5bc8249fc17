"""A logits processor that depends on the order and the length of the text."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor


class AgainstLastPair(LogitsProcessor):
    """Depends on the last two tokens and on the length of the text."""

    def __call__(self, input_ids, scores):
        index = (input_ids[:, -1] + 2 * input_ids[:, -2] + input_ids.shape[1]) % scores.shape[1]
        return scores.scatter_add(1, index[:, None], torch.full_like(scores[:, :1], 1.5))
