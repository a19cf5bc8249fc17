"""Strategies as `custom_generate` repositories, for Transformers' own `generate(custom_generate=...)`.

Transformers copies `custom_generate/generate.py`, and nothing else, to a place of its own before it runs it. So the
settings stand in that file, and an adapter is named there by its repository or its folder.
"""

from __future__ import annotations

import pprint
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from . import artefacts
from ._version import __version__
from .artefacts import HUB_KEYWORDS
from .card import render
from .configuration import SpeculationConfig
from .integration import generate_with
from .registry import STRATEGIES, strategy_class
from .resolve import resolve_strategy


logger = logging.get_logger(__name__)

_EXAMPLE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# by these and `HUB_KEYWORDS` Transformers finds the repository; they come with the other keywords
_LOADING_KEYWORDS = ("force_download", "proxies", "repo_type")


def generate(strategy: dict[str, Any] | str, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Generate with an exported strategy. Files on the Hub call this: what it takes must not change.

    Args:
        strategy (`dict` or `str`): a config's `to_dict()`, or the repository or folder of an adapter with its config.
        model (`PreTrainedModel`): the target.
        args: what `model.generate()` takes by position.
        kwargs: what `model.generate()` takes by keyword; `assistant_strategy_config` changes settings for one call.

    Raises:
        ValueError: for `assistant_strategy`, since the repository names one, and for all that `assistant_strategy=`
            refuses.
        FileNotFoundError: if the folder of the adapter is not there any more.
    """
    if kwargs.pop("assistant_strategy", None) is not None:
        raise ValueError(
            "`assistant_strategy` can't be given with `custom_generate`: the repository names a strategy."
        )
    for name in _LOADING_KEYWORDS:
        kwargs.pop(name, None)
    named = SpeculationConfig.from_dict(strategy) if isinstance(strategy, dict) else strategy
    if isinstance(named, str) and Path(named).is_absolute() and not Path(named).is_dir():
        raise FileNotFoundError(
            f"The adapter of this `custom_generate` repository was in {named!r}, which is not there any more: "
            "export it again, with `--repo ORG/NAME` for use from the Hub."
        )
    if not isinstance(named, str) or Path(named).is_dir():
        for name in HUB_KEYWORDS:
            kwargs.pop(name, None)
    return generate_with(named, model, *args, **kwargs)


def export_custom_generate(
    strategy: str | SpeculationConfig,
    folder: str | Path,
    *,
    repo: str | None = None,
    base_model: str | None = None,
    force: bool = False,
) -> list[Path]:
    """Write a repository for `model.generate(custom_generate=folder, trust_remote_code=True)`.

    Args:
        strategy (`str` or `SpeculationConfig`): what `assistant_strategy` would be.
        folder (`str` or `Path`): made where needed.
        repo (`str`, *optional*): name of the Hub repository that the folder will be pushed to. With an adapter it is
            where `generate.py` looks for it; without a name that is the folder, so it must stay where it is.
        base_model (`str`, *optional*): for the card; by default the model that an adapter was made for.
        force (`bool`, *optional*, defaults to `False`): write into a folder that is not empty. Files of the same names
            are replaced, but for a `README.md`.

    Returns:
        The files that were written, besides what `save_pretrained` writes.

    Raises:
        FileExistsError: if the folder is not empty.
        ValueError: for an unknown strategy, one that is registered in this process only, one that lacks the adapter
            that it needs, and a name that no repository can have.
    """
    config, path = resolve_strategy(strategy), Path(folder).resolve()
    _check_strategy(config)
    _check_place(path, repo, force)
    keeps_card = (path / "README.md").exists()
    config.save_pretrained(path)
    adapter = any(artefacts.adapters_of(artefacts.read_values(path), path))
    source = (repo or str(path)) if adapter else config.to_dict()
    if adapter and repo is None:
        logger.warning(
            f"`generate.py` names the adapter by its place on this machine, {str(path)!r}. Before it is pushed, "
            "export it with the name that it will have on the Hub (`--repo ORG/NAME`)."
        )
    values = {"source": pprint.pformat(source, sort_dicts=False, width=110), "requirement": _requirement()}
    names = ("custom_generate/generate.py", "custom_generate/requirements.txt")
    files = {name: render(f"{name}.jinja", config, **values) for name in names}
    if not keeps_card:
        files["README.md"] = _card(path, config, repo or f"YOUR_NAME/{path.name}", base_model, adapter)
    for name, text in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text, encoding="utf-8")
    return [path / name for name in files]


def _check_strategy(config: SpeculationConfig) -> None:
    """Raise `ValueError` for a strategy that can't work in another process, from a folder of its own."""
    entry = STRATEGIES[config.strategy]
    if not isinstance(entry, str):
        raise ValueError(
            f"The strategy {config.strategy!r} was registered in this process ({entry.__module__}) and is no part of "
            "hf_specdec, so a repository that names it would work nowhere else."
        )
    if strategy_class(config.strategy).needs_adapter and getattr(config, "adapter", None) is None:
        raise ValueError(
            f"The strategy {config.strategy!r} needs a trained adapter: export the folder or Hub repository that has "
            "it, instead of the name."
        )


def _check_place(path: Path, repo: str | None, force: bool) -> None:
    """Raise an error for a folder that can't be written to, or a name that no repository can have."""
    if repo is not None:
        validate_repo_id(repo)
        if "/" not in repo:
            raise ValueError(f"`repo` must be ORG/NAME, got {repo!r}.")
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{str(path)!r} is a file; give a folder.")
    if path.is_dir() and any(path.iterdir()) and not force:
        raise FileExistsError(
            f"The folder {str(path)!r} is not empty; give another one, or `--force` to write into it (a README.md "
            "that is there is kept)."
        )


def _requirement() -> str:
    """Return the line of requirements.txt; Transformers reads digits and dots of a version only.

    So a development version can't be named there: its number without the suffix would be above it.
    """
    return f"hf-specdec>={__version__}" if __version__.replace(".", "").isdigit() else "hf-specdec"


def _card(path: Path, config: SpeculationConfig, repo: str, base_model: str | None, adapter: bool) -> str:
    """Return the card of saved settings with the sections of a `custom_generate` repository before its own text."""
    card: Any = ModelCard((path / "README.md").read_text(encoding="utf-8"))
    card.data.library_name = "transformers"
    card.data.tags = list(
        dict.fromkeys(["custom_generate", "speculative-decoding", config.strategy, *(card.data.tags or [])])
    )
    if base_model is not None:
        card.data.base_model = base_model
    part = render(
        "custom_generate/README.md.jinja",
        config,
        base_model=card.data.get("base_model"),
        adapter=adapter,
        example_model=_EXAMPLE_MODEL,
        repo=repo,
    )
    return f"---\n{card.data.to_yaml()}\n---\n\n{part}{card.text.lstrip()}"
