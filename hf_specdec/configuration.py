"""Settings of a strategy: a frozen dataclass that validates itself and lives in a folder or on the Hub."""

from __future__ import annotations

import json
import types
import typing
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from huggingface_hub import HfApi, hf_hub_download
from transformers.utils import logging

from . import __version__


CONFIG_NAME = "specdec_config.json"
"""File name of a saved config, in a folder or a Hub repository."""

ADAPTER_NAME = "specdec_adapter.safetensors"
"""File name of the tensors of an adapter, beside its config."""

COMPILE_MODES = ("graphs", "inductor", "graphs+inductor")
"""Values of `compile`, beside `None`."""

KERNELS = ("auto", "flash", "triton", "explicit", "sdpa")
"""Values of `kernels`; `hf_specdec.kernels.choice` has what each one can't do."""

logger = logging.get_logger(__name__)
ConfigType = TypeVar("ConfigType", bound="SpeculationConfig")


@dataclass(frozen=True)
class SpeculationConfig:
    """Base of every strategy's settings.

    A subclass adds fields with defaults and checks them in `validate`. Bad values raise `ValueError` (or `TypeError`
    for a wrong type) when the config is built, so that nothing has been computed by then.

    Args:
        num_assistant_tokens (`int`, *optional*, defaults to 5): draft tokens per round and row. A value given to
            `generate()` or on `GenerationConfig` overrides it.
        compile (`str`, *optional*): `"graphs"` captures the rounds' forwards as CUDA graphs, `"inductor"` compiles the
            model around its attention (on CPU and CUDA), `"graphs+inductor"` captures what was compiled. None of them
            changes a token; see docs/speed.md for what they cost and where they pay. For the strategies plain,
            assisted, prompt_lookup, vegas and diversed.
        kernels (`str`, *optional*, defaults to `"auto"`): what attends over the cache: `"triton"`, `"flash"`
            (flash-attn; forwards whose scores are needed take the next best), `"sdpa"` or `"explicit"`; `"auto"`
            takes the fastest that is there.
    """

    strategy: ClassVar[str] = ""

    num_assistant_tokens: int = 5
    compile: str | None = field(default=None, kw_only=True)
    kernels: str = field(default="auto", kw_only=True)

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for own in fields(self):
            _check_type(self, own.name, hints[own.name])
        if self.num_assistant_tokens < 1:
            raise ValueError(f"`num_assistant_tokens` must be at least 1, got {self.num_assistant_tokens}.")
        for name, allowed in (("compile", (None, *COMPILE_MODES)), ("kernels", KERNELS)):
            if getattr(self, name) not in allowed:
                choices = ", ".join(map(repr, allowed))
                raise ValueError(f"`{name}` must be one of {choices}, got {getattr(self, name)!r}.")
        self.validate()

    def validate(self) -> None:
        """Raise `ValueError` for a value that is not allowed; the types have been checked already."""

    @property
    def lossless(self) -> bool:
        """Whether the output's law is the model's own under these settings."""
        return True

    @property
    def brings_drafter(self) -> bool:
        """Whether these settings name what drafts, so that a method that drafts with an assistant needs none."""
        return False

    def override(self: ConfigType, **changes: Any) -> ConfigType:
        """Return a copy with `changes`, validated like a new config."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a JSON-safe dictionary that also names the strategy and the library's version."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values = {key: v.to_dict() if isinstance(v, SpeculationConfig) else v for key, v in values.items()}
        return {"strategy": self.strategy, "hf_specdec_version": __version__, **values}

    @classmethod
    def from_dict(cls: type[ConfigType], values: dict[str, Any]) -> ConfigType:
        """Build a config from `to_dict`'s output.

        Args:
            values (`dict`): the settings. On `SpeculationConfig` itself, `values["strategy"]` chooses the class.

        Raises:
            ValueError: for an unknown strategy, a strategy that is not this class's, or an unknown field in a file
                that was not written by a newer release. (A newer release's unknown fields are dropped with a warning.)
        """
        values = dict(values)
        name, version = values.pop("strategy", cls.strategy), values.pop("hf_specdec_version", __version__)
        if cls is SpeculationConfig:
            # the table of strategies is above this module; it is needed only once a file names one
            from .generation.registry import config_class

            chosen = typing.cast("type[ConfigType]", config_class(name))
            return chosen.from_dict({**values, "strategy": name, "hf_specdec_version": version})
        if name != cls.strategy:
            raise ValueError(f"These settings are for the strategy {name!r}, but {cls.__name__} is {cls.strategy!r}.")
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown and _release(version) <= _release(__version__):
            raise ValueError(
                f"{cls.__name__} has no field {', '.join(unknown)}; its fields: {', '.join(sorted(known))}."
            )
        if unknown:
            logger.warning(f"{cls.__name__}: ignoring {', '.join(unknown)}, written by hf_specdec {version}.")
        nested: dict[str, Any] = {
            key: SpeculationConfig.from_dict(v) if isinstance(v, dict) else v for key, v in values.items()
        }
        return cls(**{key: value for key, value in nested.items() if key in known})

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the settings to `folder/specdec_config.json`, making the folder where needed."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls: type[ConfigType], name_or_path: str | Path, **hub_kwargs: Any) -> ConfigType:
        """Load the settings from a folder or a Hub repository; `SpeculationConfig` returns the right subclass.

        Args:
            name_or_path (`str` or `Path`): a folder that holds `specdec_config.json`, or a repository's name.
            hub_kwargs: passed to `huggingface_hub.hf_hub_download`, such as `revision`, `token`, `cache_dir`,
                `local_files_only` and `subfolder`.

        Raises:
            FileNotFoundError: if the folder exists and holds no such file.
            ValueError: if the file is not JSON, or its content is refused by `from_dict`.
        """
        folder = Path(name_or_path)
        if folder.is_dir():
            path = folder / hub_kwargs.get("subfolder", "") / CONFIG_NAME
            if not path.is_file():
                raise FileNotFoundError(f"The folder {str(folder)!r} holds no {CONFIG_NAME}.")
        else:
            path = Path(hf_hub_download(str(name_or_path), CONFIG_NAME, **hub_kwargs))
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{str(path)!r} is not JSON: {error}.") from error
        if not isinstance(values, dict):
            raise ValueError(f"{str(path)!r} must hold a JSON object, got {type(values).__name__}.")
        if isinstance(values.get("adapter"), dict):  # the record of an adapter that lies beside this file
            for name in [] if folder.is_dir() else values["adapter"].get("files", [ADAPTER_NAME]):
                hf_hub_download(str(name_or_path), name, **hub_kwargs)
            values["adapter"] = str(path.parent)
        return cls.from_dict(values)

    def push_to_hub(self, repo_id: str, *, token: str | None = None, private: bool | None = None) -> str:
        """Upload the settings to the Hub repository `repo_id`, made where needed, and return the commit's address."""
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        content = (json.dumps(self.to_dict(), indent=2) + "\n").encode()
        info = api.upload_file(path_or_fileobj=content, path_in_repo=CONFIG_NAME, repo_id=repo_id)
        return str(info.commit_url)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


def _check_type(config: SpeculationConfig, name: str, hint: Any) -> None:
    """Raise `TypeError` unless the field `name` has one of the types that its annotation allows."""
    value = getattr(config, name)
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    allowed = tuple(typing.get_origin(h) or h for h in (typing.get_args(hint) if union else (hint,)))
    if isinstance(value, bool) and bool not in allowed:
        matches = False  # a bool is an int to isinstance, never to a reader of a config
    else:
        matches = isinstance(value, allowed) or (float in allowed and isinstance(value, int))
    if not matches:
        names = " or ".join("None" if h is type(None) else h.__name__ for h in allowed)
        raise TypeError(f"`{name}` must be {names}, got {value!r}.")
