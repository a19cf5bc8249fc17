"""Tables of measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from .kernels import KernelRow
from .run import STOCK, Measurement
from .steps import StepRow


_WIDE = 140
"""Columns of a terminal from which on tables are shown whole."""


def fastest_stock(measurements: Sequence[Measurement]) -> Measurement:
    """Return the fastest stock *plain* arm, the base of every ratio; raise `ValueError` if none was measured."""
    stock = [m for m in measurements if m.name in STOCK]
    if not stock:
        raise ValueError(f"No stock arm was measured; it takes one of {', '.join(STOCK)}.")
    return min(stock, key=lambda m: m.ms_per_token)


def table(measurements: Sequence[Measurement], width: int = 200) -> Table:
    """Return one table of the arms at one (context, batch); a terminal of few columns, `width`, gets no step times."""
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
    return _fill(result, columns, measurements, ("decoding",))


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def kernel_table(rows: Sequence[KernelRow], bandwidth: float, width: int = 200) -> Table:
    """Return a table of kernels, as `table` does, under the `bandwidth` of a copy (in 1e9 bytes per second)."""
    title = f"kernels; a copy moves {bandwidth:.1f} GB/s, bytes read and bytes written both counted"
    columns: dict[str, Callable[[KernelRow], str]] = {
        "case": lambda r: r.case.name,
        "by": lambda r: r.implementation,
        "ms": lambda r: f"{r.ms:.3f}",
        "x sdpa": lambda r: _number(_sdpa_ratio(r, rows), 2),
        "of copy": lambda r: f"{r.copy_share:.0%}",
        "relative error": lambda r: f"{r.relative_error:.1e}",
    }
    if width >= _WIDE:
        columns |= {
            "heads": lambda r: f"{r.case.heads}/{r.case.key_heads} x {r.case.size}",
            "MB": lambda r: f"{r.bytes / 1e6:.2f}",
            "GB/s": lambda r: f"{r.gb_per_second:.1f}",
            "error": lambda r: f"{r.error:.1e}",
        }
    return _fill(Table(title=title), columns, rows, ("case", "by"))


def _sdpa_ratio(row: KernelRow, rows: Sequence[KernelRow]) -> float | None:
    """Return how much faster a row is than PyTorch's attention on the same case: dense, else the packed one."""
    same = {other.implementation: other.ms for other in rows if other.case == row.case}
    base = same.get("sdpa_dense", same.get("sdpa"))
    return None if base is None else base / row.ms


def step_table(rows: Sequence[StepRow], width: int = 200) -> Table:
    """Return a table of one shape's step times, as `table` does; the last two columns need tokens per step."""
    columns: dict[str, Callable[[StepRow], str]] = {
        "tokens x rows": lambda r: f"{r.context} x {r.batch}",
        "decoding": lambda r: r.name,
        "ms/token": lambda r: f"{r.ms_per_token:.2f}",
        "draft ms": lambda r: _number(r.draft_ms, 2),
        "verify ms": lambda r: _number(r.verify_ms, 2),
    }
    if width >= _WIDE:
        columns |= {
            "rest ms": lambda r: _number(r.rest_ms, 2),
            "select ms": lambda r: _number(r.select_ms, 2),
            "weights ms, floor": lambda r: f"{r.weights_ms:.2f}",
            "KV ms, floor": lambda r: f"{r.kv_ms:.2f}",
        }
    if any(r.modelled is not None for r in rows):
        columns |= {
            "tokens/step elsewhere": lambda r: _number(r.tokens_per_step, 2),
            "modelled x static": lambda r: _number(r.modelled, 2),
        }
    return _fill(Table(title=f"{rows[0].shape}, random weights"), columns, rows, ("decoding",))


def _fill(result: Table, columns: dict[str, Callable[[Any], str]], rows: Sequence[Any], left: Sequence[str]) -> Table:
    for heading in columns:
        result.add_column(heading, justify="left" if heading in left else "right", overflow="fold")
    for row in rows:
        result.add_row(*(cell(row) for cell in columns.values()))
    return result
