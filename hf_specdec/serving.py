"""Serving: the app of `transformers serve` with a strategy in its `generate()`, and totals for Prometheus."""

from __future__ import annotations

import functools
import inspect
import threading
from collections import deque
from typing import Any
from weakref import WeakSet

import transformers
from transformers import PreTrainedModel
from transformers.utils import logging

from . import _compat
from .generation.admission import layer_windows
from .generation.loop import DecodingLoop
from .generation.models.draft_model import load_assistant
from .generation.stats import SpeculationStats, on_speculation
from .integration import install
from .resolve import resolve_strategy


logger = logging.get_logger(__name__)

_TOTALS = {
    "calls": "Answers decoded under the strategy",
    "draft_tokens": "Tokens drafted",
    "accepted_tokens": "Drafted tokens that were emitted",
    "emitted_tokens": "Tokens emitted by target steps; the first token of an answer is the prefill's and not counted",
    "steps": "Target steps, counted per row",
    "target_forwards": "Forwards of the whole target, prefills excluded",
    "draft_forwards": "Forwards that drafted",
}
_RATES = {
    "acceptance_rate": ("Accepted over drafted tokens", "accepted_tokens", "draft_tokens"),
    "mean_tokens_per_step": ("Emitted tokens per target step", "emitted_tokens", "steps"),
}


class SpeculationMetrics:
    """Totals of answers per strategy, in Prometheus' text format. Threads may record and read at the same time.

    Args:
        window (`int`, *optional*, defaults to 100): answers over which the rates are taken, the last ones.
    """

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, window: int = 100) -> None:
        if window < 1:
            raise ValueError(f"`window` must be at least 1, got {window}.")
        self.window = window
        self._lock = threading.Lock()
        self._totals: dict[str, dict[str, int]] = {}
        self._recent: dict[str, deque[dict[str, int]]] = {}

    def record(self, stats: SpeculationStats) -> None:
        """Add one call; a callback for `on_speculation`."""
        counts = {
            "calls": 1,
            "draft_tokens": stats.num_draft_tokens,
            "accepted_tokens": stats.num_accepted_tokens,
            "emitted_tokens": sum(map(sum, stats.accept_lengths)),
            "steps": sum(map(len, stats.accept_lengths)),
            "target_forwards": stats.target_forwards,
            "draft_forwards": stats.draft_forwards,
        }
        with self._lock:
            totals = self._totals.setdefault(stats.strategy, dict.fromkeys(_TOTALS, 0))
            for name, count in counts.items():
                totals[name] += count
            self._recent.setdefault(stats.strategy, deque(maxlen=self.window)).append(counts)

    def render(self) -> str:
        """Return all figures as Prometheus reads them; a rate that nothing was counted for is left out."""
        with self._lock:
            totals = {strategy: dict(counts) for strategy, counts in self._totals.items()}
            recent = {strategy: list(answers) for strategy, answers in self._recent.items()}
        lines = []
        for name, text in _TOTALS.items():
            lines += _head(f"{name}_total", "counter", text)
            lines += [_sample(f"{name}_total", strategy, counts[name]) for strategy, counts in totals.items()]
        for name, (text, over, under) in _RATES.items():
            lines += _head(name, "gauge", f"{text}, over the last {self.window} answers")
            for strategy, answers in recent.items():
                count = sum(answer[under] for answer in answers)
                if count:
                    lines.append(_sample(name, strategy, sum(answer[over] for answer in answers) / count))
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP hf_specdec_{name} {text}.", f"# TYPE hf_specdec_{name} {kind}"]


def _sample(name: str, strategy: str, value: float) -> str:
    return f'hf_specdec_{name}{{strategy="{strategy}"}} {value}'


def serve(
    model: str,
    *,
    strategy: str | None = None,
    strategy_config: dict[str, Any] | None = None,
    assistant: str | None = None,
    **options: Any,
) -> None:
    """Serve `model` by the app of `transformers serve`, decoding with a strategy, until the process is stopped.

    Args:
        model (`str`): folder or Hub name.
        strategy (`str`, *optional*): what `assistant_strategy` would be; by default what the model's
            `generation_config.json` names.
        strategy_config (`dict`, *optional*): settings that differ from the strategy's.
        assistant (`str`, *optional*): folder or Hub name of a second model, for strategies that draft with one.
        options: passed on to `transformers serve`, such as `host`, `port`, `device` and `dtype`.

    Raises:
        ImportError: if the packages that serving needs are not installed.
        ValueError: for an option that this release of Transformers does not have, one that takes decoding away from
            `generate()`, a strategy that is unknown or does not fit the model, and if there is none.
    """
    command = _compat.serve_command()
    _check_options(command, options)
    if strategy is not None:
        resolve_strategy(strategy, strategy_config)  # before minutes of loading
    elif strategy_config is not None:
        raise ValueError("`strategy_config` was given without `strategy`.")
    metrics, prepared = SpeculationMetrics(), WeakSet[Any]()

    def prepare(loaded: PreTrainedModel) -> None:
        if loaded not in prepared:
            _prepare(loaded, strategy, strategy_config, assistant)
            prepared.add(loaded)

    def extend(app: Any, model_manager: Any) -> None:
        _compat.on_model_load(model_manager, prepare)
        _extend(app, metrics)

    install()
    with on_speculation(metrics.record), _compat.extended_server(extend):
        command(force_model=model, **options)


def _check_options(command: type, options: dict[str, Any]) -> None:
    """Raise `ValueError` for options that can't be passed on to `command`."""
    known = inspect.signature(command).parameters
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"`transformers serve` of release {transformers.__version__} has no option {', '.join(unknown)}; its "
            f"options: {', '.join(sorted(known))}."
        )
    for name in ("continuous_batching", "compile"):
        if options.get(name):
            raise ValueError(f"`{name}` can't be served with a strategy: it decodes by other means than the strategy.")


def _prepare(model: Any, strategy: str | None, strategy_config: dict[str, Any] | None, assistant: str | None) -> None:
    """Give a loaded model its strategy and assistant; what can't work is said now, not at the first request."""
    config = model.generation_config
    if strategy is not None:
        config.assistant_strategy, config.assistant_strategy_config = strategy, strategy_config
    if config.assistant_strategy is None:
        raise ValueError(
            f"The generation config of {model.name_or_path!r} names no `assistant_strategy`: give `--strategy`, or "
            "save one with `hf_specdec.save_strategy`."
        )
    layer_windows(model)
    second = None
    if assistant is not None:
        second = load_assistant(model, assistant, str(model.dtype).removeprefix("torch."), str(model.device))
    loop = DecodingLoop(
        resolve_strategy(config.assistant_strategy, config.assistant_strategy_config), assistant_model=second
    )
    loop.make_strategy().prepare(model)  # adapters are read here
    if second is not None:
        # the server has no place for it
        model.generate = functools.partial(model.generate, assistant_model=second)


def _extend(app: Any, metrics: SpeculationMetrics) -> None:
    """Add `/metrics`, and answer 400 with the message to what the strategy, or `generate()`, refuses."""
    from fastapi.responses import JSONResponse, PlainTextResponse

    def show_metrics() -> Any:
        return PlainTextResponse(metrics.render(), media_type=metrics.content_type)

    async def refuse(request: Any, error: Exception) -> Any:
        logger.warning(f"{request.url.path}: {type(error).__name__}: {error}", exc_info=error)
        return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=400)

    app.add_api_route("/metrics", show_metrics, methods=["GET"], response_model=None)
    for kind in (ValueError, TypeError):
        app.add_exception_handler(kind, refuse)
