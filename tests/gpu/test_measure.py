"""The measurement of a GPU, rehearsed on the CPU: every stage runs, and what goes wrong in one is written down."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import measure as gpu
import pytest
import torch
from kernel_stages import tuned
from stage_run import StageRun


EXPECTED = {
    "machine": {"environment", "copy"},
    "precompile": {"compiled ahead"},
    "correct": {"1 queries, 64, torch.float32", "7 queries, 64, torch.float32"},
    "attention": {"verify 7 at 64, 2 rows", "reduce 7 at 64, 2 rows", "packed and unmasked, by PyTorch"},
    "sweep": {"best of draft 1 at 96, 2 rows", "best of export 7 at 96, 2 rows"},
    "loop": {"default", "vegas@compile=graphs,min_context=0"},
    "smollm2": {"default", "vegas@min_context=0"},
    "waits": {"greedy", "sampling"},
    "leak": set(),
}
STEPS = {"linear layers alone", "draft step", "verification, scored", "plain step, uncaptured", "choice", "gather"}
EXPECTED |= dict.fromkeys(["steps", "steps_small", "compiled"], STEPS)


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.full
@pytest.mark.slow
def test_every_stage_can_be_rehearsed_on_a_cpu(tmp_path):
    """As the command of a process of its own, in which Triton interprets its kernels."""
    pytest.importorskip("triton")
    command = [sys.executable, gpu.__file__, "--rehearse", "--out", str(tmp_path)]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = lines(tmp_path)
    assert found[-1]["what"] == "done" and found[-1]["failed"] == []
    assert set(gpu.STAGES) == set(EXPECTED)
    for stage, expected in EXPECTED.items():
        whats = {line["what"] for line in found if line["stage"] == stage}
        assert expected | {"stage took"} <= whats, stage
    assert [line["failed"] for line in found if line["what"] == "compiled ahead"] == [[]]
    assert all(line["ok"] for line in found if line["stage"] == "correct" and "ok" in line)
    assert all(line["relative_error"] < 1e-5 for line in found if line.get("implementation") == "triton")
    assert not any("error" in line for line in found if line["stage"] == "sweep")


def test_a_stage_that_raises_does_not_stop_the_next(tmp_path):
    def broken(run):
        raise ValueError("no such kernel")

    run = StageRun(tmp_path, budget=100.0, tiny=True)
    run.run("first", broken, 1.0)
    run.run("second", lambda run: run.note("it ran", ms=1.5), 1.0)
    run.run("third", lambda run: pytest.fail("no time is left for it"), 1000.0)
    assert run.failed == ["first"]
    found = [(line["stage"], line["what"]) for line in lines(tmp_path)]
    assert ("first", "FAILED") in found and ("second", "it ran") in found
    assert ("third", "left out: too little time") in found and ("third", "stage took") not in found
    assert "ValueError: no such kernel" in (tmp_path / "tracebacks.txt").read_text(encoding="utf-8")


def test_a_tile_holds_inside_its_context_only():
    attention = pytest.importorskip("hf_specdec.kernels.triton_attention")
    before = attention.tile(28, 128, 128, 2), attention.choose_splits(8, 32768, 132)
    with pytest.raises(KeyError), tuned((32, 8, 2), 16):
        assert attention.tile(28, 128, 128, 2) == (32, 32, 8, 2)
        assert attention.choose_splits(8, 32768, 132) == 16
        raise KeyError
    assert before == (attention.tile(28, 128, 128, 2), attention.choose_splits(8, 32768, 132))


def test_a_wrong_command_says_what_is_allowed(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--rehearse", "--stages", "steps,stpes"])
    assert "`--stages` takes machine, precompile" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            gpu.main(["--out", str(tmp_path), "--stages", "steps"])
        assert "PyTorch sees no CUDA device" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
