"""Tables of measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.table import Table

from .run import STOCK, Measurement


_WIDE = 140


def fastest_stock(measurements: Sequence[Measurement]) -> Measurement:
    """Return the fastest stock *plain* arm, the base of every ratio; raise `ValueError` if none was measured."""
    stock = [m for m in measurements if m.name in STOCK]
    if not stock:
        raise ValueError(f"No stock arm was measured; it takes one of {', '.join(STOCK)}.")
    return min(stock, key=lambda m: m.ms_per_token)


def table(measurements: Sequence[Measurement], width: int = 200) -> Table:
    """Return one table of the arms at one (context, batch); the step times are left out where `width` is narrow.

    Args:
        width (`int`, *optional*, defaults to 200): columns of the terminal.
    """
    base = fastest_stock(measurements)
    plain = next((m for m in measurements if m.name == "plain"), None)
    columns: dict[str, Callable[[Measurement], str]] = {
        "decoding": lambda m: m.name,
        "tokens/s": lambda m: f"{m.tokens_per_second:.1f}",
        f"x {base.name}": lambda m: f"{base.ms_per_token / m.ms_per_token:.2f}",
        "ms/token": lambda m: f"{m.ms_per_token:.1f}",
        "tokens/step": lambda m: _number(m.tokens_per_step, 2),
        "accepted": lambda m: _number(m.acceptance, 2),
    }
    if width >= _WIDE:
        columns |= {
            "target calls/token": lambda m: _number(m.forwards, 2),
            "draft ms": lambda m: _number(m.draft_ms, 1),
            "verify ms": lambda m: _number(m.verify_ms, 1),
            "select ms": lambda m: _number(m.select_ms, 1),
            "modelled x plain": lambda m: _number(m.modelled, 2),
            "x plain": lambda m: _number(plain.ms_per_token / m.ms_per_token if plain else None, 2),
            "same text": lambda m: f"{m.same_tokens:.0%}",
        }
    result = Table(title=f"context {base.context}, batch {base.batch}, {base.new_tokens} new tokens per row")
    for heading in columns:
        result.add_column(heading, justify="left" if heading == "decoding" else "right", overflow="fold")
    for m in measurements:
        result.add_row(*(cell(m) for cell in columns.values()))
    return result


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
