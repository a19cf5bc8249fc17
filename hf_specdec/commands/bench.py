"""The command `hf-specdec bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import SMOLLM2, Target, bar, console, load_model, numbers, read_prompts, write_json


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..bench.run import Arm


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
    target: Target = SMOLLM2,
) -> None:
    """Time strategies against stock generate() in one run, from one prefill per batch; or kernels and steps."""
    from ..bench.ablations import specbound_arms
    from ..bench.run import make_arm
    from ..texts import chat_ids, long_batch

    of_text = {"--prompts": prompts, "--limit": limit, "--ablate": ablate, "--assistant": assistant}
    of_kernels = {"--shapes": shapes, "--acceptance": acceptance, "--memory": memory}
    _refuse(kernels, {**of_text, "--model": target.model}, of_kernels)
    if kernels:
        tokens = 64 if new_tokens is None else new_tokens
        _bench_kernels(shapes, context, batch, tokens, repeats, strategies, json_out, acceptance, memory, target)
        return
    new_tokens = 96 if new_tokens is None else new_tokens
    sizes, contexts = numbers(batch, "--batch", "1"), numbers(context, "--context", "4000")
    texts = read_prompts(prompts, limit)
    loaded, tokenizer = load_model(target)
    second = target.load_second(loaded, assistant) if assistant else None
    names = strategies.split() if strategies is not None else ["plain"] if ablate else ["plain", "vegas"]
    arms = [make_arm(name, second) for name in dict.fromkeys(["default", "static", *names])]
    arms += specbound_arms(loaded, ablate) if ablate else []
    chats = sorted((chat_ids(tokenizer, turns) for turns in texts), key=len)

    def groups_of(rows: int, length: int) -> list[torch.Tensor]:
        if not texts:
            return [long_batch(tokenizer, length, rows).to(target.device)]
        return [group.to(target.device) for group in _equal_prompts(chats, rows)]

    measure_arms(loaded, groups_of, sizes, [0] if texts else contexts, arms, new_tokens, repeats, json_out)


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
    target: Target,
) -> None:
    """Run `bench --kernels`; what was asked for is checked before anything runs."""
    from ..bench import kernels, steps
    from ..bench.report import kernel_table, step_table
    from ..bench.run import make_arm

    where, kind = _check_device(target.device), target.torch_dtype
    given = ",".join(name for name in steps.SHAPES if name != steps.TINY) if shapes is None else shapes
    configs = {name: steps.shape_config(name) for name in map(str.strip, given.split(","))}
    contexts = numbers(context, "--context", "4096,32768,131072")
    sizes = numbers(batch, "--batch", "1,8,32")
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
            parts = []
            with bar(name, None) as advance:
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


def _check_sizes(contexts: list[int], new_tokens: int, repeats: int, memory: float | None) -> None:
    """Raise `ValueError` for sizes that can't be measured."""
    for name, value, least in (("context", min(contexts), 2), ("new-tokens", new_tokens, 2), ("repeats", repeats, 1)):
        if value < least:
            raise ValueError(f"`--{name}` must be at least {least} with `--kernels`, got {value}.")
    if memory is not None and memory <= 0:
        raise ValueError(f"`--memory` must be above 0, got {memory}.")


def _equal_prompts(prompts: list[list[int]], rows: int) -> list[torch.Tensor]:
    """Return groups of `rows` prompts `[rows, T]`, neighbours in length, each cut on the left to its shortest."""
    import torch

    if rows > len(prompts):
        raise ValueError(f"`--batch` is {rows}, but there are {len(prompts)} prompts.")
    groups = [prompts[start : start + rows] for start in range(0, len(prompts) - rows + 1, rows)]
    return [torch.tensor([prompt[-min(map(len, group)) :] for prompt in group]) for group in groups]


def measure_arms(
    model: PreTrainedModel,
    prompts: Any,
    batches: list[int],
    contexts: list[int],
    arms: list[Arm],
    new_tokens: int,
    repeats: int,
    json_out: Path | None,
) -> None:
    """Time `arms` at every context and batch size, print a table of each, and write all to `json_out`."""
    from ..bench.report import table
    from ..bench.run import measure, merge, to_json

    rows: list[Any] = []
    for context in contexts:
        for batch in batches:
            groups = prompts(batch, context)
            with bar("measuring", len(arms) * (repeats * len(groups) + 1)) as advance:
                parts = [
                    measure(model, ids, arms, new_tokens, repeats, advance, not i) for i, ids in enumerate(groups)
                ]
            found = merge(parts) if len(parts) > 1 else parts[0]
            console.print(table(found, console.width))
            rows += to_json(found)
    if json_out is not None:
        write_json(json_out, rows)
