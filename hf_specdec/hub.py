"""Uploads of saved settings to the Hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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

from . import artefacts
from .artefacts import CONFIG_NAME
from .card import Results, Settings, write_card


CARD_NAME = "README.md"

_ARCHIVES = (".tar", ".zip", ".npy", ".npz", ".h5", ".msgpack", ".onnx", ".gguf")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", *_ARCHIVES)
_LEFT_BEHIND = (".", "__", "checkpoint")  # hidden, caches, and what a training resumes from


def push_folder(
    path: Path,
    config: Settings,
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
        path (`Path`): as `save_pretrained` or a training writes it.
        config (`SpeculationConfig`): the settings in it.
        repo_id, token, private, revision, commit_message: as for `SpeculationConfig.push_to_hub`.
        results (`Results`, *optional*): measurements for the card.

    Raises:
        OSError: if a file is missing, the Hub refuses the upload or can't be reached.
        ValueError: for a folder that can't be uploaded, or another visibility than the repository has.
    """
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
            _copy_card(path, repo_id, revision, token)
            names.append(CARD_NAME)
        write_card(path, config, repo_id, results)
        info = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, path / name) for name in names],
            commit_message=commit_message or "Upload with hf_specdec",
            revision=revision,
        )
    return str(info.commit_url)


def push_config(config: Settings, repo_id: str, *, revision: str | None = None, **options: Any) -> str:
    """Do what `SpeculationConfig.push_to_hub` says."""
    with TemporaryDirectory() as folder:
        path = Path(folder)
        with _explained(repo_id):
            _copy_card(path, repo_id, revision, options.get("token"))  # before the adapter's own card is copied
        config.save_pretrained(path)
        return push_folder(path, config, repo_id, revision=revision, **options)


def check_folder(folder: Path) -> list[str]:
    """Return the files of a folder that an upload consists of.

    Raises:
        FileNotFoundError: if the config, or a file that it names, is not there.
        ValueError: for settings that don't load, and for weights that they don't name or of another format.
    """
    named = artefacts.files_of(artefacts.read_values(folder), folder, only_inside=True)
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


def _copy_card(folder: Path, repo_id: str, revision: str | None, token: str | bool | None) -> None:
    """Copy a repository's card to `folder`; do nothing without one, or if the repository is yet to be made."""
    with suppress(RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        shutil.copyfile(hf_hub_download(repo_id, CARD_NAME, revision=revision, token=token), folder / CARD_NAME)


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
