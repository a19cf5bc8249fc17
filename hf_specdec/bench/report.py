"""Tables of measurements."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from .run import STOCK, Measurement


def fastest_stock(measurements: Sequence[Measurement]) -> Measurement:
    """Return the fastest stock *plain* arm, the base of every ratio; raise `ValueError` if none was measured."""
    stock = [m for m in measurements if m.name in STOCK]
    if not stock:
        raise ValueError(f"No stock arm was measured; it takes one of {', '.join(STOCK)}.")
    return min(stock, key=lambda m: m.ms_per_token)


def table(measurements: Sequence[Measurement]) -> Table:
    """Return one table of the arms at one (context, batch)."""
    base = fastest_stock(measurements)
    result = Table(title=f"context {base.context}, batch {base.batch}, {base.new_tokens} new tokens per row")
    headings = [
        "decoding",
        "tokens/s",
        f"x {base.name}",
        "ms/token",
        "tokens/step",
        "accepted",
        "draft ms",
        "verify ms",
        "select ms",
        "modelled x plain",
        "x plain",
        "same text",
    ]
    for heading in headings:
        result.add_column(heading, justify="left" if heading == "decoding" else "right")
    plain = next((m for m in measurements if m.name == "plain"), None)
    for m in measurements:
        result.add_row(
            m.name,
            f"{m.tokens_per_second:.1f}",
            f"{base.ms_per_token / m.ms_per_token:.2f}",
            f"{m.ms_per_token:.1f}",
            _number(m.tokens_per_step, 2),
            _number(m.acceptance, 2),
            _number(m.draft_ms, 1),
            _number(m.verify_ms, 1),
            _number(m.select_ms, 1),
            _number(m.modelled, 2),
            _number(plain.ms_per_token / m.ms_per_token if plain else None, 2),
            f"{m.same_tokens:.0%}",
        )
    return result


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
