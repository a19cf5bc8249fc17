"""Find SpecBound's settings for a device: profile what its parts cost, replay its rounds over the model's own text.

One teacher-forced pass over text that the model wrote greedily gives, at every position and exit, whether the head's
guess is right and how sure it is. As long as drafts are right, states are those of that pass, so rounds can be
replayed for any setting without running the model; after a wrong draft the rest of a round is charged its mean cost.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from ..cache.speculative import SpeculativeCache
from ..generation import admission
from ..generation.methods.specbound.exit_heads import ExitHeads, ExitReader, before_each, load_exit_heads
from ..generation.methods.specbound.method import SpecBoundConfig, annealed_confidence
from ..generation.models.layerwise import Layerwise, Staircase, watching
from ..generation.models.surgery import decoder_layers
from ..generation.runner import ModelRunner
from ..kernels.dispatch import register
from ..kernels.twin import twin_of
from ..training.data import Sampling, answers
from .run import Arm, measure


ALPHAS = (0.0, 0.1, 0.3, 0.5, 1.0)
TAUS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
WIDTHS = (1, 2, 3, 4, 5, 6, 8, 10)
WORTHWHILE = 1.05
"""Predicted speed-up below which drafting is advised against."""


@dataclass
class Costs:
    """Milliseconds on one device.

    Args:
        layer (`list[float]`): one layer on 1, 2, ... tokens.
        head (`list[float]`): final norm and LM head on 1, 2, ... tokens.
        test (`float`): one exit test, its reading by the host included.
        token (`float`): preparing one token: embedding and arguments of the layers.
        round (`float`): the rest of a round: processors, acceptance, the loop.
        plain (`float`): a token of the strategy `plain`.
    """

    layer: list[float]
    head: list[float]
    test: float
    token: float
    round: float
    plain: float


@dataclass
class Trace:
    """What the exits say along one text, at step 0 to the pending token and at step 1 to a draft.

    The two differ for blocks, which read a guess before a draft and the truth before the pending token.

    Args:
        hits (`dict[tuple[int, int], list[bool]]`): by depth and step, for each position, whether the most likely token
            is the text's next token.
        confidence (`dict[tuple[int, int, float], list[float]]`): by depth, step and alpha, that token's.
    """

    hits: dict[tuple[int, int], list[bool]]
    confidence: dict[tuple[int, int, float], list[float]]

    def __len__(self) -> int:
        return len(next(iter(self.hits.values())))


@dataclass
class Replayed:
    """What the replay predicts for one setting.

    Args:
        speedup (`float`): over the strategy `plain`.
        tokens_per_round (`float`): emitted per round.
        exit_depth (`float`): mean depth of the drafts.
        acceptance (`float`): share of the drafts that stayed.
    """

    speedup: float
    tokens_per_round: float
    exit_depth: float
    acceptance: float


@torch.no_grad()
def trace_exits(model: PreTrainedModel, heads: ExitHeads, text: torch.Tensor, prompt: int) -> Trace:
    """Return what the exits say along the answer of a text `[1, T]` that the model wrote after `prompt` tokens."""
    parts = Layerwise(model)
    depth, ids = len(parts.layers), text[:, :-1]
    states: dict[int, torch.Tensor] = {}
    watching(model, [*heads.layers, depth], states)(input_ids=ids, use_cache=False, logits_to_keep=1)
    call = parts.record(input_ids=ids, use_cache=False).calls[-1]
    answer, wanted = slice(prompt - 1, None), text[0, prompt:]
    trace = Trace({}, {})
    for layer in heads.layers:
        inputs = parts.norm(states[depth])
        for step in (0, 1):
            hidden = states[layer]
            if heads.kind == "block":
                hidden = heads.deepen(layer, hidden, before_each(inputs), call)
            inputs = heads.head_input(layer, hidden)
            logits = heads.score(layer, inputs[0, answer]).float()
            trace.hits[layer, step] = (heads.tokens(logits.argmax(dim=-1)) == wanted).tolist()
            for alpha in ALPHAS:
                scale = SpecBoundConfig(alpha=alpha).temperature(layer, depth, True)
                trace.confidence[layer, step, alpha] = annealed_confidence(logits, scale).tolist()
    return trace


def replay(
    traces: Sequence[Trace], exits: Sequence[int], alpha: float, tau: float, width: int, depth: int, costs: Costs
) -> Replayed:
    """Replay SpecBound's rounds along some texts and return what they would have cost and given.

    Args:
        traces (`list[Trace]`): of the texts.
        exits (`list[int]`): depths tested; the last one is the depth bound too, since deeper tokens are not tested.
        alpha, tau, width: as in `SpecBoundConfig`.
        depth (`int`): layers of the model.
        costs (`Costs`): of the device.
    """
    first, later = ([_outcomes(trace, step, exits, alpha, tau) for trace in traces] for step in (0, 1))
    leaving = [exit_at for positions in later for exit_at, _ in positions if exit_at]
    share = len(leaving) / max(sum(map(len, later)), 1)
    passing = [costs.layer[0] * exit_at + costs.test * (exits.index(exit_at) + 1) for exit_at in leaving]
    further = costs.token + statistics.mean(passing or [0])
    spent = 0.0
    rounds = tokens = drafted = accepted = depths = 0
    for pending, drafts in zip(first, later, strict=True):
        at = 0
        while at < len(pending):
            room, right = min(width, len(pending) - at - 1), True
            passed: list[int] = []
            while right and len(passed) < room:
                exit_at, right = drafts[at + len(passed)] if passed else pending[at]
                if not exit_at:
                    break
                passed.append(exit_at)
            difficult = right and len(passed) < room
            spent += costs.round + costs.token * (len(passed) + 1)
            spent += _layer_times(tuple(passed), depth, tuple(costs.layer))
            spent += costs.head[min(len(passed), len(costs.head) - 1)]
            spent += costs.test * (sum(exits.index(exit_at) + 1 for exit_at in passed) + len(exits) * difficult)
            if not right:  # what follows a wrong draft is not known
                spent += further * sum(share**more for more in range(1, room - len(passed) + 1))
            kept = len(passed) - (not right)
            rounds, tokens, accepted = rounds + 1, tokens + kept + 1, accepted + kept
            drafted, depths, at = drafted + len(passed), depths + sum(passed), at + kept + 1
    return Replayed(
        tokens * costs.plain / max(spent, 1e-9),
        tokens / max(rounds, 1),
        depths / max(drafted, 1),
        accepted / max(drafted, 1),
    )


def _outcomes(trace: Trace, step: int, exits: Sequence[int], alpha: float, tau: float) -> list[tuple[int, bool]]:
    """Return per position the depth at which a draft leaves, 0 for a difficult one, and whether it is right."""
    columns = [(layer, trace.confidence[layer, step, alpha], trace.hits[layer, step]) for layer in exits]
    return [
        next(((layer, hits[at]) for layer, sure, hits in columns if sure[at] >= tau), (0, True))
        for at in range(len(trace))
    ]


@functools.cache
def _layer_times(passed: tuple[int, ...], depth: int, layer: tuple[float, ...]) -> float:
    """Return the time of all layer calls of a round whose drafts left at the depths `passed`."""
    depths: list[int] = []
    spent = 0.0
    for goal in (*passed, depth):  # the last token takes all with it
        depths.append(0)
        while depths[-1] < goal:
            first = depths.index(depths[-1])
            count = len(depths) - first
            spent += layer[min(count, len(layer)) - 1]
            depths[first:] = [depths[-1] + 1] * count
    return spent


@torch.no_grad()
def profile_specbound(
    model: PreTrainedModel, heads: ExitHeads, prompt: torch.Tensor, width: int = max(WIDTHS), repeats: int = 7
) -> Costs:
    """Time the parts of SpecBound's rounds behind a prompt `[1, T]`: medians, in milliseconds."""
    register()
    windows, length = admission.layer_windows(model), prompt.shape[1]
    runner = ModelRunner(model, SpeculativeCache(windows, 1, length + width + 2), length + width + 2)
    runner.prefill(prompt, 0, None)
    parts, heads = Layerwise(runner.twin), twin_of(heads)
    token = prompt[:, -1:]
    logits = runner.forward(token, [length - 1]).logits
    parts.check(runner, token, length - 1, logits)
    staircase, tail = Staircase(parts, runner, width + 1), parts.tail()
    reader = ExitReader(heads, parts, windows[-1], length + width + 2)
    if heads.kind == "block":
        recording = parts.record_at(runner, prompt, 0)
        states = recording.hidden
        reader.start(dict.fromkeys(heads.layers, states), states, recording)
    times: dict[str, list[float]] = {}
    for _ in range(repeats):
        for count in range(1, width + 2):
            staircase.restart(length)
            with clocked(times, f"token {count}"):
                for _ in range(count):
                    staircase.push(token)
            with clocked(times, f"layer {count}"):
                while staircase.depths[-1] < len(parts.layers):
                    staircase.advance()
            with clocked(times, f"head {count}"):
                tail(parts.norm(staircase.states[:, :count])).argmax(dim=-1).tolist()
        exit_at = heads.layers[0]
        staircase.restart(length)
        staircase.push(token)
        for depth in heads.layers:
            reader.note(depth, staircase, 0)
        with clocked(times, "test"):
            bool(annealed_confidence(reader.logits(exit_at, staircase), 1.1) >= 1)
        reader.commit(1, staircase, staircase.states[:, :1])
    middle = {name: statistics.median(values[1:]) for name, values in times.items()}
    counts = range(1, width + 2)
    layer = [middle[f"layer {count}"] / len(parts.layers) for count in counts]
    head = [middle[f"head {count}"] for count in counts]
    per_token = statistics.median(middle[f"token {count}"] / count for count in counts)
    return Costs(layer, head, middle["test"], per_token, 0.0, 0.0)


@contextmanager
def clocked(times: dict[str, list[float]], name: str) -> Iterator[None]:
    """Note under a name how many milliseconds the block takes."""
    start = time.perf_counter()
    yield
    times.setdefault(name, []).append(1000 * (time.perf_counter() - start))


def calibrate_specbound(
    model: PreTrainedModel,
    config: SpecBoundConfig,
    prompts: Sequence[torch.Tensor],
    *,
    new_tokens: int = 96,
    repeats: int = 3,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[SpecBoundConfig, Replayed, Costs]:
    """Return the best setting for this device and text, what it is predicted to give, and what its parts cost.

    Args:
        model (`PreTrainedModel`): the target.
        config (`SpecBoundConfig`): with trained heads (`adapter`), or without; the settings to start from.
        prompts (`list[torch.Tensor]`): prompts `[1, T]`.
        new_tokens (`int`, *optional*, defaults to 96): tokens of each answer.
        repeats (`int`, *optional*, defaults to 3): timed runs of each arm, on the first prompts.
        progress (`Callable[[str], None]`, *optional*): called with what has been done, after each prompt and each arm.

    Raises:
        ValueError: if no prompts are given.
    """
    if not prompts:
        raise ValueError("`prompts` must hold at least one prompt.")
    depth = len(decoder_layers(model))
    if config.adapter is not None:
        heads = load_exit_heads(model, config.adapter)
    else:
        heads = ExitHeads(model, config.exits(depth, None), "final")
    traces = []
    for prompt in prompts:
        row = prompt[0].tolist()
        (answer,) = answers(model, [row], Sampling(0.0, max_new_tokens=new_tokens), {"assistant_strategy": "plain"})
        text = torch.tensor([[*row, *answer]], device=prompt.device)
        traces.append(trace_exits(model, heads, text, prompt.shape[1]))
        progress("text")
    costs = profile_specbound(model, heads, prompts[0])
    # a draft never passes at this alpha: what a round takes beside its parts is the loop's own
    exit_at = heads.layers[0]
    never = config.override(alpha=1e6, tau=0.9, exit_layers=[exit_at], max_depth=exit_at)
    arms = [Arm("plain", {"assistant_strategy": "plain"}), Arm("never", {"assistant_strategy": never})]
    plain, drafting = measure(model, prompts[0], arms, new_tokens, repeats, progress)
    known = costs.token + depth * costs.layer[0] + costs.head[0] + costs.test
    costs = replace(costs, plain=plain.ms_per_token, round=max(0.0, drafting.ms_per_token - known))
    found = [(replay(traces, *setting, depth, costs), setting) for setting in _grid(heads.layers)]
    best, (exits, alpha, tau, width) = max(found, key=lambda pair: pair[0].speedup)
    chosen = config.override(
        exit_layers=list(exits), max_depth=exits[-1], alpha=alpha, tau=tau, num_assistant_tokens=width
    )
    return chosen, best, costs


def _grid(layers: Sequence[int]) -> Iterator[tuple[tuple[int, ...], float, float, int]]:
    """Yield (exits, alpha, tau, width); with many exits, no more than two of them at a time."""
    sizes = range(1, (len(layers) if len(layers) <= 4 else 2) + 1)
    subsets = [subset for size in sizes for subset in itertools.combinations(layers, size)]
    yield from itertools.product(subsets, ALPHAS, TAUS, WIDTHS)
