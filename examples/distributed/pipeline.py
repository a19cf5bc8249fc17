"""SPD over several processes: each holds some of the layers, and several tokens of one text are on their way at once.

    torchrun --nproc-per-node 5 pipeline.py MODEL ADAPTER        # as many processes as stages
    torchrun --nproc-per-node 6 pipeline.py MODEL ADAPTER        # one more: the draft module gets its own

With `--compare` the controlling process also loads the whole model and times stock generate() on the same prompts,
before anything else and while the others wait. Times are of decoding alone: the first token's time is left out.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import hf_specdec
from hf_specdec import SPDConfig


class Clock(BaseStreamer):
    """Notes when each token came; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Note a token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Ignore the end."""

    @property
    def ms_per_token(self) -> float:
        """Milliseconds per token after the first; 0 on ranks that don't control, which get no tokens."""
        if len(self.times) < 3:
            return 0.0
        return 1000 * (self.times[-1] - self.times[1]) / max(len(self.times) - 2, 1)


def decode(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int, **options: Any) -> tuple[Any, float]:
    """Return the output of a greedy generation of exactly `new_tokens`, and milliseconds per token."""
    clock = Clock()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        streamer=clock,
        **options,
    )
    return output, clock.ms_per_token


def main(
    model: str,
    adapter: str,
    prompts: Annotated[Path | None, typer.Option(help="JSONL of prompts; one built-in prompt by default.")] = None,
    limit: Annotated[int, typer.Option(help="Prompts used, the first of the file.")] = 4,
    new_tokens: int = 64,
    threads: Annotated[int, typer.Option(help="Of PyTorch, per process.")] = 1,
    compare: Annotated[bool, typer.Option("--compare", help="Time stock generate() first.")] = False,
    json_out: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Decode prompts over all processes."""
    dist.init_process_group("gloo")
    rank, chats = dist.get_rank(), [["Explain in a few sentences how a bicycle stays upright."]]
    if prompts is not None:
        lines = prompts.read_text(encoding="utf-8").splitlines()[:limit]
        chats = [[v["turns"][0] if "turns" in v else v["prompt"]] for v in map(json.loads, lines)]
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": turns[0]}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        for turns in chats
    ]
    found: dict[str, list[float]] = {}
    if compare and rank == 0:
        whole: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
        config = SPDConfig(adapter=adapter, schedule="serial")
        arms: dict[str, dict[str, Any]] = {
            "default": {},
            "static": {"cache_implementation": "static"},
            "plain": {"assistant_strategy": "plain"},
            "spd serial": {"assistant_strategy": config},
            "spd threads": {"assistant_strategy": config.override(schedule="threads")},
        }
        for place, ids in enumerate([rows[0], *rows]):  # the first one warms up
            for name, options in arms.items():
                ms = decode(whole, ids, new_tokens, **options)[1]
                if place:
                    found.setdefault(name, []).append(ms)
        del whole
    dist.barrier()
    torch.set_num_threads(threads)
    loaded: Any = hf_specdec.load_stage(model, adapter)
    method: list[dict[str, Any]] = []
    for place, ids in enumerate([rows[0], *rows]):
        config = SPDConfig(adapter=adapter, schedule="dist")
        output, ms = decode(loaded, ids, new_tokens, assistant_strategy=config)
        if rank == 0 and place:
            found.setdefault(f"spd dist, {dist.get_world_size()} ranks", []).append(ms)
            method.append(output.speculation.method)
            typer.echo(tokenizer.decode(output.sequences[0, ids.shape[1] :]) + "\n")
    if rank == 0:
        base = min((statistics.mean(found[name]) for name in ("default", "static") if name in found), default=None)
        for name, times in found.items():
            mean = statistics.mean(times)
            ratio = "" if base is None else f"  {base / mean:.2f}x the fastest stock"
            typer.echo(f"{name:24} {mean:8.1f} ms per token{ratio}")
        ticks, tokens, stages = sum(m["ticks"] for m in method), new_tokens * len(rows), method[0]["num_stages"]
        tick_ms = mean * (tokens - len(rows)) / ticks
        typer.echo(f"{ticks} ticks of {tick_ms:.1f} ms for {tokens} tokens on {stages} stages and this many ranks")
        typer.echo(f"theoretical: {stages * tokens / ticks:.2f}x, if every stage had a device of its own")
        if json_out is not None:
            json_out.write_text(json.dumps({"ms_per_token": found, "method": method}, indent=1) + "\n", "utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
