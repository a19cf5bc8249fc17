"""`load_stage`: the part of a model that one rank of SPD's pipeline needs, without the rest ever being in memory."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from ...models.adapters import read_record
from ...models.surgery import decoder_layers
from .depth_map import DepthMap
from .draft_module import KIND
from .ranks import place_of_stage


_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def load_stage(
    name_or_path: str | Path,
    adapter: str,
    *,
    rank: int | None = None,
    world_size: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """Load what this rank needs of a model for `generate(..., assistant_strategy=adapter)` over several ranks.

    That are the layers of the rank's stage, the embedding and what follows the last layer, and on the controlling rank
    the head. All else stays on the meta device, so the model can't be run by itself.

    Args:
        name_or_path (`str` or `Path`): folder or Hub repository of the model, with safetensors files.
        adapter (`str`): folder or Hub repository of the draft module, which knows the stages.
        rank (`int`, *optional*): this process's rank; `torch.distributed`'s by default.
        world_size (`int`, *optional*): number of ranks; `torch.distributed`'s by default.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): of the weights; equal on all ranks.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): where this rank's part is put.

    Returns:
        `PreTrainedModel`: in evaluation mode.

    Raises:
        ValueError: if the ranks don't fit the stages, or the files don't hold what the model's parameters are called.
        FileNotFoundError: if there are no safetensors files.
    """
    from accelerate import init_empty_weights

    config = AutoConfig.from_pretrained(name_or_path)
    layers = config.get_text_config(decoder=True).num_hidden_layers
    record = read_record(adapter, KIND).record
    depths = DepthMap(layers, record["num_stages"], record["stage_layers"], record["feature_layers"])
    own_rank, _, stage = place_of_stage(depths.stages, rank, world_size)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    wanted = _wanted(model, depths, stage, head=own_rank == 0)
    tensors = _read(name_or_path, wanted, dtype, torch.device(device))
    model.load_state_dict(tensors, strict=False, assign=True)
    if config.get_text_config(decoder=True).tie_word_embeddings:
        model.tie_weights()
    missing = sorted(name for name, value in model.named_parameters() if name in wanted and value.is_meta)
    if missing:
        raise ValueError(
            f"The files of {str(name_or_path)!r} don't hold {', '.join(missing[:3])} under these names, so a part of "
            "the model can't be loaded alone; load it whole on every rank with `from_pretrained`."
        )
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    with suppress(OSError):  # there need not be one
        model.generation_config = GenerationConfig.from_pretrained(name_or_path)
    model.config._name_or_path = str(name_or_path)
    return cast(PreTrainedModel, model.eval())


def _wanted(model: PreTrainedModel, depths: DepthMap, stage: int | None, head: bool) -> set[str]:
    """Return the names of the parameters and saved buffers that a rank needs."""
    outside: set[int] = set()
    for index, layer in enumerate(decoder_layers(model)):
        if stage is None or not depths.bounds[stage] <= index < depths.bounds[stage + 1]:
            outside |= {id(tensor) for tensor in layer.state_dict(keep_vars=True).values()}
    if not head:
        own = cast(nn.Module, model.get_output_embeddings()).state_dict(keep_vars=True).values()
        embedding = {id(tensor) for tensor in model.get_input_embeddings().parameters()}
        outside |= {id(tensor) for tensor in own} - embedding
    return {name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) not in outside}


def _read(
    name_or_path: str | Path, wanted: set[str], dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """Read some tensors of a model's files, and no others."""
    index = _file(name_or_path, _INDEX)
    if index is None:
        files = {_WEIGHTS: wanted}
    else:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {file: {name for name in wanted if places.get(name) == file} for file in set(places.values())}
    found: dict[str, Any] = {}
    for file, names in files.items():
        if not names:
            continue
        path = _file(name_or_path, file)
        if path is None:
            raise FileNotFoundError(f"{str(name_or_path)!r} holds no {file}; `load_stage` reads safetensors files.")
        with safe_open(path, framework="pt", device=str(device)) as tensors:
            for name in names & set(tensors.keys()):
                tensor = tensors.get_tensor(name)
                found[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return found


def _file(name_or_path: str | Path, name: str) -> Path | None:
    """Return the path of a file of a model, `None` if it has none of that name."""
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    try:
        return Path(hf_hub_download(str(name_or_path), name))
    except EntryNotFoundError:
        return None
