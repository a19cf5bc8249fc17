"""The command `hf-specdec`: demo, list, bench, evaluate, calibrate, train, push, export, serve."""

from __future__ import annotations

import sys

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import calibrate as calibration
from . import train as training
from .bench import bench
from .console import console
from .demo import demo
from .deploy import export_app, serve
from .evaluate import evaluate_command
from .options import expanded
from .push import push_command


app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)
app.add_typer(training.app, name="train")
app.add_typer(calibration.app, name="calibrate")
app.add_typer(export_app, name="export")
app.command("demo")(expanded(demo))
app.command("bench")(expanded(bench))
app.command("evaluate")(expanded(evaluate_command))
app.command("serve")(serve)
app.command("push")(push_command)


def main() -> None:
    """Run the command; errors about what was asked for are printed without a traceback."""
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError) as error:
        Console(stderr=True).print(f"[red]{type(error).__name__}:[/red] {escape(str(error))}", highlight=False)
        sys.exit(2)


@app.command("list")
def list_strategies() -> None:
    """List the strategies."""
    from ..registry import STRATEGIES, strategy_class

    table = Table("strategy", "lossless", "second model", "batches", "presets", "paper")
    for name in STRATEGIES:
        cls = strategy_class(name)
        table.add_row(
            name,
            "yes" if cls.config_class().lossless else "no",
            "needed" if cls.needs_assistant else "",
            "together" if cls.batched else "row by row",
            ", ".join(f"{name}:{key}" for key in cls.presets if key),
            cls.paper,
        )
    console.print(table)
