"""Training DIVERSED's head by REINFORCE: how little of the target a task needs, position by position.

One update: DIVERSED itself writes several answers to each prompt with the current head, `bonus="mixture"` and the
sampling that will be used later, so that they follow the mixture exactly; each answer gets its reward; both models
read the answers once more, which gives per token the features, `p(x)`, `q(x)` and TV. The rest needs no model:

    d log v(x) / dz = w (1 - w) (p(x) - q(x)) / v(x)        d (1 - w TV) / dz = -w (1 - w) TV

with `z` the head's logit. The loss is `-mean_b A_b sum_t log v_t(x_t) - lambda mean_b sum_t (1 - w_t TV_t)`, where `A`
is the reward less the mean reward of the same prompt's other answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ..generation.methods.diversed.head import KIND, DiversedHead
from ..generation.methods.diversed.method import DiversedConfig
from ..generation.models.adapters import remember
from ..generation.models.vocabulary import pad_vocabulary, vocabulary_width
from ..generation.runner import head_input
from .data import Sampling, answers
from .distill import Report, read_checkpoint, write_checkpoint
from .rewards import Reward
from .settings import at_least, option
from .tasks import Score, evaluate, prompt_ids


_TRAINED = "the head that is being trained"


@dataclass(frozen=True)
class DiversedTraining:
    """Settings of `train_diversed`.

    Args:
        accept_coefs (`tuple[float, ...]`, *optional*, defaults to (0.02, 0.05, 0.1)): one head is trained for each
            lambda; the best is kept.
        updates (`int`, *optional*, defaults to 100): optimiser steps of each.
        prompts_per_update (`int`, *optional*, defaults to 8): prompts of an update and process.
        samples (`int`, *optional*, defaults to 4): answers to each; at least 2.
        sampling (`Sampling`): as the head will be used.
        num_assistant_tokens (`int`, *optional*, defaults to 5): draft tokens per round.
        learning_rate (`float`, *optional*, defaults to 1e-3): of Adam, after 10 updates of warm-up.
        init_weight (`float`, *optional*, defaults to 0.5): of the untrained head.
        input_norm (`str`, *optional*, defaults to `"rms"`): scaling of the hidden states.
        evaluate_every (`int`, *optional*, defaults to 25): updates between checkpoints, each with a held-out score.
        held_out (`int`, *optional*, defaults to 64): items of the training set that are only for that.
        call_cost (`float`, *optional*, defaults to 0.2): worth of one target forward per token, in rewards; the
            checkpoint with the highest reward less cost is kept.
        seed (`int`, *optional*, defaults to 0): of the order and the sampling.
    """

    accept_coefs: tuple[float, ...] = option((0.02, 0.05, 0.1), "Lambdas to train with, separated by commas.")
    updates: int = option(100, "Optimiser steps for each.")
    prompts_per_update: int = option(8, "Prompts per step and process.")
    samples: int = option(4, "Answers to each prompt.")
    sampling: Sampling = field(default_factory=Sampling)
    num_assistant_tokens: int = option(5, "Draft tokens per round.")
    learning_rate: float = option(1e-3, "Of Adam.")
    init_weight: float = 0.5
    input_norm: str = "rms"
    evaluate_every: int = 25
    held_out: int = 64
    call_cost: float = 0.2
    seed: int = option(0, "Of order and sampling.")

    def __post_init__(self) -> None:
        at_least(self, 1, "updates", "prompts_per_update", "evaluate_every")
        at_least(self, 2, "samples")
        if not self.accept_coefs or min(self.accept_coefs) < 0:
            raise ValueError(f"`accept_coefs` must be one or more numbers of at least 0, got {self.accept_coefs}.")
        if not self.sampling.temperature:
            raise ValueError("`sampling` must have a temperature above 0: greedy answers explore nothing.")


@dataclass
class Rollout:
    """What training needs of a batch of answers, their tokens laid end to end.

    Args:
        features (`torch.Tensor` of shape `[N, H_d + H_t]`, float16): the head's input at each token.
        p (`torch.Tensor` of shape `[N]`, float32): the target's probability of the token,
        q (`torch.Tensor` of shape `[N]`, float32): and the draft's.
        tv (`torch.Tensor` of shape `[N]`, float32): distance of their distributions.
        row (`torch.Tensor` of shape `[N]`, int64): the answer that the token belongs to.
        rewards (`torch.Tensor` of shape `[b]`, float32): of each answer.
    """

    features: torch.Tensor
    p: torch.Tensor
    q: torch.Tensor
    tv: torch.Tensor
    row: torch.Tensor
    rewards: torch.Tensor


def leave_one_out(rewards: torch.Tensor, samples: int) -> torch.Tensor:
    """Return each reward less the mean of the prompt's other ones; answers to one prompt lie together, `[b]`."""
    grouped = rewards.view(-1, samples)
    others = (grouped.sum(dim=1, keepdim=True) - grouped) / (samples - 1)
    return (grouped - others).flatten()


def logit_gradient(logit: torch.Tensor, rollout: Rollout, advantage: torch.Tensor, accept_coef: float) -> torch.Tensor:
    """Return the gradient of the loss by the head's logits `[N]`, in closed form."""
    w = torch.sigmoid(logit)
    v = w * rollout.p + (1 - w) * rollout.q
    slope = w * (1 - w)
    by_reward = -advantage[rollout.row] * slope * (rollout.p - rollout.q) / v.clamp(min=1e-12)
    return (by_reward + accept_coef * slope * rollout.tv) / len(advantage)


def update(
    head: DiversedHead,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    advantage: torch.Tensor,
    accept_coef: float,
    accelerator: Accelerator | None = None,
) -> dict[str, float]:
    """Make one optimiser step, gradients averaged over the processes; return means of the rollout."""
    logit = head.logit(rollout.features)
    logit.backward(logit_gradient(logit.detach(), rollout, advantage, accept_coef))
    if accelerator is not None:
        for parameter in head.parameters():
            parameter.grad = cast(torch.Tensor, accelerator.reduce(parameter.grad, "mean"))
    nn.utils.clip_grad_norm_(head.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    w = torch.sigmoid(logit.detach())
    return {
        "reward": float(rollout.rewards.mean()),
        "mean_weight": float(w.mean()),
        "weight_std": float(w.std()),
        "acceptance": float((1 - w * rollout.tv).mean()),
    }


@torch.no_grad()
def replay(
    head: DiversedHead,
    target: PreTrainedModel,
    draft: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    written: Sequence[Sequence[int]],
    sampling: Sampling,
    rewards: torch.Tensor,
    batch_size: int = 8,
) -> Rollout:
    """Let both models read prompts and answers, and return what training needs of the answers' tokens."""
    chain = LogitsProcessorList()
    if sampling.temperature not in (0.0, 1.0):
        chain.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(sampling.top_p))
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in ("features", "p", "q", "tv", "row")}
    width = vocabulary_width(target)
    for start in range(0, len(prompts), batch_size):
        rows = list(range(start, min(start + batch_size, len(prompts))))
        ids = nn.utils.rnn.pad_sequence([torch.tensor([*prompts[i], *written[i]]) for i in rows], batch_first=True).to(
            target.device
        )
        starts = torch.tensor([len(prompts[i]) for i in rows], device=ids.device)
        ends = starts + torch.tensor([len(written[i]) for i in rows], device=ids.device)
        column = torch.arange(1, ids.shape[1], device=ids.device)
        real = (column >= starts[:, None]) & (column < ends[:, None])  # at what predicts the token of each column
        tokens = ids[:, 1:][real]
        distributions, states = [], []
        for model in (draft, target):
            with head_input(model, True) as seen:
                logits = model(input_ids=ids.to(model.device), use_cache=False).logits[:, :-1].to(ids.device)[real]
            distributions.append(chain(cast(Any, tokens[:, None]), pad_vocabulary(logits, width).float()).softmax(-1))
            states.append(seen[0][:, :-1].to(ids.device)[real])
        q, p = distributions
        parts["features"].append(head.features(*states).half())
        parts["p"].append(p.gather(1, tokens[:, None])[:, 0])
        parts["q"].append(q.gather(1, tokens[:, None])[:, 0])
        parts["tv"].append((p - q).abs().sum(-1) / 2)
        parts["row"].append(torch.tensor(rows, device=ids.device)[:, None].expand(real.shape)[real])
    joined = {name: torch.cat(values) for name, values in parts.items()}
    return Rollout(**joined, rewards=rewards.to(target.device))


def train_diversed(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[dict[str, Any]],
    reward: Reward,
    folder: str | Path,
    settings: DiversedTraining,
    *,
    resume: bool = False,
    report: Report = lambda _: None,
) -> list[dict[str, Any]]:
    """Train a head for each lambda and write the best one to `folder`, for `assistant_strategy=folder`.

    Args:
        target (`PreTrainedModel`): frozen, as is
        draft (`PreTrainedModel`): the assistant.
        items (`list[dict]`): the task; the first `held_out` are not trained on.
        reward (`Reward`): of an answer's text.
        folder (`str` or `Path`): gets the head, and a folder `checkpoint` to resume from.
        settings (`DiversedTraining`): how.
        resume (`bool`, *optional*, defaults to `False`): go on from the folder's checkpoint.
        report (`Callable[[dict], None]`, *optional*): gets figures after each update, and held-out ones as well after
            each checkpoint.

    Returns:
        The held-out figures of every checkpoint.

    Raises:
        ValueError: for fewer items than are held out and an update needs, or a checkpoint made with other settings.
        RuntimeError: if the reward raises; names the prompt's index. The last checkpoint is kept.
    """
    needed = settings.held_out + settings.prompts_per_update
    if len(items) < needed:
        raise ValueError(f"`items` must hold at least {needed}, got {len(items)}.")
    target.requires_grad_(False).eval()
    draft.requires_grad_(False).eval()
    run = _Run(target, draft, tokenizer, items, reward, Path(folder), settings, report)
    first, done = run.resume() if resume else (0, 0)
    for sweep in range(first, len(settings.accept_coefs)):
        run.learn(sweep, done if sweep == first else 0)
    return run.found


@dataclass
class _Run:
    """One training run: the models, the task, and what was found so far."""

    target: PreTrainedModel
    draft: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    items: Sequence[dict[str, Any]]
    reward: Reward
    path: Path
    settings: DiversedTraining
    report: Report

    def __post_init__(self) -> None:
        self.accelerator = Accelerator(cpu=self.target.device.type == "cpu")
        apart = self.settings.held_out
        self.held_out, self.train = list(self.items[:apart]), list(self.items[apart:])
        # what a checkpoint must share with the run that goes on from it
        self.made_with = {**asdict(self.settings), "items": len(self.items)}
        self.found: list[dict[str, Any]] = []
        self.state: dict[str, Any] = {}

    def resume(self) -> tuple[int, int]:
        """Read the checkpoint; return the lambda's place and the updates that were made with it."""
        noted, self.state = read_checkpoint(self.path, self.made_with)
        self.found = noted["found"]
        return noted["sweep"], noted["update"]

    def learn(self, sweep: int, done: int) -> None:
        """Train a head with the lambda at place `sweep`, `done` of whose updates the checkpoint holds."""
        settings, accept_coef = self.settings, self.settings.accept_coefs[sweep]
        widths = [model.config.get_text_config(decoder=True).hidden_size for model in (self.draft, self.target)]
        head = DiversedHead(widths[0], widths[1], settings.init_weight, settings.input_norm).to(self.target.device)
        optimizer = torch.optim.Adam(head.parameters(), lr=settings.learning_rate)
        if done:
            head.load_state_dict(self.state["head"])
            optimizer.load_state_dict(self.state["optimizer"])
        while done < settings.updates:
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * min(1.0, (done + 1) / 10)
            rollout = self.rollout(head, done)
            advantage = leave_one_out(rollout.rewards, settings.samples)
            figures = update(head, optimizer, rollout, advantage, accept_coef, self.accelerator)
            done += 1
            self.report({"accept_coef": accept_coef, "update": done, **figures})
            if done % settings.evaluate_every == 0 or done == settings.updates:
                self.checkpoint(head, optimizer, sweep, done)

    def checkpoint(self, head: DiversedHead, optimizer: torch.optim.Optimizer, sweep: int, done: int) -> None:
        """Score the head on the held-out items, keep it if it is the best so far, and write what to resume from."""
        score = self.score(head)
        notes = {"accept_coef": self.settings.accept_coefs[sweep], "held_out": asdict(score)}
        value = score.reward - self.settings.call_cost / score.tokens_per_forward
        best = max((entry["value"] for entry in self.found), default=float("-inf"))
        self.found.append({**notes, "update": done, "value": value})
        if self.accelerator.is_main_process:
            if value > best:
                self.save(head, {**notes, "updates": done})
            progress = {"sweep": sweep, "update": done, "settings": self.made_with, "found": self.found}
            state = {"head": head.state_dict(), "optimizer": optimizer.state_dict()}
            write_checkpoint(self.path, progress, state)
        self.report(self.found[-1])

    def options(self, head: DiversedHead, **changes: Any) -> dict[str, Any]:
        """Return keywords of `generate()` with `head`."""
        remember(self.target, KIND, _TRAINED, head)
        config = DiversedConfig(adapter=_TRAINED, num_assistant_tokens=self.settings.num_assistant_tokens, **changes)
        return {"assistant_strategy": config, "assistant_model": self.draft}

    def save(self, head: DiversedHead, notes: dict[str, Any]) -> None:
        """Write the head with the settings to use it with."""
        sampling = asdict(self.settings.sampling)
        config = DiversedConfig(num_assistant_tokens=self.settings.num_assistant_tokens)
        head.save(self.path, config, self.draft, self.target, {**sampling, **notes})

    def rollout(self, head: DiversedHead, number: int) -> Rollout:
        """Write answers with the current head, reward and replay them."""
        settings = self.settings
        share, place = self.accelerator.num_processes, self.accelerator.process_index
        per_epoch = max(1, len(self.train) // (settings.prompts_per_update * share))
        order = torch.Generator().manual_seed(settings.seed + number // per_epoch)
        shuffled = torch.randperm(len(self.train), generator=order).tolist()
        start = (number % per_epoch * share + place) * settings.prompts_per_update
        chosen = shuffled[start : start + settings.prompts_per_update]
        rows = [index for index in chosen for _ in range(settings.samples)]
        prompts = [prompt_ids(self.tokenizer, self.train[index]) for index in rows]
        torch.manual_seed(settings.seed + 7919 * number + place)
        written = answers(self.target, prompts, settings.sampling, self.options(head, bonus="mixture"))
        rewards = []
        for index, ids in zip(rows, written, strict=True):
            text = cast(str, self.tokenizer.decode(ids, skip_special_tokens=True))
            try:
                rewards.append(float(self.reward(text, self.train[index])))
            except Exception as error:
                raise RuntimeError(
                    f"The reward raised {type(error).__name__} ({error}) at the prompt of item "
                    f"{index + settings.held_out}: {self.train[index]!r}; the last checkpoint is kept."
                ) from error
        return replay(head, self.target, self.draft, prompts, written, settings.sampling, torch.tensor(rewards))

    def score(self, head: DiversedHead) -> Score:
        """Evaluate the head on the held-out items, as it will be used."""
        task, settings = (self.target, self.tokenizer, self.held_out, self.reward), self.settings
        return evaluate("diversed", *task, settings.sampling, self.options(head), batch_size=32, seed=settings.seed)
