"""Training text: sequences of token ids with a known prompt, in one safetensors file, and how to write more of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Text:
    """One sequence.

    Args:
        ids (`torch.Tensor` of shape `[n]`, int64): prompt, then answer.
        prompt_length (`int`): tokens of the prompt.
        temperature (`float`): that the answer was sampled at.
    """

    ids: torch.Tensor
    prompt_length: int
    temperature: float = 1.0

    @property
    def answer(self) -> slice:
        """The positions that predict the answer's tokens."""
        return slice(self.prompt_length - 1, len(self.ids) - 1)


def load_texts(paths: Iterable[str | Path]) -> list[Text]:
    """Return the sequences of files that `save_texts` wrote.

    Raises:
        ValueError: for a file without the tensors `tokens`, `prompt_length`, `length` and `temperature`, or whose
            lengths don't add up.
    """
    texts = []
    for path in paths:
        found = load_file(path)
        missing = {"tokens", "prompt_length", "length", "temperature"} - set(found)
        if missing:
            raise ValueError(f"{str(path)!r} lacks the tensors {', '.join(sorted(missing))}.")
        lengths = found["length"].tolist()
        if sum(lengths) != len(found["tokens"]):
            raise ValueError(f"{str(path)!r} holds {len(found['tokens'])} tokens, its lengths say {sum(lengths)}.")
        pieces = found["tokens"].to(torch.int64).split(lengths)
        columns = zip(pieces, found["prompt_length"].tolist(), found["temperature"].tolist(), strict=True)
        texts += [Text(ids, prompt, temperature) for ids, prompt, temperature in columns]
    return texts


def save_texts(texts: Sequence[Text], path: str | Path) -> None:
    """Write sequences, ids as uint16 where they fit."""
    tokens = torch.cat([text.ids for text in texts])
    save_file(
        {
            "tokens": tokens.to(torch.uint16 if int(tokens.max()) < 2**16 else torch.int32),
            "prompt_length": torch.tensor([text.prompt_length for text in texts], dtype=torch.int32),
            "length": torch.tensor([len(text.ids) for text in texts], dtype=torch.int32),
            "temperature": torch.tensor([text.temperature for text in texts]),
        },
        path,
    )


def exclude(texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, prompts: Iterable[str]) -> list[Text]:
    """Return the sequences that contain none of `prompts`, white space and case apart."""
    banned = {" ".join(prompt.lower().split()) for prompt in prompts} - {""}
    plain = (" ".join(cast(str, tokenizer.decode(text.ids)).lower().split()) for text in texts)
    return [text for text, words in zip(texts, plain, strict=True) if not any(prompt in words for prompt in banned)]


def end_tokens(model: PreTrainedModel) -> list[int]:
    """Return the ids that end a model's text."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else ends if isinstance(ends, list) else [ends]


@dataclass(frozen=True)
class Sampling:
    """How answers are decoded; a temperature of 0 is greedy.

    Args:
        temperature (`float`, *optional*, defaults to 1.0): of the distributions.
        top_k (`int`, *optional*, defaults to 0): words kept, 0 for all.
        top_p (`float`, *optional*, defaults to 1.0): mass kept.
        max_new_tokens (`int`, *optional*, defaults to 64): tokens of an answer.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or self.max_new_tokens < 1:
            raise ValueError(f"Sampling settings are out of range: {self}.")

    def options(self) -> dict[str, Any]:
        """Return keywords of `generate()`."""
        if not self.temperature:
            return {"do_sample": False, "max_new_tokens": self.max_new_tokens}
        warpers = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return {"do_sample": True, "max_new_tokens": self.max_new_tokens, **warpers}


def answers(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling, options: dict[str, Any]
) -> list[list[int]]:
    """Return the ids of an answer to each prompt, its end token included, decoded as one batch.

    Args:
        options (`dict`): keywords of `generate()`: the strategy, an assistant.
    """
    ids, mask = pad_left(prompts, model.device)
    output = cast(Any, model).generate(ids, attention_mask=mask, **sampling.options(), **options)
    ends = end_tokens(model)
    rows = output[:, ids.shape[1] :].tolist()
    return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in rows]


def write_texts(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    *,
    temperatures: Sequence[float] = (1.0, 0.7, 0.3),
    max_new_tokens: int = 256,
    batch_size: int = 32,
    seed: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Text]:
    """Let `model` answer `prompts`, each at the next of `temperatures` in turn, and return prompts with answers.

    Args:
        model (`PreTrainedModel`): decodes with `assistant_strategy="plain"`.
        prompts (`list[list[int]]`): ids of each prompt.
        max_new_tokens (`int`): tokens of an answer at most.
        batch_size (`int`): rows decoded together; prompts of similar length are put together.
        seed (`int`): of the sampling.
        progress (`Callable[[int], None]`, *optional*): called with the number of answers after each batch.
    """
    texts: list[Text] = []
    for turn, temperature in enumerate(temperatures):
        chosen = sorted(prompts[turn :: len(temperatures)], key=len)
        sampling = Sampling(temperature, max_new_tokens=max_new_tokens)
        for start in range(0, len(chosen), batch_size):
            part = chosen[start : start + batch_size]
            torch.manual_seed(seed + 1000 * turn + start)
            written = answers(model, part, sampling, {"assistant_strategy": "plain"})
            for prompt, answer in zip(part, written, strict=True):
                texts.append(Text(torch.tensor([*prompt, *answer]), len(prompt), temperature))
            progress(len(part))
    return texts


def pad_left(rows: Sequence[Sequence[int]], device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask `[b, T]` of rows padded on the left with id 0."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask
