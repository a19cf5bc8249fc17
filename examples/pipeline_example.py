"""`pipeline("text-generation")` with a strategy. It returns text only, so `on_speculation` collects the statistics.

python examples/pipeline_example.py
python examples/pipeline_example.py --strategy plain --prompt "Name three rivers." --prompt "Name three lakes."
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from transformers import pipeline

import hf_specdec
from hf_specdec import SpeculationStats


PROMPTS = ["List the days of the week.", "List the days of the week backwards, then forwards."]


def main(
    prompt: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    model: Annotated[str, typer.Option(help="Folder or Hub name.")] = "HuggingFaceTB/SmolLM2-135M-Instruct",
    strategy: Annotated[str, typer.Option(help="Name, folder or Hub name of the strategy.")] = "prompt_lookup",
    new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Prompts decoded together.")] = 2,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Answer prompts by a pipeline, and print the statistics of every batch."""
    pipe: Any = pipeline("text-generation", model=model, dtype=dtype, device=device)
    pipe.tokenizer.padding_side = "left"
    if pipe.tokenizer.pad_token is None:
        pipe.tokenizer.pad_token = pipe.tokenizer.eos_token
    texts: list[Any] = prompt or PROMPTS
    if pipe.tokenizer.chat_template is not None:
        texts = [[{"role": "user", "content": text}] for text in texts]
    stats: list[SpeculationStats] = []
    with hf_specdec.on_speculation(stats.append):
        answers = pipe(
            texts,
            batch_size=batch_size,
            max_new_tokens=new_tokens,
            do_sample=False,
            return_full_text=False,
            assistant_strategy=strategy,
        )
    for text, (answer,) in zip(prompt or PROMPTS, answers, strict=True):
        typer.echo(f"> {text}\n{answer['generated_text']}\n")
    for found in stats:
        typer.echo(
            f"{len(found.accept_lengths)} rows: {found.mean_tokens_per_step:.2f} tokens per step, "
            f"{found.acceptance_rate:.0%} of {found.num_draft_tokens} drafts accepted"
        )


if __name__ == "__main__":
    typer.run(main)
