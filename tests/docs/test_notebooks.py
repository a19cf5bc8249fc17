"""The notebooks of examples/notebooks: committed without outputs, and executed from the first cell to the last."""

from __future__ import annotations

import re

import pytest
from families import ROOT

from hf_specdec.registry import STRATEGIES, strategy_class


nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@each
def test_a_notebook_is_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in code_cells(notebook):
        assert not cell.outputs and cell.execution_count is None, f"clear the outputs of {path.name}"


@pytest.fixture(scope="module")
def executed():
    """Return a function that executes a notebook once and returns it with its outputs."""
    found = {}

    def notebook(path):
        if path not in found:
            found[path] = nbformat.read(path, as_version=4)
            resources = {"metadata": {"path": str(path.parent)}}  # where a notebook's kernel runs
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("OMP_NUM_THREADS", "1")
                client = nbclient.NotebookClient(found[path], timeout=300, kernel_name="python3", resources=resources)
                client.execute()  # raises what a cell raised
        return found[path]

    return notebook


@each
@pytest.mark.full
@pytest.mark.slow
def test_a_notebook_runs(executed, path):
    cells = code_cells(executed(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [out for cell in cells for out in cell.outputs if out.output_type == "error"]


@pytest.mark.full
@pytest.mark.slow
def test_the_comparison_shows_every_strategy_that_needs_no_adapter(executed):
    path = next((path for path in NOTEBOOKS if path.stem == "compare_methods"), None)
    if path is None:
        pytest.skip("without examples")
    outputs = [out for cell in code_cells(executed(path)) for out in cell.outputs]
    shown = "".join(out.text for out in outputs if out.get("name") == "stdout")
    rows = next(out.data["text/markdown"] for out in outputs if "text/markdown" in out.get("data", {})).splitlines()
    assert sum("image/png" in out.get("data", {}) for out in outputs) == 1
    own = [name for name, entry in STRATEGIES.items() if isinstance(entry, str)]  # not those that a test registered
    for name in own:
        if strategy_class(name).needs_adapter:
            assert f"{name} is left out" in shown
            continue
        row = next(row for row in rows if row.startswith((f"| {name} ", f"| {name}@")))
        verdict = "lossless, 100%" if strategy_class(name).config_class().lossless else "lossy, "
        assert re.search(rf"^{name}\S*: {verdict}", shown, re.MULTILINE)
        if name != "plain":
            assert re.search(r"\| \d\.\d\d \| \d+% \| \d\.\d\d \|", row), "tokens per step, accepted, forwards"
    for name in ("default", "static", "stock_prompt_lookup", "stock_assisted"):
        assert any(row.startswith(f"| {name} |") for row in rows)
