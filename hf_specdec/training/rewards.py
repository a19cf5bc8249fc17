"""Rewards of a written answer, in [0, 1] each: what a trained weight must not lose."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any


Reward = Callable[[str, dict[str, Any]], float]
"""Maps the answer's text and the task's item (a line of its JSONL file) to a number."""

_NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")


def numeric(answer: str, item: dict[str, Any]) -> float:
    """Return 1 if the last number in the answer equals `item["answer"]`, else 0."""
    found = _NUMBER.findall(answer)
    if not found:
        return 0.0
    try:
        return float(abs(float(found[-1].replace(",", "").rstrip(".")) - float(item["answer"])) < 1e-6)
    except ValueError:
        return 0.0


def exact(answer: str, item: dict[str, Any]) -> float:
    """Return 1 if the answer is `item["answer"]`, case, white space and closing punctuation apart, else 0."""

    def plain(text: str) -> str:
        return " ".join(text.lower().split()).strip(" .!\"'")

    return float(plain(answer) == plain(str(item["answer"])))


def rouge2(answer: str, item: dict[str, Any]) -> float:
    """Return the ROUGE-2 F measure against `item["answer"]`, by the package `rouge-score`."""
    from rouge_score.rouge_scorer import RougeScorer

    scores = RougeScorer(["rouge2"], use_stemmer=True).score(str(item["answer"]), answer)
    return float(scores["rouge2"].fmeasure)


REWARDS: dict[str, Reward] = {"numeric": numeric, "exact": exact, "rouge2": rouge2}


def resolve_reward(name: str) -> Reward:
    """Return a reward by its name, or a function named as `module:function`.

    Raises:
        ValueError: for a name that is neither; the message lists the known ones.
    """
    if name in REWARDS:
        return REWARDS[name]
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute) if attribute else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"`reward={name!r}` can't be imported: {error}.") from error
    if not callable(function):
        raise ValueError(f"`reward` must be {', '.join(REWARDS)} or module:function, got {name!r}.")
    return function
