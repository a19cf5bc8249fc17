"""Adapters: what a strategy has learned for one model. A folder holds `specdec_config.json` and the tensors.

The config file carries the strategy's settings and, under `"adapter"`, a record of what the tensors are: their kind,
the format's version, and the models they were made for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from ... import artefacts
from ...artefacts import ADAPTER_NAME, CONFIG_NAME, FORMAT_VERSION, AdapterReference
from ...configuration import SpeculationConfig
from .vocabulary import head_weight


Built = TypeVar("Built")

_loaded: WeakKeyDictionary[PreTrainedModel, dict[tuple[str, str], Any]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Adapter(AdapterReference):
    """A loaded adapter.

    Args:
        tensors (`dict[str, torch.Tensor]`): its tensors, on the CPU.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def take_vocabulary(self, name: str = "vocabulary") -> torch.Tensor | None:
        """Return the ids `[k]`, int64, that its head is cut to, which are no parameter; `None` for all."""
        ids = self.tensors.pop(name, None)
        return None if ids is None else ids.long()

    def fill(self, module: nn.Module, parameters: Mapping[str, nn.Parameter], what: str) -> None:
        """Set `parameters`, which are those of `module` or some of them, to the tensors, and freeze them.

        Args:
            what (`str`): that the tensors should be, for the message.

        Raises:
            ValueError: if names or shapes differ.
        """
        held, needed = ({n: tuple(v.shape) for n, v in side.items()} for side in (self.tensors, parameters))
        wrong = [name for name in sorted({*held, *needed}) if held.get(name) != needed.get(name)]
        if wrong:
            raise ValueError(
                f"The adapter in {self.place} does not hold {what}: {wrong[0]!r} has the shape {held.get(wrong[0])}, "
                f"and needs {needed.get(wrong[0])} (None: no such tensor)."
            )
        # buffers, if a layer has some, are as the model's
        like = {n: p if not p.is_meta else torch.empty(0, dtype=p.dtype) for n, p in parameters.items()}
        module.load_state_dict({n: v.to(like[n]) for n, v in self.tensors.items()}, strict=False, assign=True)
        for name in parameters:
            module.get_parameter(name).requires_grad_(False)


@dataclass(frozen=True)
class AdapterKind(Generic[Built]):
    """How adapters of one kind become what a strategy uses.

    Args:
        name (`str`): the kind that their records name.
        build (`Callable`): makes it of the model and the adapter.
        needs (`tuple[str, ...]`): entries that a record must have.
        model (`str`, *optional*): the entry that describes the model; `None` if there are others to compare too.
        moves (`bool`, *optional*, defaults to `False`): it is a module that follows the model to its device and type.
    """

    name: str
    build: Callable[[PreTrainedModel, Adapter], Built]
    needs: tuple[str, ...] = ()
    model: str | None = None
    moves: bool = False

    def check(self, model: PreTrainedModel, reference: AdapterReference) -> None:
        """Raise `ValueError` for a record that lacks something, or an adapter of another model than `model`."""
        needed = self.needs if self.model is None else (*self.needs, self.model)
        missing = sorted(set(needed) - set(reference.record))
        if missing:
            raise ValueError(f"The adapter in {reference.place} has a record without {', '.join(missing)}.")
        if self.model is not None:
            check_model(model, reference.record[self.model], reference, "model")


def load_adapter(model: PreTrainedModel, kind: AdapterKind[Built], name_or_path: str) -> Built:
    """Return what is saved in a folder or Hub repository, built for `model`.

    It is built once per model, kind and file as it is on disk; `unload` forgets it.

    Raises:
        OSError: if one of its files is missing, or the repository can't be read.
        ValueError: for an adapter of another kind, model or format, or tensors that are not what the record says.
    """
    folder = Path(name_or_path)
    where = str(name_or_path)
    if (folder / CONFIG_NAME).is_file():
        files = [folder / CONFIG_NAME, *sorted(folder.rglob("*.safetensors"))]
        where = f"{folder.resolve()} {[file.stat().st_mtime_ns for file in files]}"
    known = _loaded.setdefault(model, {})
    if (kind.name, where) not in known:
        adapter = read_adapter(name_or_path, kind.name)
        kind.check(model, adapter)
        known[kind.name, where] = kind.build(model, adapter)
    built: Any = known[kind.name, where]
    if kind.moves:  # the model may have been moved or cast since it was loaded
        weight = head_weight(model.get_output_embeddings())
        built = built.to(device=weight.device, dtype=weight.dtype)
    return cast(Built, built)


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """Return what an adapter notes of a model that it was made for.

    The fingerprint is the length of 16 rows of the embedding, spread over the vocabulary: equal for any floating type
    of the same weights, different for another model.
    """
    config = model.config.get_text_config(decoder=True)
    weight: Any = model.get_input_embeddings().weight
    if weight.is_meta:
        raise ValueError(
            f"No `adapter` can be used: the embedding of {type(model).__name__} is offloaded, and an adapter is "
            "compared with it. Keep the embedding on a device (`device_map`)."
        )
    rows = torch.linspace(0, weight.shape[0] - 1, 16, device=weight.device).long()
    return {
        "name": Path(name).name if Path(name := str(model.config._name_or_path)).is_dir() else name,
        "model_type": model.config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "fingerprint": [round(length, 4) for length in weight[rows].detach().float().norm(dim=1).tolist()],
    }


def check_model(model: PreTrainedModel, noted: dict[str, Any], reference: AdapterReference, role: str) -> None:
    """Raise `ValueError` unless `model` is the one that an adapter was made for.

    Args:
        model (`PreTrainedModel`): the model at hand.
        noted (`dict`): what `describe` returned when the adapter was made.
        reference (`AdapterReference`): the adapter, for the message.
        role (`str`): of the model, for the message: `"model"` or `"assistant_model"`.
    """
    found = describe(model)
    for key in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
        if found[key] != noted[key]:
            raise ValueError(
                f"The adapter in {reference.place} was made for a `{role}` with {key} {noted[key]!r} "
                f"({noted['name']}), but this one has {found[key]!r} ({found['name']}). {_OTHER}"
            )
    same = torch.allclose(torch.tensor(found["fingerprint"]), torch.tensor(noted["fingerprint"]), rtol=0.02)
    if not same:
        raise ValueError(
            f"The adapter in {reference.place} was made for another `{role}` of the same shape "
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
    adapter = AdapterReference.parse(noted, path)
    if adapter is None or not adapter.record:
        config.save_pretrained(path)
        return
    if noted["strategy"] != config.strategy:
        raise ValueError(f"{str(path)!r} holds an adapter of {noted['strategy']!r}, not of {config.strategy!r}.")
    artefacts.write_values(path, {**config.to_dict(), "adapter": adapter.record})


def read_record(name_or_path: str | Path, kind: str) -> AdapterReference:
    """Return what a folder or a Hub repository records of its adapter; the tensors are not read.

    Raises:
        OSError: if there is no config file, or the repository can't be read.
        ValueError: for an adapter of another kind, or a format that this release doesn't know.
    """
    found = AdapterReference.find(name_or_path)
    if found.kind != kind:
        raise ValueError(f"{found.place} holds an adapter of kind {found.kind!r}; needed: {kind!r}.")
    return found


def read_adapter(name_or_path: str | Path, kind: str) -> Adapter:
    """Load an adapter from a folder or a Hub repository.

    Raises:
        OSError, ValueError: as for `read_record`, or if one of its files is missing or broken.
    """
    found = read_record(name_or_path, kind)
    artefacts.check_files(found.folder, found.files)
    tensors = read_tensors(found.folder / ADAPTER_NAME) if ADAPTER_NAME in found.files else {}
    return Adapter(found.name, found.record, found.files, tensors)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file; raise `ValueError` for a file of another format, or a broken one."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path.name} in {artefacts.place(path.parent)} is no whole safetensors file ({error}); save or download "
            "it again."
        ) from error


def remember(model: PreTrainedModel, kind: str, name: str, built: Any) -> None:
    """Make `built` what `load_adapter` returns under a name: for an adapter that is being trained, in no file yet."""
    _loaded.setdefault(model, {})[kind, name] = built


def unload(model: PreTrainedModel) -> None:
    """Forget the adapters that were loaded for `model`, and what Hub names meant; the next call looks again."""
    _loaded.pop(model, None)
    artefacts.forget()
