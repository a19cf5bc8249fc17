"""What distilling has in common: a student learns the frozen target's distribution on text that the target wrote.

The loss is KL(target || student) over the student's vocabulary, at temperature 1, at every position of prompt and
answer. The target runs once over each sequence; its hidden states are kept while they fit, and later epochs read them.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from .data import Text, end_tokens
from .settings import DistillSettings


_HELD_OUT = 64

Settings = TypeVar("Settings", bound=DistillSettings)
Report = Callable[[dict[str, Any]], None]


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
    words = torch.tensor(sorted(chosen))
    return words, coverage(texts, words)


def coverage(texts: Sequence[Text], words: torch.Tensor) -> float:
    """Return the share of answer tokens that are among `words` `[k]`."""
    answers = torch.cat([text.ids[text.prompt_length :] for text in texts])
    return float(torch.isin(answers, words).float().mean())


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


def padded(texts: Sequence[Text], indices: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return the ids `[b, T]` of some texts, padded on the right with id 0."""
    return nn.utils.rnn.pad_sequence([texts[i].ids for i in indices], batch_first=True).to(device)


class Teacher:
    """The target's hidden states of each text, kept as far as they fit.

    Args:
        target (`PreTrainedModel`): frozen.
        texts (`list[Text]`): that it reads.
        gib (`float`): memory for the states.
        depths (`list[int]`): which states: after how many layers, below the model's depth.
    """

    def __init__(self, target: PreTrainedModel, texts: Sequence[Text], gib: float, depths: Sequence[int] = ()) -> None:
        self.target, self.texts, self.depths = target, texts, list(depths)
        width = target.config.get_text_config(decoder=True).hidden_size
        self.room = int(gib * 2**30 / (2 * width * (len(self.depths) + 1)))
        self.kept: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, indices: Sequence[int], ids: torch.Tensor) -> list[torch.Tensor]:
        """Return states `[b, T, H]` of the texts `indices`, whose padded ids are `ids` `[b, T]`.

        One tensor per depth, and at the end the LM head's input.
        """
        if all(index in self.kept for index in indices):
            rows = nn.utils.rnn.pad_sequence([self.kept[i] for i in indices], batch_first=True)
            return list(rows.to(ids.device).unbind(2))
        output = self.target.base_model(input_ids=ids, use_cache=False, output_hidden_states=bool(self.depths))
        # the entry after the last layer is already normed, the others are not
        states = [output.hidden_states[depth] for depth in self.depths] + [output.last_hidden_state]
        for row, index in enumerate(indices):
            length = min(len(self.texts[index].ids), ids.shape[1])
            if index not in self.kept and length <= self.room:
                self.room -= length
                rows = torch.stack([state[row, :length] for state in states], dim=1)
                self.kept[index] = rows.to("cpu", torch.bfloat16)
        return states


class Agreement:
    """Sums over answer positions of how well a student's distribution matches the target's."""

    def __init__(self) -> None:
        self.agree = self.overlap = 0.0
        self.positions = 0

    def add(self, p: torch.Tensor, q: torch.Tensor, words: torch.Tensor | None) -> None:
        """Add positions: the target's distribution `p` `[m, V]`, the student's `q` `[m, F]` over the ids `[F]`."""
        choice = q.argmax(-1)
        self.agree += float(((choice if words is None else words[choice]) == p.argmax(-1)).sum())
        self.overlap += float(torch.minimum(p if words is None else p[:, words], q).sum())
        self.positions += len(q)

    def figures(self) -> dict[str, float]:
        """Return `agreement` (share of positions where the most likely words agree) and `overlap`.

        The overlap is the mean of sum(min(p, q)), the acceptance rate of sampling at temperature 1.
        """
        count = max(self.positions, 1)
        return {"agreement": self.agree / count, "overlap": self.overlap / count}


class Distillation(Generic[Settings]):
    """One training run. A subclass makes the student, and says what its loss, its figures and its files are.

    Args:
        target (`PreTrainedModel`): frozen; on the device to train on.
        texts (`list[Text]`): training text; every 50th, at most 64, is held out.
        path (`str` or `Path`): gets the result at every checkpoint, and a folder `checkpoint` to resume from.
        settings (`DistillSettings`): how.
        notes (`dict`, *optional*): what else to record with the result.
        report (`Callable[[dict], None]`, *optional*): gets `step`, `seconds`, `loss` and `learning_rate` after each
            step, and the held-out figures after each checkpoint.

    Raises:
        ValueError: for fewer than 2 texts, or settings that don't fit the model.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        texts: Sequence[Text],
        path: str | Path,
        settings: Settings,
        notes: dict[str, Any] | None = None,
        report: Report = lambda _: None,
    ) -> None:
        if len(texts) < 2:
            raise ValueError(f"`texts` must hold at least 2 sequences, got {len(texts)}.")
        self.target, self.path, self.notes, self.report = target, Path(path), notes or {}, report
        self.settings = settings
        self.accelerator = Accelerator(cpu=target.device.type == "cpu")
        torch.manual_seed(settings.seed)
        texts = [Text(text.ids[: settings.max_length], text.prompt_length, text.temperature) for text in texts]
        apart = max(50, len(texts) // _HELD_OUT) if len(texts) >= 100 else len(texts)
        self.held_out, self.train = texts[::apart], [text for i, text in enumerate(texts) if i % apart]
        self.vocabulary, self.covered = None, 1.0
        if settings.vocabulary_size is not None:
            ends = end_tokens(target)
            self.vocabulary, self.covered = frequent_words(self.train, settings.vocabulary_size, ends)
        target.requires_grad_(False).eval()
        depths, gib = self.depths(), settings.cache_gib
        self.teacher, self.examiner = (Teacher(target, part, gib, depths) for part in (self.train, self.held_out))
        # what a checkpoint must share with the run that goes on from it
        self.made_with = {**asdict(settings), "minutes": None, "steps": None, "texts": len(texts)}
        self.step, self.start = 0, time.perf_counter()
        self.own: dict[str, nn.Parameter] = {}
        self.optimizer: Any = None
        self.build()

    @classmethod
    def distil(
        cls,
        target: PreTrainedModel,
        texts: Sequence[Text],
        folder: str | Path,
        settings: Settings,
        *,
        resume: bool = False,
        notes: dict[str, Any] | None = None,
        report: Report = lambda _: None,
    ) -> dict[str, Any]:
        """Train a student, write it to `folder`, and return its figures over the held-out texts.

        Args:
            target, texts, folder, settings, notes, report: see the class.
            resume (`bool`, *optional*, defaults to `False`): go on from the folder's checkpoint.

        Raises:
            ValueError: for fewer than 2 texts, settings that don't fit the model, or a checkpoint made with others.
            FileNotFoundError: if there is nothing to resume from.
        """
        return cls(target, texts, folder, settings, notes, report).run(resume=resume)

    def depths(self) -> Sequence[int]:
        """Return after how many layers the student reads the target's states, beside the last."""
        return ()

    def build(self) -> None:
        """Make the student, and `adopt` it."""
        raise NotImplementedError

    def adopt(self, student: nn.Module, own: dict[str, nn.Parameter]) -> Any:
        """Take `own` as what is trained, in float32, and return the student, ready for several processes."""
        self.own = own
        for parameter in own.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        self.optimizer = self.accelerator.prepare(torch.optim.Adam(own.values(), betas=(0.9, 0.95)))
        return self.accelerator.prepare(student)

    @property
    def words(self) -> torch.Tensor | None:
        """The ids `[k]` that the student can propose, on the target's device; `None` for all."""
        return None if self.vocabulary is None else self.vocabulary.to(self.target.device)

    def examined(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]]:
        """Yield batches of held-out texts: ids `[b, T]`, which positions predict answers `[b, T]`, and states.

        The states are those of `Teacher`, in the target's type.
        """
        texts = self.held_out
        for indices in batches([len(text.ids) for text in texts], self.settings.batch_tokens, 0):
            ids = padded(texts, indices, self.target.device)
            answers = torch.zeros_like(ids, dtype=torch.bool)
            for row, index in enumerate(indices):
                answers[row, texts[index].answer] = True
            yield ids, answers, [state.to(self.target.dtype) for state in self.examiner(indices, ids)]

    def loss(self, ids: torch.Tensor, real: torch.Tensor, states: list[torch.Tensor]) -> torch.Tensor:
        """Return the loss of a batch: ids `[b, T]`, which of them are real `[b, T]`, and what the teacher returned."""
        raise NotImplementedError

    def evaluate(self) -> dict[str, Any]:
        """Return figures over the held-out texts."""
        raise NotImplementedError

    def write(self, record: dict[str, Any]) -> None:
        """Write the result to the folder, `record` with it."""
        raise NotImplementedError

    def run(self, *, resume: bool) -> dict[str, Any]:
        """Train to the end, from the folder's checkpoint with `resume`, and return the last held-out figures.

        Raises:
            ValueError: for a checkpoint that was made with other settings.
            FileNotFoundError: if there is nothing to resume from.
        """
        if resume:
            self._resume()
        figures: dict[str, Any] = {}
        for indices in self._batches():
            if self._done() >= 1:
                break
            self._learn(indices)
            figures = self._save() if self.step % self.settings.save_every == 0 else {}
        return figures or self._save()

    @property
    def seconds(self) -> float:
        """Time spent on this result, earlier runs included."""
        return time.perf_counter() - self.start

    def _done(self) -> float:
        """Return the share of the training that lies behind, by steps or by the clock."""
        by_clock = 0.0 if self.settings.minutes is None else self.seconds / 60 / self.settings.minutes
        return max(self.step / self.settings.steps, by_clock)

    def _resume(self) -> None:
        """Go on from the checkpoint."""
        noted, state = read_checkpoint(self.path, self.made_with)
        for name, parameter in self.own.items():
            parameter.data.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.start = noted["step"], time.perf_counter() - noted["seconds"]

    def _batches(self) -> Iterator[list[int]]:
        """Yield this process's batches, epoch after epoch, from the next step on."""
        lengths, epoch, skip = [len(text.ids) for text in self.train], 0, self.step
        share = self.accelerator.num_processes
        while True:
            found = batches(lengths, self.settings.batch_tokens, self.settings.seed + epoch)
            found = found[: len(found) // share * share] or found * share
            mine = found[self.accelerator.process_index :: share]
            yield from mine[skip:]
            skip, epoch = max(0, skip - len(mine)), epoch + 1

    def _learn(self, indices: Sequence[int]) -> None:
        """Make one optimiser step on the texts `indices`."""
        rate = self.settings.learning_rate * min(1.0, (self.step + 1) / 100)
        rate *= 0.5 * (1 + math.cos(math.pi * min(self._done(), 1.0)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        ids = padded(self.train, indices, self.accelerator.device)
        lengths = torch.tensor([len(self.train[i].ids) for i in indices], device=ids.device)
        real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        loss = self.loss(ids, real, self.teacher(indices, ids))
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.own.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.report({"step": self.step, "seconds": self.seconds, "loss": float(loss.detach()), "learning_rate": rate})

    def _save(self) -> dict[str, Any]:
        """Write the result and a checkpoint; return the held-out figures."""
        found = self.evaluate()
        if self.accelerator.is_main_process:
            training = {**asdict(self.settings), "texts": len(self.train), "steps_done": self.step}
            self.write({"training": {**training, "coverage": self.covered}, "held_out": found, **self.notes})
            parameters = {name: parameter.data for name, parameter in self.own.items()}
            state = {"parameters": parameters, "optimizer": self.optimizer.state_dict()}
            progress = {"step": self.step, "seconds": self.seconds, "settings": self.made_with}
            write_checkpoint(self.path, progress, state)
        self.report({"step": self.step, "seconds": self.seconds, **found})
        return found


def write_checkpoint(path: Path, progress: dict[str, Any], state: dict[str, Any]) -> None:
    """Write what a run resumes from into the folder `checkpoint` of its result: JSON, and tensors."""
    folder = path / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "state.pt")
    (folder / "progress.json").write_text(json.dumps(progress), encoding="utf-8")


def read_checkpoint(path: Path, made_with: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the progress and the tensors that `write_checkpoint` wrote.

    Raises:
        ValueError: if `progress["settings"]` are not `made_with`.
        FileNotFoundError: if there is no checkpoint.
    """
    folder = path / "checkpoint"
    noted = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    if noted["settings"] != json.loads(json.dumps(made_with)):  # tuples come back as lists
        raise ValueError(f"The checkpoint in {str(path)!r} was made with other settings: {noted['settings']}.")
    return noted, torch.load(folder / "state.pt", weights_only=True)


def divergence(p: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return the mean KL divergence of the target's `p` `[m, F]`, float32, and a student's `logits` `[m, F]`."""
    loss: torch.Tensor = _CrossEntropy.apply(p, logits)
    return loss - torch.special.entr(p).sum() / len(p)


class _CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy against given distributions, in few passes over `[m, F]`: most of a training step."""

    @staticmethod
    def forward(ctx: Any, p: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        log_q = logits.log_softmax(-1, dtype=torch.float32)
        ctx.save_for_backward(p, log_q)
        ctx.dtype = logits.dtype
        return -torch.dot(p.flatten(), log_q.flatten()) / len(p)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor]:
        p, log_q = ctx.saved_tensors
        return None, log_q.exp().sub_(p).mul_(grads[0] / len(p)).to(ctx.dtype)
