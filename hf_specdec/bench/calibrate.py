"""Measure where Vegas breaks even on a device, for `VegasConfig.min_context`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from ..generation.methods.vegas import VegasConfig
from .run import Arm, Measurement, measure


def calibrate_vegas(
    model: PreTrainedModel,
    prompts: Callable[[int], torch.Tensor],
    contexts: Sequence[int],
    *,
    config: VegasConfig | None = None,
    new_tokens: int = 64,
    repeats: int = 3,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[int | None, list[Measurement]]:
    """Return the context from which drafting beats plain steps through the same cache, and the measurements.

    Args:
        model (`PreTrainedModel`): the target.
        prompts (`Callable[[int], torch.Tensor]`): returns prompts `[b, T]` for a context T.
        contexts (`list[int]`): contexts to measure, rising.
        config (`VegasConfig`, *optional*): settings to calibrate; its `min_context` is not used.
        new_tokens (`int`, *optional*, defaults to 64): tokens per row and run.
        repeats (`int`, *optional*, defaults to 3): timed runs per arm.
        progress (`Callable[[str], None]`, *optional*): called after each run.

    Returns:
        `tuple[int | None, list[Measurement]]`: the context, interpolated between the two measured ones around it, or
        `None` if plain steps were faster everywhere.

    Raises:
        ValueError: if `contexts` is empty or not rising.
    """
    if not contexts or sorted(set(contexts)) != list(contexts):
        raise ValueError(f"`contexts` must be rising numbers, got {list(contexts)}.")
    chosen = (config or VegasConfig()).override(min_context=0)
    arms = [Arm("plain", {"assistant_strategy": "plain"}), Arm("vegas", {"assistant_strategy": chosen})]
    found: list[Measurement] = []
    gains = []
    for context in contexts:
        plain, vegas = measure(model, prompts(context), arms, new_tokens, repeats, progress)
        found += [plain, vegas]
        gains.append(plain.ms_per_token / vegas.ms_per_token)
    return break_even(contexts, gains), found


def break_even(contexts: Sequence[int], gains: Sequence[float]) -> int | None:
    """Return the context from which every measured gain exceeds 1, interpolated; `None` if the last one does not."""
    last_loss = max((index for index, gain in enumerate(gains) if gain <= 1), default=-1)
    if last_loss == len(gains) - 1:
        return None
    if last_loss < 0:
        return contexts[0]
    low, high = contexts[last_loss], contexts[last_loss + 1]
    share = (1 - gains[last_loss]) / (gains[last_loss + 1] - gains[last_loss])
    return round(low + share * (high - low))
