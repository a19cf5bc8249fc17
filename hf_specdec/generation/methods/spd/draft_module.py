"""`PipelineDraftModule`: SPD's drafter (arXiv 2605.30852, design v11). It guesses one token from hidden states.

The target's hidden states of every token, as deep as the pipeline has carried it, are fused into one by a linear map
that depends on the depth. Decoder layers of the target's own family read the fused states, the target's frozen final
norm and a head of its own make logits over a draft vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from .... import _compat
from ....artefacts import AdapterReference
from ....cache.speculative import SpeculativeCache
from ....configuration import SpeculationConfig
from ....kernels.address import Address
from ....kernels.dispatch import MaskSpec
from ...models.adapters import Adapter, AdapterKind, describe, load_adapter, read_record, write_adapter
from ...models.layerwise import LayerCall, Layerwise, placed, run_layer
from ...models.surgery import decoder_layers, place_layer
from ...models.vocabulary import ReducedHead, head_weight
from .depth_map import DepthMap


KIND = "draft_module"
ARCHITECTURE = "v11"

Features = dict[int, torch.Tensor]
"""Hidden states `[1, m, H]` of m tokens, by their index in the depth."""


class PipelineDraftModule(nn.Module):
    """The draft module of one model. Its norm is the model's, by reference.

    Args:
        model (`PreTrainedModel`): a causal language model; it stays as it is. Layers that it lacks (on the meta
            device) may serve as templates.
        depths (`DepthMap`): stages and features.
        templates (`list[int]`): the model's layers that the module's own are copies of, at first.
        vocabulary (`torch.Tensor` of shape `[V_d]`, int64, *optional*): ids that can be guessed; `None` for all.
        span (`int`, *optional*): tokens back that its attention reads: what it was trained on.
        family (`str`, *optional*): model type whose decoder layers it has, if not the model's own: `"qwen3"`, for
            checkpoints of the reference implementation. Templates then only say whose arguments they get.
        record (`dict`, *optional*): what is known of it, such as how it was trained.
    """

    norm: nn.Module

    def __init__(
        self,
        model: PreTrainedModel,
        depths: DepthMap,
        templates: Sequence[int],
        vocabulary: torch.Tensor | None = None,
        span: int | None = None,
        family: str | None = None,
        record: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        whole, full = decoder_layers(model), head_weight(model.get_output_embeddings())
        if not templates or min(templates) < 0 or max(templates) >= len(whole):
            raise ValueError(f"`templates` must be layers below {len(whole)}, got {list(templates)}.")
        self.width, width = full.shape
        self.depths, self.templates, self.span, self.record = depths, list(templates), span, record or {}
        self.family = family
        self.reduced = None if vocabulary is None else ReducedHead(model.get_output_embeddings(), vocabulary)
        self.feature_proj = nn.ModuleList(_fusing(kind, width) for kind in range(len(depths.features)))
        if family is None:
            self.layers = nn.ModuleList(copy.deepcopy(whole[index]) for index in templates)
        else:
            self.layers = nn.ModuleList(_foreign_layer(model, family) for _ in templates)
        for index, layer in enumerate(self.layers):
            place_layer(layer, index)
        weight = full if self.reduced is None else self.reduced.weight
        self.lm_head = nn.Linear(width, weight.shape[0], bias=False, device="meta")
        self.lm_head.weight = nn.Parameter(weight.detach().clone())
        self.to(dtype=full.dtype)
        if all(not p.is_meta for p in self.layers.parameters()):
            self.to(device=full.device)
        self.__dict__.update(norm=Layerwise(model).norm)

    def fuse(self, kind: int, features: Features) -> torch.Tensor:
        """Return the fused states `[1, m, H]` of tokens that have the features of an aggregation type."""
        device = self.lm_head.weight.device  # stages may be on others
        parts = [features[index].to(device) for index in self.depths.features[: kind + 1]]
        return cast(torch.Tensor, self.feature_proj[kind](torch.cat(parts, dim=-1)))

    def run(self, fused: torch.Tensor, calls: Sequence[LayerCall]) -> torch.Tensor:
        """Return the last layer's output for fused states `[b, m, H]`; `calls` holds each layer's arguments."""
        for layer, call in zip(self.layers, calls, strict=True):
            fused = run_layer(layer, fused, call)
        return fused

    def score(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits `[..., V_d]` for the last layer's output `[..., H]`."""
        return cast(torch.Tensor, self.lm_head(self.norm(hidden)))

    def scatter(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logits `[..., V]` of all tokens for logits `[..., V_d]`."""
        return logits if self.reduced is None else self.reduced.scatter(logits)

    def can_guess(self, token: torch.Tensor) -> bool:
        """Return whether a token `[1, 1]` is in the draft vocabulary."""
        return self.reduced is None or bool(torch.isin(token.to(self.reduced.ids.device), self.reduced.ids))

    def reader(self, model: PreTrainedModel, capacity: int) -> DraftReader:
        """Return what follows one text, of at most `capacity` tokens; the module and `model` must be twins."""
        return DraftReader(self, Layerwise(model), capacity)

    def save(self, folder: str | Path, config: SpeculationConfig, model: PreTrainedModel, **notes: Any) -> None:
        """Write the module, in bf16, to a folder that `SPDConfig(adapter=folder)` and `assistant_strategy=` take.

        It is for use with `config` and `model`; `notes` are recorded too, such as how it was trained.
        """
        tensors = {name: value.detach().bfloat16() for name, value in self.named_parameters()}
        if self.reduced is not None:
            tensors["draft_token_ids"] = self.reduced.ids
        record = {
            "kind": KIND,
            "architecture": ARCHITECTURE,
            "num_stages": self.depths.stages,
            "stage_layers": self.depths.stage_layers,
            "feature_layers": self.depths.features,
            "templates": self.templates,
            "train_span": self.span,
            "family": self.family,
            "model": describe(model),
        }
        write_adapter(folder, config, {**record, **notes}, tensors)


def _foreign_layer(model: PreTrainedModel, family: str) -> nn.Module:
    """Return a new decoder layer of another family, of the model's sizes."""
    if family != "qwen3":
        raise ValueError(f"`family` must be None or 'qwen3', got {family!r}.")
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Config, Qwen3DecoderLayer

    own: Any = model.config.get_text_config(decoder=True)
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps")
    sizes = {name: getattr(own, name) for name in names}
    head_dim = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
    config = Qwen3Config(**sizes, head_dim=head_dim, num_hidden_layers=1)
    _compat.set_attention_name(config, _compat.attention_name(own))
    return Qwen3DecoderLayer(config, 0)


def _fusing(kind: int, width: int) -> nn.Linear:
    """Return the map of an aggregation type. It begins as the identity on the deepest feature, which layers know."""
    linear = nn.Linear((kind + 1) * width, width, bias=False)
    with torch.no_grad():
        nn.init.normal_(linear.weight, std=0.02 / (kind + 1))
        linear.weight[:, kind * width :] += torch.eye(width)
    return linear


class DraftReader:
    """The draft module along one text. Finished tokens stay in its cache; tokens in flight are read anew every tick.

    Nothing else may record with `parts`, the target's, at the same time.
    """

    def __init__(self, module: PipelineDraftModule, parts: Layerwise, capacity: int) -> None:
        self.module, self.parts = module, parts
        self.last = capacity - 1
        self.cache = SpeculativeCache([module.span] * len(module.layers), 1, capacity)
        self.mask = MaskSpec({"local_size": module.span})
        # slot 0 holds the first token that this call ran: an earlier turn's cached tokens gave no features
        self.first = self.end = 0

    def start(self, features: Features, first: int) -> None:
        """Read the prompt from position `first` on; its tokens have passed all stages."""
        self.first = self.end = first
        self._read(self.module.fuse(self.module.depths.types[-1], features))
        self.end += features[0].shape[1]

    def draft(self, finished: Sequence[Features], flying: Sequence[tuple[int, Features]]) -> torch.Tensor:
        """Return logits `[1, V_d]` of what follows the newest token.

        Args:
            finished (`list[Features]`): of tokens that have passed all stages since the last call, oldest first; they
                follow those that are in the cache, and stay there.
            flying (`list[tuple[int, Features]]`): depth and features of the tokens after them, oldest first.
        """
        types = self.module.depths.types
        fused = [self.module.fuse(types[-1], features) for features in finished]
        fused += [self.module.fuse(types[depth], features) for depth, features in flying]
        hidden = self._read(torch.cat(fused, dim=1))
        self.end += len(finished)
        return self.module.score(hidden[:, -1])

    def _read(self, fused: torch.Tensor) -> torch.Tensor:
        """Run the states of tokens that follow the cached ones, at their true positions."""
        step = self.cache.begin(Address([self.end - self.first], fused.shape[1]))
        positions = torch.arange(self.end, self.end + fused.shape[1], device=fused.device).clamp(max=self.last)
        recording = self.parts.record(
            inputs_embeds=fused,
            position_ids=positions[None],
            past_key_values=self.cache,
            use_cache=True,
            specdec_step=step,
        )
        calls = [placed(recording.calls[index], self.cache, step, self.mask) for index in self.module.templates]
        return self.module.run(fused, calls)


def _depths(model: PreTrainedModel, reference: AdapterReference) -> DepthMap:
    """Return the depth map of an adapter that was made for `model`."""
    record = reference.record
    if record["architecture"] != ARCHITECTURE:
        raise ValueError(
            f"The adapter in {reference.place} has the architecture {record['architecture']!r}; this release reads "
            f"{ARCHITECTURE}."
        )
    layers = len(decoder_layers(model))
    return DepthMap(layers, record["num_stages"], record["stage_layers"], record["feature_layers"])


def read_depths(model: PreTrainedModel, name_or_path: str) -> DepthMap:
    """Return the depth map of a saved draft module for `model`, without loading the module.

    Raises:
        ValueError: for a module of another model or architecture.
    """
    reference = read_record(name_or_path, KIND)
    _MODULE.check(model, reference)
    return _depths(model, reference)


def load_draft_module(model: PreTrainedModel, name_or_path: str) -> PipelineDraftModule:
    """Return the draft module saved in a folder or Hub repository, for `model`, in evaluation mode.

    Raises:
        ValueError: for a module of another model or architecture, or tensors that are not what its record says.
    """
    return load_adapter(model, _MODULE, name_or_path)


def _build(model: PreTrainedModel, adapter: Adapter) -> PipelineDraftModule:
    record, depths = adapter.record, _depths(model, adapter)
    ids, span, family = adapter.take_vocabulary("draft_token_ids"), record.get("train_span"), record.get("family")
    module = PipelineDraftModule(model, depths, record["templates"], ids, span, family, record)
    what = f"the tensors of a draft module with features {depths.features}"
    adapter.fill(module, dict(module.named_parameters()), what)
    return module.eval()


_NEEDS = ("architecture", "num_stages", "stage_layers", "feature_layers", "templates")
_MODULE = AdapterKind(KIND, _build, needs=_NEEDS, model="model", moves=True)
