"""Which tests `make test` leaves to `make test-all`: those marked `full`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


FULL = pytest.mark.full
# families that differ in what matters away from the attention itself: plain, hybrid windows, learned positions
SOME = ("llama", "gemma3", "gpt2")


def tiered(values: Iterable[Any], first: Iterable[Any] = SOME) -> list[Any]:
    """Return `values` for `parametrize`, all but the `first` marked `full`; a value may be a tuple that begins so."""
    first = list(first)
    found: list[Any] = []
    for value in values:
        values = value if isinstance(value, tuple) else (value,)
        kept = value in first or values[0] in first
        found.append(pytest.param(*values, marks=[] if kept else FULL))
    return found
