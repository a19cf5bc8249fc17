"""What mkdocs does beyond its settings: heads of method pages, the changelog, links into the repository, checks."""

from __future__ import annotations

import logging
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import generate
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


METHODS = "Methods"
"""Section of mkdocs.yml's navigation that the registry fills."""

CONFIGS = "reference/configs.md"
"""Page to which the registry adds the strategies' configs."""

REPOSITORY = "https://github.com/hf-specdec/hf_specdec"

log = logging.getLogger("mkdocs.hooks")  # a warning of it fails a strict build

_FENCE = re.compile(r"^ *(```|~~~)")
# a row of a table, an item of a list, a fence, an admonition or a link, left as it was written
_MARKDOWN = re.compile(r"^(\||[*-] |\d+\. |```|!!! |\?\?\? )|\]\(", re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=[)\s])")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the section of the methods in the navigation."""
    for entry in config.nav or []:
        if isinstance(entry, dict) and METHODS in entry:
            entry[METHODS] = generate.navigation()
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the changelog, which lies outside docs/."""
    text = (generate.ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "changelog.md", content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put heads on method pages and configs into the reference, and point links that leave docs/ to the repository."""
    name = page.file.src_uri
    if name == CONFIGS:
        markdown = f"{markdown}\n{generate.configs_reference()}\n"
    folder = (generate.ROOT / "docs" / name).parent if page.file.generated_by is None else generate.ROOT
    return repository_links(with_heads(markdown, name), folder)


def with_heads(markdown: str, page: str) -> str:
    """Return a page's text with the generated heads of its strategies.

    A page of one strategy has it below its title, a page of several below a heading that is the strategy's name.
    """
    strategies = [name for name, where in generate.PAGES.items() if where == page]
    for name in strategies:
        heading = r"^# .+$" if len(strategies) == 1 else rf"^## `\"{name}\"`$"
        found = re.search(heading, markdown, re.MULTILINE)
        if found is None:
            log.warning("%s has no heading for the head of the strategy %r", page, name)
            continue
        markdown = f"{markdown[: found.end()]}\n\n{generate.head(name)}\n{markdown[found.end() :]}"
    return markdown


def repository_links(markdown: str, folder: Path) -> str:
    """Return a text in which relative links to files outside docs/, and to folders, lead to the repository.

    Args:
        folder (`Path`): that the links are relative to.
    """
    lines, inside = [], False
    for line in markdown.split("\n"):
        if _FENCE.match(line):
            inside = not inside
        lines.append(line if inside else _LINK.sub(lambda match: _address(match[1], folder), line))
    return "\n".join(lines)


def _address(target: str, folder: Path) -> str:
    parts = urlsplit(target)
    if parts.scheme or not parts.path or parts.path.startswith("/"):
        return target
    path = (folder / unquote(parts.path)).resolve()
    docs = generate.ROOT / "docs"
    if not path.is_relative_to(generate.ROOT) or not path.exists():
        return target  # mkdocs says that it does not exist
    fragment = f"#{parts.fragment}" if parts.fragment else ""
    if path.is_relative_to(docs) and path.is_file() and path.suffix != ".py":
        return f"{path.relative_to(docs).as_posix()}{fragment}" if folder == generate.ROOT else target
    kind = "tree" if path.is_dir() else "blob"
    return f"{REPOSITORY}/{kind}/main/{path.relative_to(generate.ROOT).as_posix()}{fragment}"


class _Reader(HTMLParser):
    """Collects what a page refers to, its anchors, and paragraphs that look like Markdown."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.raw: list[str] = []
        self._paragraph: list[str] | None = None
        self._code = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note references and anchors."""
        known = dict(attrs)
        self.references += [value for key in ("href", "src") if (value := known.get(key))]
        self.anchors |= {value for key in ("id", "name") if (value := known.get(key))}
        loads = known.get("src") or (known.get("href") if tag == "link" and known.get("rel") != "canonical" else None)
        self.loaded += [loads] if loads else []
        self._code += tag in ("code", "pre")
        if tag == "p":
            self._paragraph = []

    def handle_endtag(self, tag: str) -> None:
        """Look at a paragraph that ends."""
        self._code -= tag in ("code", "pre")
        if tag == "p" and self._paragraph is not None:
            text = "".join(self._paragraph)
            if _MARKDOWN.search(text):
                self.raw.append(text)
            self._paragraph = None

    def handle_data(self, data: str) -> None:
        """Note a paragraph's text, its code left out."""
        if self._paragraph is not None and not self._code:
            self._paragraph.append(data)


def on_post_build(*, config: MkDocsConfig) -> None:
    """Check the built site as a reader meets it."""
    for problem in site_problems(Path(config.site_dir)):
        log.warning("%s", problem)


def site_problems(site: Path) -> list[str]:
    """Return what is wrong with a built site: references to nothing, files from other hosts, Markdown left over."""
    pages: dict[Path, _Reader] = {}
    for path in sorted(site.resolve().rglob("*.html")):
        if path.name != "404.html":  # its references are to the root of a server
            pages[path] = _Reader()
            pages[path].feed(path.read_text(encoding="utf-8"))
    problems: dict[str, str] = {}  # what is wrong in the navigation is wrong on every page
    for path, read in pages.items():
        found = [f"Markdown that was not rendered: {text[:80]!r}" for text in read.raw]
        found += [f"{target!r} is loaded from another host" for target in read.loaded if urlsplit(target).netloc]
        found += [why for target in read.references if (why := _broken(target, path, pages))]
        for why in found:
            problems.setdefault(why, path.relative_to(site.resolve()).as_posix())
    return [f"{where}: {why}" for why, where in problems.items()]


def _broken(target: str, path: Path, pages: dict[Path, _Reader]) -> str:
    parts = urlsplit(target)
    if parts.scheme or parts.netloc:
        return ""
    file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if file.is_dir():
        file /= "index.html"
    if not file.is_file():
        return f"{target!r} leads nowhere"
    fragment = unquote(parts.fragment)
    if fragment and file in pages and fragment not in pages[file].anchors and not fragment.startswith("__"):
        return f"{target!r} has no such anchor"
    return ""
