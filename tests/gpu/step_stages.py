"""Stages that run whole forwards of Llama-3.1-8B's shape, on storage that is filled with random numbers.

They run straight on a runner: a call of generate() would hold the keys and values twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from kernel_stages import QUERIES
from stage_run import StageRun
from transformers import PreTrainedModel

from hf_specdec.bench.cases import SCORED
from hf_specdec.bench.steps import TINY, build, shape_config, weight_bytes
from hf_specdec.cache.fixed import FixedView
from hf_specdec.cache.selection import FixedSelector
from hf_specdec.cache.speculative import SpeculativeCache
from hf_specdec.generation.methods.vegas import VegasConfig
from hf_specdec.generation.programs import make_runner
from hf_specdec.kernels.dispatch import register
from hf_specdec.kernels.request import ForwardRequest


def large_model(run: StageRun, layers: int) -> PreTrainedModel:
    """Return random weights in the shape of the first `layers` layers of Llama-3.1-8B."""
    config = shape_config(TINY if run.tiny else "llama-3.1-8b")
    config.num_hidden_layers = min(layers, config.num_hidden_layers)
    return build(config, run.dtype, run.device)


def large_size(run: StageRun) -> tuple[int, int]:
    """Return rows, and tokens of each, that are measured with the model."""
    return (2, 96) if run.tiny else (8, 32768)


def steps(run: StageRun) -> None:
    """Time the forwards of a round of the whole model, captured as it is."""
    fits = run.tiny or torch.cuda.mem_get_info()[0] > 60e9
    _drive(run, "graphs", 32 if fits else 16, *large_size(run))


def steps_small(run: StageRun) -> None:
    """Time the same with one row, where launches and the host weigh most."""
    _drive(run, "graphs", 32, 1, large_size(run)[1])


def compiled(run: StageRun) -> None:
    """Time eight layers captured, and compiled and captured: what is won per layer by fusing the small kernels?"""
    _drive(run, "graphs", 8, *large_size(run))
    if not run.tiny:
        _drive(run, "graphs+inductor", 8, *large_size(run))


def _drive(run: StageRun, mode: str, layers: int, rows: int, context: int) -> None:
    """Time a draft step, a verification and a plain step, what the host spends on them, and what they consist of."""
    model = large_model(run, layers)
    config, longest = model.config, context + 64
    note = {"mode": mode, "layers": config.num_hidden_layers, "rows": rows, "context": context}
    cache = SpeculativeCache([None] * config.num_hidden_layers, rows, longest + QUERIES)
    cache.reserve(longest + QUERIES)
    like = torch.empty(rows, config.num_key_value_heads, 1, config.head_dim, device=run.device, dtype=run.dtype)
    for layer in cache.layers:
        layer.lazy_initialization(like, like)
        layer.keys.normal_()
        layer.values.normal_()
    selector = FixedSelector(rows, VegasConfig(min_tokens=16).budget, SCORED, longest=longest, device=run.device)
    view = FixedView(cache, selector, 2 * QUERIES - 1)
    runner = make_runner(mode, model, cache, longest, widths=[1, QUERIES])
    tokens = torch.randint(config.vocab_size, (rows, QUERIES), device=run.device)
    one, starts = tokens[:, :1], [context - 1] * rows

    def draft() -> Any:
        view.place([context] * rows)
        return runner.forward(one, [context] * rows, ForwardRequest(view=view))

    forwards: dict[str, Callable[[], Any]] = {
        "verification, scored": lambda: runner.forward(tokens, starts, ForwardRequest(view)),
        "verification": lambda: runner.forward(tokens, starts),
        "draft step": draft,
        "plain step": lambda: runner.forward(one, starts),
    }
    register()
    with torch.no_grad():
        _linear_layers(run, model, rows)
        for what, call in (("first forward", runner.forward), ("captures of a round", runner.warm_up)):
            started = time.perf_counter()
            call(one, starts, ForwardRequest(view))
            run.wait()
            run.note(what, seconds=time.perf_counter() - started, **note)
        for name, forward in forwards.items():
            run.note(name, ms=run.timed(forward, cold=False), **note)
            count = 2 if run.tiny else 12
            started = time.perf_counter()
            for _ in range(count):
                forward()
            host = time.perf_counter() - started
            run.note(f"{name}: the host's part", ms=1000 * host / count, **note)
            _list_kernels(run, name, forward)
        _selection(run, view, cache, rows, context)
        plain = make_runner(None, model, cache, longest, widths=[1])
        run.note("plain step, uncaptured", ms=run.timed(lambda: plain.forward(one, starts), cold=False), **note)
    runner.close()


def _linear_layers(run: StageRun, model: PreTrainedModel, rows: int) -> None:
    """Time the model's matrix products alone, for a draft step and a verification: a floor that can be reached."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]

    def multiply(inputs: dict[int, torch.Tensor]) -> None:
        for layer in layers:
            layer(inputs[layer.in_features])

    for tokens in (rows, rows * QUERIES):
        inputs = {
            m.in_features: torch.randn(tokens, m.in_features, device=run.device, dtype=run.dtype) for m in layers
        }
        ms = run.timed(partial(multiply, inputs), cold=False)
        rate = weight_bytes(model)[1] / ms / 1e6
        run.note("linear layers alone", tokens=tokens, ms=ms, gb_per_second=rate, copy_share=rate / run.bandwidth)


def _list_kernels(run: StageRun, name: str, forward: Callable[[], Any]) -> None:
    """Count and time the kernels of one forward, by name."""
    if run.device.type != "cuda":
        return
    run.wait()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        forward()
        run.wait()
    found = [(event.self_device_time_total, event.count, event.key[:90]) for event in profile.key_averages()]
    found = sorted((entry for entry in found if entry[0]), reverse=True)
    busy, count = (sum(entry[i] for entry in found) for i in (0, 1))
    run.note(f"{name}: kernels", busy_ms=busy / 1000, count=count, top=found[:40])


def _selection(run: StageRun, view: FixedView, cache: SpeculativeCache, rows: int, context: int) -> None:
    """Time the parts of a selection: the choice, sorted or not, and the gather, by score or in the text's order."""
    from hf_specdec.kernels import triton_select  # triton is optional

    metrics = torch.rand(len(view.layers), rows, context, device=run.device)
    run.note("choice", ms=run.timed(partial(view.selector.choose, metrics), cold=False), shape=list(metrics.shape))
    for ordered in (True, False):
        ms = run.timed(partial(metrics.topk, view.selected, sorted=ordered), cold=False)
        run.note("its topk", sorted=ordered, ms=ms, chosen=view.selected)
    best = view.selector.choose(metrics)
    sources = [states[:rows] for layer in cache.layers for states in (layer.keys, layer.values)]
    targets = [side for index in view.layers for side in (view.keys[index], view.values[index])]
    heads, table = sources[0].shape[1], triton_select.addresses(sources, targets)
    for name, index in (("by score", best), ("in the text's order", best.sort().values)):
        gather = partial(triton_select.gather_layers, sources, targets, index, heads=heads, table=table)
        ms = run.timed(gather, cold=False)
        moved = 2 * 2 * index.numel() * sources[0][0, :, 0].numel() * run.dtype.itemsize  # read and written
        run.note(
            "gather", order=name, ms=ms, gb_per_second=moved / ms / 1e6, copy_share=moved / ms / 1e6 / run.bandwidth
        )
