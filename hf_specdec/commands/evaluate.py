"""The command `hf-specdec evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .console import SMOLLM2, Target, bar, console, load_model, new_table, write_json
from .train import Assistant, NewTokens, Rewarding, Seed, Temperature


if TYPE_CHECKING:
    from ..training.tasks import Score


def evaluate_command(
    items: Annotated[Path, typer.Option(help="JSONL of tasks: question, and what the reward needs.")],
    strategies: Annotated[
        str, typer.Option(help="Arms, separated by spaces; NAME@field=value,... sets fields, `default` is stock.")
    ] = "plain assisted diversed@weight=0.75",
    assistant: Assistant = "",
    reward: Rewarding = "numeric",
    limit: Annotated[int, typer.Option(help="Items used; 0 for all.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Rows decoded together.")] = 16,
    temperature: Temperature = 1.0,
    new_tokens: NewTokens = 64,
    seed: Seed = 0,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the scores here.")] = None,
    target: Target = SMOLLM2,
) -> None:
    """Score strategies on a task: reward with its 95 % interval, acceptance, tokens per forward, time."""
    from ..bench.run import make_arm
    from ..training.data import Sampling
    from ..training.rewards import resolve_reward
    from ..training.tasks import evaluate, load_items

    function, tasks = resolve_reward(reward), load_items(items)
    tasks = tasks[:limit] if limit else tasks
    sampling = Sampling(temperature=temperature, max_new_tokens=new_tokens)
    loaded, tokenizer = load_model(target)
    draft = target.load_second(loaded, assistant) if assistant else None
    arms = [make_arm(name, draft) for name in strategies.split()]
    settings: dict[str, Any] = {"batch_size": batch_size, "seed": seed}
    with bar("evaluating", len(arms) * len(tasks)) as advance:
        scores = [
            evaluate(arm.name, loaded, tokenizer, tasks, function, sampling, arm.options, **settings, progress=advance)
            for arm in arms
        ]
    console.print(_score_table(scores, f"{len(tasks)} items, temperature {temperature}, batches of {batch_size}"))
    if json_out is not None:
        write_json(json_out, [asdict(score) for score in scores])


def _score_table(scores: Sequence[Score], title: str) -> Table:
    figures = ("reward", "95 %", "accepted", "tokens/forward", "ms/token", "mean w", "mean (1-w)TV")
    table = new_table(title, "decoding", *figures)
    table.columns[0].justify = "left"
    for score in scores:
        method = score.method
        table.add_row(
            score.name,
            f"{score.reward:.3f}",
            f"{score.low:.3f}-{score.high:.3f}",
            f"{score.acceptance:.2f}" if score.acceptance else "",
            f"{score.tokens_per_forward:.2f}",
            f"{score.ms_per_token:.1f}",
            f"{method['mean_weight']:.2f}" if "mean_weight" in method else "",
            f"{method['mean_bias']:.3f}" if "mean_bias" in method else "",
        )
    return table
