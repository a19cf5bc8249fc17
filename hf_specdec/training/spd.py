"""Distilling SPD's draft module: teacher-forced rows at every depth, with the states of a pipeline that is filling up.

One forward trains every position: each token's row appears once per depth (layout "exact") or once per aggregation
type (layout "shared"), and a mask shows each row the depths that decoding would have shown it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .. import _compat
from ..generation.methods.spd.depth_map import DepthMap
from ..generation.methods.spd.draft_module import Features, PipelineDraftModule, load_draft_module
from ..generation.methods.spd.method import SPDConfig
from ..generation.models.layerwise import LayerCall, Layerwise
from ..generation.models.surgery import decoder_layers
from .distill import Agreement, Distillation, coverage, divergence
from .settings import DistillSettings, at_least, option


LAYOUTS = ("exact", "shared")
_MOST_EXACT_STAGES = 8


@dataclass(frozen=True, kw_only=True)
class ModuleTraining(DistillSettings):
    """Settings of `train_draft_module`: those of `DistillSettings`, and

    Args:
        num_stages (`int`): pipeline stages, n.
        stage_layers (`tuple[int, ...]`, *optional*): layers of each stage; equally many by default.
        feature_layers (`tuple[int, ...]`, *optional*): hidden states that the module reads (see `DepthMap`).
        num_draft_layers (`int`, *optional*, defaults to 2): decoder layers of the module. With at most one less than a
            stage has, drafting hides behind the stages.
        templates (`tuple[int, ...]`, *optional*): the model's layers that they begin as copies of; by default spread
            over the upper half.
        fill_rate (`float`, *optional*): acceptance rate to train for. How long the pipeline has been filling is drawn
            as that rate makes it: the lower, the more often it has just begun. By default the paper's rule: full
            half of the time, otherwise 1 to n - 1 ticks with equal chances.
        start (`str`, *optional*): folder of another draft module of this model, perhaps of other stages, whose layers
            and head this one begins with, and its projections where the features are the same; templates and
            vocabulary are that one's.
        layout (`str`, *optional*): `"exact"`, in which training equals decoding, or `"shared"`, with fewer rows. By
            default exact for up to 8 stages.
    """

    num_stages: int = option(MISSING, "Pipeline stages, n.", "stages")
    stage_layers: tuple[int, ...] | None = option(None, "Layers of each stage, by commas; equal by default.")
    feature_layers: tuple[int, ...] | None = option(None, "Hidden states that it reads, by commas: 0,6,18,29.")
    num_draft_layers: int = option(2, "Decoder layers of the module.", "draft_layers")
    templates: tuple[int, ...] | None = option(None, "Layers that these begin as copies of, by commas.")
    fill_rate: float | None = option(None, "Acceptance rate to train for; 0 for the paper's rule.")
    start: str | None = option(None, "Another draft module, to begin with its layers and head.")
    layout: str | None = option(None, "exact or shared; by default exact for up to 8 stages.")
    max_length: int = option(512, "Longer texts are cut; the module looks that far back.")
    num_assistant_tokens: int = field(default=1, init=False)  # what SPD drafts per tick
    save_every: int = option(500, "Steps between checkpoints.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_stages < 2:
            raise ValueError(f"`num_stages` must be at least 2, got {self.num_stages}: one stage drafts nothing.")
        at_least(self, 1, "num_draft_layers")
        if self.templates is not None and len(self.templates) != self.num_draft_layers:
            raise ValueError(
                f"`templates` must name `num_draft_layers` {self.num_draft_layers} layers, got {self.templates}."
            )
        if self.fill_rate is not None and not 0 < self.fill_rate < 1:
            raise ValueError(f"`fill_rate` must be in (0, 1), got {self.fill_rate}.")
        if self.start is not None and self.templates is not None:
            raise ValueError("`templates` are those of `start`; leave one of them out.")
        if self.layout not in (None, *LAYOUTS):
            raise ValueError(f"`layout` must be one of {', '.join(LAYOUTS)}, got {self.layout!r}.")


class Layout:
    """The rows of one training forward, in blocks of one row per position, deepest block first.

    Args:
        depths (`DepthMap`): stages and features.
        kind (`str`): `"exact"` or `"shared"`.
        fill (`int`): F, ticks since the pipeline was last empty: tokens F and more behind the newest are finished.

    Attributes:
        blocks (`list[tuple[int, int]]`): each block's aggregation type, and the depth at which its rows look around.
    """

    def __init__(self, depths: DepthMap, kind: str, fill: int) -> None:
        n, types = depths.stages, depths.types
        # what a row at depth d sees of a token `back` positions before it lies at depth d + back
        seen = [n if fill < n and depth >= fill else depth for depth in range(n + 1)]
        if kind == "exact":
            self._required = seen
            self._labels = sorted(set(seen), reverse=True)
            self.blocks = [(types[depth], depth) for depth in self._labels]
        else:
            self._required = [types[depth] for depth in seen]
            self._labels = sorted(set(self._required), reverse=True)
            self.blocks = [(label, types.index(label)) for label in self._labels]

    def mask(self, width: int, device: torch.device) -> torch.Tensor:
        """Return which rows each row may see for texts of `width` tokens, bool `[1, 1, rows, rows]`."""
        looking = torch.tensor([depth for _, depth in self.blocks], device=device)[:, None, None]
        required = torch.tensor(self._required, device=device)
        places = torch.arange(width, device=device)
        back = places[:, None] - places
        depth = (looking + back.clamp(min=0)).clamp(max=len(required) - 1)
        labels = torch.tensor(self._labels, device=device)[:, None]
        visible = (required[depth][:, :, None] == labels) & (back >= 0)[:, None]
        return visible.view(1, 1, len(labels) * width, -1)


class Student(nn.Module):
    """The draft module as a function of the target's states (one module, so that it can be distributed).

    Its layers attend through `scaled_dot_product_attention`, or eagerly where a family needs what that lacks.
    """

    parts: Layerwise

    def __init__(self, target: PreTrainedModel, module: PipelineDraftModule) -> None:
        super().__init__()
        self.module = module
        self.__dict__.update(parts=Layerwise(target))  # no submodule: the target is not trained
        config = target.config.get_text_config(decoder=True)
        special = getattr(config, "attn_logit_softcapping", None) or config.model_type == "gpt_oss"
        self.implementation = "eager" if special else "sdpa"
        for layer in module.layers:
            for part in layer.modules():
                if isinstance(own := part.__dict__.get("config"), type(config)):
                    _compat.set_attention_name(own, self.implementation)

    def calls(self, layout: Layout, width: int, sample: torch.Tensor) -> list[LayerCall]:
        """Return the arguments of the module's layers for texts of `width` tokens, of the type of `sample`."""
        mask = layout.mask(width, sample.device)
        if self.implementation == "eager":
            mask = torch.zeros_like(mask, dtype=sample.dtype).masked_fill(~mask, torch.finfo(sample.dtype).min)
        positions = torch.arange(width, device=sample.device).repeat(1, len(layout.blocks))
        rows = sample.new_zeros(1, positions.shape[1], sample.shape[-1])
        recording = self.parts.record(inputs_embeds=rows, position_ids=positions, attention_mask=mask, use_cache=False)
        return [recording.calls[index] for index in self.module.templates]

    def forward(self, features: Features, layout: Layout, calls: list[LayerCall]) -> torch.Tensor:
        """Return logits `[b, T, V_d]` of what follows each of the newest tokens, for features `[b, T, H]`."""
        rows = torch.cat([self.module.fuse(kind, features) for kind, _ in layout.blocks], dim=1)
        hidden = self.module.run(rows, calls)
        return self.module.score(hidden[:, -features[0].shape[1] :])


class _ModuleRun(Distillation[ModuleTraining]):
    """The draft module as the student."""

    def depths(self) -> Sequence[int]:
        """Return the states that the module reads."""
        settings, layers = self.settings, len(decoder_layers(self.target))
        self.map = DepthMap(layers, settings.num_stages, settings.stage_layers, settings.feature_layers)
        return self.map.features

    def build(self) -> None:
        """Make the module, and begin it with what an earlier one has learned."""
        settings, target, depths, layers = self.settings, self.target, self.map, len(decoder_layers(self.target))
        self.kind = settings.layout or ("exact" if depths.stages <= _MOST_EXACT_STAGES else "shared")
        earlier = None if settings.start is None else load_draft_module(target, settings.start)
        spread = torch.linspace(layers // 2, layers - 1, settings.num_draft_layers + 1)[1:].round().long().tolist()
        templates = settings.templates or spread
        if earlier is not None:
            templates = earlier.templates
            self.vocabulary = None if earlier.reduced is None else earlier.reduced.ids.cpu()
            self.covered = 1.0 if self.vocabulary is None else coverage(self.train, self.vocabulary)
        self.module = PipelineDraftModule(target, depths, templates, self.vocabulary, settings.max_length)
        if earlier is not None:
            self.module.layers.load_state_dict(earlier.layers.state_dict())
            self.module.lm_head.load_state_dict(earlier.lm_head.state_dict())
            if earlier.depths.features == depths.features:
                self.module.feature_proj.load_state_dict(earlier.feature_proj.state_dict())
        self.undistributed = Student(target, self.module)
        self.student = self.adopt(self.undistributed, dict(self.module.named_parameters()))
        self.whole = Layerwise(target).tail()

    def _logits(self, states: list[torch.Tensor], fill: int) -> torch.Tensor:
        """Return the module's logits `[b, T, V_d]` for the target's states `[b, T, H]`."""
        layout, width = Layout(self.map, self.kind, fill), states[0].shape[1]
        sample = states[0].to(self.target.dtype)
        read = {index: state.to(sample.dtype) for index, state in zip(self.map.features, states, strict=True)}
        with torch.autocast(sample.device.type, torch.bfloat16):
            logits: torch.Tensor = self.student(read, layout, self.undistributed.calls(layout, width, sample))
        return logits

    def fill(self) -> int:
        """Return this step's F, from 1 to n and the same on all processes."""
        n, rate = self.map.stages, self.settings.fill_rate
        draw = torch.Generator().manual_seed(1_000_003 * self.settings.seed + self.step)
        chances = [1 / (2 * (n - 1))] * (n - 1) + [0.5]
        if rate is not None:
            chances = [(1 - rate) * rate**before for before in range(n - 1)] + [rate ** (n - 1)]
        return 1 + int(torch.multinomial(torch.tensor(chances), 1, generator=draw))

    def loss(self, ids: torch.Tensor, real: torch.Tensor, states: list[torch.Tensor]) -> torch.Tensor:
        """Return the divergence at the real positions whose most likely word the module can guess."""
        with torch.no_grad():
            theirs = self.whole(states[-1][real].to(self.target.dtype))
            valid = torch.ones_like(theirs[:, 0], dtype=torch.bool)
            if (words := self.words) is not None:
                valid, theirs = torch.isin(theirs.argmax(-1), words), theirs[:, words]
            p = theirs[valid].softmax(-1, dtype=torch.float32)
        return divergence(p, self._logits(states[:-1], self.fill())[real][valid])

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Compare the module with the model at the answer positions of the held-out texts."""
        found = {self.map.stages: Agreement(), 1: Agreement()}
        self.student.eval()
        for _, answers, states in self.examined():
            p = self.whole(states[-1][answers]).float().softmax(-1)
            for fill, sums in found.items():
                mine = self._logits(states[:-1], fill)[answers]
                sums.add(p, mine.softmax(-1, dtype=torch.float32), self.words)
        self.student.train()
        return {**found[self.map.stages].figures(), "after_rejection": found[1].figures()}

    def write(self, record: dict[str, Any]) -> None:
        """Save the module."""
        notes = {"fill_simulation": True, "train_layout": self.kind, "kd_temperature": 1.0}
        if self.settings.start is not None:
            record["training"]["start"] = Path(self.settings.start).name  # not where it lies on this machine
        self.module.save(self.path, SPDConfig(), self.target, **notes, **record)


train_draft_module = _ModuleRun.distil
"""Train a draft module and write it to a folder.

The figures are those of `Agreement.figures` with a full pipeline and, under `after_rejection`, for the first token
after a rejection, when all others are finished.
"""
