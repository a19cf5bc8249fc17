"""The commands `hf-specdec export` and `hf-specdec serve`: strategies where others call `generate()`."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import console


export_app = typer.Typer(no_args_is_help=True, add_completion=False)

Reasoning = Enum("Reasoning", {"ON": "on", "OFF": "off", "AUTO": "auto"}, type=str)
LogLevel = Enum("LogLevel", {"DEBUG": "debug", "INFO": "info", "WARNING": "warning", "ERROR": "error"}, type=str)
Strategy = Annotated[str, typer.Argument(help="A strategy's name or preset, or a folder or Hub repository with one.")]


@export_app.callback()
def export() -> None:
    """Write a strategy in a form that works without this package's keyword."""


@export_app.command("custom-generate")
def custom_generate(
    strategy: Strategy,
    folder: Annotated[Path, typer.Argument(help="Folder for the repository; made where needed.")],
    repo: Annotated[
        str | None, typer.Option(help="ORG/NAME on the Hub that the folder will have; needed there for an adapter.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Model named on the card; by default the one that an adapter was made for.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty.")] = False,
) -> None:
    """Write a repository for generate(custom_generate=FOLDER, trust_remote_code=True)."""
    from ..export import export_custom_generate

    for path in export_custom_generate(strategy, folder, repo=repo, base_model=base_model, force=force):
        console.print(f"written to {path}", highlight=False, soft_wrap=True)


def serve(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of the model.")],
    strategy: Annotated[
        str | None, typer.Option(help="As for assistant_strategy=; by default what generation_config.json names.")
    ] = None,
    strategy_config: Annotated[
        str | None, typer.Option(help="JSON object of settings that differ from the strategy's.")
    ] = None,
    assistant: Annotated[
        str | None, typer.Option(help="Folder or Hub name of a second model, for strategies that draft with one.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8000,
    device: Annotated[str, typer.Option(help="Where to run: auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="Type of the weights; auto takes the stored one.")] = "auto",
    attn_implementation: Annotated[str | None, typer.Option(help="Attention that reads the prompts.")] = None,
    quantization: Annotated[str | None, typer.Option(help="bnb-4bit or bnb-8bit.")] = None,
    chat_template_kwargs: Annotated[
        str | None, typer.Option(help="JSON object of arguments of the chat template.")
    ] = None,
    reasoning: Annotated[Reasoning, typer.Option(help="Thinking, for models whose template has it.")] = Reasoning.AUTO,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
    enable_cors: Annotated[bool, typer.Option("--enable-cors", help="Let pages of any origin ask.")] = False,
    default_seed: Annotated[int | None, typer.Option(help="Of sampling.")] = None,
    log_level: Annotated[LogLevel, typer.Option(help="Of Transformers.")] = LogLevel.WARNING,
) -> None:
    """Serve a model as `transformers serve` does (OpenAI's API), with a strategy, and /metrics for Prometheus."""
    from .. import serving

    settings: Any = None
    if strategy_config is not None:
        try:
            settings = json.loads(strategy_config)
        except json.JSONDecodeError as error:
            raise ValueError(f"`--strategy-config` is not JSON: {error}.") from error
        if not isinstance(settings, dict):
            raise ValueError(f"`--strategy-config` must be a JSON object, got {strategy_config!r}.")
    options = {
        "host": host, "port": port, "device": device, "dtype": dtype, "attn_implementation": attn_implementation,
        "quantization": quantization, "chat_template_kwargs": chat_template_kwargs, "reasoning": reasoning.value,
        "trust_remote_code": trust_remote_code, "enable_cors": enable_cors, "default_seed": default_seed,
        "log_level": log_level.value,
    }  # fmt: skip
    given = {name: value for name, value in options.items() if value is not None}
    serving.serve(model, strategy=strategy, strategy_config=settings, assistant=assistant, **given)
