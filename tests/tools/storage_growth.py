"""What storage takes of a text while it is decoded under a large budget, and what growing it costs.

python tests/tools/storage_growth.py
"""

from __future__ import annotations

import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_specdec  # noqa: F401 (installs the keyword)
from hf_specdec.cache.speculative import SpeculativeCache


BUDGET = 32768


def shares(coarse: bool) -> list[tuple[int, float]]:
    """Return, for texts of some lengths, slots allocated over tokens cached when plain decoding has ended there."""
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlamaConfig(**shape, num_attention_heads=2, max_position_embeddings=2 * BUDGET)
    model = LlamaForCausalLM(config).eval()
    found, reserve = [], SpeculativeCache.reserve
    caches: list[SpeculativeCache] = []

    def noting(cache, slots):
        cache.coarse = coarse
        caches.append(cache)
        reserve(cache, slots)

    SpeculativeCache.reserve = noting
    for length in (20, 200, 2000, 10000):
        ends = [lambda ids, _, length=length: torch.tensor([ids.shape[1] >= length])]
        options = {"max_new_tokens": BUDGET, "stopping_criteria": ends, "eos_token_id": None, "pad_token_id": 0}
        model.generate(torch.arange(3, 17)[None], assistant_strategy="plain", do_sample=False, **options)
        found.append((length, caches[-1].layers[0].keys.shape[2] / length))
    SpeculativeCache.reserve = reserve
    return found


def growth(rows: int, tokens: int = 8000) -> tuple[int, float]:
    """Return how often a cache like SmolLM2-135M's grows, one token at a time, and the milliseconds of it all."""
    cache = SpeculativeCache([None] * 30, rows, BUDGET)
    cache.reserve(14)
    like = torch.zeros(rows, 3, 1, 64, dtype=torch.bfloat16)
    for layer in cache.layers:
        layer.lazy_initialization(like, like)
    times, seconds = 0, 0.0
    for slots in range(15, tokens + 1):
        before, started = cache.layers[0].capacity, time.perf_counter()
        cache.reserve(slots)
        seconds += time.perf_counter() - started
        times += cache.layers[0].capacity != before
    return times, 1000 * seconds


if __name__ == "__main__":
    torch.set_num_threads(1)
    for coarse in (False, True):
        print("coarse" if coarse else "fine", *(f"{length}: {share:.2f}" for length, share in shares(coarse)))
    for rows in (1, 4):
        times, ms = growth(rows)
        print(f"{rows} rows to 8000 tokens: grown {times} times in {ms:.0f} ms, calls included")
