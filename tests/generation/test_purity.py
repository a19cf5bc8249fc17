"""What a processor may remember is found, and can be put back in place."""

from __future__ import annotations

import bisect
import collections
import functools
import heapq
import itertools
import random
from typing import NamedTuple

import numpy as np
import pytest
import torch
from prefixes import AgainstLastPair
from transformers import LogitsProcessor
from transformers.generation import logits_process as stock

from hf_specdec.generation.memory import Copied, Opaque, Undone
from hf_specdec.generation.purity import may_remember


SHARED: list[int] = []
COUNT = 0


class Of(LogitsProcessor):
    """A processor made of a body, and of attributes."""

    def __init__(self, **values):
        vars(self).update(values)


def of(body, **values):
    return type("Made", (Of,), {"__call__": body, "__module__": __name__})(**values)


def in_place(self, ids, scores):
    scores = scores.clone()
    scores[:, 0] += 1.0
    banned = []
    banned.append(3)
    return scores


def reads(self, ids, scores):
    return scores + self.table[0]


def counts(self, ids, scores):
    self.count += 1
    return scores


def appends(self, ids, scores):
    self.table.append(1)
    return scores


def adds(self, ids, scores):
    table = self.table
    table += 1
    return scores


def writes_out(self, ids, scores):
    torch.add(scores, 1, out=self.table)
    return scores


def pushes(self, ids, scores):
    heapq.heappush(self.table, 1)
    return scores


def sorts_in(self, ids, scores):
    bisect.insort(self.table, 1)
    return scores


def shuffles(self, ids, scores):
    random.Random(4).shuffle(self.table)
    return scores


def copies_into(self, ids, scores):
    np.copyto(self.table, np.ones(1))
    return scores


def draws(self, ids, scores):
    return scores + random.random()


def sets(self, ids, scores):
    setattr(self, "x", 1)  # noqa: B010
    return scores


def shares(self, ids, scores):
    SHARED.append(1)
    return scores


def stores_global(self, ids, scores):
    global COUNT
    COUNT += 1
    return scores


def calls(self, ids, scores):
    return helper(scores)


def helper(scores):
    SHARED.append(1)
    return scores


def own_variable(self, ids, scores):
    total = 0

    def add():
        nonlocal total
        total += 1

    add()
    return scores + total


def counter():
    total = 0

    def advance(ids, scores):
        nonlocal total
        total += 1
        return scores

    return advance


def class_counter(self, ids, scores):
    type(self).count = 1
    return scores


class Watermark(stock.SynthIDTextWatermarkLogitsProcessor):
    pass


class Counting(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, ids, scores):
        self.count += 1
        return scores


PURE = {
    "a known one": stock.RepetitionPenaltyLogitsProcessor(1.2),
    "text only": AgainstLastPair(),
    "tables": of(reads, table=torch.arange(3)),
    "what is its own": of(in_place, count=3, name="x", sizes=(1, 2)),
    "its own variable": of(own_variable),
    "no gradient": of(torch.no_grad()(reads), table=[1, 2]),
    "a warper's child": type("Child", (stock.TemperatureLogitsWarper,), {"__call__": in_place})(0.7),
    "a function": lambda ids, scores: scores + len(ids),
    "a grammar": stock.PrefixConstrainedLogitsProcessor(lambda row, ids: [1, 2], 1),
    "a library's module": of(reads, table=(1,), inner=torch.nn.Linear(2, 2)),
    "declared": of(counts, count=0, stateless=True),
}
REMEMBERING = {
    "a count": of(counts, count=0),
    "the process's random numbers": of(draws),
    "a sparse count": of(counts, count=0, table=torch.eye(2).to_sparse()),
    "a heap": of(pushes, table=[]),
    "a sorted list": of(sorts_in, table=[]),
    "a shuffled list": of(shuffles, table=[1, 2, 3]),
    "an array by copyto": of(copies_into, table=np.zeros(1)),
    "a list": of(appends, table=[]),
    "a tensor in place": of(adds, table=torch.zeros(1)),
    "a tensor by out=": of(writes_out, table=torch.zeros(1)),
    "an attribute by name": of(sets),
    "a global list": of(shares),
    "a global": of(stores_global),
    "through a function": of(calls),
    "a closure": counter(),
    "a class's attribute": of(class_counter),
    "in place beside a table": of(in_place, table=[1]),
    "a generator": of(reads, table=torch.zeros(1), rng=torch.Generator()),
    "an iterator": of(reads, table=torch.zeros(1), it=iter(())),
    "a rollback": of(reads, table=(1,), rollback=len),
    "a watermark": Watermark(3, [1, 2], 16, 8, 0, "cpu"),
    "a grammar with a count": stock.PrefixConstrainedLogitsProcessor(counter(), 1),
    "a module": Counting(),
    "a module inside": of(reads, table=(1,), inner=Counting()),
    "a part": functools.partial(lambda box, ids, scores: box.append(1), []),
}


@pytest.mark.parametrize("name", PURE)
def test_what_can_not_remember(name):
    assert not may_remember(PURE[name])


@pytest.mark.parametrize("name", REMEMBERING)
def test_what_may_remember(name):
    assert may_remember(REMEMBERING[name])


class Pair(NamedTuple):
    one: list
    two: dict


class Slotted:
    __slots__ = ("here", "gone")

    def __init__(self):
        self.here = [1]


class Everything:
    """All kinds of state."""

    shared = 0

    def __init__(self):
        self.number, self.words = 1, ["a", ["b"]]
        self.table, self.sets = {"k": [1]}, {1, 2}
        self.queue, self.raw = collections.deque([1, 2, 3], maxlen=3), bytearray(b"xy")
        self.ordered = collections.OrderedDict(a=1, b=2)
        self.counted, self.default = collections.Counter("aab"), collections.defaultdict(list, {1: [2]})
        self.tensor, self.array = torch.arange(3.0), np.arange(3)
        self.torch, self.random = torch.Generator().manual_seed(1), random.Random(1)
        self.pair, self.slotted, self.step = Pair([1], {}), Slotted(), counter()
        self.bound = self.words.append

    def change(self):
        self.number, self.new, Everything.shared = 2, [], 5
        self.bound("c")
        self.words[1].append("d")
        self.table["k"].append(2)
        del self.table["k"]
        self.sets.add(3)
        self.queue.append(4)
        self.raw[:] = b"long"
        self.ordered.move_to_end("a")
        self.counted["a"] += 5
        self.default[7].append(1)
        self.tensor.add_(1)
        self.tensor.resize_(5)
        self.array[0] = 9
        torch.rand(3, generator=self.torch)
        self.random.random()
        self.pair.one.append(2)
        self.slotted.gone = self.slotted.here
        del self.slotted.here
        self.step(0, 0)

    @property
    def seen(self):
        values = {
            name: value for name, value in vars(self).items() if name not in ("torch", "random", "bound", "step")
        }
        values |= {"tensor": self.tensor.tolist(), "array": self.array.tolist(), "ordered": list(self.ordered)}
        slots = [(name, getattr(self.slotted, name, None)) for name in Slotted.__slots__]
        rest = self.torch.get_state().tolist(), self.random.getstate(), self.step.__closure__[0].cell_contents
        return repr({**values, "slotted": slots}), type(self).shared, rest


def test_all_state_is_put_back_into_the_same_objects():
    thing = Everything()
    parts, memory = {name: id(value) for name, value in vars(thing).items()}, Copied([thing])
    first, before = memory.save(), thing.seen
    thing.change()
    second, after = memory.save(), thing.seen
    assert before != after
    for saved, wanted in ((first, before), (second, after), (first, before)):
        memory.restore(saved)
        assert thing.seen == wanted
    assert {name: id(value) for name, value in vars(thing).items()} == parts
    assert thing.words[1] == ["b"] and thing.bound.__self__ is thing.words


HIDDEN = {
    "iterator": iter([1]),
    "count": itertools.count(),
    "generator": (n for n in ()),
    "objects": np.array([[]], dtype=object),
    "large": torch.zeros(5_000_000),
    "many": [[n] for n in range(5000)],
    "view": memoryview(b"x"),
    "a list with more": type("More", (list,), {})([1]),
}


@pytest.mark.parametrize("hidden", HIDDEN)
def test_what_can_not_be_copied(hidden):
    with pytest.raises(Opaque):
        Copied([of(counts, count=0, hidden=HIDDEN[hidden])]).save()
    Copied([of(counts, count=0, hidden=[])]).save()


def test_a_module_of_the_callers_is_put_back():
    module = Counting()
    memory = Copied([of(reads, inner=module)])
    saved = memory.save()
    module(None, None)
    memory.restore(saved)
    assert module.count == 0


def test_rollback_is_asked_for_the_calls_since():
    undone = []
    memory = Undone(of(reads, rollback=undone.append))
    saved = [memory.save()]
    for _ in range(4):
        memory.called()
        saved.append(memory.save())
    for target in (4, 2, 2, 1):
        memory.restore(saved[target])
    assert undone == [2, 1]
