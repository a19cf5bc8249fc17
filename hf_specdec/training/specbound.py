"""Distilling exit heads: guesses from shallow states learn the frozen model's own next-token distribution (SpecBound).

All heads learn in one pass, from one forward of the model; the loss is summed over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..generation.methods.specbound.exit_heads import ExitHeads, before_each
from ..generation.methods.specbound.method import SpecBoundConfig
from ..generation.models.layerwise import LayerCall, Layerwise
from .data import Text
from .distill import Agreement, Distillation, DistillSettings, Report, batches, divergence, option, padded


@dataclass(frozen=True, kw_only=True)
class ExitTraining(DistillSettings):
    """Settings of `train_exit_heads`: those of `DistillSettings`, and

    Args:
        layers (`tuple[int, ...]`): depths that get a head, ascending, below the model's depth.
        kind (`str`, *optional*, defaults to `"adapter"`): `"adapter"`, `"full"` or `"block"` (see `ExitHeads`).
        rank (`int`, *optional*): of the maps of kind `"adapter"`; `None` for full matrices.
    """

    layers: tuple[int, ...] = option(MISSING, "Depths that get an exit head: 3 is after 3 layers.")
    kind: str = option("adapter", "adapter, full or block.")
    rank: int | None = option(None, "Of the maps of kind adapter; 0 for full matrices.")
    num_assistant_tokens: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "final":
            raise ValueError("`kind='final'` has nothing to train; allowed: adapter, full, block.")


def train_exit_heads(
    target: PreTrainedModel,
    texts: Sequence[Text],
    folder: str | Path,
    settings: ExitTraining,
    *,
    resume: bool = False,
    notes: dict[str, Any] | None = None,
    report: Report = lambda _: None,
) -> dict[str, Any]:
    """Train exit heads and write them to `folder`.

    Args:
        target (`PreTrainedModel`): frozen; on the device to train on.
        texts (`list[Text]`): training text; every 50th, at most 64, is held out.
        folder (`str` or `Path`): gets the heads at every checkpoint, and a folder `checkpoint` to resume from.
        settings (`ExitTraining`): how.
        resume (`bool`, *optional*, defaults to `False`): go on from the folder's checkpoint.
        notes (`dict`, *optional*): what else to record in the adapter's config file.
        report (`Callable[[dict], None]`, *optional*): see `Distillation`.

    Returns:
        The held-out figures (see `Agreement.figures`) of each depth.

    Raises:
        ValueError: for fewer than 2 texts, depths that are not allowed, or a checkpoint made with other settings.
        FileNotFoundError: if there is nothing to resume from.
    """
    return _ExitRun(target, texts, Path(folder), settings, notes or {}, report).run(resume=resume)


class _Student(nn.Module):
    """All heads together as a function of the model's states (one module, so that it can be distributed)."""

    def __init__(self, heads: ExitHeads) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, states: list[torch.Tensor], call: LayerCall | None, real: torch.Tensor) -> list[torch.Tensor]:
        """Return each head's logits `[positions, F]` at the real positions of the states `[b, T, H]`."""
        found, before = [], before_each(states[-1])
        for layer, hidden in zip(self.heads.layers, states[:-1], strict=True):
            if call is not None:
                known = self._guessed(layer, hidden, before, call) if self.training else before
                hidden = self.heads.deepen(layer, hidden, known, call)
            found.append(self.heads.read(layer, hidden[real]))
        return found

    @torch.no_grad()
    def _guessed(self, layer: int, hidden: torch.Tensor, before: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """Return `before` with every other token's replaced by the block's own guess, as it is after a draft."""
        guess = before_each(self.heads.head_input(layer, self.heads.deepen(layer, hidden, before, call)))
        b, width = hidden.shape[:2]
        parity = torch.arange(b, device=hidden.device)[:, None] + torch.arange(width, device=hidden.device)
        return torch.where((parity % 2 == 0)[..., None], guess.to(before.dtype), before)


class _ExitRun(Distillation):
    """The heads as the student."""

    def __init__(
        self,
        target: PreTrainedModel,
        texts: Sequence[Text],
        path: Path,
        settings: ExitTraining,
        notes: dict[str, Any],
        report: Report,
    ) -> None:
        super().__init__(target, texts, path, settings, notes, report, settings.layers)
        self.settings = settings
        self.parts = Layerwise(target)
        self.heads = ExitHeads(target, settings.layers, settings.kind, self.vocabulary, settings.rank)
        self.student = self.adopt(_Student(self.heads), dict(self.heads.own.named_parameters()))
        self.reduced = self.parts.tail(self.heads.inside)

    def _logits(self, ids: torch.Tensor, states: list[torch.Tensor], real: torch.Tensor) -> list[torch.Tensor]:
        """Return each head's logits at the real positions of a batch."""
        call = None
        if self.settings.kind == "block":
            # the block is a copy of the last layer, and gets what that one gets
            call = self.parts.record(input_ids=ids, use_cache=False).calls[-1]
        with torch.autocast(ids.device.type, torch.bfloat16):
            return self.student([state.to(self.target.dtype) for state in states], call, real)

    def loss(self, ids: torch.Tensor, real: torch.Tensor, states: list[torch.Tensor]) -> torch.Tensor:
        """Return the sum over the heads of the divergence at the real positions."""
        with torch.no_grad():
            p = self.reduced(states[-1][real].to(self.target.dtype)).softmax(-1, dtype=torch.float32)
        losses = [divergence(p, mine) for mine in self._logits(ids, states, real)]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Compare each head with the model at the answer positions of the held-out texts."""
        found, texts = {layer: Agreement() for layer in self.heads.layers}, self.held_out
        self.student.eval()
        whole, words = self.parts.tail(), None if self.vocabulary is None else self.vocabulary.to(self.target.device)
        for indices in batches([len(text.ids) for text in texts], self.settings.batch_tokens, 0):
            ids = padded(texts, indices, self.target.device)
            answers = torch.zeros_like(ids, dtype=torch.bool)
            for row, index in enumerate(indices):
                answers[row, texts[index].answer] = True
            states = self.teachers[1](indices, ids)
            p = whole(states[-1][answers].to(self.target.dtype)).float().softmax(-1)
            for layer, mine in zip(self.heads.layers, self._logits(ids, states, answers), strict=True):
                found[layer].add(p, mine.softmax(-1, dtype=torch.float32), words)
        self.student.train()
        return {str(layer): sums.figures() for layer, sums in found.items()}

    def write(self, record: dict[str, Any]) -> None:
        """Save the heads."""
        config = SpecBoundConfig(num_assistant_tokens=self.settings.num_assistant_tokens)
        self.heads.save(self.path, config, self.target, **record)
