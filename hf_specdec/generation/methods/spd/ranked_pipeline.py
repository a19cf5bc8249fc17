"""SPD's pipeline over several ranks: `RankedPipeline` on the one that controls, `serve` on the others.

A tick is one command from rank 0, and then every rank does its part: a stage runs the hidden state that it was handed
in the tick before, hands its own on, and reports what the draft module may read. A rejection travels with the next
command. Every message of a tick has arrived when the tick is over, so nothing is left behind by an error or a stop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch

from ....cache.speculative import SpeculativeCache
from ...models.layerwise import Layerwise
from ...runner import Forward, ModelRunner
from ...state import DecodingState
from .draft_module import Features
from .pipeline import Job, Parcel, Stage, Tick, make_parcel
from .ranks import HIDDEN, PROMPT, REPORT, STOP, TICK, Message, Order, Ranks


class _Site:
    """This rank's stage, fed from the rank before it and feeding the one after it, for the only active row."""

    def __init__(self, state: DecodingState, ranks: Ranks) -> None:
        self.state, self.ranks, self.runner = state, ranks, state.target
        self.parts = Layerwise(self.runner.model)  # with the model's own attention, for the prompt
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

    def run_prompt(self) -> Iterator[tuple[int, torch.Tensor, Features]]:
        """Run this rank's stage, if it has one, over the prompt block by block, and hand the results on.

        The last block is the last token alone, from which on the package's attention runs. Yields each block's width,
        the stage's result and its features.
        """
        end = self.state.prompt.lengths[self.state.active[0]] - 1
        chunk = self.state.generation_config.prefill_chunk_size or max(end, 1)
        for first in range(0, end, chunk):
            width = min(chunk, end - first)
            yield width, *self._run_block(first, width, own=True)
        self.parts = Layerwise(self.runner.twin)
        if self.stage is not None:
            self.stage.parts = self.parts
        yield 1, *self._run_block(end, 1, own=False)

    def _run_block(self, first: int, width: int, own: bool) -> tuple[torch.Tensor, Features]:
        """Run the stage over `width` tokens from position `first` on, perhaps with the model's own attention."""
        stage = self.stage
        if stage is None:
            return torch.empty(0), {}
        if stage.index == 0:
            inputs = {"input_ids": self.state.text.tokens[self.state.active, first : first + width]}
        else:
            inputs = {"inputs_embeds": self.ranks.wait(self.receive_hidden(stage.index, width))}
        stage.cache.exact_slices = own
        parcel, features = stage.run(self.parcel(inputs, first, own))
        stage.cache.exact_slices = False
        if stage.index < self.last:
            self.ranks.wait(self.send_hidden(parcel.hidden))
        return parcel.hidden, features

    def receive_hidden(self, stage: int, width: int) -> Message:
        """Begin to receive the states of `width` tokens that the stage before hands on to a stage."""
        return self.ranks.receive(self.shape(width), self.dtype, self.ranks.owner(stage - 1), HIDDEN)

    def send_hidden(self, hidden: torch.Tensor) -> Message:
        """Begin to hand states on to the next stage."""
        return self.ranks.send(hidden, self.ranks.owner(cast(Stage, self.stage).index + 1), HIDDEN)

    def receive_report(self, stage: int, states: int) -> Message:
        """Begin to receive the report of a stage on another rank, of so many states."""
        return self.ranks.receive(self.shape(states), self.dtype, self.ranks.owner(stage), REPORT)

    def parcel(self, inputs: dict[str, torch.Tensor], start: int, own: bool = False) -> Parcel:
        """Return tokens ready for this rank's stage (see `make_parcel`), perhaps for the model's own attention."""
        return make_parcel(self.parts, self.runner, inputs, start, cast(Stage, self.stage).cache, own)


class RankedPipeline:
    """The stages on their ranks, as the controlling rank sees them, which runs the draft module and its own stage."""

    parts: Layerwise  # from `prefill` on

    def __init__(self, ranks: Ranks, run_all: Callable[[Sequence[Job]], list[Any]]) -> None:
        self.ranks, self.depths, self.run_all = ranks, ranks.depths, run_all
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
        final = torch.empty(0)
        for width, hidden, features in site.run_prompt():
            final, gained = hidden, [features]
            for stage in range(depths.stages):
                if ranks.owner(stage) == 0 or not site.reported(stage):
                    continue
                report = ranks.wait(site.receive_report(stage, width * site.reported(stage)))
                features, end = site.unpack(stage, report, width)
                gained.append(features)
                final = final if end is None else end
            for features in gained:
                for index, states in features.items():
                    found[index].append(states)
        self.parts = site.parts
        tokens = state.text.tokens[state.active, : state.committed[0]]
        features = {index: torch.cat(states, dim=1) for index, states in found.items()}
        features[0] = self.parts.record_at(state.target, tokens, 0).hidden
        self._start_over(None)
        return Forward(self.parts.tail()(self.parts.norm(final[:, -1:])), None), features

    def enter(self, token: torch.Tensor, position: int) -> torch.Tensor:
        """Name the token that the first stage is to embed; return its state at depth 0, `[1, 1, H]`."""
        self.entered = make_parcel(self.parts, self.site.runner, {"input_ids": token}, position)
        self.order.token, self.order.positions[0] = int(token), position
        return self.entered.hidden

    def tick(self, draft: Job | None) -> Tick:
        """Command a tick, draft and run the own stage meanwhile, and wait for the reports."""
        ranks, site, positions = self.ranks, self.site, self.order.positions
        ranks.command(TICK, *self.order.encode())
        last, n = site.last, self.depths.stages
        reports = {
            stage: site.receive_report(stage, 1 + site.reported(stage))
            for stage in range(n)
            if positions[stage] is not None and ranks.owner(stage) != 0
        }
        arriving = None
        if not ranks.dedicated and n > 1 and positions[last - 1] is not None:
            arriving = site.receive_hidden(last, 1)
        jobs: list[Job] = []
        position = positions[last]
        if site.stage is not None and position is not None:
            parcel = self.entered  # of a model in one stage
            if n > 1:
                parcel = site.parcel({"inputs_embeds": cast(torch.Tensor, self.inbound)}, position)
            jobs = [partial(site.stage.run, cast(Parcel, parcel))]
        try:
            guess, *outputs = self.run_all([draft or (lambda: None), *jobs])
        finally:
            for message in [*reports.values(), *([] if arriving is None else [arriving])]:
                ranks.wait(message)
        features: list[Features] = [{} for _ in range(n)]
        final = None
        for index, report in reports.items():
            if bool(report.values[0, 0].any()):
                ranks.command(STOP, 1)
                raise ranks.failed(None)
            features[index], end = site.unpack(index, report.values[:, 1:], 1)
            final = final if end is None else end
        if outputs:
            final, features[last] = outputs[0][0].hidden, outputs[0][1]
        self.inbound = None if arriving is None else arriving.values
        self.order = Order(None, None, [None, *positions[:-1]])
        return Tick(guess, features, final)

    def rewind(self, length: int) -> None:
        """Drop all tokens that are under way; the others learn of it with the next tick."""
        self._start_over(length)
        if self.site.stage is not None:
            self.site.stage.cache.rewind(length)


def serve(state: DecodingState, ranks: Ranks, make_cache: Callable[[], SpeculativeCache]) -> None:
    """Run this rank's stage until rank 0 ends the call; `make_cache` makes the storage for a row.

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
            worker.read_prompt()
        else:
            cast(_Worker, worker).tick(Order.decode(numbers))


class _Worker(_Site):
    """One row on a rank that does not control."""

    stage: Stage

    def __init__(self, state: DecodingState, ranks: Ranks, row: int, cache: SpeculativeCache) -> None:
        state.activate([row], ModelRunner(state.model, cache, state.longest), frozenset())
        super().__init__(state, ranks)
        self.inbound: torch.Tensor | None = None
        self.error: Exception | None = None

    def read_prompt(self) -> None:
        """Run the prompt, and report its features."""
        for _, hidden, features in self.run_prompt():
            states = self.pack(self.stage.index, features, hidden)
            if states:
                self.ranks.wait(self.ranks.send(torch.cat(states, dim=1), 0, REPORT))

    def tick(self, order: Order) -> None:
        """Make one tick: run what waits here, hand it on, report, and take what the stage before hands on."""
        index, positions, messages = self.stage.index, order.positions, []
        if order.length is not None:
            self.stage.cache.rewind(order.length)
            self.inbound = None
        inbound, self.inbound = self.inbound, None
        if index > 0 and positions[index - 1] is not None:
            messages.append(self.receive_hidden(index, 1))
            self.inbound = messages[0].values
        position = positions[index]
        if position is not None:
            hidden, report = self._run(order.token, position, inbound)
            messages.append(self.ranks.send(report, 0, REPORT))
            if index < self.last:
                messages.append(self.send_hidden(hidden))
        for message in messages:
            self.ranks.wait(message)

    def _run(
        self, token: int | None, position: int, inbound: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the state to hand on and the report: a state that is not 0 after an error, then what `pack` gives."""
        index = self.stage.index
        fine = torch.zeros(self.shape(1), dtype=self.dtype, device=self.embedding.device)
        try:
            if index == 0:
                inputs = {"input_ids": torch.tensor([[token]])}
            else:
                inputs = {"inputs_embeds": cast(torch.Tensor, inbound)}
            parcel, features = self.stage.run(self.parcel(inputs, position))
        except Exception as error:
            # the tick ends as if nothing had happened; rank 0 sees the report, stops the call and asks for the reason
            self.error = error
            return fine, torch.ones_like(fine).expand(-1, 1 + self.reported(index), -1)
        return parcel.hidden, torch.cat([fine, *self.pack(index, features, parcel.hidden)], dim=1)
