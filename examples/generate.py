"""One prompt, one strategy: print the text and what speculation did.

    python examples/generate.py
    python examples/generate.py --strategy vegas --settings '{"min_context": 0}' --prompt "Why is the sky blue?"
    python examples/generate.py --strategy examples/adapters/via_sd --assistant examples/adapters/draft

`--strategy` is what `assistant_strategy=` takes: a name (`hf-specdec list` prints them), a folder with a saved config,
a Hub repository, or `off` for stock decoding.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_specdec  # noqa: F401  adds assistant_strategy= to generate()
from hf_specdec.generation.models.draft_model import load_assistant


PROMPT = (
    "Copy this text and correct its spelling: The quick brown fox jumpd over the lazy dog, and the lazy dog slept on. "
    "Then the quick brown fox jumpd back over the lazy dog."
)


def encode(tokenizer: Any, prompt: str) -> Any:
    """Return ids and mask of a prompt, as a chat where the model is a chat model."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt")
    chat = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def main(
    prompt: Annotated[str, typer.Option(help="What to answer.")] = PROMPT,
    model: Annotated[str, typer.Option(help="Folder or Hub name.")] = "HuggingFaceTB/SmolLM2-135M-Instruct",
    strategy: Annotated[str, typer.Option(help="Name, folder or Hub name of the strategy; off for none.")] = (
        "prompt_lookup"
    ),
    settings: Annotated[str, typer.Option(help="Fields of its config to change, as JSON.")] = "{}",
    assistant: Annotated[str, typer.Option(help="Folder or Hub name of a second model, where it takes one.")] = "",
    new_tokens: Annotated[int, typer.Option(help="Tokens of the answer at most.")] = 96,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Answer one prompt, and print text and statistics."""
    changes = json.loads(settings)
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, device_map=device)
    options: dict[str, Any] = {"assistant_strategy": strategy, "do_sample": temperature > 0}
    if changes:
        options["assistant_strategy_config"] = changes
    if assistant:
        options["assistant_model"] = load_assistant(loaded, assistant, dtype, device)
    if temperature > 0:
        options["temperature"] = temperature
    inputs = encode(tokenizer, prompt).to(device)
    torch.manual_seed(seed)
    out = loaded.generate(**inputs, max_new_tokens=new_tokens, return_dict_in_generate=True, **options)
    typer.echo(tokenizer.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    stats = getattr(out, "speculation", None)
    if stats is None:
        typer.echo("\nno strategy, so no statistics")
        return
    typer.echo(f"\n{stats.mean_tokens_per_step:.2f} tokens per step, {stats.acceptance_rate:.0%} of drafts accepted")
    typer.echo(json.dumps(stats.to_dict()))


if __name__ == "__main__":
    typer.run(main)
