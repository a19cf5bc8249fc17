"""Stages that run the kernels alone: are they right, do they reach the rate of a copy, would other tiles be better.

All take the attention of Llama-3.1-8B.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from stage_run import StageRun
from torch.nn.functional import scaled_dot_product_attention

from hf_specdec.bench.cases import RECENTS, Case, Inputs, deviation, expected, make_inputs
from hf_specdec.bench.kernels import IMPLEMENTATIONS, Run, measure_kernels


QUERIES = 7
"""Tokens of a verification: Vegas' 6 drafts, and the token before them."""

_CHOSEN = 2307 - RECENTS
"""Columns of a selection: 7 % of 32K tokens, and a few more, so that no power of two hides a mistake."""

_Tile = tuple[int, int, int]  # keys, warps and loads in flight of one program


def _case(tiny: bool, kind: str, rows: int, queries: int, context: int, ragged: bool = False) -> Case:
    """Return a case of Llama-3.1-8B's attention, or of a small one."""
    heads, dtype, rows = ((4, 2, 16), torch.float32, min(rows, 2)) if tiny else ((32, 8, 128), torch.bfloat16, rows)
    name = f"{kind} {queries} at {context}, {rows} rows"
    return Case(name, kind, rows, *heads, queries, context, 0, 1, ragged, dtype)


def _checks(tiny: bool) -> list[Case]:
    """Return small ragged cases of every dtype and head size, which `correct` compares with the reference."""
    if tiny:
        sizes = [(torch.float32, 64)]
    else:
        sizes = [(torch.bfloat16, size) for size in (64, 80, 96, 128, 256)]
        sizes += [(torch.float16, 128), (torch.float32, 64), (torch.float32, 128)]
    context = 90 if tiny else 1500
    return [
        Case(f"{queries} queries, {size}, {dtype}", "scored", 3, 8, 2, size, queries, context, 0, 1, True, dtype)
        for dtype, size in sizes
        for queries in (1, QUERIES)
    ]


def _sizes(tiny: bool) -> list[Case]:
    """Return the cases that `attention` times: drafts, plain steps and verifications, and the waves of programs."""
    unit, chosen = (64, 74) if tiny else (32768, _CHOSEN)
    draft = [("draft", 8, 1, chosen), ("draft", 1, 1, chosen), ("draft", 8, 1, unit // 4)]
    cache = [(kind, rows, m, unit) for rows in (8, 1) for m in (1, QUERIES) for kind in ("verify", "export")]
    # the same bytes in other numbers of rows: does one wave of programs keep the memory busy?
    waves = [("verify", rows, 1, 8 * unit // rows) for rows in (4, 9, 12, 17, 24, 32, 48)][: 1 if tiny else None]
    found = [_case(tiny, kind, rows, m, n + (RECENTS if kind == "draft" else 0)) for kind, rows, m, n in draft]
    found += [_case(tiny, *sizes) for sizes in (*cache, *waves)]
    return [*found, _case(tiny, "verify", 8, QUERIES, unit, True), _case(tiny, "reduce", 8, QUERIES, unit)]


def _tiles(tiny: bool) -> Iterator[tuple[Case, _Tile]]:
    """Yield the cases of `sweep` with the tiles that it tries; keys times loads in flight bound the shared memory."""
    context, chosen = (96, 90) if tiny else (32768, _CHOSEN)
    cases = [_case(tiny, "draft", 8, 1, chosen + RECENTS)]
    cases += [_case(tiny, kind, 8, QUERIES, context) for kind in ("verify", "export")]
    for case in cases:
        for keys, warps, stages in (
            [(32, 4, 2)] if tiny else [(k, w, s) for k in (32, 64, 128) for w in (4, 8) for s in (2, 3, 4)]
        ):
            if keys * stages <= (384 if case.kind == "draft" else 256):
                yield case, (keys, warps, stages)


@contextmanager
def tuned(tile: _Tile | None, splits: int | None) -> Iterator[None]:
    """Let the attention kernel run with another tile or number of parts inside the context; `None` keeps its own."""
    from hf_specdec.kernels import triton_attention  # triton is optional

    module: Any = triton_attention
    before = module.tile, module.choose_splits
    if tile is not None:
        module.tile = lambda rows, *_: (max(16, 1 << (rows - 1).bit_length()), *tile)
    if splits is not None:
        module.choose_splits = lambda *_: splits
    try:
        yield
    finally:
        module.tile, module.choose_splits = before


def _launch(case: Case, inputs: Any) -> Run:
    """Return the launch of this package's kernel."""
    found = IMPLEMENTATIONS[case.kind]["triton"](case, inputs)
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def _compile(part: list[tuple[Case, _Tile | None]], device: torch.device) -> list[str]:
    """Run small cases with tiles, each in one part and in several, and return what failed; what compiles is kept."""
    failed = []
    for case, tile in part:
        try:
            launch = _launch(case, make_inputs(case, device))
            for splits in (1, 2) if device.type == "cpu" else (1, 4, 8, 16, 32):
                with tuned(tile, splits):
                    launch()
        except Exception as error:
            failed.append(f"{case.name} {tile}: {type(error).__name__}: {str(error)[-200:]}")
    return failed


def precompile(run: StageRun) -> None:
    """Compile on all cores at once what the next stages need: a second or two each, one by one it would be minutes."""
    small = 64 if run.tiny else 256  # no length is compiled into a kernel
    cases = [(replace(case, context=small), tile) for case, tile in _tiles(run.tiny)]
    wanted: list[tuple[Case, _Tile | None]] = [*cases, *((case, None) for case in _checks(run.tiny))]
    kinds = {(case.kind, case.queries): replace(case, rows=2, context=small) for case in _sizes(run.tiny)}
    wanted += [(case, None) for case in kinds.values()]
    workers = 1 if run.tiny else max(1, min(14, (os.cpu_count() or 2) - 1))
    started = time.perf_counter()
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        parts = [wanted[i::workers] for i in range(workers)]
        failed = [text for found in pool.map(_compile, parts, [run.device] * workers) for text in found]
    run.note("compiled ahead", variants=len(wanted), seconds=time.perf_counter() - started, failed=failed)


def correct(run: StageRun) -> None:
    """Compare output and token scores with the reference in float32: every dtype, ragged rows, NaN beyond the text."""
    for case in _checks(run.tiny):
        inputs = cast(Inputs, make_inputs(case, run.device))
        for row, length in enumerate(case.lengths):
            inputs.key[row, :, length:], inputs.value[row, :, length:] = torch.nan, torch.nan
        error, relative = deviation(case, _launch(case, inputs)(), expected(case, inputs))
        ok = relative < (1e-5 if case.dtype == torch.float32 else 2e-2)
        run.note(case.name, ok=ok, error=error, relative_error=relative)


def attention(run: StageRun) -> None:
    """Time attention at the sizes that matter beside dense flash attention: its share of the copy rate, the export."""
    for case in _sizes(run.tiny):
        for found in measure_kernels(
            [case], run.device, run.bandwidth, 1 << 40, only=("triton", "sdpa", "sdpa_dense")
        ):
            values = {name: value for name, value in vars(found).items() if name != "case"}
            run.note(case.name, ragged=case.ragged, **values)
        if case.kind == "verify" and not case.ragged and case.queries > 1:
            query, key, value = cast(Inputs, make_inputs(case, run.device))
            packed = query.reshape(case.rows, case.key_heads, -1, case.size)
            # not the same result, but the least that PyTorch takes to read the keys and values once
            ms = run.timed(partial(scaled_dot_product_attention, packed, key, value))
            run.note("packed and unmasked, by PyTorch", case=case.name, ms=ms)


def sweep(run: StageRun) -> None:
    """Try tiles, loads in flight and numbers of parts: which ones beat those that are chosen today?"""
    found: dict[str, list[tuple[float, _Tile, int]]] = {}
    before, launch = "", cast(Run, None)
    for case, tile in _tiles(run.tiny):
        if case.name != before:
            before, launch = case.name, _launch(case, make_inputs(case, run.device))
            found[before] = []
            run.note(before, ms=run.timed(launch), tile="as chosen today")
        for splits in (1, 2) if run.tiny else (4, 8, 16) if case.kind == "draft" else (4, 8, 16, 32):
            try:
                with tuned(tile, splits):
                    ms = run.timed(launch)
            except Exception as error:  # too much shared memory, for one
                run.note(before, tile=tile, splits=splits, error=str(error)[:120])
            else:
                found[before].append((ms, tile, splits))
                run.note(before, ms=ms, tile=tile, splits=splits)
    for name, results in found.items():
        run.note(f"best of {name}", best=sorted(results)[:4], order="ms, (keys, warps, loads in flight), parts")
