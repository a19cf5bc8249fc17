"""Many values within one case: for checks so short that a case of its own would cost more than the check."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any


def over(names: str, values: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test once for each of `values`, as `pytest.mark.parametrize` does, but all within one case.

    Where the test fails, the message begins with the values that it failed for. Decorators may be stacked, also with
    `pytest.mark.parametrize`.

    Args:
        names (`str`): an argument of the test, or several with commas between them.
        values (`Iterable`): a value for each run, or a tuple of values where there are several names.
    """
    keys, values = [name.strip() for name in names.split(",")], list(values)
    assert values, "a loop over nothing checks nothing"

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
            for value in values:
                chosen = dict(zip(keys, value, strict=True)) if len(keys) > 1 else {keys[0]: value}
                try:
                    test(*args, **kwargs, **chosen)
                except Exception as error:
                    raise AssertionError(f"{', '.join(f'{k}={v}' for k, v in chosen.items())}: {error}") from error

        signature = inspect.signature(test)
        rest = [parameter for name, parameter in signature.parameters.items() if name not in keys]
        assert len(rest) == len(signature.parameters) - len(keys), f"{test.__name__} lacks one of {names}"
        run.__signature__ = signature.replace(parameters=rest)  # type: ignore[attr-defined]
        return run

    return decorate
