"""The scripts of examples/distributed, run as their users would."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from families import ROOT, TINY


SCRIPTS = ROOT / "examples" / "distributed"
PROMPTS = 14

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        not SCRIPTS.is_dir() or not torch.distributed.is_available(), reason="without examples or torch.distributed"
    ),
]


def start(script: str, processes: int, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [*command, str(SCRIPTS / script), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill(run: subprocess.Popen) -> None:
    """Kill the launcher, and its processes, which would outlive it."""
    processes = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    run.wait()
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=60)


def wait_for_answers(parts: Path, number: int) -> None:
    """Wait until a run has written so many answers."""
    end = time.monotonic() + 100
    while time.monotonic() < end and sum(p.read_text().count("\n") for p in parts.glob("*.jsonl")) < number:
        time.sleep(0.01)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a folder with the tiny trained model and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    for path in [*(TINY / "target").iterdir(), *TINY.glob("tokenizer*")]:
        shutil.copy(path, folder)
    return str(folder)


@pytest.mark.slow
def test_a_folder_of_prompts_survives_a_kill(model, tmp_path):
    """Killed in the middle and run again with more processes: nothing lost, nothing twice, as in one run."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    text = (TINY / "heldout.txt").read_text(encoding="utf-8")
    (folder / "one.txt").write_text(text[:200], encoding="utf-8")
    lines = [json.dumps({"prompt": text[500 * i : 500 * i + 150]}) for i in range(1, PROMPTS)]
    (folder / "more.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    arguments = ["--model", model, "--strategy", "plain", "--new-tokens", "24"]
    whole = start("generate_folder.py", 1, str(folder), str(tmp_path / "whole.jsonl"), *arguments)
    assert whole.wait(timeout=200) == 0, whole.stdout.read()

    out, parts = tmp_path / "out.jsonl", tmp_path / "out.parts"
    run = start("generate_folder.py", 1, str(folder), str(out), *arguments)
    wait_for_answers(parts, 3)
    kill(run)
    part = parts / "0.jsonl"
    done = part.read_text(encoding="utf-8").splitlines()
    assert 3 <= len(done) < PROMPTS, "the run was to be killed in the middle"
    assert not out.exists()
    with part.open("a", encoding="utf-8") as file:
        file.write('{"name": "more.jsonl:9", "ans')  # as a kill in the middle of a line leaves it

    again = start("generate_folder.py", 2, str(folder), str(out), *arguments)
    assert again.wait(timeout=200) == 0, again.stdout.read()
    assert out.read_text() == (tmp_path / "whole.jsonl").read_text()
    names = [json.loads(line)["name"] for line in out.read_text().splitlines()]
    assert names == ["one.txt", *(f"more.jsonl:{i}" for i in range(1, PROMPTS))]
    assert (parts / "1.jsonl").exists(), "the second process had no share"
    written = [line for path in parts.glob("*.jsonl") for line in path.read_text().splitlines()]
    finished = [line for line in written if line.endswith("}")]
    assert len(finished) == PROMPTS, "an answer was made twice"
    assert {json.loads(line)["name"] for line in finished} == set(names)

    # one prompt more than before, and two processes: one of them has nothing to do
    (folder / "zz.txt").write_text(text[-150:], encoding="utf-8")
    more = start("generate_folder.py", 2, str(folder), str(out), *arguments)
    assert more.wait(timeout=200) == 0, more.stdout.read()
    written = [line for path in parts.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert sum(line.endswith("}") for line in written) == PROMPTS + 1, "an answer was made twice"
    assert len(out.read_text().splitlines()) == PROMPTS + 1


@pytest.mark.slow
def test_a_process_that_outlived_its_launcher_keeps_the_next_run_away(model, tmp_path):
    """What it still writes would be made twice: the next run says so, and writes nothing."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    text = (TINY / "heldout.txt").read_text(encoding="utf-8")
    lines = [json.dumps({"text": text[100 * i : 100 * i + 150]}) for i in range(200)]
    (folder / "many.jsonl").write_text("\n".join(lines), encoding="utf-8")
    out, parts = tmp_path / "out.jsonl", tmp_path / "out.parts"
    arguments = [str(folder), str(out), "--model", model, "--strategy", "plain", "--new-tokens", "24"]
    run = start("generate_folder.py", 1, *arguments)
    wait_for_answers(parts, 1)
    left = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    try:
        for process in left:
            process.suspend()
        written = (parts / "0.jsonl").read_text(encoding="utf-8")
        again = start("generate_folder.py", 2, *arguments)
        message = " ".join(again.communicate(timeout=200)[0].replace("│", " ").split())
        assert again.returncode != 0
        assert "another run still writes to" in message
        assert (parts / "0.jsonl").read_text(encoding="utf-8") == written and not out.exists()
    finally:
        for process in left:
            process.kill()
