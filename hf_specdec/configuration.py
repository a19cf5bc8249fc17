"""Settings of a strategy: a frozen dataclass that validates itself and lives in a folder or on the Hub."""

from __future__ import annotations

import types
import typing
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from transformers.utils import logging

from . import artefacts
from ._version import __version__
from .artefacts import ADAPTER_NAME as ADAPTER_NAME
from .artefacts import CONFIG_NAME as CONFIG_NAME
from .artefacts import AdapterReference
from .card import write_card
from .hub import push_config
from .registry import config_class


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
    for a wrong type) when the config is built, so that nothing has been computed by then. A subclass for which a field
    of this class means nothing declares the name as a `ClassVar`, with the value that it always has.

    Args:
        num_assistant_tokens (`int`, *optional*, defaults to 5): draft tokens per round and row. A value given to
            `generate()` or on `GenerationConfig` overrides it.
        compile (`str`, *optional*): `"graphs"` captures the rounds' forwards as CUDA graphs, `"inductor"` compiles the
            model around its attention (on CPU and CUDA), `"graphs+inductor"` captures what was compiled. None of them
            changes a token; see docs/speed.md for what they cost and where they pay. Strategies that run parts of the
            model by themselves don't have this field.
        kernels (`str`, *optional*, defaults to `"auto"`): what attends over the cache: `"triton"`, `"flash"`
            (flash-attn; forwards whose scores are needed take the next best), `"sdpa"` or `"explicit"`; `"auto"`
            takes the fastest that is there.
    """

    strategy: ClassVar[str] = ""

    _replaced: ClassVar[dict[str, str]] = {}
    """Fields of earlier releases, each with what replaced it: `from_dict` drops them with a warning that says so."""

    num_assistant_tokens: int = 5
    compile: str | None = field(default=None, kw_only=True)
    kernels: str = field(default="auto", kw_only=True)

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for own in fields(self):
            _check_type(self, own.name, hints[own.name])
        if self.has_field("num_assistant_tokens") and self.num_assistant_tokens < 1:
            raise ValueError(f"`num_assistant_tokens` must be at least 1, got {self.num_assistant_tokens}.")
        for name, allowed in (("compile", (None, *COMPILE_MODES)), ("kernels", KERNELS)):
            if getattr(self, name) not in allowed:
                choices = ", ".join(map(repr, allowed))
                raise ValueError(f"`{name}` must be one of {choices}, got {getattr(self, name)!r}.")
        self.validate()

    def validate(self) -> None:
        """Raise `ValueError` for a value that is not allowed; the types have been checked already."""

    def check_choices(self, **allowed: tuple[str | None, ...]) -> None:
        """Raise `ValueError` for a field that has another value than those allowed by its name."""
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(map(str, values))}, got {getattr(self, name)!r}."
                )

    @property
    def lossless(self) -> bool:
        """Whether the output's distribution is the model's own under these settings."""
        return True

    @property
    def brings_drafter(self) -> bool:
        """Whether these settings name what drafts, so that a method that drafts with an assistant needs none."""
        return getattr(self, "drafter", None) is not None

    @classmethod
    def has_field(cls, name: str) -> bool:
        """Return whether `name` is a setting of this class."""
        return name in (own.name for own in fields(cls))

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
                that was not written by a newer release. (A newer release's unknown fields are dropped with a warning,
                and so are an older one's that went.)
        """
        values = dict(values)
        name, version = values.pop("strategy", cls.strategy), values.pop("hf_specdec_version", __version__)
        if not isinstance(name, str) or not isinstance(version, str):
            raise ValueError(f"`strategy` and `hf_specdec_version` must be strings, got {name!r} and {version!r}.")
        if cls is SpeculationConfig:
            chosen = typing.cast("type[ConfigType]", config_class(name))
            return chosen.from_dict({**values, "strategy": name, "hf_specdec_version": version})
        if name != cls.strategy:
            raise ValueError(f"These settings are for the strategy {name!r}, but {cls.__name__} is {cls.strategy!r}.")
        values = cls._without_replaced(cls._upgraded(values))
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown and _release(version) <= _release(__version__):
            raise ValueError(
                f"{cls.__name__} has no field {', '.join(unknown)}; its fields: {', '.join(sorted(known))}."
            )
        if unknown:
            logger.warning(
                f"{cls.__name__}: ignoring {', '.join(unknown)}, written by hf_specdec {version}; this is "
                f"{__version__}. To use them: pip install -U hf-specdec."
            )
        nested: dict[str, Any] = {
            key: SpeculationConfig.from_dict(v) if isinstance(v, dict) else v for key, v in values.items()
        }
        return cls(**{key: value for key, value in nested.items() if key in known})

    @classmethod
    def _upgraded(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Return the settings with what earlier releases wrote otherwise in today's form; a subclass's to override."""
        return values

    @classmethod
    def _without_replaced(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Drop fields of earlier releases, with a warning unless they were unset."""
        gone = [
            f"`{name}={value!r}` ({cls._replaced[name]})"
            for name, value in values.items()
            if name in cls._replaced and value is not None
        ]
        if gone:
            logger.warning_once(f"{cls.__name__}: these settings hold fields that went: {'; '.join(gone)}.")
        return {name: value for name, value in values.items() if name not in cls._replaced}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the settings, the adapter that they name, and a card, to a folder that can be moved and pushed.

        The files of `adapter` are copied, and those of an adapter of a nested config (`drafter`) into a subfolder of
        that field's name. A card that is there is left alone.

        Args:
            folder (`str` or `Path`): made where needed.

        Raises:
            FileNotFoundError: if the adapter, or one of its files, is not there.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        artefacts.write_values(path, self._saved(path))
        if not (path / "README.md").exists():
            write_card(path, self)

    def _saved(self, folder: Path) -> dict[str, Any]:
        """Copy adapters into `folder`, and return what its config file is to hold."""
        values = self.to_dict()
        adapter = getattr(self, "adapter", None)
        if adapter is not None:
            values["adapter"] = AdapterReference.find(adapter).copy(folder)
        for own in fields(self):
            nested = getattr(self, own.name)
            if isinstance(nested, SpeculationConfig):
                values[own.name] = nested._saved(folder / own.name)
                if artefacts.files_of({own.name: values[own.name]}, folder):
                    artefacts.write_values(folder / own.name, values[own.name])
        return values

    @classmethod
    def from_pretrained(
        cls: type[ConfigType],
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        subfolder: str = "",
    ) -> ConfigType:
        """Load the settings from a folder or a Hub repository; `SpeculationConfig` returns the right subclass.

        From the Hub the adapter comes along, of the same revision. Only safetensors and JSON are read, and no code is
        run.

        Args:
            name_or_path (`str` or `Path`): a folder that holds `specdec_config.json`, or a repository's name.
            revision (`str`, *optional*): branch, tag or commit of the repository.
            token (`str` or `bool`, *optional*): for a private repository; by default that of `hf auth login`.
            cache_dir (`str` or `Path`, *optional*): of the Hub's files.
            local_files_only (`bool`, *optional*, defaults to `False`): read the cache only.
            subfolder (`str`, *optional*): of the folder or repository.

        Raises:
            OSError: if the repository can't be read, or a file did not arrive; `FileNotFoundError` if the folder or
                the repository holds no such file.
            ValueError: if the file is not JSON, or its content is refused by `from_dict`.
        """
        hub: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
        hub["local_files_only"] = local_files_only
        config = load_config(artefacts.locate(name_or_path, subfolder, **hub))
        if not isinstance(config, cls):
            raise ValueError(
                f"The settings in {str(name_or_path)!r} are for the strategy {config.strategy!r}, but {cls.__name__} "
                f"is {cls.strategy!r}."
            )
        return config

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | bool | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes to a Hub repository, in one commit, and return the commit's address.

        Args:
            repo_id (`str`): the repository, made where needed. The text of a card that it has is kept.
            token (`str` or `bool`, *optional*): that may write; by default that of `hf auth login`.
            private (`bool`, *optional*): visibility of a repository that is made.
            revision (`str`, *optional*): branch to upload to, made where needed; the main one by default.
            commit_message (`str`, *optional*): of the commit.

        Raises:
            OSError: if the Hub refuses the upload or can't be reached.
            ValueError: for settings that can't be uploaded, or another visibility than the repository has.
        """
        return push_config(
            self, repo_id, token=token, private=private, revision=revision, commit_message=commit_message
        )


def load_config(folder: Path) -> SpeculationConfig:
    """Return the settings saved in `folder`, of the class that they name; the only way from a folder to a config.

    An adapter that lies beside the settings becomes the value of their field `adapter`.

    Raises:
        FileNotFoundError: if the folder holds no settings.
        ValueError: for a file that is not JSON, or settings that `SpeculationConfig.from_dict` refuses.
    """
    values = artefacts.read_values(folder)
    located = artefacts.with_adapters(values, folder, lambda adapter: adapter.name)
    try:
        return SpeculationConfig.from_dict(located)
    except (ValueError, TypeError) as error:
        message = f"{CONFIG_NAME} in {artefacts.place(folder)}: {error}"
        version = values.get("hf_specdec_version", __version__)
        if isinstance(version, str) and _release(version) > _release(__version__):
            message += f" It was written by hf_specdec {version}, this is {__version__}: pip install -U hf-specdec."
        raise (TypeError if isinstance(error, TypeError) else ValueError)(message) from error


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
