"""Fixtures of the tests of Vegas."""

from __future__ import annotations

import pytest
from vegas_cases import build


@pytest.fixture(scope="module")
def llama():
    return build()
