"""Distilling a draft model: a few layers of the target learn its next-token law on text that it wrote itself.

The loss is KL(target || draft) over the draft's vocabulary, at temperature 1, at every position of prompt and answer.
The target runs once over each sequence; its last hidden states are kept while they fit, and later epochs read them.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from ..generation.assisted import AssistedConfig
from ..generation.draft_model import cut_draft, own_parameters, save_draft
from ..generation.vocabulary import ReducedHead
from .data import Text


_CHECKPOINT = "checkpoint"
_PROGRESS = "progress.json"
_STATE = "state.pt"
_HELD_OUT = 64


@dataclass(frozen=True)
class DraftTraining:
    """Settings of `train_draft`.

    Args:
        layers (`tuple[int, ...]`): layers of the target to start from, ascending.
        vocabulary_size (`int`, *optional*, defaults to 8192): words that the draft can propose, the most frequent of
            the training text; `None` for all.
        steps (`int`, *optional*, defaults to 20000): optimiser steps at most.
        minutes (`float`, *optional*): stop by the clock; the learning rate follows whichever ends first.
        batch_tokens (`int`, *optional*, defaults to 2048): tokens per step and process, padding included.
        max_length (`int`, *optional*, defaults to 512): longer sequences are cut.
        learning_rate (`float`, *optional*, defaults to 1e-3): at its peak; Adam, 100 steps of warm-up, then a cosine.
        num_assistant_tokens (`int`, *optional*, defaults to 4): written into the saved settings.
        save_every (`int`, *optional*, defaults to 500): steps between checkpoints.
        cache_gib (`float`, *optional*, defaults to 4.0): memory for the target's hidden states.
        seed (`int`, *optional*, defaults to 0): of the order, and of what is held out.
    """

    layers: tuple[int, ...]
    vocabulary_size: int | None = 8192
    steps: int = 20000
    minutes: float | None = None
    batch_tokens: int = 2048
    max_length: int = 512
    learning_rate: float = 1e-3
    num_assistant_tokens: int = 4
    save_every: int = 500
    cache_gib: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_tokens", "max_length", "save_every", "num_assistant_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.learning_rate <= 0 or (self.minutes is not None and self.minutes <= 0):
            raise ValueError("`learning_rate` and `minutes` must be above 0.")
        if self.vocabulary_size is not None and self.vocabulary_size < 1:
            raise ValueError(f"`vocabulary_size` must be at least 1, got {self.vocabulary_size}.")


def frequent_words(texts: Sequence[Text], size: int, always: Sequence[int] = ()) -> tuple[torch.Tensor, float]:
    """Return the `size` ids that answers use most, ascending, and the share of answer tokens that they cover.

    Args:
        always (`list[int]`): ids that are taken in any case, such as the end of the text.
    """
    counts: Counter[int] = Counter()
    prompts: Counter[int] = Counter()
    for text in texts:
        counts.update(text.ids[text.prompt_length :].tolist())
        prompts.update(text.ids[: text.prompt_length].tolist())
    # words of the prompts fill up where answers use fewer
    ranked = [token for counter in (counts, prompts) for token, _ in counter.most_common()]
    chosen = list(dict.fromkeys([*always, *ranked]))[:size]
    covered = sum(counts[token] for token in chosen) / max(sum(counts.values()), 1)
    return torch.tensor(sorted(chosen)), covered


class _Student(nn.Module):
    """The draft as a function from ids to logits over its vocabulary (one module, so that it can be distributed)."""

    def __init__(self, draft: PreTrainedModel) -> None:
        super().__init__()
        self.draft = draft

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.draft.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return _logits(self.draft.get_output_embeddings(), hidden)


def _logits(head: Any, hidden: torch.Tensor) -> torch.Tensor:
    return (head.reduced(hidden) if isinstance(head, ReducedHead) else head(hidden)).float()


class _Teacher:
    """The target's last hidden states of each text, kept as far as they fit."""

    def __init__(self, target: PreTrainedModel, texts: Sequence[Text], gib: float) -> None:
        self.target, self.texts = target, texts
        width = target.config.get_text_config(decoder=True).hidden_size
        self.room = int(gib * 2**30 / (2 * width))
        self.kept: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, indices: Sequence[int], ids: torch.Tensor) -> torch.Tensor:
        """Return the states `[b, T, H]` of the texts `indices`, whose padded ids are `ids` `[b, T]`."""
        if all(index in self.kept for index in indices):
            return nn.utils.rnn.pad_sequence([self.kept[i] for i in indices], batch_first=True).to(ids.device)
        states = self.target.base_model(input_ids=ids, use_cache=False).last_hidden_state
        for index, row in zip(indices, states, strict=True):
            length = min(len(self.texts[index].ids), ids.shape[1])
            if index not in self.kept and length <= self.room:
                self.room -= length
                self.kept[index] = row[:length].to("cpu", torch.bfloat16).clone()
        return states


def batches(lengths: Sequence[int], batch_tokens: int, seed: int) -> list[list[int]]:
    """Return an epoch's batches of indices: similar lengths together, at most `batch_tokens` padded tokens each."""
    order = torch.Generator().manual_seed(seed)
    noise = torch.rand(len(lengths), generator=order).tolist()
    ranked = sorted(range(len(lengths)), key=lambda i: lengths[i] * (0.9 + 0.2 * noise[i]))
    found: list[list[int]] = [[]]
    for index in ranked:
        if found[-1] and max(lengths[index], *(lengths[i] for i in found[-1])) * (len(found[-1]) + 1) > batch_tokens:
            found.append([])
        found[-1].append(index)
    return [found[i] for i in torch.randperm(len(found), generator=order).tolist()]


def train_draft(
    target: PreTrainedModel,
    texts: Sequence[Text],
    folder: str | Path,
    settings: DraftTraining,
    *,
    resume: bool = False,
    notes: dict[str, Any] | None = None,
    report: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, float]:
    """Train a draft and write it to `folder`.

    Args:
        target (`PreTrainedModel`): frozen; on the device to train on.
        texts (`list[Text]`): training text; every 50th, at most 64, is held out.
        folder (`str` or `Path`): gets the draft at every checkpoint, and a folder `checkpoint` to resume from.
        settings (`DraftTraining`): how.
        resume (`bool`, *optional*, defaults to `False`): go on from the folder's checkpoint.
        notes (`dict`, *optional*): what else to record in the draft's config file.
        report (`Callable[[dict], None]`, *optional*): gets `step`, `seconds`, `loss` and `learning_rate` after each
            step, and the held-out figures as well after each checkpoint.

    Returns:
        The held-out figures: `agreement` (share of answer positions where the most likely words agree) and `overlap`
        (the mean of sum(min(p, q)), which is the acceptance rate of sampling at temperature 1).

    Raises:
        ValueError: for fewer than 2 texts, or a checkpoint that was made with other settings.
        FileNotFoundError: if there is nothing to resume from.
    """
    if len(texts) < 2:
        raise ValueError(f"`texts` must hold at least 2 sequences, got {len(texts)}.")
    run = _Run(target, texts, Path(folder), settings, notes or {}, report)
    if resume:
        run.resume()
    figures: dict[str, float] = {}
    for indices in run.batches():
        if run.done() >= 1:
            break
        run.learn(indices)
        figures = run.save() if run.step % settings.save_every == 0 else {}
    return figures or run.save()


class _Run:
    """One training run: the draft, its optimiser, and what both models are compared on."""

    def __init__(
        self,
        target: PreTrainedModel,
        texts: Sequence[Text],
        path: Path,
        settings: DraftTraining,
        notes: dict[str, Any],
        report: Callable[[dict[str, Any]], None],
    ) -> None:
        self.target, self.path, self.settings, self.notes, self.report = target, path, settings, notes, report
        self.accelerator = Accelerator(cpu=target.device.type == "cpu")
        torch.manual_seed(settings.seed)
        texts = [Text(text.ids[: settings.max_length], text.prompt_length, text.temperature) for text in texts]
        apart = max(50, len(texts) // _HELD_OUT) if len(texts) >= 100 else len(texts)
        self.held_out, self.train = texts[::apart], [text for i, text in enumerate(texts) if i % apart]
        vocabulary, self.covered = None, 1.0
        if settings.vocabulary_size is not None:
            ends = target.generation_config.eos_token_id
            always = [] if ends is None else ends if isinstance(ends, list) else [ends]
            vocabulary, self.covered = frequent_words(self.train, settings.vocabulary_size, always)
        target.requires_grad_(False).eval()
        self.draft = cut_draft(target, settings.layers, vocabulary)
        self.own = own_parameters(self.draft, target)
        for parameter in self.own.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        self.student = self.accelerator.prepare(_Student(self.draft))
        self.optimizer = self.accelerator.prepare(torch.optim.Adam(self.own.values(), betas=(0.9, 0.95)))
        self.teachers = [_Teacher(target, part, settings.cache_gib) for part in (self.train, self.held_out)]
        # what a checkpoint must share with the run that goes on from it
        self.made_with = json.loads(
            json.dumps({**asdict(settings), "minutes": None, "steps": None, "texts": len(texts)})
        )
        self.step, self.start = 0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Time spent on this draft, earlier runs included."""
        return time.perf_counter() - self.start

    def done(self) -> float:
        """Return the share of the training that lies behind, by steps or by the clock."""
        by_clock = 0.0 if self.settings.minutes is None else self.seconds / 60 / self.settings.minutes
        return max(self.step / self.settings.steps, by_clock)

    def resume(self) -> None:
        """Go on from the checkpoint."""
        folder = self.path / _CHECKPOINT
        noted = json.loads((folder / _PROGRESS).read_text(encoding="utf-8"))
        if noted["settings"] != self.made_with:
            raise ValueError(
                f"The checkpoint in {str(self.path)!r} was made with other settings: {noted['settings']}."
            )
        state = torch.load(folder / _STATE, weights_only=True)
        for name, parameter in self.own.items():
            parameter.data.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.start = noted["step"], time.perf_counter() - noted["seconds"]

    def batches(self) -> Iterator[list[int]]:
        """Yield this process's batches, epoch after epoch, from the next step on."""
        lengths, epoch, skip = [len(text.ids) for text in self.train], 0, self.step
        share = self.accelerator.num_processes
        while True:
            found = batches(lengths, self.settings.batch_tokens, self.settings.seed + epoch)
            found = found[: len(found) // share * share] or found * share
            mine = found[self.accelerator.process_index :: share]
            yield from mine[skip:]
            skip, epoch = max(0, skip - len(mine)), epoch + 1

    def learn(self, indices: Sequence[int]) -> None:
        """Make one optimiser step on the texts `indices`."""
        rate = self.settings.learning_rate * min(1.0, (self.step + 1) / 100)
        rate *= 0.5 * (1 + math.cos(math.pi * min(self.done(), 1.0)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        ids = nn.utils.rnn.pad_sequence([self.train[i].ids for i in indices], batch_first=True)
        ids = ids.to(self.accelerator.device)
        lengths = torch.tensor([len(self.train[i].ids) for i in indices], device=ids.device)
        real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        states = self.teachers[0](indices, ids)
        with torch.autocast(ids.device.type, torch.bfloat16):
            mine = self.student(ids)[real]
        with torch.no_grad():
            theirs = _logits(self.draft.get_output_embeddings(), states[real].to(self.target.dtype))
        loss = nn.functional.kl_div(
            mine.log_softmax(-1), theirs.log_softmax(-1), reduction="batchmean", log_target=True
        )
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.own.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.report({"step": self.step, "seconds": self.seconds, "loss": float(loss.detach()), "learning_rate": rate})

    def save(self) -> dict[str, float]:
        """Write the draft and a checkpoint; return the held-out figures."""
        settings = self.settings
        found = _evaluate(self.draft, self.target, self.held_out, self.teachers[1], settings.batch_tokens)
        if self.accelerator.is_main_process:
            training = {**asdict(settings), "texts": len(self.train), "steps_done": self.step}
            record = {"training": {**training, "coverage": self.covered}, "held_out": found, **self.notes}
            config = AssistedConfig(num_assistant_tokens=settings.num_assistant_tokens)
            save_draft(self.draft, self.target, settings.layers, self.path, config, record)
            folder = self.path / _CHECKPOINT
            folder.mkdir(exist_ok=True)
            parameters = {name: parameter.data for name, parameter in self.own.items()}
            torch.save({"parameters": parameters, "optimizer": self.optimizer.state_dict()}, folder / _STATE)
            progress = {"step": self.step, "seconds": self.seconds, "settings": self.made_with}
            (folder / _PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
        self.report({"step": self.step, "seconds": self.seconds, **found})
        return found


@torch.no_grad()
def _evaluate(
    draft: PreTrainedModel, target: PreTrainedModel, texts: Sequence[Text], teacher: _Teacher, batch_tokens: int
) -> dict[str, float]:
    """Compare the draft with the target at the answer positions of `texts`."""
    agree = overlap = positions = 0.0
    student, head = _Student(draft), target.get_output_embeddings()
    for indices in batches([len(text.ids) for text in texts], batch_tokens, 0):
        ids = nn.utils.rnn.pad_sequence([texts[i].ids for i in indices], batch_first=True).to(target.device)
        with torch.autocast(target.device.type, torch.bfloat16):
            mine = student(ids)
        states = teacher(indices, ids).to(target.dtype)
        for row, index in enumerate(indices):
            text = texts[index]
            answer = slice(text.prompt_length - 1, len(text.ids) - 1)  # what predicts the answer's tokens
            p, q = _logits(head, states[row, answer]).softmax(-1), mine[row, answer].softmax(-1)
            reduced = draft.get_output_embeddings()
            choice = q.argmax(-1)
            if isinstance(reduced, ReducedHead):
                choice, inside = reduced.ids[choice], p[:, reduced.ids]
            else:
                inside = p
            agree += float((choice == p.argmax(-1)).sum())
            overlap += float(torch.minimum(inside, q).sum())
            positions += len(q)
    return {"agreement": agree / max(positions, 1), "overlap": overlap / max(positions, 1)}
