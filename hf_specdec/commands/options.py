"""Dataclasses of settings as options of a command: each field that was declared with `option` becomes one."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields
from typing import Annotated, Any

import typer

from .console import floats


@dataclass(frozen=True)
class _Option:
    """A field as an option: numbers are listed by commas, and 0 or no text stands for `None`.

    Args:
        field (`Field`): the field.
        name (`str`): of the option.
        help (`str`): of the option.
        kind (`type`): of the value, or of each of several.
        several (`bool`): whether it lists values.
        unset (`bool`): whether it may be `None`.
    """

    field: Field[Any]
    name: str
    help: str
    kind: Callable[[Any], Any]
    several: bool
    unset: bool

    def parameter(self, default: Any) -> inspect.Parameter:
        """Return the command's parameter."""
        kind: Any = str if self.several else self.kind
        if isinstance(default, tuple):
            default = ",".join(map(str, default))
        default = inspect.Parameter.empty if default is MISSING else kind() if default is None else default
        return _keyword(self.name, Annotated[kind, typer.Option(help=self.help)], default)

    def read(self, value: Any) -> Any:
        """Return the field's value for what the command was given."""
        if self.unset and not value:
            return None
        return tuple(floats(value, f"--{self.name.replace('_', '-')}", self.kind)) if self.several else value


def _keyword(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _options(settings: type[Any]) -> list[_Option]:
    """Return the options that settings declare with `option`: their own first, then those of the base."""
    hints, own, found = typing.get_type_hints(settings), vars(settings)["__annotations__"], []
    for entry in sorted(fields(settings), key=lambda entry: entry.name not in own):
        declared = (getattr(cls, "__dataclass_fields__", {}).get(entry.name) for cls in settings.__mro__)
        about = next((field.metadata for field in declared if field is not None and field.metadata), None)
        if about is None or not entry.init:
            continue
        hint = hints[entry.name]
        unset = type(None) in typing.get_args(hint)
        kind = typing.get_args(hint)[0] if unset else hint
        several = typing.get_origin(kind) is tuple
        kind = typing.get_args(kind)[0] if several else kind
        found.append(_Option(entry, about["name"] or entry.name, about["help"], kind, several, unset))
    return found


def expanded(command: Callable[..., None], more: dict[str, Any] | None = None, **defaults: Any) -> Callable[..., None]:
    """Return a command that has options in place of its arguments that are dataclasses.

    Args:
        command (`Callable`): a function for Typer, some of whose arguments are dataclasses with `option` fields.
        more (`dict`, *optional*): annotations of options that the command takes as `**more`.
        defaults: the command's defaults where they differ from the fields'.
    """
    found: list[inspect.Parameter] = []
    groups: dict[str, tuple[type[Any], list[_Option]]] = {}
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        kind: Any = parameter.annotation
        if hasattr(kind, "__dataclass_fields__"):
            groups[name] = kind, _options(kind)
            found += [o.parameter(defaults.get(o.field.name, o.field.default)) for o in groups[name][1]]
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found += [_keyword(key, value) for key, value in (more or {}).items()]
        else:
            found.append(_keyword(name, kind, parameter.default))

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, (cls, options) in groups.items():
            given[name] = cls(**{option.field.name: option.read(given.pop(option.name)) for option in options})
        command(**given)

    signature: Any = run
    signature.__signature__ = inspect.Signature(found)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in found}
    return run
