"""The slim verifier at work (VIA-SD): `SlimVerifier` reads blocks of drafts, a `SlimPass` is what it says of one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ....cache.speculative import SpeculativeCache
from ...drafting import Reader
from ...runner import ModelRunner
from ...state import DecodingState
from . import laws
from .config import ViaSDConfig
from .laws import Gate
from .slim_model import Slim, Units, load_slim, slim_model


logger = logging.get_logger(__name__)


class ViaSDQualityError(ValueError):
    """The slim verifier is not known to be good enough for the lossy mode."""


@dataclass
class Scored:
    """What a forward says of a block.

    Args:
        logits (`torch.Tensor` of shape `[n, m, V]`): raw,
        scores (`torch.Tensor` of shape `[n, m, V]`): and after the caller's processors.
    """

    logits: torch.Tensor
    scores: torch.Tensor


@dataclass
class SlimPass(Scored):
    """What the slim verifier says of a block of drafts `[n, m - 1]`, and of what follows it.

    Args:
        distribution (`torch.Tensor` of shape `[n, m, V]`, *optional*): S, when sampling.
        log_ratio (`torch.Tensor` of shape `[n, m, V]`): log r,
        confidence (`torch.Tensor` of shape `[n, m]`): and M (see `laws.slim_ratio`).
    """

    distribution: torch.Tensor | None
    log_ratio: torch.Tensor
    confidence: torch.Tensor

    def tiers_of(self, drafts: torch.Tensor, gate: Gate, ends: torch.Tensor | None = None) -> torch.Tensor:
        """Return the tiers `[n, k]` of the drafts `[n, k]`; for `ends` see `laws.tiers`."""
        parts = (self.log_ratio[:, :-1], self.scores[:, :-1] > -torch.inf)
        log_ratio, possible = (part.gather(2, drafts[..., None])[..., 0] for part in parts)
        return laws.tiers(log_ratio, self.confidence[:, :-1], gate, possible=possible, ends=ends)

    def tiers_of_all(self, gate: Gate) -> torch.Tensor:
        """Return the tiers `[n, k, V]` of the whole vocabulary in place of each draft."""
        possible = self.scores[:, :-1] > -torch.inf
        return laws.tiers(self.log_ratio[:, :-1], self.confidence[:, :-1, None], gate, possible=possible)

    def draw(self, width: int) -> torch.Tensor:
        """Return the slim verifier's own tokens `[n, width]`: the most likely ones, or drawn when sampling."""
        if self.distribution is None or not width:
            return self.scores[:, :width].argmax(dim=-1)
        distribution = self.distribution[:, :width]
        return torch.multinomial(distribution.flatten(0, 1), 1).view(distribution.shape[:2])


class SlimVerifier:
    """Reads blocks with the slim model: over the target's cache, or over one of its own.

    Shared, its keys and values lie where the target's will: the target's next pass writes over them, in all layers.
    """

    units: Units
    found: Slim
    runner: ModelRunner
    reader: Reader | None = None  # of a cache of its own

    def __init__(self, config: ViaSDConfig) -> None:
        self.config = config

    def prepare(self, model: PreTrainedModel) -> None:
        """Find the mask and the LoRA, and raise `ValueError` for what doesn't fit `model` or each other."""
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
        """Return what runs the slim model, which uses the attention that the model uses now, over `cache`."""
        model = slim_model(state.model, self.units, self.found.keep, self.found.terms)
        return ModelRunner(model, cache, state.longest, self.units.attentions(self.found.keep))

    def setup(self, state: DecodingState, capacity: int) -> None:
        """Read the prompts with the model's own attention, where there is a cache of its own."""
        self.reader = None
        if not self.shared:
            with state.timed("prefill"):
                cache = SpeculativeCache(state.windows, len(state.active), capacity, state.target.cache.kernels)
                self.reader = Reader.read_prompts(state, self._runner(state, cache))
            state.followers.append(self.reader)

    def attach(self, state: DecodingState) -> None:
        """Build the slim model again, now that the package's attention is on."""
        self.runner = self._runner(state, (state.target if self.reader is None else self.reader.runner).cache)
        if self.reader is not None:
            self.reader.runner = self.runner

    def read(self, state: DecodingState, drafts: torch.Tensor) -> SlimPass:
        """Run the slim model over each of the drafts `[n, k]`; m is k + 1, the last entry is about what follows."""
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
        scores = state.process(logits, drafts)
        distribution = state.distribution(scores) if state.do_sample else None
        return SlimPass(logits, scores, distribution, *laws.slim_ratio(logits))

    def commit(self, state: DecodingState) -> None:
        """Keep what the text has."""
        if self.reader is not None:
            self.reader.commit(state)
