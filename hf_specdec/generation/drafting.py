"""Drafting with an assistant model of the same vocabulary, which has its own ragged cache."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..cache.speculative import SpeculativeCache
from ..kernels.dispatch import speculative_attention
from . import admission
from .draft_model import load_draft
from .runner import ModelRunner
from .state import DecodingState
from .strategy import Draft, Drafter
from .vocabulary import pad_vocabulary, vocabulary_width


class AssistantDrafter(Drafter):
    """Drafts with `model`, which must share the target's vocabulary (unequal padding of the embedding is allowed).

    Args:
        model (`PreTrainedModel` or `str`): the assistant, or where one is saved that was cut from the target.
        num_assistant_tokens (`int`): draft tokens per round at most.
    """

    gives_hidden = True
    looks_ahead = True

    def __init__(self, model: PreTrainedModel | str, num_assistant_tokens: int) -> None:
        self.source, self.limit = model, num_assistant_tokens
        # per slot: tokens whose keys and values the assistant's cache holds, during a round draft tokens included
        self.known: list[int] = []
        self.model: PreTrainedModel
        self.runner: ModelRunner

    def prepare(self, model: PreTrainedModel) -> None:
        """Load the assistant where it has to be, and check that it can draft for `model`."""
        self.model = load_draft(model, self.source) if isinstance(self.source, str) else self.source
        admission.check_assistant(model, self.model)

    def setup(self, state: DecodingState) -> None:
        """Make the assistant's cache for the active rows.

        Raises:
            ValueError: if an earlier turn's cache was given with the new tokens only. It holds the target's states, so
                the assistant has to read the whole text.
        """
        if state.prompt.past is not None and state.prompt.mask.shape[1] != state.prompt.ids.shape[1]:
            raise ValueError(
                "With `assistant_model` and `past_key_values`, give the whole text as `input_ids`, not only what "
                "is new."
            )
        capacity = state.max_length + self.limit + 1
        cache = SpeculativeCache(admission.layer_windows(self.model, "assistant_model"), len(state.active), capacity)
        self.runner = ModelRunner(self.model, cache, state.max_length)
        self.width = vocabulary_width(state.model)
        state.followers += [cache, self]

    def prefill(self, state: DecodingState) -> None:
        """Read all prompt tokens but the last one with the assistant's own attention."""
        ends = [length - 1 for length in (state.prompt.lengths[row] for row in state.active)]
        if max(ends):
            tokens = state.text[state.active][:, : max(ends)].to(self.runner.device)
            self.runner.prefill(tokens, 0, state.generation_config.prefill_chunk_size)
        self.known = ends
        self.runner.cache.set_lengths(ends)
        state.contexts.enter_context(speculative_attention(self.model))

    def propose(self, state: DecodingState) -> Draft:
        """Draft up to the limit, all rows in lock-step; the first forward also reads what the cache lacks."""
        counts = state.draft_room(self.limit)
        length = max(counts)
        if not length:
            return Draft.empty(state)
        drafts = state.pending[:, :0]
        tokens, starts = self._unread(state, drafts, [0] * len(counts))
        laws, states = [], []
        for _ in range(length):
            state.stats.draft_forwards += 1
            output = self.runner.forward(tokens, starts, hidden=self.hidden)
            logits = pad_vocabulary(output.logits[:, -1].to(state.device), self.width)
            choice, law = state.choose(state.process_next(logits, drafts))
            drafts = torch.cat([drafts, choice[:, None]], dim=1)
            starts = [start + tokens.shape[1] for start in starts]
            tokens = choice[:, None]
            if law is not None:
                laws.append(law)
            if output.hidden is not None:
                states.append(output.hidden[:, -1])
        self.known = starts
        return Draft(
            drafts, counts, torch.stack(laws, dim=1) if laws else None, torch.stack(states, dim=1) if states else None
        )

    def _unread(self, state: DecodingState, drafts: torch.Tensor, counts: list[int]) -> tuple[torch.Tensor, list[int]]:
        """Return what the cache lacks of the text and each row's first `counts[i]` drafts, and where it starts.

        All rows get one width, ending at their last token: a row that lacks less reads some tokens again.
        """
        ends = [length + count for length, count in zip(state.committed, counts, strict=True)]
        width = max(end - min(known, end - 1) for end, known in zip(ends, self.known, strict=False))
        text = torch.cat([state.tail(width), drafts], dim=1)
        places = torch.tensor(counts, device=text.device)[:, None] + torch.arange(width, device=text.device)
        return text.gather(1, places), [end - width for end in ends]

    def look_ahead(self, state: DecodingState, draft: Draft) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Read each row's last draft too, and return the law of what would follow."""
        state.stats.draft_forwards += 1
        tokens, starts = self._unread(state, draft.tokens, draft.counts)
        output = self.runner.forward(tokens, starts, hidden=self.hidden)
        logits = pad_vocabulary(output.logits[:, -1].to(state.device), self.width)
        ends = [start + tokens.shape[1] for start in starts]
        self.known = [max(known, end) for known, end in zip(self.known, ends, strict=False)]
        laws = torch.empty(logits.shape, device=logits.device)
        for count in set(draft.counts):
            rows = [row for row, drafted in enumerate(draft.counts) if drafted == count]
            laws[rows] = state.law(state.process_next(logits, draft.tokens[:, :count])[rows])
        return laws, None if output.hidden is None else output.hidden[:, -1]

    def commit(self, state: DecodingState) -> None:
        """Keep what both the cache and the text have: not the newest token, nor a last draft token, never fed."""
        # rows that have finished are the last of the list, and fall out
        self.known = [min(length, count - 1) for length, count in zip(self.known, state.committed, strict=False)]
        self.runner.cache.set_lengths(self.known)

    def swap(self, i: int, j: int) -> None:
        """Exchange the slots i and j."""
        self.known[i], self.known[j] = self.known[j], self.known[i]
