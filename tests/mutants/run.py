"""Apply the mutants of `mutant_list.py`, one at a time, and say which tests find them.

    python tests/mutants/run.py                     # all of them
    python tests/mutants/run.py residual cache      # those with one of these words in their name or file
    python tests/mutants/run.py --jobs 4 --json mutants.json

Each mutant is a copy of the package in a temporary folder, which is imported in place of the repository's, so the
repository is never changed. The tests of the mutant's module run first, then the contract on one family, both as in
`make test`; what survives meets the tests that `make test-all` has beyond that. The first failure ends a mutant, if
the same test passes on the package as it is.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from mutant_list import MUTANTS, Mutant


ROOT = Path(__file__).resolve().parents[2]
LIMIT = 900
"""Seconds for one run of pytest."""
HANGS = 120
"""Seconds for one test: a mutant may never end."""


@dataclass
class Outcome:
    """What became of a mutant: who found it ("make test", "make test-all" or nobody), by which test, in how long."""

    name: str
    file: str
    found_by: str
    test: str
    seconds: float


def apply(mutant: Mutant, package: Path) -> None:
    """Change the copy of the package at `package`."""
    path = package / mutant.file
    text = path.read_text(encoding="utf-8")
    count = text.count(mutant.old)
    if count != 1:
        raise ValueError(f"{mutant.name!r}: {mutant.file} has its text {count} times, and it must be there once.")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")


def runs(mutant: Mutant) -> list[tuple[str, list[str]]]:
    """Return who runs what: arguments of pytest, in order."""
    module = [str(ROOT / "tests" / path) for path in mutant.tests]
    contract = str(ROOT / "tests" / "contract")
    asked = " or ".join(f"{name.replace(':', ' and ')}" for name in mutant.strategies)
    one_family = f"({asked}) and not gemma3 and not gpt2"
    return [
        ("make test", [*module, "-m", "not full"]),
        ("make test", [contract, "-m", "not full", "-k", one_family]),
        ("make test-all", [*module, "-m", "full and not real"]),
        ("make test-all", [contract, "-m", "full", "-k", f"({asked})"]),
    ]


def pytest(folder: Path, arguments: list[str]) -> tuple[int, str]:
    """Run pytest on the package in `folder`, to the first failure; return its exit code and output."""
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "--timeout", str(HANGS), "--tb", "line"]
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}"]
    command += [*options, *arguments]
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return 1, "FAILED (no end)"
    return done.returncode, done.stdout + done.stderr


def check_import(folder: Path) -> None:
    """Make sure that tests in `folder` import the package that lies there."""
    code = "from importlib.util import find_spec; print(find_spec('hf_specdec').origin)"
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout
    if not Path(found.strip()).is_relative_to(folder):
        raise RuntimeError(f"The tests would import {found.strip()}, and not the copy in {folder}.")


def judge(mutant: Mutant) -> Outcome:
    """Apply a mutant to a copy of the package, and run the tests until one fails."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name).resolve()
        shutil.copytree(ROOT / "hf_specdec", folder / "hf_specdec", ignore=shutil.ignore_patterns("__pycache__"))
        apply(mutant, folder / "hf_specdec")
        check_import(folder)
        for tier, arguments in runs(mutant):
            code, output = pytest(folder, arguments)
            if code == 1:
                failed = re.search(r"^(?:FAILED|ERROR) (?:\S*tests/)?(.*)$", output, re.MULTILINE)
                if not failed:
                    return Outcome(mutant.name, mutant.file, tier, "no end", time.monotonic() - start)
                test = failed[1].split(" - ")[0]
                code, output = pytest(ROOT, [f"{ROOT}/tests/{test}"])
                if code:
                    raise RuntimeError(f"{test} ends with {code} on the package as it is.\n{output[-3000:]}")
                return Outcome(mutant.name, mutant.file, tier, test, time.monotonic() - start)
            if code not in (0, 5):  # 5: nothing was selected
                raise RuntimeError(f"{mutant.name!r}: pytest ended with {code}.\n{output[-3000:]}")
    return Outcome(mutant.name, mutant.file, "nobody", "", time.monotonic() - start)


def table(outcomes: list[Outcome]) -> str:
    """Return the outcomes as a Markdown table."""
    lines = ["| mutant | file | found by | seconds | by the test |", "| --- | --- | --- | --- | --- |"]
    for one in outcomes:
        test = f"`{one.test}`" if one.test else ""
        lines.append(f"| {one.name} | `{one.file}` | {one.found_by} | {one.seconds:.0f} | {test} |")
    return "\n".join(lines)


def main() -> int:
    """Run what the command line asks for; fail where nobody found a mutant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="words in the names or files of the mutants to run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutants at the same time")
    parser.add_argument("--json", type=Path, help="a file for the outcomes")
    arguments = parser.parse_args()
    chosen = [one for one in MUTANTS if not arguments.words or any(w in one.name + one.file for w in arguments.words)]
    start, outcomes = time.monotonic(), []
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        try:
            for outcome in pool.map(judge, chosen):
                outcomes.append(outcome)
                print(f"{len(outcomes)}/{len(chosen)} {outcome}", file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    counts = {tier: sum(one.found_by == tier for one in outcomes) for tier in ("make test", "make test-all", "nobody")}
    print(table(outcomes))
    print(f"\n{len(outcomes)} mutants in {time.monotonic() - start:.0f} s, found by {counts}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(one) for one in outcomes], indent=1) + "\n", encoding="utf-8")
    return int(counts["nobody"] > 0)


if __name__ == "__main__":
    sys.exit(main())
