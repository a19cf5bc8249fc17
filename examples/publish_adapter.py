"""A trained adapter to the Hub, and back from there into `generate()`.

    python examples/publish_adapter.py my-draft my-name/my-draft --dry-run out   # writes the repository's files
    python examples/publish_adapter.py my-draft my-name/my-draft --private       # uploads, and uses it from there

The folder is what `hf-specdec train ...` wrote. Uploading needs a token (`hf auth login`, or HF_TOKEN); HF_ENDPOINT
names another server than huggingface.co. `hf-specdec push` is the same without the trial.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_specdec  # noqa: F401  adds assistant_strategy= to generate()
from hf_specdec import SpeculationConfig


def try_out(repo: str, model: str, prompt: str, new_tokens: int) -> None:
    """Load config and adapter by the repository's name, and print a text and its statistics."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model)
    out = loaded.generate(
        **tokenizer(prompt, return_tensors="pt"),
        max_new_tokens=new_tokens,
        do_sample=False,
        assistant_strategy=repo,
        return_dict_in_generate=True,
    )
    typer.echo(tokenizer.decode(out.sequences[0], skip_special_tokens=True))
    stats = out.speculation
    typer.echo(
        "nothing drafted" if stats is None else f"{stats.strategy}: {stats.acceptance_rate:.0%} of drafts accepted"
    )


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of a trained adapter, or of a config.")],
    repo: Annotated[str, typer.Argument(help="Hub repository, NAME/REPO.")],
    dry_run: Annotated[Path | None, typer.Option(help="Write the files here instead of uploading them.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    model: Annotated[str, typer.Option(help="The model that it is for.")] = "HuggingFaceTB/SmolLM2-135M-Instruct",
    prompt: Annotated[str, typer.Option(help="What to continue afterwards.")] = "The capital of France is",
    new_tokens: Annotated[int, typer.Option(help="Tokens of that at most.")] = 32,
) -> None:
    """Publish an adapter and use it from where it was published."""
    config = SpeculationConfig.from_pretrained(folder)
    if dry_run is not None:
        config.save_pretrained(dry_run)
        for path in sorted(path for path in dry_run.rglob("*") if path.is_file()):
            typer.echo(f"{path.relative_to(dry_run)}: {path.stat().st_size} bytes")
        return
    typer.echo(config.push_to_hub(repo, private=private or None))
    try_out(repo, model, prompt, new_tokens)


if __name__ == "__main__":
    typer.run(main)
