"""The architecture page draws the tree as it is, in the order of imports that the linter holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "hf_specdec"
LISTED = ("", "commands", "cache", "kernels", "generation", "generation/models")
"""Folders whose modules the page names one by one; a method needs no line beside the registry's."""


@pytest.fixture(scope="module")
def drawing() -> list[str]:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    return text.split("```")[1].strip("\n").split("\n")


def test_the_drawing_names_every_module(drawing):
    named = set(re.findall(r"\w+", "\n".join(drawing)))
    modules = {path.stem for folder in LISTED for path in (PACKAGE / folder).glob("*.py")} - {"__init__"}
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert (modules | folders) - named == set()


def test_the_drawing_names_no_module_that_is_gone(drawing):
    """What stands before a comment is a module or a folder, beside the folder that its indentation says."""
    for line in drawing:
        for name in line.partition("#")[0].split():
            assert list(PACKAGE.rglob(name if name.endswith("/") else f"{name}.py")), name


def test_the_table_names_the_parts_of_the_methods_that_it_lists():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| `(\w+)/` \|(.*)\|$", text, re.MULTILINE)
    assert lines
    for folder, parts in lines:
        modules = {path.stem for path in (PACKAGE / "generation" / "methods" / folder).glob("*.py")}
        assert set(re.findall(r"`(\w+)`", parts)) == modules - {"__init__", "method"}, folder


def test_the_drawing_has_the_order_of_the_linter(drawing):
    contracts = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    layers = re.findall(r'^layers = \[\n((?:  ".*",\n)+)\]', contracts, re.MULTILINE)
    package, generation = ([re.findall(r"\w+", line) for line in found.split("\n")[:-1]] for found in layers)
    lines = [re.findall(r"\w+", line.partition("#")[0]) for line in drawing]
    inside = [line for text, line in zip(drawing, lines, strict=True) if re.match(r"  \w", text)]
    outside = [line for text, line in zip(drawing, lines, strict=True) if re.match(r"\w", text)]
    assert [set(line) for line in outside] == [set(layer) for layer in package]
    assert [set(line) for line in inside] == [set(layer) for layer in generation]
