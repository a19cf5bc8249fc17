"""Strategies by name, folder or Hub repository; uploads; and strategies saved with a model."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from . import artefacts
from .configuration import CONFIG_NAME, SpeculationConfig
from .generation.registry import STRATEGIES, config_class, preset


if TYPE_CHECKING:
    from .card import Results

CARD_NAME = "README.md"

_ARCHIVES = (".tar", ".zip", ".npy", ".npz", ".h5", ".msgpack", ".onnx", ".gguf")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", *_ARCHIVES)
_LEFT_BEHIND = (".", "__", "checkpoint")  # hidden, caches, and what a training resumes from


def resolve_strategy(strategy: Any, settings: dict[str, Any] | None = None, **hub: Any) -> SpeculationConfig:
    """Return the config that `assistant_strategy` means.

    A Hub repository is asked once per process; `hf_specdec.unload(model)` makes the next call ask again.

    Args:
        strategy (`str` or `SpeculationConfig`): a registered name (`"vegas"`, or a preset such as `"vegas:window"`),
            else a folder with a saved config, else a Hub repository.
        settings (`dict`, *optional*): fields of the config that differ from what the name gives.
        hub: `revision`, `token`, `cache_dir` and `local_files_only`, for a Hub repository.

    Raises:
        TypeError: for anything that is neither a string nor a config.
        ValueError: for a string that is none of the three, and for `hub` beside anything but a Hub repository.
        OSError: if the folder or the repository can't be read.
    """
    settings = dict(settings or {})
    settings.pop("strategy", None)
    settings.pop("hf_specdec_version", None)
    given = {name: value for name, value in hub.items() if value is not None and value is not False}
    if isinstance(strategy, SpeculationConfig):
        _refuse(given, "a config")
        return strategy.override(**settings) if settings else strategy
    if not isinstance(strategy, str):
        raise TypeError(
            f"`assistant_strategy` must be a name, a folder, a Hub repository or a config, got "
            f"{type(strategy).__name__}."
        )
    name = strategy.partition(":")[0]
    if name in STRATEGIES:
        _refuse(given, f"the registered strategy {strategy!r}")
        config = preset(strategy)
    elif strategy and Path(strategy).is_dir():
        _refuse(given, f"the folder {strategy!r}")
        config = SpeculationConfig.from_pretrained(strategy)
    else:
        config = _from_hub(strategy, given)
    if not settings:
        return config
    return config_class(config.strategy).from_dict({**config.to_dict(), **settings})


def _refuse(hub: dict[str, Any], what: str) -> None:
    if hub:
        names = ", ".join(f"`{name}`" for name in hub)
        raise ValueError(f"{names}: only for an `assistant_strategy` that is a Hub repository; this one is {what}.")


def _from_hub(repo_id: str, hub: dict[str, Any]) -> SpeculationConfig:
    known = ", ".join(sorted(STRATEGIES))
    message = f"`assistant_strategy={repo_id!r}` is no registered strategy ({known}), no folder"
    if repo_id.count("/") != 1:
        raise ValueError(f"{message}, and no Hub repository with a {CONFIG_NAME}.")
    try:
        folder = artefacts.locate(repo_id, remember=True, **hub)
    except OSError as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        raise kind(f"{message}, and can't be had from the Hub. {error}") from error
    return SpeculationConfig._loaded(folder)


# uploads


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    results: Results | None = None,
) -> str:
    """Upload a folder of saved settings to a Hub repository, in one commit, and return the commit's address.

    A folder without a card gets the repository's, else a new one; see `write_card` for what becomes of a card. Hidden
    files, and the folder `checkpoint` that a training resumes from, stay behind.

    Args:
        folder (`str` or `Path`): as `save_pretrained` or a training writes it.
        repo_id (`str`): the repository, made where needed.
        token (`str` or `bool`, *optional*): that may write; by default that of `hf auth login`.
        private (`bool`, *optional*): visibility of a repository that is made.
        revision (`str`, *optional*): branch to upload to, made where needed; the main one by default.
        commit_message (`str`, *optional*): of the commit.
        results (`Results`, *optional*): measurements for the card.

    Raises:
        OSError: if a file is missing, the Hub refuses the upload or can't be reached.
        ValueError: for a folder that can't be uploaded, or another visibility than the repository has.
    """
    from .card import write_card

    path = Path(folder)
    names = check_folder(path)
    api = HfApi(token=token, library_name="hf_specdec")
    with _explained(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private is not None and bool(api.repo_info(repo_id).private) != private:
            raise ValueError(
                f"The repository {repo_id!r} exists and is {'public' if private else 'private'}, so "
                f"`private={private}` has no effect; change that in its settings on the Hub, or leave `private` out."
            )
        if revision not in (None, "main"):
            api.create_branch(repo_id, branch=str(revision), exist_ok=True)
        if CARD_NAME not in names:
            text = _card_on_hub(repo_id, revision, token)
            if text is not None:
                (path / CARD_NAME).write_bytes(text)
            names.append(CARD_NAME)
        write_card(path, repo_id, results)
        info = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, path / name) for name in names],
            commit_message=commit_message or "Upload with hf_specdec",
            revision=revision,
        )
    return str(info.commit_url)


def push_config(config: SpeculationConfig, repo_id: str, *, revision: str | None = None, **options: Any) -> str:
    """Do what `SpeculationConfig.push_to_hub` says."""
    with TemporaryDirectory() as folder:
        with _explained(repo_id):
            text = _card_on_hub(repo_id, revision, options.get("token"))
        if text is not None:  # before the adapter's own card is copied
            (Path(folder) / CARD_NAME).write_bytes(text)
        config.save_pretrained(folder)
        return push_folder(folder, repo_id, revision=revision, **options)


def check_folder(folder: Path) -> list[str]:
    """Return the files of a folder that an upload consists of.

    Raises:
        FileNotFoundError: if the config, or a file that it names, is not there.
        ValueError: for settings that don't load, and for weights that they don't name or of another format.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{str(folder)!r} is no folder; push one that `save_pretrained` or a training wrote.")
    SpeculationConfig.from_pretrained(folder)
    named = artefacts.files_of(artefacts.read_values(folder), repr(str(folder)), only_inside=True)
    artefacts.check_files(folder, named)
    for name in named:
        _check_file(folder / name)
    every = [file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()]
    names = [file.as_posix() for file in every if not file.parts[0].startswith(_LEFT_BEHIND)]
    strange = [name for name in names if Path(name).suffix.lower() in _WEIGHTS and name not in named]
    if strange:
        raise ValueError(
            f"The folder {str(folder)!r} holds {', '.join(strange)}, which its {CONFIG_NAME} does not name. Only "
            "safetensors files that it names are uploaded: move the others away."
        )
    return names


def _check_file(path: Path) -> None:
    """Raise `ValueError` unless a file is what its suffix says."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        else:
            with safe_open(path, framework="pt"):
                pass
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is no {path.suffix.removeprefix('.')} file: {error}.") from error


def _card_on_hub(repo_id: str, revision: str | None, token: str | bool | None) -> bytes | None:
    """Return the card that a repository has; `None` without one, and for a repository that is yet to be made."""
    try:
        return Path(hf_hub_download(repo_id, CARD_NAME, revision=revision, token=token)).read_bytes()
    except (RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return None


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Say what to do about what the Hub refuses."""
    try:
        yield
    except HfHubHTTPError as error:
        advice = "Try again later."
        if error.response.status_code in (401, 403, 404):
            advice = "Pass a `token` that may write there, or log in with `hf auth login`."
        raise OSError(f"Nothing was uploaded to the Hub repository {repo_id!r}. {advice} ({error})") from error
    except (HTTPError, ConnectionError, LocalEntryNotFoundError) as error:
        raise OSError(f"The Hub was not reached, so nothing was uploaded to {repo_id!r}: {error}") from error


# with a model


def save_strategy(model: PreTrainedModel, folder: str | Path) -> None:
    """Write `model.generation_config`, its `assistant_strategy` included, for `from_pretrained(folder)` to read.

    Then `generate()` of the loaded model speculates without an argument. A strategy that is a config is written as
    its name and its settings. Names stay names, of the Hub too. A local folder, and an adapter in one, are written as
    absolute paths: the model's folder may be moved on this machine, but before it is pushed or copied elsewhere, the
    strategy has to be pushed and named by its repository.

    Args:
        model (`PreTrainedModel`): its `generation_config.assistant_strategy` is set.
        folder (`str` or `Path`): usually the folder of `model.save_pretrained`.

    Raises:
        ValueError: if no strategy is set, or it can't be resolved.
        OSError: if its folder or repository can't be read.
    """
    config: Any = copy.deepcopy(model.generation_config)
    strategy, settings = config.assistant_strategy, config.assistant_strategy_config
    if strategy is None:
        raise ValueError("`model.generation_config.assistant_strategy` is None; set it to a strategy's name first.")
    resolved = resolve_strategy(strategy, settings)
    if isinstance(strategy, SpeculationConfig):
        strategy, settings = resolved.strategy, resolved.to_dict()
    elif strategy.partition(":")[0] not in STRATEGIES:
        strategy = _absolute(strategy)
    config.assistant_strategy, config.assistant_strategy_config = strategy, _absolute_adapters(settings)
    # a config that was derived from the model's own loses unknown entries when it is read back
    config._from_model_config = False
    config.save_pretrained(folder)


def _absolute(name_or_path: str) -> str:
    return str(Path(name_or_path).resolve()) if Path(name_or_path).is_dir() else name_or_path


def _absolute_adapters(settings: Any) -> Any:
    """Return settings, those nested in them included, that find local adapters from anywhere."""
    if isinstance(settings, SpeculationConfig):
        settings = settings.to_dict()
    if not isinstance(settings, dict):
        return settings
    found = {name: _absolute_adapters(value) for name, value in settings.items()}
    return {**found, "adapter": _absolute(found["adapter"])} if isinstance(found.get("adapter"), str) else found
