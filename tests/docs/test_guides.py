"""The guides show what the repository holds: the worked method, messages that are explained, figures."""

from __future__ import annotations

import ast
import json
import re
import xml.etree.ElementTree as ET

import pytest
from families import ROOT


DOCS = ROOT / "docs"
METHOD = ROOT / "examples" / "sixth_method" / "shared_ngrams.py"
FIGURES = sorted((DOCS / "assets").glob("*.svg"))


def parts(text):
    """Return the parts of the worked method's file: its imports, its config, its drafter, its strategy."""
    body = ast.parse(text).body
    starts = [min([node.lineno, *(d.lineno for d in node.decorator_list)]) for node in body if hasattr(node, "bases")]
    lines = text.split("\n")
    bounds = [body[1].lineno, *starts, len(lines) + 1]
    return ["\n".join(lines[a - 1 : b - 1]).strip() for a, b in zip(bounds, bounds[1:], strict=False)]


def test_the_page_and_the_notebook_build_the_method_of_the_file():
    page = (DOCS / "adding_a_method.md").read_text(encoding="utf-8")
    notebook = json.loads((ROOT / "examples/notebooks/add_a_method.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    found = parts(METHOD.read_text(encoding="utf-8"))
    assert len(found) == 4
    for part in found:
        assert f"```python\n{part}\n```" in page or f"\n{part}\n```" in page
        assert any(part in cell for cell in cells)


def test_the_notebook_has_no_outputs():
    notebook = json.loads((ROOT / "examples/notebooks/add_a_method.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def strings():
    """Return every string of the package, formatted ones with `...` for what is put in."""
    found = []
    for path in sorted((ROOT / "hf_specdec").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "..." for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found).replace("`", "")


def test_messages_that_are_explained_exist():
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 40
    known = strings().replace("specdec_config.json", "...")
    missing = [
        message
        for message in messages
        if not all(piece.strip() in known for piece in re.split(r"\.\.\.|specdec_config\.json", message))
    ]
    assert missing == []


@pytest.mark.parametrize("figure", FIGURES, ids=lambda path: path.stem)
def test_a_figure_is_small_described_and_shown(figure):
    assert figure.stat().st_size < 15_000
    root = ET.parse(figure).getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert root.get("viewBox") and root.find(f"{space}title").text and root.find(f"{space}desc").text
    assert any(f"(assets/{figure.name})" in page.read_text(encoding="utf-8") for page in DOCS.glob("*.md"))
