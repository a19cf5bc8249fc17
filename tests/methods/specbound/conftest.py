"""Fixtures of the tests of SpecBound."""

from __future__ import annotations

import pytest
import torch
from specbound_cases import bounded, ours, random_heads, tower

from hf_specdec import SpecBoundConfig


@pytest.fixture
def llama():
    return tower()


@pytest.fixture(scope="session")
def adapter(tmp_path_factory):
    """Return a function that saves random heads for a model, once, and gives their folder."""
    folders = {}

    def save(model, kind, layers=(2, 3, 5), words=None, rank=None, **settings):
        key = (id(model), kind, tuple(layers), words, rank)
        if key not in folders:
            folder = tmp_path_factory.mktemp("heads")
            # a part of the words, of which some texts lack a few
            chosen = None if words is None else torch.arange(0, model.config.vocab_size, 1)[:-words]
            heads = random_heads(model, list(layers), kind, chosen, rank)
            heads.save(folder, SpecBoundConfig(**settings), model)
            folders[key] = str(folder)
        return folders[key]

    return save


@pytest.fixture
def warm(llama):
    """The deep Llama after a first call."""
    ours(llama, bounded(), max_new_tokens=2)
    return llama
