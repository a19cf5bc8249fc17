"""Which implementation attends: the table of them, what each one can't do, and the choice for a forward.

Every implementation says by itself what it lacks for given arguments, so a choice is a walk down a list. A kernel that
the caller named is taken or refused; with `"auto"` the next one is taken, and the choice is logged once.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from transformers.utils import logging

from . import explicit, flash, packed
from .packed import Attention
from .request import AttentionRules, DraftView, Request
from .step import Step


logger = logging.get_logger(__name__)

_EXPLICIT_QUERIES = 16
"""Queries per row up to which explicit attention is chosen on CPU; more would hold too large a score tensor."""


def _explicit_lacks(request: Request) -> str | None:
    if request.queries > _EXPLICIT_QUERIES and not (request.softcap or request.sinks):
        return f"a tensor of all scores is too large for more than {_EXPLICIT_QUERIES} queries per row"
    return None


def _explicit(query: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    if query.shape[2] <= _EXPLICIT_QUERIES:
        return explicit.cached_attention(query, *others)
    return packed.in_pieces(explicit.cached_attention, _EXPLICIT_QUERIES)(query, *others)


def _sdpa_lacks(request: Request) -> str | None:
    return "it has no soft-cap and no sinks" if request.softcap or request.sinks else None


def _triton(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    from . import fused  # triton is optional

    return fused.cached_attention(*arguments)


@functools.lru_cache(maxsize=1024)
def _triton_lacks(request: Request) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'hf-specdec[cuda]')"
    from . import fused

    return fused.lacks(request)


_LACKS: dict[str, Callable[[Request], str | None]] = {
    "flash": flash.lacks,
    "triton": _triton_lacks,
    "explicit": _explicit_lacks,
    "sdpa": _sdpa_lacks,
}
_ATTENTIONS: dict[str, Attention] = {
    "flash": flash.cached_attention,
    "triton": _triton,
    "explicit": _explicit,
    "sdpa": packed.cached_attention,
}
_ORDERS = {"cuda": ("flash", "triton", "sdpa", "explicit")}
_ELSEWHERE = ("explicit", "sdpa")


def check(name: str, request: Request) -> None:
    """Raise `ValueError` if the kernel `name`, which a config asks for, can't serve a model's plain steps."""
    reason = None if name == "auto" else _LACKS[name](request)
    if reason is not None:
        can = [other for other in _LACKS if _LACKS[other](request) is None]
        raise ValueError(
            f"`kernels={name!r}` can't be used here: {reason}; allowed: 'auto', {', '.join(map(repr, can))}."
        )


@functools.lru_cache(maxsize=1024)  # asked for every layer of every forward
def choose(name: str, request: Request) -> str:
    """Return the kernel for `request`: the one that is asked for where it can serve it, else the first that can."""
    order = _ORDERS.get(request.device, _ELSEWHERE)
    reason = None if name == "auto" else _LACKS[name](request)
    if name != "auto" and reason is None:
        return name
    chosen = next(other for other in order if _LACKS[other](request) is None)
    if reason is not None and name != "flash":  # of which it is known that it serves some forwards only
        logger.warning_once(f"`kernels={name!r}` can't serve every forward: {reason}. {chosen!r} serves such ones.")
    elif request.device == "cuda" and chosen in _ELSEWHERE:
        logger.warning_once(f"hf_specdec attends by {chosen!r}, not by its Triton kernels: {_triton_lacks(request)}.")
    else:
        logger.info_once(f"hf_specdec attends by {chosen!r} on {request.device} (`kernels={name!r}`).")
    return chosen


def uses_triton(name: str, request: Request) -> bool:
    """Whether drafts attend, and chosen tokens are gathered, by Triton's kernels."""
    named = name == "triton" or (request.device == "cuda" and name in ("auto", "flash"))
    return named and _triton_lacks(request) is None


def attend_layer(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    step: Step,
    layer_idx: int,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return one layer's attention `[n, h_q, m, d_v]` over what the cache's `update` returned for it."""
    step.layers_attended += 1
    if step.view is not None and step.view.covers(layer_idx):
        return _attend_side(query, key, value, step, step.view, AttentionRules(scaling, None, softcap, sinks))
    score = step.score if step.score is not None and step.score.wants(layer_idx) else None
    asked = None if score is None else score.request
    rules = AttentionRules(scaling, step.windows[layer_idx], softcap, sinks, asked)
    attention = _ATTENTIONS[choose(step.kernels, Request.read(query, value, rules))]
    output, metric = attention(query, key, value, step.address, rules)
    if score is not None and metric is not None:
        keys, values = step.storage
        if metric.dim() == 3 and metric.shape[1] != keys.shape[1]:  # JetMoE repeats the heads that the cache holds
            metric = metric.unflatten(1, (-1, keys.shape[1])).mean(dim=1)
        score.take(layer_idx, metric, step.address, keys, values)
    return output


def _attend_side(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: Step, view: DraftView, rules: AttentionRules
) -> torch.Tensor:
    """Attend over a view's side buffer, by Triton's kernel or in PyTorch; `[n, h_q, 1, d_v]`."""
    if uses_triton(step.kernels, Request.read(query, value, rules)):
        from . import fused

        return fused.side_attention(query, key, value, step.side_range(view, query.device), rules)
    bias = step.side_bias(view, key.shape[2], query.device, query.dtype)
    return explicit.side_attention(query, key, value, bias, rules)
