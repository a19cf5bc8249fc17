"""`Step`: one forward in progress, which travels to the attention function as the keyword `specdec_step`."""

from __future__ import annotations

from typing import Any

import torch

from .address import Address, once
from .request import TOKENS_ONLY, DraftView, ForwardRequest, SideRange


class Step:
    """What a forward addresses, who watches it and what attends; and what is learned while its layers run.

    Args:
        address (`Address`): where its tokens lie.
        request (`ForwardRequest`, *optional*): what it is asked beside its tokens.
        kernels (`str`, *optional*, defaults to `"auto"`): which implementation attends; see `kernels.choice`.

    Attributes:
        windows (`dict[int, int | None]`): the window of each layer that has attended.
        layers_seen, layers_attended (`int`): layers that have written the cache, and that have attended.
        storage (`tuple`): keys and values `[n, h_kv, capacity, d]` of the layer that has written last. A model may
            attend to others, which it made of these.
    """

    def __init__(self, address: Address, request: ForwardRequest = TOKENS_ONLY, kernels: str = "auto") -> None:
        self.address, self.kernels = address, kernels
        self.score, self.view = request.score, request.view
        self.windows: dict[int, int | None] = {}
        self.layers_seen = self.layers_attended = 0
        self.storage: tuple[torch.Tensor, torch.Tensor]
        self.made: dict[Any, Any] = {}

    @once
    def side_range(self, view: DraftView, device: torch.device) -> SideRange:
        """Return what each active row reads of `view` in any layer."""
        reads, n = view.reads(device), self.address.rows
        return reads._replace(counts=reads.counts[:n], ends=reads.ends[:n])

    @once
    def side_bias(self, view: DraftView, width: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor | None:
        """Return the same as a mask to add to scores `[n, h_q, 1, width]`; `None` if all rows read all columns."""
        counts, ends, selected, whole = self.side_range(view, device)
        if whole:
            return None
        columns = torch.arange(width, device=device)
        read = (columns < counts[:, None]) | ((columns >= selected) & (columns < ends[:, None]))
        return torch.zeros(read.shape, dtype=dtype, device=device).masked_fill_(~read, -torch.inf)[:, None, None]

    @once
    def joined(self, dim: int, *parts: torch.Tensor) -> torch.Tensor:
        """Return what a layer gets for several tokens, `parts`, in one tensor."""
        return torch.cat(parts, dim=dim)
