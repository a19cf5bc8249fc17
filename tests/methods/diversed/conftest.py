"""Fixtures of the tests of DIVERSED."""

from __future__ import annotations

import pytest
import torch
from diversed_cases import random_head

from hf_specdec import DiversedConfig


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Return a function that saves a head for a pair and gives its folder."""

    def save(models, head=None):
        folder = tmp_path_factory.mktemp("head")
        (head or random_head(models)).save(folder, DiversedConfig(), models[1], models[0])
        return str(folder)

    return save


@pytest.fixture(scope="module")
def distributions_of_eight():
    generator = torch.Generator().manual_seed(7)
    return [torch.softmax(1.5 * torch.randn(8, generator=generator), dim=0) for _ in range(2)]
