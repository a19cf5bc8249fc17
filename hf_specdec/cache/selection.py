"""`Selector`: which cached tokens the drafts of a round read, chosen by a verification's scores or by position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..kernels.address import once, upload
from ..kernels.request import ScoreRequest


class Selector:
    """Chooses a list of positions per active row (or per row and key head), layer by layer.

    Args:
        rows (`int`): rows of the batch.
        budget (`Callable[[int, int], int]`): tokens to choose, from the keys in the forward and the tokens to choose
            from.
        request (`ScoreRequest`, *optional*): which scores rank, and whether each key head has its own list.
        sinks (`int`, *optional*, defaults to 0): first tokens that are always chosen.
        newest (`int`, *optional*, defaults to 0): newest candidates that are always chosen.
        by_position (`bool`, *optional*, defaults to `False`): ignore the scores and choose `sinks` first tokens and
            the newest ones.

    Attributes:
        valid (`list[int]`): per active row, positions `[0, valid)` were the candidates of the last selection; 0 before
            the first.
        counts (`list[int]`): per active row, tokens that were chosen.
        selected (`int`): positions in each list, padded to the longest.
    """

    def __init__(
        self,
        rows: int,
        budget: Callable[[int, int], int],
        request: ScoreRequest = ScoreRequest(),  # noqa: B008 (immutable)
        *,
        sinks: int = 0,
        newest: int = 0,
        by_position: bool = False,
    ) -> None:
        self.budget, self.request = budget, request
        self.sinks, self.newest, self.by_position = sinks, newest, by_position
        self.valid: list[int] = [0] * rows
        self.counts: list[int] = [0] * rows
        self.selected = 0
        self.made: dict[Any, Any] = {}

    def begin(self, starts: Sequence[int], last: Sequence[int]) -> None:
        """Prepare for a target forward: sizes per row, common to all layers; arguments as for `ScoreSink.begin`."""
        n = len(starts)
        self.valid[:n] = [start + 1 for start in starts]
        self.counts[:n] = [
            self.budget(start + newest + 1, start + 1) for start, newest in zip(starts, last, strict=True)
        ]
        self.selected = max(self.counts[:n])
        self.made.clear()

    def choose(self, metric: torch.Tensor) -> torch.Tensor:
        """Return a layer's positions by `metric` `[n, S]` (or `[n, h_kv, S]`), sorted by falling score.

        Past a row's count they do not matter.
        """
        n = metric.shape[0]
        if self.by_position:
            chosen = self._window(n, metric.device)
            return chosen[:, None].expand(-1, metric.shape[1], -1) if metric.dim() == 3 else chosen
        longest = max(self.valid[:n])
        metric = metric[..., :longest]
        if min(self.valid[:n]) != longest or self.sinks or self.newest:
            never, always = self._rules(n, longest, metric.device)
            shape = (n, *[1] * (metric.dim() - 2), longest)
            if self.sinks or self.newest:
                metric = metric.masked_fill(always.view(shape), torch.inf)
            metric = metric.masked_fill(never.view(shape), -torch.inf)
        # equal counts need no order; ragged ones cut the sorted list
        ragged = min(self.counts[:n]) != self.selected
        if self.selected < longest:
            return metric.topk(self.selected, dim=-1, sorted=ragged).indices
        if ragged:
            return metric.argsort(dim=-1, descending=True)
        return torch.arange(longest, device=metric.device).expand(metric.shape)

    @once
    def _rules(self, n: int, longest: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which positions can't be chosen, and which must be, `[n, longest]` each."""
        positions = torch.arange(longest, device=device)
        valid = torch.tensor(self.valid[:n], device=device)[:, None]
        return positions >= valid, (positions < self.sinks) | (positions >= valid - self.newest)

    @once
    def _window(self, n: int, device: torch.device) -> torch.Tensor:
        """Return first and newest candidates, `[n, selected]`: a fixed sink plus sliding window."""
        rows = []
        for valid, count in zip(self.valid[:n], self.counts[:n], strict=True):
            sinks = min(self.sinks, count)
            row = torch.cat([torch.arange(sinks), torch.arange(valid - (count - sinks), valid)])
            rows.append(torch.nn.functional.pad(row, (0, self.selected - count)))
        return torch.stack(rows).to(device)

    def swap(self, i: int, j: int) -> None:
        """Exchange the active rows i and j."""
        for values in (self.valid, self.counts):
            values[i], values[j] = values[j], values[i]

    def shrink(self, rows: int) -> None:
        """Forget the rows from number `rows` on, which have finished."""
        del self.valid[rows:], self.counts[rows:]


class FixedSelector(Selector):
    """A selector of fixed shapes, whose numbers live on the device, so that a captured forward can run it.

    Args:
        arguments, rules: as for `Selector`.
        longest (`int`): tokens that a row can have at most.
        device (`torch.device`): where the model is. `fit` comes before the first selection.

    Attributes:
        numbers (`torch.Tensor` of shape `[2, rows]`, int64): `valid` and `counts`.
    """

    def __init__(self, *arguments: Any, longest: int, device: torch.device, **rules: Any) -> None:
        super().__init__(*arguments, **rules)
        self.longest, self._most = longest, 0
        self.numbers = torch.zeros(2, len(self.valid), dtype=torch.int64, device=device)

    def fit(self, slots: int) -> bool:
        """Choose as many tokens as texts of `slots` tokens may need; return whether that has changed."""
        before, most = self._most, min(self.longest, slots)
        self.selected = self._most = self.budget(most, most)
        return self._most != before

    def _send(self) -> None:
        self.numbers[:, : len(self.valid)].copy_(upload([self.valid, self.counts], self.numbers.device))

    def begin(self, starts: Sequence[int], last: Sequence[int]) -> None:
        """Prepare for a target forward."""
        super().begin(starts, last)
        self.selected = self._most
        self._send()

    def choose(self, metric: torch.Tensor) -> torch.Tensor:
        """Return the positions of all layers by `metric` `[layers, n, (h_kv,) S]`, sorted by falling score."""
        n, device = metric.shape[1], metric.device
        valid, counts = self.numbers[:, :n, None]
        heads = [1] * (metric.dim() - 3)
        if self.by_position:
            columns = torch.arange(self.selected, device=device)
            sinks = counts.clamp(max=self.sinks)
            positions = torch.where(columns < sinks, columns, (valid - counts + columns).clamp(min=0))
            return positions.view(1, n, *heads, self.selected).expand(*metric.shape[:-1], -1)
        positions, shape = torch.arange(metric.shape[-1], device=device), (n, *heads, metric.shape[-1])
        if self.sinks or self.newest:
            always = (positions < self.sinks) | (positions >= valid - self.newest)
            metric = metric.masked_fill(always.view(shape), torch.inf)
        metric = metric.masked_fill((positions >= valid).view(shape), -torch.inf)
        return metric.topk(self.selected, dim=-1).indices

    def swap(self, i: int, j: int) -> None:
        """Exchange the active rows i and j."""
        super().swap(i, j)
        self._send()
