"""Drafting with an assistant model of the same vocabulary, which has its own ragged cache."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..cache.speculative import SpeculativeCache
from ..kernels.dispatch import speculative_attention
from . import admission
from .runner import ModelRunner
from .state import DecodingState
from .strategy import Draft, Drafter


class AssistantDrafter(Drafter):
    """Drafts with `model`, which must share the target's vocabulary (unequal padding of the embedding is allowed).

    Args:
        model (`PreTrainedModel`): the assistant.
        num_assistant_tokens (`int`): draft tokens per round at most.
        hidden (`bool`, *optional*, defaults to `False`): keep the assistant's LM head input at each draft token.
    """

    gives_hidden = True

    def __init__(self, model: PreTrainedModel, num_assistant_tokens: int, hidden: bool = False) -> None:
        self.model, self.limit, self.hidden = model, num_assistant_tokens, hidden
        # per slot: tokens whose keys and values the assistant's cache holds, during a round draft tokens included
        self.known: list[int] = []
        self.runner: ModelRunner

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
        self.width = state.model.get_output_embeddings().weight.shape[0]
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
        committed = state.committed
        # one width for all rows, ending at the pending token: a row that lacks less reads some tokens again
        width = max(count - known for count, known in zip(committed, self.known, strict=False))
        tokens = state.tail(width)
        starts = [count - width for count in committed]
        drafts = state.pending[:, :0]
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

    def commit(self, state: DecodingState) -> None:
        """Keep what both the cache and the text have: not the newest token, nor a last draft token, never fed."""
        # rows that have finished are the last of the list, and fall out
        self.known = [min(length, count - 1) for length, count in zip(self.known, state.committed, strict=False)]
        self.runner.cache.set_lengths(self.known)

    def swap(self, i: int, j: int) -> None:
        """Exchange the slots i and j."""
        self.known[i], self.known[j] = self.known[j], self.known[i]


def pad_vocabulary(logits: torch.Tensor, width: int) -> torch.Tensor:
    """Return `logits` `[..., V_d]` at the target's width: padding rows dropped, missing ones -inf."""
    missing = width - logits.shape[-1]
    if missing > 0:
        return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
    return logits[..., :width]
