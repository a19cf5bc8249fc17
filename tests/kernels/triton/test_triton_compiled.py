"""The Triton kernels compile and fit for two GPU generations, which needs no GPU.

Run as a program, the file compiles them for the one that is named.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from hf_specdec.kernels import triton_attention as attention
from hf_specdec.kernels import triton_select as select


pytestmark = pytest.mark.full


# compiled for GPUs that need not be there


def compile_kernels(arch):
    """Compile what the public functions launch, without launching it, and print one line per kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def record(kernel, *args, **options):
        made = run(kernel, *args, **options | {"warmup": True})
        line = {"case": case, "arch": arch, "kernel": kernel.__name__, "shared": made.metadata.shared}
        print(json.dumps(line | {"cubin": len(made.asm["cubin"])}))

    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", arch, 32),
        )
    )
    JITFunction.run = record
    attention.lacks = lambda *_: None  # the tensors are on the CPU, and nothing is launched
    select.INTERPRETED = True
    for case in VARIANTS:
        launch(**VARIANTS[case])


def launch(dtype, d, m, splits=1, side=False, export=False, **rules):
    attention.choose_splits = lambda *_: splits
    query, key = torch.zeros(2, 16, m, d, dtype=dtype), torch.zeros(2, 2, 128, d, dtype=dtype)
    row = torch.zeros(2, dtype=torch.int64)
    if "sinks" in rules:
        rules["sinks"] = torch.zeros(16, dtype=dtype)
    if side:
        attention.attend_side(query, key, key, row, row, selected=100, scaling=0.1, **rules)
        return
    last = row if export else None
    _, scores = attention.attend_cache(query, key, key, row, longest=128, scaling=0.1, last=last, **rules)
    if scores is not None:
        rules = {"scaling": 0.1, "window": rules.get("window"), "softcap": rules.get("softcap")}
        select.token_scores(scores, row, row, length=128, key_heads=2, **rules)
        select.gather_layers([key] * 2, [key] * 2, row.expand(1, 2, 2), heads=2)


VARIANTS = {
    "verification": {"dtype": torch.bfloat16, "d": 128, "m": 6, "splits": 16, "export": True},
    "draft": {"dtype": torch.bfloat16, "d": 64, "m": 1, "side": True, "sinks": True},
    "long prompt": {"dtype": torch.float16, "d": 80, "m": 64, "window": 64},
    "large head": {
        "dtype": torch.float16,
        "d": 256,
        "m": 17,
        "splits": 2,
        "export": True,
        "softcap": 2.0,
        "window": 64,
    },
    "float32": {"dtype": torch.float32, "d": 256, "m": 6, "splits": 2, "export": True},
}
SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that one program may use, by architecture."""


@pytest.mark.slow
def test_kernels_compile_and_fit(tmp_path):
    pytest.importorskip("triton.backends.nvidia")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment}
    runs = [subprocess.Popen([sys.executable, __file__, str(arch)], **pipes) for arch in SHARED]
    lines = []
    for run in runs:
        printed, errors = run.communicate()
        assert run.returncode == 0, errors.decode()
        lines += [json.loads(line) for line in printed.splitlines()]
    kernels = {(line["case"], line["arch"], line["kernel"]) for line in lines}
    assert len({(case, arch) for case, arch, kernel in kernels if kernel == "_attend"}) == 2 * len(VARIANTS)
    assert {kernel for _, _, kernel in kernels} == {"_attend", "_combine", "_reduce", "_gather"}
    for line in lines:
        assert line["cubin"] > 0 and line["shared"] <= SHARED[line["arch"]], line


if __name__ == "__main__":
    compile_kernels(int(sys.argv[1]))
