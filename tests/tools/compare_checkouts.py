"""Is a checkout as fast as another? Both decode in turn, each in a process of its own, and the ratios are printed.

    python tests/tools/compare_checkouts.py OLD NEW --context 64,4000 --strategies "plain vegas" --json out.json

OLD and NEW are folders of two checkouts. Both run in this environment, on SmolLM2-135M-Instruct in bf16 and the same
prompts; the order alternates from repeat to repeat, so that a slow minute of the machine meets both.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any


def serve() -> None:
    """Answer requests on standard input, a JSON object a line: milliseconds per token of one decoding."""
    import torch

    from hf_specdec.bench.run import make_arm, measure, prefill
    from hf_specdec.bench.smollm2 import load_smollm2

    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else prints must not answer
    model, tokenizer = load_smollm2(torch.bfloat16, "cpu")
    text = " ".join(f"The number {i} comes after {i - 1}, and a verse of the poem is read aloud." for i in range(400))
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    caches: dict[int, Any] = {}
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        prompt = ids[:, : request["context"]]
        if request["context"] not in caches:
            caches[request["context"]] = prefill(model, prompt)[0]
        arms, cache = [make_arm(request["strategy"], None)], caches[request["context"]]
        found = measure(model, prompt, arms, request["new_tokens"], 1, warm_up=False, cache=cache)[0]
        print(json.dumps(found.ms_per_token), file=answers, flush=True)


class Checkout:
    """A process that decodes with the package in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--serve"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder.resolve())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.answer()

    def answer(self) -> Any:
        """Return the next answer; raise `RuntimeError` if the process has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"The process in {self.folder} ended with status {self.process.wait()}.")
        return json.loads(line)

    def ask(self, **request: Any) -> float:
        """Return the milliseconds per token of one decoding."""
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer: float = self.answer()
        return answer


def commit(folder: Path) -> str:
    """Return the commit of a checkout."""
    return subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Compare two checkouts and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="folder of the checkout to compare with")
    parser.add_argument("new", type=Path, help="folder of the checkout in question")
    parser.add_argument("--context", default="64,4000", help="tokens per prompt, separated by commas")
    parser.add_argument("--strategies", default="plain vegas", help="separated by spaces")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens of a decoding")
    parser.add_argument("--repeats", type=int, default=7, help="decodings of each")
    parser.add_argument("--json", type=Path, help="file for the measurements")
    options = parser.parse_args()
    pair = {"old": Checkout(options.old), "new": Checkout(options.new)}
    rows = []
    for context in map(int, options.context.split(",")):
        for strategy in options.strategies.split():
            request = {"context": context, "strategy": strategy, "new_tokens": options.new_tokens}
            found: dict[str, list[float]] = {name: [] for name in pair}
            for repeat in range(options.repeats + 1):
                for name in list(pair)[:: 1 if repeat % 2 else -1]:
                    ms = pair[name].ask(**request)
                    if repeat:  # the first one warms up
                        found[name].append(ms)
            ratios = [old / new for old, new in zip(found["old"], found["new"], strict=True)]
            rows.append({**request, "ms_per_token": found, "ratio": statistics.median(ratios), "ratios": ratios})
            print(
                f"{strategy:8} {context:5} tokens: old {statistics.median(found['old']):6.1f} ms, new "
                f"{statistics.median(found['new']):6.1f} ms, old / new {statistics.median(ratios):.3f} "
                f"({min(ratios):.3f} to {max(ratios):.3f})",
                flush=True,
            )
    if options.json is not None:
        commits = {"old": commit(options.old), "new": commit(options.new)}
        command = shlex.join(["python", *sys.argv])
        options.json.write_text(json.dumps({"command": command, "commits": commits, "measurements": rows}, indent=1))


if __name__ == "__main__":
    if "--serve" in sys.argv:
        serve()
    else:
        main()
