"""The folder in which a strategy's settings and adapter lie, on disk or on the Hub.

One layout for every strategy: `specdec_config.json`, the files that its record of an adapter names, and a card. A
drafter with an adapter of its own lies in a subfolder with the name of the field that holds it. Only safetensors and
JSON are ever read, and only what lies inside the folder.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import hf_hub_download, is_offline_mode
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # what the HTTP client raises, whichever one this release of huggingface_hub uses
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


CONFIG_NAME = "specdec_config.json"
"""File name of a saved config, in a folder or a Hub repository."""

ADAPTER_NAME = "specdec_adapter.safetensors"
"""File name of the tensors of an adapter, beside its config."""

FORMAT_VERSION = 1
"""Of the record of an adapter in a config file."""

HUB_KEYWORDS = ("revision", "token", "cache_dir", "local_files_only")
"""Keywords that say how a Hub repository is read."""

_SUFFIXES = (".safetensors", ".json")

_located: dict[tuple[str, ...], Path] = {}


def locate(name_or_path: str | Path, subfolder: str = "", remember: bool = False, **hub: Any) -> Path:
    """Return the folder of saved settings, downloaded with all that they name where it is on the Hub.

    The files are of one revision: the one that the name meant when the settings were read.

    Args:
        name_or_path (`str` or `Path`): a folder, or a Hub repository's name.
        subfolder (`str`, *optional*): of the folder or repository.
        remember (`bool`, *optional*, defaults to `False`): whether to ask the Hub only once per process;
            `forget` ends that.
        hub: some of `HUB_KEYWORDS`; those that are `None` or `False` count as not given.

    Raises:
        OSError: if something was not found, may not be read or did not arrive whole; `FileNotFoundError` for a file.
        ValueError: for Hub keywords beside a folder, or settings that name what may not be read.
    """
    hub = {name: value for name, value in hub.items() if value is not None and value is not False}
    folder, name = Path(name_or_path), str(name_or_path)
    if folder.is_dir():
        if hub:
            raise ValueError(f"{', '.join(map(repr, hub))}: only for a Hub repository, but {name!r} is a folder.")
        folder = folder / subfolder
        if not (folder / CONFIG_NAME).is_file():
            raise FileNotFoundError(f"The folder {str(folder)!r} holds no {CONFIG_NAME}.")
        return folder
    if name.count("/") != 1:
        raise FileNotFoundError(f"{name!r} is neither a folder nor a Hub repository.")
    key = (name, subfolder, *(f"{keyword}={hub.get(keyword)}" for keyword in HUB_KEYWORDS))
    if remember and key in _located and (_located[key] / CONFIG_NAME).is_file():
        return _located[key]
    folder = _download(name, CONFIG_NAME, subfolder, hub).parent
    revision = folder.parents[len(PurePosixPath(subfolder).parts) - 1].name if subfolder else folder.name
    for file in files_of(read_values(folder), place(folder), only_inside=True):
        _download(name, file, subfolder, {**hub, "revision": revision})
    _located[key] = folder
    return folder


def forget() -> None:
    """Make the next `locate` ask the Hub again."""
    _located.clear()


def place(folder: Path) -> str:
    """Return how messages name a folder: by its repository where it lies in the Hub's cache."""
    parts = folder.parts
    for index, part in enumerate(parts[:-2]):
        if part.startswith("models--") and parts[index + 1] == "snapshots":
            name = part.removeprefix("models--").replace("--", "/")
            inner = "/".join(parts[index + 3 :])
            return f"{name!r} on the Hub ({inner + ', ' if inner else ''}revision {parts[index + 2][:12]})"
    return repr(str(folder))


def read_values(folder: Path) -> dict[str, Any]:
    """Return what a folder's config file holds; raise `ValueError` for one that is no JSON object."""
    where = f"{CONFIG_NAME} in {place(folder)}"
    try:
        values = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} is not JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{where} must hold a JSON object, got {type(values).__name__}.")
    return values


def write_values(folder: Path, values: dict[str, Any]) -> None:
    """Write a folder's config file, making the folder where needed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def files_of(values: dict[str, Any], where: str, only_inside: bool = False) -> list[str]:
    """Return the files that settings name, relative to their folder, those of nested settings included.

    Args:
        values (`dict`): what a config file holds.
        where (`str`): of the file, for messages.
        only_inside (`bool`, *optional*, defaults to `False`): refuse an adapter that lies elsewhere.

    Raises:
        ValueError: for a record of another format, or a file that may not be read.
    """
    record, files = values.get("adapter"), []
    if isinstance(record, dict):
        files += record_files(record, where)
    elif record is not None and only_inside:
        raise ValueError(
            f"{CONFIG_NAME} in {where} names an adapter elsewhere ({record!r}), and a repository must hold its own. "
            "Save the settings with `save_pretrained`, which copies the adapter, and push that folder."
        )
    for name, inner in values.items():
        if name == "adapter" or not isinstance(inner, dict) or "strategy" not in inner:
            continue
        nested = files_of(inner, where, only_inside)
        if nested or isinstance(inner.get("adapter"), dict):
            if not name.isidentifier():
                raise ValueError(f"{CONFIG_NAME} in {where} has a field {name!r}, which is no name of a field.")
            files += [f"{name}/{file}" for file in (CONFIG_NAME, *nested)]
    return files


def record_files(record: dict[str, Any], where: str) -> list[str]:
    """Return the files that the record of an adapter names; raise `ValueError` for what may not be read."""
    if record.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"The adapter in {where} has format version {record.get('format_version')!r}; this release reads "
            f"{FORMAT_VERSION}. A newer hf_specdec may read it: pip install -U hf-specdec."
        )
    files = record.get("files", [ADAPTER_NAME])
    if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        raise ValueError(f"The adapter in {where} has a record whose `files` is no list of names, but {files!r}.")
    for name in files:
        path = PurePosixPath(name)
        outside = path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name
        if outside or path.suffix not in _SUFFIXES:
            raise ValueError(
                f"The adapter in {where} names the file {name!r}. Only {' and '.join(_SUFFIXES)} files inside its own "
                "folder are read: other formats can carry code. Nothing was loaded; convert it to safetensors."
            )
    return files


def read_record(name_or_path: str | Path) -> tuple[Any, Path]:
    """Return what a folder or Hub repository records of its adapter (`None` if there is none), and its folder."""
    folder = locate(name_or_path, remember=True)
    record = read_values(folder).get("adapter")
    if isinstance(record, dict):
        record_files(record, place(folder))
    return record, folder


def copy_adapter(name_or_path: str | Path, folder: Path) -> dict[str, Any]:
    """Copy the files of an adapter, and its card where there is none yet, into `folder`; return its record.

    Raises:
        FileNotFoundError: if there is no such adapter, or one of its files is missing.
    """
    record, source = read_record(name_or_path)
    if not isinstance(record, dict):
        raise FileNotFoundError(f"`adapter={str(name_or_path)!r}`: {CONFIG_NAME} there records no adapter.")
    if source.resolve() == folder.resolve():
        return record
    files = record_files(record, place(source))
    check_files(source, files)
    if (source / "README.md").is_file() and not (folder / "README.md").exists():
        files = [*files, "README.md"]
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    return record


def check_files(folder: Path, files: list[str]) -> None:
    """Raise `FileNotFoundError` unless `folder` holds all `files`."""
    for name in files:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"The adapter folder {place(folder)} holds no {name}, which its {CONFIG_NAME} names; copy it there, "
                "or save the adapter again."
            )


def _download(repo_id: str, file: str, subfolder: str, hub: dict[str, Any]) -> Path:
    """Return a file of a repository, from the cache where it is there; see `locate` for what is raised."""
    name = f"{subfolder}/{file}" if subfolder else file
    revision = hub.get("revision") or "main"
    where = f"The Hub repository {repo_id!r}"
    try:
        return Path(hf_hub_download(repo_id, name, **hub))
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is neither a folder nor a Hub repository's name: {error}") from error
    except RevisionNotFoundError as error:
        raise OSError(f"{where} has no revision {revision!r}; give a branch, tag or commit that it has.") from error
    except RepositoryNotFoundError as error:
        reason = "is gated" if isinstance(error, GatedRepoError) else "does not exist, or is private"
        raise OSError(f"{where} {reason}. {_TOKEN}") from error
    except LocalEntryNotFoundError as error:
        raise _not_cached(where, name, revision, hub, error) from error
    except EntryNotFoundError as error:
        advice = (
            "`config.push_to_hub` and `hf-specdec push` write one; check the name of the repository."
            if file == CONFIG_NAME
            else f"Its {CONFIG_NAME} names that file: it has to be pushed again, whole."
        )
        raise FileNotFoundError(f"{where} holds no {name} (revision {revision!r}). {advice}") from error
    except HfHubHTTPError as error:
        advice = _TOKEN if error.response.status_code in (401, 403) else "Try again later."
        raise OSError(f"{where}: {name} was not downloaded, {error} {advice}") from error
    except (HTTPError, OSError) as error:
        raise OSError(
            f"{where}: {name} did not arrive whole ({error}). Nothing of it is used; the next call downloads it again."
        ) from error


_TOKEN = "If it is one that you may read, pass a `token` that may, or log in with `hf auth login`."


def _not_cached(where: str, name: str, revision: str, hub: dict[str, Any], error: Exception) -> OSError:
    """Return the error for a file that is neither in the cache nor to be had."""
    if hub.get("local_files_only") or is_offline_mode():
        setting = "`local_files_only=True`" if hub.get("local_files_only") else "`HF_HUB_OFFLINE=1`"
        return FileNotFoundError(
            f"{where}: {name} (revision {revision!r}) is not in the cache, and {setting} forbids downloading it. Call "
            "once without, with a connection."
        )
    cause = error.__cause__ or error
    return OSError(f"{where}: {name} is not in the cache, and the Hub was not reached ({cause}). Try again later.")
