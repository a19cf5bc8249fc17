"""What a logits processor remembers between its calls: found, saved, and put back in place.

`reachable` walks everything that a processor, or a function, can get at: attributes, containers, tensors, closures,
the globals that its own code names, the classes of its objects. What belongs to the interpreter, torch, numpy or
Transformers counts as constant, except for the attributes of their objects.
"""

from __future__ import annotations

import dis
import enum
import functools
import logging
import operator
import random
import re
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase


_MOST_OBJECTS = 4096
_MOST_BYTES = 16 * 2**20

_LIBRARIES = sys.stdlib_module_names | {"torch", "numpy", "transformers", "tokenizers"}
_CONSTANTS = (
    *(bool, int, float, complex, str, bytes, range, slice, type(None), type(...), type(NotImplemented), np.generic),
    *(types.CodeType, types.GenericAlias, types.MethodDescriptorType, types.ClassMethodDescriptorType),
    *(types.WrapperDescriptorType, types.MethodWrapperType, types.GetSetDescriptorType, types.MemberDescriptorType),
    *(operator.itemgetter, operator.attrgetter, operator.methodcaller, re.Pattern, logging.Logger, enum.Enum),
    type(vars(namedtuple("Pair", "one"))["one"]),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
    *(PreTrainedTokenizerBase, PreTrainedConfig, GenerationConfig),
)
CONTAINERS = (list, dict, set, deque, bytearray, torch.Tensor, np.ndarray)
"""What can be changed without a new value for any attribute or name."""

CONSTRUCTORS = {"__init__", "__post_init__", "__new__"}
"""What runs once, before any call."""
_GENERATORS = (torch.Generator, random.Random, np.random.Generator)
_DRAWS = {
    *("random", "randrange", "randint", "getrandbits", "shuffle", "choice", "choices", "gauss", "normalvariate"),
    *("uniform", "normal", "rand", "randn", "randperm", "rand_like", "randn_like", "randint_like", "multinomial"),
    *("bernoulli", "bernoulli_", "normal_", "uniform_", "random_", "exponential_", "dropout", "default_rng"),
}
_MISSING = object()


class Opaque(TypeError):
    """Something whose state can't be copied."""


class Part(NamedTuple):
    """One object with what it holds.

    Attributes:
        thing (`Any`): the object.
        put (`Callable`): `put(thing, content)` makes it hold `content` again.
        content (`Any`): a copy of it, not of what it refers to.
        children (`Iterable`): what it refers to.
    """

    thing: Any
    put: Callable[[Any, Any], None] | None
    content: Any
    children: Iterable[Any]


def is_library(module: str | None) -> bool:
    """Whether code of `module` counts as constant."""
    return (module or "").partition(".")[0] in _LIBRARIES


# how to look at each kind of object, and put back what it held


def _same(some: Iterable[Any], others: Iterable[Any]) -> bool:
    """Return whether two collections have the very same members; what has not changed is not written."""
    return all(one is other for one, other in zip_longest(some, others, fillvalue=_MISSING))


def _put_list(thing: Any, content: Any) -> None:
    if not _same(thing, content):
        thing[:] = content


def _put_dict(thing: Any, content: Any) -> None:
    if _same(thing, content) and _same(thing.values(), content.values()):
        return
    thing.clear()
    for key, value in content.items():
        thing[key] = value


def _put_set(thing: Any, content: Any) -> None:
    if thing != content:
        thing.clear()
        thing.update(content)


def _put_deque(thing: Any, content: Any) -> None:
    if not _same(thing, content):
        thing.clear()
        thing.extend(content)


def _put_tensor(thing: Any, content: Any) -> None:
    if thing.shape == content.shape and torch.equal(thing, content):
        return
    with torch.inference_mode(thing.is_inference()), torch.no_grad():
        if thing.shape != content.shape:
            thing.resize_(content.shape)
        # what is expanded has each number once
        once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in thing.stride())
        thing[once].copy_(content[once])


def _put_cell(thing: Any, content: Any) -> None:
    if content is _MISSING:
        del thing.cell_contents
    else:
        thing.cell_contents = content


def _put_function(thing: Any, content: Any) -> None:
    bindings, attributes = content
    _put_dict(thing.__dict__, attributes)
    for name, value in bindings.items():
        if value is _MISSING:
            thing.__globals__.pop(name, None)
        else:
            thing.__globals__[name] = value


def _put_class(thing: Any, content: Any) -> None:
    now = _class_values(thing)
    for name in now.keys() - content.keys():
        type.__delattr__(thing, name)
    for name, value in content.items():
        if now.get(name, _MISSING) is not value:
            type.__setattr__(thing, name, value)


def _put_object(thing: Any, content: Any) -> None:
    attributes, slots = content
    if attributes is not None:
        _put_dict(vars(thing), attributes)
    for slot, value in slots:
        if value is not _MISSING:
            slot.__set__(thing, value)
        elif _slot_value(slot, thing) is not _MISSING:
            slot.__delete__(thing)


_KINDS: dict[type, tuple[Callable[[Any, Any], None] | None, Callable[[Any], Any], Callable[[Any], Iterable[Any]]]] = {
    list: (_put_list, list, list),
    bytearray: (_put_list, bytes, lambda thing: ()),
    deque: (_put_deque, list, list),
    set: (_put_set, set, list),
    **dict.fromkeys(
        (dict, OrderedDict, defaultdict, Counter),
        (_put_dict, lambda thing: dict(thing), lambda thing: [*thing, *thing.values()]),
    ),
    tuple: (None, lambda thing: None, list),
    frozenset: (None, lambda thing: None, list),
    torch.Tensor: (_put_tensor, lambda thing: thing.detach().clone(), lambda thing: ()),
    nn.Parameter: (_put_tensor, lambda thing: thing.detach().clone(), lambda thing: ()),
    torch.Generator: (lambda thing, state: thing.set_state(state), lambda thing: thing.get_state(), lambda thing: ()),
    random.Random: (lambda thing, state: thing.setstate(state), lambda thing: thing.getstate(), lambda thing: ()),
    property: (None, lambda thing: None, lambda thing: [thing.fget, thing.fset, thing.fdel]),
    staticmethod: (None, lambda thing: None, lambda thing: [thing.__func__]),
    classmethod: (None, lambda thing: None, lambda thing: [thing.__func__]),
    functools.cached_property: (None, lambda thing: None, lambda thing: [thing.func]),
    functools.partial: (None, lambda thing: None, lambda thing: [thing.func, thing.args, thing.keywords]),
    type(functools.lru_cache(len)): (None, lambda thing: None, lambda thing: [thing.__wrapped__]),
    types.MethodType: (None, lambda thing: None, lambda thing: [thing.__self__, thing.__func__]),
    types.BuiltinFunctionType: (None, lambda thing: None, lambda thing: [thing.__self__]),
}


def _look(thing: Any) -> Part:
    """Return `thing` with what it holds; raise `Opaque` if that can't be copied."""
    kind = type(thing)
    if isinstance(thing, torch.Tensor) and (thing.layout is not torch.strided or thing.is_meta or thing.is_quantized):
        raise Opaque(f"a tensor of layout {thing.layout}")
    if kind in _KINDS:
        put, copy, children = _KINDS[kind]
        return Part(thing, put, copy(thing), children(thing))
    if kind is np.ndarray and not thing.dtype.hasobject:
        # one that is read-only changes with what it shows
        return Part(thing, np.copyto if thing.flags.writeable else None, thing.copy(), [thing.base])
    if kind is types.CellType:
        try:
            content = thing.cell_contents
        except ValueError:
            return Part(thing, _put_cell, _MISSING, ())
        return Part(thing, _put_cell, content, [content])
    if kind is types.FunctionType:
        return _look_at_function(thing)
    if isinstance(thing, type):
        values = _class_values(thing)
        return Part(thing, _put_class, values, [*values.values(), *_class_code(thing), *thing.__mro__])
    if isinstance(thing, tuple):  # a named one
        return Part(thing, None, None, list(thing))
    return _look_at_object(thing)


def _look_at_function(thing: types.FunctionType) -> Part:
    children = [*(thing.__closure__ or ()), *(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
    children += thing.__dict__.values()
    bindings: dict[str, Any] = {}
    if not is_library(thing.__globals__.get("__name__")):
        known, (names, stored, imported) = thing.__globals__, _names_of(thing.__code__)
        bindings = {name: known.get(name, _MISSING) for name in stored}
        values = [known[name] for name in names if name in known] + [sys.modules.get(name) for name in imported]
        children += [part for value in values for part in _look_into(value, names)]
    return Part(thing, _put_function, (bindings, dict(thing.__dict__)), children)


def _look_into(value: Any, names: Sequence[str]) -> list[Any]:
    """Return a global's value; for a module that is no library's, what code can mean that uses `names` on it."""
    if not isinstance(value, types.ModuleType) or is_library(value.__name__):
        return [] if isinstance(value, types.ModuleType) else [value]
    return [part for name in names if hasattr(value, name) for part in [getattr(value, name)] if part is not value]


def _class_values(cls: type) -> dict[str, Any]:
    own = {name: value for name, value in vars(cls).items() if not name.startswith(("__", "_abc_"))}
    return {name: value for name, value in own.items() if not isinstance(value, types.FunctionType)}


def _class_code(cls: type) -> list[Any]:
    # a dataclass's `__repr__` keeps a set of what it is printing
    return [part for name, part in vars(cls).items() if isinstance(part, types.FunctionType) and name != "__repr__"]


def _look_at_object(thing: Any) -> Part:
    """Look at an instance of a class that was written in Python."""
    cls = type(thing)
    slots = [
        slot
        for base in cls.__mro__
        for name, slot in vars(base).items()
        if isinstance(slot, types.MemberDescriptorType) and not name.startswith("__")
    ]
    room = 8 * (len(slots) + (cls.__dictoffset__ > 0) + (cls.__weakrefoffset__ > 0))
    if cls.__basicsize__ > object.__basicsize__ + room or cls.__itemsize__:
        raise Opaque(cls.__name__)  # an extension keeps something where Python can't look
    if not slots and not hasattr(thing, "__dict__") and cls.__module__ == "builtins":
        raise Opaque(cls.__name__)
    attributes = dict(vars(thing)) if hasattr(thing, "__dict__") else None
    held = [(slot, _slot_value(slot, thing)) for slot in slots]
    children = [*(attributes or {}).values(), *(value for _, value in held if value is not _MISSING), cls]
    return Part(thing, _put_object, (attributes, held), children)


def _slot_value(slot: Any, thing: Any) -> Any:
    try:
        return slot.__get__(thing)
    except AttributeError:
        return _MISSING


def codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield `code` and the code of the functions defined inside."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from codes_in(inner)


@functools.lru_cache(maxsize=1024)
def _names_of(code: types.CodeType) -> tuple[tuple[str, ...], ...]:
    """Return the names of globals and attributes that `code` uses, and the globals among them that it stores.

    The third part are modules that it imports, libraries left out.
    """
    names = dict.fromkeys(name for part in codes_in(code) for name in part.co_names)
    steps = [step for part in codes_in(code) for step in dis.get_instructions(part)]
    stored = [step.argval for step in steps if step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")]
    imported = [step.argval for step in steps if step.opname == "IMPORT_NAME" and not is_library(step.argval)]
    return tuple(names), tuple(stored), tuple(imported)


def _is_constant(thing: Any) -> bool:
    if isinstance(thing, _CONSTANTS):
        return True
    if isinstance(thing, types.ModuleType):
        return is_library(thing.__name__)
    if isinstance(thing, type):
        return is_library(thing.__module__)
    if isinstance(thing, nn.Module):
        return is_library(type(thing).__module__)  # one of the caller's may keep anything
    return type(thing).__module__.partition(".")[0] == "tokenizers" and type(thing).__name__ != "DecodeStream"


def _size(part: Part) -> int:
    if isinstance(part.content, torch.Tensor):
        return part.content.numel() * part.content.element_size()
    return part.content.nbytes if isinstance(part.content, np.ndarray) else sys.getsizeof(part.content)


def reachable(roots: Iterable[Any]) -> Iterator[Part]:
    """Yield everything that is reachable from `roots` and not constant, each object once.

    Raises:
        Opaque: at something that can't be copied, and where there is too much.
    """
    seen: dict[int, Any] = {}
    waiting, size = deque(roots), 0
    drawing: str | None = None
    code: deque[Any] = deque()
    while waiting or code:
        # the nearest data first, where what can't be copied mostly is
        thing = waiting.popleft() if waiting else code.popleft()
        if id(thing) in seen or _is_constant(thing):
            continue
        seen[id(thing)] = thing
        part = _look(thing)
        size += _size(part)
        if len(seen) > _MOST_OBJECTS or size > _MOST_BYTES:
            raise Opaque(f"more than {_MOST_OBJECTS} objects or {_MOST_BYTES} bytes")
        for child in part.children:
            (code if isinstance(child, (type, types.FunctionType)) else waiting).append(child)
        if isinstance(thing, types.FunctionType) and _draws(thing):
            drawing = thing.__qualname__
        yield part
    if drawing and not any(isinstance(thing, _GENERATORS) for thing in seen.values()):
        raise Opaque(f"{drawing} draws random numbers from a generator of the process")


def _draws(function: types.FunctionType) -> bool:
    if is_library(function.__globals__.get("__name__")) or function.__name__ in CONSTRUCTORS:
        return False
    return any(_DRAWS.intersection(code.co_names) for code in codes_in(function.__code__))


# what the loop uses


class Memory(Protocol):
    """What processors remember, such that it can be put back; `restore` goes to what was saved earlier only."""

    def called(self) -> None:
        """Take note that the processors have been called once more."""

    def save(self) -> Any:
        """Return what is remembered now."""

    def restore(self, saved: Any) -> None:
        """Remember what `save` returned."""


class Copied:
    """The memory of processors whose state can be copied; their objects stay the caller's."""

    def __init__(self, processors: Sequence[Any]) -> None:
        self.processors = processors

    def called(self) -> None:
        """Do nothing."""

    def save(self) -> list[Part]:
        """Return copies of all parts that can change."""
        return [part._replace(children=()) for part in reachable(self.processors) if part.put is not None]

    def restore(self, saved: list[Part]) -> None:
        """Put the copies' content back into the objects that it is from."""
        for part in saved:
            part.put(part.thing, part.content)  # type: ignore[misc]


class Undone:
    """The memory of a processor with a `rollback(n)` of its own, which undoes its last n calls."""

    def __init__(self, processor: Any) -> None:
        self.processor, self.calls = processor, 0

    def called(self) -> None:
        """Count the call."""
        self.calls += 1

    def save(self) -> int:
        """Return the number of calls so far."""
        return self.calls

    def restore(self, saved: int) -> None:
        """Undo the calls since then."""
        if saved < self.calls:
            self.processor.rollback(self.calls - saved)
        self.calls = saved
