"""Stock and strategies on one model from several threads at once: no error, no other text.

    python tests/tools/soak_threads.py --calls 10000 --threads 4 --json out.json

Every thread draws calls at random: a strategy or none, one of eight prompts (one row or several, padded), a number of
new tokens. What stock writes is computed beforehand. It ends with 1 if any call raised or wrote anything else.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import families


STRATEGIES = ("stock", "plain", "prompt_lookup", "assisted", "vegas", "specbound", "via_sd", "diversed")
LENGTHS = ((9,), (25,), (60,), (3,), (9, 9), (19, 3, 12, 7), (5, 30), (14, 14, 2))
TOKENS = (1, 4, 12)


class Soak:
    """Random calls on one model, counted."""

    def __init__(self, name: str) -> None:
        self.family = families.family(name)
        texts = [families.prompts(lengths, seed=seed) for seed, lengths in enumerate(LENGTHS)]
        self.inputs = [{"input_ids": ids, "attention_mask": mask} for ids, mask in texts]
        self.expected = {
            (place, tokens): self.family.stock(**inputs, max_new_tokens=tokens)
            for place, inputs in enumerate(self.inputs)
            for tokens in TOKENS
        }
        self.counts: dict[str, Counter[str]] = {name: Counter() for name in STRATEGIES}
        self.errors: Counter[str] = Counter()
        self.lock = threading.Lock()

    def call(self, chance: random.Random) -> None:
        """Make one call and count how it ended."""
        strategy, place, tokens = chance.choice(STRATEGIES), chance.randrange(len(self.inputs)), chance.choice(TOKENS)
        run: Any = self.family.stock
        if strategy != "stock":
            run = lambda **kwargs: self.family.ours(strategy, **kwargs)  # noqa: E731
        try:
            found = run(**self.inputs[place], max_new_tokens=tokens)
            ended = "same text" if torch.equal(found, self.expected[place, tokens]) else "other text"
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what we look for
            ended = "raised"
            with self.lock:
                self.errors[f"{strategy}: {type(error).__name__}: {error}"[:200]] += 1
        with self.lock:
            self.counts[strategy][ended] += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10000)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--family", default="llama", choices=families.NAMES)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    from unittest import mock

    with mock.patch.multiple(families.slim_drafter, load_slim=families.load_mask):
        soak, started = Soak(arguments.family), time.perf_counter()

        def work(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(arguments.calls // arguments.threads):
                soak.call(chance)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(arguments.threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    seconds = time.perf_counter() - started
    totals = sum(soak.counts.values(), Counter())
    for strategy, counts in soak.counts.items():
        print(f"{strategy:14s} {dict(counts)}")
    print(f"{sum(totals.values())} calls in {seconds:.0f} s: {dict(totals)}", *soak.errors.items(), sep="\n")
    if arguments.json:
        command = f"python tests/tools/soak_threads.py --calls {arguments.calls} --threads {arguments.threads}"
        record = {"command": command, "family": arguments.family, "seconds": round(seconds, 1)}
        record |= {"totals": dict(totals), "by_strategy": {k: dict(v) for k, v in soak.counts.items()}}
        arguments.json.write_text(json.dumps({**record, "errors": dict(soak.errors)}, indent=1) + "\n", "utf-8")
    return int(set(totals) != {"same text"})


if __name__ == "__main__":
    sys.exit(main())
