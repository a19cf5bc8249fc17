"""Step times on random weights in real shapes, and the speed-up that they and a measured acceptance would give.

How long a forward takes does not depend on the weights, so the shapes of large models are measured without the models.
How many drafts are accepted does depend on them: random ones say nothing about it, so tokens per step are read from a
file of results, and what follows from both is called *modelled* wherever it is shown.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel

from ..configuration import SpeculationConfig
from ..registry import STRATEGIES
from .cases import RECENTS, SIZES, TINY_SIZES, Case
from .run import Arm, Measurement, make_arm, measure


TINY = "tiny"
_QWEN3 = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 132096,  # 128K and an answer; the models need YaRN for that, which costs no more
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1-8b": ("llama", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }),
    "qwen3-8b": ("qwen3", {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, **_QWEN3,
    }),
    "qwen3-0.6b": ("qwen3", {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "tie_word_embeddings": True, **_QWEN3,
    }),
    TINY: ("llama", {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64, "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }),
}  # fmt: skip
"""Model type and config of each shape; `tiny` is for trying the command out without an accelerator."""


@dataclass
class StepRow:
    """What one arm's steps took at one (shape, context, batch).

    Args:
        shape (`str`): key of `SHAPES`.
        name (`str`): the arm.
        context (`int`): tokens of each prompt; all but the last are in the cache that the arm starts from.
        batch (`int`): rows.
        ms_per_token (`float`): milliseconds per column of the batch, median of the repeats.
        draft_ms, verify_ms, select_ms (`float`, *optional*): per draft forward, verification, round's selection.
        rest_ms (`float`, *optional*): a round's time outside of drafting and verification.
        drafts (`float`, *optional*): draft forwards per round, as run.
        weights_ms (`float`): floor of a draft step: the bytes of weights that one forward reads (all but an embedding
            table that only gives rows) at the rate of a copy, in which reads and writes both count.
        kv_ms (`float`): the same for the keys and values of `context` tokens of all rows, which a plain step adds.
        compiled (`bool`, *optional*): of a stock static arm: whether generate() compiled its forward.
        num_assistant_tokens (`int`, *optional*): drafts per round of the configured arm (gamma).
        tokens_per_step (`float`, *optional*): tau, measured elsewhere: `measured_at` has file, context and batch.
        modelled (`float`, *optional*): speed-up over the static arm per column, tau * t_static / (gamma * t_draft +
            t_verify + t_rest): never measured.
    """

    shape: str
    name: str
    context: int
    batch: int
    ms_per_token: float
    draft_ms: float | None = None
    verify_ms: float | None = None
    select_ms: float | None = None
    rest_ms: float | None = None
    drafts: float | None = None
    weights_ms: float = 0.0
    kv_ms: float = 0.0
    compiled: bool | None = None
    num_assistant_tokens: int | None = None
    tokens_per_step: float | None = None
    measured_at: dict[str, Any] | None = None
    modelled: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-safe dictionary."""
        return {"kind": "step", **asdict(self)}


@dataclass(frozen=True)
class Acceptance:
    """Tokens per step that a file of results gives for an arm at a context and batch."""

    file: str
    name: str
    tokens_per_step: float
    context: int
    batch: int


def shape_config(name: str) -> PreTrainedConfig:
    """Return the config of a shape; raise `ValueError` with the allowed names for an unknown one."""
    if name not in SHAPES:
        raise ValueError(f"`--shapes` takes {', '.join(SHAPES)}, got {name!r}.")
    kind, values = SHAPES[name]
    return AutoConfig.for_model(kind, **values)


def build(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Return a model of `config` in evaluation mode with random weights, made on the device itself."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return cast(PreTrainedModel, model.eval())


def weight_bytes(model: PreTrainedModel) -> tuple[int, int]:
    """Return the bytes of all weights of a model, which may be on `meta`, and of those that one forward reads.

    A table of embeddings that is not the head too gives a row per token and is not read otherwise.
    """
    table = cast(torch.Tensor, model.get_input_embeddings().weight)
    total = sum(parameter.numel() for parameter in model.parameters())
    rows_only = table.numel() if model.get_output_embeddings().weight is not table else 0
    return total * table.element_size(), (total - rows_only) * table.element_size()


def kv_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Return the bytes of one token's keys and values in all layers."""
    heads, size = config.num_key_value_heads, config.head_dim
    return int(2 * config.num_hidden_layers * heads * size * dtype.itemsize)


def required_bytes(model: PreTrainedModel, context: int, batch: int, new_tokens: int) -> int:
    """Return about how much memory measuring takes; the model may be on `meta`.

    That is the weights, a gigabyte or less for what forwards hold, and three times the keys and values, with some more
    for drafts: the cache that arms start from, an arm's own, and the one that a strategy gives back at the end.
    """
    weights = weight_bytes(model)[0]
    tokens = batch * (context + new_tokens + 32)
    return weights + int(3.2 * tokens * kv_bytes(model.config, model.dtype)) + min(10**9, 8 * weights)


def random_cache(model: PreTrainedModel, batch: int, tokens: int) -> DynamicCache:
    """Return a stock cache of `tokens` random tokens per row, in place of a prefill that would take hours."""
    config, generator = model.config, torch.Generator(model.device).manual_seed(0)
    cache = DynamicCache(config=config)
    shape = (batch, config.num_key_value_heads, tokens, config.head_dim)
    for layer in range(config.num_hidden_layers):
        keys, values = (
            torch.randn(shape, generator=generator, device=model.device, dtype=model.dtype) for _ in range(2)
        )
        cache.update(keys, values, layer)
    return cache


def kernel_cases(configs: dict[str, PreTrainedConfig], dtype: torch.dtype) -> list[Case]:
    """Return the usual cases of `bench.kernels` for the attention of these shapes, equal ones once."""
    layers: dict[tuple[bool, int, int, int], int] = {}
    for name, config in configs.items():
        key = (name == TINY, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        layers[key] = max(layers.get(key, 0), config.num_hidden_layers)
    cases = []
    for (tiny, heads, key_heads, size), depth in layers.items():
        for name, kind, rows, queries, context, selected, ragged in TINY_SIZES if tiny else SIZES:
            gathers = kind == "gather"
            what = f"{name}, {depth} layers" if gathers else name
            length, used = context + (RECENTS if kind == "draft" else 0), depth if gathers else 1
            sizes = rows, heads, key_heads, size, queries, length, selected, used
            cases.append(Case(what, kind, *sizes, ragged, dtype))
    return cases


def free_bytes(device: torch.device) -> int:
    """Return the free memory of the device; of the whole machine on CPU, and without a limit where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no `sysconf`, and macOS not these names
        return 1 << 62


def read_acceptance(path: Path) -> list[Acceptance]:
    """Return the tokens per step in a file that `hf-specdec bench --json` wrote.

    Raises:
        ValueError: if it is no such file, or no arm in it drafted.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["measurements"]
        found = [
            Acceptance(path.name, row["name"], row["tokens_per_step"], row["context"], row["batch"])
            for row in rows
            if row.get("tokens_per_step")
        ]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"`--acceptance` takes a file that `hf-specdec bench --json` wrote, not {path}.") from error
    if not found:
        raise ValueError(f"No arm in {path} has tokens per step, so `--acceptance` can't read any from it.")
    return found


def find_acceptance(table: Sequence[Acceptance], name: str, context: int, batch: int) -> Acceptance | None:
    """Return the entry for the arm `name` at the context nearest to the wanted one, then the nearest batch.

    Arms match if their settings do, those apart that change no text: how they are compiled, by which kernels they
    attend, from which context on they draft.
    """
    wanted = _settings(name)
    same = [entry for entry in table if wanted is not None and _settings(entry.name) == wanted]
    return min(same, key=lambda e: (abs(e.context - context), abs(e.batch - batch)), default=None)


def _settings(name: str) -> SpeculationConfig | None:
    """Return the settings of an arm without those that leave its text alone; `None` for a name without any."""
    if name.partition("@")[0].partition(":")[0] not in STRATEGIES:
        return None  # a stock arm, or a folder or repository of whose settings nothing is known here
    try:
        config = make_arm(name, None).options["assistant_strategy"]
    except ValueError:
        return None
    neutral = {"compile": None, "kernels": "auto", "min_context": 0}
    return cast(SpeculationConfig, config.override(**{k: v for k, v in neutral.items() if config.has_field(k)}))


def default_arms(device: torch.device) -> list[str]:
    """Return the arms' names: stock static, plain steps and Vegas, in CUDA graphs where there are any."""
    graphs = "compile=graphs+inductor" if device.type == "cuda" else ""
    return ["static", f"plain@{graphs}".rstrip("@"), "vegas@" + ",".join(filter(None, [graphs, "min_context=0"]))]


def measure_shape(
    shape: str,
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sequence[tuple[int, int]],
    arms: Sequence[Arm],
    bandwidth: float,
    memory: int,
    new_tokens: int = 64,
    repeats: int = 3,
    acceptance: Sequence[Acceptance] = (),
    progress: Callable[[str], None] = lambda _: None,
    note: Callable[[str], None] = lambda _: None,
) -> Iterator[list[StepRow]]:
    """Yield one shape's step times at each (context, batch) that fits the memory, where one arm runs at a time.

    Args:
        shape (`str`): key of `SHAPES`.
        dtype (`torch.dtype`): of the weights.
        sizes (`list[tuple[int, int]]`): tokens per row (at least 2), and rows.
        arms (`list[Arm]`): with the stock arm `static` among them for the modelled column.
        acceptance (`list[Acceptance]`, *optional*): measured tokens per step.
        device, bandwidth, memory, note: as for `bench.kernels.measure_kernels`.
        new_tokens, repeats, progress: as for `bench.run.measure`.
    """
    probe, fitting = build(shape_config(shape), dtype, torch.device("meta")), []
    for context, batch in sizes:
        needed = required_bytes(probe, context, batch, new_tokens)
        if needed <= memory:
            fitting.append((context, batch))
        else:
            note(f"left out: {shape} at {context} tokens x {batch} needs {needed / 1e9:.3f} GB of {memory / 1e9:.3f}")
    model = build(probe.config, dtype, device) if fitting else probe
    for context, batch in fitting:
        ids = torch.randint(model.config.vocab_size, (batch, context), generator=torch.Generator().manual_seed(0))
        ids, cache, rows = ids.to(device), random_cache(model, batch, context - 1), []
        for arm in arms:
            _forget_compiled(model)
            try:
                found = measure(model, ids, [arm], new_tokens, repeats, progress, cache=cache)
                reason = "it is limited to one row"
            except torch.cuda.OutOfMemoryError:
                found, reason = [], "the device is out of memory"
            if not found:
                note(f"left out: {arm.name}, {shape} at {context} tokens x {batch}: {reason}")
                continue
            row = _row(shape, arm, found[0], context, batch, acceptance)
            row.weights_ms = weight_bytes(model)[1] / bandwidth / 1e6
            row.kv_ms = batch * context * kv_bytes(model.config, dtype) / bandwidth / 1e6
            if arm.static:
                row.compiled = "_compiled_call" in vars(model)
                if device.type == "cuda" and not row.compiled:
                    note("generate() did not compile the static arm, so it is no fair baseline here.")
            rows.append(row)
        _forget_compiled(model)
        _model_speedups(rows)
        yield rows


def _model_speedups(rows: Sequence[StepRow]) -> None:
    """Note the modelled speed-up of every row that has what it takes, over the static arm of the same size."""
    static = next((row for row in rows if row.name == "static"), None)
    for row in rows:
        gamma, tau, draft, verify = row.num_assistant_tokens, row.tokens_per_step, row.draft_ms, row.verify_ms
        if static is not None and gamma and tau and draft is not None and verify is not None:
            row.modelled = tau * static.ms_per_token / (gamma * draft + verify + (row.rest_ms or 0.0))


def _row(
    shape: str, arm: Arm, found: Measurement, context: int, batch: int, acceptance: Sequence[Acceptance]
) -> StepRow:
    row = StepRow(shape, arm.name, context, batch, found.ms_per_token)
    if found.draft_ms is None or found.verify_ms is None or not found.forwards:
        return row
    row.draft_ms, row.verify_ms, row.select_ms = found.draft_ms, found.verify_ms, found.select_ms
    row.drafts = found.drafts or 0.0
    round_ms = found.ms_per_token / found.forwards
    row.rest_ms = max(0.0, round_ms - row.drafts * found.draft_ms - found.verify_ms)
    row.num_assistant_tokens = arm.options["assistant_strategy"].num_assistant_tokens
    entry = find_acceptance(acceptance, arm.name, context, batch)
    if entry is not None:
        row.tokens_per_step = entry.tokens_per_step
        row.measured_at = {"file": entry.file, "context": entry.context, "batch": entry.batch}
    return row


def _forget_compiled(model: PreTrainedModel) -> None:
    """Give back the memory of captured graphs, and let the next arm compile for its own shapes alone.

    After a few shapes torch.compile would turn to dynamic ones, and then give up: neither is stock at its best.
    """
    vars(model).pop("_compiled_call", None)
    if model.device.type == "cuda":
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
