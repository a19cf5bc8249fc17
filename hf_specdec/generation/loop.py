"""`DecodingLoop`: the only decoding loop. It prefills, steps, emits, stops, rolls back, and returns what stock would.

It is a valid `custom_generate` callable, so `model.generate(custom_generate=loop)` works without the package's
wrapper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.utils import logging

from .. import _compat
from ..configuration import SpeculationConfig
from ..registry import config_class, strategy_class
from . import admission, programs
from .models.vocabulary import vocabulary_width
from .output import Emitter, custom_criteria
from .processors import ProcessorChain
from .prompt import Prompt
from .runner import ModelRunner
from .state import DecodingState
from .stats import SpeculationOutput, SpeculationStats, report, timings_wanted
from .strategy import Draft, SpeculationStrategy


logger = logging.get_logger(__name__)


class DecodingLoop:
    """Decodes with one strategy.

    Args:
        config (`SpeculationConfig`): the strategy's settings.
        assistant_model (`PreTrainedModel`, *optional*): for strategies that draft with a second model.
        streamer (`BaseStreamer`, *optional*): gets tokens once they are final. (On the `custom_generate` path stock
            drops a streamer given to `generate()`, after pushing the prompt to it; give the same one here.)

    Raises:
        ValueError: for an assistant that the strategy needs and did not get, or got and does not use.
    """

    def __init__(
        self,
        config: SpeculationConfig,
        *,
        assistant_model: PreTrainedModel | None = None,
        streamer: Any = None,
    ) -> None:
        self.config, self.assistant_model, self.streamer = config, assistant_model, streamer
        self.make_strategy()  # wrong arguments fail here, before any model is prepared

    def make_strategy(self) -> SpeculationStrategy:
        """Return a fresh strategy: instances are per call."""
        return strategy_class(self.config.strategy)(self.config, assistant_model=self.assistant_model)

    @torch.no_grad()
    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generation_config: GenerationConfig | None = None,
        synced_gpus: bool = False,
        streamer: Any = None,
        windows: Sequence[int | None] | None = None,
        **model_kwargs: Any,
    ) -> SpeculationOutput | torch.Tensor:
        """Generate, called by `generate()` with everything prepared.

        Args:
            model (`PreTrainedModel`): the target.
            input_ids (`torch.Tensor` of shape `[b, T]`, int64): prompts, left-padded.
            windows (`list`, *optional*): what `admission.admit` returned for the call, where it has run already.

        Returns:
            The sequences `[b, T + new]`, or a `SpeculationOutput` with `return_dict_in_generate=True`.

        Raises:
            ValueError: for anything that `generation.admission` refuses, before any forward.
        """
        if generation_config is None:
            raise ValueError("`DecodingLoop` is called by `generate()`: pass it as `custom_generate=`.")
        strategy = self.make_strategy()
        if windows is None:
            admission.give_way(generation_config, model.generation_config)
            windows = admission.admit(model, generation_config, synced_gpus)
        chain, criteria = ProcessorChain(logits_processor or []), stopping_criteria or StoppingCriteriaList()
        if len(input_ids) > 1 and any(hasattr(rule, "eos_token_id") or custom_criteria([rule]) for rule in criteria):
            chain.check_rows(input_ids, vocabulary_width(model))
        state = self._prepare(strategy, model, input_ids, chain, generation_config, list(windows), model_kwargs)
        strategy = self._for_processors(strategy, state, criteria)
        emitter = self._emitter(strategy, state, criteria, streamer)
        past = model_kwargs.get("past_key_values")
        past = past if admission.given_by_caller(past) else None
        returned = generation_config.return_dict_in_generate or past is not None
        keep_cache = bool(returned) and strategy.whole_model
        finished = self._run(strategy, state, emitter)
        end = max(state.text.columns)
        if keep_cache or emitter.collected:
            for target, order in finished:
                self._complete(strategy, state, emitter, target, order, end)
        if emitter.streamer is not None:
            emitter.streamer.end()
        if strategy.controls:
            report(state.stats)
        cache = self._export(model, state, finished, past, end) if keep_cache else None
        sequences = cast(torch.LongTensor, state.text.by_column(end))
        if not generation_config.return_dict_in_generate:
            return sequences
        return SpeculationOutput(
            sequences=sequences,
            past_key_values=cache,
            speculation=state.stats if state.stats.num_drafts else None,
            **emitter.tables(end),
        )

    def _prepare(
        self,
        strategy: SpeculationStrategy,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        processors: ProcessorChain,
        generation_config: GenerationConfig,
        windows: list[int | None],
        model_kwargs: dict[str, Any],
    ) -> DecodingState:
        """Check the call and build its state; nothing has been computed or changed by then."""
        admission.check_arguments(model, model_kwargs)
        programs.check(self.config.compile, self.config.kernels, model)
        past = admission.check_cache(model_kwargs.get("past_key_values"), input_ids.shape[0])
        width = _compat.cached_mask_length(generation_config)
        prompt = Prompt.read(input_ids, model_kwargs.get("attention_mask"), past, width)
        admission.check_position_ids(model_kwargs.get("position_ids"), prompt.mask, prompt.mask.shape[1])
        room = generation_config.max_length - input_ids.shape[1]
        if room < 1:
            raise ValueError(
                f"`max_length` is {generation_config.max_length} for a prompt of {input_ids.shape[1]} tokens; there "
                "must be room for at least one new token."
            )
        admission.check_rope(
            model.config.get_text_config(decoder=True), min(prompt.lengths), max(prompt.lengths) + room
        )
        adapters = admission.row_adapters(model, input_ids.shape[0], self.config.compile)
        strategy.prepare(model)  # which may load files, and look at parts of the model
        rows: list[list[int]] = [[] for _ in range(input_ids.shape[0])]
        stats = SpeculationStats(strategy=self.config.strategy, accept_lengths=rows, timed=timings_wanted())
        state = DecodingState(model, prompt, generation_config, processors, windows, stats, adapters)
        if not strategy.whole_model:
            admission.check_partial(model_kwargs.get("past_key_values"), generation_config, state.batch)
        if not strategy.lossless:
            logger.warning_once(
                f"The strategy {self.config.strategy!r} is lossy under these settings: see its documentation."
            )
        return state

    def _for_processors(
        self, strategy: SpeculationStrategy, state: DecodingState, criteria: StoppingCriteriaList
    ) -> SpeculationStrategy:
        """Return `strategy`, or plain decoding where it can't serve processors that remember or mix rows."""
        chain = state.processors
        custom, several = bool(custom_criteria(criteria)), state.batch > 1
        if not chain.remembering and not (several and chain.whole_columns):
            return strategy
        if self.config.strategy == "plain":
            chain.in_order = bool(chain.remembering)  # nothing has to be undone
            return strategy
        chain.may_judge_in_order = strategy.judges_in_order and not custom
        chain.may_go_plain = strategy.can_stop_drafting
        if several and not strategy.batched:
            reason = "the strategy decodes the rows of a batch in turn, and a processor is called with all of them"
        elif several and custom:
            reason = "a stopping criterion may end a row behind which others have been processed already"
        elif chain.in_order and not chain.may_judge_in_order:
            reason = "that can't be copied, nor can drafts be judged one by one here"
        else:
            return strategy
        what = "keep state between calls" if chain.remembering else "mix the rows of a batch"
        if not strategy.whole_model:
            raise ValueError(f"{chain.names} may {what}, and {reason}.")
        logger.warning_once(
            f"{chain.names} may {what}, and {reason}. So the strategy {self.config.strategy!r} takes plain steps. A "
            "processor that does not can say so: `stateless = True`."
        )
        chain.in_order = chain.may_judge_in_order = bool(chain.remembering)
        settings = config_class("plain")
        shared = {name: getattr(self.config, name) for name in ("compile", "kernels") if self.config.has_field(name)}
        return strategy_class("plain")(settings(**shared))

    def _emitter(
        self, strategy: SpeculationStrategy, state: DecodingState, criteria: StoppingCriteriaList, streamer: Any
    ) -> Emitter:
        """Return what emits the call's tokens; raise `ValueError` for readers of columns where rows decode in turn."""
        streamer = streamer if self.streamer is None else self.streamer
        returns = bool(state.generation_config.return_dict_in_generate) and strategy.controls
        emitter = Emitter(state, criteria, streamer, returns)
        if strategy.batched or state.batch == 1:
            return emitter
        readers = [type(rule).__name__ for rule in emitter.custom] + ([] if streamer is None else ["streamer"])
        if readers:
            raise ValueError(
                f"The strategy {self.config.strategy!r} decodes the {state.batch} rows in turn, so it can't serve "
                f"{', '.join(readers)}, which see all rows column by column; pass one row per call."
            )
        logger.warning_once(f"The strategy {self.config.strategy!r} decodes the rows of a batch in turn.")
        return emitter

    def _run(
        self, strategy: SpeculationStrategy, state: DecodingState, emitter: Emitter
    ) -> list[tuple[ModelRunner, list[int]]]:
        """Decode all rows, together or in turn; return what `_decode` does of each group of rows."""
        groups = [list(range(state.batch))] if strategy.batched else [[row] for row in range(state.batch)]
        with strategy.session(state):
            if not strategy.controls:
                strategy.follow(state)
            return [self._decode(strategy, state, emitter, rows) for rows in groups if strategy.controls]

    def _decode(
        self, strategy: SpeculationStrategy, state: DecodingState, emitter: Emitter, rows: list[int]
    ) -> tuple[ModelRunner, list[int]]:
        """Decode `rows` together until all are finished; return the runner and the row in each storage slot."""
        cache = strategy.make_cache(state, len(rows))
        state.activate(rows, strategy.make_runner(state, cache), emitter.eos)
        retired: list[int] = []
        with state.contexts:
            state.contexts.callback(state.target.close)
            state.contexts.callback(strategy.close, state)
            state.contexts.callback(state.processors.restart)
            strategy.setup(state)
            with state.timed("prefill"):
                first = strategy.prefill(state)
            # the first token is what follows a round without drafts
            result, count = strategy.accept(state, Draft.empty(state), first), False
            while True:
                kept = emitter.emit(result, count=count)
                strategy.commit(state, kept)
                emitter.advance(rows)
                state.commit_processors()
                for slot in reversed(range(len(state.active))):
                    if emitter.done[state.active[slot]]:
                        retired.append(state.active[slot])
                        state.retire(slot)
                if not state.active:
                    # retired rows fill the storage from its end
                    return state.target, retired[::-1]
                result, count = strategy.step(state), True

    def _complete(
        self,
        strategy: SpeculationStrategy,
        state: DecodingState,
        emitter: Emitter,
        target: ModelRunner,
        order: list[int],
        end: int,
    ) -> None:
        """Feed finished rows what the model has not read, and the padding that stock would have fed them.

        That is for the returned cache, and for the scores that stock returns of the padding.
        """
        columns = [state.text.columns[row] for row in order]
        starts = [strategy.clean_length(state, 0, row) for row in order]
        missing = [end - column for column in columns]
        # all but the last column's token; a row that lacks less is fed more padding, which nothing reads
        lacking = [
            count - 1 - start + pads
            for count, start, pads in zip(state.text.lengths(order), starts, missing, strict=True)
        ]
        width = max(lacking)
        if not width:
            return
        tokens = torch.nn.functional.pad(state.text.tokens[order], (0, width), value=state.pad_token)
        positions = torch.tensor(starts, device=tokens.device)[:, None] + torch.arange(width, device=tokens.device)
        state.feed(order)
        output = target.forward(tokens.gather(1, positions), starts)
        for slot, (row, column, pads, fed) in enumerate(zip(order, columns, missing, lacking, strict=True)):
            if not pads:
                continue
            logits = scores = output.logits[slot : slot + 1, fed - pads : fed].to(state.device)
            if emitter.collects["scores"] and len(state.processors):
                padding = tokens.new_full((1, pads), state.pad_token)
                # those that remember have seen these columns
                scores = state.processors.without_memory(logits, state.text.by_column(end), [row], [column], padding)
            emitter.complete(row, {"scores": scores[0], "logits": logits[0]})

    @staticmethod
    def _export(
        model: PreTrainedModel,
        state: DecodingState,
        finished: list[tuple[ModelRunner, list[int]]],
        past: DynamicCache | None,
        end: int,
    ) -> DynamicCache:
        """Write the caches into the caller's cache, or a new one, in stock's padded layout."""
        slots = state.prompt.slots(end - state.prompt.ids.shape[1])[:, :-1]
        parts, rows = [], []
        for target, order in finished:
            part = DynamicCache(config=model.config)
            target.cache.store(part, slots[order], list(range(len(order))))
            parts.append(part)
            rows += order
        back = torch.tensor(rows).argsort()
        layers: list[Any] = parts[0].layers
        for index, layer in enumerate(layers):
            pieces: list[Any] = [part.layers[index] for part in parts]
            layer.keys, layer.values = (
                torch.cat([getattr(piece, name) for piece in pieces])[back.to(layer.device)]
                for name in ("keys", "values")
            )
        if past is None:
            return parts[0]
        past.layers[:] = parts[0].layers  # in place: the caller goes on using this object
        return past
