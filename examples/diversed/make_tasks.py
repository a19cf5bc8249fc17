"""Write tasks whose answer is one number: values to find in a passage, and one-step sums in words.

    python examples/diversed/make_tasks.py FOLDER --train 2000 --test 500

writes FOLDER/train.jsonl and FOLDER/test.jsonl, from disjoint seeds and without a question in common. Each line has
`question`, `answer` and `kind`.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path


NAMES = [
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Henry",
    "Ida",
    "Jack",
    "Lena",
    "Mark",
    "Nora",
    "Paul",
]
THINGS = [
    "apples",
    "books",
    "marbles",
    "stamps",
    "pencils",
    "cards",
    "shells",
    "coins",
    "stickers",
    "cookies",
    "buttons",
]
GOODS = ["bread", "cheese", "honey", "tea", "rice", "butter", "coffee", "soup", "jam", "milk", "salad", "juice"]
PLACES = [
    "the library",
    "the bakery",
    "the station",
    "the museum",
    "the school",
    "the market",
    "the hotel",
    "the clinic",
]
STREETS = [
    "Oak Street",
    "River Road",
    "Church Lane",
    "Park Avenue",
    "Hill Street",
    "Garden Road",
    "Mill Lane",
    "High Street",
]
SAY = "Answer in one short sentence."


def price_list(pick: random.Random) -> tuple[str, int]:
    """A shop's prices; what does one thing cost?"""
    goods = pick.sample(GOODS, pick.randint(2, 3))
    prices = pick.sample(range(2, 99), len(goods))
    wanted = pick.randrange(len(goods))
    listed = ", ".join(f"the {good} costs {price} dollars" for good, price in zip(goods, prices, strict=True))
    return f"In this shop {listed}. How many dollars does the {goods[wanted]} cost? {SAY}", prices[wanted]


def owners(pick: random.Random) -> tuple[str, int]:
    """Who owns how many; how many does one of them own?"""
    names, thing = pick.sample(NAMES, 2), pick.choice(THINGS)
    counts = pick.sample(range(2, 99), len(names))
    wanted = pick.randrange(len(names))
    told = " ".join(f"{name} has {count} {thing}." for name, count in zip(names, counts, strict=True))
    return f"{told} How many {thing} does {names[wanted]} have? {SAY}", counts[wanted]


def bus_stops(pick: random.Random) -> tuple[str, int]:
    """Bus lines and where they go; which line goes to one place?"""
    places = pick.sample(PLACES, 2)
    lines = pick.sample(range(1, 99), len(places))
    wanted = pick.randrange(len(places))
    told = " ".join(f"Bus number {line} goes to {place}." for line, place in zip(lines, places, strict=True))
    return f"{told} Which bus goes to {places[wanted]}? {SAY}", lines[wanted]


def more(pick: random.Random) -> tuple[str, int]:
    """One step of addition."""
    name, thing, a, b = pick.choice(NAMES), pick.choice(THINGS), pick.randint(2, 20), pick.randint(2, 20)
    return f"{name} has {a} {thing} and gets {b} more {thing}. How many {thing} does {name} have now? {SAY}", a + b


def age(pick: random.Random) -> tuple[str, int]:
    """One fact among others; what is it?"""
    name, years, place, street = pick.choice(NAMES), pick.randint(18, 90), pick.choice(PLACES), pick.choice(STREETS)
    told = f"{name} lives in {street} and works at {place}. {name} is {years} years old."
    return f"{told} How old is {name}? {SAY}", years


KINDS = (price_list, owners, bus_stops, more, age)


def make(count: int, seed: int, taken: set[str]) -> list[dict[str, object]]:
    """Return `count` items whose questions are not in `taken`, which they join."""
    pick, items = random.Random(seed), []
    while len(items) < count:
        kind = KINDS[len(items) % len(KINDS)]
        question, answer = kind(pick)
        if question not in taken:
            taken.add(question)
            items.append({"question": question, "answer": answer, "kind": kind.__name__})
    return items


def main() -> None:
    """Write the two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()
    for name, count, seed in (("test", asked.test, 2 * asked.seed), ("train", asked.train, 2 * asked.seed + 1)):
        lines = [json.dumps(item) for item in make(count, seed, taken)]
        (asked.folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
