"""SPD's pipeline over several ranks: `RankedPipeline` on the one that controls, `serve` on the others.

A tick is one command from rank 0, and then every rank does its part: a stage runs the hidden state that it was handed
in the tick before, hands its own on, and reports what the draft module may read. A rejection travels with the next
command. Every message of a tick has arrived when the tick is over, so nothing is left behind by an error or a stop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from ....cache.speculative import SpeculativeCache
from ....kernels.dispatch import speculative_attention
from ...models.layerwise import Layerwise
from ...runner import Forward, ModelRunner
from ...state import DecodingState
from .draft_module import Features
from .pipeline import Job, Parcel, Pipeline, Stage, Tick, make_parcel
from .ranks import PROMPT, STOP, TICK, Order, Ranks


class _Site:
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

    def shape(self, width: int) -> tuple[int, int, int]:
        """Return the shape of the states of `width` tokens."""
        return (1, width, self.width)

    def reports_end(self, stage: int) -> bool:
        """Whether a stage reports what leaves the last layer, too: the last one, on another rank than rank 0."""
        return stage == self.last and self.ranks.owner(stage) != 0

    def reported(self, stage: int) -> int:
        """Return how many states per token a stage reports: the features it produces, and the end of the last one."""
        return len(self.ranks.depths.produced(stage)) + self.reports_end(stage)

    def pack(self, stage: int, features: Features, hidden: torch.Tensor) -> list[torch.Tensor]:
        """Return the states that a stage reports, each `[1, m, H]`, of tokens that leave it as `hidden`."""
        ends = [hidden] if self.reports_end(stage) else []
        return [*(features[index] for index in self.ranks.depths.produced(stage)), *ends]

    def unpack(self, stage: int, report: torch.Tensor, width: int) -> tuple[Features, torch.Tensor | None]:
        """Return what `pack` was given, from a report of `width` tokens; `hidden` is `None` where it is not in it."""
        names = self.ranks.depths.produced(stage)
        states = report.to(self.embedding.device).split(width, dim=1)
        features = dict(zip(names, states[: len(names)], strict=True))
        return features, states[-1] if self.reports_end(stage) else None

    def blocks(self) -> list[tuple[int, int]]:
        """Return the first and end of each forward over the prompt; the last one is of the last token alone."""
        end = self.state.prompt.lengths[self.state.active[0]] - 1
        chunk = self.state.generation_config.prefill_chunk_size or max(end, 1)
        return [(first, min(first + chunk, end)) for first in range(0, end, chunk)] + [(end, end + 1)]

    def run_prompt(self, block: tuple[int, int], own: bool) -> tuple[torch.Tensor, Features]:
        """Run this rank's stage over a block of the prompt and hand the result on; return it and its features.

        Args:
            own (`bool`): with the model's own attention.
        """
        first, end = block
        stage = cast(Stage, self.stage)
        if stage.index == 0:
            inputs = {"input_ids": self.state.text.tokens[self.state.active, first:end].to(self.embedding.device)}
        else:
            hidden, work = self.ranks.receive_hidden(self.shape(end - first), self.dtype, stage.index - 1)
            self.ranks.wait(work, self.ranks.owner(stage.index - 1))
            inputs = {"inputs_embeds": hidden.to(self.embedding.device)}
        stage.cache.exact_slices = own
        parcel, features = stage.run(self.parcel(inputs, first, own))
        stage.cache.exact_slices = False
        if stage.index < self.last:
            self.ranks.wait(self.ranks.send_hidden(parcel.hidden, stage.index + 1), self.ranks.owner(stage.index + 1))
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

    def __init__(self, ranks: Ranks, run_all: Callable[[Sequence[Job]], list[Any]]) -> None:
        super().__init__(ranks.depths, run_all)
        self.ranks = ranks
        self.site: _Site
        self._start_over(None)

    def _start_over(self, length: int | None) -> None:
        """Forget the tokens that are under way; the next order makes all ranks keep `length` tokens, if given."""
        self.order = Order(length, None, [None] * self.depths.stages)
        self.entered: Parcel | None = None
        self.inbound: torch.Tensor | None = None  # state of the token before this rank's stage, unless it is the first

    def prefill(self, state: DecodingState) -> tuple[Forward, Features]:
        """Let the ranks run the prompt, one after the other, and collect the features of its tokens."""
        ranks, depths = self.ranks, self.depths
        ranks.command(PROMPT, state.active[0])
        site = self.site = _Site(state, ranks)
        found: dict[int, list[torch.Tensor]] = {index: [] for index in depths.features[1:]}
        blocks, final = site.blocks(), torch.empty(0)
        for block in blocks:
            gained: list[Features] = []
            if block is blocks[-1]:
                site.switch_attention()
            if site.stage is not None:
                final, features = site.run_prompt(block, own=block is not blocks[-1])
                gained.append(features)
            for stage in range(depths.stages):
                if ranks.owner(stage) == 0 or not site.reported(stage):
                    continue
                width = block[1] - block[0]
                shape = site.shape(width * site.reported(stage))
                report, work = ranks.receive_report(shape, site.dtype, ranks.owner(stage))
                ranks.wait(work, ranks.owner(stage))
                features, end = site.unpack(stage, report, width)
                gained.append(features)
                final = final if end is None else end
            for features in gained:
                for index, states in features.items():
                    found[index].append(states)
        self.parts, self.cache, self.last_position = site.parts, state.target.cache, state.target.last_position
        tokens = state.text.tokens[state.active, : state.committed[0]]
        features = {index: torch.cat(states, dim=1) for index, states in found.items()}
        features[0] = self.parts.record_at(state.target, tokens, 0).hidden
        self._start_over(None)
        return Forward(self.parts.tail()(self.parts.norm(final[:, -1:])), None), features

    def enter(self, token: torch.Tensor, position: int) -> torch.Tensor:
        """Name the token that the first stage is to embed; return its state at depth 0, `[1, 1, H]`."""
        self.entered = self._embedded(token, position)
        self.order.token, self.order.positions[0] = int(token), position
        return self.entered.hidden

    def tick(self, draft: Job | None) -> Tick:
        """Command a tick, draft and run the own stage meanwhile, and wait for the reports."""
        ranks, site, positions = self.ranks, self.site, self.order.positions
        ranks.command(TICK, *self.order.encode())
        last, n = site.last, self.depths.stages
        reports = {
            stage: ranks.receive_report(site.shape(1 + site.reported(stage)), site.dtype, ranks.owner(stage))
            for stage in range(n)
            if positions[stage] is not None and ranks.owner(stage) != 0
        }
        arriving = None
        if not ranks.dedicated and n > 1 and positions[last - 1] is not None:
            arriving = ranks.receive_hidden(site.shape(1), site.dtype, last - 1)
        jobs: list[Job] = []
        position = positions[last]
        if site.stage is not None and position is not None:
            stage, parcel = site.stage, self._own(position)
            jobs = [lambda: stage.run(parcel)]
        try:
            guess, *outputs = self.run_all([draft or (lambda: None), *jobs])
        finally:
            for index, (_, work) in reports.items():
                ranks.wait(work, ranks.owner(index))
            if arriving is not None:
                ranks.wait(arriving[1], ranks.owner(last - 1))
        features: list[Features] = [{} for _ in range(n)]
        final = None
        for index, (report, _) in reports.items():
            if bool(report[0, 0].any()):
                ranks.command(STOP, 1)
                raise ranks.failed(None)
            features[index], end = site.unpack(index, report[:, 1:], 1)
            final = final if end is None else end
        if outputs:
            final, features[last] = outputs[0][0].hidden, outputs[0][1]
        self.inbound = None if arriving is None else arriving[0]
        self.order = Order(None, None, [None, *positions[:-1]])
        return Tick(guess, features, final)

    def rewind(self, length: int) -> None:
        """Drop all tokens that are under way; the others learn of it with the next tick."""
        self._start_over(length)
        if self.site.stage is not None:
            self.site.stage.cache.rewind(length)

    def _own(self, position: int) -> Parcel:
        """Return what waits before this rank's stage."""
        if self.depths.stages == 1:
            return cast(Parcel, self.entered)
        return self.site.handed_on(cast(torch.Tensor, self.inbound), position)


def serve(state: DecodingState, ranks: Ranks, make_cache: Callable[[], SpeculativeCache]) -> None:
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
        what, *numbers = ranks.receive_command()
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
            cast(_Worker, worker).tick(Order.decode(numbers))


class _Worker:
    """One row on a rank that does not control."""

    def __init__(self, state: DecodingState, ranks: Ranks, row: int, cache: SpeculativeCache) -> None:
        state.activate([row], ModelRunner(state.model, cache, state.longest), frozenset())
        self.state, self.ranks, self.site = state, ranks, _Site(state, ranks)
        self.stage = cast(Stage, self.site.stage)
        self.inbound: torch.Tensor | None = None
        self.error: Exception | None = None

    def prompt(self) -> None:
        """Run the prompt, and report its features."""
        site, blocks = self.site, self.site.blocks()
        for block in blocks:
            if block is blocks[-1]:
                site.switch_attention()
            hidden, features = site.run_prompt(block, own=block is not blocks[-1])
            states = site.pack(self.stage.index, features, hidden)
            if states:
                self.ranks.wait(self.ranks.send_report(torch.cat(states, dim=1)), 0)

    def tick(self, order: Order) -> None:
        """Make one tick: run what waits here, hand it on, report, and take what the stage before hands on."""
        ranks, site, stage, positions = self.ranks, self.site, self.stage, order.positions
        if order.length is not None:
            stage.cache.rewind(order.length)
            self.inbound = None
        inbound, works = self.inbound, []
        self.inbound = None
        if stage.index > 0 and positions[stage.index - 1] is not None:
            self.inbound, work = ranks.receive_hidden(site.shape(1), site.dtype, stage.index - 1)
            works.append((work, ranks.owner(stage.index - 1)))
        position = positions[stage.index]
        if position is not None:
            hidden, report = self._run(order.token, position, inbound)
            works.append((ranks.send_report(report), 0))
            if stage.index < site.last:
                works.append((ranks.send_hidden(hidden, stage.index + 1), ranks.owner(stage.index + 1)))
        for work, rank in works:
            ranks.wait(work, rank)

    def _run(
        self, token: int | None, position: int, inbound: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the state to hand on and the report: a state that is not 0 after an error, then what `pack` gives."""
        site, stage = self.site, self.stage
        fine = torch.zeros(site.shape(1), dtype=site.dtype, device=site.embedding.device)
        try:
            if stage.index == 0:
                parcel = site.token(cast(int, token), position)
            else:
                parcel = site.handed_on(cast(torch.Tensor, inbound), position)
            parcel, features = stage.run(parcel)
        except Exception as error:
            # the tick ends as if nothing had happened; rank 0 sees the report, stops the call and asks for the reason
            self.error = error
            return fine, torch.ones_like(fine).expand(-1, 1 + site.reported(stage.index), -1)
        return parcel.hidden, torch.cat([fine, *site.pack(stage.index, features, parcel.hidden)], dim=1)
