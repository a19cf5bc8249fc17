"""Exit heads for SpecBound: text, training, calibration, and `assistant_strategy="OUT/heads"`.

    python examples/training/train_specbound.py out

See docs/specbound.md.
"""

from __future__ import annotations

from typing import Annotated

import recipe
import typer


def main(
    out: recipe.Out,
    model: recipe.Model = recipe.MODEL,
    layers: Annotated[str, typer.Option(help="Depths that get an exit, separated by commas.")] = "2,6",
    minutes: recipe.Minutes = 3,
    steps: recipe.Steps = 2000,
    texts: recipe.Texts = 64,
    new_tokens: recipe.NewTokens = 96,
    prompts: Annotated[int, typer.Option(help="Prompts to calibrate with.")] = 8,
    dtype: recipe.Dtype = "bfloat16",
) -> None:
    """Train exit heads, choose the settings that suit this machine, and use both."""
    text, held_out = recipe.write_text(out, model, dtype, texts, new_tokens)
    shared = ("--model", model, "--dtype", dtype)
    recipe.hf_specdec_command(
        *("train", "specbound", "--data", text, "--out", out / "heads", "--layers", layers, "--kind", "block"),
        *("--learning-rate", 2e-3, "--minutes", minutes, "--steps", steps, *shared),
    )
    recipe.hf_specdec_command(
        *("calibrate", "specbound", "--adapter", out / "heads", "--prompts", out / "prompts.jsonl"),
        *("--limit", prompts, "--new-tokens", new_tokens, "--save", out / "heads", *shared),
    )
    recipe.try_out(model, held_out, new_tokens, lambda _: {"assistant_strategy": str(out / "heads")})


if __name__ == "__main__":
    typer.run(main)
