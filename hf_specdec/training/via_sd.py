"""Training the slim verifier of VIA-SD: a LoRA on the layers that stay learns the distribution of the whole model.

PEFT makes the LoRA and writes its files. It works on a copy of the model's modules that shares the weights, so the
model stays as it is. Every position is read by the slim model alone, which is decoding with `slim_cache="own"`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..generation.methods.via_sd.config import ViaSDConfig
from ..generation.methods.via_sd.slim_model import LORA_FOLDER, LowRankTerms, Units, load_slim, save_slim, slim_model
from ..generation.models.adapters import describe
from ..generation.models.layerwise import Layerwise, Proxy
from ..generation.models.vocabulary import ReducedHead
from .data import Text
from .distill import Distillation, Report, divergence
from .scoring import SlimScorer, margin_cost
from .settings import DistillSettings, at_least, option


@dataclass(frozen=True, kw_only=True)
class SlimTraining(DistillSettings):
    """Settings of `train_slim`: those of `DistillSettings`, and

    Args:
        rank (`int`, *optional*, defaults to 16): of the LoRA; its alpha is twice that.
        kl_weight (`float`, *optional*, defaults to 1.0): of KL(whole || slim).
        tv_weight (`float`, *optional*, defaults to 0.5): of the total variation distance, the rejection rate of
            sampling.
        margin_weight (`float`, *optional*, defaults to 0.0): of the paper's cost, for the lossy mode.
    """

    vocabulary_size: int | None = option(
        8192, "Words that the loss is over, the most frequent; 0 for all.", "vocabulary"
    )
    rank: int = option(16, "Of the LoRA.")
    kl_weight: float = 1.0
    tv_weight: float = option(0.5, "Of the total variation distance; KL has weight 1.")
    margin_weight: float = option(0.0, "Of the paper's cost; 0.5 for the lossy mode.")
    learning_rate: float = 2e-4
    num_assistant_tokens: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "rank")
        weights = (self.kl_weight, self.tv_weight, self.margin_weight)
        if min(weights) < 0 or not any(weights):
            raise ValueError(
                "`kl_weight`, `tv_weight` and `margin_weight` must be at least 0, one of them above; got "
                f"{', '.join(map(str, weights))}."
            )


def train_slim(
    target: PreTrainedModel,
    texts: Sequence[Text],
    mask: str | Path,
    folder: str | Path,
    settings: SlimTraining,
    *,
    resume: bool = False,
    notes: dict[str, Any] | None = None,
    report: Report = lambda _: None,
) -> dict[str, Any]:
    """Train a LoRA for a mask and write both to `folder`.

    Args:
        mask (`str` or `Path`): folder of a mask of this model, as `hf-specdec calibrate via_sd` writes it.
        target, texts, folder, settings, resume, notes, report: see `Distillation.distil`, errors too.

    Returns:
        Held-out agreement, TV and KL, and the same of the mask alone under `before`.
    """
    return _SlimRun(mask, target, texts, folder, settings, notes, report).run(resume=resume)


class _SlimRun(Distillation[SlimTraining]):
    """The slim model as the student."""

    def __init__(self, mask: str | Path, target: PreTrainedModel, *rest: Any) -> None:
        self.mask = load_slim(target, str(mask))
        super().__init__(target, *rest)

    def build(self) -> None:
        """Put a LoRA on the layers that stay."""
        from peft import LoraConfig, get_peft_model

        settings, target = self.settings, self.target
        self.units, self.keep = Units(target, self.mask.granularity), tuple(self.mask.keep)
        self.units.check(self.keep)
        reduced = None
        if self.vocabulary is not None:
            reduced = Proxy(ReducedHead(target.get_output_embeddings(), self.vocabulary), ReducedHead.reduced)
        self.reduced = Layerwise(target).tail(reduced)
        shared = {id(t): t for t in [*target.parameters(), *target.buffers()]}
        twin = copy.deepcopy(target, cast("dict[int, Any]", shared))  # modules of its own around the same weights
        slim = slim_model(twin, Units(twin, self.mask.granularity), self.keep)
        lora = LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules=_linears(slim), bias="none")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks Transformers by a name that goes away
            self.peft: Any = get_peft_model(slim, lora, adapter_name=LORA_FOLDER)
        own = {name: value for name, value in self.peft.named_parameters() if ".lora_" in name}
        self.student = self.adopt(_Student(cast(PreTrainedModel, self.peft.base_model.model)), own)
        self.scorer = SlimScorer(target, self.held_out, self.units, settings.max_length, "own")
        self.before = self.scorer.report(self.keep)

    def loss(self, ids: torch.Tensor, real: torch.Tensor, states: list[torch.Tensor]) -> torch.Tensor:
        """Return the weighted divergences at the real positions."""
        settings = self.settings
        with torch.no_grad():
            q = self.reduced(states[-1][real].to(self.target.dtype)).softmax(-1, dtype=torch.float32)
        with torch.autocast(ids.device.type, torch.bfloat16):
            mine = self.reduced(self.student(ids)[real])
        losses = [settings.kl_weight * divergence(q, mine)] if settings.kl_weight else []
        if settings.tv_weight or settings.margin_weight:
            p = mine.softmax(-1, dtype=torch.float32)
            losses.append(settings.tv_weight * (q - p).abs().sum(-1).mean() / 2)
            if settings.margin_weight:
                losses.append(settings.margin_weight * margin_cost(q, p).mean())
        return torch.stack(losses).sum()

    def terms(self) -> LowRankTerms:
        """Return the LoRA as it is now."""
        found = {}
        for name, module in self.peft.base_model.model.named_modules():
            if hasattr(module, "lora_A") and LORA_FOLDER in module.lora_A:
                parts = (part[LORA_FOLDER].weight.detach() for part in (module.lora_A, module.lora_B))
                found[name] = (*parts, float(module.scaling[LORA_FOLDER]))
        return cast(LowRankTerms, found)

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Compare the slim model with the whole one at the answer positions of the held-out texts."""
        return {**self.scorer.report(self.keep, self.terms()), "before": self.before}

    def write(self, record: dict[str, Any]) -> None:
        """Save settings, mask and LoRA."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.peft.peft_config[LORA_FOLDER].base_model_name_or_path = describe(self.target)["name"]  # no local path
        state = {name: value.detach().bfloat16().cpu() for name, value in self.own.items()}
        card = self.path / "README.md"
        kept = card.read_bytes() if card.is_file() else None
        self.peft.save_pretrained(self.path, state_dict=state, save_embedding_layers=False)
        for stray in (card, self.path / LORA_FOLDER / "README.md"):
            stray.unlink(missing_ok=True)  # PEFT's empty card
        if kept is not None:
            card.write_bytes(kept)
        held_out = {"objective": "training", **record.pop("held_out")}
        config = ViaSDConfig(num_assistant_tokens=self.settings.num_assistant_tokens)
        lora = {"trained_cache_mode": "own", "rank": self.settings.rank, **record}
        save_slim(
            self.path, self.target, self.keep, self.mask.granularity, config=config, calibration=held_out, lora=lora
        )


class _Student(nn.Module):
    """The slim model as a function from ids to the LM head's input (one module, so that it can be distributed)."""

    def __init__(self, slim: PreTrainedModel) -> None:
        super().__init__()
        self.slim = slim

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.slim.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden


def _linears(slim: PreTrainedModel) -> list[str]:
    """Return the names of the linear modules in the layers that stay."""
    prefix = next(name for name, module in slim.named_modules() if isinstance(module, nn.ModuleList))
    kinds = ("Linear", "Conv1D")
    return [
        name
        for name, module in slim.named_modules()
        if name.startswith(prefix + ".") and type(module).__name__ in kinds
    ]
