"""Explain where two greedy texts part: is it a near-tie of the model's own logits?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel


@dataclass
class Divergence:
    """Where two rows part.

    Args:
        row (`int`): the row.
        column (`int`): first column that differs.
        gap (`float`): float32 logit gap of the two tokens on the common prefix.
        bound (`float`): gap below which the pair is a near-tie.
    """

    row: int
    column: int
    gap: float
    bound: float

    @property
    def near_tie(self) -> bool:
        """Whether rounding explains the difference."""
        return self.gap < self.bound


def divergences(
    exact: PreTrainedModel,
    text: torch.Tensor,
    other: torch.Tensor,
    mask: torch.Tensor,
    rounded: PreTrainedModel | None = None,
) -> list[Divergence]:
    """Return where rows of `text` and `other` `[b, T]` first differ.

    Args:
        exact (`PreTrainedModel`): the model in float32.
        mask (`torch.Tensor` of shape `[b, prompt]`): the prompts' attention mask.
        rounded (`PreTrainedModel`, *optional*): the model in the type that decoded, if not float32: the bound is four
            times the rms of its logits' error there. In float32 the bound is 1e-3.
    """
    found = []
    for row in range(len(text)):
        differs = (text[row] != other[row]).nonzero()
        if not len(differs):
            continue
        column = int(differs[0])
        real = torch.cat([mask[row].bool(), torch.ones(column - mask.shape[1], dtype=torch.bool)])
        prefix = text[row, :column][real][None]
        with torch.no_grad():
            logits = exact(prefix, logits_to_keep=1).logits[0, -1].float()
            bound = 1e-3
            if rounded is not None:
                error = rounded(prefix, logits_to_keep=1).logits[0, -1].float() - logits
                bound = 4 * float(error.square().mean().sqrt())
        gap = float((logits[text[row, column]] - logits[other[row, column]]).abs())
        found.append(Divergence(row, column, gap, bound))
    return found
