"""Time the layouts of cached attention that docs/architecture.md compares: `python examples/attention_layouts.py`.

Random bf16 keys and values in the shapes of SmolLM2-135M (30 layers, 3 key heads, groups of 3, head size 64).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table


LAYERS, KEY_HEADS, GROUP, SIZE, TOKENS, CAPACITY = 30, 3, 3, 64, 7900, 8000


def milliseconds(run: Callable[[], object], repeats: int = 11) -> float:
    """Return the median time of `run` after two runs that do not count."""
    times = []
    for repeat in range(repeats + 2):
        start = time.perf_counter()
        run()
        if repeat > 1:
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def layouts(batch: int, queries: int) -> dict[str, float]:
    """Return milliseconds over all layers by layout."""
    heads, rows = batch * KEY_HEADS, GROUP * queries
    keys = [torch.randn(heads, CAPACITY, SIZE).bfloat16() for _ in range(LAYERS)]
    values = [torch.randn(heads, CAPACITY, SIZE).bfloat16() for _ in range(LAYERS)]
    query = torch.randn(heads, rows, SIZE).bfloat16()
    weights = torch.rand(heads, rows, CAPACITY).bfloat16()
    used = weights[..., :TOKENS].contiguous()
    attention = torch.nn.functional.scaled_dot_product_attention
    runs: dict[str, Callable[[], object]] = {
        "scaled_dot_product_attention": lambda: [
            attention(query[:, None], k[:, None, :TOKENS], v[:, None, :TOKENS])
            for k, v in zip(keys, values, strict=True)
        ],
        "q @ K.T, slice": lambda: [query @ k[:, :TOKENS].transpose(1, 2) for k in keys],
        "K @ q, slice": lambda: [torch.bmm(k[:, :TOKENS], query.transpose(1, 2)) for k in keys],
        "K @ q, whole": lambda: [torch.bmm(k, query.transpose(1, 2)) for k in keys],
        "p @ V, slice": lambda: [torch.bmm(used, v[:, :TOKENS]) for v in values],
        "p @ V, whole": lambda: [torch.bmm(weights, v) for v in values],
    }
    return {name: milliseconds(run) for name, run in runs.items()}


def main() -> None:
    """Print the table."""
    shapes = [(1, 1), (1, 6), (4, 1), (4, 6)]
    found = [layouts(batch, queries) for batch, queries in shapes]
    table = Table("operation", *(f"batch {batch}, {queries} queries" for batch, queries in shapes))
    for name in found[0]:
        table.add_row(name, *(f"{column[name]:.1f}" for column in found))
    Console().print(table)


if __name__ == "__main__":
    main()
