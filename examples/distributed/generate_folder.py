"""Answer a folder of prompts on several processes, with a strategy: prompts in, one JSONL file out.

    torchrun --nproc-per-node 2 generate_folder.py prompts/ answers.jsonl --strategy vegas

(With GPUs `accelerate launch` does as well.) Each process has the whole model and takes its share of the prompts.
Every answer is on disk before the next one is begun, so a run that was killed goes on where it stopped, also with
another number of processes: nothing is lost and nothing is done twice. A process that outlived its launcher may still
be writing: the next run says so and stops. The order of the result is that of the prompts.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import PartialState
from filelock import FileLock, Timeout
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_specdec  # noqa: F401 - adds assistant_strategy= to generate()


def read_prompts(folder: Path) -> dict[str, str]:
    """Return the prompts by name: every `*.txt` file, and every line of `*.jsonl` files (fields prompt or text)."""
    found = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))}
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                values = json.loads(line)
                found[f"{path.name}:{number}"] = values.get("prompt") or values["text"]
    if not found:
        raise typer.BadParameter(f"{folder} holds no *.txt or *.jsonl files with prompts.")
    return found


def read_answers(parts: Path) -> dict[str, dict[str, Any]]:
    """Return the answers that earlier runs have finished, by the prompt's name; a line that was cut off is none."""
    found = {}
    for path in sorted(parts.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                answer = json.loads(line)
            except json.JSONDecodeError:
                continue
            found[answer["name"]] = answer
    return found


def append(path: Path, answer: dict[str, Any]) -> None:
    """Add an answer to a file and wait until it is on disk."""
    with path.open("a", encoding="utf-8") as file:
        if file.tell() and not path.read_bytes().endswith(b"\n"):
            file.write("\n")  # the process that wrote the last line was killed in it
        file.write(json.dumps(answer) + "\n")
        file.flush()
        os.fsync(file.fileno())


def refuse_company(parts: Path) -> None:
    """Raise an error if a process of another run still writes to the folder `parts`."""
    for path in parts.glob("*.lock"):
        try:
            with FileLock(path, timeout=0):
                pass
        except Timeout as error:
            raise typer.BadParameter(
                f"another run still writes to {parts}, or a process that outlived it: stop that first."
            ) from error


def answer_all(
    state: PartialState, texts: dict[str, str], parts: Path, model: str, strategy: str, new_tokens: int
) -> None:
    """Answer this process's share of the prompts that have no answer in `parts`, and wait for the other processes."""
    done = read_answers(parts)
    state.wait_for_everyone()  # all have read what is done before anyone adds to it
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(state.device).eval()
    missing = [name for name in texts if name not in done]
    # not split_between_processes: accelerate 1.1 gives the last prompt to every process that would have none
    for name in missing[state.process_index :: state.num_processes]:
        inputs = tokenizer(texts[name], return_tensors="pt").to(state.device)
        output = loaded.generate(
            **inputs,
            max_new_tokens=new_tokens,
            do_sample=False,
            assistant_strategy=strategy,
        )
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        append(parts / f"{state.process_index}.jsonl", {"name": name, "answer": answer})
    state.wait_for_everyone()


def main(
    prompts: Path,
    out: Path,
    model: Annotated[str, typer.Option(help="Folder or Hub name.")] = "HuggingFaceTB/SmolLM2-135M-Instruct",
    strategy: Annotated[str, typer.Option(help="What assistant_strategy takes, or off.")] = "vegas",
    new_tokens: int = 128,
) -> None:
    """Answer all prompts of a folder."""
    state = PartialState(cpu=not torch.accelerator.is_available())  # it takes one process for all of them unless told
    parts = out.with_suffix(".parts")
    if state.is_main_process:
        parts.mkdir(parents=True, exist_ok=True)
        refuse_company(parts)
    state.wait_for_everyone()
    texts = read_prompts(prompts)
    with FileLock(parts / f"{state.process_index}.lock", timeout=0):  # given up when the process ends, however it ends
        answer_all(state, texts, parts, model, strategy, new_tokens)
        if state.is_main_process:
            answers = read_answers(parts)
            whole = out.with_suffix(".tmp")
            whole.write_text("".join(json.dumps(answers[name]) + "\n" for name in texts), encoding="utf-8")
            whole.replace(out)  # in one step, so that a file of this name is always complete


if __name__ == "__main__":
    typer.run(main)
