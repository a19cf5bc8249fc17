"""Fixtures of the tests of the Triton kernels."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def kernels_run():
    """Fail with the reason where neither a GPU nor the interpreter can run the kernels."""
    import triton
    from triton_cases import CUDA

    from hf_specdec.kernels import triton_attention as attention

    late = isinstance(triton.language.cdiv, triton.runtime.JITFunction)
    if not CUDA and (late or not attention.INTERPRETED):
        pytest.fail("triton was imported before TRITON_INTERPRET=1 was set; conftest.py must set it", pytrace=False)
