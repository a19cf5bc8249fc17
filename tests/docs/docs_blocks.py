"""Code blocks of the Markdown files, and what runs the Python ones.

    python tests/docs/docs_blocks.py FOLDER     # run every page's Python blocks, write FOLDER/report.json

A page's blocks run in order in one namespace. A page that loads a model itself starts with nothing; the others, whose
blocks are fragments, start with `PRELUDE`. Names of the Hub resolve in a cache on the disk, laid out as
`huggingface_hub` lays it out, which holds the trained tiny model of tests/tiny under the names that the pages use. The
adapters that pages name by folder are made for that model, untrained.

`<!-- not run: REASON -->` on the line above a block's fence leaves the block out.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import sys
import textwrap
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "tiny"

MODELS = ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-360M-Instruct")
"""Names of the Hub that pages load models by."""

PRELUDE = """
import torch
import hf_specdec
from hf_specdec import *
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "HuggingFaceTB/SmolLM2-135M-Instruct"
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(name)
inputs = tokenizer("A class definition is an executable statement. It", return_tensors="pt")
draft = hf_specdec.load_draft(model, "examples/adapters/draft")
model.generation_config.max_new_tokens = 12
"""

COMMIT = "0" * 40

_FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>```+|~~~+) *(?P<language>[\w+-]*)[^`]*$")
_NOT_RUN = re.compile(r"^ *<!-- not run:(?P<reason>.*)-->\s*$")
_CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@dataclass
class Block:
    """A fenced block.

    Args:
        page (`Path`): its file.
        line (`int`): of its first line of code, from 1.
        language (`str`): as the fence says; empty for none.
        code (`str`): without the fence's indentation.
        reason (`str`, *optional*): why it is not run.
    """

    page: Path
    line: int
    language: str
    code: str
    reason: str | None = None


def documents() -> list[Path]:
    """Return the repository's Markdown files."""
    folders = [ROOT / name for name in (".github", "docs", "examples", "tests")]
    return [*sorted(ROOT.glob("*.md")), *(path for folder in folders for path in sorted(folder.rglob("*.md")))]


def blocks(page: Path) -> list[Block]:
    """Return a file's fenced blocks, in order.

    Raises:
        ValueError: for a fence that is not closed.
    """
    found, lines = [], page.read_text(encoding="utf-8").split("\n")
    number = 0
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        number += 1
        if fence is None:
            continue
        closing = re.compile(rf"^ *{fence['ticks']} *$")
        end = next((n for n in range(number, len(lines)) if closing.match(lines[n])), None)
        if end is None:
            raise ValueError(f"{page}:{number} opens a block that is not closed.")
        above = _NOT_RUN.match(lines[number - 2]) if number > 1 else None
        code = textwrap.dedent("\n".join(lines[number:end]))
        reason = above["reason"].strip() if above else None
        found.append(Block(page, number + 1, fence["language"], code, reason))
        number = end + 1
    return found


def python_pages() -> dict[Path, list[Block]]:
    """Return the Python blocks of every file that has some."""
    pages = {page: [block for block in blocks(page) if block.language == "python"] for page in documents()}
    return {page: found for page, found in pages.items() if found}


def run_page(page: Path, found: list[Block]) -> str | None:
    """Run a page's blocks in one namespace; return the traceback of the first one that raises."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    wanted = [block for block in found if block.reason is None]
    if not any("ForCausalLM.from_pretrained(" in block.code for block in wanted):
        exec(PRELUDE, namespace)
    for block in wanted:
        source = "\n" * (block.line - 1) + block.code  # so that tracebacks have the page's lines
        try:
            exec(compile(source, str(page.relative_to(ROOT)), "exec"), namespace)
        except Exception:  # whatever a page's code raises is the finding
            return traceback.format_exc()
    return None


def prepare(folder: Path) -> dict[str, str]:
    """Lay out in `folder` what the pages' code finds, and return the environment that shows it to them.

    `folder/hub` is a Hub cache, `folder/work` the working directory.
    """
    for name in MODELS:
        repository = folder / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / COMMIT
        shutil.copytree(TINY / "target", snapshot)
        shutil.copy(TINY / "tokenizer.json", snapshot)
        settings = json.loads((TINY / "tokenizer_config.json").read_text(encoding="utf-8"))
        (snapshot / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": _CHAT}))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
    (folder / "work").mkdir()
    return {"HF_HUB_CACHE": str(folder / "hub"), "HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}


def make_adapters() -> None:
    """Write the adapters that pages name, made for the tiny model and untrained, below the working directory."""
    from transformers import AutoModelForCausalLM

    from hf_specdec import AssistedConfig, DiversedConfig, DiversedHead, SPDConfig, SpecBoundConfig
    from hf_specdec.generation.methods.spd.depth_map import DepthMap
    from hf_specdec.generation.methods.spd.draft_module import PipelineDraftModule
    from hf_specdec.generation.methods.specbound.exit_heads import ExitHeads
    from hf_specdec.generation.methods.via_sd.slim_model import save_slim
    from hf_specdec.generation.models.draft_model import cut_draft, save_draft

    model = AutoModelForCausalLM.from_pretrained(MODELS[0])
    examples = Path("examples/adapters")
    layers = [0, 1, 6, 7]
    draft = cut_draft(model, layers)
    for folder in (examples / "draft", Path("my-draft")):
        save_draft(draft, model, layers, folder, AssistedConfig(num_assistant_tokens=2))
    head = DiversedHead(model.config.hidden_size, model.config.hidden_size)
    for folder in (examples / "diversed", Path("my-head")):
        head.save(folder, DiversedConfig(), draft, model)
    for folder in (examples / "specbound", Path("my-heads")):
        ExitHeads(model, [2, 4], "block").save(folder, SpecBoundConfig(exit_layers=[2], max_depth=2), model)
    keep = [index not in (3, 4) for index in range(model.config.num_hidden_layers)]
    for folder in (examples / "via_sd", Path("my-slim")):
        save_slim(folder, model, keep, calibration={"agreement": 0.9})
    for stages, counts in ((2, [4, 4]), (5, [2, 2, 2, 1, 1])):
        module = PipelineDraftModule(model, DepthMap(8, stages, counts), [0, 7])
        for folder in (examples / "spd" / f"n{stages}", Path("my-module")):
            module.save(folder, SPDConfig(), model)


def main() -> None:
    """Run all pages and write what happened."""
    folder = Path(sys.argv[1])
    import torch

    import hf_specdec

    torch.set_num_threads(1)
    make_adapters()
    report = {}
    for page, found in python_pages().items():
        hf_specdec.install()
        torch.manual_seed(0)
        with contextlib.redirect_stdout(io.StringIO()):
            report[str(page.relative_to(ROOT))] = run_page(page, found)
        os.chdir(folder / "work")
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main()
