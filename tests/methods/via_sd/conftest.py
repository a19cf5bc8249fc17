"""Fixtures of the tests of VIA-SD."""

from __future__ import annotations

import families
import pytest
import torch
from via_sd_cases import LAYERS, SKIP, VOCAB, weaken


@pytest.fixture(scope="module")
def pair():
    """A target whose layers 2 and 3 matter less than the others, and a noisy copy of it."""
    target = weaken(families.build("Llama", num_hidden_layers=LAYERS), SKIP, 0.2)
    return target, families.perturbed(target, 0.04)


@pytest.fixture(scope="module")
def prompt():
    return families.prompts((14,))[0]


@pytest.fixture(scope="module")
def tiny():
    """A target of 5 layers over four words, a rather different drafter, and a prompt."""
    shape = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 5, "initializer_range": 0.25}
    target = weaken(families.build("Llama", seed=4, **shape), (2, 3), 0.9)
    models = target, families.perturbed(target, 0.8, seed=3)
    for model in models:
        model.generation_config.pad_token_id = None
    return models, torch.tensor([[2, 1, 0, 3, 3, 1, 2]])
