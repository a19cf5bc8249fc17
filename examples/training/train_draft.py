"""A draft model cut out of the target: text, training, and `assistant_strategy="OUT/draft"`.

    python examples/training/train_draft.py out

See docs/drafts.md.
"""

from __future__ import annotations

import recipe
import typer


def main(
    out: recipe.Out,
    model: recipe.Model = recipe.MODEL,
    minutes: recipe.Minutes = 3,
    steps: recipe.Steps = 2000,
    texts: recipe.Texts = 64,
    new_tokens: recipe.NewTokens = 96,
    dtype: recipe.Dtype = "bfloat16",
) -> None:
    """Train a draft of the target's first two and last two layers, and use it."""
    text, held_out = recipe.write_text(out, model, dtype, texts, new_tokens)
    last = recipe.layers_of(model) - 1
    recipe.hf_specdec_command(
        *("train", "draft", "--data", text, "--out", out / "draft", "--layers", f"0,1,{last - 1},{last}"),
        *("--minutes", minutes, "--steps", steps, "--model", model, "--dtype", dtype),
    )
    recipe.try_out(model, held_out, new_tokens, lambda _: {"assistant_strategy": str(out / "draft")})


if __name__ == "__main__":
    typer.run(main)
