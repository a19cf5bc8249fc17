"""What a method is made of: `Draft`, `StepResult`, `Drafter` and `SpeculationStrategy`.

A strategy is a drafter and an acceptance rule. The default `step` drafts, runs the target once over the pending token
and the drafts, and accepts losslessly; a method overrides the part that it changes. The loop alone emits, stops,
streams and rolls back.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from ..cache.speculative import SpeculativeCache
from ..configuration import SpeculationConfig
from ..kernels.address import upload
from ..kernels.request import TOKENS_ONLY, ForwardRequest
from . import acceptance, programs
from .processors import JudgeInOrder
from .runner import Forward, ModelRunner
from .state import DecodingState
from .stats import SpeculationStats


@dataclass(frozen=True)
class Draft:
    """Proposed tokens.

    Args:
        tokens (`torch.Tensor` of shape `[n, k]`, int64): proposals; k may be 0.
        counts (`list[int]`): how many of each row's k are real.
        distributions (`torch.Tensor` of shape `[n, k or k + 1, V]`, float32, *optional*): the distribution that each
            token was drawn from. `None` says that each token is a point mass, and is always right for greedy
            decoding. See `acceptance` for distributions of mass below 1.
        hidden (`torch.Tensor` of shape `[n, k, H]`, *optional*): the drafter's LM head input at each proposal.
    """

    tokens: torch.Tensor
    counts: list[int]
    distributions: torch.Tensor | None = None
    hidden: torch.Tensor | None = None

    @functools.cached_property
    def counts_on_device(self) -> torch.Tensor:
        """`counts` as int64 `[n]` beside `tokens`, for the acceptance rules."""
        return upload(self.counts, self.tokens.device)

    def distributions_over(self, width: int) -> torch.Tensor:
        """Return the distributions `[n, k, width]`, point masses where the tokens are certain."""
        if self.distributions is not None:
            return self.distributions
        masses = torch.zeros(*self.tokens.shape, width, device=self.tokens.device)
        return masses.scatter_(2, self.tokens[..., None], 1.0)

    @classmethod
    def empty(cls, state: DecodingState) -> Draft:
        """Return a draft of no tokens for every active row."""
        return cls(state.pending[:, :0], [0] * len(state.active))


@dataclass
class StepResult:
    """What one step decided.

    Args:
        tokens (`torch.Tensor` of shape `[n, m]`, int64): per row its new tokens, in order; best on the CPU, where
            they are read.
        counts (`list[int]`): how many of them are real; 0 is allowed.
        drafted (`list[int]`): draft tokens that the step judged.
        accepted (`list[int]`): how many of those stayed.
        logits (`torch.Tensor` of shape `[n, m, V]`, *optional*): raw target logits of each token.
        scores (`torch.Tensor` of shape `[n, m, V]`, *optional*): the same after the caller's processors.
    """

    tokens: torch.Tensor
    counts: list[int]
    drafted: list[int]
    accepted: list[int]
    logits: torch.Tensor | None = None
    scores: torch.Tensor | None = None


class Drafter:
    """Proposes tokens; this base none. The attributes say what it needs and gives, a `Draft` carries distributions."""

    gives_hidden: ClassVar[bool] = False
    looks_ahead: ClassVar[bool] = False
    compiles: ClassVar[bool] = False  # as for strategies
    needs_target_pass_every_round: ClassVar[bool] = False

    hidden: bool = False
    """Whether drafts keep their hidden states; only where `gives_hidden`."""
    limit: int | None = None
    """Draft tokens per round at most, where that may be changed between rounds."""

    def prepare(self, model: PreTrainedModel) -> None:
        """Load what drafting for `model` needs, and raise `ValueError` for what doesn't fit; runs no forward."""

    def setup(self, state: DecodingState) -> None:
        """Prepare for the active rows, whose prompts have not been run yet."""

    def prefill(self, state: DecodingState) -> None:
        """Read the active rows' prompts, where the drafter needs them."""

    def prefill_request(self, state: DecodingState) -> ForwardRequest:
        """Return what the target's forward over the last prompt token is asked for."""
        return TOKENS_ONLY

    def propose(self, state: DecodingState) -> Draft:
        """Return drafts for the active rows."""
        return Draft.empty(state)

    def look_ahead(self, state: DecodingState, draft: Draft) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the drafter's distributions `[n, V]` after each row's last real draft, and the states `[n, H]`.

        Only where `looks_ahead`; it runs one more draft forward.
        """
        raise NotImplementedError

    def verify_request(self, state: DecodingState, draft: Draft) -> ForwardRequest:
        """Return what the target's forward that judges `draft` is asked for."""
        return TOKENS_ONLY

    def commit(self, state: DecodingState) -> None:
        """Take note of the tokens that were emitted (`state.committed`)."""

    def close(self, state: DecodingState) -> None:
        """Release what `setup` took; also called after an exception."""


class SpeculationStrategy:
    """Base of every method.

    Args:
        config (`SpeculationConfig`): validated settings.
        assistant_model (`PreTrainedModel`, *optional*): given only when `needs_assistant`, and then unless the
            settings bring what drafts.
    """

    config_class: ClassVar[type[SpeculationConfig]] = SpeculationConfig
    paper: ClassVar[str] = ""
    page: ClassVar[str] = ""  # of docs/; `<name>.md` by default, and strategies may share one
    needs_assistant: ClassVar[bool] = False
    needs_adapter: ClassVar[bool] = False
    batched: ClassVar[bool] = True  # False: the loop decodes the rows in turn
    reads_prompt: ClassVar[bool] = False  # True: it learns from running the prompt, so a cache that is given costs it
    compiles: ClassVar[bool] = False  # True: all its forwards are the runners', so that `compile` may change them
    hidden: bool = False
    """Whether the target's forwards return the LM head's input."""
    presets: ClassVar[dict[str, dict[str, Any]]] = {"": {}}
    aliases: ClassVar[dict[str, str]] = {}  # other names of presets

    def __init__(self, config: SpeculationConfig, assistant_model: PreTrainedModel | None = None) -> None:
        name = config.strategy
        if self.needs_assistant and assistant_model is None and not config.brings_drafter:
            raise ValueError(f"The strategy {name!r} drafts with a second model: pass `assistant_model=`.")
        if assistant_model is not None and not self.needs_assistant:
            raise ValueError(
                f"The strategy {name!r} does not use `assistant_model` (got {type(assistant_model).__name__}); leave "
                'it out, or use `assistant_strategy="assisted"`, or "off" for stock assisted generation.'
            )
        self.config = config
        self.assistant_model = assistant_model
        self.drafter = self.make_drafter()
        drafts_compiled = self.drafter.compiles or type(self.drafter) is Drafter
        if config.compile is not None and not (self.compiles and drafts_compiled):
            raise ValueError(
                f"`compile={config.compile!r}` is not available for the strategy {name!r} under these settings: it "
                "runs parts of the model by itself. Allowed: None."
            )

    @classmethod
    def round_ms(cls, stats: SpeculationStats, draft_ms: float, verify_ms: float) -> float:
        """Return the milliseconds of an average round of a call, by those of a draft forward and a verification."""
        return stats.draft_forwards / max(stats.target_forwards, 1) * draft_ms + verify_ms

    @property
    def lossless(self) -> bool:
        """Whether the output's distribution is the model's own, under the configured settings."""
        return self.config.lossless

    @property
    def controls(self) -> bool:
        """Whether this process decides what is emitted; one that doesn't follows (see `follow`)."""
        return True

    @property
    def whole_model(self) -> bool:
        """Whether this process runs all of the model's layers, so that it can take and return their cache."""
        return True

    @property
    def judges_in_order(self) -> bool:
        """Whether drafts can be judged one by one, for processors that may see only what is emitted."""
        own = type(self)
        return own.accept is SpeculationStrategy.accept and own.step is SpeculationStrategy.step

    @property
    def can_stop_drafting(self) -> bool:
        """Whether rounds may go on without drafts, for processors that turn out to need that."""
        return type(self).step is SpeculationStrategy.step

    def session(self, state: DecodingState) -> AbstractContextManager[None]:
        """Return a context around the decoding of all rows of one call."""
        return nullcontext()

    def make_drafter(self) -> Drafter:
        """Return what drafts; by default nothing does."""
        return Drafter()

    def prepare(self, model: PreTrainedModel) -> None:
        """Load adapters for `model`, and raise `ValueError` for what doesn't fit it; runs no forward."""
        self.drafter.prepare(model)

    def make_cache(self, state: DecodingState, rows: int) -> SpeculativeCache:
        """Return the target's storage for `rows` rows."""
        limit = state.longest + self.config.num_assistant_tokens + 1
        return SpeculativeCache(state.windows, rows, limit, self.config.kernels)

    def make_runner(self, state: DecodingState, cache: SpeculativeCache) -> ModelRunner:
        """Return what runs the target over `cache`."""
        widths = [1, self.config.num_assistant_tokens + 1]
        return programs.make_runner(self.config.compile, state.model, cache, state.longest, widths=widths)

    def setup(self, state: DecodingState) -> None:
        """Prepare for the active rows, before their prompts are run."""
        self.drafter.setup(state)

    def prefill(self, state: DecodingState) -> Forward:
        """Run the active rows' prompts and return the forward over each row's last prompt token (`m = 1`)."""
        first = state.prefill(self.drafter.prefill_request(state)._replace(hidden=self.hidden))
        self.drafter.prefill(state)
        return first

    def propose(self, state: DecodingState) -> Draft:
        """Return drafts for the active rows."""
        return self.drafter.propose(state)

    def verify(self, state: DecodingState, draft: Draft) -> Forward:
        """Run the target over each row's pending token and drafts; logits `[n, k + 1, V]`."""
        request = self.drafter.verify_request(state, draft)._replace(hidden=self.hidden)
        return state.forward(torch.cat([state.pending, draft.tokens], dim=1), request=request)

    def accept(self, state: DecodingState, draft: Draft, target: Forward) -> StepResult:
        """Judge the drafts losslessly: by equality for greedy decoding, by speculative sampling otherwise."""
        if state.processors.in_order:
            return self._accept_in_order(state, draft, target)
        try:
            scores = state.process(target.logits, draft.tokens, counts=draft.counts)
        except JudgeInOrder:
            if state.processors.plain:
                raise
            return self._accept_in_order(state, draft, target)
        counts = draft.counts_on_device
        if state.do_sample:
            distribution = torch.softmax(scores, dim=-1)
            verdict = acceptance.speculative_sample(draft.tokens, counts, distribution, draft.distributions)
        else:
            verdict = acceptance.greedy_match(draft.tokens, counts, scores.argmax(dim=-1))
        verdict = verdict.on_host()
        accepted = verdict.accepted.tolist()
        return StepResult(
            verdict.tokens, [count + 1 for count in accepted], draft.counts, accepted, target.logits, scores
        )

    def _accept_in_order(self, state: DecodingState, draft: Draft, target: Forward) -> StepResult:
        """Judge the drafts as `accept` does, one column after the other, up to the first one that ends some row."""
        scores, accepted = [], [0] * len(draft.counts)
        counts, made = draft.counts_on_device, draft.tokens[:, :0]
        for column in range(draft.tokens.shape[1] + 1):
            scores.append(state.process_next(target.logits[:, column].to(state.device), made, drafting=False))
            token, stays = acceptance.judge_column(
                column, draft.tokens, counts, scores[-1], draft.distributions, state.do_sample
            )
            made = torch.cat([made, token[:, None]], dim=1)
            accepted = [count + stay for count, stay in zip(accepted, stays.tolist(), strict=True)]
            if not all(stays.tolist()) or bool(state.is_eos(token).any()):
                break
        width = made.shape[1]
        found = torch.stack(scores, dim=1)
        return StepResult(made.cpu(), [width] * len(accepted), draft.counts, accepted, target.logits[:, :width], found)

    def step(self, state: DecodingState) -> StepResult:
        """Advance the active rows by one round."""
        with state.timed("draft"):
            draft = self.propose(state)
        with state.timed("verify"):
            target = self.verify(state, draft)
        if not state.processors.plain:
            try:
                return self.accept(state, draft, target)
            except JudgeInOrder:
                pass  # nothing is drafted from here on
        hidden = None if target.hidden is None else target.hidden[:, :1]
        return self.accept(state, Draft.empty(state), Forward(target.logits[:, :1], hidden))

    def commit(self, state: DecodingState, kept: list[int]) -> None:
        """Make the caches hold what was emitted: every token but the newest, which is fed next.

        Args:
            kept (`list[int]`): tokens of the step's result that each active row kept.
        """
        state.target.cache.set_lengths([count - 1 for count in state.committed])
        self.drafter.commit(state)

    def clean_length(self, state: DecodingState, layer_idx: int, row: int) -> int:
        """Return how many tokens of a row layer `layer_idx` holds exactly as a fresh forward would."""
        return state.text.lengths([row])[0] - 1

    def follow(self, state: DecodingState) -> None:
        """Serve the controlling process until it has decoded all rows; only where `controls` is `False`."""
        raise NotImplementedError(f"{self.config.strategy!r} does not run on several ranks.")

    def close(self, state: DecodingState) -> None:
        """Release what `setup` took; also called after an exception."""
        self.drafter.close(state)
