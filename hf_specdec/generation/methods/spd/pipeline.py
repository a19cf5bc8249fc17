"""The target as a pipeline: a `Stage` runs some layers on one token, a pipeline moves tokens from stage to stage.

In one tick every stage runs the token that it was handed in the tick before, and the draft module guesses the next one
meanwhile. What runs a tick's jobs is the *schedule*: one after the other, or each in a thread of its own.
`LocalPipeline` has all stages in this process; `RankedPipeline` has the same methods, and its stages on several ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch

from ....cache.speculative import SpeculativeCache
from ....cache.stage import StageCache
from ....kernels.address import Address
from ....kernels.step import Step
from ...models.layerwise import Layerwise, Recording, placed, watched
from ...runner import Forward, ModelRunner
from ...state import DecodingState
from .depth_map import DepthMap
from .draft_module import Features


Job = Callable[[], Any]


class Parcel(NamedTuple):
    """A token on its way through the stages."""

    hidden: torch.Tensor  # `[1, m, H]`, its state after the stages that it has passed
    address: Address  # its position in the text
    recording: Recording  # what the layers get beside the state


class Tick(NamedTuple):
    """What one tick produced."""

    guess: torch.Tensor | None  # the draft module's logits `[1, V_d]`; `None` if it was not asked
    features: list[Features]  # per stage what its token gained, empty for a stage without a token
    final: torch.Tensor | None  # state `[1, 1, H]` after the last layer of the token that left


class Stage:
    """The layers of one stage, with their part of the target's cache."""

    def __init__(self, parts: Layerwise, depths: DepthMap, index: int, whole: SpeculativeCache) -> None:
        self.parts, self.index = parts, index
        self.first, self.end = depths.bounds[index], depths.bounds[index + 1]
        self.wanted = set(depths.produced(index))
        self.cache = StageCache(whole, self.first, self.end)

    def run(self, parcel: Parcel) -> tuple[Parcel, Features]:
        """Take a token through the stage's layers; return it, and the features that it gained."""
        hidden, features = parcel.hidden, {}
        step = self.cache.begin(parcel.address)
        for index in range(self.first, self.end):
            call = placed(parcel.recording.calls[index], self.cache, step)
            hidden = self.parts.run(index, hidden, call)
            if index + 1 in self.wanted:
                features[index + 1] = hidden
        return parcel._replace(hidden=hidden), features


class LocalPipeline:
    """All stages in this process.

    `run_all` is the schedule: it runs jobs that don't depend on each other, and returns what they return.
    """

    # all from `prefill` on
    parts: Layerwise
    runner: ModelRunner
    stages: list[Stage]
    waiting: list[Parcel | None]

    def __init__(self, depths: DepthMap, run_all: Callable[[Sequence[Job]], list[Any]]) -> None:
        self.depths, self.run_all = depths, run_all

    def prefill(self, state: DecodingState) -> tuple[Forward, Features]:
        """Run the prompt; return the forward over its last token, and the features of all its tokens that were run.

        Raises:
            ValueError: if the layers, called one by one, don't do what the model does.
        """
        self.runner = runner = state.target
        first = state.prompt.cached[state.active[0]]
        with watched(runner, self.depths.features[1:]) as seen:
            output = state.prefill()
        self.parts = Layerwise(runner.twin)
        self.parts.check(runner, state.pending, state.committed[0] - 1, output.logits)
        tokens = state.text.tokens[state.active, first : state.committed[0]]
        seen[0] = self.parts.record_at(runner, tokens, first).hidden
        self.stages = [Stage(self.parts, self.depths, i, runner.cache) for i in range(self.depths.stages)]
        self.rewind(state.committed[0])
        return output, seen

    def enter(self, token: torch.Tensor, position: int) -> torch.Tensor:
        """Hand a token `[1, 1]` to the first stage, for the next tick; return its state at depth 0, `[1, 1, H]`."""
        parcel = self.waiting[0] = make_parcel(self.parts, self.runner, {"input_ids": token}, position)
        return parcel.hidden

    def tick(self, draft: Job | None) -> Tick:
        """Run every stage that has a token, and `draft`, by the schedule."""
        busy = [(stage, parcel) for stage, parcel in zip(self.stages, self.waiting, strict=True) if parcel is not None]
        jobs: list[Job] = [partial(stage.run, parcel) for stage, parcel in busy]
        guess, *outputs = self.run_all([draft or (lambda: None), *jobs])
        features: list[Features] = [{} for _ in self.stages]
        waiting: list[Parcel | None] = [None] * (len(self.stages) + 1)
        for (stage, _), (parcel, gained) in zip(busy, outputs, strict=True):
            features[stage.index], waiting[stage.index + 1] = gained, parcel
        left = waiting.pop()
        self.waiting = waiting
        return Tick(guess, features, None if left is None else left.hidden)

    def rewind(self, length: int) -> None:
        """Drop all tokens that are under way; every stage holds the first `length` tokens of the text afterwards."""
        self.waiting = [None] * len(self.stages)
        for stage in self.stages:
            stage.cache.rewind(length)


def make_parcel(
    parts: Layerwise,
    runner: ModelRunner,
    inputs: dict[str, torch.Tensor],
    start: int,
    cache: SpeculativeCache | None = None,
    own_attention: bool = False,
) -> Parcel:
    """Return tokens from position `start` on ready for a stage, which exchanges the cache when it runs (see `placed`).

    Args:
        inputs (`dict`): `input_ids` `[1, m]` for the first stage, or `inputs_embeds` `[1, m, H]`, which the stage
            before has handed on, for a later one.
        cache (`SpeculativeCache`, *optional*): the stage's, where it is known; the runner's by default.
        own_attention (`bool`, *optional*, defaults to `False`): `parts` are the model's, not its twin's.
    """
    name, given = next(iter(inputs.items()))
    given = given.to(runner.device)
    address = Address([start], given.shape[1])
    recording = parts.record(
        **{name: given},
        position_ids=address.positions_on(given.device).clamp(max=runner.last_position),
        past_key_values=runner.cache if cache is None else cache,
        use_cache=True,
        **({} if own_attention else {"specdec_step": Step(address)}),
    )
    # a recording of states may have scaled them, as some families do with embeddings
    return Parcel(given if name == "inputs_embeds" else recording.hidden, address, recording)


def in_series(jobs: Sequence[Job]) -> list[Any]:
    """Run jobs one after the other."""
    return [job() for job in jobs]


class InThreads:
    """Runs jobs at the same time: the first one here, each other one in a thread of its own, `workers` at most.

    PyTorch's kernels release the interpreter's lock; everything else of a tick still takes turns. What torch keeps per
    thread, as set where this is made, is set in the workers too.
    """

    def __init__(self, workers: int, device: torch.device) -> None:
        self.inference, self.kind = torch.is_inference_mode_enabled(), device.type
        self.autocast = torch.is_autocast_enabled(self.kind)
        self.autocast_dtype = torch.get_autocast_dtype(self.kind)
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="spd-stage")

    def __call__(self, jobs: Sequence[Job]) -> list[Any]:
        """Run jobs and return what they return; an exception in one is raised here, when all have ended."""
        others = [self.pool.submit(self._run, job) for job in jobs[1:]]
        try:
            first = jobs[0]()
        finally:
            for other in others:
                other.exception()  # waits; nothing may still write to a cache when an exception leaves
        return [first, *(other.result() for other in others)]

    def _run(self, job: Job) -> Any:
        with ExitStack() as contexts:
            contexts.enter_context(torch.no_grad())
            contexts.enter_context(torch.inference_mode(self.inference))
            contexts.enter_context(torch.autocast(self.kind, dtype=self.autocast_dtype, enabled=self.autocast))
            return job()
