"""A file of prompts in, a file of answers out: left-padded batches of prompts of similar length.

    python examples/batch_job.py prompts.jsonl answers.jsonl
    python examples/batch_job.py prompts.jsonl answers.jsonl --strategy examples/adapters/draft --batch-size 16

Each line of the input has `prompt`, `question`, `text` or `turns`. Answers are kept in `answers.jsonl.part` batch by
batch; a run that was interrupted goes on from there when it is started again. `answers.jsonl` appears at the end,
whole and in the order of the prompts. For several GPUs see distributed/generate_folder.py.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_specdec
from hf_specdec import SpeculationStats
from hf_specdec.texts import chat_ids, load_prompts


def read_part(part: Path, settings: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Return the answers of an interrupted run by the place of their prompts, and make the file fit to be added to."""
    lines = part.read_text(encoding="utf-8").splitlines(keepends=True) if part.exists() else []
    lines = [line for line in lines if line.endswith("\n")]  # the last one may have been cut
    if lines and json.loads(lines[0]) != settings:
        raise typer.BadParameter(f"{part} was begun with other prompts or settings; remove it to begin anew.")
    part.write_text("".join(lines) if lines else json.dumps(settings) + "\n", encoding="utf-8")
    return {answer["index"]: answer for answer in map(json.loads, lines[1:])}


def answer(model: Any, tokenizer: Any, prompts: list[list[int]], options: dict[str, Any]) -> list[tuple[str, int]]:
    """Return the text and the number of tokens of each answer, decoded as one batch."""
    inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    output = model.generate(**inputs, do_sample=False, pad_token_id=tokenizer.pad_token_id, **options)
    eos = model.generation_config.eos_token_id
    ends, found = set(eos if isinstance(eos, list) else [eos]), []
    for row in output[:, inputs["input_ids"].shape[1] :].tolist():
        count = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
        found.append((tokenizer.decode(row[:count], skip_special_tokens=True), count))
    return found


def summary(stats: list[SpeculationStats], tokens: int, seconds: float) -> str:
    """Return the speed, and what speculation did in all batches together."""
    lengths = [length for found in stats for row in found.accept_lengths for length in row]
    drafted, accepted = (sum(getattr(s, name) for s in stats) for name in ("num_draft_tokens", "num_accepted_tokens"))
    line = f"{tokens} tokens in {seconds:.1f} s: {tokens / max(seconds, 1e-9):.1f} tokens/s"
    if lengths:
        line += f"; {sum(lengths) / len(lengths):.2f} tokens per step"
    return line + (f", {accepted / drafted:.0%} of {drafted} drafts accepted" if drafted else "")


def main(
    prompts: Annotated[Path, typer.Argument(help="JSONL of prompts.")],
    out: Annotated[Path, typer.Argument(help="JSONL to write.")],
    model: Annotated[str, typer.Option(help="Folder or Hub name.")] = "HuggingFaceTB/SmolLM2-135M-Instruct",
    strategy: Annotated[str, typer.Option(help="Name, folder or Hub name of the strategy; off for none.")] = (
        "prompt_lookup"
    ),
    new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Prompts decoded together.", min=1)] = 8,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Answer every prompt of a file."""
    if out.exists():
        raise typer.BadParameter(f"{out} is there already; remove it, or name another file.")
    messages = [turns[0] for turns in load_prompts(prompts)]
    part = out.with_name(out.name + ".part")
    done = read_part(part, {"prompts": messages, "model": model, "strategy": strategy, "new_tokens": new_tokens})
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, device_map=device)
    options = {"max_new_tokens": new_tokens, "assistant_strategy": strategy}
    # rows of a batch are padded to the longest, so those of similar length go together; the longest come first, so
    # that a batch that does not fit into memory fails at once
    waiting = {index: chat_ids(tokenizer, text) for index, text in enumerate(messages) if index not in done}
    order = sorted(waiting, key=lambda index: len(waiting[index]), reverse=True)
    stats: list[SpeculationStats] = []
    tokens, start = 0, time.perf_counter()
    with part.open("a", encoding="utf-8") as file, hf_specdec.on_speculation(stats.append):
        for begin in range(0, len(order), batch_size):
            batch = order[begin : begin + batch_size]
            found = answer(loaded, tokenizer, [waiting[index] for index in batch], options)
            for index, (text, count) in zip(batch, found, strict=True):
                done[index] = {"index": index, "prompt": messages[index], "answer": text, "tokens": count}
                file.write(json.dumps(done[index]) + "\n")
                tokens += count
            file.flush()
            typer.echo(f"{len(done)} of {len(messages)}", err=True)
    whole = out.with_name(out.name + ".tmp")
    whole.write_text("".join(json.dumps(done[index]) + "\n" for index in range(len(messages))), encoding="utf-8")
    whole.replace(out)  # in one step, so that a file of this name is always complete
    part.unlink()
    typer.echo(f"{len(messages)} answers, {len(order)} of them now, in {out}")
    typer.echo(summary(stats, tokens, time.perf_counter() - start))


if __name__ == "__main__":
    typer.run(main)
