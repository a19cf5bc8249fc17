"""Tasks for the kernels: sizes, bytes that they must move, random tensors, and what the reference makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..kernels import reference
from ..kernels.request import ScoreRequest


RECENTS = 6
"""Columns after the selection that a draft reads: those of a burst of 6, which is the usual one."""

SCORED = ScoreRequest("first_last", "weight")
"""The token scores that are measured: Vegas' own."""


SIZES = (
    # name, kind, rows, queries, context, selected, ragged
    ("draft, 8192 tokens, 1 row", "draft", 1, 1, 8192, 0, False),
    ("draft, 8192 tokens, 8 rows", "draft", 8, 1, 8192, 0, False),
    ("draft, 2304 tokens, 32 rows", "draft", 32, 1, 2304, 0, False),
    ("verify 6 at 128K, 1 row", "verify", 1, 6, 131072, 0, False),
    ("verify 6 at 32K, 8 rows", "verify", 8, 6, 32768, 0, False),
    ("verify 6 at 16K-32K, 8 rows", "verify", 8, 6, 32768, 0, True),
    ("verify 6 at 32K, 8 rows, and token scores", "scored", 8, 6, 32768, 0, False),
    ("verify 6 at 32K, 8 rows, and export", "export", 8, 6, 32768, 0, False),
    ("token scores at 32K, 8 rows", "reduce", 8, 6, 32768, 0, False),
    ("gather 2304 of 32K, 8 rows", "gather", 8, 1, 32768, 2304, False),
)
"""The usual tasks for the attention of a large model: arguments of `Case`."""

TINY_SIZES = (
    ("draft, 40 tokens, 2 rows", "draft", 2, 1, 40, 0, False),
    ("verify 6 at 96, 2 rows", "verify", 2, 6, 96, 0, False),
    ("verify 6 at 48-96, 3 rows", "verify", 3, 6, 96, 0, True),
    ("verify 6 at 96, 2 rows, and token scores", "scored", 2, 6, 96, 0, False),
    ("verify 6 at 96, 2 rows, and export", "export", 2, 6, 96, 0, False),
    ("token scores at 96, 2 rows", "reduce", 2, 6, 96, 0, False),
    ("gather 24 of 96, 2 rows", "gather", 2, 1, 96, 24, False),
)
"""The same, small enough for any machine."""


@dataclass(frozen=True)
class Case:
    """One task at one size.

    Args:
        name (`str`): for the table.
        kind (`str`): `draft` (a query per row over a side buffer), `verify` (a few queries over the cache), `scored`
            (the same, and token scores), `export` (the same, scores left as the kernel writes them), `reduce` (from
            those to token scores) or `gather` (the chosen tokens of all layers).
        rows, heads, key_heads, size (`int`): rows, query heads, key heads, size of a head.
        queries (`int`): queries per row.
        context (`int`): tokens of the longest row, the queries' own included; for a draft the columns that it reads.
        selected (`int`, *optional*, defaults to 0): tokens chosen per row.
        layers (`int`, *optional*, defaults to 1): layers of a `gather`.
        ragged (`bool`, *optional*, defaults to `False`): rows end evenly spread over the context's second half.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): of queries, keys and values.
    """

    name: str
    kind: str
    rows: int
    heads: int
    key_heads: int
    size: int
    queries: int
    context: int
    selected: int = 0
    layers: int = 1
    ragged: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row's last query reads."""
        if not self.ragged or self.rows == 1:
            return [self.context] * self.rows
        half = self.context // 2
        return [self.context - row * half // (self.rows - 1) for row in range(self.rows)]

    @property
    def starts(self) -> list[int]:
        """Position of each row's first query."""
        return [length - self.queries for length in self.lengths]

    @property
    def score_dtype(self) -> torch.dtype:
        """Type of the scores that the kernel exports."""
        return torch.float32 if self.dtype == torch.float32 else torch.float16

    @property
    def scaling(self) -> float:
        """Factor on the products."""
        return float(self.size**-0.5)


def attention_bytes(case: Case) -> int:
    """Return the bytes of an attention: keys and values that a row reads, queries, and outputs, each once."""
    cached = sum(case.lengths) * case.key_heads * 2 * case.size
    return (cached + 2 * case.rows * case.heads * case.queries * case.size) * case.dtype.itemsize


def export_bytes(case: Case) -> int:
    """Return the bytes of two queries' exported scores: products in 16 bits (32 for float32), two float32 logarithms.

    Products are `[rows, heads, 2, context]`, logarithms of the softmax denominators `[rows, heads, 2]`.
    """
    return case.rows * case.heads * 2 * (case.context * case.score_dtype.itemsize + 4)


def gather_bytes(case: Case) -> int:
    """Return the bytes of a gather: chosen keys and values of all layers read and written, and int64 indices read."""
    chosen = case.layers * case.rows * case.selected
    return chosen * (2 * 2 * case.key_heads * case.size * case.dtype.itemsize + 8)


def moved_bytes(case: Case) -> int:
    """Return the bytes that a case's task must move; token scores are float32 `[rows, context]`."""
    if case.kind == "gather":
        return gather_bytes(case)
    attended = 0 if case.kind == "reduce" else attention_bytes(case)
    exported = export_bytes(case) if case.kind in ("export", "reduce") else 0
    return attended + exported + (case.rows * case.context * 4 if case.kind in ("scored", "reduce") else 0)


def needed_bytes(case: Case) -> int:
    """Return about how much memory a case takes: its tensors, and what the reference holds for a while."""
    stored = 2 * case.layers * case.rows * case.key_heads * case.context * case.size * case.dtype.itemsize
    if case.kind == "gather":
        return stored + 2 * gather_bytes(case)
    scores = 6 * case.rows * case.heads * max(case.queries, 2) * case.context * 4
    # the reference repeats keys and values in float32 for every query head, row by row except in a reduction's set-up
    repeated = 4 * case.heads * case.context * case.size * 4 * (case.rows if case.kind == "reduce" else 1)
    return stored + scores + repeated


class Inputs(NamedTuple):
    """Tensors of an attention case: `query` `[n, h_q, m, d]`, `key` and `value` `[n, h_kv, context, d]`."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


class Lists(NamedTuple):
    """Tensors of a gather, two per layer: `sources` `[n, h_kv, C, d]` and `targets` `[n, h_kv, w, d]`.

    `slots` `[layers, n, w]` holds each layer's and row's chosen slots, int64.
    """

    sources: list[torch.Tensor]
    targets: list[torch.Tensor]
    slots: torch.Tensor


def make_inputs(case: Case, device: torch.device) -> Inputs | Lists:
    """Return random tensors for a case, the same at every call."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=case.dtype)

    stored = (case.rows, case.key_heads, case.context, case.size)
    if case.kind != "gather":
        return Inputs(normal(case.rows, case.heads, case.queries, case.size), normal(*stored), normal(*stored))
    sources = [normal(*stored) for _ in range(2 * case.layers)]
    targets = [s.new_zeros(case.rows, case.key_heads, case.selected, case.size) for s in sources]
    scores = torch.rand(case.layers, case.rows, case.context, generator=generator, device=device)
    return Lists(sources, targets, scores.topk(case.selected, dim=-1).indices)


def expected(case: Case, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the reference's output `[n, h_q, m, d]` and token scores `[n, context]` in float32, row by row.

    A row's scores past its own context are 0. One row at a time, because the reference repeats keys per query head.
    """
    outputs, metrics = [], []
    for row, length in enumerate(case.lengths):
        query, key, value = (part[row : row + 1].float() for part in inputs)
        key, value = key[:, :, :length], value[:, :, :length]
        start = torch.tensor(case.starts[row : row + 1], device=query.device)
        outputs.append(reference.attention(query, key, value, start, scaling=case.scaling))
        if case.kind in ("scored", "reduce"):
            weights, raw = reference.attention_weights(query, key, start, scaling=case.scaling)
            last = torch.full_like(start, case.queries - 1)
            metric = reference.token_scores(weights, raw, last, queries=SCORED.queries, metric=SCORED.metric)
            metrics.append(torch.nn.functional.pad(metric, (0, case.context - length)))
    return torch.cat(outputs), torch.cat(metrics) if metrics else torch.empty(0)


def deviation(case: Case, found: Any, wanted: Any) -> tuple[float, float]:
    """Return the largest difference, absolute and relative to the part's largest value, over all parts of a result.

    Args:
        found (`tuple`): output and token scores from an implementation, `None` where the task has none; for a gather
            any number of tensors.
        wanted (`tuple`): the same from the reference.
    """
    pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if a is not None]
    if case.kind != "gather" and found[1] is not None:
        # slots that some of a row's queries may not read hold undefined scores
        metrics = [(found[1][row, : start + 1], wanted[1][row, : start + 1]) for row, start in enumerate(case.starts)]
        pairs = [*pairs[:-1], *metrics]
    errors, relative = [], []
    for one, other in pairs:
        # a comparison with NaN is false: it would pass for no error
        errors.append(float((one.float() - other.float()).abs().nan_to_num(nan=torch.inf).max()))
        relative.append(errors[-1] / max(float(other.abs().max()), 1e-30))
    return max(errors), max(relative)
