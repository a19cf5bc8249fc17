"""The slim verifier at work: `SlimVerifier` reads blocks, `SlimDrafter` turns drafts into candidates (VIA-SD)."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, cast

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
from .config import LONGEST_DRAFT
from .laws import ACCEPT, ESCALATE, REGENERATE
from .slim_model import Slim, Units, load_slim, slim_model


if TYPE_CHECKING:
    from .config import ViaSDConfig

logger = logging.get_logger(__name__)


class ViaSDQualityError(ValueError):
    """The slim verifier is not known to be good enough for the lossy mode."""


class SlimVerifier:
    """Reads blocks with the slim model: over the target's cache, or over one of its own.

    Shared, its keys and values lie where the target's will: the target's next pass writes over them, in all layers.
    """

    def __init__(self, config: ViaSDConfig) -> None:
        self.config = config
        self.units: Units
        self.found: Slim
        self.reader: Reader | None = None  # of a cache of its own
        self.runner: ModelRunner

    def prepare(self, model: PreTrainedModel) -> None:
        """Find the mask and the adapter, and raise `ValueError` for what doesn't fit `model` or each other."""
        config = self.config
        mask, known = config.keep_mask, None
        if config.adapter is not None:
            known = load_slim(model, config.adapter)
            if mask is not None and list(mask) != known.keep:
                raise ValueError(
                    f"`keep_mask` is not the mask of `adapter={config.adapter!r}`, to which its calibration and its "
                    "LoRA belong; leave it out."
                )
            if config.granularity not in ("layer", known.granularity):
                raise ValueError(
                    f"`granularity={config.granularity!r}` is not that of the mask in `adapter={config.adapter!r}`, "
                    f"which is {known.granularity!r}."
                )
        granularity = config.granularity if known is None else known.granularity
        self.units = Units(model, granularity)
        if known is None:
            keep = list(mask) if mask is not None else self.units.even(config.skip_ratio, config.skip_budget_by)
            known = Slim(granularity, keep, {})
            if mask is None:
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
        if agreement is None:
            if config.tiered and not config.force:
                raise ViaSDQualityError(
                    "mode='lossy' needs a slim verifier that has been measured: calibrate one with `hf-specdec "
                    "calibrate via_sd` and pass its folder as `adapter`, or set `force=True`."
                )
            return
        if config.tiered and not config.force and agreement < config.min_slim_agreement:
            raise ViaSDQualityError(
                f"mode='lossy' needs a slim verifier that agrees with the model on `min_slim_agreement="
                f"{config.min_slim_agreement}` of the tokens; the one of `adapter={config.adapter!r}` does on "
                f"{agreement:.3f}. Train it further, skip less, or set `force=True`."
            )

    def model(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return the slim model, which uses the attention that `model` uses now."""
        return slim_model(model, self.units, self.found.keep, self.found.terms)

    def setup(self, state: DecodingState, capacity: int) -> None:
        """Read the prompts with the model's own attention, where there is a cache of its own."""
        self.reader = None
        if not self.shared:
            layers = self.units.attentions(self.found.keep)
            with state.timed("prefill"):
                cache = SpeculativeCache(state.windows, len(state.active), capacity, state.target.cache.kernels)
                runner = ModelRunner(self.model(state.model), cache, state.longest, layers)
                self.reader = Reader.read_prompts(state, runner)
            state.followers.append(self.reader)

    def attach(self, state: DecodingState) -> None:
        """Build the slim model again, now that the package's attention is on."""
        cache = state.target.cache if self.reader is None else self.reader.runner.cache
        layers = self.units.attentions(self.found.keep)
        self.runner = ModelRunner(self.model(state.model), cache, state.longest, layers)
        if self.reader is not None:
            self.reader.runner = self.runner

    def read(self, state: DecodingState, drafts: torch.Tensor) -> torch.Tensor:
        """Return the slim model's raw logits `[n, k + 1, V]` of each of the drafts `[n, k]` and of what follows."""
        if self.reader is None:
            tokens, starts = state.pending, [count - 1 for count in state.committed]
        else:
            tokens, starts = self.reader.unread(state, drafts[:, :0], [0] * len(state.active))
        tokens = torch.cat([tokens, drafts], dim=1)
        state.stats.method["slim_forwards"] += 1
        output = self.runner.forward(tokens, starts)
        if self.reader is not None:
            self.reader.known = [start + tokens.shape[1] for start in starts]
        return output.logits[:, -drafts.shape[1] - 1 :].to(state.device)

    def commit(self, state: DecodingState) -> None:
        """Keep what the text has."""
        if self.reader is not None:
            self.reader.commit(state)


class SlimDrafter(Drafter):
    """Drafts in two tiers, for lossless verification: the slim verifier turns a drafter's blocks into candidates.

    Blocks follow one another until `stage_len` candidates are gathered. Each candidate comes with the exact
    distribution that it was drawn from, so whoever judges them is lossless.

    Args:
        config (`ViaSDConfig`): the settings.
        inner (`Drafter`): what drafts.
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
        config, method = self.config, state.stats.method
        rooms = state.draft_room(config.stage_len + config.num_assistant_tokens)
        found: list[list[int]] = [[] for _ in rooms]
        distributions: list[list[torch.Tensor]] = [[] for _ in rooms]
        going = [room > 0 for room in rooms]
        method["stages"] += 1
        with ExitStack() as stage:  # no candidate stays in the text before the model has judged it
            while any(going):
                draft = self.inner.propose(state)
                counts = [count if goes else 0 for count, goes in zip(draft.counts, going, strict=True)]
                draft = replace(draft, counts=counts)
                if config.lossless_rule != "exact" and not max(draft.counts):
                    break
                block = self._block(state, draft)
                ends = state.is_eos(block.tokens).tolist()
                written: dict[int, list[int]] = {}
                for slot, row in enumerate(state.active):
                    if not going[slot]:
                        continue
                    count = min(block.counts[slot], rooms[slot] - len(found[slot]))
                    end = next((place + 1 for place in range(count) if ends[slot][place]), None)
                    whole = count == block.counts[slot] and end is None
                    count = count if end is None else end
                    new = block.tokens[slot, :count].tolist()
                    if block.distributions is not None:  # with prefilter, a dropped draft leaves its distribution
                        distributions[slot] += block.distributions[slot, : count + (whole and block.dropped[slot])]
                    found[slot] += new
                    written[row] = new
                    method["drafter_tokens"] += draft.counts[slot]
                    method["drafter_kept"] += min(block.kept[slot], count)
                    unsure = count > 0 and block.confidence[slot][count - 1] < config.stage_stop_conf
                    short = len(found[slot]) < min(config.stage_len, rooms[slot])
                    going[slot] = whole and count > 0 and short and not unsure and not block.closed[slot]
                # what drafts and reads next sees them as if they had been emitted
                stage.enter_context(state.text.speculated(written))
                self._commit(state)
                self.reschedule(draft.counts, block.kept)
        method["candidates"] += sum(map(len, found))
        rows = [torch.tensor(tokens, dtype=torch.int64, device=state.device) for tokens in found]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return Draft(
            tokens,
            [len(row) for row in found],
            _padded_distributions(distributions, [len(row) for row in found], state),
        )

    def _block(self, state: DecodingState, draft: Draft) -> _Block:
        """Let the slim verifier turn each row's drafts into candidates."""
        tokens, k = draft.tokens, draft.tokens.shape[1]
        logits = self.slim.read(state, tokens)
        scores = state.process(logits, tokens)
        counts = draft.counts_on_device
        s = state.distribution(scores) if state.do_sample else None
        log_ratio, confidence = laws.slim_ratio(logits)
        if self.config.lossless_rule == "exact":
            if s is None:
                verdict = acceptance.greedy_match(tokens, counts, scores.argmax(dim=-1))
            else:
                verdict = acceptance.speculative_sample(tokens, counts, s, draft.distributions)
            kept = verdict.accepted.tolist()
            no = [False] * len(kept)
            return _Block(verdict.tokens, [count + 1 for count in kept], s, kept, no, no, confidence.tolist())
        tier = self.tiers(state, log_ratio[:, :k], confidence[:, :k], scores[:, :k], tokens)
        real = torch.arange(k, device=tokens.device) < counts[:, None]
        p, every = None, None
        if s is not None:
            p = draft.distributions if draft.distributions is not None else point_masses(tokens, s.shape[-1])
            every = self.tiers(state, log_ratio[:, :k], confidence[:, :k, None], scores[:, :k])
        if self.config.lossless_rule == "prefilter":
            leading = ((tier == ACCEPT) & real).long().cumprod(dim=1).sum(dim=1)
            kept = leading.tolist()
            dropped = (leading < counts).tolist()
            distributions = None if p is None or every is None else laws.prefilter_distribution(p, every)
            return _Block(tokens, kept, distributions, kept, dropped, dropped, confidence.tolist())
        choice = self.draw(scores[:, :k], None if s is None else s[:, :k])
        new = torch.where(tier == REGENERATE, choice, tokens)
        same = (new == tokens) & real
        kept = same.long().cumprod(dim=1).sum(dim=1).tolist()
        on = (same & (tier != ESCALATE)).long().cumprod(dim=1).sum(dim=1)
        places = torch.minimum(on + 1, counts)  # the token that ends the block is a candidate too
        last = tier.gather(1, (places - 1).clamp(min=0)[:, None])[:, 0] == ESCALATE if k else counts > 0
        distributions = None if p is None or every is None or s is None else laws.gate_distribution(p, s[:, :k], every)
        return _Block(
            new,
            places.tolist(),
            distributions,
            kept,
            (last & (places > 0)).tolist(),
            [False] * len(kept),
            confidence.tolist(),
        )

    def tiers(
        self,
        state: DecodingState,
        log_ratio: torch.Tensor,
        confidence: torch.Tensor,
        scores: torch.Tensor,
        tokens: torch.Tensor | None = None,
        thresholds: tuple[float, float] | None = None,
        regen_min_conf: float | None = None,
        guard: bool = False,
    ) -> torch.Tensor:
        """Return the tiers of `tokens` `[n, k]`, or without them of all words `[n, k, V]` (see `laws.tiers`).

        Args:
            scores (`torch.Tensor` of shape `[n, k, V]`): the slim verifier's, processed.
            guard (`bool`): escalate unsure ends of the text.
        """
        possible = scores > -torch.inf
        words = torch.arange(scores.shape[-1], device=scores.device) if tokens is None else tokens
        if tokens is not None:
            log_ratio, possible = (part.gather(2, tokens[..., None])[..., 0] for part in (log_ratio, possible))
        return laws.tiers(
            log_ratio,
            confidence,
            self.config.thresholds if thresholds is None else thresholds,
            self.config.regen_min_conf if regen_min_conf is None else regen_min_conf,
            possible=possible,
            ends=state.is_eos(words) if guard else None,
        )

    @staticmethod
    def draw(scores: torch.Tensor, distribution: torch.Tensor | None) -> torch.Tensor:
        """Return the slim verifier's own tokens `[n, m]`: the most likely ones, or drawn from `distribution`."""
        if distribution is None or not distribution.shape[1]:
            return scores.argmax(dim=-1)
        return torch.multinomial(distribution.flatten(0, 1), 1).view(distribution.shape[:2])

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
        self._commit(state)

    def _commit(self, state: DecodingState) -> None:
        self.inner.commit(state)
        self.slim.commit(state)

    def close(self, state: DecodingState) -> None:
        """Release what the inner drafter took."""
        self.inner.close(state)


class _Block(NamedTuple):
    """What the slim verifier made of one block, per row.

    Attributes:
        tokens (`torch.Tensor` of shape `[n, m]`): candidates,
        counts (`list[int]`): how many of them are real,
        distributions (`torch.Tensor` of shape `[n, >= m, V]`, *optional*): and their distributions, when sampling.
        kept (`list[int]`): leading drafts among them.
        closed (`list[bool]`): whether the model should judge now.
        dropped (`list[bool]`): whether a dropped draft leaves a distribution after the last candidate.
        confidence (`list[list[float]]`): M at each position.
    """

    tokens: torch.Tensor
    counts: list[int]
    distributions: torch.Tensor | None
    kept: list[int]
    closed: list[bool]
    dropped: list[bool]
    confidence: list[list[float]]


def point_masses(tokens: torch.Tensor, width: int) -> torch.Tensor:
    """Return the distributions `[n, k, V]` of drafts `[n, k]` that are certain."""
    return torch.zeros(*tokens.shape, width, device=tokens.device).scatter_(2, tokens[..., None], 1.0)


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
