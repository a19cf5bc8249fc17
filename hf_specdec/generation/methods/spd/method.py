"""SPD: the model as a pipeline of stages, with several tokens of one text in flight at different depths.

Idea      in one tick every stage runs one token, each a different token of the same text, and a small draft module
guesses the next token meanwhile. When the oldest token leaves the last stage, its logits verify the one behind it.
Drafts    a trained module that reads the model's own hidden states as they were at the start of the tick: complete
for finished tokens, as deep as they have come for those in flight. It never looks further than one token ahead.
Verifies  losslessly, one token per tick. After a wrong guess all tokens in flight are dropped and the pipeline fills
up again, which takes n ticks until the next token.
Trained   the draft module (`hf-specdec train spd`); the model stays as it is.
Paper     https://arxiv.org/abs/2605.30852
New here  ordinary pipeline parallelism needs n texts to keep n stages busy; this uses them for one.

A tick costs 1/n of a plain step only where stages run at the same time: on several ranks (`schedule="dist"`) or, for
as long as Python lets them, in threads. In one process it is a way of measuring acceptance, and slower than plain.

Names are the paper's: n stages, a token's depth is the number of stages that it has passed.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist
from transformers import PreTrainedModel
from transformers.utils import logging

from .... import _compat
from ....configuration import SpeculationConfig
from ....kernels.twin import twin_of
from ... import acceptance
from ...models.adapters import describe, read_record
from ...models.surgery import decoder_layers
from ...runner import Forward
from ...state import DecodingState
from ...stats import SpeculationStats
from ...strategy import SpeculationStrategy, StepResult
from .depth_map import DepthMap
from .draft_module import KIND, DraftReader, Features, PipelineDraftModule, load_draft_module, read_depths
from .pipeline import InThreads, Job, LocalPipeline, in_series
from .ranked_pipeline import RankedPipeline, serve
from .ranks import STOP, Ranks


logger = logging.get_logger(__name__)

_PROTOCOL = 1
"""Of the messages between ranks; ranks of unlike releases must not talk to each other."""


@dataclass(frozen=True)
class SPDConfig(SpeculationConfig):
    """Settings of SPD.

    Args:
        adapter (`str`): folder or Hub repository of a trained draft module.
        num_stages (`int`, *optional*): n; must be the adapter's, which is the default.
        stage_layers (`list[int]`, *optional*): layers of each stage; must be the adapter's, which are the default.
        schedule (`str`, *optional*, defaults to `"auto"`): `"serial"`, all in one thread; `"threads"`, a thread per
            stage; `"dist"`, the stages on the ranks of `torch.distributed`; `"auto"`: `"dist"` where it has more than
            one rank, else `"serial"`.
        timeout (`float`, *optional*, defaults to 60.0): seconds that a rank waits for another one.
    """

    strategy = "spd"

    _replaced = {
        "num_assistant_tokens": "one token is drafted per tick, and `num_stages` are in flight",
        "compile": "stages are run apart, so nothing can be compiled",
    }

    num_assistant_tokens: ClassVar[int] = 0  # type: ignore[misc]  # no block is verified: storage as for plain
    compile: ClassVar[None] = None  # type: ignore[misc]
    adapter: str | None = None
    num_stages: int | None = None
    stage_layers: list[int] | tuple[int, ...] | None = None
    schedule: str = "auto"
    timeout: float = 60.0

    def validate(self) -> None:
        """Raise `ValueError` for a value that is out of range."""
        counts = self.stage_layers
        if counts is not None and (not counts or any(type(count) is not int for count in counts)):
            raise ValueError(f"`stage_layers` must hold a whole number of layers per stage, got {counts!r}.")
        self.check_choices(schedule=("auto", "serial", "threads", "dist"))
        if not 0 < self.timeout < float("inf"):
            raise ValueError(f"`timeout` must be above 0 and finite, got {self.timeout}.")

    @property
    def ranked(self) -> bool:
        """Whether the stages lie on the ranks of `torch.distributed`.

        Raises:
            ValueError: if they are to, and there are no ranks.
        """
        ready = dist.is_available() and dist.is_initialized()
        if self.schedule == "dist" and not ready:
            raise ValueError(
                "`schedule='dist'` needs `torch.distributed`: start one process per rank with `torchrun`, and call "
                "`torch.distributed.init_process_group()` first."
            )
        return self.schedule == "dist" or (self.schedule == "auto" and ready and dist.get_world_size() > 1)

    def check_depths(self, depths: DepthMap) -> None:
        """Raise `ValueError` unless the stages asked for are those that the adapter was trained with."""
        for name, asked, trained in (
            ("num_stages", self.num_stages, depths.stages),
            ("stage_layers", None if self.stage_layers is None else list(self.stage_layers), depths.stage_layers),
        ):
            if asked is not None and asked != trained:
                raise ValueError(
                    f"`{name}` is {asked}, but the adapter {self.adapter!r} was trained with {trained}: which hidden "
                    "states a token has at which depth is part of what it learned."
                )


@dataclass
class _Flying:
    """A token in flight."""

    position: int  # in the text
    token: torch.Tensor  # `[1, 1]`, int64
    distribution: torch.Tensor | None  # that it was drawn from, `[1, V]`, float32
    features: Features  # what the draft module may read of it
    fill: int  # tokens that were in flight when it was drafted
    depth: int = 0  # stages that it has passed


class SPDStrategy(SpeculationStrategy):
    """Keep a token in every stage; verify the oldest one's successor in every tick."""

    config_class = SPDConfig
    paper = "https://arxiv.org/abs/2605.30852"
    needs_adapter = True
    batched = False
    reads_prompt = True
    presets = {"": {}, "threads": {"schedule": "threads"}}
    config: SPDConfig

    depths: DepthMap
    module: PipelineDraftModule
    pipeline: LocalPipeline | RankedPipeline
    reader: DraftReader

    def __init__(self, config: SpeculationConfig, assistant_model: PreTrainedModel | None = None) -> None:
        super().__init__(config, assistant_model)
        self.flying: list[_Flying] = []  # oldest first
        self.finished: list[Features] = []  # of tokens that have passed all stages and are not in the module's cache
        self.rows = self.ticks = self.rejections = self.outside = self.emitted = 0
        self.judged: Counter[int] = Counter()  # drafts by how many tokens were in flight before them
        self.accepted: Counter[int] = Counter()

    @classmethod
    def round_ms(cls, stats: SpeculationStats, draft_ms: float, verify_ms: float) -> float:
        """Return the milliseconds of a tick: a token takes less than a forward, or several, and drafts meanwhile."""
        return verify_ms * stats.target_forwards / stats.method["ticks"]

    def prepare(self, model: PreTrainedModel) -> None:
        """Load the draft module, and check the stages against the model's layers and the adapter's."""
        config, layers = self.config, len(decoder_layers(model))
        if _compat.is_tensor_parallel(model):
            raise ValueError(
                "The strategy 'spd' puts whole layers on ranks, so it can't run a tensor-parallel model (`tp_plan`); "
                "load the model without, or each rank's part with `hf_specdec.load_stage`."
            )
        if config.num_stages is not None or config.stage_layers is not None:
            DepthMap(layers, config.num_stages or len(config.stage_layers or ()), config.stage_layers)
        if config.adapter is None:
            raise ValueError(
                "The strategy 'spd' drafts with a trained module: set `adapter` to its folder or Hub repository "
                '(`assistant_strategy="path/or/repo"`), or train one with `hf-specdec train spd`.'
            )
        if config.ranked and dist.get_rank():  # only the controlling rank drafts
            self.depths = read_depths(model, config.adapter)
        else:
            self.module = load_draft_module(model, config.adapter)
            self.depths = self.module.depths
        config.check_depths(self.depths)
        self.ranks = Ranks(self.depths, config.timeout) if config.ranked else None
        self._check_ends(model)

    def _check_ends(self, model: PreTrainedModel) -> None:
        """Warn if the module can't guess an end of the text, so that every text ends with a rejection."""
        ends = model.generation_config.eos_token_id
        for end in ends if isinstance(ends, list) else [] if ends is None else [ends]:
            if self.controls and not self.module.can_guess(torch.tensor([[end]])):
                logger.warning_once(
                    f"The draft vocabulary of {self.config.adapter!r} lacks the EOS token {end}: it is never guessed."
                )

    @property
    def controls(self) -> bool:
        """Whether this process decides; the others serve it (see `follow`)."""
        return self.ranks is None or self.ranks.controls

    @property
    def whole_model(self) -> bool:
        """Whether this process runs all layers, so that it can return their cache."""
        return self.ranks is None

    @property
    def judges_in_order(self) -> bool:
        """Whether drafts can be judged one by one: there is one per tick."""
        return True

    @property
    def can_stop_drafting(self) -> bool:
        """Whether rounds may go on for processors that need plain steps: a tick judges one token as it is."""
        return True

    @contextmanager
    def session(self, state: DecodingState) -> Iterator[None]:
        """Connect the ranks for one call, and give all of them its result."""
        if self.ranks is None:
            yield
            return
        with self.ranks.session(self._terms(state), state.device):
            yield
            if self.controls:
                self.ranks.command(STOP, 0)
            text = state.text
            result = torch.cat([text.host.flatten(), torch.tensor(text.columns)])
            self.ranks.share(result)
            text.replace(result[: -state.batch].view_as(text.host), result[-state.batch :].tolist())

    def _terms(self, state: DecodingState) -> dict[str, str]:
        """Return what all ranks must agree on."""
        record = read_record(cast(str, self.config.adapter), KIND).record
        return {
            "protocol": str(_PROTOCOL),
            "inputs": _digest([state.prompt.ids.tolist(), state.prompt.mask.tolist()]),
            "generation_config": _digest(state.generation_config.to_dict()),
            "model": _digest([describe(state.model), str(state.model.dtype)]),
            "adapter": _digest(record),
            "timeout": str(self.config.timeout),
        }

    def follow(self, state: DecodingState) -> None:
        """Run this rank's stage until the controlling rank ends the call."""
        with state.contexts:
            serve(state, cast(Ranks, self.ranks), lambda: self.make_cache(state, 1))

    def _pipeline(self, state: DecodingState) -> LocalPipeline | RankedPipeline:
        schedule, n = self.config.schedule, self.depths.stages
        threads = 1 if self.ranks is not None and self.ranks.stage is not None else n if schedule == "threads" else 0
        run_all = in_series
        if threads:
            run_all = InThreads(threads, state.target.device)
            state.contexts.callback(run_all.pool.shutdown)
        if self.ranks is not None:
            return RankedPipeline(self.ranks, run_all)
        if not threads:
            logger.warning_once(
                "The strategy 'spd' with schedule 'serial' runs the stages one after the other, so it measures "
                "acceptance and gains no time; see `schedule`."
            )
        return LocalPipeline(self.depths, run_all)

    def prefill(self, state: DecodingState) -> Forward:
        """Run the prompt as usual, and let the draft module read its features."""
        self.pipeline = self._pipeline(state)
        output, features = self.pipeline.prefill(state)
        self.parts = self.pipeline.parts
        self.tail = self.parts.tail()
        self.reader = twin_of(self.module).reader(state.target.twin, state.longest)
        self.reader.start(features, state.prompt.cached[state.active[0]])
        self.flying, self.finished = [], []
        self.rows += 1
        return output

    def step(self, state: DecodingState) -> StepResult:
        """Make one tick: 0 or 1 tokens."""
        if not self.flying:
            self._enter(state.pending, state.committed[0] - 1, None)
        drafting = self._drafting(state)
        with state.timed("verify"):
            tick = self.pipeline.tick(drafting)
        self.ticks += 1
        state.stats.target_forwards += tick.final is not None
        state.stats.draft_forwards += tick.guess is not None
        if tick.guess is not None:
            self.finished = []  # they are in the module's cache now
        for entry in self.flying:
            entry.features.update(tick.features[entry.depth])
            entry.depth += 1
        result = self._verify(state, tick.final)
        if tick.guess is not None and self.flying:
            self._draft(state, tick.guess)
        return result

    def _drafting(self, state: DecodingState) -> Job | None:
        """Return the job of guessing the next token, from what is known now; `None` if it could not be verified."""
        newest = self.flying[-1].position
        if self.depths.stages == 1 or newest + 2 >= state.committed[0] + state.remaining[0]:
            return None
        finished = list(self.finished)
        flying = [(entry.depth, dict(entry.features)) for entry in self.flying]
        return lambda: self.reader.draft(finished, flying)

    def _verify(self, state: DecodingState, final: torch.Tensor | None) -> StepResult:
        """Judge the token behind the one that has left the last stage, if any has."""
        if final is None:
            nothing = state.pending[:, :0]
            width = self.module.width
            none = torch.zeros(1, 0, width, device=state.device)
            return StepResult(nothing, [0], [0], [0], none, none)
        oldest = self.flying.pop(0)
        self.finished.append(oldest.features)
        logits = self.tail(self.parts.norm(final))
        scores = state.process(logits, state.pending[:, :0])
        if not self.flying:
            token, judged, accepted = state.choose(scores[:, -1])[0][:, None], 0, 0
        else:
            draft, judged = self.flying[0], 1
            token, accepted = self._judge(state, scores, draft)
            self.judged[draft.fill] += 1
            self.accepted[draft.fill] += accepted
            if not accepted:
                self.rejections += 1
                self.outside += not self.module.can_guess(token)
                self.flying = []
                self.pipeline.rewind(oldest.position + 1)
        self.emitted += 1
        return StepResult(token, [1], [judged], [accepted], logits, scores)

    @staticmethod
    def _judge(state: DecodingState, scores: torch.Tensor, draft: _Flying) -> tuple[torch.Tensor, int]:
        """Return the token `[1, 1]` that follows by processed scores `[1, 1, V]`, and whether the draft is right."""
        token = draft.token
        if not state.do_sample:
            choice = scores.argmax(dim=-1)
            return choice, int(bool(choice == token))
        distribution, one = torch.softmax(scores, dim=-1), torch.ones(1, dtype=torch.int64, device=scores.device)
        proposed = None if draft.distribution is None else draft.distribution[:, None]
        accepted = acceptance.accept_drafts(token, one, distribution, proposed)
        if bool(accepted):
            return token, 1
        return acceptance.draw_next(token, one, accepted, distribution, proposed).tokens[:, :1], 0

    def _draft(self, state: DecodingState, guess: torch.Tensor) -> None:
        """Choose the next token by the module's logits `[1, V_d]` and hand it to the first stage."""
        ahead = [entry.token for entry in self.flying if entry.position >= state.committed[0]]
        drafts = torch.cat([state.pending[:, :0], *ahead], dim=1)
        full, made = self.module.scatter(guess).to(state.device), drafts.shape[1]
        token, distribution, _, counts = state.draft_next(full, drafts, [made + 1])
        if counts[0] == made:
            return  # no word that the module knows is left: the first stage stays empty for a tick
        self._enter(token[:, None], self.flying[-1].position + 1, distribution)

    def _enter(self, token: torch.Tensor, position: int, distribution: torch.Tensor | None) -> None:
        features = {0: self.pipeline.enter(token, position)}
        self.flying.append(_Flying(position, token, distribution, features, len(self.flying)))

    def commit(self, state: DecodingState, kept: list[int]) -> None:
        """Leave the caches as they are: tokens in flight stay in them, and a rejection has dropped them already."""

    def close(self, state: DecodingState) -> None:
        """Hand over the counts of the rows so far."""
        super().close(state)
        if not self.ticks:
            return
        # the prefill's token counts for the paper, which gives the time of the prefill to neither side
        tokens = self.emitted + self.rows
        state.stats.method.update(
            num_stages=self.depths.stages,
            ticks=self.ticks,
            rejections=self.rejections,
            rejections_outside_vocabulary=self.outside,
            judged_per_fill={str(fill): count for fill, count in sorted(self.judged.items())},
            accepted_per_fill={str(fill): self.accepted[fill] for fill in sorted(self.judged)},
            theoretical_speedup=self.depths.stages * tokens / self.ticks,
        )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
