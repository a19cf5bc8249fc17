"""Makes docstrings of the Hugging Face dialect readable for griffe, which takes Google's."""

from __future__ import annotations

import re
from typing import Any

import griffe


# an entry: names (`int`, *optional*, defaults to 5): text, and the lines below that are indented further
_ENTRY = re.compile(r"^    (\w+(?:, \w+)*) \((`[^)]*?)\):(.*(?:\n {5,}.*)*)", re.MULTILINE)
_IN_SIGNATURE = re.compile(r"`[^`]*`( or `[^`]*`)*|\*optional\*|defaults to .*")


class HFDocstrings(griffe.Extension):
    """Takes types and defaults out of docstrings' entries, because the signature has them; shapes stay."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of `obj`."""
        if obj.docstring is not None:
            obj.docstring.value = rewrite(obj.docstring.value)


def rewrite(docstring: str) -> str:
    """Return a docstring in Google's dialect; an entry of several names becomes one for each."""
    return _ENTRY.sub(_entry, docstring)


def _entry(match: re.Match[str]) -> str:
    parts = [part.strip() for part in re.split(r",\s(?![^\[]*\])", match[2])]
    _, _, shape = parts[0].partition(" of shape ")
    notes = [f"of shape {shape}"] if shape else []
    notes += [part for part in parts[1:] if not _IN_SIGNATURE.fullmatch(part)]
    text = (f" ({', '.join(notes)})" if notes else "") + match[3]
    return "\n".join(f"    {name}:{text}" for name in match[1].split(", "))
