"""Tasks with a reward: decoding their prompts in batches, and what an arm scores, accepts and costs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..generation.stats import SpeculationStats, on_speculation
from ..texts import chat_ids
from .data import Sampling, answers
from .rewards import Reward


@dataclass
class Score:
    """What an arm did on a task.

    Args:
        name (`str`): the arm.
        items (`int`): answers.
        reward (`float`): their mean reward.
        low, high (`float`): its 95 % interval: Wilson's for rewards of 0 and 1, else the normal one.
        acceptance (`float`): accepted over drafted tokens; 0 without drafts.
        tokens_per_forward (`float`): answer tokens per row and target forward.
        ms_per_token (`float`): milliseconds per answer token, prefill included.
        method (`dict`): counters of the method's own, of the last batch.
    """

    name: str
    items: int
    reward: float
    low: float
    high: float
    acceptance: float
    tokens_per_forward: float
    ms_per_token: float
    method: dict[str, Any]


def load_items(path: str | Path) -> list[dict[str, Any]]:
    """Return the items of a JSONL file; each has `question` (or `prompt`) and what its reward needs, such as `answer`.

    Raises:
        ValueError: for a line without a question.
    """
    items = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, item in enumerate(items, start=1):
        if "question" not in item and "prompt" not in item:
            raise ValueError(f"Line {number} of {str(path)!r} has neither question nor prompt.")
    return items


def prompt_ids(tokenizer: PreTrainedTokenizerBase, item: dict[str, Any]) -> list[int]:
    """Return the ids of an item's chat prompt."""
    return chat_ids(tokenizer, str(item.get("question", item.get("prompt"))))


def evaluate(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[dict[str, Any]],
    reward: Reward,
    sampling: Sampling,
    options: dict[str, Any],
    *,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> Score:
    """Decode every item once and score the answers.

    Args:
        name (`str`): the arm's, for the table.
        options (`dict`): keywords of `generate()` that make the arm.
        batch_size (`int`): rows decoded together; items keep their order.
        seed (`int`): of the sampling.
        progress (`Callable[[int], None]`, *optional*): called with the number of answers after each batch.
    """
    rewards: list[float] = []
    stats: list[SpeculationStats] = []
    tokens, seconds = 0, 0.0
    torch.manual_seed(seed)
    for first in range(0, len(items), batch_size):
        part = items[first : first + batch_size]
        prompts = [prompt_ids(tokenizer, item) for item in part]
        with on_speculation(stats.append):
            start = time.perf_counter()
            found = answers(model, prompts, sampling, options)
            seconds += time.perf_counter() - start
        tokens += sum(len(row) for row in found)
        rewards += [
            reward(cast(str, tokenizer.decode(row, skip_special_tokens=True)), item)
            for row, item in zip(found, part, strict=True)
        ]
        progress(len(part))
    drafted, accepted = sum(s.num_draft_tokens for s in stats), sum(s.num_accepted_tokens for s in stats)
    steps = sum(len(row) for s in stats for row in s.accept_lengths)
    emitted = sum(sum(row) for s in stats for row in s.accept_lengths)
    low, high = interval(rewards)
    return Score(
        name, len(rewards), sum(rewards) / len(rewards), low, high,
        acceptance=accepted / drafted if drafted else 0.0,
        tokens_per_forward=emitted / steps if steps else 1.0,
        ms_per_token=1000 * seconds / max(tokens, 1),
        method=dict(stats[-1].method) if stats else {},
    )  # fmt: skip


def interval(rewards: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean reward: Wilson's where all are 0 or 1, else the normal one."""
    from scipy.stats import binomtest

    if all(value in (0.0, 1.0) for value in rewards):
        found = binomtest(int(sum(rewards)), len(rewards)).proportion_ci(method="wilson")
        return float(found.low), float(found.high)
    values = torch.tensor(rewards, dtype=torch.float64)
    half = 1.96 * float(values.std() / len(rewards) ** 0.5)
    return float(values.mean()) - half, float(values.mean()) + half
