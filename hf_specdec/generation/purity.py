"""What is not known of a logits processor: whether it remembers anything between calls, and whether it mixes rows."""

from __future__ import annotations

import dis
import random
import types
from collections.abc import Iterator
from typing import Any

import torch
from transformers.generation import logits_process as stock

from .. import _compat
from .memory import CONSTRUCTORS, CONTAINERS, Copied, Opaque, codes_in, is_library, reachable


_STOCK_WITH_STATE = {
    "SynthIDTextWatermarkLogitsProcessor",
    "DiaEOSDelayPatternLogitsProcessor",
    "WhisperNoSpeechDetection",
}
_STORES = {"STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL"}
_STORES_INSIDE = {"STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE"}
_REFLECTION = {"setattr", "delattr", "__setattr__", "__delattr__", "__dict__", "vars", "globals", "exec", "eval"}
_MUTATORS = {
    *("append", "extend", "add", "update", "pop", "insert", "remove", "clear", "setdefault", "discard", "sort"),
    *("reverse", "appendleft", "extendleft", "popleft", "popitem", "rotate", "move_to_end", "subtract", "next"),
    *("send", "fill", "put", "resize", "itemset", "partition", "numpy", "data", "set_state"),
    # functions that change an argument
    *("heappush", "heappop", "heapify", "heapreplace", "heappushpop", "heapq", "bisect", "insort", "insort_left"),
    *("insort_right", "shuffle", "at", "copyto", "place", "putmask", "put_along_axis", "fill_diagonal", "setitem"),
    *("delitem", "iadd", "iconcat", "ior", "memoryview", "pack_into", "readinto", "set_", "setflags"),
    *("difference_update", "intersection_update", "symmetric_difference_update", "__setitem__", "__delitem__"),
}


def may_remember(processor: Any) -> bool:
    """Return whether a logits processor may keep something between calls that its next result depends on.

    Those of Transformers are known. Of others every object that they can reach is looked at, and the code of every
    function; what can't be told counts as memory. An attribute `stateless` that is `True` is believed.
    """
    allowed = _compat.allowed_tokens_function(processor)
    if allowed is not None:
        if getattr(allowed, "stateless", False) is True:
            return False
    elif type(processor).__module__ == stock.__name__:
        return type(processor).__name__ in _STOCK_WITH_STATE
    if getattr(processor, "stateless", False) is True:
        return False
    if has_rollback(processor):
        return True
    try:
        things = [part.thing for part in reachable([processor])]
    except Opaque:
        return True
    changeable = any(isinstance(thing, CONTAINERS) for thing in things)
    return any(map(_draws_or_hides, things)) or any(_stores(thing, changeable) for thing in things)


def is_row_wise(processor: Any) -> bool:
    """Return whether a logits processor is known to look, for each row, at that row only.

    Those of Transformers do, a caller's `prefix_allowed_tokens_fn` by its use, others say so by `stateless`.
    """
    if type(processor).__module__ == stock.__name__:
        return True
    return getattr(processor, "stateless", False) is True


def mixes_rows(processor: Any, ids: torch.Tensor, width: int) -> bool:
    """Return whether the first or the last row's result changes with the other rows' scores.

    It is tried on texts `ids` `[b, T]` with random scores `[b, width]`, and what it remembers of that is put back.
    """
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn(len(ids), width, generator=generator).to(ids.device) for _ in range(2))
    memory = Copied([processor])
    try:
        saved = memory.save()
    except Opaque:
        return False
    found = []
    with torch.random.fork_rng([]):
        for row in (0, len(ids) - 1):
            other = two.clone()
            other[row] = one[row]
            results = []
            for scores in (one, other):
                try:
                    results.append(processor(ids, scores.clone())[row])
                except Exception:  # noqa: BLE001 - it does not like scores that no model gives: nothing is learnt
                    return False
                finally:
                    memory.restore(saved)
            found.append(not torch.equal(*results))
    return any(found)


def has_rollback(processor: Any) -> bool:
    """Return whether a processor can undo its last calls by itself."""
    return callable(getattr(processor, "rollback", None))


def _draws_or_hides(thing: Any) -> bool:
    """Return whether `thing` has a state that no code of the caller's shows."""
    if isinstance(thing, (torch.Generator, random.Random)):
        return True
    if isinstance(thing, type):
        bases = [base for base in thing.__mro__ if is_library(base.__module__)]
        return any(base.__name__ in _STOCK_WITH_STATE for base in bases) or not all(map(_is_harmless, bases))
    return hasattr(thing, "__dict__") and is_library(type(thing).__module__) and not _is_harmless(type(thing))


def _is_harmless(cls: type) -> bool:
    if cls.__module__ in (stock.__name__, "builtins", "abc", "typing", "torch.utils._contextlib"):
        return cls.__name__ not in _STOCK_WITH_STATE
    return issubclass(cls, (torch.Tensor, torch.utils._contextlib._DecoratorContextManager, types.FunctionType))


def _stores(thing: Any, changeable: bool) -> bool:
    """Return whether a function may change something that outlives the call.

    Args:
        changeable (`bool`): whether containers or tensors outlive it; if not, what is changed in place is its own.
    """
    if not isinstance(thing, types.FunctionType) or thing.__name__ in CONSTRUCTORS:
        return False
    if is_library(thing.__globals__.get("__name__")):
        return False
    outer = set(thing.__code__.co_freevars)
    return any(_step_stores(step, outer, changeable) for step in _steps(thing.__code__)) or any(
        changeable and isinstance(constant, tuple) and "out" in constant
        for code in codes_in(thing.__code__)
        for constant in code.co_consts
    )


def _steps(code: types.CodeType) -> Iterator[dis.Instruction]:
    for part in codes_in(code):
        yield from dis.get_instructions(part)


def _step_stores(step: dis.Instruction, outer: set[str], changeable: bool) -> bool:
    if step.opname in _STORES or step.argval in _REFLECTION:
        return True
    if step.opname in ("STORE_DEREF", "DELETE_DEREF"):
        return step.argval in outer
    if not changeable:
        return False
    in_place = step.opname.startswith("INPLACE_") or (step.opname == "BINARY_OP" and step.argrepr.endswith("="))
    return step.opname in _STORES_INSIDE or in_place or (isinstance(step.argval, str) and _mutates(step.argval))


def _mutates(name: str) -> bool:
    in_place = name.endswith("_") and (not name.startswith("_") or name.startswith("_foreach"))
    return name in _MUTATORS or in_place
