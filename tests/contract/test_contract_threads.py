"""The contract under threads: stock and every strategy on one model at once, in random order."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from families import ROOT
from tiers import tiered


@pytest.mark.parametrize(
    "family, calls", tiered([("llama", 400), ("gemma3", 400), ("gpt_oss", 200)], [("llama", 400)])
)
def test_random_calls_from_four_threads(family, calls, tmp_path):
    command = [sys.executable, str(ROOT / "tests/tools/soak_threads.py"), "--calls", str(calls), "--family", family]
    subprocess.run([*command, "--json", str(tmp_path / "out.json")], check=True, cwd=ROOT, timeout=800)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["totals"] == {"same text": calls} and len(found["by_strategy"]) == 8
