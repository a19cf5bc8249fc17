"""A PEFT model under a strategy: the adapter is part of the target, and can be switched off and on between calls.

    python examples/peft_example.py                       # a LoRA of random numbers, to see that it works
    python examples/peft_example.py --adapter my-lora     # yours

Runs in float32, where the greedy text under a lossless strategy is stock's, and says whether it was.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_specdec  # noqa: F401  adds assistant_strategy= to generate()


def main(
    prompt: Annotated[str, typer.Option(help="What to continue.")] = "def fibonacci(n):",
    adapter: Annotated[str, typer.Option(help="Folder or Hub name of a LoRA; a random one by default.")] = "",
    model: Annotated[str, typer.Option(help="Folder or Hub name.")] = "HuggingFaceTB/SmolLM2-135M-Instruct",
    strategy: Annotated[str, typer.Option(help="Name, folder or Hub name of the strategy.")] = "prompt_lookup",
    new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 32,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Decode with the adapter, without it, and with it again, and compare with stock each time."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype="float32", device_map=device)
    torch.manual_seed(0)
    if adapter:
        lora: Any = PeftModel.from_pretrained(base, adapter).eval()
    else:  # noise that is small enough to leave words
        config = LoraConfig(r=8, lora_alpha=2, target_modules="all-linear", init_lora_weights=False)
        lora = get_peft_model(base, config).eval()
    inputs = tokenizer(prompt, return_tensors="pt").to(device)

    def show(name: str) -> None:
        options = {**inputs, "max_new_tokens": new_tokens, "do_sample": False, "return_dict_in_generate": True}
        stock, out = lora.generate(**options), lora.generate(**options, assistant_strategy=strategy)
        same = torch.equal(stock.sequences, out.sequences)
        typer.echo(f"{name}: {tokenizer.decode(out.sequences[0], skip_special_tokens=True)!r}")
        stats = out.speculation
        drafts = "nothing drafted" if stats is None else f"{stats.acceptance_rate:.0%} accepted"
        typer.echo(f"  stock's text: {'yes' if same else 'no'}; {drafts}")

    show("adapter on")
    with lora.disable_adapter():
        show("adapter off")
    show("adapter on again")


if __name__ == "__main__":
    typer.run(main)
