"""Draft vocabularies: heads that score a part of the words, and logits of unequal widths."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


OUTSIDE = -1e4
"""Logit of a word outside a reduced vocabulary: its probability is exactly 0 in float32, yet a row in which a
constraint bans all words inside still has a distribution."""


class ReducedHead(nn.Module):
    """An LM head over some of the words, which scatters its logits into the full width.

    Args:
        head (`nn.Module`): a linear head; its rows are copied once.
        ids (`torch.Tensor` of shape `[k]`, int64): ids of the words, ascending.

    Raises:
        ValueError: for ids that are not ascending or out of range.
    """

    weight: torch.Tensor
    ids: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, head: nn.Module, ids: torch.Tensor) -> None:
        super().__init__()
        full = head_weight(head)
        self.width = full.shape[0]
        ids = ids.to(full.device, torch.int64)
        if not len(ids) or ids[0] < 0 or ids[-1] >= self.width or bool((ids[1:] <= ids[:-1]).any()):
            raise ValueError(f"A draft vocabulary must hold ascending ids from 0 to {self.width - 1}.")
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("weight", full.detach()[ids].clone(), persistent=False)
        bias = getattr(head, "bias", None)
        self.register_buffer("bias", None if bias is None else bias.detach()[ids].clone(), persistent=False)

    def reduced(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits `[..., k]` of the words inside."""
        return nn.functional.linear(hidden, self.weight, self.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits `[..., V]` of all words, `OUTSIDE` for those that are not inside."""
        return self.scatter(self.reduced(hidden))

    def scatter(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logits `[..., V]` of all words for logits `[..., k]` of those inside."""
        return logits.new_full((*logits.shape[:-1], self.width), OUTSIDE).index_copy_(-1, self.ids, logits)


def head_weight(head: nn.Module) -> torch.Tensor:
    """Return the weight `[V, H]` of an LM head; raise `ValueError` if it can't be copied."""
    weight = getattr(head, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.is_meta:
        how = "offloaded" if isinstance(weight, torch.Tensor) else "no plain matrix"
        raise ValueError(
            f"The model's LM head, a {type(head).__name__}, is {how}, and what was asked for under "
            "`assistant_strategy` copies its weight. Use a strategy without trained heads or drafts, or the model as "
            "it was."
        )
    return weight


def vocabulary_width(model: nn.Module) -> int:
    """Return how many words the model's head scores, padding included."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if isinstance(head, ReducedHead):
        return head.width
    width = getattr(head, "out_features", None)  # also where the weight is packed
    if width is None and isinstance(getattr(head, "weight", None), torch.Tensor):
        width = head.weight.shape[0]
    return int(model.config.get_text_config(decoder=True).vocab_size if width is None else width)  # type: ignore


def pad_vocabulary(logits: torch.Tensor, width: int) -> torch.Tensor:
    """Return `logits` `[..., V_d]` at the target's width: padding rows dropped, missing ones -inf."""
    missing = width - logits.shape[-1]
    if missing > 0:
        return nn.functional.pad(logits, (0, missing), value=-torch.inf)
    return logits[..., :width]
