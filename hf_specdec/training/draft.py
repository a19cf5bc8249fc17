"""Distilling a draft model: a few of the target's layers learn its next-token distribution on its own text."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..generation.methods.assisted import AssistedConfig
from ..generation.models.draft_model import cut_draft, own_parameters, save_draft
from ..generation.models.vocabulary import ReducedHead
from .distill import Agreement, Distillation, divergence
from .settings import DistillSettings, option


@dataclass(frozen=True, kw_only=True)
class DraftTraining(DistillSettings):
    """Settings of `train_draft`: those of `DistillSettings`, and

    Args:
        layers (`tuple[int, ...]`): layers of the target to start from, ascending.
    """

    layers: tuple[int, ...] = option(MISSING, "Layers of the target to start from.")


class _Student(nn.Module):
    """The draft as a function from ids to logits over its vocabulary (one module, so that it can be distributed)."""

    def __init__(self, draft: PreTrainedModel) -> None:
        super().__init__()
        self.draft = draft

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.draft.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return _logits(self.draft.get_output_embeddings(), hidden)


def _logits(head: Any, hidden: torch.Tensor) -> torch.Tensor:
    return (head.reduced(hidden) if isinstance(head, ReducedHead) else head(hidden)).float()


class _DraftRun(Distillation[DraftTraining]):
    """The draft as the student."""

    def build(self) -> None:
        """Cut the draft."""
        self.draft = cut_draft(self.target, self.settings.layers, self.vocabulary)
        self.student = self.adopt(_Student(self.draft), own_parameters(self.draft, self.target))

    def loss(self, ids: torch.Tensor, real: torch.Tensor, states: list[torch.Tensor]) -> torch.Tensor:
        """Return the divergence of target and draft at the real positions."""
        with torch.autocast(ids.device.type, torch.bfloat16):
            mine = self.student(ids)[real]
        with torch.no_grad():
            theirs = _logits(self.draft.get_output_embeddings(), states[-1][real].to(self.target.dtype))
        return divergence(theirs.softmax(-1), mine)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Compare the draft with the target at the answer positions of the held-out texts."""
        found, student, head = Agreement(), _Student(self.draft), self.target.get_output_embeddings()
        for ids, answers, states in self.examined():
            with torch.autocast(ids.device.type, torch.bfloat16):
                mine = student(ids)[answers]
            found.add(_logits(head, states[-1][answers]).softmax(-1), mine.softmax(-1), self.words)
        return found.figures()

    def write(self, record: dict[str, Any]) -> None:
        """Save the draft."""
        config = AssistedConfig(num_assistant_tokens=self.settings.num_assistant_tokens)
        save_draft(self.draft, self.target, self.settings.layers, self.path, config, record)


train_draft = _DraftRun.distil
"""Train a draft and write it to a folder; the figures are those of `Agreement.figures`."""
