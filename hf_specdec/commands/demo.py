"""The command `hf-specdec demo`."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer

from .bench import measure_arms
from .console import SMOLLM2, Target, console, load_model, numbers


def demo(
    context: Annotated[int, typer.Option(help="Tokens of the long text and the question about it.")] = 4000,
    batches: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,4",
    new_tokens: Annotated[int, typer.Option(help="Tokens of the answer.")] = 96,
    repeats: Annotated[int, typer.Option(help="Timed runs of each arm.")] = 3,
    target: Target = SMOLLM2,
) -> None:
    """Answer a question about a long text with Vegas, and compare with stock generate() in the same run."""
    from transformers import TextStreamer

    from ..bench.run import make_arm
    from ..generation.methods.vegas import VegasConfig
    from ..generation.stats import on_speculation
    from ..texts import long_batch

    sizes = numbers(batches, "--batches")
    loaded, tokenizer = load_model(target)
    ids = long_batch(tokenizer, context, max(sizes)).to(target.device)
    config = VegasConfig(min_context=min(context, VegasConfig().min_context))
    console.print(f"An answer about {context} tokens of the Python documentation, with assistant_strategy='vegas':\n")
    stats: list[Any] = []
    with on_speculation(stats.append):
        cast(Any, loaded).generate(
            ids[:1],
            attention_mask=ids[:1] * 0 + 1,
            max_new_tokens=new_tokens,
            do_sample=False,
            assistant_strategy=config,
            streamer=TextStreamer(tokenizer, skip_prompt=True),
        )
    found = stats[-1]
    console.print(
        f"\n{found.mean_tokens_per_step:.2f} tokens per target step, {found.acceptance_rate:.0%} of drafts accepted\n"
    )
    vegas = "vegas" if config == VegasConfig() else f"vegas@min_context={config.min_context}"
    arms = [make_arm(name, None) for name in ("default", "static", "plain", vegas)]
    measure_arms(loaded, lambda batch, _: [ids[:batch]], sizes, [context], arms, new_tokens, repeats, None)
