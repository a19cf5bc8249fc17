"""The folder in which a strategy's settings and adapter lie, on disk or on the Hub.

One layout for every strategy: `specdec_config.json`, the files that its record of an adapter names, and a card. A
drafter with an adapter of its own lies in a subfolder with the name of the field that holds it. Only safetensors and
JSON are ever read, and only what lies inside the folder.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
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
    for file in files_of(read_values(folder), folder, only_inside=True):
        _download(name, file, subfolder, {**hub, "revision": revision})
    _located[key] = folder
    return folder


def forget() -> None:
    """Make the next `locate` ask the Hub again."""
    _located.clear()


def place(folder: Path) -> str:
    """Return how messages name a folder: by its repository where it lies in the Hub's cache."""
    found = re.search(r"(?:^|/)models--([^/]+)/snapshots/([^/]+)(?:/(.+))?$", folder.as_posix())
    if found is None:
        return repr(str(folder))
    name, revision, inner = found.groups()
    return f"{name.replace('--', '/')!r} on the Hub ({inner + ', ' if inner else ''}revision {revision[:12]})"


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


@dataclass(frozen=True)
class AdapterReference:
    """What settings say of their adapter: where it is and, if it lies beside them, what it is.

    Args:
        name (`str`): the folder or Hub repository that holds it.
        record (`dict`, *optional*): what the config file records of it; empty for an adapter elsewhere.
        files (`tuple[str, ...]`, *optional*): its files, relative to the folder.
    """

    name: str
    record: dict[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()

    @classmethod
    def parse(cls, values: dict[str, Any], folder: Path) -> AdapterReference | None:
        """Return the adapter of the settings `values` in `folder`, `None` if they have none.

        Raises:
            ValueError: for a record of another format, or a file that may not be read.
        """
        entry = values.get("adapter")
        if isinstance(entry, dict):
            return cls(str(folder), entry, _record_files(entry, place(folder)))
        return None if entry is None else cls(entry)

    @classmethod
    def find(cls, name_or_path: str | Path) -> AdapterReference:
        """Return the adapter in a folder or Hub repository; its record is empty if there is none.

        Raises:
            OSError: if there are no settings, or the repository can't be read.
            ValueError: as for `parse`.
        """
        folder = locate(name_or_path, remember=True)
        found = cls.parse(read_values(folder), folder)
        return found if found is not None and found.record else cls(str(folder))

    @property
    def folder(self) -> Path:
        """The folder that holds the files, of an adapter that was parsed or found."""
        return Path(self.name)

    @property
    def place(self) -> str:
        """How messages name the folder: by its repository where it is on the Hub."""
        return place(self.folder)

    @property
    def kind(self) -> str | None:
        """What the adapter is, such as `"draft"`."""
        return self.record.get("kind")

    def copy(self, folder: Path) -> dict[str, Any]:
        """Copy the files, and the card where there is none yet, into `folder`; return the record.

        Raises:
            FileNotFoundError: if the folder records no adapter, or one of its files is missing.
        """
        if not self.record:
            raise FileNotFoundError(f"`adapter={self.name!r}`: {CONFIG_NAME} there records no adapter.")
        if self.folder.resolve() == folder.resolve():
            return self.record
        check_files(self.folder, self.files)
        card = (self.folder / "README.md").is_file() and not (folder / "README.md").exists()
        for name in (*self.files, *(["README.md"] if card else [])):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / name, folder / name)
        return self.record


def adapters_of(values: dict[str, Any], folder: Path, inside: str = "") -> Iterator[tuple[str, AdapterReference]]:
    """Yield the adapters of settings and of settings nested in them, each with its subfolder (`""`, `"drafter/"`)."""
    own = AdapterReference.parse(values, folder)
    if own is not None:
        yield inside, own
    for name, inner in values.items():
        if name != "adapter" and isinstance(inner, dict) and "strategy" in inner:
            yield from adapters_of(inner, folder / name, f"{inside}{name}/")


def with_adapters(values: dict[str, Any], folder: Path, rename: Callable[[AdapterReference], str]) -> dict[str, Any]:
    """Return settings in `folder` that name each adapter, those of nested settings too, by what `rename` returns."""
    found = {
        name: with_adapters(value, folder / name, rename) if isinstance(value, dict) and name != "adapter" else value
        for name, value in values.items()
    }
    own = AdapterReference.parse(values, folder)
    return found if own is None else {**found, "adapter": rename(own)}


def files_of(values: dict[str, Any], folder: Path, only_inside: bool = False) -> list[str]:
    """Return the files that settings name, relative to their folder, those of nested settings included.

    Args:
        values (`dict`): what a config file holds.
        folder (`Path`): of the file.
        only_inside (`bool`, *optional*, defaults to `False`): refuse an adapter that lies elsewhere.

    Raises:
        ValueError: for a record of another format, or a file that may not be read.
    """
    where, files = f"{CONFIG_NAME} in {place(folder)}", dict[str, None]()  # in order, each once
    for inside, adapter in adapters_of(values, folder):
        if not adapter.record:
            if only_inside:
                raise ValueError(
                    f"{where} names an adapter elsewhere ({adapter.name!r}), and a repository must hold its own. "
                    "Save the settings with `save_pretrained`, which copies the adapter, and push that folder."
                )
            continue
        path = ""
        for name in inside.split("/")[:-1]:
            if not name.isidentifier():
                raise ValueError(f"{where} has a field {name!r}, which is no name of a field.")
            path += f"{name}/"
            files[path + CONFIG_NAME] = None
        files |= dict.fromkeys(path + file for file in adapter.files)
    return list(files)


def _record_files(record: dict[str, Any], where: str) -> tuple[str, ...]:
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
    return tuple(files)


def check_files(folder: Path, files: Iterable[str]) -> None:
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
