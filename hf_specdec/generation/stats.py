"""What speculation did during one `generate()` call, and the output class that carries it."""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers.generation.utils import GenerateDecoderOnlyOutput


@dataclass
class SpeculationStats:
    """Counters of one call. The prefill and its token are left out; tokens count after the cut at a stop.

    Args:
        num_drafts (`int`): drafts that were judged: (row, round) pairs with at least one draft token.
        num_draft_tokens (`int`): drafted tokens.
        num_accepted_tokens (`int`): drafted tokens that were emitted.
        num_accepted_tokens_per_pos (`list[int]`): the same by place in the draft, first to last.
        accept_lengths (`list[list[int]]`): per row, tokens emitted by each target step, bonus token included.
        target_forwards (`int`): forwards of the whole target over the batch.
        draft_forwards (`int`): forwards that drafted.
        seconds (`dict[str, float]`): per phase (`prefill`, `draft`, `verify`, `select`), when timing was asked for.
        method (`dict`): counters of the method's own.
    """

    strategy: str = ""
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)
    accept_lengths: list[list[int]] = field(default_factory=list)
    target_forwards: int = 0
    draft_forwards: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    method: dict[str, Any] = field(default_factory=dict)
    timed: bool = False
    # per row and step: tokens drafted and accepted, for `forget`
    _steps: defaultdict[int, list[list[int]]] = field(default_factory=lambda: defaultdict(list), repr=False)

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted tokens; 0 when nothing was drafted."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    @property
    def mean_tokens_per_step(self) -> float:
        """Mean of `accept_lengths` over all rows; 0 when no step was made."""
        steps = sum(len(row) for row in self.accept_lengths)
        return sum(map(sum, self.accept_lengths)) / steps if steps else 0.0

    def record(self, row: int, drafted: int, accepted: int, emitted: int) -> None:
        """Count one step of `row`: `drafted` tokens, of which `accepted` stayed, and `emitted` after the cut."""
        accepted = min(accepted, emitted)
        self.num_drafts += drafted > 0
        self.num_draft_tokens += drafted
        self.num_accepted_tokens += accepted
        per_pos = self.num_accepted_tokens_per_pos
        per_pos.extend([0] * (drafted - len(per_pos)))
        for place in range(accepted):
            per_pos[place] += 1
        self.accept_lengths[row].append(emitted)
        self._steps[row].append([drafted, accepted])

    def forget(self, row: int, tokens: int) -> None:
        """Take back the newest `tokens` of `row`, which a stopping criterion cut after they had been counted."""
        lengths, steps = self.accept_lengths[row], self._steps[row]
        while tokens and lengths:
            taken = min(tokens, lengths[-1])
            lengths[-1] -= taken
            tokens -= taken
            for place in range(lengths[-1], steps[-1][1]):
                self.num_accepted_tokens -= 1
                self.num_accepted_tokens_per_pos[place] -= 1
            steps[-1][1] = min(steps[-1][1], lengths[-1])
            if not lengths[-1]:  # the whole step lies past the stop
                lengths.pop()
                drafted = steps.pop()[0]
                self.num_drafts -= drafted > 0
                self.num_draft_tokens -= drafted

    @contextmanager
    def phase(self, name: str, device: torch.device) -> Iterator[None]:
        """Add the time of the enclosed work to `seconds[name]`, where timing was asked for."""
        if not self.timed:
            yield
            return
        _wait(device)
        start = time.perf_counter()
        yield
        _wait(device)
        self.seconds[name] += time.perf_counter() - start

    def to_dict(self) -> dict[str, Any]:
        """Return the counters and rates as a JSON-safe dictionary."""
        rates = {"acceptance_rate": self.acceptance_rate, "mean_tokens_per_step": self.mean_tokens_per_step}
        hidden = ("timed", "_steps", "seconds")
        counts = {own.name: getattr(self, own.name) for own in fields(self) if own.name not in hidden}
        return copy.deepcopy({**counts, **rates, "seconds": dict(self.seconds)})


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class SpeculationOutput(GenerateDecoderOnlyOutput):
    """What `generate(..., return_dict_in_generate=True)` returns under a strategy: stock's output and the statistics.

    Args:
        speculation (`SpeculationStats`, *optional*): counters of the call; `None` when nothing was drafted.
    """

    speculation: SpeculationStats | None = None


_listeners: list[tuple[Callable[[SpeculationStats], None], bool]] = []


@contextmanager
def on_speculation(callback: Callable[[SpeculationStats], None], *, timings: bool = False) -> Iterator[None]:
    """Call `callback(stats)` once at the end of every `generate()` that runs under a strategy inside this context.

    For callers that get ids only, such as `pipeline()` or a server:

    ```python
    with hf_specdec.on_speculation(lambda stats: print(stats.acceptance_rate)):
        pipe("Once upon a time", assistant_strategy="vegas")
    ```

    Args:
        callback (`Callable[[SpeculationStats], None]`): gets the statistics.
        timings (`bool`, *optional*, defaults to `False`): measure seconds per phase too. That waits for the device
            between phases, so it is off by default.
    """
    listener = (callback, timings)
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def timings_wanted() -> bool:
    """Whether some listener of `on_speculation` asked for seconds per phase."""
    return any(timings for _, timings in _listeners)


def report(stats: SpeculationStats) -> None:
    """Hand `stats` to every listener of `on_speculation`."""
    for callback, _ in list(_listeners):
        callback(stats)
