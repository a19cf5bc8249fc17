"""Timing decoding arms: one prefill per batch, every arm starts from a copy of its cache, repeats interleave."""

from __future__ import annotations

import contextlib
import copy
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import torch
import transformers
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from .._version import __version__
from ..generation.stats import SpeculationStats, on_speculation
from ..registry import strategy_class
from ..resolve import resolve_strategy


STOCK = ("default", "static")
"""Stock plain decoding, always measured: with the default cache, and the static one (compiled on CUDA)."""

# limited to one row; and given a cache, stock 5.23 writes another text, so they run the prompt themselves
_STOCK_SPECULATIVE = ("stock_prompt_lookup", "stock_assisted", "stock_early_exit")
_PREFILL_CHUNK = 1024


@dataclass
class Arm:
    """One way of decoding.

    Args:
        name (`str`): as in the table.
        options (`dict`): keyword arguments of `generate()`.
        static (`bool`, *optional*, defaults to `False`): start from a static cache.
        fresh (`bool`, *optional*, defaults to `False`): run the prompt itself, untimed, instead of starting from the
            cache that all arms share.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    static: bool = False
    fresh: bool = False


@dataclass
class Measurement:
    """What one arm did at one (context, batch).

    Args:
        name (`str`): the arm.
        context (`int`): tokens of each prompt.
        batch (`int`): rows.
        new_tokens (`int`): tokens decoded per row.
        tokens_per_second (`float`): median over the repeats, all rows, the first token and the prefill left out.
        ms_per_token (`float`): milliseconds per column of the batch, median.
        repeats (`list[float]`): milliseconds per column of every repeat.
        tokens_per_step, acceptance (`float`, *optional*): of the last repeat, for strategies.
        draft_ms, verify_ms, select_ms (`float`, *optional*): per forward (selection: per round), median.
        drafts (`float`, *optional*): draft forwards per forward of the whole target.
        modelled (`float`, *optional*): speed-up over the `plain` strategy that these step times predict.
        forwards (`float`, *optional*): forwards of the whole target per column, the prefill's left out.
        method (`dict`, *optional*): the method's own counters, of the last repeat.
        same_tokens (`float`): share of the tokens before which the text equals the default arm's.
    """

    name: str
    context: int
    batch: int
    new_tokens: int
    tokens_per_second: float
    ms_per_token: float
    repeats: list[float]
    tokens_per_step: float | None = None
    acceptance: float | None = None
    draft_ms: float | None = None
    verify_ms: float | None = None
    select_ms: float | None = None
    drafts: float | None = None
    modelled: float | None = None
    forwards: float | None = None
    method: dict[str, Any] | None = None
    same_tokens: float = 1.0


class _Clock:
    """A streamer that notes when each column came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor | None = None) -> None:
        self.times.append(time.perf_counter())

    end = put

    @property
    def decoding(self) -> float:
        # times[0] is the prompt, times[1] the first token
        return self.times[-1] - self.times[1]


def make_arm(name: str, assistant: PreTrainedModel | None) -> Arm:
    """Return the arm called `name`.

    Args:
        name (`str`): a stock arm (`default`, `static`, `stock_prompt_lookup`, `stock_assisted`,
            `stock_early_exit@layer=3`) or anything that `assistant_strategy` takes. `name@key=value,key=value` changes
            fields of the strategy's config, and of the assistant's generation config for `stock_assisted` (whose lossy
            mode is `stock_assisted@assistant_ensemble_weight=0.7`); `[3;6]` is a list of numbers.
        assistant (`PreTrainedModel`, *optional*): for the arms that need one.

    Raises:
        ValueError: for an arm that needs an assistant where there is none, or an unknown strategy or field.
    """
    if name in STOCK:
        return Arm(name, static=name == "static")
    if name == "stock_prompt_lookup":
        return Arm(name, {"prompt_lookup_num_tokens": 10}, fresh=True)
    strategy, _, changes = name.partition("@")
    settings = {key: _value(text) for key, _, text in (part.partition("=") for part in changes.split(",") if part)}
    if strategy == "stock_early_exit":
        if set(settings) != {"layer"}:
            raise ValueError(f"The arm {name!r} needs its exit: `stock_early_exit@layer=3`.")
        return Arm(name, {"assistant_early_exit": settings["layer"]}, fresh=True)
    config = None if strategy == "stock_assisted" else resolve_strategy(strategy, settings)
    needs = config is None or (strategy_class(config.strategy).needs_assistant and not config.brings_drafter)
    if needs and assistant is None:
        raise ValueError(f"The arm {name!r} needs a second model: give `--assistant FOLDER`.")
    if config is None:
        # stock reads this one from the call, the others from the assistant
        weight = {key: settings.pop(key) for key in ("assistant_ensemble_weight",) if key in settings}
        return Arm(name, {"assistant_model": _stock_assistant(assistant, settings), **weight}, fresh=True)
    options = {"assistant_strategy": config, **({"assistant_model": assistant} if needs else {})}
    return Arm(name, options, fresh=strategy_class(config.strategy).reads_prompt)


def _stock_assistant(assistant: PreTrainedModel | None, settings: dict[str, Any]) -> PreTrainedModel:
    """Return the assistant with other values in its generation config, where stock looks for them."""
    assistant = copy.copy(cast(PreTrainedModel, assistant))  # a shallow copy: the same modules
    assistant.generation_config = copy.deepcopy(assistant.generation_config)
    for name, value in settings.items():
        if not hasattr(assistant.generation_config, name):
            raise ValueError(f"GenerationConfig has no field {name!r}, so the arm `stock_assisted` can't set it.")
        setattr(assistant.generation_config, name, value)
    return assistant


def _value(text: str) -> Any:
    if text.startswith("[") and text.endswith("]"):
        return [_value(part) for part in text[1:-1].split(";")]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"True": True, "true": True, "False": False, "false": False, "None": None}.get(text, text)


@torch.no_grad()
def prefill(model: PreTrainedModel, ids: torch.Tensor) -> tuple[DynamicCache, float]:
    """Return a stock cache of all tokens of `ids` `[b, T]` but the last, and the seconds that it took."""
    cache = DynamicCache(config=model.config)
    start = time.perf_counter()
    for part in ids[:, :-1].split(_PREFILL_CHUNK, dim=1) if ids.shape[1] > 1 else ():
        model(input_ids=part, past_key_values=cache, logits_to_keep=1)
    if ids.device.type == "cuda":
        torch.cuda.synchronize()
    return cache, time.perf_counter() - start


def measure(
    model: PreTrainedModel,
    ids: torch.Tensor,
    arms: Sequence[Arm],
    new_tokens: int,
    repeats: int,
    progress: Callable[[str], None] = lambda _: None,
    warm_up: bool = True,
    cache: DynamicCache | None = None,
) -> list[Measurement]:
    """Time the arms on the prompts `ids` `[b, T]`, greedily, EOS ignored so that all decode the same number of tokens.

    Args:
        model (`PreTrainedModel`): the target.
        ids (`torch.Tensor` of shape `[b, T]`, int64): prompts of equal length.
        arms (`list[Arm]`): ways of decoding; stock arms that are limited to one row are skipped for more.
        new_tokens, repeats (`int`): tokens per row, and timed runs of each arm, in turn.
        progress (`Callable[[str], None]`, *optional*): called with the arm's name after each run.
        warm_up (`bool`, *optional*, defaults to `True`): run each arm once before, untimed.
        cache (`DynamicCache`, *optional*): of all tokens of `ids` but the last, in place of a prefill; not changed.

    Raises:
        ValueError: for fewer than 2 new tokens, less than 1 repeat, or a cache of another length.
    """
    if new_tokens < 2 or repeats < 1:
        raise ValueError(f"`new_tokens` must be at least 2 and `repeats` at least 1, got {new_tokens} and {repeats}.")
    starts = _Starts(model, ids, new_tokens, cache)
    arms = [arm for arm in arms if ids.shape[0] == 1 or arm.name.partition("@")[0] not in _STOCK_SPECULATIVE]
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    stats: dict[str, list[SpeculationStats]] = {arm.name: [] for arm in arms}
    texts: dict[str, torch.Tensor] = {}
    apart = ids.device.type == "cuda"  # timing phases makes the host wait: they have a run of their own, the last
    for repeat in range(0 if warm_up else 1, repeats + 1 + apart):
        for arm in arms:
            clock = _Clock()
            with on_speculation(stats[arm.name].append, timings=not apart or repeat > repeats):
                output = cast(Any, model).generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    past_key_values=None if arm.fresh else starts.static() if arm.static else starts.dynamic(),
                    max_new_tokens=new_tokens,
                    do_sample=False,
                    eos_token_id=model.config.get_text_config().vocab_size,  # an id that never comes
                    pad_token_id=0,
                    streamer=clock,
                    **arm.options,
                )
            texts[arm.name] = output[:, ids.shape[1] :]
            if 1 <= repeat <= repeats:
                seconds[arm.name].append(clock.decoding)
            progress(arm.name)
    timed = {name: runs[-1:] if apart else runs[1:] if warm_up else runs for name, runs in stats.items()}
    found = [_summarise(arm, ids, new_tokens, seconds[arm.name], timed[arm.name], texts) for arm in arms]
    plain = next((m for m in found if m.name == "plain"), None)
    for m in found:
        if plain is not None and m.draft_ms is not None and m.verify_ms is not None and m.tokens_per_step is not None:
            last = stats[m.name][-1]
            round_ms = strategy_class(last.strategy).round_ms(last, m.draft_ms, m.verify_ms)
            m.modelled = plain.ms_per_token * m.tokens_per_step / round_ms
    return found


def merge(groups: Sequence[Sequence[Measurement]]) -> list[Measurement]:
    """Return one measurement per arm for groups of prompts that were measured with the same arms and sizes.

    Times are means over the groups, so that every token counts alike; `repeats` holds a value per group, and
    `context` is the mean.
    """
    merged = []
    for found in zip(*groups, strict=True):
        first = found[0]
        mean = {name: _mean([getattr(m, name) for m in found]) for name in _MEANS}
        mean["tokens_per_second"] = 1000 * first.batch / (mean["ms_per_token"] or 1)
        steps = [1 / m.tokens_per_step for m in found if m.tokens_per_step]
        mean["tokens_per_step"] = len(steps) / sum(steps) if steps else None
        context = round(statistics.mean(m.context for m in found))
        repeats = [m.ms_per_token for m in found]
        method = _total([m.method for m in found if m.method is not None])
        merged.append(replace(first, context=context, repeats=repeats, method=method, **cast("dict[str, Any]", mean)))
    return merged


_TIMES = ("ms_per_token", "draft_ms", "verify_ms", "select_ms")
_MEANS = (*_TIMES, "acceptance", "drafts", "modelled", "forwards", "same_tokens")


def _total(counters: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return sums of the whole numbers that some runs counted, tables of them included; nothing else adds up."""
    if not counters:
        return None
    sums: dict[str, Any] = {}
    for key in dict.fromkeys(key for counter in counters for key in counter):
        values = [counter[key] for counter in counters if key in counter]
        if all(isinstance(value, dict) for value in values):
            sums[key] = _total(values)
        elif all(type(value) is int for value in values):
            sums[key] = sum(values)
    return sums


def _mean(values: Sequence[float | None]) -> float | None:
    real = [value for value in values if value is not None]
    return statistics.mean(real) if real else None


class _Starts:
    """What arms start from: copies of one cache, of the prompts' prefill where none is given."""

    def __init__(self, model: PreTrainedModel, ids: torch.Tensor, new_tokens: int, cache: DynamicCache | None) -> None:
        known = ids.shape[1] - 1
        if cache is not None and cache.get_seq_length() != known:
            raise ValueError(f"`cache` must hold {known} tokens per row, but holds {cache.get_seq_length()}.")
        self.model, self.capacity = model, ids.shape[1] + new_tokens
        self.cache = prefill(model, ids)[0] if cache is None else cache
        self._static: StaticCache | None = None

    def dynamic(self) -> Cache:
        """Return a dynamic cache."""
        if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in self.cache.layers):
            return copy.deepcopy(self.cache)
        # stock puts new tensors into these layers instead of writing to the old ones, and strategies copy them: a
        # second one of the whole content would only take memory
        shared = copy.copy(self.cache)
        shared.layers = [copy.copy(layer) for layer in self.cache.layers]
        return shared

    def static(self) -> Cache:
        """Return the static cache, filled again: CUDA graphs are recorded anew for tensors that lie elsewhere."""
        if self._static is None:
            self._static = StaticCache(config=self.model.config, max_cache_len=self.capacity)
        self._static.reset()
        layers: list[Any] = [*zip(self._static.layers, self.cache.layers, strict=True)]
        for layer, source in layers:
            layer.update(source.keys, source.values)
        return self._static


def _summarise(
    arm: Arm,
    ids: torch.Tensor,
    new_tokens: int,
    seconds: list[float],
    runs: list[SpeculationStats],
    texts: dict[str, torch.Tensor],
) -> Measurement:
    batch, context = ids.shape
    per_column = [1000 * value / (new_tokens - 1) for value in seconds]
    middle = statistics.median(per_column)
    result = Measurement(arm.name, context, batch, new_tokens, 1000 * batch / middle, middle, per_column)
    if "default" in texts:
        same = (texts[arm.name] == texts["default"]).long().cumprod(dim=1)
        result.same_tokens = float(same.sum() / same.numel())
    if runs and runs[-1].num_draft_tokens:
        last = runs[-1]
        result.tokens_per_step, result.acceptance = last.mean_tokens_per_step, last.acceptance_rate
        result.forwards = last.target_forwards / (new_tokens - 1)
        result.drafts = last.draft_forwards / max(last.target_forwards, 1)
        result.method = {key: value for key, value in last.method.items() if key != "tier_ids"}
        draft, verify, select = (
            statistics.median(1000 * s.seconds.get(phase, 0.0) / max(getattr(s, count), 1) for s in runs)
            for phase, count in (
                ("draft", "draft_forwards"), ("verify", "target_forwards"), ("select", "target_forwards"),
            )
        )  # fmt: skip
        result.draft_ms, result.verify_ms, result.select_ms = draft, verify, select
    return result


def environment() -> dict[str, Any]:
    """Return what a figure has to be read with: versions, device and threads."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "hf_specdec": __version__, "transformers": transformers.__version__, "torch": torch.__version__,
        "python": platform.python_version(), "device": device, "threads": torch.get_num_threads(),
    }  # fmt: skip


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def to_json(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Return the measurements as JSON-safe dictionaries."""
    return [asdict(m) for m in measurements]
