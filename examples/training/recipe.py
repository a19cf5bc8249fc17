"""What the recipes have in common: text to learn from, the package's own commands, and a trial of what was learned.

The text comes with Python: the language reference of `pydoc_data.topics`, so that nothing is downloaded. It shows the
way; for an adapter that is good at something, train for an hour or more on prompts like those that you will decode.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_specdec  # also adds assistant_strategy= to generate()
from hf_specdec.commands import main as cli
from hf_specdec.texts import chat_ids, load_prompts


Out = Annotated[Path, typer.Argument(help="Folder for prompts, text and the trained adapter.")]
Model = Annotated[str, typer.Option(help="Folder or Hub name.")]
Minutes = Annotated[float, typer.Option(help="Training stops by the clock; 0 for never.")]
Steps = Annotated[int, typer.Option(help="Optimiser steps at most.")]
Texts = Annotated[int, typer.Option(help="Prompts that the model answers to have text to learn from.", min=4)]
NewTokens = Annotated[int, typer.Option(help="Tokens of an answer at most.")]
Dtype = Annotated[str, typer.Option(help="Of the weights in training: bfloat16, float16 or float32.")]

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
HELD_OUT = 4


def hf_specdec_command(*arguments: object) -> None:
    """Print a command of the package, and run it in this process."""
    parts = [str(part) for part in arguments]
    typer.echo(f"\n$ hf-specdec {shlex.join(parts)}")
    cli.app(parts, standalone_mode=False)


def write_prompts(folder: Path, count: int) -> tuple[Path, Path]:
    """Write paragraphs of the Python documentation as prompts; return the files for training and for the trial."""
    pieces = (piece.strip() for name in sorted(topics) for piece in topics[name].split("\n\n"))
    fitting = [piece for piece in dict.fromkeys(pieces) if 150 < len(piece) < 600]
    if count + HELD_OUT > len(fitting):
        raise typer.BadParameter(f"there are {len(fitting) - HELD_OUT} paragraphs to train on, got --texts {count}.")
    every = len(fitting) // (count + HELD_OUT)
    chosen = fitting[::every][: count + HELD_OUT]
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "prompts.jsonl", folder / "held_out.jsonl"
    for path, part in zip(paths, (chosen[HELD_OUT:], chosen[:HELD_OUT]), strict=True):
        lines = [json.dumps({"text": f"Explain this:\n\n{piece}"}) for piece in part]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def write_text(out: Path, model: str, dtype: str, texts: int, new_tokens: int) -> tuple[Path, Path]:
    """Let the model answer prompts; return the file of its text, and the prompts that were held out."""
    prompts, held_out = write_prompts(out, texts)
    text = out / "text.safetensors"
    hf_specdec_command(
        *("train", "text", "--prompts", prompts, "--out", text, "--new-tokens", new_tokens),
        *("--model", model, "--dtype", dtype),
    )
    return text, held_out


def layers_of(model: str) -> int:
    """Return how many layers a model has."""
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(model).get_text_config().num_hidden_layers)


def try_out(model: str, prompts: Path, new_tokens: int, options: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Answer held-out prompts greedily with what was trained; print and return what came of it.

    Args:
        model (`str`): folder or Hub name; runs in float32, where lossless text is the model's own, token for token.
        prompts (`Path`): JSONL of prompts, of which the first few are taken.
        new_tokens (`int`): tokens of an answer at most.
        options (`Callable[[PreTrainedModel], dict]`): maps the model to the keywords of `generate()` to try.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    keywords, chats = options(loaded), load_prompts(prompts)[:HELD_OUT]
    same, stats = 0, list[Any]()
    for turns in chats:
        ids = torch.tensor([chat_ids(tokenizer, turns)])
        call = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new_tokens, "do_sample": False}
        with hf_specdec.on_speculation(stats.append):
            sequences = loaded.generate(ids, **call, **keywords)
        same += torch.equal(sequences, loaded.generate(ids, **call))
    accepted, drafted = (sum(getattr(each, f"num_{kind}_tokens") for each in stats) for kind in ("accepted", "draft"))
    lengths = [length for each in stats for row in each.accept_lengths for length in row]
    found = {
        "strategy": stats[-1].strategy,
        "acceptance": accepted / max(drafted, 1),
        "tokens_per_step": sum(lengths) / max(len(lengths), 1),
        "texts_like_stock": same / len(chats),
    }
    typer.echo(f"\n{tokenizer.decode(sequences[0, ids.shape[1] :], skip_special_tokens=True)}\n")
    typer.echo(json.dumps({name: round(v, 3) if isinstance(v, float) else v for name, v in found.items()}))
    return found
