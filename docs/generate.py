"""Parts of the documents that are generated: heads of method pages, the table of strategies, the overview of results.

    python docs/generate.py            # refresh the blocks between <!-- NAME:begin --> and <!-- NAME:end -->
    python docs/generate.py --check    # say which are stale, change nothing

Heads and strategies come from the registry (class attributes, config fields, docstrings), results from docs/results.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import types
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

import tables

from hf_specdec.configuration import SpeculationConfig
from hf_specdec.registry import STRATEGIES, preset, strategy_class


ROOT = Path(__file__).resolve().parent.parent

PAGES: dict[str, str] = {name: strategy_class(name).page or f"{name}.md" for name in STRATEGIES}
"""Page in docs/ of each strategy; a page may have several."""

_KEYS = ("Idea", "Drafts", "Verifies", "Trained", "Paper", "New here")


def blocks() -> dict[str, typing.Callable[[Path], str]]:
    """Return what writes each block, by the block's name; it is called with the file's path."""
    return {"strategies": strategies_table, "overview": tables.overview}


def replace_block(text: str, name: str, content: str) -> str:
    """Return `text` with `content` between the markers of the block `name`.

    Raises:
        ValueError: if the markers are not there exactly once, in order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"The text must have {begin!r} and {end!r} once each, in this order.")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content.strip()}\n{end}{rest.split(end)[1]}"


def refreshed(path: Path) -> str:
    """Return the text of a Markdown file with its generated blocks written anew."""
    text = path.read_text(encoding="utf-8")
    for name, write in blocks().items():
        if f"<!-- {name}:begin -->" in text:
            text = replace_block(text, name, write(path))
    return text


def documents() -> list[Path]:
    """Return the files that may have generated blocks."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def stale() -> list[Path]:
    """Return the files whose generated blocks are not what the code says."""
    return [path for path in documents() if path.is_file() and refreshed(path) != path.read_text(encoding="utf-8")]


def strategies_table(path: Path) -> str:
    """Return the table of all strategies, for the file at `path`."""
    folder = "docs/" if path.resolve().parent == ROOT else "../" * (len(path.resolve().relative_to(ROOT).parts) - 2)
    lines = [
        "| `assistant_strategy` | what it does | lossless | second model | trained part | rows of a batch |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in STRATEGIES:
        cls = strategy_class(name)
        title = f"[`{name}`]({folder}{PAGES[name]}#{name})" if _shared(name) else f"[`{name}`]({folder}{PAGES[name]})"
        paper = f" ([paper]({cls.paper}))" if cls.paper else ""
        cells = (title + paper, idea(name), lossless(name), second_model(name), trained_part(name), rows(name))
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines)


def head(name: str) -> str:
    """Return the head of a strategy's page: its facts, and a folded table of its settings."""
    cls = strategy_class(name)
    told = module_notes(name)
    facts = {"Strategy": f'`assistant_strategy="{name}"`, `{cls.config_class.__name__}`'}
    if cls.paper:
        facts["Paper"] = f"[{_paper(cls.paper)}]({cls.paper})"
    facts |= {key: told[key] for key in ("Drafts", "Verifies")}
    facts |= {
        "Lossless": lossless(name),
        "Second model": second_model(name),
        "Trained part": f"{trained_part(name)}: {told['Trained']}".replace("no: nothing.", "none"),
        "Rows of a batch": rows(name),
    }
    presets = [f'`"{name}:{key}"`' for key in cls.presets if key]
    if presets:
        facts["Presets"] = ", ".join(presets)
    lines = ["| | |", "| --- | --- |", *(f"| **{key}** | {_cell(value)} |" for key, value in facts.items()), ""]
    lines += [f'??? note "All settings of `{cls.config_class.__name__}`"', ""]
    return "\n".join([*lines, *(f"    {line}" for line in settings_table(cls.config_class)), ""])


def settings_table(config_class: type[SpeculationConfig]) -> list[str]:
    """Return the lines of the table of a config's fields: type, default and what the docstring says."""
    hints = typing.get_type_hints(config_class)
    lines = ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
    for field in fields(config_class):
        cells = (
            f"`{field.name}`",
            _type(hints[field.name]),
            f"`{field.default!r}`",
            field_doc(config_class, field.name),
        )
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return lines


def field_doc(config_class: type[SpeculationConfig], name: str) -> str:
    """Return what the docstring of the config, or of the nearest base, says of a field.

    Raises:
        ValueError: if none of them mentions it.
    """
    for cls in config_class.__mro__:
        documented = arguments(cls.__doc__ or "") if issubclass(cls, SpeculationConfig) else {}
        if name in documented:
            return documented[name]
    raise ValueError(f"The docstring of {config_class.__name__} has no entry for the field {name!r}.")


def arguments(docstring: str) -> dict[str, str]:
    """Return the descriptions under `Args:` by argument; an entry of several names describes each of them."""
    found: dict[str, str] = {}
    _, _, rest = inspect.cleandoc(docstring).partition("Args:\n")
    section = re.split(r"^\S", rest, maxsplit=1, flags=re.MULTILINE)[0]
    for entry in re.split(r"^    (?=\w)", section, flags=re.MULTILINE):
        match = re.match(r"([\w, ]+?)(?: \(.+?\))?: (.+)", " ".join(entry.split()))
        if match:
            found |= dict.fromkeys(match[1].split(", "), match[2])
    return found


def module_notes(name: str) -> dict[str, str]:
    """Return the entries of a method module's docstring ("Drafts", "Trained", ...).

    Raises:
        ValueError: if one is missing.
    """
    text = inspect.getdoc(inspect.getmodule(strategy_class(name))) or ""
    paragraph = next((part for part in text.split("\n\n") if part.startswith("Idea")), "")
    parts = re.split(rf"^({'|'.join(_KEYS)}) {{2,}}", paragraph, flags=re.MULTILINE)
    notes = {key: " ".join(value.split()) for key, value in zip(parts[1::2], parts[2::2], strict=True)}
    missing = [key for key in _KEYS if key not in notes]
    if missing:
        raise ValueError(f"The module docstring of {name!r} has no line that begins with {', '.join(missing)}.")
    return notes


def navigation() -> list[dict[str, str]]:
    """Return the entries of the method pages in the site's navigation; a title ends at its first colon."""
    entries = []
    for page in dict.fromkeys(PAGES.values()):
        title = (ROOT / "docs" / page).read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        entries.append({title.partition(":")[0]: page})
    return entries


def configs_reference() -> str:
    """Return what shows the config of every strategy, for mkdocstrings."""
    classes = (strategy_class(name).config_class for name in STRATEGIES)
    return "\n\n".join(f"::: {cls.__module__}.{cls.__qualname__}" for cls in classes)


def idea(name: str) -> str:
    """Return the first sentence of a method module's docstring, without the method's name."""
    first = (inspect.getdoc(inspect.getmodule(strategy_class(name))) or "").split("\n\n")[0]
    return " ".join(first.partition(": ")[2].split()).rstrip(".")


def lossless(name: str) -> str:
    """Say whether a strategy is lossless by its default settings, and which presets differ."""
    default = preset(name).lossless
    other = [f"{name}:{key}" for key in strategy_class(name).presets if key]
    other = [f"`{key}`" for key in other if preset(key).lossless != default]
    if not other:
        return "yes" if default else "**no**"
    return f"yes, except {', '.join(other)}" if default else f"**no**, except {', '.join(other)}"


def second_model(name: str) -> str:
    """Say whether a strategy needs a second model, and what may stand in for it."""
    cls = strategy_class(name)
    if not cls.needs_assistant:
        return "no"
    names = {field.name for field in fields(cls.config_class)}
    instead = ["a trained draft (`adapter=`)"] if "adapter" in names and _drafts_by_adapter(cls.config_class) else []
    instead += ["another strategy (`drafter=`)"] if "drafter" in names else []
    return "`assistant_model=`" + "".join(f", or {way}" for way in instead)


def trained_part(name: str) -> str:
    """Say whether a strategy needs something that was trained for the model."""
    cls = strategy_class(name)
    optional = any(field.name == "adapter" for field in fields(cls.config_class))
    return "needed" if cls.needs_adapter else "optional" if optional else "no"


def rows(name: str) -> str:
    """Say how a strategy decodes the rows of a batch."""
    return "together" if strategy_class(name).batched else "one after the other"


def _drafts_by_adapter(config_class: Any) -> bool:
    return bool(config_class(adapter="folder").brings_drafter)


def _shared(name: str) -> bool:
    return list(PAGES.values()).count(PAGES[name]) > 1


def _paper(address: str) -> str:
    return f"arXiv {address.rsplit('/', 1)[1]}" if "arxiv.org" in address else address


def _type(hint: Any) -> str:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    names = ["None" if o is type(None) else o.__name__ if isinstance(o, type) else str(o) for o in options]
    return " or ".join(f"`{name}`" for name in names)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    """Refresh the generated blocks, or say which are stale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if a block is stale")
    check = parser.parse_args().check
    for path in (found := stale()):
        if not check:
            path.write_text(refreshed(path), encoding="utf-8")
        print(f"{'stale' if check else 'written'}: {path.relative_to(ROOT)}")
    sys.exit(1 if check and found else 0)


if __name__ == "__main__":
    main()
