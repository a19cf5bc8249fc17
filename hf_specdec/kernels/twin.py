"""Shallow copies of a model: they share every weight with it, and a few of their modules differ.

A *twin* is the copy that attends by the package's kernels. The model itself is never changed, so other threads may run
it meanwhile, and there is nothing to put back. Twins are made per call: one that was kept would not follow
`train()`, hooks or wrapped forwards.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .. import _compat
from .dispatch import ATTENTION


Edit = Callable[[nn.Module], dict[str, Any]]
"""Says what differs in the copy of a module: attributes by name; none for a module that may be shared."""

_Module = TypeVar("_Module", bound=nn.Module)
_ORIGINAL = "_specdec_original"


def twin_of(module: _Module) -> _Module:
    """Return a copy of a model, or of modules beside one that have its config, that attends by the package's kernels.

    Raises:
        ValueError: for a module whose `forward` has been replaced by something that is bound to it for good.
    """
    configs: dict[int, PreTrainedConfig] = {}
    head = module.get_output_embeddings() if isinstance(module, PreTrainedModel) else None

    def edit(part: nn.Module) -> dict[str, Any]:
        config = vars(part).get("config")
        if isinstance(config, PreTrainedConfig):
            return {"config": _attending(config, configs)}
        # the head has hooks of its own: what is hung on the twin's must not be called by the model's
        return {"training": part.training} if part is head else {}

    return edited(module, edit)


def original_of(module: _Module) -> _Module:
    """Return the module that a copy was made of, itself if it is none."""
    reference = vars(module).get(_ORIGINAL)
    return module if reference is None else cast(_Module, reference())


def without_checkpointing(model: _Module) -> _Module:
    """Return `model`, or a copy if it trains with gradient checkpointing, which would take its cache away."""

    def edit(part: nn.Module) -> dict[str, Any]:
        active = part.training and getattr(part, "gradient_checkpointing", False)
        return {"gradient_checkpointing": False} if active else {}

    return edited(model, edit)


def with_adapters(model: _Module, names: list[str]) -> _Module:
    """Return a copy of a PEFT model whose rows take the adapters `names`, a list that may change between forwards."""

    def edit(part: nn.Module) -> dict[str, Any]:
        mixed = _compat.adapters_of_rows(part) is not None
        return {"_forward_pre_hooks": _compat.hooks_for_rows(part, names)} if mixed else {}

    return edited(model, edit)


def exchanged(module: _Module, changes: dict[int, nn.Module], hooks: bool = False) -> _Module:
    """Return a copy of `module` with some submodules exchanged; all else is shared, and nothing is changed.

    `changes` holds what stands in for a submodule, by the submodule's `id`. The copied modules, those on the way to an
    exchanged one, have their `hooks` only where that is said.
    """
    return cast(_Module, _Copies(lambda _: {}, changes, hooks)(module))


def edited(module: _Module, edit: Edit) -> _Module:
    """Return a copy of `module` in which modules differ as `edit` says; `module` if none does. It has its hooks."""
    return cast(_Module, _Copies(edit, {}, hooks=True)(module))


class _Copies:
    """Copies a tree of modules, as far as something in it differs."""

    def __init__(self, edit: Edit, made: dict[int, nn.Module], hooks: bool) -> None:
        self.edit, self.hooks = edit, hooks
        self.made, self.pairs = dict(made), list[tuple[nn.Module, nn.Module]]()

    def __call__(self, module: nn.Module) -> nn.Module:
        """Return `module`'s copy, with what hangs on the copied instances bound to the copies."""
        found = self.copy(module)
        for made, original in self.pairs:
            _rebind(made, original, self.made)
        return found

    def copy(self, module: nn.Module) -> nn.Module:
        """Return the one copy of `module`, itself if nothing in it differs."""
        if id(module) not in self.made:
            self.made[id(module)] = self._copy(module)
        return self.made[id(module)]

    def _copy(self, module: nn.Module) -> nn.Module:
        if isinstance(
            module, torch._dynamo.OptimizedModule
        ):  # `torch.compile(module)`: the copy runs as it is written
            inner = module._orig_mod
            made = self.copy(inner)
            return module if made is inner else made
        children = {name: None if child is None else self.copy(child) for name, child in module._modules.items()}
        changes = self.edit(module)
        if not changes and all(child is module._modules[name] for name, child in children.items()):
            return module
        made = module.__class__.__new__(module.__class__)  # not `copy.copy`, which parametrized modules refuse
        vars(made).update(vars(module), _modules=children)
        hooks = {
            name: _for_original(module, getattr(module, name)) if self.hooks else OrderedDict() for name in _HOOKS
        }
        changes = {**hooks, **changes}
        # weak, because copies are part of what is kept per model
        vars(made).update({_ORIGINAL: weakref.ref(original_of(module)), **changes})
        self.pairs.append((made, module))
        return made


_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def _for_original(module: nn.Module, hooks: OrderedDict[int, Any]) -> OrderedDict[int, Any]:
    """Return the hooks of a module for its copy: they are called with the original, as long as they hang there."""

    def wrapped(key: int, hook: Callable[..., Any]) -> Callable[..., Any]:
        return lambda _, *args: hook(module, *args) if key in hooks else None

    return OrderedDict((key, wrapped(key, hook)) for key, hook in hooks.items())


def _attending(config: PreTrainedConfig, made: dict[int, PreTrainedConfig]) -> PreTrainedConfig:
    """Return the one copy of `config` that names our attention, its sub-configs included."""
    if id(config) not in made:
        copied = made[id(config)] = copy.copy(config)
        _compat.set_attention_name(copied, ATTENTION)
        for key in config.sub_configs:
            inner = getattr(config, key, None)
            if isinstance(inner, PreTrainedConfig):
                setattr(copied, key, _attending(inner, made))
    return made[id(config)]


def _rebind(made: nn.Module, module: nn.Module, copies: dict[int, nn.Module]) -> None:
    """Bind to copies what hangs on an instance and is bound to originals, such as Accelerate's forwards."""
    vars(made).pop("_compiled_call_impl", None)  # `module.compile()`: it would run the original
    for name, value in vars(module).items():
        if callable(value) and not isinstance(value, nn.Module):
            bound = _bound_to(copies, value)
            if bound is None and name == "forward":
                function = getattr(value, "__qualname__", value)
                raise ValueError(
                    f"`{name}` of {type(module).__name__} has been replaced by {function}, which can't be bound to a "
                    "copy of the module, as `assistant_strategy` needs. Hang a hook on the module "
                    "(`register_forward_hook`), bind the function to it (`types.MethodType`), or pass "
                    '`assistant_strategy="off"`.'
                )
            vars(made)[name] = value if bound is None else bound


_WRAPPERS = 8
"""Wrappers around a method that are looked into; a function may hold itself."""


def _bound_to(copies: dict[int, nn.Module], value: Any, depth: int = 0) -> Any:
    """Return `value` with copies in place of originals, `None` if it holds none that was copied."""
    if isinstance(value, nn.Module):
        made = copies.get(id(value), value)
        return None if made is value else made
    if isinstance(value, types.MethodType):
        made = _bound_to(copies, value.__self__)
        return None if made is None else types.MethodType(value.__func__, made)
    if isinstance(value, functools.partial):
        parts = [value.func, *value.args]
        bound = [_bound_to(copies, part, depth) for part in parts]
        if all(part is None for part in bound):
            return None
        function, *args = (part if new is None else new for part, new in zip(parts, bound, strict=True))
        return functools.update_wrapper(functools.partial(function, *args, **value.keywords), value)
    inner = getattr(value, "_torchdynamo_orig_callable", None)  # `torch.compile(model.forward)`: the code as written
    if inner is not None:
        return _bound_to(copies, inner)
    if isinstance(value, types.FunctionType) and depth < _WRAPPERS:
        return _bound_closure(copies, value, depth + 1)
    return None


def _bound_closure(copies: dict[int, nn.Module], function: types.FunctionType, depth: int) -> Any:
    """Return a wrapper that a function has made around what belongs to originals, around that of the copies."""
    cells, bound = list(function.__closure__ or ()), False
    for index, cell in enumerate(cells):
        try:
            new = _bound_to(copies, cell.cell_contents, depth)
        except ValueError:  # an empty cell
            continue
        if new is not None:
            cells[index], bound = types.CellType(new), True
    if not bound:
        return None
    own = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(own, function)


class Proxy(nn.Module):
    """Stands in for a module: calls go to `run(module, ...)`, attributes come from the module."""

    def __init__(self, module: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__.update(_module=module, _run=run)
        self._parameters = module._parameters  # some models ask their parameters for the device

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call `run`."""
        return self._run(self._module, *args, **kwargs)
