"""The two tiers before the model (VIA-SD): `SlimDrafter` turns a drafter's blocks into candidates."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import cast

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ....cache.speculative import SpeculativeCache
from ....kernels.request import ForwardRequest
from ... import acceptance
from ...drafting import Reader
from ...runner import ModelRunner
from ...state import DecodingState
from ...strategy import Draft, Drafter
from . import laws
from .config import LONGEST_DRAFT, ViaSDConfig
from .laws import ACCEPT, ESCALATE, REGENERATE, SlimPass
from .slim_model import Slim, Units, load_slim, slim_model


logger = logging.get_logger(__name__)


class ViaSDQualityError(ValueError):
    """The slim verifier is not known to be good enough for the lossy mode."""


class SlimDrafter(Drafter):
    """Drafts in two tiers, for lossless verification: the slim verifier turns a drafter's blocks into candidates.

    Blocks follow one another until `stage_len` candidates are gathered. Each candidate comes with the exact
    distribution that it was drawn from, so whoever judges them is lossless. The slim verifier reads over the target's
    cache or one of its own. Shared, its keys and values lie where the target's will: the target's next pass writes
    over them, in all layers.
    """

    units: Units
    found: Slim
    runner: ModelRunner
    reader: Reader | None = None  # of a cache of its own

    def __init__(self, config: ViaSDConfig, inner: Drafter) -> None:
        self.config, self.inner = config, inner
        if config.num_assistant_tokens_schedule == "heuristic" and inner.limit is None:
            raise ValueError(
                "`num_assistant_tokens_schedule='heuristic'` needs a drafter whose drafts may change in number: an "
                "assistant or prompt lookup."
            )

    def prepare(self, model: PreTrainedModel) -> None:
        """Load drafter, mask and LoRA, and raise `ValueError` for what doesn't fit `model` or each other."""
        self.inner.prepare(model)
        config = self.config
        if config.adapter is not None:
            known = load_slim(model, config.adapter)
            self.units = Units(model, known.granularity)
        else:
            self.units = Units(model, "layer")
            known = Slim("layer", self.units.even(), {})
            logger.warning_once(
                f"VIA-SD has no mask for {type(model).__name__} and leaves out evenly spaced layers, which is far "
                "from the best choice: search one with `hf-specdec calibrate via_sd`."
            )
        self.units.check(known.keep)
        # what is known of the mask was measured in one cache mode, which is the one to decode in
        wanted = config.slim_cache or known.cache_mode or known.calibration.get("slim_cache", "shared")
        if known.cache_mode is not None and wanted != known.cache_mode:
            raise ValueError(
                f"`slim_cache={wanted!r}` does not fit `adapter={config.adapter!r}`, which was trained for "
                f"{known.cache_mode!r}."
            )
        self.found, self.shared = known, wanted == "shared"
        self._check_quality()

    def _check_quality(self) -> None:
        config, agreement = self.config, self.found.calibration.get("agreement")
        if not config.tiered or config.force:
            return
        if agreement is None:
            raise ViaSDQualityError(
                "mode='lossy' needs a slim verifier that has been measured: calibrate one with `hf-specdec calibrate "
                "via_sd` and pass its folder as `adapter`, or set `force=True`."
            )
        if agreement < config.min_slim_agreement:
            raise ViaSDQualityError(
                f"mode='lossy' needs a slim verifier that agrees with the model on `min_slim_agreement="
                f"{config.min_slim_agreement}` of the tokens; the one of `adapter={config.adapter!r}` does on "
                f"{agreement:.3f}. Train it further, skip less, or set `force=True`."
            )

    def _runner(self, state: DecodingState, cache: SpeculativeCache) -> ModelRunner:
        """Return what runs the slim model over `cache`."""
        units = self.units.of(state.model)
        model = slim_model(state.model, units, self.found.keep, self.found.terms)
        return ModelRunner(model, cache, state.longest, units.attentions(self.found.keep))

    def setup(self, state: DecodingState) -> None:
        """Prepare both tiers; where the slim verifier has a cache of its own, it reads the prompts now."""
        self.inner.setup(state)
        self.reader = None
        if not self.shared:  # with the model's own attention
            with state.timed("prefill"):
                limit = state.longest + self.config.num_assistant_tokens + 1
                cache = SpeculativeCache(state.windows, len(state.active), limit, state.target.cache.kernels)
                self.reader = Reader.read_prompts(state, self._runner(state, cache))
            state.followers.append(self.reader)
        state.stats.method.update(
            slim_forwards=0,
            drafter_tokens=0,
            drafter_kept=0,
            candidates=0,
            stages=0,
            slim_cache="shared" if self.shared else "own",
            skipped_share=self.units.share(self.found.keep),
        )

    def prefill_request(self, state: DecodingState) -> ForwardRequest:
        """Return the inner drafter's."""
        return self.inner.prefill_request(state)

    def prefill(self, state: DecodingState) -> None:
        """Let the drafter read the prompts, and build the slim model where it has not read them."""
        self.inner.prefill(state)
        self.runner = self._runner(state, state.target.cache) if self.reader is None else self.reader.runner

    def read(self, state: DecodingState, drafts: torch.Tensor, counts: list[int] | None = None) -> SlimPass:
        """Run the slim model over each of the drafts `[n, k]`; m is k + 1, the last entry is about what follows.

        `counts` says how many of each row's drafts are real; all by default.
        """
        if self.reader is None:
            tokens, starts = state.pending, [count - 1 for count in state.committed]
        else:
            tokens, starts = self.reader.unread(state, drafts[:, :0], [0] * len(state.active))
        tokens = torch.cat([tokens, drafts], dim=1)
        state.stats.method["slim_forwards"] += 1
        output = self.runner.forward(tokens, starts)
        if self.reader is not None:
            self.reader.known = [start + tokens.shape[1] for start in starts]
        logits = output.logits[:, -drafts.shape[1] - 1 :].to(state.device)
        decides = self.config.tiered  # so that nothing may stand in for what the processors exclude
        scores = state.process(logits, drafts, counts=counts, drafting=not decides, stops=not decides)
        known = scores if decides else state.usable(logits, scores)[0]
        distribution = state.distribution(known) if state.do_sample else None
        return SlimPass(logits, scores, distribution, *laws.slim_ratio(logits))

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
                block = rule(draft, self.read(state, draft.tokens, counts))
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
        if self.reader is not None:
            self.reader.commit(state)

    def close(self, state: DecodingState) -> None:
        """Release what the inner drafter took."""
        self.inner.close(state)


@dataclass
class _Block:
    """What the slim verifier made of one block, per row."""

    tokens: torch.Tensor  # candidates `[n, m]`
    counts: list[int]  # how many of them are real
    kept: list[int]  # leading drafts among them
    confidence: torch.Tensor  # M at each candidate, `[n, >= m]`
    distributions: torch.Tensor | None = None  # of the candidates, `[n, >= m, V]`, when sampling
    closed: list[bool] | None = None  # whether the model should judge now; nowhere by default
    # the same, because a draft was dropped, which leaves its distribution after the last candidate
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
