"""The command `hf-specdec push`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from .console import console


if TYPE_CHECKING:
    from ..card import Results


def push_command(
    folder: Annotated[Path, typer.Argument(help="Folder of saved settings, with the adapter that they name.")],
    repo: Annotated[str, typer.Argument(help="Name of the Hub repository, as org/name; made where needed.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to; made where needed.")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    results: Annotated[Path | None, typer.Option(help="What `bench --json` wrote, for the card.")] = None,
) -> None:
    """Upload a strategy's folder to the Hub: settings, adapter and card."""
    from ..resolve import push_folder

    found = None if results is None else read_results(results)
    address = push_folder(
        folder, repo, private=private or None, revision=revision, commit_message=message, results=found
    )
    console.print(address, highlight=False, markup=False, soft_wrap=True)


def read_results(path: Path) -> Results:
    """Return the measurements in a file that `hf-specdec bench --json` wrote.

    Raises:
        OSError: if there is no such file.
        ValueError: for a file of anything else.
    """
    from ..bench.report import fastest_stock
    from ..card import Results, ResultTable

    values = _read(path)
    groups: dict[tuple[int, int, int], list[Any]] = {}
    for row in values["measurements"]:
        groups.setdefault((row.context, row.batch, row.new_tokens), []).append(row)
    tables = []
    for (context, batch, new_tokens), rows in groups.items():
        base = fastest_stock(cast(Any, rows))
        arms = [
            (m.name, m.tokens_per_second, base.ms_per_token / m.ms_per_token, m.tokens_per_step, m.acceptance)
            for m in rows
        ]
        title = f"About {context} tokens of context, batch {batch}, {new_tokens} new tokens per row"
        tables.append(ResultTable(title, base.name, arms))
    return Results(values["command"], values["environment"], tables)


def _read(path: Path) -> dict[str, Any]:
    """Return the file's content, with every measurement as an object."""
    needed = {"name", "context", "batch", "new_tokens", "tokens_per_second", "ms_per_token"}
    needed |= {"tokens_per_step", "acceptance"}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"`--results {path}` is not JSON: {error}.") from error
    rows = values.get("measurements") if isinstance(values, dict) else None
    whole = isinstance(rows, list) and all(isinstance(row, dict) and needed <= set(row) for row in rows)
    if not rows or not whole or not {"command", "environment"} <= set(values):
        raise ValueError(
            f"`--results {path}` must be a file that `hf-specdec bench --json` wrote (without `--kernels`): speeds of "
            f"whole answers, with {', '.join(sorted(needed))}."
        )
    return {**values, "measurements": [SimpleNamespace(**row) for row in rows]}
