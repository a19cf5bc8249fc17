"""The commands `hf-specdec train ...`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..training.data import Sampling
from ..training.diversed import DiversedTraining, train_diversed
from ..training.draft import DraftTraining, train_draft
from ..training.settings import DistillSettings
from ..training.spd import ModuleTraining, train_draft_module
from ..training.specbound import ExitTraining, train_exit_heads
from ..training.via_sd import SlimTraining, train_slim
from .console import SMOLLM2, Target, bar, console, floats, load_model
from .options import expanded


if TYPE_CHECKING:
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
Exclude = Annotated[
    list[Path] | None, typer.Option(help="JSONL of test prompts; training text with one of them is dropped.")
]


@app.command("text")
@expanded
def train_text(
    prompts: Annotated[Path, typer.Option(help="JSONL of prompts (turns, prompt, question or text).")],
    out: Annotated[Path, typer.Option("--out", help="File to write.")],
    temperatures: Annotated[str, typer.Option(help="Separated by commas; prompts take turns.")] = "1.0,0.7,0.3",
    new_tokens: NewTokens = 256,
    batch_size: Annotated[int, typer.Option(help="Rows decoded together.")] = 32,
    seed: Seed = 0,
    target: Target = SMOLLM2,
) -> None:
    """Let the model write its own training text: an answer to every prompt."""
    from ..texts import chat_ids, load_prompts
    from ..training.data import save_texts, write_texts

    chosen = floats(temperatures, "--temperatures")
    loaded, tokenizer = load_model(target)
    ids = [chat_ids(tokenizer, turns) for turns in load_prompts(prompts)]
    with bar("writing", len(ids)) as advance:
        texts = write_texts(
            loaded, ids, temperatures=chosen, max_new_tokens=new_tokens, batch_size=batch_size, seed=seed,
            progress=advance,
        )  # fmt: skip
    save_texts(texts, out)
    console.print(f"{len(texts)} texts, {sum(len(text.ids) for text in texts)} tokens, written to {out}")


def _distillation(
    name: str,
    about: str,
    settings: type[DistillSettings],
    train: Callable[..., Any],
    more: dict[str, Any] | None = None,
    **defaults: Any,
) -> None:
    """Add the command `train NAME`, which distils by `train`; see `expanded` for the last two arguments."""

    def command(
        data: Data,
        out: Out,
        settings: DistillSettings,
        exclude: Exclude = None,
        resume: Resume = False,
        target: Target = SMOLLM2,
        **more: Any,
    ) -> None:
        loaded, texts, notes = model_and_texts(data, exclude, target)
        with bar("training", settings.steps) as advance:

            def report(figures: dict[str, Any]) -> None:
                if "loss" in figures:
                    advance(1)
                else:
                    console.print({key: round(v, 4) if isinstance(v, float) else v for key, v in figures.items()})

            train(loaded, texts, folder=out, settings=settings, resume=resume, notes=notes, report=report, **more)
        finish(out)

    command.__annotations__["settings"] = settings
    app.command(name, help=about)(expanded(command, more, **defaults))


_ABOUT_DRAFT = "Cut a draft model out of the target and distil it on text that the target wrote."
_ABOUT_HEADS = "Train SpecBound's exit heads on text that the model wrote; the model itself stays as it is."
_ABOUT_SLIM = "Train a LoRA for the layers that VIA-SD's slim verifier keeps; the model itself stays as it is."
_ABOUT_MODULE = "Train SPD's draft module on text that the model wrote; the model itself stays as it is."
_MASK = Annotated[str, typer.Option(help="Folder of a mask, as `calibrate via_sd` writes it.")]

_distillation("draft", _ABOUT_DRAFT, DraftTraining, train_draft, layers=(0, 1, 28, 29))
_distillation("specbound", _ABOUT_HEADS, ExitTraining, train_exit_heads)
_distillation("via_sd", _ABOUT_SLIM, SlimTraining, train_slim, {"mask": _MASK})
_distillation("spd", _ABOUT_MODULE, ModuleTraining, train_draft_module)


@app.command("convert-spd")
@expanded
def convert_module_command(
    checkpoint: Annotated[Path, typer.Option(help="A .pt file of the reference implementation, version 11.")],
    out: Out,
    target: Target = SMOLLM2,
) -> None:
    """Convert a draft module that the reference implementation of SPD has trained."""
    from ..training.convert_spd import convert_reference

    convert_reference(checkpoint, load_model(target)[0], out)
    finish(out)


@app.command("diversed")
@expanded
def train_diversed_command(
    items: Annotated[Path, typer.Option(help="JSONL of tasks: question, and what the reward needs.")],
    out: Out,
    assistant: Assistant,
    settings: DiversedTraining,
    reward: Rewarding = "numeric",
    temperature: Temperature = 1.0,
    new_tokens: NewTokens = 64,
    resume: Resume = False,
    target: Target = SMOLLM2,
) -> None:
    """Train DIVERSED's head on a task with a reward."""
    from ..training.rewards import resolve_reward
    from ..training.tasks import load_items

    settings = replace(settings, sampling=Sampling(temperature=temperature, max_new_tokens=new_tokens))
    function, tasks = resolve_reward(reward), load_items(items)
    loaded, tokenizer = load_model(target)
    draft = target.load_second(loaded, assistant)
    with bar("training", settings.updates * len(settings.accept_coefs)) as advance:

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
    finish(out)


def finish(out: Path, done: str = "written") -> None:
    """Give the result a card, and say where it is."""
    from ..card import write_card
    from ..configuration import load_config

    write_card(out, load_config(out))
    console.print(f"{done} to {out}")


def model_and_texts(
    data: Sequence[Path], exclude: Sequence[Path] | None, target: Target
) -> tuple[PreTrainedModel, list[Text], dict[str, Any]]:
    """Return the model, the training text without what holds a test prompt, and what to note of it."""
    from ..texts import load_prompts
    from ..training.data import exclude as dropped
    from ..training.data import load_texts

    texts = load_texts(data)
    loaded, tokenizer = load_model(target)
    before = len(texts)
    for path in exclude or []:
        texts = dropped(texts, tokenizer, [turn for turns in load_prompts(path) for turn in turns])
    console.print(f"{len(texts)} texts, {sum(len(t.ids) for t in texts)} tokens; {before - len(texts)} dropped")
    notes = {"command": shlex.join(["hf-specdec", *sys.argv[1:]]), "data": [path.name for path in data]}
    return loaded, texts, {**notes, "excluded": [path.name for path in exclude or []]}
