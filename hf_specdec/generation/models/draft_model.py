"""Draft models cut from a target: a few of its layers, its embedding and head shared, perhaps fewer words.

The saved file holds what the draft has of its own, the layers and the final norm. `load_draft` builds the whole model
from the target and that file: an ordinary model of the target's class, which stock assisted generation takes as well.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ...configuration import CONFIG_NAME, SpeculationConfig
from .adapters import Adapter, AdapterKind, describe, load_adapter, write_adapter
from .surgery import decoder_layers, place_layer
from .vocabulary import ReducedHead


KIND = "draft"


def cut_draft(
    target: PreTrainedModel, layers: Sequence[int], vocabulary: torch.Tensor | None = None
) -> PreTrainedModel:
    """Return a model of copies of some of the target's layers, which shares its embedding and head.

    Args:
        target (`PreTrainedModel`): a decoder; it stays as it is.
        layers (`list[int]`): indices of the layers to copy, ascending.
        vocabulary (`torch.Tensor` of shape `[k]`, int64, *optional*): ids that the draft can propose; its head is cut
            to their rows. `None` for all.

    Raises:
        ValueError: for indices that are out of range or not ascending, or a vocabulary that is.
    """
    whole = decoder_layers(target)
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= len(whole):
        raise ValueError(f"`layers` must be ascending indices below {len(whole)}, got {list(layers)}.")
    embedding, head = target.get_input_embeddings(), target.get_output_embeddings()
    # whatever is in the memo is taken as it stands instead of being copied
    memo: dict[int, Any] = {id(embedding): embedding, id(head): head}
    memo[id(whole)] = torch.nn.ModuleList(copy.deepcopy(whole[index], memo) for index in layers)
    draft: PreTrainedModel = copy.deepcopy(target, memo)
    if vocabulary is not None:
        draft.set_output_embeddings(ReducedHead(head, vocabulary))
    config = draft.config.get_text_config(decoder=True)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[index] for index in layers]
    config.num_hidden_layers = len(layers)
    for place, layer in enumerate(decoder_layers(draft)):
        place_layer(layer, place)
    return draft


def own_parameters(draft: PreTrainedModel, target: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Return the draft's parameters that it does not share with the target, by name."""
    shared = {id(parameter) for parameter in target.parameters()}
    return {name: value for name, value in draft.named_parameters() if id(value) not in shared}


def save_draft(
    draft: PreTrainedModel,
    target: PreTrainedModel,
    layers: Sequence[int],
    folder: str | Path,
    config: SpeculationConfig,
    notes: dict[str, Any] | None = None,
) -> None:
    """Write a draft of `cut_draft`, in bf16, to a folder that `load_draft` and `assistant_strategy=` take.

    Args:
        draft (`PreTrainedModel`): as returned by `cut_draft(target, layers)`, trained or not.
        config (`SpeculationConfig`): settings to use it with, of a strategy that drafts with an assistant.
        notes (`dict`, *optional*): what else to record, such as how it was trained.
    """
    tensors = {name: value.detach().bfloat16() for name, value in own_parameters(draft, target).items()}
    head = draft.get_output_embeddings()
    if isinstance(head, ReducedHead):
        tensors["vocabulary"] = head.ids.int()
    record = {"kind": KIND, "layers": list(layers), "target": describe(target), **(notes or {})}
    write_adapter(folder, config, record, tensors)


def load_draft(target: PreTrainedModel, name_or_path: str) -> PreTrainedModel:
    """Return the draft model saved in a folder or Hub repository, built on `target`, in evaluation mode.

    It is an ordinary model of the target's class: `model.generate(..., assistant_model=draft)` works with and without
    `assistant_strategy`. It shares the target's embedding and head, so moving it to another device moves those.

    Args:
        target (`PreTrainedModel`): the model that it was cut from.
        name_or_path (`str`): where it was saved. It is read once per target; `hf_specdec.unload(target)` forgets it.

    Raises:
        ValueError: for a draft of another model, or a file that is no draft.
    """
    return load_adapter(target, _DRAFT, name_or_path)


def _build(target: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    draft = cut_draft(target, adapter.record["layers"], adapter.take_vocabulary())
    adapter.fill(draft, own_parameters(draft, target), "the layers that its record names")
    shared = {id(module) for module in target.modules()}
    for module in draft.modules():
        if id(module) not in shared:
            module.training = False
    return draft


_DRAFT = AdapterKind(KIND, _build, needs=("layers",), model="target")


def load_assistant(target: PreTrainedModel, name: str, dtype: str, device: str) -> PreTrainedModel:
    """Return the second model called `name`: a draft that was cut from the target, or a model of its own."""
    from transformers import AutoModelForCausalLM

    folder = Path(name)
    if (folder / CONFIG_NAME).is_file() and not (folder / "config.json").is_file():
        return load_draft(target, name)
    # its tokenizer is the target's, and need not lie beside it
    return AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype), device_map=device).eval()
