"""Reading draft modules of the reference implementation of SPD: one `.pt` file, architecture v11."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..generation.methods.spd.depth_map import DepthMap
from ..generation.methods.spd.draft_module import PipelineDraftModule
from ..generation.methods.spd.method import SPDConfig
from ..generation.models.surgery import decoder_layers


_VERSION = 11
_PREFIXES = {"aggr_projs.": "feature_proj.", "spec_layers.": "layers."}
_NEEDED = ("version", "num_stages", "aggr_feature_bound", "num_spec_layers")


def convert_reference(path: str | Path, model: PreTrainedModel, folder: str | Path) -> PipelineDraftModule:
    """Write a reference checkpoint as an adapter for `model`, and return it.

    Args:
        path (`str` or `Path`): file with a dictionary of `state_dict` and `config`; nothing in it is executed.
        model (`PreTrainedModel`): the model that it was trained for; the file does not say which one that is.
        folder (`str` or `Path`): gets the adapter, in bf16.

    Raises:
        ValueError: for another version, a module trained without fill simulation, or tensors that don't fit the model.
    """
    found = torch.load(path, map_location="cpu", weights_only=True)
    config, tensors = _parts(found, str(path))
    layers = len(decoder_layers(model))
    ids = config.get("draft_token_ids")
    names = {_renamed(name): value for name, value in tensors.items()}
    # the reference gives Llama-like targets the layers of Qwen3, which norm queries and keys
    foreign = any(".q_norm." in name for name in names)
    own = any("q_norm" in name for name, _ in decoder_layers(model)[-1].named_parameters())
    module = PipelineDraftModule(
        model,
        DepthMap(layers, config["num_stages"], config.get("stage_layers"), config["aggr_feature_bound"]),
        [layers - 1] * config["num_spec_layers"],
        None if ids is None else torch.as_tensor(ids, dtype=torch.int64),
        config.get("max_length"),
        "qwen3" if foreign and not own else None,
    )
    expected = {name: tuple(value.shape) for name, value in module.named_parameters()}
    given = {name: tuple(value.shape) for name, value in names.items()}
    if given != expected:
        wrong = sorted(name for name in {*given, *expected} if given.get(name) != expected.get(name))
        name = wrong[0]
        raise ValueError(
            f"{str(path)!r} does not fit {type(model).__name__}: {name} is {given.get(name)} there and "
            f"{expected.get(name)} here ({len(wrong)} tensors differ)."
        )
    module.load_state_dict(names, strict=False)
    module.save(folder, SPDConfig(), model, fill_simulation=True, converted_from=Path(path).name)
    return module


def _parts(found: Any, where: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the settings and tensors of a checkpoint."""
    if not isinstance(found, dict) or not {"state_dict", "config"} <= set(found):
        raise ValueError(f"{where!r} must hold a dictionary with `state_dict` and `config`.")
    config = found["config"]
    missing = [name for name in _NEEDED if name not in config]
    if missing:
        raise ValueError(f"{where!r} has a config without {', '.join(missing)}.")
    if config["version"] != _VERSION:
        raise ValueError(f"{where!r} is of version {config['version']!r}; only version {_VERSION} can be converted.")
    if not config.get("trained_with_use_deepest", True):
        raise ValueError(
            f"{where!r} was trained without fill simulation (`trained_with_use_deepest` is False), so it expects "
            "features that this implementation does not give; train it again."
        )
    return config, found["state_dict"]


def _renamed(name: str) -> str:
    for old, new in _PREFIXES.items():
        if name.startswith(old):
            return new + name[len(old) :]
    return name
