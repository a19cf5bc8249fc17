"""The command `hf-specdec`: demo, list, bench, evaluate, calibrate, train, push, export, serve."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.markup import escape
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
from .deploy import export_app, serve
from .hub_commands import push_command
from .training import commands as training
from .training.evaluate import evaluate_command


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from .bench.run import Arm

_Contexts = Annotated[
    str | None,
    typer.Option(
        help="Tokens per prompt, separated by commas (built-in text). By default 4000, with --kernels "
        "4096,32768,131072."
    ),
]
_Batches = Annotated[
    str | None, typer.Option(help="Batch sizes, separated by commas. By default 1, with --kernels 1,8,32.")
]
_NewTokens = Annotated[int | None, typer.Option(help="Tokens decoded per row. By default 96, with --kernels 64.")]
_Strategies = Annotated[
    str | None,
    typer.Option(
        help="Arms besides stock default and static, separated by spaces; NAME@field=value,... sets fields. "
        "By default: plain vegas, or with --ablate: plain. With --kernels besides static only, by default plain and "
        "vegas (on CUDA in CUDA graphs)."
    ),
]
_Kernels = Annotated[
    bool,
    typer.Option(
        "--kernels",
        help="Time the kernels one by one, and the steps of random weights in real shapes, instead of text.",
    ),
]
_Shapes = Annotated[
    str | None,
    typer.Option(
        help="With --kernels: llama-3.1-8b, qwen3-8b, qwen3-0.6b, separated by commas (by default all three), or "
        "tiny, which runs anywhere and tells nothing but that the command works."
    ),
]
_Acceptance = Annotated[
    Path | None,
    typer.Option(
        help="With --kernels: results of an earlier bench --json, whose tokens per step give the modelled column."
    ),
]
_Memory = Annotated[float | None, typer.Option(help="With --kernels: GiB that may be used; by default what is free.")]

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)
app.add_typer(training.app, name="train")
app.add_typer(calibration.app, name="calibrate")
app.add_typer(export_app, name="export")
app.command("evaluate")(evaluate_command)
app.command("serve")(serve)
app.command("push")(push_command)


def main() -> None:
    """Run the command; errors about what was asked for are printed without a traceback."""
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError) as error:
        Console(stderr=True).print(f"[red]{type(error).__name__}:[/red] {escape(str(error))}", highlight=False)
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
    context: _Contexts = None,
    batch: _Batches = None,
    new_tokens: _NewTokens = None,
    repeats: Annotated[int, typer.Option(help="Timed runs of each arm; the median counts.")] = 3,
    strategies: _Strategies = None,
    ablate: Annotated[
        str, typer.Option(help="Add SpecBound and arms without each of its parts: specbound, or a folder of heads.")
    ] = "",
    assistant: Annotated[str, typer.Option(help="Folder or Hub name of a second model, for assisted arms.")] = "",
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the measurements here.")] = None,
    kernels: _Kernels = False,
    shapes: _Shapes = None,
    acceptance: _Acceptance = None,
    memory: _Memory = None,
    model: Model = "",
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
) -> None:
    """Time strategies against stock generate() in one run, from one prefill per batch; or kernels and steps."""
    from .bench.ablations import specbound_arms
    from .bench.run import make_arm
    from .bench.texts import chat_ids, long_batch

    _refuse(
        kernels,
        {"--prompts": prompts, "--limit": limit, "--ablate": ablate, "--assistant": assistant, "--model": model},
        {"--shapes": shapes, "--acceptance": acceptance, "--memory": memory},
    )
    if kernels:
        tokens = 64 if new_tokens is None else new_tokens
        _bench_kernels(
            shapes, context, batch, tokens, repeats, strategies, json_out, acceptance, memory, dtype, device
        )
        return
    new_tokens = 96 if new_tokens is None else new_tokens
    sizes, contexts = numbers(_or(batch, "1"), "--batch"), numbers(_or(context, "4000"), "--context")
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


def _or(value: str | None, default: str) -> str:
    return default if value is None else value


def _refuse(kernels: bool, text_only: dict[str, Any], kernels_only: dict[str, Any]) -> None:
    """Raise `ValueError` for options that were given and mean nothing with, or without, `--kernels`."""
    given = [name for name, value in (text_only if kernels else kernels_only).items() if value not in (None, "", 0)]
    if given and kernels:
        raise ValueError(f"`--kernels` runs random weights on random tokens, so it can't take {', '.join(given)}.")
    if given:
        raise ValueError(f"{', '.join(given)} can't be given without `--kernels`.")


def _bench_kernels(
    shapes: str | None,
    context: str | None,
    batch: str | None,
    new_tokens: int,
    repeats: int,
    strategies: str | None,
    json_out: Path | None,
    acceptance: Path | None,
    memory: float | None,
    dtype: str,
    device: str,
) -> None:
    """Run `bench --kernels`; what was asked for is checked before anything runs."""
    from .bench import kernels, steps
    from .bench.report import kernel_table, step_table
    from .bench.run import make_arm

    where, kind = _check_device(device), _check_dtype(dtype)
    given = _or(shapes, ",".join(name for name in steps.SHAPES if name != steps.TINY))
    configs = {name: steps.shape_config(name) for name in map(str.strip, given.split(","))}
    contexts = numbers(_or(context, "4096,32768,131072"), "--context")
    sizes = numbers(_or(batch, "1,8,32"), "--batch")
    _check_sizes(contexts, new_tokens, repeats, memory)
    table = steps.read_acceptance(acceptance) if acceptance is not None else []
    extra = strategies.split() if strategies is not None else steps.default_arms(where)
    arms = [make_arm(name, None) for name in dict.fromkeys(["static", *extra])]
    room = steps.free_bytes(where) if memory is None else int(memory * 2**30)
    rate = kernels.copy_bandwidth(where)
    found: list[Any] = [{"kind": "bandwidth", "gb_per_second": rate}]

    def note(text: str) -> None:
        console.print(text, highlight=False, markup=False)
        found.append({"kind": "note", "text": text})

    try:
        timed = kernels.measure_kernels(steps.kernel_cases(configs, kind), where, rate, room, note)
        if timed:
            console.print(kernel_table(timed, rate, console.width))
        found += [row.to_json() for row in timed]
        if not table:
            note("No `--acceptance FILE` was given: step times only, no modelled speed-up.")
        combinations = [(length, rows) for length in contexts for rows in sizes]
        for name in configs:
            with progress_bar() as progress:
                advance = advancing(progress, progress.add_task(name, total=None))
                parts = []
                for rows in steps.measure_shape(
                    name, where, kind, combinations, arms, rate, room, new_tokens, repeats, table, advance, note
                ):
                    parts += rows
                    found += [row.to_json() for row in rows]
            if parts:
                console.print(step_table(parts, console.width))
    finally:  # a sweep takes long: what was measured before an error is kept
        if json_out is not None:
            write_json(json_out, found)


def _check_device(name: str) -> torch.device:
    """Return the device called `name`; raise `ValueError` for one that is not there."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"`--device` must be cpu, cuda or cuda:1, ..., got {name!r}.") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"`--kernels` runs on cpu and cuda, not on `--device {name}`.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"`--device {name}`: PyTorch sees {torch.cuda.device_count()} CUDA devices.")
    return device


def _check_dtype(name: str) -> torch.dtype:
    """Return the dtype called `name`; raise `ValueError` for any but the usual three."""
    import torch

    kinds = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in kinds:
        raise ValueError(f"`--dtype` must be one of {', '.join(kinds)}, got {name!r}.")
    return kinds[name]


def _check_sizes(contexts: list[int], new_tokens: int, repeats: int, memory: float | None) -> None:
    """Raise `ValueError` for sizes that can't be measured."""
    for option, value, least in (
        ("context", min(contexts), 2),
        ("new-tokens", new_tokens, 2),
        ("repeats", repeats, 1),
    ):
        if value < least:
            raise ValueError(f"`--{option}` must be at least {least} with `--kernels`, got {value}.")
    if memory is not None and memory <= 0:
        raise ValueError(f"`--memory` must be above 0, got {memory}.")


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
