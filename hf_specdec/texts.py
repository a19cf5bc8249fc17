"""Prompts to measure with: long real text that Python itself ships, and JSONL files of prompts."""

from __future__ import annotations

import functools
import json
import re
from os import PathLike
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["chat_ids", "load_prompts", "long_batch", "long_prompt"]

_ONE_MESSAGE = ("prompt", "question", "text")
QUESTION = "Summarise the text above: explain its main points one after the other, in full sentences."


def chat_ids(tokenizer: PreTrainedTokenizerBase, turns: str | list[str]) -> list[int]:
    """Return the ids of a prompt that asks for the answer to a user's message.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the model's. Without a chat template the message itself is the prompt.
        turns (`str` or `list[str]`): the message. Of a list the first is taken: later turns need the answer to it.
    """
    message = turns if isinstance(turns, str) else turns[0]
    if tokenizer.chat_template is None:
        return tokenizer(message)["input_ids"]
    return tokenizer(_render(tokenizer, message), add_special_tokens=False)["input_ids"]


def long_prompt(
    tokenizer: PreTrainedTokenizerBase, tokens: int, offset: int = 0, question: str = QUESTION
) -> list[int]:
    """Return the ids of a chat prompt, exactly `tokens` long, that asks about a passage of the Python documentation.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the model's.
        tokens (`int`): length of the whole prompt, template and question included.
        offset (`int`, *optional*, defaults to 0): which passage: each begins at the first paragraph after the end of
            the one before, so prompts of different offsets share no text but template and question.
        question (`str`, *optional*): what is asked after the passage; a request for a summary by default.
    """
    head, tail = _frame(tokenizer, question)
    length = tokens - len(head) - len(tail)
    if length < 1:
        raise ValueError(f"`tokens` must exceed the {len(head) + len(tail)} of template and question, got {tokens}.")
    return head + _passage(tokenizer, length, offset) + tail


def long_batch(tokenizer: PreTrainedTokenizerBase, tokens: int, batch: int, offset: int = 0) -> torch.Tensor:
    """Return `batch` prompts of [`long_prompt`] with different passages, `[batch, tokens]`, from `offset` on."""
    return torch.tensor([long_prompt(tokenizer, tokens, offset + row) for row in range(batch)])


def load_prompts(path: str | PathLike[str]) -> list[list[str]]:
    """Read prompts from a JSONL file: each line an object with `turns` (a list of messages), or `prompt`,
    `question` or `text` (one message).

    Args:
        path (`str` or `os.PathLike`): the file. Empty lines are passed over, other fields are not read.

    Returns:
        `list[list[str]]`: the user's messages of each prompt.

    Raises:
        `ValueError`: a line is no such object, or the file holds none; the message names file and line.
    """
    prompts = []
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                prompts.append(_turns(line, f"{path}, line {number}"))
    if not prompts:
        raise ValueError(f"{path}: the file holds no prompt.")
    return prompts


def _turns(line: str, where: str) -> list[str]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno}).") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object, got {type(record).__name__}.")
    if "turns" in record:
        field, turns = "turns", record["turns"]
    else:
        field = next((name for name in _ONE_MESSAGE if name in record), "")
        if not field:
            raise ValueError(f"{where}: expected a field turns, {', '.join(_ONE_MESSAGE)}, got {sorted(record)}.")
        turns = [record[field]]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
        allowed = "a list of non-empty strings" if field == "turns" else "a non-empty string"
        raise ValueError(f"{where}: `{field}` must be {allowed}, got {record[field]!r}.")
    return turns


@functools.lru_cache(maxsize=1)
def _corpus() -> str:
    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def _passage(tokenizer: PreTrainedTokenizerBase, tokens: int, offset: int) -> list[int]:
    if tokens < 1:
        raise ValueError(f"`tokens` must be at least 1, got {tokens}.")
    if offset < 0:
        raise ValueError(f"`offset` must not be negative, got {offset}.")
    start, ids = 0, _encode_from(tokenizer, 0, tokens)
    for _ in range(offset):
        start = _next_paragraph(start + len(tokenizer.decode(ids)))
        ids = _encode_from(tokenizer, start, tokens)
    return ids


def _next_paragraph(position: int) -> int:
    """Return where the first paragraph after `position` begins, going round at the end of the corpus."""
    corpus = _corpus()
    gap = re.compile("\n\n+").search(corpus, position % len(corpus))
    return 0 if gap is None else gap.end()


def _encode_from(tokenizer: PreTrainedTokenizerBase, start: int, tokens: int) -> list[int]:
    """Return the first `tokens` ids of the corpus read from character `start`, going round at its end."""
    corpus = _corpus()
    characters = 8 * tokens + 64  # twice what prose usually takes, so that the whole corpus is rarely encoded
    while True:
        text = (corpus[start:] + "\n\n" + corpus[:start])[:characters]
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= tokens:
            return ids[:tokens]
        if characters >= len(corpus):
            raise ValueError(f"`tokens` must be at most {len(ids)}, which is the whole text; got {tokens}.")
        characters *= 2


def _render(tokenizer: PreTrainedTokenizerBase, message: str) -> str:
    chat = [{"role": "user", "content": message}]
    return str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))


def _frame(tokenizer: PreTrainedTokenizerBase, question: str) -> tuple[list[int], list[int]]:
    """Return the ids before and after the passage in a chat prompt."""
    mark = "<the-passage>"
    message = f"{mark}\n\n{question}"
    if tokenizer.chat_template is None:
        before = tokenizer("")["input_ids"]  # what the tokenizer itself begins with
    else:
        message = _render(tokenizer, message)
        before = []
    head, tail = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in message.split(mark))
    return before + head, tail
