"""The command `hf-specdec`: demo, list, bench, evaluate, calibrate, train."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from .console import Device, Dtype, Model, console, load_assistant, load_model, progress_bar, write_json
from .training import commands as training


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .bench.run import Arm

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)
app.add_typer(training.app, name="train")
app.command("evaluate")(training.evaluate_command)


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

    sizes = _numbers(batches, "--batches")
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

    sizes, contexts = _numbers(batch, "--batch"), _numbers(context, "--context")
    texts = _prompts(prompts, limit)
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


@app.command()
def calibrate(
    strategy: Annotated[str, typer.Argument(help="The strategy to calibrate: vegas or specbound.")],
    context: Annotated[
        str | None,
        typer.Option(help="Contexts to measure (vegas), separated by commas; 512,1024,2048,4096,7900 by default."),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Rows (vegas); 1 by default.")] = None,
    adapter: Annotated[str, typer.Option(help="Folder or Hub name of trained exit heads (specbound).")] = "",
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL of prompts (specbound); the built-in text by default.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Prompts used, spread over the file (specbound); 24 by default.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded per row.")] = 64,
    repeats: Annotated[int, typer.Option(help="Timed runs of each arm.")] = 3,
    save: Annotated[
        Path | None, typer.Option(help="Write the calibrated config into this folder; may be the adapter's.")
    ] = None,
    model: Model = "",
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
) -> None:
    """Measure on this device from which context Vegas pays, or which settings of SpecBound pay."""
    foreign: dict[str, dict[str, Any]] = {
        "vegas": {"--adapter": adapter or None, "--prompts": prompts, "--limit": limit},
        "specbound": {"--context": context, "--batch": batch},
    }
    if strategy not in foreign:
        raise ValueError(f"`{strategy}` can't be calibrated; allowed: {', '.join(foreign)}.")
    given = [name for name, value in foreign[strategy].items() if value is not None]
    if given:
        raise ValueError(f"`{given[0]}` is not an option of calibrating {strategy}.")
    if strategy == "vegas":
        contexts = _numbers(context or "512,1024,2048,4096,7900", "--context")
        loaded, tokenizer = load_model(model, dtype, device)
        _calibrate_vegas(loaded, tokenizer, contexts, batch or 1, new_tokens, repeats, save)
        return
    texts = _prompts(prompts, 24 if limit is None else limit)
    loaded, tokenizer = load_model(model, dtype, device)
    _calibrate_specbound(loaded, tokenizer, adapter, texts, limit or 24, new_tokens, repeats, save)


def _calibrate_vegas(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contexts: list[int],
    batch: int,
    new_tokens: int,
    repeats: int,
    save: Path | None,
) -> None:
    from .bench.calibrate import calibrate_vegas
    from .bench.texts import long_batch
    from .generation.vegas import VegasConfig

    with progress_bar() as progress:
        task = progress.add_task("calibrating", total=len(contexts) * 2 * (repeats + 1))
        found, rows = calibrate_vegas(
            model,
            lambda length: long_batch(tokenizer, length, batch).to(model.device),
            contexts,
            new_tokens=new_tokens,
            repeats=repeats,
            progress=_advance(progress, task),
        )
    table = Table(title=f"batch {batch}: milliseconds per token")
    for heading in ("context", "plain", "vegas", "gain", "tokens/step"):
        table.add_column(heading, justify="right")
    for plain, vegas in zip(rows[::2], rows[1::2], strict=True):
        gain = plain.ms_per_token / vegas.ms_per_token
        steps = f"{vegas.tokens_per_step or 1:.2f}"
        table.add_row(
            str(plain.context), f"{plain.ms_per_token:.1f}", f"{vegas.ms_per_token:.1f}", f"{gain:.2f}", steps
        )
    console.print(table)
    if found is None:
        console.print(
            f"Vegas did not pay at any measured context; leave it off, or set min_context above {contexts[-1]}."
        )
    else:
        console.print(f"min_context={found}")
    if save is not None:
        VegasConfig(min_context=found if found is not None else 2 * contexts[-1]).save_pretrained(save)
        console.print(f"saved to {save}")


def _calibrate_specbound(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: str,
    texts: list[list[str]],
    limit: int,
    new_tokens: int,
    repeats: int,
    save: Path | None,
) -> None:
    import torch

    from .bench.calibrate_specbound import WORTHWHILE, calibrate_specbound
    from .bench.texts import chat_ids, long_prompt
    from .generation.adapters import write_config
    from .generation.specbound import SpecBoundConfig

    if texts:
        rows = [chat_ids(tokenizer, turns) for turns in texts]
    else:
        rows = [long_prompt(tokenizer, 256, offset) for offset in range(limit)]
    with progress_bar() as progress:
        task = progress.add_task("calibrating", total=len(rows) + 2 * (repeats + 1))
        chosen, predicted, costs = calibrate_specbound(
            model,
            SpecBoundConfig(adapter=adapter or None),
            [torch.tensor([row], device=model.device) for row in rows],
            new_tokens=new_tokens,
            repeats=repeats,
            progress=_advance(progress, task),
        )
    console.print(
        f"layer {costs.layer[0]:.2f} ms (4 rows {costs.layer[3]:.2f}), test {costs.test:.2f}, head "
        f"{costs.head[0]:.2f}, row {costs.row:.2f}, rest of a round {costs.round:.2f}, plain token {costs.plain:.2f}"
    )
    console.print(
        f"alpha={chosen.alpha}, tau={chosen.tau}, exit_layers={chosen.exit_layers}, max_depth={chosen.max_depth}, "
        f"num_assistant_tokens={chosen.num_assistant_tokens}: predicted {predicted.speedup:.2f}x plain, "
        f"{predicted.tokens_per_round:.2f} tokens per round, {predicted.acceptance:.0%} accepted"
    )
    if predicted.speedup < WORTHWHILE:
        console.print(f"Below {WORTHWHILE}x: plain decoding is the better choice for this model and device.")
    if save is not None:
        write_config(save, chosen)
        console.print(f"saved to {save}")


def _prompts(path: Path | None, limit: int) -> list[list[str]]:
    """Return the turns of `limit` of a file's prompts, spread over it, or of all for 0; none without a file."""
    from .bench.texts import load_prompts

    texts = load_prompts(path) if path is not None else []
    return [texts[i * len(texts) // limit] for i in range(limit)] if 0 < limit < len(texts) else texts


def _numbers(text: str, option: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"`{option}` takes numbers separated by commas, got {text!r}.") from error
    if min(numbers) < 1:
        raise ValueError(f"`{option}` takes numbers of at least 1, got {text!r}.")
    return numbers


def _equal_prompts(prompts: list[list[int]], rows: int) -> list[torch.Tensor]:
    """Return groups of `rows` prompts `[rows, T]`, neighbours in length, each cut on the left to its shortest."""
    import torch

    if rows > len(prompts):
        raise ValueError(f"`--batch` is {rows}, but there are {len(prompts)} prompts.")
    groups = [prompts[begin : begin + rows] for begin in range(0, len(prompts) - rows + 1, rows)]
    return [torch.tensor([prompt[-min(map(len, group)) :] for prompt in group]) for group in groups]


def _advance(progress: Progress, task: TaskID) -> Callable[[str], None]:
    return lambda _: progress.advance(task)


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
                advance = _advance(progress, task)
                parts = [
                    measure(model, ids, arms, new_tokens, repeats, advance, not i) for i, ids in enumerate(groups)
                ]
            found = merge(parts) if len(parts) > 1 else parts[0]
            console.print(table(found, console.width))
            rows += to_json(found)
    if json_out is not None:
        write_json(json_out, rows)
