"""Distilling exit heads: guesses from shallow states learn the frozen model's own next-token distribution (SpecBound).

All heads learn in one pass, from one forward of the model; the loss is summed over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import Any

import torch
from torch import nn

from ..generation.methods.specbound.exit_heads import ExitHeads, before_each
from ..generation.methods.specbound.method import SpecBoundConfig
from ..generation.models.layerwise import LayerCall, Layerwise
from .distill import Agreement, Distillation, divergence
from .settings import DistillSettings, option


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


class _ExitRun(Distillation[ExitTraining]):
    """The heads as the student."""

    def depths(self) -> Sequence[int]:
        """Return the depths that get a head."""
        return self.settings.layers

    def build(self) -> None:
        """Make the heads."""
        settings, self.parts = self.settings, Layerwise(self.target)
        self.heads = ExitHeads(self.target, settings.layers, settings.kind, self.vocabulary, settings.rank)
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
        return torch.stack([divergence(p, mine) for mine in self._logits(ids, states, real)]).sum()

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Compare each head with the model at the answer positions of the held-out texts."""
        found, whole = {layer: Agreement() for layer in self.heads.layers}, self.parts.tail()
        self.student.eval()
        for ids, answers, states in self.examined():
            p = whole(states[-1][answers]).float().softmax(-1)
            for layer, mine in zip(self.heads.layers, self._logits(ids, states, answers), strict=True):
                found[layer].add(p, mine.softmax(-1, dtype=torch.float32), self.words)
        self.student.train()
        return {str(layer): sums.figures() for layer, sums in found.items()}

    def write(self, record: dict[str, Any]) -> None:
        """Save the heads."""
        config = SpecBoundConfig(num_assistant_tokens=self.settings.num_assistant_tokens)
        self.heads.save(self.path, config, self.target, **record)


train_exit_heads = _ExitRun.distil
"""Train exit heads and write them to a folder; the figures are those of `Agreement.figures` at each depth."""
