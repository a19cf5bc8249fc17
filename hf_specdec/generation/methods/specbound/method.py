"""SpecBound: draft from the model's own shallow layers, and carry the parked states through the deep ones together.

Idea      an easy token is known after a few layers. A guess that an exit head trusts becomes a draft, its hidden
state is parked where it stopped, and one pass takes all parked states through the remaining layers.
Drafts    the model itself: exit heads test the newest token's state, shallow to deep; confidence is annealed, because
shallow layers are too sure of themselves. A token that reaches `max_depth` unguessed ends the draft.
Verifies  losslessly, with the model's own logits of that pass. No layer ever runs twice on a token.
Trained   the exit heads (`hf-specdec train specbound`); the model stays as it is.
Paper     https://arxiv.org/abs/2604.12247
New here  stock `assistant_early_exit` has one fixed exit, a second cache and runs the shallow layers again to verify.

Names are the paper's: `alpha` and `tau` of the confidence test, depth l = after l layers, L the model's depth. The
tokens of a round are the pending one and the drafts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ....configuration import SpeculationConfig
from ....kernels.request import ForwardRequest
from ....kernels.twin import twin_of
from ...models.layerwise import Layerwise, Staircase, watched
from ...models.surgery import decoder_layers
from ...runner import Forward
from ...state import DecodingState
from ...strategy import Draft, SpeculationStrategy, StepResult
from .exit_heads import ExitHeads, ExitReader, check_layers, load_exit_heads


logger = logging.get_logger(__name__)

_TRAINED_ALPHA = 0.3
_MOST_EXITS = 4


@dataclass(frozen=True)
class SpecBoundConfig(SpeculationConfig):
    """Settings of SpecBound.

    Args:
        num_assistant_tokens (`int`, *optional*, defaults to 6): draft tokens per round at most, the paper's width
            bound.
        alpha (`float`, *optional*): annealing, at least 0; a test at depth l divides its logits by
            `1 + alpha (1 - l / L)`. 0.3 with trained heads and 0 without.
        tau (`float`, *optional*, defaults to 0.8): confidence from which a guess is taken, in (0, 1).
        max_depth (`int`, *optional*): layers that a draft may take, the paper's depth bound; half of the model's by
            default. The model's depth is allowed, and bounds nothing.
        exit_layers (`list[int]` or `"all"`, *optional*): depths to test at; by default those that have trained heads,
            up to `max_depth`, or without heads up to 4, evenly spaced.
        adapter (`str`, *optional*): folder or Hub repository of trained exit heads. Without, the model's own norm and
            head guess, which works for models that were trained for it.
        sampling_draft (`str`, *optional*, defaults to `"sample"`): whether drafts are sampled, or the most likely
            token (`"match"`), when the call samples. Greedy calls don't differ.
        lag (`bool`, *optional*): launch the next layer before the result of a test is read; by default on CUDA, where
            each reading waits for the device.
    """

    strategy = "specbound"

    _replaced = {"compile": "layers are run one by one, so nothing can be compiled"}

    compile: ClassVar[None] = None  # type: ignore[misc]
    num_assistant_tokens: int = 6
    alpha: float | None = None
    tau: float = 0.8
    max_depth: int | None = None
    exit_layers: list[int] | tuple[int, ...] | str | None = None
    adapter: str | None = None
    sampling_draft: str = "sample"
    lag: bool | None = None

    def validate(self) -> None:
        """Raise `ValueError` for a value that is out of range."""
        if self.alpha is not None and not 0 <= self.alpha < float("inf"):
            raise ValueError(f"`alpha` must be at least 0 and finite, got {self.alpha}.")
        if not 0 < self.tau < 1:
            raise ValueError(f"`tau` must be in (0, 1), got {self.tau}.")
        if self.max_depth is not None and self.max_depth < 1:
            raise ValueError(f"`max_depth` must be at least 1, got {self.max_depth}.")
        depths = self.exit_layers
        if isinstance(depths, str) and depths != "all":
            raise ValueError(f"`exit_layers` must be depths or 'all', got {depths!r}.")
        if isinstance(depths, (list, tuple)) and any(type(depth) is not int for depth in depths):
            raise TypeError(f"`exit_layers` must hold whole numbers, got {depths!r}.")
        self.check_choices(sampling_draft=("sample", "match"))

    def depth_bound(self, layers: int) -> int:
        """Return `max_depth` for a model of `layers` layers."""
        depth = max(1, round(layers / 2)) if self.max_depth is None else self.max_depth
        if depth > layers:
            raise ValueError(f"`max_depth` must be at most the model's {layers} layers, got {depth}.")
        return depth

    def exits(self, layers: int, trained: list[int] | None) -> list[int]:
        """Return the depths to test at, for a model of `layers` layers and heads at the depths `trained`."""
        bound = self.depth_bound(layers)
        if self.exit_layers is None or self.exit_layers == "all":
            last = min(bound, layers - 1)
            if trained is not None:
                found = [layer for layer in trained if layer <= last]
            elif self.exit_layers == "all":
                found = list(range(1, last + 1))
            else:
                first = min(last, max(2, layers // 8))
                found = sorted({round(x) for x in torch.linspace(first, last, _MOST_EXITS).tolist()} - {0})
            if not found:
                raise ValueError(
                    f"`max_depth` is {bound} for a model of {layers} layers: below all exits"
                    + (f", which were trained at {trained}." if trained else ".")
                )
            return found
        chosen = [int(depth) for depth in self.exit_layers]
        check_layers(chosen, min(bound, layers - 1), "exit_layers")
        if trained is not None and set(chosen) - set(trained):
            raise ValueError(f"`exit_layers` {chosen} must be among the trained ones, {trained}.")
        return chosen

    def temperature(self, layer: int, layers: int, trained: bool) -> float:
        """Return the test's temperature at depth `layer` of `layers`: largest at the first, 1 at the last."""
        alpha = (_TRAINED_ALPHA if trained else 0.0) if self.alpha is None else self.alpha
        return 1 + alpha * (1 - layer / layers)


class SpecBoundStrategy(SpeculationStrategy):
    """Draft by early exits, carry the parked tokens through the deep layers, verify losslessly."""

    config_class = SpecBoundConfig
    paper = "https://arxiv.org/abs/2604.12247"
    batched = False
    reads_prompt = True
    presets = {"": {}, "match": {"sampling_draft": "match"}}
    config: SpecBoundConfig

    heads: ExitHeads
    parts: Layerwise
    staircase: Staircase
    reader: ExitReader

    def __init__(self, config: SpeculationConfig, assistant_model: PreTrainedModel | None = None) -> None:
        super().__init__(config, assistant_model)
        self.guessed: list[int] = []  # depth of the head that guessed each draft of the round
        self.judged: tuple[int, int, int] = (0, 0, 0)  # row, its columns before the round, drafts that were accepted
        self.stops: Counter[str] = Counter()
        self.exited: Counter[int] = Counter()
        self.accepted: Counter[int] = Counter()
        self.tests = self.layer_calls = self.token_layers = 0

    def prepare(self, model: PreTrainedModel) -> None:
        """Load the exit heads, and check depths against the model's."""
        config, self.depth = self.config, len(decoder_layers(model))
        self.bound = config.depth_bound(self.depth)
        heads = None if config.adapter is None else load_exit_heads(model, config.adapter)
        self.exits = config.exits(self.depth, None if heads is None else heads.layers)
        if heads is None:
            logger.warning_once(
                "The strategy 'specbound' has no trained exit heads (`adapter`), so the model's own norm and head "
                "guess from shallow states. Unless the model was trained for that, few guesses are right, and it is "
                "slower than plain decoding."
            )
        self.temperatures = {e: config.temperature(e, self.depth, heads is not None) for e in self.exits}
        self.heads = heads or ExitHeads(model, self.exits, "final")

    def prefill(self, state: DecodingState) -> Forward:
        """Run the prompt as usual, without tests."""
        first = state.prompt.cached[state.active[0]]
        with watched(state.target, [*self.exits, self.depth] if self.heads.kind == "block" else []) as seen:
            output = state.prefill(ForwardRequest(hidden=self.hidden))
        self.parts = Layerwise(state.target.twin)
        self.parts.check(state.target, state.pending, state.committed[0] - 1, output.logits)
        self.tail = self.parts.tail()
        self.staircase = Staircase(self.parts, state.target, self.config.num_assistant_tokens + 1)
        self.reader = ExitReader(twin_of(self.heads), self.parts, state.windows[-1], state.longest)
        if seen:
            tokens = state.text.tokens[state.active, first : state.committed[0]]
            inputs = self.parts.norm(seen.pop(self.depth))
            self.reader.start(seen, inputs, self.parts.record_at(state.target, tokens, first))
        self.lag = state.target.device.type == "cuda" if self.config.lag is None else self.config.lag
        return output

    def propose(self, state: DecodingState) -> Draft:
        """Push tokens until one is difficult, the width is reached or the text ends."""
        self._settle(state)
        width, self.guessed = state.draft_room(self.config.num_assistant_tokens)[0], []
        drafts: list[torch.Tensor] = []
        distributions: list[torch.Tensor | None] = []
        token, matches = state.pending, self.config.sampling_draft == "match"
        self.staircase.restart(state.committed[0] - 1)
        while True:
            self.staircase.push(token)
            if len(drafts) == width:
                stop = "width"  # the last draft waits at depth 0: the deep pass judges what follows it
                break
            state.stats.draft_forwards += 1
            logits = self._guess()
            if logits is None:
                stop = "depth"
                break
            so_far = torch.cat([state.pending[:, :0], *drafts], dim=1)
            full = self.heads.scatter(logits).to(state.device)
            choice, distribution, scores, counts = state.draft_next(full, so_far, [width])
            if counts[0] == len(drafts):
                stop = "banned"  # no word that the head knows is left
                self.guessed.pop()
                break
            if matches:
                choice, distribution = scores.argmax(dim=-1), None
            token = choice[:, None]
            drafts.append(token)
            distributions.append(distribution)
            if bool(state.is_eos(token)):
                stop = "eos"
                break
        self.stops[stop] += 1
        self.exited.update(self.guessed)
        kept = [distribution for distribution in distributions if distribution is not None]
        tokens = torch.cat([state.pending[:, :0], *drafts], dim=1)
        return Draft(tokens, [len(drafts)], torch.stack(kept, dim=1) if kept else None)

    def _guess(self) -> torch.Tensor | None:
        """Run the newest token until a head trusts its guess and return that head's logits `[1, F]`.

        Returns `None` for a difficult token, which has reached the depth bound.
        """
        running: tuple[int, torch.Tensor, torch.Tensor] | None = None
        while True:
            depth = self._advance()
            if running is not None and self._passes(*running):
                return running[1]  # found a layer late; the token is parked where it is
            running = None
            if depth in self.temperatures:
                logits, confidence = self._test(depth)
                if self.lag and depth < self.bound:
                    running = depth, logits, confidence
                elif self._passes(depth, logits, confidence):
                    return logits
            if depth == self.bound:
                return None

    def _test(self, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the newest token's logits `[1, F]` at `depth` and their annealed confidence `[1]`."""
        self.tests += 1
        logits = self.reader.logits(depth, self.staircase)
        return logits, annealed_confidence(logits, self.temperatures[depth])

    def _passes(self, depth: int, logits: torch.Tensor, confidence: torch.Tensor) -> bool:
        # the largest probability, never the drafted token's own: a draft must follow its declared distribution
        passed = bool(confidence >= self.config.tau)
        if passed:
            self.guessed.append(depth)
        return passed

    def _advance(self) -> int:
        """Run one layer on the newest token and all that are as deep; return the depth reached."""
        first = self.staircase.advance()
        depth = self.staircase.depths[-1]
        self.reader.note(depth, self.staircase, first)
        return depth

    def verify(self, state: DecodingState, draft: Draft) -> Forward:
        """Carry all tokens through the remaining layers and return the model's own logits of them."""
        state.stats.target_forwards += 1
        while self.staircase.depths[-1] < self.depth:
            self._advance()
        hidden = self.inputs = self.parts.norm(self.staircase.states[:, : len(self.staircase.depths)])
        logits = self.tail(hidden)
        if logits.shape[1] == draft.tokens.shape[1]:
            # a drafted end of text was not run: nothing can follow it, so what stands in for its logits is not read
            logits, hidden = (torch.cat([part, part[:, -1:]], dim=1) for part in (logits, hidden))
        return Forward(logits, hidden if self.hidden else None)

    @property
    def judges_in_order(self) -> bool:
        """Whether drafts can be judged one by one: `accept` only counts what the default says."""
        return True

    def accept(self, state: DecodingState, draft: Draft, target: Forward) -> StepResult:
        """Judge the drafts losslessly."""
        result = super().accept(state, draft, target)
        row = state.active[0]
        self.judged = row, state.text.columns[row], result.accepted[0]
        self._report(state)
        return result

    def _settle(self, state: DecodingState) -> None:
        """Count what was accepted in the last round, now that nothing can be cut from it any more."""
        row, before, accepted = self.judged
        self.accepted.update(self.guessed[: min(accepted, state.text.columns[row] - before)])

    def _report(self, state: DecodingState) -> None:
        state.stats.method.update(
            stop_reasons=dict(self.stops),
            exits={str(depth): self.exited[depth] for depth in self.exits},
            accepted_per_exit={str(depth): self.accepted[depth] for depth in self.exits},
            tests=self.tests,
            layer_calls=self.layer_calls + self.staircase.layer_calls,
            token_layers=self.token_layers + self.staircase.token_layers,
        )

    def commit(self, state: DecodingState, kept: list[int]) -> None:
        """Take back what was not emitted, from every layer."""
        super().commit(state, kept)
        if self.staircase.depths:
            self.reader.commit(kept[0], self.staircase, self.inputs)

    def close(self, state: DecodingState) -> None:
        """End the counts of this row of the batch."""
        super().close(state)
        if hasattr(self, "staircase"):
            self._settle(state)
            self.guessed = []
            self._report(state)
            self.layer_calls += self.staircase.layer_calls
            self.token_layers += self.staircase.token_layers
            del self.staircase


def annealed_confidence(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the largest probability `[...]` of float32 `logits` `[..., F]` at a temperature."""
    best = logits.amax(dim=-1, keepdim=True)
    return (logits - best).div_(temperature).exp_().sum(dim=-1).reciprocal_()
