"""The two tiers before the model (VIA-SD): `SlimDrafter` turns a drafter's blocks into candidates."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import cast

import torch
from transformers import PreTrainedModel

from ....kernels.request import ForwardRequest
from ... import acceptance
from ...state import DecodingState
from ...strategy import Draft, Drafter
from . import laws
from .config import LONGEST_DRAFT, ViaSDConfig
from .laws import ACCEPT, ESCALATE, REGENERATE
from .slim_verifier import SlimPass, SlimVerifier


class SlimDrafter(Drafter):
    """Drafts in two tiers, for lossless verification: the slim verifier turns a drafter's blocks into candidates.

    Blocks follow one another until `stage_len` candidates are gathered. Each candidate comes with the exact
    distribution that it was drawn from, so whoever judges them is lossless.
    """

    def __init__(self, config: ViaSDConfig, inner: Drafter) -> None:
        self.config, self.inner, self.slim = config, inner, SlimVerifier(config)
        if config.num_assistant_tokens_schedule == "heuristic" and inner.limit is None:
            raise ValueError(
                "`num_assistant_tokens_schedule='heuristic'` needs a drafter whose drafts may change in number: an "
                "assistant or prompt lookup."
            )

    def prepare(self, model: PreTrainedModel) -> None:
        """Load drafter, mask and adapter."""
        self.inner.prepare(model)
        self.slim.prepare(model)

    def setup(self, state: DecodingState) -> None:
        """Prepare both tiers."""
        self.inner.setup(state)
        self.slim.setup(state, state.longest + self.config.num_assistant_tokens + 1)
        slim = self.slim
        state.stats.method.update(
            slim_forwards=0,
            drafter_tokens=0,
            drafter_kept=0,
            candidates=0,
            stages=0,
            slim_cache="shared" if slim.shared else "own",
            skipped_share=slim.units.share(slim.found.keep),
        )

    def prefill_request(self, state: DecodingState) -> ForwardRequest:
        """Return the inner drafter's."""
        return self.inner.prefill_request(state)

    def prefill(self, state: DecodingState) -> None:
        """Let both tiers read the prompts."""
        self.inner.prefill(state)
        self.slim.attach(state)

    def propose(self, state: DecodingState) -> Draft:
        """Gather candidates block by block, each row until it has enough or the model should judge."""
        rooms = state.draft_room(self.config.stage_len + self.config.num_assistant_tokens)
        stages = [_Stage(room, self.config) for room in rooms]
        rule = {"exact": self._exact, "gate": self._gate, "prefilter": self._prefilter}[self.config.lossless_rule]
        state.stats.method["stages"] += 1
        with ExitStack() as speculation:
            while any(stage.open for stage in stages):
                draft = self.inner.propose(state)
                counts = [count if stage.open else 0 for count, stage in zip(draft.counts, stages, strict=True)]
                draft = replace(draft, counts=counts)
                if self.config.lossless_rule != "exact" and not max(draft.counts):
                    break
                block = rule(draft, self.slim.read(state, draft.tokens))
                new = self._gather(state, draft, block, stages)
                # as if emitted, so that what drafts and reads next sees it, until the model judges
                speculation.enter_context(state.text.speculated(new))
                self.commit(state)
                self.reschedule(draft.counts, block.kept)
        counts = [len(stage.tokens) for stage in stages]
        state.stats.method["candidates"] += sum(counts)
        rows = [torch.tensor(stage.tokens, dtype=torch.int64, device=state.device) for stage in stages]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        distributions = [stage.distributions for stage in stages]
        return Draft(tokens, counts, _padded_distributions(distributions, counts, state))

    def _gather(self, state: DecodingState, draft: Draft, block: _Block, stages: list[_Stage]) -> dict[int, list[int]]:
        """Add a block's candidates to the stages that are open; return the new ones by row."""
        new, method = {}, state.stats.method
        confidence, ends = block.confidence.tolist(), state.is_eos(block.tokens).tolist()
        for slot, (row, stage) in enumerate(zip(state.active, stages, strict=True)):
            if not stage.open:
                continue
            tokens = new[row] = stage.take(block, slot, ends[slot], confidence[slot])
            method["drafter_tokens"] += draft.counts[slot]
            method["drafter_kept"] += min(block.kept[slot], len(tokens))
        return new

    def _exact(self, draft: Draft, slim: SlimPass) -> _Block:
        """Make candidates that follow the slim verifier's own distribution."""
        counts = draft.counts_on_device
        if slim.distribution is None:
            verdict = acceptance.greedy_match(draft.tokens, counts, slim.scores.argmax(dim=-1))
        else:
            verdict = acceptance.speculative_sample(draft.tokens, counts, slim.distribution, draft.distributions)
        kept = verdict.accepted.tolist()
        return _Block(verdict.tokens, [count + 1 for count in kept], kept, slim.confidence, slim.distribution)

    def _prefilter(self, draft: Draft, slim: SlimPass) -> _Block:
        """Make candidates of the drafts before the first one that is not in tier A."""
        tokens, gate, distributions = draft.tokens, self.config.gate, None
        passed = (slim.tiers_of(tokens, gate) == ACCEPT) & _real(draft)
        leading = passed.long().cumprod(dim=1).sum(dim=1)
        kept, dropped = leading.tolist(), (leading < draft.counts_on_device).tolist()
        if slim.distribution is not None:
            p = draft.distributions_over(slim.scores.shape[-1])
            distributions = laws.prefilter_distribution(p, slim.tiers_of_all(gate))
        return _Block(tokens, kept, kept, slim.confidence, distributions, dropped=dropped)

    def _gate(self, draft: Draft, slim: SlimPass) -> _Block:
        """Make candidates by the paper's tiers: B draws anew, C closes the stage."""
        tokens, k, gate, distributions = draft.tokens, draft.tokens.shape[1], self.config.gate, None
        tier = slim.tiers_of(tokens, gate)
        if slim.distribution is not None:
            p = draft.distributions_over(slim.scores.shape[-1])
            distributions = laws.gate_distribution(p, slim.distribution[:, :k], slim.tiers_of_all(gate))
        new = torch.where(tier == REGENERATE, slim.draw(k), tokens)
        same = (new == tokens) & _real(draft)
        kept = same.long().cumprod(dim=1).sum(dim=1).tolist()
        passed = (same & (tier != ESCALATE)).long().cumprod(dim=1).sum(dim=1)
        counts = draft.counts_on_device
        sizes = torch.minimum(passed + 1, counts)  # the token that ends the block is a candidate too
        last = tier.gather(1, (sizes - 1).clamp(min=0)[:, None])[:, 0] == ESCALATE if k else counts > 0
        closed = (last & (sizes > 0)).tolist()
        return _Block(new, sizes.tolist(), kept, slim.confidence, distributions, closed=closed)

    def reschedule(self, counts: list[int], kept: list[int]) -> None:
        """Draft more after blocks that stayed whole, less after others, where that is wanted."""
        if self.config.num_assistant_tokens_schedule == "heuristic" and max(counts):
            whole = all(stayed >= count for stayed, count in zip(kept, counts, strict=True))
            limit = cast(int, self.inner.limit) + (2 if whole else -1)
            self.inner.limit = max(1, min(LONGEST_DRAFT, limit))

    def verify_request(self, state: DecodingState, draft: Draft) -> ForwardRequest:
        """Return the inner drafter's."""
        return self.inner.verify_request(state, draft)

    def commit(self, state: DecodingState) -> None:
        """Let both tiers take note of the text."""
        self.inner.commit(state)
        self.slim.commit(state)

    def close(self, state: DecodingState) -> None:
        """Release what the inner drafter took."""
        self.inner.close(state)


@dataclass
class _Block:
    """What the slim verifier made of one block, per row.

    Args:
        tokens (`torch.Tensor` of shape `[n, m]`): candidates,
        counts (`list[int]`): how many of them are real.
        kept (`list[int]`): leading drafts among them.
        confidence (`torch.Tensor` of shape `[n, >= m]`): M at each candidate.
        distributions (`torch.Tensor` of shape `[n, >= m, V]`, *optional*): of the candidates, when sampling.
        closed (`list[bool]`, *optional*): whether the model should judge now; nowhere by default.
        dropped (`list[bool]`, *optional*): whether a dropped draft leaves a distribution after the last candidate, by
            which the model should judge now.
    """

    tokens: torch.Tensor
    counts: list[int]
    kept: list[int]
    confidence: torch.Tensor
    distributions: torch.Tensor | None = None
    closed: list[bool] | None = None
    dropped: list[bool] | None = None


class _Stage:
    """One row's candidates since the model last judged, `room` at most."""

    def __init__(self, room: int, config: ViaSDConfig) -> None:
        self.room, self.config, self.open = room, config, room > 0
        self.tokens: list[int] = []
        self.distributions: list[torch.Tensor] = []

    def take(self, block: _Block, slot: int, ends: list[bool], confidence: list[float]) -> list[int]:
        """Add the candidates of one slot, up to the room and an end of the text; return them.

        `ends` says which of the block's tokens end the text, `confidence` gives M at each.
        """
        count = min(block.counts[slot], self.room - len(self.tokens))
        end = next((index + 1 for index in range(count) if ends[index]), None)
        whole = count == block.counts[slot] and end is None
        count = count if end is None else end
        dropped = block.dropped is not None and block.dropped[slot]
        if block.distributions is not None:
            self.distributions += block.distributions[slot, : count + (whole and dropped)]
        new = block.tokens[slot, :count].tolist()
        self.tokens += new
        sure = count > 0 and confidence[count - 1] >= self.config.stage_stop_conf
        short = len(self.tokens) < min(self.config.stage_len, self.room)
        self.open = whole and sure and short and not dropped and not (block.closed and block.closed[slot])
        return new


def _real(draft: Draft) -> torch.Tensor:
    """Return which of the drafts `[n, k]` are real."""
    return torch.arange(draft.tokens.shape[1], device=draft.tokens.device) < draft.counts_on_device[:, None]


def _padded_distributions(
    distributions: list[list[torch.Tensor]], counts: list[int], state: DecodingState
) -> torch.Tensor | None:
    """Return the distributions as `[n, k, V]`, or `[n, k + 1, V]` if some row dropped a draft; `None` without any."""
    width = next((distribution.shape[-1] for row in distributions for distribution in row), 0)
    if not state.do_sample or not width:
        return None
    extra = any(len(row) > count for row, count in zip(distributions, counts, strict=True))
    padded = torch.zeros(len(distributions), max(counts) + extra, width, device=state.device)
    for slot, row in enumerate(distributions):
        if row:
            padded[slot, : len(row)] = torch.stack(row)
    return padded
