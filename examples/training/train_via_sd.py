"""A slim verifier for VIA-SD: text, a mask, a LoRA, and `assistant_strategy="OUT/slim"`. See docs/via_sd.md.

    python examples/training/train_via_sd.py out

The drafts of the trial come from prompt lookup, so that no second model is needed.
"""

from __future__ import annotations

from typing import Annotated, Any

import recipe
import typer


def main(
    out: recipe.Out,
    model: recipe.Model = recipe.MODEL,
    skip_ratio: Annotated[float, typer.Option(help="Share of the layers to leave out.")] = 0.3,
    search_steps: Annotated[int, typer.Option(help="Masks scored at most.")] = 100,
    search_texts: Annotated[int, typer.Option(help="Texts that score a mask; as many others are held out.")] = 8,
    minutes: recipe.Minutes = 3,
    steps: recipe.Steps = 2000,
    texts: recipe.Texts = 64,
    new_tokens: recipe.NewTokens = 96,
    dtype: recipe.Dtype = "bfloat16",
) -> None:
    """Search a mask, train a LoRA for the layers that stay, and use both."""
    text, held_out = recipe.write_text(out, model, dtype, texts, new_tokens)
    shared = ("--model", model, "--dtype", dtype)
    recipe.hf_specdec_command(
        *("calibrate", "via_sd", "--data", text, "--save", out / "mask", "--skip-ratio", skip_ratio),
        *(
            "--slim-cache",
            "own",
            "--steps",
            search_steps,
            "--texts",
            search_texts,
            "--window",
            max(16, new_tokens // 2),
        ),
        *("--minutes", minutes, *shared),
    )
    recipe.hf_specdec_command(
        *("train", "via_sd", "--data", text, "--mask", out / "mask", "--out", out / "slim"),
        *("--minutes", minutes, "--steps", steps, *shared),
    )

    def options(_: Any) -> dict[str, Any]:
        drafter = {"drafter": "prompt_lookup"}
        return {"assistant_strategy": str(out / "slim"), "assistant_strategy_config": drafter}

    recipe.try_out(model, held_out, new_tokens, options)


if __name__ == "__main__":
    typer.run(main)
