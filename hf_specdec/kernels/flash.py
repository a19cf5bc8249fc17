"""Attention through the package flash-attn, where it is installed and nobody wants token scores."""

from __future__ import annotations

import functools

import torch

from .address import Address
from .request import AttentionRules, Request


_LARGEST = 256


@functools.cache
def _installed() -> bool:
    try:  # some packages of this name have other parts only
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        return False
    return callable(flash_attn_with_kvcache)


def lacks(request: Request) -> str | None:
    """Return why flash-attn can't serve `request`, `None` if it can."""
    if not _installed():
        return "the package flash-attn is not installed"
    if request.device != "cuda":
        return f"flash-attn runs on CUDA devices, not on {request.device!r}"
    if request.dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn takes float16 and bfloat16, not {request.dtype}"
    if request.size > _LARGEST or request.size % 8 or request.size != request.value_size:
        return (
            f"flash-attn takes equal head sizes that are multiples of 8 up to {_LARGEST}, not {request.size} and "
            f"{request.value_size}"
        )
    if request.sinks:
        return "flash-attn has no learned sinks"
    if request.score is not None:
        return "flash-attn keeps the scores of the tokens to itself"
    return None


def cached_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, address: Address, rules: AttentionRules
) -> tuple[torch.Tensor, None]:
    """Attend over the cache's storage; arguments and results as for `explicit.cached_attention`.

    Raises:
        ValueError: with `sinks` or `score`, which flash-attn does not offer.
    """
    if rules.sinks is not None or rules.score is not None:
        raise ValueError("flash-attn supports neither sinks nor token scores.")
    from flash_attn import flash_attn_with_kvcache

    # the fed tokens are in the storage already, so the lengths include them; causal counts from their end
    output = flash_attn_with_kvcache(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        cache_seqlens=address.ends_on(query.device, torch.int32),
        softmax_scale=rules.scaling,
        causal=True,
        window_size=(-1, -1) if rules.window is None else (rules.window - 1, 0),
        softcap=rules.softcap or 0.0,
    )
    return output.transpose(1, 2), None
