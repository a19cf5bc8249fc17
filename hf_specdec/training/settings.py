"""Settings of a training that are options of its command, too."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def option(default: Any, help: str, name: str | None = None) -> Any:
    """Return a dataclass field that is an option of the command, too.

    Args:
        default: the field's; `MISSING` for none.
        help (`str`): of the option; a field redeclared without one keeps its base's.
        name (`str`, *optional*): of the option, such as `"stages"`; by default the field's.
    """
    return field(default=default, metadata={"help": help, "name": name})


def at_least(settings: Any, least: int, *names: str) -> None:
    """Raise `ValueError` if one of the fields `names` is below `least`."""
    for name in names:
        if getattr(settings, name) < least:
            raise ValueError(f"`{name}` must be at least {least}, got {getattr(settings, name)}.")


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """Settings of any distillation.

    Args:
        vocabulary_size (`int`, *optional*, defaults to 8192): words that the student can propose, the most frequent of
            the training text; `None` for all.
        steps (`int`, *optional*, defaults to 20000): optimiser steps at most.
        minutes (`float`, *optional*): stop by the clock; the learning rate follows whichever ends first.
        batch_tokens (`int`, *optional*, defaults to 2048): tokens per step and process, padding included.
        max_length (`int`, *optional*, defaults to 512): longer sequences are cut.
        learning_rate (`float`, *optional*, defaults to 1e-3): at its peak; Adam, 100 steps of warm-up, then a cosine.
        num_assistant_tokens (`int`, *optional*, defaults to 4): written into the saved settings.
        save_every (`int`, *optional*, defaults to 500): steps between checkpoints.
        cache_gib (`float`, *optional*, defaults to 4.0): memory for the target's hidden states.
        seed (`int`, *optional*, defaults to 0): of the order, and of what is held out.
    """

    vocabulary_size: int | None = option(
        8192, "Words that can be proposed, the most frequent; 0 for all.", "vocabulary"
    )
    steps: int = option(20000, "Optimiser steps at most.")
    minutes: float | None = option(None, "Stop by the clock; 0 for never.")
    batch_tokens: int = option(2048, "Tokens per step and process.")
    max_length: int = 512
    learning_rate: float = option(1e-3, "Learning rate at its peak.")
    num_assistant_tokens: int = option(4, "Draft tokens per round.")
    save_every: int = 500
    cache_gib: float = 4.0
    seed: int = option(0, "Of order and sampling.")

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "batch_tokens", "max_length", "save_every", "num_assistant_tokens")
        if self.learning_rate <= 0 or (self.minutes is not None and self.minutes <= 0):
            raise ValueError("`learning_rate` and `minutes` must be above 0.")
        if self.vocabulary_size is not None:
            at_least(self, 1, "vocabulary_size")
