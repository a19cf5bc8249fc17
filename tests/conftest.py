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
    for module, name, stand_in in families.STAND_INS:
        patch.setattr(module, name, stand_in)
    yield
    patch.undo()


@pytest.fixture
def llama() -> families.Family:
    return families.family("llama")
