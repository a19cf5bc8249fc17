"""Adapters: what a strategy has learned for one model. A folder holds `specdec_config.json` and the tensors.

The config file carries the strategy's settings and, under `"adapter"`, a record of what the tensors are: their kind,
the format's version, and the models they were made for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ... import artefacts
from ...artefacts import ADAPTER_NAME, CONFIG_NAME, FORMAT_VERSION
from ...configuration import SpeculationConfig


Built = TypeVar("Built")


@dataclass
class Adapter:
    """A loaded adapter.

    Args:
        record (`dict`): what the config file says of it under `"adapter"`.
        tensors (`dict[str, torch.Tensor]`): its tensors, on the CPU.
        folder (`Path`): where it was read from.
    """

    record: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    folder: Path

    @property
    def place(self) -> str:
        """How messages name the folder: by its repository where it is on the Hub."""
        return artefacts.place(self.folder)


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """Return what an adapter notes of a model that it was made for.

    The fingerprint is the length of 16 rows of the embedding, spread over the vocabulary: equal for any floating type
    of the same weights, different for another model.
    """
    config = model.config.get_text_config(decoder=True)
    weight: Any = model.get_input_embeddings().weight
    rows = torch.linspace(0, weight.shape[0] - 1, 16, device=weight.device).long()
    return {
        "name": Path(name).name if Path(name := str(model.config._name_or_path)).is_dir() else name,
        "model_type": model.config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "fingerprint": [round(length, 4) for length in weight[rows].detach().float().norm(dim=1).tolist()],
    }


def check_model(model: PreTrainedModel, noted: dict[str, Any], folder: Path, role: str) -> None:
    """Raise `ValueError` unless `model` is the one that an adapter was made for.

    Args:
        model (`PreTrainedModel`): the model at hand.
        noted (`dict`): what `describe` returned when the adapter was made.
        folder (`Path`): of the adapter, for the message.
        role (`str`): of the model, for the message: `"model"` or `"assistant_model"`.
    """
    found = describe(model)
    for key in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
        if found[key] != noted[key]:
            raise ValueError(
                f"The adapter in {artefacts.place(folder)} was made for a `{role}` with {key} {noted[key]!r} "
                f"({noted['name']}), but this one has {found[key]!r} ({found['name']}). {_OTHER}"
            )
    same = torch.allclose(torch.tensor(found["fingerprint"]), torch.tensor(noted["fingerprint"]), rtol=0.02)
    if not same:
        raise ValueError(
            f"The adapter in {artefacts.place(folder)} was made for another `{role}` of the same shape "
            f"({noted['name']}): the embeddings of {found['name']!r} differ. {_OTHER}"
        )


_OTHER = "Use it with the model that it names, or train one for this model (`hf-specdec train --help`)."


def write_adapter(
    folder: str | Path, config: SpeculationConfig, record: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    """Write an adapter that `assistant_strategy=folder` takes.

    Args:
        folder (`str` or `Path`): made where needed.
        config (`SpeculationConfig`): the settings to use it with; its class has a field `adapter`.
        record (`dict`): at least `kind`; the format's version is added.
        tensors (`dict[str, torch.Tensor]`): what to store.
    """
    write_record(folder, config, record)
    save_file(
        {name: value.contiguous().cpu() for name, value in tensors.items()},
        Path(folder) / ADAPTER_NAME,
        {"format": "pt"},
    )


def write_record(folder: str | Path, config: SpeculationConfig, record: dict[str, Any]) -> None:
    """Write settings with the record of an adapter; `record["files"]` names its files, if not the usual one."""
    values = {**config.to_dict(), "adapter": {"format_version": FORMAT_VERSION, **record}}
    artefacts.write_values(Path(folder), values)


def write_config(folder: str | Path, config: SpeculationConfig) -> None:
    """Write settings into a folder, keeping the record of an adapter that lies there.

    Raises:
        ValueError: for settings of another strategy than the adapter's.
    """
    path = Path(folder)
    noted = artefacts.read_values(path) if (path / CONFIG_NAME).is_file() else {}
    if not isinstance(noted.get("adapter"), dict):
        config.save_pretrained(path)
        return
    if noted["strategy"] != config.strategy:
        raise ValueError(f"{str(path)!r} holds an adapter of {noted['strategy']!r}, not of {config.strategy!r}.")
    artefacts.write_values(path, {**config.to_dict(), "adapter": noted["adapter"]})


def read_record(name_or_path: str | Path, kind: str) -> tuple[dict[str, Any], Path]:
    """Return the record of an adapter in a folder or a Hub repository, and the folder; its tensors are not read.

    Raises:
        OSError: if there is no config file, or the repository can't be read.
        ValueError: for an adapter of another kind, or a format that this release doesn't know.
    """
    record, folder = artefacts.read_record(name_or_path)
    if not isinstance(record, dict) or record.get("kind") != kind:
        found = record.get("kind") if isinstance(record, dict) else None
        raise ValueError(f"{artefacts.place(folder)} holds an adapter of kind {found!r}; needed: {kind!r}.")
    return record, folder


def read_adapter(name_or_path: str | Path, kind: str) -> Adapter:
    """Load an adapter from a folder or a Hub repository.

    Raises:
        OSError: if one of its files is missing, or the repository can't be read.
        ValueError: for an adapter of another kind, or a format that this release doesn't know.
    """
    record, folder = read_record(name_or_path, kind)
    files = artefacts.record_files(record, artefacts.place(folder))
    artefacts.check_files(folder, files)
    return Adapter(record, read_tensors(folder / ADAPTER_NAME) if ADAPTER_NAME in files else {}, folder)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file; raise `ValueError` for a file of another format, or a broken one."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path.name} in {artefacts.place(path.parent)} is no whole safetensors file ({error}); save or download "
            "it again."
        ) from error


_loaded: WeakKeyDictionary[PreTrainedModel, dict[tuple[str, str], Any]] = WeakKeyDictionary()


def load_once(model: PreTrainedModel, kind: str, name_or_path: str, build: Callable[[Adapter], Built]) -> Built:
    """Return `build(adapter)`, built once per model, kind and file as it is on disk."""
    folder = Path(name_or_path)
    where = str(name_or_path)
    if (folder / CONFIG_NAME).is_file():
        files = [folder / CONFIG_NAME, *sorted(folder.rglob("*.safetensors"))]
        where = f"{folder.resolve()} {[file.stat().st_mtime_ns for file in files]}"
    built = _loaded.setdefault(model, {})
    if (kind, where) not in built:
        adapter = read_adapter(name_or_path, kind)
        try:
            built[kind, where] = build(adapter)
        except KeyError as error:
            raise ValueError(f"The adapter in {adapter.place} has a record without {error}.") from error
    return built[kind, where]


def remember(model: PreTrainedModel, kind: str, name: str, built: Any) -> None:
    """Make `built` what `load_once` returns under a name: for an adapter that is being trained, in no file yet."""
    _loaded.setdefault(model, {})[kind, name] = built


def unload(model: PreTrainedModel) -> None:
    """Forget the adapters that were loaded for `model`, and what Hub names meant; the next call looks again."""
    _loaded.pop(model, None)
    artefacts.forget()
