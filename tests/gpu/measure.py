"""One GPU, a few minutes: are the kernels right, and the numbers that say what to make faster.

    python tests/gpu/measure.py --out FOLDER --budget 140 --stages machine,precompile,correct,attention,sweep
    python tests/gpu/measure.py --out FOLDER --budget 230 --stages machine,steps,steps_small,compiled,loop
    python tests/gpu/measure.py --out FOLDER --budget 150 --stages smollm2,waits,leak
    TRITON_INTERPRET=1 python tests/gpu/measure.py --out FOLDER --rehearse     # on a CPU, to try the script itself

Nothing beyond the package, its dependencies and Triton is needed; where the package is not installed, set
`PYTHONPATH=.`. Each result is a line of `results.jsonl` in the folder, written as soon as it is there. A stage that
raises leaves its traceback, and the next one runs. A stage that does not fit the rest of the budget is left out, and
this is written, too.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import call_stages
import kernel_stages
import step_stages
import torch
from stage_run import StageRun

from hf_specdec.bench.run import environment
from hf_specdec.generation import programs


def machine(run: StageRun) -> None:
    """Say what this machine is, and how fast it copies."""
    found = environment()
    found |= {name: importlib.util.find_spec(name) is not None for name in ("triton", "flash_attn", "gguf")}
    if run.device.type == "cuda":
        device = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        found |= {"processors": device.multi_processor_count, "l2_mb": device.L2_cache_size / 2**20}
        found |= {"free_gb": free / 1e9, "total_gb": total / 1e9}
        query = "clocks.sm,clocks.mem,clocks_event_reasons.active,power.draw,driver_version"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        found["nvidia_smi"] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    run.note("environment", **found)
    run.note("copy", gb_per_second=run.bandwidth)


# by name: what runs, and the seconds that it takes at most on an H100, by estimate
STAGES: dict[str, tuple[Callable[[StageRun], None], float]] = {
    "machine": (machine, 15),
    "precompile": (kernel_stages.precompile, 35),
    "correct": (kernel_stages.correct, 45),
    "attention": (kernel_stages.attention, 40),
    "sweep": (kernel_stages.sweep, 40),
    "steps": (step_stages.steps, 60),
    "steps_small": (step_stages.steps_small, 40),
    "compiled": (step_stages.compiled, 120),
    "loop": (call_stages.loop, 60),
    "smollm2": (call_stages.smollm2, 70),
    "waits": (call_stages.waits, 30),
    "leak": (call_stages.leak, 25),
}


def rerun(run: programs.Run, rehearse: Callable[[programs.Run], None]) -> tuple[programs.Forward, Callable[[], None]]:
    """Stand in for a capture on the CPU, by running the forward again; as `programs.CudaRecorder`."""
    rehearse(run)
    result = run()

    def again() -> None:
        for old, new in zip(result, run(), strict=True):
            if old is not None and new is not None:
                old.copy_(new)

    return result, again


@contextmanager
def _rehearsal() -> Iterator[None]:
    """Let forwards on the CPU be "captured" inside the context."""
    programs.RECORDERS["cpu"] = lambda device: rerun
    try:
        yield
    finally:
        del programs.RECORDERS["cpu"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages that `arguments` (by default those of the command line) name; return 1 if one failed, else 0."""
    parser = argparse.ArgumentParser(prog="python tests/gpu/measure.py", description="Measure one GPU in minutes.")
    parser.add_argument("--out", required=True, type=Path, help="folder for the results")
    parser.add_argument("--stages", default=",".join(STAGES), help="separated by commas; by default %(default)s")
    parser.add_argument("--budget", type=float, default=560.0, help="seconds that all stages may take (%(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="run tiny sizes on the CPU, to try the script itself")
    options = parser.parse_args(arguments)
    names: list[str] = options.stages.split(",")
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        parser.error(f"`--stages` takes {', '.join(STAGES)}, got {', '.join(unknown)}")
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device; `--rehearse` runs tiny sizes on the CPU")
    run = StageRun(options.out, options.budget, options.rehearse)
    context: Any = _rehearsal() if options.rehearse else nullcontext()
    with context:
        for name in names:
            run.run(name, *STAGES[name])
    run.stage = "end"
    run.note("done", failed=run.failed, left=run.left)
    return 1 if run.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
