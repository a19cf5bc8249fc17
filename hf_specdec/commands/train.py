"""The commands `hf-specdec train ...`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..generation.models.draft_model import load_assistant
from .console import Device, Dtype, Model, console, floats, load_model, progress_bar


if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from ..training.data import Text

app = typer.Typer(help="Train what a strategy needs to have learned.", no_args_is_help=True, add_completion=False)

Data = Annotated[list[Path], typer.Option("--data", help="Training text, as `train text` writes it; may be repeated.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the result.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in the folder.")]
Seed = Annotated[int, typer.Option(help="Of order and sampling.")]
Temperature = Annotated[float, typer.Option(help="Of the sampling; 0 is greedy.")]
NewTokens = Annotated[int, typer.Option(help="Tokens of an answer at most.")]
Rewarding = Annotated[str, typer.Option(help="numeric, exact, rouge2, or a function as module:function.")]
Assistant = Annotated[str, typer.Option(help="Folder or Hub name of the draft: a model, or one that was cut.")]
Tokens = Annotated[int, typer.Option(help="Draft tokens per round.")]
Vocabulary = Annotated[int, typer.Option(help="Words that can be proposed, the most frequent; 0 for all.")]
Steps = Annotated[int, typer.Option(help="Optimiser steps at most.")]
Minutes = Annotated[float, typer.Option(help="Stop by the clock; 0 for never.")]
BatchTokens = Annotated[int, typer.Option(help="Tokens per step and process.")]
Rate = Annotated[float, typer.Option(help="Learning rate at its peak.")]
Exclude = Annotated[
    list[Path] | None, typer.Option(help="JSONL of test prompts; training text with one of them is dropped.")
]


@app.command("text")
def train_text(
    prompts: Annotated[Path, typer.Option(help="JSONL of prompts (turns, prompt, question or text).")],
    out: Annotated[Path, typer.Option("--out", help="File to write.")],
    temperatures: Annotated[str, typer.Option(help="Separated by commas; prompts take turns.")] = "1.0,0.7,0.3",
    new_tokens: NewTokens = 256,
    batch_size: Annotated[int, typer.Option(help="Rows decoded together.")] = 32,
    seed: Seed = 0,
    model: Model = "",
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
) -> None:
    """Let the model write its own training text: an answer to every prompt."""
    from ..texts import chat_ids, load_prompts
    from ..training.data import save_texts, write_texts

    chosen = floats(temperatures, "--temperatures")
    loaded, tokenizer = load_model(model, dtype, device)
    ids = [chat_ids(tokenizer, turns) for turns in load_prompts(prompts)]
    with bar("writing", len(ids)) as advance:
        texts = write_texts(
            loaded,
            ids,
            temperatures=chosen,
            max_new_tokens=new_tokens,
            batch_size=batch_size,
            seed=seed,
            progress=advance,
        )
    save_texts(texts, out)
    console.print(f"{len(texts)} texts, {sum(len(text.ids) for text in texts)} tokens, written to {out}")


@app.command("draft")
def train_draft_command(
    data: Data,
    out: Out,
    layers: Annotated[str, typer.Option(help="Layers of the target to start from.")] = "0,1,28,29",
    vocabulary: Vocabulary = 8192,
    steps: Steps = 20000,
    minutes: Minutes = 0,
    batch_tokens: BatchTokens = 2048,
    learning_rate: Rate = 1e-3,
    num_assistant_tokens: Tokens = 4,
    exclude: Exclude = None,
    resume: Resume = False,
    seed: Seed = 0,
    model: Model = "",
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
) -> None:
    """Cut a draft model out of the target and distil it on text that the target wrote."""
    from ..training.draft import DraftTraining, train_draft

    settings = DraftTraining(
        layers=tuple(int(part) for part in floats(layers, "--layers")),
        vocabulary_size=vocabulary or None,
        steps=steps,
        minutes=minutes or None,
        batch_tokens=batch_tokens,
        learning_rate=learning_rate,
        num_assistant_tokens=num_assistant_tokens,
        seed=seed,
    )
    loaded, texts, notes = model_and_texts(data, exclude, model, dtype, device)
    with _distilling(steps) as report:
        train_draft(loaded, texts, out, settings, resume=resume, notes=notes, report=report)
    _finish(out)


@app.command("specbound")
def train_specbound_command(
    data: Data,
    out: Out,
    layers: Annotated[str, typer.Option(help="Depths that get an exit head: 3 is after 3 layers.")],
    kind: Annotated[str, typer.Option(help="adapter, full or block.")] = "adapter",
    rank: Annotated[int, typer.Option(help="Of the maps of kind adapter; 0 for full matrices.")] = 0,
    vocabulary: Vocabulary = 8192,
    steps: Steps = 20000,
    minutes: Minutes = 0,
    batch_tokens: BatchTokens = 2048,
    learning_rate: Rate = 1e-3,
    num_assistant_tokens: Tokens = 6,
    exclude: Exclude = None,
    resume: Resume = False,
    seed: Seed = 0,
    model: Model = "",
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
) -> None:
    """Train SpecBound's exit heads on text that the model wrote; the model itself stays as it is."""
    from ..training.specbound import ExitTraining, train_exit_heads

    settings = ExitTraining(
        layers=tuple(int(part) for part in floats(layers, "--layers")),
        kind=kind,
        rank=rank or None,
        vocabulary_size=vocabulary or None,
        steps=steps,
        minutes=minutes or None,
        batch_tokens=batch_tokens,
        learning_rate=learning_rate,
        num_assistant_tokens=num_assistant_tokens,
        seed=seed,
    )
    loaded, texts, notes = model_and_texts(data, exclude, model, dtype, device)
    with _distilling(steps) as report:
        train_exit_heads(loaded, texts, out, settings, resume=resume, notes=notes, report=report)
    _finish(out)


@app.command("via_sd")
def train_slim_command(
    data: Data,
    mask: Annotated[str, typer.Option(help="Folder of a mask, as `calibrate via_sd` writes it.")],
    out: Out,
    rank: Annotated[int, typer.Option(help="Of the LoRA.")] = 16,
    tv_weight: Annotated[float, typer.Option(help="Of the total variation distance; KL has weight 1.")] = 0.5,
    margin_weight: Annotated[float, typer.Option(help="Of the paper's cost; 0.5 for the lossy mode.")] = 0.0,
    vocabulary: Annotated[int, typer.Option(help="Words that the loss is over, the most frequent; 0 for all.")] = 8192,
    steps: Steps = 20000,
    minutes: Minutes = 0,
    batch_tokens: BatchTokens = 2048,
    learning_rate: Rate = 2e-4,
    num_assistant_tokens: Tokens = 5,
    exclude: Exclude = None,
    resume: Resume = False,
    seed: Seed = 0,
    model: Model = "",
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
) -> None:
    """Train a LoRA for the layers that VIA-SD's slim verifier keeps; the model itself stays as it is."""
    from ..training.via_sd import SlimTraining, train_slim

    settings = SlimTraining(
        rank=rank,
        tv_weight=tv_weight,
        margin_weight=margin_weight,
        vocabulary_size=vocabulary or None,
        steps=steps,
        minutes=minutes or None,
        batch_tokens=batch_tokens,
        learning_rate=learning_rate,
        num_assistant_tokens=num_assistant_tokens,
        seed=seed,
    )
    loaded, texts, notes = model_and_texts(data, exclude, model, dtype, device)
    with _distilling(steps) as report:
        train_slim(loaded, texts, mask, out, settings, resume=resume, notes=notes, report=report)
    _finish(out)


@app.command("spd")
def train_module_command(
    data: Data,
    out: Out,
    stages: Annotated[int, typer.Option(help="Pipeline stages, n.")],
    stage_layers: Annotated[str, typer.Option(help="Layers of each stage, by commas; equal by default.")] = "",
    feature_layers: Annotated[str, typer.Option(help="Hidden states that it reads, by commas: 0,6,18,29.")] = "",
    draft_layers: Annotated[int, typer.Option(help="Decoder layers of the module.")] = 2,
    templates: Annotated[str, typer.Option(help="Layers that these begin as copies of, by commas.")] = "",
    fill_rate: Annotated[float, typer.Option(help="Acceptance rate to train for; 0 for the paper's rule.")] = 0.0,
    start: Annotated[str, typer.Option(help="Another draft module, to begin with its layers and head.")] = "",
    layout: Annotated[str, typer.Option(help="exact or shared; by default exact for up to 8 stages.")] = "",
    max_length: Annotated[int, typer.Option(help="Longer texts are cut; the module looks that far back.")] = 512,
    vocabulary: Vocabulary = 8192,
    steps: Steps = 20000,
    minutes: Minutes = 0,
    batch_tokens: BatchTokens = 2048,
    learning_rate: Rate = 1e-3,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 500,
    exclude: Exclude = None,
    resume: Resume = False,
    seed: Seed = 0,
    model: Model = "",
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
) -> None:
    """Train SPD's draft module on text that the model wrote; the model itself stays as it is."""
    from ..training.spd import ModuleTraining, train_draft_module

    settings = ModuleTraining(
        num_stages=stages,
        stage_layers=_layers(stage_layers, "--stage-layers"),
        feature_layers=_layers(feature_layers, "--feature-layers"),
        num_draft_layers=draft_layers,
        templates=_layers(templates, "--templates"),
        fill_rate=fill_rate or None,
        start=start or None,
        layout=layout or None,
        max_length=max_length,
        vocabulary_size=vocabulary or None,
        steps=steps,
        minutes=minutes or None,
        batch_tokens=batch_tokens,
        learning_rate=learning_rate,
        save_every=save_every,
        seed=seed,
    )
    loaded, texts, notes = model_and_texts(data, exclude, model, dtype, device)
    with _distilling(steps) as report:
        train_draft_module(loaded, texts, out, settings, resume=resume, notes=notes, report=report)
    _finish(out)


@app.command("convert-spd")
def convert_module_command(
    checkpoint: Annotated[Path, typer.Option(help="A .pt file of the reference implementation, version 11.")],
    out: Out,
    model: Model = "",
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
) -> None:
    """Convert a draft module that the reference implementation of SPD has trained."""
    from ..training.convert_spd import convert_reference

    convert_reference(checkpoint, load_model(model, dtype, device)[0], out)
    _finish(out)


def _layers(text: str, option: str) -> tuple[int, ...] | None:
    return tuple(int(part) for part in floats(text, option)) if text else None


@app.command("diversed")
def train_diversed_command(
    items: Annotated[Path, typer.Option(help="JSONL of tasks: question, and what the reward needs.")],
    out: Out,
    assistant: Assistant,
    reward: Rewarding = "numeric",
    accept_coefs: Annotated[str, typer.Option(help="Lambdas to train with, separated by commas.")] = "0.02,0.05,0.1",
    updates: Annotated[int, typer.Option(help="Optimiser steps for each.")] = 100,
    prompts_per_update: Annotated[int, typer.Option(help="Prompts per step and process.")] = 8,
    samples: Annotated[int, typer.Option(help="Answers to each prompt.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="Of Adam.")] = 1e-3,
    temperature: Temperature = 1.0,
    new_tokens: NewTokens = 64,
    num_assistant_tokens: Tokens = 5,
    resume: Resume = False,
    seed: Seed = 0,
    model: Model = "",
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
) -> None:
    """Train DIVERSED's head on a task with a reward."""
    from ..training.diversed import DiversedTraining, train_diversed
    from ..training.rewards import resolve_reward
    from ..training.tasks import Sampling, load_items

    settings = DiversedTraining(
        accept_coefs=tuple(floats(accept_coefs, "--accept-coefs")),
        updates=updates,
        prompts_per_update=prompts_per_update,
        samples=samples,
        sampling=Sampling(temperature=temperature, max_new_tokens=new_tokens),
        num_assistant_tokens=num_assistant_tokens,
        learning_rate=learning_rate,
        seed=seed,
    )
    function, tasks = resolve_reward(reward), load_items(items)
    loaded, tokenizer = load_model(model, dtype, device)
    draft = load_assistant(loaded, assistant, dtype, device)
    with bar("training", updates * len(settings.accept_coefs)) as advance:

        def report(figures: dict[str, Any]) -> None:
            if "held_out" not in figures:
                advance(1)
                return
            score = figures["held_out"]
            console.print(
                f"lambda {figures['accept_coef']}, update {figures['update']}: reward {score['reward']:.3f}, accepted "
                f"{score['acceptance']:.3f}, {score['tokens_per_forward']:.2f} tokens per forward, mean weight "
                f"{score['method'].get('mean_weight', 0):.3f}"
            )

        train_diversed(loaded, draft, tokenizer, tasks, function, out, settings, resume=resume, report=report)
    _finish(out)


def _finish(out: Path) -> None:
    """Give the result a card, and say where it is."""
    from ..card import write_card
    from ..configuration import load_config

    write_card(out, load_config(out))
    console.print(f"written to {out}")


def model_and_texts(
    data: Sequence[Path], exclude: Sequence[Path] | None, model: str, dtype: str, device: str
) -> tuple[PreTrainedModel, list[Text], dict[str, Any]]:
    """Return the model, the training text without what holds a test prompt, and what to note of it."""
    from ..texts import load_prompts
    from ..training.data import exclude as dropped
    from ..training.data import load_texts

    texts = load_texts(data)
    loaded, tokenizer = load_model(model, dtype, device)
    before = len(texts)
    for path in exclude or []:
        texts = dropped(texts, tokenizer, [turn for turns in load_prompts(path) for turn in turns])
    console.print(f"{len(texts)} texts, {sum(len(t.ids) for t in texts)} tokens; {before - len(texts)} dropped")
    notes = {"command": shlex.join(["hf-specdec", *sys.argv[1:]]), "data": [path.name for path in data]}
    return loaded, texts, {**notes, "excluded": [path.name for path in exclude or []]}


@contextmanager
def _distilling(steps: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Show the progress of a distillation; yields what it reports to."""
    with bar("training", steps) as advance:

        def report(figures: dict[str, Any]) -> None:
            if "loss" in figures:
                advance(1)
            else:
                console.print({key: round(v, 4) if isinstance(v, float) else v for key, v in figures.items()})

        yield report


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar; yields a function that advances it."""
    with progress_bar() as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)
