"""Assisted: ordinary speculative decoding with a second, smaller model, for any batch.

Idea      a small model of the same vocabulary writes ahead; one forward of the target judges all of it.
Drafts    token by token with `assistant_model`, which has its own cache.
Verifies  losslessly: by equality (greedy) or by speculative sampling with the true draft distribution.
Trained   the assistant, by whoever made it, or a draft cut from the target (`hf-specdec train draft`).
Paper     https://arxiv.org/abs/2211.17192
New here  batches of ragged rows, `num_return_sequences`, criteria that cut at the exact token, and statistics; stock
          assisted decoding takes one row, and its processors run about ten times as often.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from transformers import PreTrainedModel

from ...configuration import SpeculationConfig
from ..drafting import AssistantDrafter
from ..strategy import Drafter, SpeculationStrategy


@dataclass(frozen=True)
class AssistedConfig(SpeculationConfig):
    """Settings of assisted decoding.

    Args:
        num_assistant_tokens (`int`, *optional*, defaults to 5): draft tokens per round and row.
        adapter (`str`, *optional*): folder or Hub repository of a draft model that was cut from the target, instead of
            `assistant_model`; see `hf_specdec.load_draft`.
    """

    strategy = "assisted"

    adapter: str | None = None

    @property
    def brings_drafter(self) -> bool:
        """Whether a draft model is named."""
        return self.adapter is not None


class AssistedStrategy(SpeculationStrategy):
    """Draft with a second model."""

    config_class = AssistedConfig
    page = "drafts.md"
    paper = "https://arxiv.org/abs/2211.17192"
    needs_assistant = True
    compiles = True
    config: AssistedConfig

    def make_drafter(self) -> Drafter:
        """Return the assistant's drafter."""
        if self.config.adapter is not None and self.assistant_model is not None:
            raise ValueError("`assistant_model` and `adapter` both name a draft model; give one of them.")
        source = self.config.adapter or self.assistant_model
        limit = self.config.num_assistant_tokens
        return AssistantDrafter(cast("PreTrainedModel | str", source), limit, settings=self.config)
