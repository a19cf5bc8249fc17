"""Print the milliseconds that logits processors take per round: all positions of 10 drafts at once, on one thread.

python tests/tools/time_processors.py --json after.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as stock

from hf_specdec.generation.processors import ProcessorChain


VOCAB, DRAFTS, EOS = 49_152, 10, 2


def chains(columns: int) -> dict[str, list[stock.LogitsProcessor]]:
    """Return usual processors by the keyword of `generate()` that makes them, for texts of so many columns."""
    return {
        "repetition_penalty": [stock.RepetitionPenaltyLogitsProcessor(1.2)],
        "no_repeat_ngram_size": [stock.NoRepeatNGramLogitsProcessor(3)],
        "bad_words_ids": [stock.NoBadWordsLogitsProcessor([[5], [6, 7], [8, 9, 10]], EOS)],
        "min_new_tokens": [stock.MinNewTokensLengthLogitsProcessor(columns - 20, 8, EOS)],
        "min_new_tokens, not reached": [stock.MinNewTokensLengthLogitsProcessor(columns - 2, 64, EOS)],
        "sequence_bias": [stock.SequenceBiasLogitsProcessor({(3,): 1.5, (4, 5): -2.0, (6, 7, 8): 4.0})],
        "temperature, top_k, top_p": [
            stock.TemperatureLogitsWarper(0.8),
            stock.TopKLogitsWarper(50),
            stock.TopPLogitsWarper(0.9),
        ],
    }


def main() -> None:
    """Time each chain; the fastest of several runs counts, as others may use the machine."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=15, help="runs of each chain")
    parser.add_argument("--json", type=Path, help="a file for the milliseconds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for _ in range(4):  # malloc learns that tensors of this size come again, as it does while a model decodes
        torch.ones(4, DRAFTS + 1, VOCAB).double()
    found = {}
    for columns in (500, 4000):
        for rows in (1, 4):
            generator = torch.Generator().manual_seed(1)
            ids = torch.randint(3, VOCAB, (rows, columns), generator=generator)
            drafts = torch.randint(3, VOCAB, (rows, DRAFTS), generator=generator)
            logits = torch.randn(rows, DRAFTS + 1, VOCAB, generator=generator)
            for name, processors in chains(columns).items():
                chain, times = ProcessorChain(LogitsProcessorList(processors)), []
                for _ in range(args.runs):
                    start = time.perf_counter()
                    chain(logits, ids, list(range(rows)), [columns] * rows, drafts)
                    times.append(time.perf_counter() - start)
                found[f"{name}, {columns} tokens, {rows} rows"] = round(1000 * min(times), 2)
    for name, spent in found.items():
        print(f"{name:50s} {spent:8.2f}")
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
