"""Session-wide settings: offline, one thread, fixed seeds; and the fixtures that build the tiny models."""

from __future__ import annotations

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch


if not torch.cuda.is_available():  # before triton is imported, which reads it then
    os.environ.setdefault("TRITON_INTERPRET", "1")

import families
import pytest

from hf_specdec.generation.methods.spd import method as spd
from hf_specdec.generation.methods.via_sd import slim_drafter


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def named_adapters():
    """Adapters with a name of `families` are no files: a noisy copy of the model guesses for SPD, VIA-SD has masks."""
    patch = pytest.MonkeyPatch()
    patch.setattr(spd, "load_draft_module", families.load_oracle)
    patch.setattr(slim_drafter, "load_slim", families.load_mask)
    yield
    patch.undo()


@pytest.fixture
def llama() -> families.Family:
    return families.family("llama")
