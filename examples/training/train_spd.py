"""A draft module for SPD: text, training, a count of ticks, and `assistant_strategy="OUT/module"`. See docs/spd.md.

    python examples/training/train_spd.py out

In one process the stages take turns, which shows acceptance and no speed; distributed/pipeline.py runs them
on several.
"""

from __future__ import annotations

from typing import Annotated

import recipe
import typer


def main(
    out: recipe.Out,
    model: recipe.Model = recipe.MODEL,
    stages: Annotated[int, typer.Option(help="Pipeline stages; they divide the model's layers.")] = 2,
    minutes: recipe.Minutes = 3,
    steps: recipe.Steps = 2000,
    texts: recipe.Texts = 64,
    new_tokens: recipe.NewTokens = 96,
    dtype: recipe.Dtype = "bfloat16",
) -> None:
    """Train a draft module, count the ticks that it saves, and use it."""
    text, held_out = recipe.write_text(out, model, dtype, texts, new_tokens)
    shared = ("--model", model, "--dtype", dtype)
    recipe.hf_specdec_command(
        *("train", "spd", "--data", text, "--out", out / "module", "--stages", stages),
        *("--minutes", minutes, "--steps", steps, *shared),
    )
    recipe.hf_specdec_command(
        *("calibrate", "spd", "--adapter", out / "module", "--prompts", held_out),
        *("--new-tokens", new_tokens, "--temperatures", 0, *shared),
    )
    recipe.try_out(model, held_out, new_tokens, lambda _: {"assistant_strategy": str(out / "module")})


if __name__ == "__main__":
    typer.run(main)
