"""The command `hf-specdec`: demo, list, bench, evaluate, calibrate, train."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from .bench import commands as calibration
from .console import (
    Device,
    Dtype,
    Model,
    advancing,
    console,
    load_assistant,
    load_model,
    numbers,
    progress_bar,
    read_prompts,
    write_json,
)
from .training import commands as training
from .training.evaluate import evaluate_command


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from .bench.run import Arm

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)
app.add_typer(training.app, name="train")
app.add_typer(calibration.app, name="calibrate")
app.command("evaluate")(evaluate_command)


def main() -> None:
    """Run the command; errors about what was asked for are printed without a traceback."""
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError) as error:
        Console(stderr=True).print(f"[red]{type(error).__name__}:[/red] {error}", highlight=False)
        sys.exit(2)


@app.command("list")
def list_strategies() -> None:
    """List the strategies."""
    from .generation.registry import STRATEGIES, strategy_class

    table = Table()
    for heading in ("strategy", "lossless", "second model", "batches", "presets", "paper"):
        table.add_column(heading)
    for name in STRATEGIES:
        cls = strategy_class(name)
        table.add_row(
            name,
            "yes" if cls.config_class().lossless else "no",
            "needed" if cls.needs_assistant else "",
            "together" if cls.batched else "row by row",
            ", ".join(f"{name}:{key}" for key in cls.presets if key),
            cls.paper,
        )
    console.print(table)


@app.command()
def demo(
    context: Annotated[int, typer.Option(help="Tokens of the long text and the question about it.")] = 4000,
    batches: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,4",
    new_tokens: Annotated[int, typer.Option(help="Tokens of the answer.")] = 96,
    repeats: Annotated[int, typer.Option(help="Timed runs of each arm.")] = 3,
    model: Model = "",
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
) -> None:
    """Answer a question about a long text with Vegas, and compare with stock generate() in the same run."""
    from transformers import TextStreamer

    from .bench.run import make_arm
    from .bench.texts import long_batch
    from .generation.stats import on_speculation
    from .generation.vegas import VegasConfig

    sizes = numbers(batches, "--batches")
    loaded, tokenizer = load_model(model, dtype, device)
    ids = long_batch(tokenizer, context, max(sizes)).to(device)
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
    _measure(loaded, lambda batch, _: [ids[:batch]], sizes, [context], arms, new_tokens, repeats, None)


@app.command()
def bench(
    prompts: Annotated[Path | None, typer.Option(help="JSONL of prompts; the built-in long text by default.")] = None,
    limit: Annotated[int, typer.Option(help="Prompts of the file to use, spread over it; 0 for all.")] = 0,
    context: Annotated[str, typer.Option(help="Tokens per prompt, separated by commas (built-in text).")] = "4000",
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1",
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded per row.")] = 96,
    repeats: Annotated[int, typer.Option(help="Timed runs of each arm; the median counts.")] = 3,
    strategies: Annotated[
        str | None,
        typer.Option(
            help="Arms besides stock default and static, separated by spaces; NAME@field=value,... sets fields. "
            "By default: plain vegas, or with --ablate: plain."
        ),
    ] = None,
    ablate: Annotated[
        str, typer.Option(help="Add SpecBound and arms without each of its parts: specbound, or a folder of heads.")
    ] = "",
    assistant: Annotated[str, typer.Option(help="Folder or Hub name of a second model, for assisted arms.")] = "",
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the measurements here.")] = None,
    model: Model = "",
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
) -> None:
    """Time strategies against stock generate() in one run, from one prefill per batch."""
    from .bench.ablations import specbound_arms
    from .bench.run import make_arm
    from .bench.texts import chat_ids, long_batch

    sizes, contexts = numbers(batch, "--batch"), numbers(context, "--context")
    texts = read_prompts(prompts, limit)
    loaded, tokenizer = load_model(model, dtype, device)
    second = load_assistant(loaded, assistant, dtype, device) if assistant else None
    names = strategies.split() if strategies is not None else ["plain"] if ablate else ["plain", "vegas"]
    arms = [make_arm(name, second) for name in dict.fromkeys(["default", "static", *names])]
    arms += specbound_arms(loaded, ablate) if ablate else []
    chats = sorted((chat_ids(tokenizer, turns) for turns in texts), key=len)

    def groups_of(rows: int, length: int) -> list[torch.Tensor]:
        if not texts:
            return [long_batch(tokenizer, length, rows).to(device)]
        return [group.to(device) for group in _equal_prompts(chats, rows)]

    _measure(loaded, groups_of, sizes, [0] if texts else contexts, arms, new_tokens, repeats, json_out)


def _equal_prompts(prompts: list[list[int]], rows: int) -> list[torch.Tensor]:
    """Return groups of `rows` prompts `[rows, T]`, neighbours in length, each cut on the left to its shortest."""
    import torch

    if rows > len(prompts):
        raise ValueError(f"`--batch` is {rows}, but there are {len(prompts)} prompts.")
    groups = [prompts[begin : begin + rows] for begin in range(0, len(prompts) - rows + 1, rows)]
    return [torch.tensor([prompt[-min(map(len, group)) :] for prompt in group]) for group in groups]


def _measure(
    model: PreTrainedModel,
    prompts: Any,
    batches: list[int],
    contexts: list[int],
    arms: list[Arm],
    new_tokens: int,
    repeats: int,
    json_out: Path | None,
) -> None:
    from .bench.report import table
    from .bench.run import measure, merge, to_json

    rows: list[Any] = []
    for context in contexts:
        for batch in batches:
            groups = prompts(batch, context)
            with progress_bar() as progress:
                task = progress.add_task("measuring", total=len(arms) * (repeats * len(groups) + 1))
                advance = advancing(progress, task)
                parts = [
                    measure(model, ids, arms, new_tokens, repeats, advance, not i) for i, ids in enumerate(groups)
                ]
            found = merge(parts) if len(parts) > 1 else parts[0]
            console.print(table(found, console.width))
            rows += to_json(found)
    if json_out is not None:
        write_json(json_out, rows)
