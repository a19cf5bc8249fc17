"""SPD's pipeline over several ranks: `RankedPipeline` on the one that controls, `serve` on the others.

A tick is one command from rank 0, and then every rank does its part: a stage runs the hidden state that it was handed
in the tick before, hands its own on, and reports what the draft module may read. A rejection travels with the next
command. Every message of a tick has arrived when the tick is over, so nothing is left behind by an error or a stop.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from ....cache.speculative import SpeculativeCache
from ....kernels.dispatch import speculative_attention
from ...models.layerwise import Layerwise
from ...runner import Forward, ModelRunner
from ...state import DecodingState
from .draft_module import Features
from .pipeline import Job, Parcel, Pipeline, Stage, Tick, make_parcel
from .ranks import PROMPT, STOP, TICK, Ranks


class _Place:
    """This rank's stage, fed from the rank before it and feeding the one after it, for one row.

    Args:
        state (`DecodingState`): the row is its only active one.
        ranks (`Ranks`): the ranks.
    """

    def __init__(self, state: DecodingState, ranks: Ranks) -> None:
        self.state, self.ranks, self.runner = state, ranks, state.target
        self.parts = Layerwise(state.model)  # with the model's own attention, for the prompt
        self.embedding = cast(torch.Tensor, state.model.get_input_embeddings().weight)
        self.width, self.dtype = self.embedding.shape[1], self.embedding.dtype
        self.last = ranks.depths.stages - 1
        self.stage = None
        if ranks.stage is not None:
            self.stage = Stage(self.parts, ranks.depths, ranks.stage, self.runner.cache)

    @property
    def reports_end(self) -> bool:
        """Whether the last stage lies on another rank than the controlling one."""
        return self.ranks.owner(self.last) != 0

    def shape(self, width: int) -> tuple[int, int, int]:
        """Return the shape of the states of `width` tokens."""
        return (1, width, self.width)

    def rows_of(self, stage: int) -> int:
        """Return how many states per token a stage reports: the features it produces, and the end of the last one."""
        ends = stage == self.last and self.reports_end
        return len(self.ranks.depths.produced(stage)) + ends

    def blocks(self) -> list[tuple[int, int]]:
        """Return the begin and end of each forward over the prompt; the last one is of the last token alone."""
        end = self.state.prompt.lengths[self.state.active[0]] - 1
        chunk = self.state.generation_config.prefill_chunk_size or max(end, 1)
        return [(begin, min(begin + chunk, end)) for begin in range(0, end, chunk)] + [(end, end + 1)]

    def run_prompt(self, block: tuple[int, int], own: bool) -> tuple[torch.Tensor, Features]:
        """Run this rank's stage over a block of the prompt and hand the result on; return it and its features.

        Args:
            own (`bool`): with the model's own attention.
        """
        begin, end = block
        stage = cast(Stage, self.stage)
        if stage.index == 0:
            inputs = {"input_ids": self.state.text.tokens[self.state.active, begin:end].to(self.embedding.device)}
        else:
            hidden, work = self.ranks.take(self.shape(end - begin), self.dtype, stage.index - 1)
            self.ranks.wait(work, self.ranks.owner(stage.index - 1))
            inputs = {"inputs_embeds": hidden.to(self.embedding.device)}
        stage.cache.exact_slices = own
        parcel, features = stage.run(self.parcel(inputs, begin, own))
        stage.cache.exact_slices = False
        if stage.index < self.last:
            self.ranks.wait(self.ranks.hand_on(parcel.hidden, stage.index + 1), self.ranks.owner(stage.index + 1))
        return parcel.hidden, features

    def switch_attention(self) -> None:
        """Go on with the package's attention."""
        self.state.contexts.enter_context(speculative_attention(self.state.model))
        self.parts = Layerwise(self.state.model)
        if self.stage is not None:
            self.stage.parts = self.parts

    def parcel(self, inputs: dict[str, torch.Tensor], start: int, own: bool = False) -> Parcel:
        """Return tokens ready for this rank's stage (see `make_parcel`)."""
        cache, last = cast(Stage, self.stage).cache, self.runner.last_position
        return make_parcel(self.parts, inputs, start, cache, last, own_attention=own)

    def token(self, token: int, position: int) -> Parcel:
        """Return a token that rank 0 has named, ready for the first stage."""
        return self.parcel({"input_ids": torch.tensor([[token]], device=self.embedding.device)}, position)

    def handed_on(self, hidden: torch.Tensor, position: int) -> Parcel:
        """Return a token that the stage before has handed on, ready for this rank's."""
        return self.parcel({"inputs_embeds": hidden.to(self.embedding.device)}, position)


class RankedPipeline(Pipeline):
    """The stages on their ranks, as the controlling rank sees them.

    Args:
        ranks (`Ranks`): the ranks.
        run_all (`Callable[[list[Job]], list]`): runs the draft module and this rank's own stage.
    """

    def __init__(self, ranks: Ranks, run_all: Any) -> None:
        super().__init__(ranks.depths, run_all)
        self.ranks = ranks
        # position of the token that waits before each stage
        self.positions: list[int] = []
        self.token, self.crop = -1, -1
        self.inbound: tuple[torch.Tensor, Any] | None = None

    def prefill(self, state: DecodingState) -> tuple[Forward, Features]:
        """Let the ranks run the prompt, one after the other, and collect the features of its tokens."""
        ranks, depths = self.ranks, self.depths
        ranks.command(PROMPT, state.active[0])
        place = self.place = _Place(state, ranks)
        found: dict[int, list[torch.Tensor]] = {index: [] for index in depths.features[1:]}
        blocks, final = place.blocks(), torch.empty(0)
        for block in blocks:
            if block is blocks[-1]:
                place.switch_attention()
            if place.stage is not None:
                final, features = place.run_prompt(block, own=block is not blocks[-1])
                for index, states in features.items():
                    found[index].append(states)
            for stage in range(depths.stages):
                if ranks.owner(stage) == 0 or not place.rows_of(stage):
                    continue
                width = block[1] - block[0]
                states, work = ranks.hear(place.shape(width * place.rows_of(stage)), place.dtype, ranks.owner(stage))
                ranks.wait(work, ranks.owner(stage))
                rows = list(states.to(place.embedding.device).split(width, dim=1))
                for index, row in zip(depths.produced(stage), rows, strict=False):
                    found[index].append(row)
                if stage == place.last:
                    final = rows[-1]
        self.parts = place.parts
        self.cache, self.last_position = state.target.cache, state.target.last_position
        self.stages = [] if place.stage is None else [place.stage]
        tokens = state.text.tokens[state.active, : state.committed[0]]
        features = {index: torch.cat(parts, dim=1) for index, parts in found.items()}
        features[0] = self.parts.record_at(state.target, tokens, 0).hidden
        self.rewind(-1)
        return Forward(self.parts.tail()(self.parts.norm(final[:, -1:])), None), features

    def enter(self, token: torch.Tensor, position: int) -> torch.Tensor:
        """Name the token that the first stage is to embed; return its state at depth 0, `[1, 1, H]`."""
        hidden = super().enter(token, position)
        self.token, self.positions[0] = int(token), position
        return hidden

    def tick(self, draft: Job | None) -> Tick:
        """Command a tick, draft and run the own stage meanwhile, and wait for the reports."""
        ranks, place, positions = self.ranks, self.place, self.positions
        ranks.command(TICK, self.crop, self.token, *positions)
        last, n = place.last, self.depths.stages
        heard = {
            stage: ranks.hear(place.shape(1 + place.rows_of(stage)), place.dtype, ranks.owner(stage))
            for stage in range(n)
            if positions[stage] >= 0 and ranks.owner(stage) != 0
        }
        arriving = None
        if not ranks.dedicated and n > 1 and positions[last - 1] >= 0:
            arriving = ranks.take(place.shape(1), place.dtype, last - 1)
        jobs: list[Job] = []
        if place.stage is not None and positions[last] >= 0:
            stage, parcel = place.stage, self._own(positions[last])
            jobs = [lambda: stage.run(parcel)]
        try:
            guess, *outputs = self.run_all([draft or (lambda: None), *jobs])
        finally:
            for stage_index, (_, work) in heard.items():
                ranks.wait(work, ranks.owner(stage_index))
            if arriving is not None:
                ranks.wait(arriving[1], ranks.owner(last - 1))
        features: list[Features] = [{} for _ in range(n)]
        final = None
        for index, (states, _) in heard.items():
            states = states.to(place.embedding.device)
            if bool(states[0, 0].any()):
                ranks.command(STOP, 1)
                raise ranks.failed(None)
            features[index] = dict(zip(self.depths.produced(index), states[:, 1:].split(1, dim=1), strict=False))
            if index == last:
                final = states[:, -1:]
        if outputs:
            final, features[last] = outputs[0][0].hidden, outputs[0][1]
        self.inbound = arriving
        self.crop = self.token = -1
        self.positions = [-1, *positions[:-1]]
        self.waiting = [None] * n
        return Tick(guess, features, final)

    def rewind(self, length: int) -> None:
        """Drop all tokens that are under way; the others learn of it with the next tick."""
        self.crop = length
        self.waiting, self.positions, self.inbound = [None] * self.depths.stages, [-1] * self.depths.stages, None
        if length >= 0:
            for stage in self.stages:
                stage.cache.rewind(length)

    def _own(self, position: int) -> Parcel:
        """Return what waits before this rank's stage."""
        if self.depths.stages == 1:
            return cast(Parcel, self.waiting[0])
        return self.place.handed_on(cast("tuple[torch.Tensor, Any]", self.inbound)[0], position)


def serve(state: DecodingState, ranks: Ranks, make_cache: Any) -> None:
    """Run this rank's stage until rank 0 ends the call.

    Args:
        state (`DecodingState`): the call.
        ranks (`Ranks`): the ranks.
        make_cache (`Callable[[], SpeculativeCache]`): makes the storage for a row.

    Raises:
        PipelineRankError: if any rank failed or did not answer.
    """
    worker: _Worker | None = None
    while True:
        what, *numbers = ranks.obey()
        if what == STOP:
            if numbers[0]:
                error = None if worker is None else worker.error
                raise ranks.failed(error) from error
            return
        if what == PROMPT:
            if worker is not None:
                worker.state.contexts.close()
            worker = _Worker(state, ranks, numbers[0], make_cache())
            worker.prompt()
        else:
            cast(_Worker, worker).tick(crop=numbers[0], token=numbers[1], positions=numbers[2:])


class _Worker:
    """One row on a rank that does not control."""

    def __init__(self, state: DecodingState, ranks: Ranks, row: int, cache: SpeculativeCache) -> None:
        state.activate([row], ModelRunner(state.model, cache, state.longest), frozenset())
        self.state, self.ranks, self.place = state, ranks, _Place(state, ranks)
        self.stage = cast(Stage, self.place.stage)
        self.inbound: torch.Tensor | None = None
        self.error: Exception | None = None

    def prompt(self) -> None:
        """Run the prompt, and report its features."""
        place, blocks = self.place, self.place.blocks()
        for block in blocks:
            if block is blocks[-1]:
                place.switch_attention()
            hidden, features = place.run_prompt(block, own=block is not blocks[-1])
            rows = [features[index] for index in self.ranks.depths.produced(self.stage.index)]
            if self.stage.index == place.last:
                rows.append(hidden)
            if rows:
                self.ranks.wait(self.ranks.report(torch.cat(rows, dim=1)), 0)

    def tick(self, crop: int, token: int, positions: list[int]) -> None:
        """Make one tick: run what waits here, hand it on, report, and take what the stage before hands on."""
        ranks, place, stage = self.ranks, self.place, self.stage
        if crop >= 0:
            stage.cache.rewind(crop)
            self.inbound = None
        inbound, works = self.inbound, []
        self.inbound = None
        if stage.index > 0 and positions[stage.index - 1] >= 0:
            self.inbound, work = ranks.take(place.shape(1), place.dtype, stage.index - 1)
            works.append((work, ranks.owner(stage.index - 1)))
        if positions[stage.index] >= 0:
            hidden, report = self._run(token, positions[stage.index], inbound)
            works.append((ranks.report(report), 0))
            if stage.index < place.last:
                works.append((ranks.hand_on(hidden, stage.index + 1), ranks.owner(stage.index + 1)))
        for work, rank in works:
            ranks.wait(work, rank)

    def _run(self, token: int, position: int, inbound: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the state to hand on and the report: a row that is not 0 after an error, then what was asked for."""
        place, stage = self.place, self.stage
        device = place.embedding.device
        fine = torch.zeros(place.shape(1), dtype=place.dtype, device=device)
        try:
            if stage.index == 0:
                parcel = place.token(token, position)
            else:
                parcel = place.handed_on(cast(torch.Tensor, inbound), position)
            parcel, features = stage.run(parcel)
        except Exception as error:
            # the tick ends as if nothing had happened; rank 0 sees the report, stops the call and asks for the reason
            self.error = error
            return fine, torch.ones_like(fine).expand(-1, 1 + place.rows_of(stage.index), -1)
        rows = [fine, *(features[index] for index in self.ranks.depths.produced(stage.index))]
        if stage.index == place.last:
            rows.append(parcel.hidden)
        return parcel.hidden, torch.cat(rows, dim=1)
