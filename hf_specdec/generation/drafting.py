"""Drafting with an assistant model of the same vocabulary, which has its own ragged cache."""

from __future__ import annotations

from typing import cast

import torch
from transformers import PreTrainedModel

from ..cache.speculative import SpeculativeCache
from ..configuration import SpeculationConfig
from ..kernels.address import upload
from ..kernels.request import ForwardRequest
from ..registry import preset, strategy_class
from . import admission, programs
from .models.draft_model import load_draft
from .models.vocabulary import pad_vocabulary, vocabulary_width
from .runner import ModelRunner
from .state import DecodingState
from .strategy import Draft, Drafter


class Reader:
    """A second model that reads the text behind the target, with a ragged cache of its own.

    Args:
        runner (`ModelRunner`): the model with its cache.
        known (`list[int]`): per slot, tokens whose keys and values the cache holds, during a round drafts included.
    """

    def __init__(self, runner: ModelRunner, known: list[int]) -> None:
        self.runner, self.known = runner, known
        runner.cache.set_lengths(known)

    @classmethod
    def read_prompts(cls, state: DecodingState, runner: ModelRunner) -> Reader:
        """Return a reader that has read all prompt tokens but the last one, with the model's own attention.

        Args:
            runner (`ModelRunner`): the model with an empty cache.

        Raises:
            ValueError: if an earlier turn's cache was given with the new tokens only. It holds the target's states, so
                the reader has to read the whole text.
        """
        check_whole_text(state)
        ends = [state.prompt.lengths[row] - 1 for row in state.active]
        if max(ends):
            tokens = state.text.tokens[state.active][:, : max(ends)].to(runner.device)
            runner.prefill(tokens, 0, state.generation_config.prefill_chunk_size)
        return cls(runner, ends)

    def unread(self, state: DecodingState, drafts: torch.Tensor, counts: list[int]) -> tuple[torch.Tensor, list[int]]:
        """Return what the cache lacks of the text and each row's first `counts[i]` drafts, and where it starts.

        All rows get one width, ending at their last token: a row that lacks less reads some tokens again.
        """
        ends = [length + count for length, count in zip(state.committed, counts, strict=True)]
        if max(end - known for end, known in zip(ends, self.known, strict=True)) > min(state.committed):
            # the neediest row lacks more tokens than the shortest row has: first bring all up to the newest token
            known = [count - 1 for count in state.committed]
            self.runner.extend(state.text.tokens[state.active], self.known, known, 1 + max(known))
            self.known = known
        width = max(end - min(known, end - 1) for end, known in zip(ends, self.known, strict=True))
        text = torch.cat([state.tail(width), drafts], dim=1)
        places = upload(counts, text.device)[:, None] + torch.arange(width, device=text.device)
        return text.gather(1, places), [end - width for end in ends]

    def commit(self, state: DecodingState) -> None:
        """Keep what both the cache and the text have: not the newest token, nor a last draft token, never fed."""
        self.known = [min(length, count - 1) for length, count in zip(self.known, state.committed, strict=True)]
        self.runner.cache.set_lengths(self.known)

    def swap(self, i: int, j: int) -> None:
        """Exchange the slots i and j."""
        self.known[i], self.known[j] = self.known[j], self.known[i]
        self.runner.cache.swap(i, j)

    def shrink(self, rows: int) -> None:
        """Forget the slots from `rows` on."""
        del self.known[rows:]
        self.runner.cache.shrink(rows)


def check_whole_text(state: DecodingState) -> None:
    """Raise `ValueError` for an earlier turn's cache with new tokens only, where a second model has to read all."""
    if state.prompt.past is not None and state.prompt.mask.shape[1] != state.prompt.ids.shape[1]:
        raise ValueError(
            "With a second model that reads the text and `past_key_values`, give the whole text as `input_ids`, not "
            "only what is new."
        )


class AssistantDrafter(Drafter):
    """Drafts with `model`, which must share the target's vocabulary (unequal padding of the embedding is allowed).

    Args:
        model (`PreTrainedModel` or `str`): the assistant, or where one is saved that was cut from the target.
        num_assistant_tokens (`int`): draft tokens per round at most.
        stop (`float`, *optional*, defaults to 0.0): a row stops drafting after a token of less probability.
        settings (`SpeculationConfig`, *optional*): the strategy's, for how the assistant is run.
    """

    gives_hidden = True
    looks_ahead = True
    compiles = True
    limit: int

    def __init__(
        self,
        model: PreTrainedModel | str,
        num_assistant_tokens: int,
        stop: float = 0.0,
        settings: SpeculationConfig | None = None,
    ) -> None:
        self.source, self.limit, self.stop = model, num_assistant_tokens, stop
        self.settings = SpeculationConfig() if settings is None else settings
        self.model: PreTrainedModel
        self.reader: Reader

    def prepare(self, model: PreTrainedModel) -> None:
        """Load the assistant where it has to be, and check that it can draft for `model`."""
        self.model = load_draft(model, self.source) if isinstance(self.source, str) else self.source
        admission.check_assistant(model, self.model)
        programs.check(self.settings.compile, self.settings.kernels, self.model, "assistant_model")

    def setup(self, state: DecodingState) -> None:
        """Note the target's vocabulary, and refuse a text that the assistant can't read."""
        check_whole_text(state)
        self.width = vocabulary_width(state.model)

    def prefill(self, state: DecodingState) -> None:
        """Read all prompt tokens but the last one with the assistant's own attention."""
        windows = admission.layer_windows(self.model, "assistant_model")
        limit = state.longest + self.limit + 1
        cache = SpeculativeCache(windows, len(state.active), limit, state.target.cache.kernels)
        # a round begins with the newest token, and after drafts that were all accepted with the last one before it
        runner = programs.make_runner(self.settings.compile, self.model, cache, state.longest, widths=[1, 2])
        self.reader = Reader.read_prompts(state, runner)
        state.followers.append(self.reader)
        state.contexts.callback(runner.close)
        runner.warm_up(state.pending, self.reader.known, ForwardRequest(hidden=self.hidden))

    def propose(self, state: DecodingState) -> Draft:
        """Draft up to the limit, all rows in lock-step; the first forward also reads what the cache lacks."""
        counts = state.draft_room(self.limit)
        if not max(counts):
            return Draft.empty(state)
        drafts, reader = state.pending[:, :0], self.reader
        tokens, starts = reader.unread(state, drafts, [0] * len(counts))
        distributions, states = [], []
        while drafts.shape[1] < max(counts):
            state.stats.draft_forwards += 1
            output = reader.runner.forward(tokens, starts, ForwardRequest(hidden=self.hidden))
            logits = pad_vocabulary(output.logits[:, -1].to(state.device), self.width)
            choice, distribution, scores, counts = state.draft_next(logits, drafts, counts)
            starts = [start + tokens.shape[1] for start in starts]
            if drafts.shape[1] >= max(counts):
                break
            drafts = torch.cat([drafts, choice[:, None]], dim=1)
            tokens = choice[:, None]
            if distribution is not None:
                distributions.append(distribution)
            if output.hidden is not None:
                states.append(output.hidden[:, -1])
            if self.stop:
                unsure = (state.distribution(scores).gather(1, tokens)[:, 0] < self.stop).tolist()
                made = drafts.shape[1]
                counts = [min(count, made) if stop else count for count, stop in zip(counts, unsure, strict=True)]
        reader.known = starts
        return Draft(
            drafts,
            counts,
            torch.stack(distributions, dim=1) if distributions else None,
            torch.stack(states, dim=1) if states else None,
        )

    def look_ahead(self, state: DecodingState, draft: Draft) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Read each row's last draft too, and return the distribution of what would follow."""
        reader = self.reader
        state.stats.draft_forwards += 1
        tokens, starts = reader.unread(state, draft.tokens, draft.counts)
        output = reader.runner.forward(tokens, starts, ForwardRequest(hidden=self.hidden))
        logits = pad_vocabulary(output.logits[:, -1].to(state.device), self.width)
        ends = [start + tokens.shape[1] for start in starts]
        reader.known = [max(known, end) for known, end in zip(reader.known, ends, strict=True)]
        distributions = torch.empty(logits.shape, device=logits.device)
        for count in set(draft.counts):
            rows = [row for row, drafted in enumerate(draft.counts) if drafted == count]
            scores = state.process_next(logits, draft.tokens[:, :count], draft.counts)
            distributions[rows] = state.distribution(scores[rows])
        return distributions, None if output.hidden is None else output.hidden[:, -1]

    def commit(self, state: DecodingState) -> None:
        """Keep what both the cache and the text have."""
        self.reader.commit(state)


def drafter_name(chosen: SpeculationConfig | str | None) -> str:
    """Return what messages call the drafter that a config's field `drafter` names."""
    return "assisted" if chosen is None else chosen if isinstance(chosen, str) else chosen.strategy


def chosen_drafter(
    chosen: SpeculationConfig | str | None,
    assistant: PreTrainedModel | None,
    settings: SpeculationConfig,
    stop: float = 0.0,
) -> Drafter:
    """Return the drafter that a config's field `drafter` names, the assistant's by default.

    Args:
        chosen (`SpeculationConfig` or `str`, *optional*): the field; a string is a strategy's or preset's name.
        assistant (`PreTrainedModel`, *optional*): what was passed as `assistant_model`.
        settings (`SpeculationConfig`): the config that has the field; its shared fields apply to the drafter too.
        stop (`float`, *optional*, defaults to 0.0): as for `AssistantDrafter`.

    Raises:
        ValueError: for an unknown name, and for a strategy that doesn't draft apart from verifying, can't stop early
            where it should, or has shared fields of its own.
    """
    if chosen is None:
        return AssistantDrafter(cast(PreTrainedModel, assistant), settings.num_assistant_tokens, stop, settings)
    if isinstance(chosen, str):
        try:
            chosen = cast(SpeculationConfig, preset(chosen))
        except ValueError as error:
            raise ValueError(f"`drafter={chosen!r}`: {error}") from error
    for name, neutral in (("compile", None), ("kernels", "auto")):
        value = getattr(chosen, name)
        if value == neutral or (settings.has_field(name) and value == getattr(settings, name)):
            continue
        advice = f"set `{name}` beside `drafter`, it counts for both"
        if not settings.has_field(name):
            advice = f"{settings.strategy!r} has no `{name}`, so its drafter can't have one"
        raise ValueError(f"`drafter.{name}={value!r}`: {advice}.")
    names = ("num_assistant_tokens", "compile", "kernels")
    shared = {n: getattr(settings, n) for n in names if settings.has_field(n) and chosen.has_field(n)}
    chosen = chosen.override(**shared)
    drafter = strategy_class(chosen.strategy)(chosen, assistant).drafter
    if type(drafter) is Drafter:
        raise ValueError(f"`drafter` must be a strategy that drafts, got {chosen.strategy!r}.")
    if stop:
        if not isinstance(drafter, AssistantDrafter):
            raise ValueError(f"`draft_stop={stop}` stops an assistant; {chosen.strategy!r} drafts without one.")
        drafter.stop = stop
    return drafter
