"""Distilling a draft model: a few of the target's layers learn its next-token distribution on its own text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..generation.methods.assisted import AssistedConfig
from ..generation.models.draft_model import cut_draft, own_parameters, save_draft
from ..generation.models.vocabulary import ReducedHead
from .data import Text
from .distill import Agreement, Distillation, DistillSettings, Report, batches, divergence, option, padded


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


def train_draft(
    target: PreTrainedModel,
    texts: Sequence[Text],
    folder: str | Path,
    settings: DraftTraining,
    *,
    resume: bool = False,
    notes: dict[str, Any] | None = None,
    report: Report = lambda _: None,
) -> dict[str, float]:
    """Train a draft and write it to `folder`.

    Args:
        target (`PreTrainedModel`): frozen; on the device to train on.
        texts (`list[Text]`): training text; every 50th, at most 64, is held out.
        folder (`str` or `Path`): gets the draft at every checkpoint, and a folder `checkpoint` to resume from.
        settings (`DraftTraining`): how.
        resume (`bool`, *optional*, defaults to `False`): go on from the folder's checkpoint.
        notes (`dict`, *optional*): what else to record in the draft's config file.
        report (`Callable[[dict], None]`, *optional*): see `Distillation`.

    Returns:
        The held-out figures (see `Agreement.figures`).

    Raises:
        ValueError: for fewer than 2 texts, or a checkpoint that was made with other settings.
        FileNotFoundError: if there is nothing to resume from.
    """
    return _DraftRun(target, texts, Path(folder), settings, notes or {}, report).run(resume=resume)


class _DraftRun(Distillation):
    """The draft as the student."""

    def __init__(
        self,
        target: PreTrainedModel,
        texts: Sequence[Text],
        path: Path,
        settings: DraftTraining,
        notes: dict[str, Any],
        report: Report,
    ) -> None:
        super().__init__(target, texts, path, settings, notes, report)
        self.settings = settings
        self.draft = cut_draft(target, settings.layers, self.vocabulary)
        self.student = self.adopt(_Student(self.draft), own_parameters(self.draft, target))

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
        found, texts = Agreement(), self.held_out
        student, head, reduced = _Student(self.draft), self.target.get_output_embeddings(), self.vocabulary
        words = None if reduced is None else reduced.to(self.target.device)
        for indices in batches([len(text.ids) for text in texts], self.settings.batch_tokens, 0):
            ids = padded(texts, indices, self.target.device)
            with torch.autocast(ids.device.type, torch.bfloat16):
                mine = student(ids)
            states = self.teachers[1](indices, ids)[-1].to(self.target.dtype)
            for row, index in enumerate(indices):
                answer = texts[index].answer
                found.add(_logits(head, states[row, answer]).softmax(-1), mine[row, answer].softmax(-1), words)
        return found.figures()

    def write(self, record: dict[str, Any]) -> None:
        """Save the draft."""
        config = AssistedConfig(num_assistant_tokens=self.settings.num_assistant_tokens)
        save_draft(self.draft, self.target, self.settings.layers, self.path, config, record)
