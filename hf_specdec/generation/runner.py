"""`ModelRunner`: one model, target or assistant, with its cache, fed tokens at absolute positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any, ClassVar, NamedTuple

import torch
from transformers import PreTrainedModel

from .. import _compat
from ..cache.speculative import SpeculativeCache
from ..kernels.address import Address
from ..kernels.request import TOKENS_ONLY, ForwardRequest
from ..kernels.step import Step
from ..kernels.twin import twin_of, without_checkpointing


class Forward(NamedTuple):
    """What a forward returned.

    Attributes:
        logits (`torch.Tensor` of shape `[n, m, V]`): raw logits, in the model's dtype.
        hidden (`torch.Tensor` of shape `[n, m, H]`, *optional*): the LM head's input.
    """

    logits: torch.Tensor
    hidden: torch.Tensor | None


class ModelRunner:
    """Runs `model` over `cache`.

    Args:
        model (`PreTrainedModel`): a causal language model; it stays as it is.
        cache (`SpeculativeCache`): its keys and values.
        max_length (`int`): tokens that a row can have at most; fed positions are clamped below it, because the unused
            tail of a block may pass the end of a learned position table.
        layers (`int`, *optional*): layers whose attention runs; all of the cache's by default.

    Attributes:
        model (`PreTrainedModel`): what reads prompts, with its own attention.
        twin (`PreTrainedModel`): its copy that attends by the package's kernels, for all other forwards.
    """

    fixed: ClassVar[bool] = False
    """Whether forwards have fixed shapes, so that what they read must have them too."""

    def __init__(
        self, model: PreTrainedModel, cache: SpeculativeCache, max_length: int, layers: int | None = None
    ) -> None:
        self.model, self.cache = without_checkpointing(model), cache
        self.twin = twin_of(self.model)
        self.layers = len(cache.layers) if layers is None else layers
        self.device = _compat.input_device(model)
        self.last_position = max_length - 1
        cache.coarse |= self.fixed or self.device.type != "cpu"
        self._prefill_options = (
            {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
        )
        self._checked = False

    def forward(self, tokens: torch.Tensor, starts: Sequence[int], request: ForwardRequest = TOKENS_ONLY) -> Forward:
        """Feed `tokens` `[n, m]` at the positions `starts[i] .. starts[i] + m - 1` of each active row.

        Args:
            tokens (`torch.Tensor` of shape `[n, m]`, int64): ids.
            starts (`list[int]`): position of each row's first fed token; earlier positions are read from the cache.
            request (`ForwardRequest`, *optional*): what else the forward does.

        Raises:
            RuntimeError: if the model did not run every layer's attention through the package (first forward only).
        """
        step = self.cache.begin(Address(starts, tokens.shape[1], request.last), request)
        if step.score is not None:
            step.score.begin(step.address.starts, step.address.last)
        return self.call(tokens, step, request.hidden)

    def call(self, tokens: torch.Tensor, step: Step, hidden: bool) -> Forward:
        """Run the model over `tokens` `[n, m]` for a `step` that has begun, and tell who watches it."""
        result = self.run_model(tokens, step, hidden)
        if not self._checked:
            if step.layers_seen != self.layers or step.layers_attended != self.layers:
                raise RuntimeError(
                    f"{type(self.model).__name__} runs {self.layers} layers; {step.layers_seen} wrote the cache "
                    f"and {step.layers_attended} attended through hf_specdec, so `assistant_strategy` can't run it."
                )
            self._checked = True
        if step.score is not None:
            step.score.finish(step.address)
        return result

    def run_model(self, tokens: torch.Tensor, step: Step, hidden: bool) -> Forward:
        """Run the model over `tokens` `[n, m]`, which lie where `step` says."""
        with head_input(self.twin, hidden) as seen:
            output = self.twin(**self.inputs(tokens, step), return_dict=True)
        return Forward(output.logits, seen[0] if hidden else None)

    def warm_up(self, tokens: torch.Tensor, starts: Sequence[int], request: ForwardRequest = TOKENS_ONLY) -> None:
        """Make ready what a round's forwards need, by feeding again what was just fed; nothing by default."""

    def close(self) -> None:
        """Give up what forwards were made ready for; later ones run as they are."""
        self.cache.step = None  # which may hold a view, and that the cache

    def inputs(self, tokens: torch.Tensor, step: Step) -> dict[str, Any]:
        """Return the keywords of the model's forward over `tokens` `[n, m]`, which lie where `step` says."""
        return {
            "input_ids": tokens.to(self.device),
            "position_ids": step.address.positions_on(self.device).clamp(max=self.last_position),
            "past_key_values": self.cache,
            "use_cache": True,
            "specdec_step": step,
        }

    def prefill(self, tokens: torch.Tensor, cached: int, chunk: int | None) -> None:
        """Fill the storage of every row with the model's own attention.

        Args:
            tokens (`torch.Tensor` of shape `[n, m]`, int64): left-aligned ids; what follows a row's end is overwritten
                later.
            cached (`int`): tokens per row that the cache holds already; the others are fed.
            chunk (`int`, *optional*): columns per forward; `None` for all at once.
        """
        self.cache.exact_slices = True
        width = tokens.shape[1]
        self.cache.reserve(width)
        try:
            for start in range(cached, width, chunk or width):
                part = tokens[:, start : min(width, start + (chunk or width))]
                step = self.cache.begin(Address([start] * part.shape[0], part.shape[1]))
                self.model(
                    input_ids=part.to(self.device),
                    position_ids=step.address.positions_on(self.device)[:1].clamp(max=self.last_position),
                    past_key_values=self.cache,
                    use_cache=True,
                    return_dict=True,
                    **self._prefill_options,
                )
        finally:
            self.cache.exact_slices = False

    def extend(self, text: torch.Tensor, firsts: Sequence[int], ends: Sequence[int], chunk: int) -> None:
        """Feed each row's tokens at positions `[firsts[i], ends[i])` with our attention, in blocks of `chunk` columns.

        Args:
            text (`torch.Tensor` of shape `[n, >= max(ends)]`, int64): ids by position.
        """
        width = max(end - first for first, end in zip(firsts, ends, strict=True))
        for shift in range(0, width, chunk):
            m = min(chunk, width - shift)
            # a row that is done feeds its last tokens again, at their own positions
            starts = [max(0, min(first + shift, end - m)) for first, end in zip(firsts, ends, strict=True)]
            index = torch.tensor(starts, device=text.device)[:, None] + torch.arange(m, device=text.device)
            self.forward(text.gather(1, index), starts)


@contextmanager
def head_input(model: PreTrainedModel, wanted: bool) -> Iterator[list[torch.Tensor]]:
    """Collect what enters the LM head inside the context; exact for every family, and nothing else is kept."""
    seen: list[torch.Tensor] = []
    if not wanted:
        yield seen
        return
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()
