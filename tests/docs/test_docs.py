"""The documents are true: code runs, commands parse, links lead somewhere, and what is generated is fresh."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys

import docs_blocks
import families
import pytest
import typer
from docs_blocks import ROOT

import hf_specdec
from hf_specdec.bench.run import make_arm
from hf_specdec.commands.main import app
from hf_specdec.registry import STRATEGIES


sys.path.insert(0, str(ROOT / "docs"))

import figures
import generate


PAGES = docs_blocks.python_pages()
NOT_RUN_AT_MOST = 8
SHELL = ("", "bash", "console", "sh", "shell", "text")


def name(path):
    return path.relative_to(ROOT).as_posix()


# Python blocks


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What every page's blocks did, in one process of their own; see docs_blocks."""
    folder = tmp_path_factory.mktemp("docs")
    environment = os.environ | docs_blocks.prepare(folder) | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "docs" / "docs_blocks.py"), str(folder)]
    done = subprocess.run(
        command, cwd=folder / "work", env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


@pytest.mark.full
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_blocks_run(report, page):
    assert report[name(page)] is None, report[name(page)]


def test_blocks_that_are_not_run_say_why_and_are_few():
    left_out = [block for found in PAGES.values() for block in found if block.reason is not None]
    assert [f"{name(block.page)}:{block.line}" for block in left_out if len(block.reason) < 10] == []
    assert len(left_out) <= NOT_RUN_AT_MOST, [f"{name(block.page)}:{block.line}" for block in left_out]


def test_a_block_is_found_with_its_reason_and_without_its_indentation(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "text\n\n<!-- not run: too slow here -->\n```python\na = 1\n```\n\n- item\n\n    ```sh\n    make x\n    ```\n"
    )
    first, second = docs_blocks.blocks(page)
    assert (first.line, first.language, first.code, first.reason) == (5, "python", "a = 1", "too slow here")
    assert (second.line, second.language, second.code, second.reason) == (11, "sh", "make x", None)


# commands


def commands():
    """Yield the shell commands of all documents, as a page's name and words; environment variables are left out."""
    for page in docs_blocks.documents():
        for block in docs_blocks.blocks(page):
            if block.language not in SHELL:
                continue
            for line in block.code.replace("\\\n", " ").split("\n"):
                yield from ((page, words) for words in split(line.strip().removeprefix("$ ")))


def split(line):
    """Return the commands of a line as lists of words; none for a line that is no shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, "#"
    try:
        words = list(lexer)
    except ValueError:  # a drawing, or prose
        return []
    found = [[]]
    for word in words:
        if set(word) <= set("&|;<>()"):
            found.append([])
        elif found[-1] or not re.match(r"[A-Z_]+=", word):
            found[-1] += [] if word.startswith("$") else [word]  # a variable, explained beside
    return [command for command in found if command]


COMMANDS = list(commands())


def calls_of(program):
    found = {(name(page), shlex.join(words)): words[1:] for page, words in COMMANDS if words[0] == program}
    assert found, program
    return [pytest.param(words, id=f"{page}: {text[:60]}") for (page, text), words in found.items()]


@pytest.mark.parametrize("words", calls_of("hf-specdec"))
def test_our_commands_parse(words):
    if "..." in words:
        pytest.skip("shortened in the text")
    command = typer.main.get_command(app)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    try:
        context = command.make_context("hf-specdec", list(words))
    except typer.Exit:  # --help
        return
    assistant = families.family("llama").assistant
    for arm in (context.params.get("strategies") or "").split():
        if arm != "..." and arm.partition("@")[0].partition(":")[0] in (*STRATEGIES, "stock_assisted"):
            make_arm(arm, assistant)


@pytest.mark.parametrize("words", calls_of("make"))
def test_targets_exist(words):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {word for word in words if "=" not in word and not word.startswith("-")} <= set(targets)


@pytest.mark.parametrize("words", calls_of("pip"))
def test_extras_exist(words):
    _, _, section = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")
    extras = re.findall(r"^(\w+) = \[", section.partition("\n[")[0], re.MULTILINE)
    asked = [m[1] for word in words if (m := re.fullmatch(r"(?:hf-specdec|\.)\[(.+)\].*", word))]
    assert {extra for some in asked for extra in some.split(",")} <= set(extras)


def test_programs_exist():
    missing = set()
    for page, words in COMMANDS:
        if words[0] in ("python", "python3", "torchrun", "accelerate", "pytest"):
            files = (
                word.partition("::")[0]
                for word in words[1:]
                if re.match(r"(examples|tests|docs)/.*\.(py|ipynb)", word)
            )
            missing |= {f"{name(page)}: {file}" for file in files if not (ROOT / file).is_file()}
    assert missing == set()


# what is generated


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_has_a_page_with_a_head(strategy):
    hooks = pytest.importorskip("hooks", reason="mkdocs is not installed")
    page = generate.PAGES[strategy]
    text = hooks.with_heads((ROOT / "docs" / page).read_text(encoding="utf-8"), page)
    cls = generate.strategy_class(strategy)
    assert f'`assistant_strategy="{strategy}"`, `{cls.config_class.__name__}`' in text
    assert cls.paper in text
    assert all(f"| `{field.name}` |" in text for field in generate.fields(cls.config_class))


def test_heads_and_the_table_follow_the_classes():
    assert "| **Lossless** | yes, except `via_sd:safe`, `via_sd:paper` |" in generate.head("via_sd")
    assert "| **Lossless** | **no** |" in generate.head("diversed")
    assert "needed: the draft module" in generate.head("spd")
    table = generate.strategies_table(ROOT / "README.md")
    assert table.count("\n") == 1 + len(STRATEGIES)
    assert "](docs/vegas.md)" in table and "](vegas.md)" in generate.strategies_table(ROOT / "docs" / "index.md")


def test_generated_blocks_are_fresh():
    assert "<!-- strategies:begin -->" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name(path) for path in generate.stale()] == [], "run python docs/generate.py"


def test_a_stale_block_is_seen_and_repaired():
    text = "a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb\n"
    assert generate.replace_block(text, "x", "new\n") == "a\n<!-- x:begin -->\nnew\n<!-- x:end -->\nb\n"
    with pytest.raises(ValueError, match="x:begin"):
        generate.replace_block("a", "x", "new")


def test_tables_of_the_benchmarks_are_fresh():
    text = figures.PAGE.read_text(encoding="utf-8")
    assert figures.page_with_tables(text) == text, "run python docs/figures.py"


def test_every_result_is_in_the_benchmarks():
    text = figures.PAGE.read_text(encoding="utf-8")
    assert [
        path.name
        for path in sorted((ROOT / "docs" / "results").glob("*.json"))
        if f"({path.parent.name}/{path.name})" not in text
    ] == []


def test_plots_show_the_results(tmp_path):
    pytest.importorskip("matplotlib")
    figures.write_plots(tmp_path)
    for path in sorted(tmp_path.glob("*.svg")):
        drawn, kept = (
            re.findall(r">([^<>]*\d[^<>]*)</text>", file.read_text(encoding="utf-8"))
            for file in (path, figures.IMAGES / path.name)
        )
        assert drawn == kept, f"{path.name}: run python docs/figures.py"
        assert len(kept) > 5


def test_ratios_are_to_the_fastest_stock_plain_arm():
    rows = {(m["arm"], m["batch"]): m for m in figures.measurements("vegas-7900")}
    assert rows["static", 4]["ratio"] == 1 and rows["default", 4]["ratio"] < 1
    assert rows["vegas", 4]["ratio"] == pytest.approx(35.31 / 27.38, abs=1e-3)
    old = {m["arm"]: m for m in figures.measurements("assisted-spec-bench")}
    assert old["stock_prompt_lookup"]["superseded"] and not old["plain"]["superseded"]


# links


def prose(path):
    """Return a document without its code."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"^( *)(```+|~~~+)[^\n]*\n.*?^ *\2 *$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"<!--.*?-->", "", re.sub(r"`[^`\n]*`", "`code`", text), flags=re.DOTALL)


def anchors(path):
    """Return the anchors that GitHub and the site give a document's headings, and those of its API entries."""
    text = re.sub(r"^( *)(```+|~~~+)[^\n]*\n.*?^ *\2 *$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    found = set(re.findall(r"^::: (\S+)", text, re.MULTILINE)) | set(re.findall(r'<a (?:id|name)="([^"]+)"', text))
    for heading in re.findall(r"^#+ (.+?)\s*$", text, re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        found.add(re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", docs_blocks.documents(), ids=name)
def test_links_lead_somewhere(page):
    text, broken = prose(page), []
    targets = re.findall(r"\]\(<?([^)\s>]+)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for target in targets + re.findall(r"^\[[^]]+\]: (\S+)", text, re.MULTILINE):
        if re.match(r"[a-z]+:", target):
            continue
        place, _, fragment = target.partition("#")
        file = (page.parent / place).resolve() if place else page
        if file == ROOT / "docs" / "changelog.md":  # the site's copy of CHANGELOG.md
            file = ROOT / "CHANGELOG.md"
        if not file.exists() or (fragment and file.suffix == ".md" and fragment not in anchors(file)):
            broken.append(target)
    assert broken == []


# the site


def test_every_public_name_is_in_the_reference():
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md"))
    documented = re.findall(r"^::: hf_specdec\.(\w+)$", text, re.MULTILINE)
    documented += re.findall(r"^::: hf_specdec\.[\w.]+\.(\w+)$", generate.configs_reference(), re.MULTILINE)
    modules = {path.stem for path in (ROOT / "hf_specdec").glob("*.py")}  # a whole module may have an entry, too
    assert set(documented) - modules == set(hf_specdec.__all__) and len(documented) == len(set(documented))


def test_every_page_of_a_method_is_in_the_navigation():
    entries = [entry for part in generate.navigation() for entry in part.items()]
    assert ("Vegas", "vegas.md") in entries and ("Draft models", "drafts.md") in entries
    assert {page for _, page in entries} == set(generate.PAGES.values()) and len(entries) == len(dict(entries))


def test_docstrings_of_the_dialect_become_googles():
    griffe_hf = pytest.importorskip("griffe_hf", reason="mkdocstrings is not installed")
    text = (
        "Args:\n    a, b (`int`, *optional*, defaults to 5): first\n        line.\n"
        "    c (`torch.Tensor` of shape `[n, m]`, int64): x.\n"
    )
    wanted = "Args:\n    a: first\n        line.\n    b: first\n        line.\n    c: (of shape `[n, m]`, int64) x.\n"
    assert griffe_hf.rewrite(text) == wanted


def test_links_that_leave_the_site_go_to_the_repository():
    hooks = pytest.importorskip("hooks", reason="mkdocs is not installed")
    links = "![d](images/spd.svg) [e](https://x.org) [f](gone.md)\n```\n[g](../README.md)\n```"
    text = f"[a](../README.md#x) [b](vegas.md#y) [c](results/) {links}"
    rewritten = hooks.repository_links(text, ROOT / "docs")
    repository = hooks.REPOSITORY
    changed = f"[a]({repository}/blob/main/README.md#x) [b](vegas.md#y) [c]({repository}/tree/main/docs/results)"
    assert rewritten == f"{changed} {links}"
    assert hooks.repository_links("[a](docs/vegas.md#x)", ROOT) == "[a](vegas.md#x)"


def test_a_broken_site_is_noticed(tmp_path):
    """The check that runs at the end of `make docs`."""
    hooks = pytest.importorskip("hooks", reason="mkdocs is not installed")
    (tmp_path / "a.html").write_text('<h1 id="x">A</h1><a href="b.html#y">b</a><img src="c.svg"><a href="#x">x</a>')
    (tmp_path / "b.html").write_text(
        '<p>| a | b |\n| --- |</p><script src="https://cdn.org/x.js"></script><code>| c |</code>'
    )
    problems = hooks.site_problems(tmp_path)
    assert len(problems) == 4
    for part in ("'b.html#y' has no such anchor", "'c.svg' leads nowhere", "Markdown", "https://cdn.org/x.js"):
        assert any(part in problem for problem in problems), part
