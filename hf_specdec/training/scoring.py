"""How far a slim verifier is from its model: costs of a mask on text that the model wrote (VIA-SD)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..cache.speculative import SpeculativeCache
from ..generation import admission
from ..generation.methods.via_sd.slim_model import LowRankTerms, Units, slim_model
from ..generation.models.layerwise import Layerwise
from ..generation.runner import ModelRunner
from ..kernels.dispatch import register
from .data import Text


OBJECTIVES = ("tv", "kl", "margin", "top1")
BLOCK = 8
"""Tokens of a block in the cache mode `"shared"`, about what a round of decoding feeds."""

Mask = tuple[bool, ...]


def margin_cost(q: torch.Tensor, p: torch.Tensor, alpha: float = 0.5, beta: float = 0.5) -> torch.Tensor:
    """Return the paper's cost R (Eq. 11) `[...]` of a distribution `p` that stands in for `q`, both `[..., V]`.

    It is 0 for mild mismatch: it counts tokens to which `p` gives more than a lossy verifier of leniency `alpha` and
    `beta` forgives, p above q / (1 - alpha), and those to which its residual leaves nothing, p above q / beta.
    """
    # tokens that one of the distributions excludes have no logarithm; a floor far below any real probability stands in
    ratio = p.clamp(min=1e-30).log() - q.clamp(min=1e-30).log()
    one, two = (ratio + math.log(1 - alpha)).clamp(min=0), (ratio + math.log(beta)).clamp(min=0)
    return (p * one + q * two).sum(dim=-1)


def costs(theirs: torch.Tensor, mine: torch.Tensor, alpha: float = 0.5, beta: float = 0.5) -> dict[str, float]:
    """Return all objectives of a slim model's logits `mine` `[m, V]` against the model's own, means over m."""
    q, p = (logits.float().softmax(-1) for logits in (theirs, mine))
    difference = mine.float().log_softmax(-1)
    return {
        "tv": float((q - p).abs().sum(-1).mean() / 2),
        "kl": float((q * (q.clamp(min=1e-30).log() - difference)).sum(-1).mean()),
        "margin": float(margin_cost(q, p, alpha, beta).mean()),
        "top1": float((theirs.argmax(-1) != mine.argmax(-1)).float().mean()),
    }


class SlimScorer:
    """Scores masks against the whole model on some texts.

    Args:
        model (`PreTrainedModel`): the whole model; not changed.
        texts (`list[Text]`): prompts with answers.
        units (`Units`): of the model.
        window (`int`): answer tokens read per text.
        slim_cache (`str`): `"shared"` or `"own"`.
        leniency (`tuple[float, float]`, *optional*): alpha and beta of the paper's cost.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        texts: Sequence[Text],
        units: Units,
        window: int,
        slim_cache: str,
        leniency: tuple[float, float] = (0.5, 0.5),
    ) -> None:
        self.leniency = leniency
        self.model, self.units, self.shared = model, units, slim_cache == "shared"
        self.texts = [Text(t.ids[: t.prompt_length + window], t.prompt_length, t.temperature) for t in texts]
        self.tail = Layerwise(model).tail()
        self.teacher = [self._read(model, text) for text in self.texts]
        self.runners: list[ModelRunner] = []
        self.clean: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        if self.shared:
            register()
            for text in self.texts:
                self._remember(text)

    def __len__(self) -> int:
        return len(self.texts)

    @torch.no_grad()
    def _read(self, model: PreTrainedModel, text: Text) -> torch.Tensor:
        """Return a model's logits `[m, V]` at the positions that predict the answer."""
        ids = text.ids[None, :-1].to(self.model.device)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return self.tail(hidden[0, text.prompt_length - 1 :])

    @torch.no_grad()
    def _remember(self, text: Text) -> None:
        """Keep the whole model's keys and values of a text, and a copy of those of its answer."""
        length = len(text.ids)
        cache = SpeculativeCache(admission.layer_windows(self.model), 1, length + 1)
        runner = ModelRunner(self.model, cache, length + 1)
        runner.prefill(text.ids[None].to(self.model.device), 0, None)
        answer = slice(text.prompt_length - 1, length)
        self.clean.append([(x.keys[:, :, answer].clone(), x.values[:, :, answer].clone()) for x in cache.layers])
        self.runners.append(runner)

    @torch.no_grad()
    def logits(self, keep: Mask, index: int, terms: LowRankTerms | None = None) -> torch.Tensor:
        """Return a slim model's logits `[m, V]` along the answer of one text."""
        text = self.texts[index]
        if not self.shared:
            return self._read(slim_model(self.model, self.units, keep, terms), text)
        whole, attentions = self.runners[index], self.units.attentions(keep)
        lean = slim_model(self.model, self.units, keep, terms)
        slim = ModelRunner(lean, whole.cache, whole.last_position + 1, attentions)
        first, end = text.prompt_length - 1, len(text.ids) - 1
        parts = []
        # from the end, so that each block is read over the whole model's states of all that comes before it
        for start in reversed(range(first, end, BLOCK)):
            ids = text.ids[None, start : min(start + BLOCK, end)]
            parts.append(slim.forward(ids, [start]).logits[0])
        for layer, (keys, values) in zip(whole.cache.layers, self.clean[index], strict=True):
            layer.keys[:, :, first : end + 1], layer.values[:, :, first : end + 1] = keys, values
        return torch.cat(parts[::-1])

    def __call__(self, keep: Mask, index: int, terms: LowRankTerms | None = None) -> dict[str, float]:
        """Return the costs of a mask on one text."""
        return costs(self.teacher[index], self.logits(keep, index, terms), *self.leniency)

    def report(self, keep: Mask, terms: LowRankTerms | None = None) -> dict[str, float]:
        """Return the means of all costs over all texts, and the share of equal most likely tokens as `agreement`."""
        found = [self(keep, index, terms) for index in range(len(self))]
        means = {name: sum(costs[name] for costs in found) / len(found) for name in OBJECTIVES}
        return {"agreement": 1 - means.pop("top1"), **means, "tokens": sum(len(t) for t in self.teacher)}
