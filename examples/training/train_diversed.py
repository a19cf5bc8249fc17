"""A head for DIVERSED: a task with a reward, a draft, training, and `assistant_strategy="OUT/head"`.

    python examples/training/train_diversed.py out
    python examples/training/train_diversed.py out --assistant examples/adapters/draft   # with a draft that exists

See docs/diversed.md. DIVERSED is lossy: the table at the end says what acceptance was bought with.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import recipe
import typer

from hf_specdec.generation.models.draft_model import load_assistant


MAKE_TASKS = Path(__file__).parent.parent / "diversed" / "make_tasks.py"


def main(
    out: recipe.Out,
    model: recipe.Model = recipe.MODEL,
    assistant: Annotated[str, typer.Option(help="The draft; one is trained first by default.")] = "",
    updates: Annotated[int, typer.Option(help="Optimiser steps of the head.")] = 10,
    items: Annotated[int, typer.Option(help="Tasks to train on, besides 64 that are held out.")] = 200,
    tests: Annotated[int, typer.Option(help="Tasks for the table.")] = 32,
    minutes: recipe.Minutes = 3,
    steps: recipe.Steps = 2000,
    texts: recipe.Texts = 64,
    new_tokens: recipe.NewTokens = 32,
    dtype: recipe.Dtype = "bfloat16",
) -> None:
    """Train a head on a task with a reward, score it, and use it."""
    tasks, shared = out / "tasks", ("--model", model, "--dtype", dtype)
    subprocess.run([sys.executable, MAKE_TASKS, tasks, "--train", str(items + 64), "--test", str(tests)], check=True)
    if not assistant:
        text, _ = recipe.write_text(out, model, dtype, texts, new_tokens)
        assistant, last = str(out / "draft"), recipe.layers_of(model) - 1
        recipe.hf_specdec_command(
            *("train", "draft", "--data", text, "--out", assistant, "--layers", f"0,1,{last - 1},{last}"),
            *("--minutes", minutes, "--steps", steps, *shared),
        )
    recipe.hf_specdec_command(
        *("train", "diversed", "--items", tasks / "train.jsonl", "--assistant", assistant, "--out", out / "head"),
        *("--accept-coefs", 0.02, "--updates", updates, "--temperature", 0.5, "--new-tokens", new_tokens, *shared),
    )
    recipe.hf_specdec_command(
        *("evaluate", "--items", tasks / "test.jsonl", "--assistant", assistant, "--temperature", 0.5),
        *("--strategies", f"plain assisted diversed@weight=0.75 diversed@adapter={out / 'head'}"),
        *("--new-tokens", new_tokens, *shared),
    )

    def options(loaded: Any) -> dict[str, Any]:
        draft = load_assistant(loaded, assistant, "float32", "cpu")
        return {"assistant_strategy": str(out / "head"), "assistant_model": draft}

    recipe.try_out(model, tasks / "test.jsonl", new_tokens, options)


if __name__ == "__main__":
    typer.run(main)
