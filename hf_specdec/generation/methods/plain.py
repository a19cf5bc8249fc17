"""Plain: one token per target forward, through the package's own loop, cache and attention.

Idea      no drafts: what the storage and the loop gain by themselves.
Drafts    nothing.
Verifies  nothing; the token is the target's own.
Trained   nothing.
Paper     none; the honest inner baseline of every other strategy.
New here  a preallocated cache without the copies of the default one, and packed grouped-query attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...configuration import SpeculationConfig
from ..strategy import SpeculationStrategy


@dataclass(frozen=True)
class PlainConfig(SpeculationConfig):
    """Settings of plain decoding: how it is run."""

    strategy = "plain"

    _replaced = {"num_assistant_tokens": "nothing is drafted"}

    num_assistant_tokens: ClassVar[int] = 0  # type: ignore[misc]


class PlainStrategy(SpeculationStrategy):
    """Decode without drafts."""

    config_class = PlainConfig
    page = "baselines.md"
    compiles = True
