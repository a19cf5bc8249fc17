"""`Ranks`: the processes of `torch.distributed` as owners of SPD's stages, and what they say to each other.

Rank 0 controls. With n + 1 ranks ("dedicated") it has no stage and rank s + 1 has stage s; with n ranks ("colocated")
it has the last stage, and rank s + 1 stage s for the others. Messages between two ranks have a fixed order, so that
no tags are needed where a backend has none. Whoever waits gives up after `timeout` seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .depth_map import DepthMap


STOP, PROMPT, TICK = range(3)
"""What rank 0 tells the others to do: end the call, run a row's prompt, make one tick."""

_NOTHING = -1
"""Stands for `None` in a message, and fills what a command does not use."""

CONTROL, REPORT, HIDDEN = range(3)
"""Kinds of messages: commands, what stages report to rank 0, and what a stage hands on to the next."""


class PipelineRankError(RuntimeError):
    """A rank failed, or did not answer in time."""


class Message(NamedTuple):
    """A message on its way: where it lies or will lie, the work in progress, and the other rank."""

    values: torch.Tensor
    work: Any
    rank: int


@dataclass
class Order:
    """What rank 0 says of a tick."""

    length: int | None  # tokens of the text that every stage keeps, after a rejection
    token: int | None  # that enters the first stage
    positions: list[int | None]  # of the token that waits before each stage, where one does

    def encode(self) -> list[int]:
        """Return the order as the numbers of a command."""
        return [_NOTHING if value is None else value for value in (self.length, self.token, *self.positions)]

    @classmethod
    def decode(cls, numbers: Sequence[int]) -> Order:
        """Return the order that `encode` turned into `numbers`."""
        length, token, *positions = (None if number == _NOTHING else number for number in numbers)
        return cls(length, token, positions)


class Ranks:
    """The ranks, as seen by one of them, which waits for another at most `timeout` seconds.

    Attributes:
        rank (`int`): this one.
        stage (`int`, *optional*): the stage that it has.
        dedicated (`bool`): whether the controlling rank has no stage.

    Raises:
        ValueError: if there are neither as many ranks as stages, nor one more.
    """

    def __init__(self, depths: DepthMap, timeout: float) -> None:
        n = depths.stages
        self.depths, self.timeout = depths, timedelta(seconds=timeout)
        self.rank, self.size, self.stage = place_of_stage(n)
        self.dedicated = self.size == n + 1
        self.home = torch.device("cpu")
        self._groups: tuple[Any, Any] | None = None

    def owner(self, stage: int) -> int:
        """Return the rank that has a stage."""
        return stage + 1 if self.dedicated or stage < self.depths.stages - 1 else 0

    @property
    def controls(self) -> bool:
        """Whether this is the controlling rank."""
        return self.rank == 0

    # a call, from beginning to end

    @contextmanager
    def session(self, terms: dict[str, str], device: torch.device) -> Iterator[None]:
        """Connect the ranks and check that they agree; afterwards, and after an exception, none of them waits.

        `terms` must be the same on all ranks, `device` is that of this rank's stage.

        Raises:
            ValueError: if the ranks were called with different arguments; on all of them.
            PipelineRankError: if a rank failed or did not answer.
        """
        agreed = False
        try:
            self._connect(device)
            self._agree(terms)
            agreed = True
            yield
        except BaseException as error:
            if self.controls and agreed and not isinstance(error, PipelineRankError):
                with suppress(Exception):
                    self.command(STOP, 1)
                    self._reasons(f"{type(error).__name__}: {error}")
            self._disconnect()
            raise

    def failed(self, error: BaseException | None) -> PipelineRankError:
        """Tell each other what went wrong, once rank 0 has stopped the call, and return it as an error to raise."""
        reasons = self._reasons(None if error is None else f"{type(error).__name__}: {error}")
        told = "; ".join(f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason)
        return PipelineRankError(f"A rank of the pipeline failed ({told}).")

    def _connect(self, device: torch.device) -> None:
        """Make the groups of this call's timeout, once per process."""
        key = (self.size, self.timeout)
        if key not in _connected:
            with self._patience("all ranks"):
                # control stays on the CPU: reading it must not wait for a device
                control = dist.new_group(backend="gloo", timeout=self.timeout)
                _connected[key] = control, dist.new_group(timeout=self.timeout)
        self._groups = _connected[key]
        if dist.get_backend(self._groups[1]) != "gloo":
            self.home = device

    def _disconnect(self) -> None:
        """Close this call's connections, so that a rank that waits for this one learns of it at once."""
        groups = _connected.pop((self.size, self.timeout), None)
        self._groups = None
        for group in groups or ():
            with suppress(Exception):
                group.abort()
            with suppress(Exception):
                dist.destroy_process_group(group)

    def _agree(self, terms: dict[str, str]) -> None:
        told: list[Any] = self._gather(terms)
        differing = [
            f"`{name}` on rank {rank}"
            for name in terms
            for rank, other in enumerate(told)
            if other.get(name) != told[0].get(name)
        ]
        if differing:
            raise ValueError(
                f"With `schedule='dist'` all ranks must call `generate()` alike; {', '.join(differing)} differs from "
                "rank 0's. (To decode other prompts on each rank, pass `schedule='serial'`.)"
            )

    def _reasons(self, reason: str | None) -> list[str | None]:
        try:
            return self._gather(reason)
        except PipelineRankError as error:
            return [None] * self.rank + [reason or str(error)]

    def _gather(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        with self._patience("all ranks"):
            dist.all_gather_object(found, value, group=self._group(0))
        return found

    # messages

    def command(self, what: int, *numbers: int) -> None:
        """Tell all other ranks what to do; `numbers` says how, at most `n + 2` of them."""
        message = torch.full((self.depths.stages + 3,), _NOTHING, dtype=torch.int64)
        message[: 1 + len(numbers)] = torch.tensor([what, *numbers])
        for sent in [self._send(message, rank, CONTROL) for rank in range(1, self.size)]:
            self.wait(sent)

    def receive_command(self) -> list[int]:
        """Wait for what rank 0 says, and return it as numbers (see `command`)."""
        command = self._receive(torch.empty(self.depths.stages + 3, dtype=torch.int64), 0, CONTROL)
        return self.wait(command).tolist()

    def send(self, states: torch.Tensor, rank: int, kind: int) -> Message:
        """Begin to send states `[1, m, H]`, as `REPORT` or `HIDDEN`."""
        return self._send(states.to(self.home).contiguous(), rank, kind)

    def receive(self, shape: tuple[int, int, int], dtype: torch.dtype, rank: int, kind: int) -> Message:
        """Begin to receive states of a shape `[1, m, H]`, as `REPORT` or `HIDDEN`."""
        return self._receive(torch.empty(shape, dtype=dtype, device=self.home), rank, kind)

    def share(self, values: torch.Tensor) -> None:
        """Copy rank 0's int64 `values`, on the CPU, to all others, in place."""
        with self._patience("all ranks"):
            dist.broadcast(values, 0, group=self._group(0))

    def wait(self, message: Message) -> torch.Tensor:
        """Wait until a message has been sent or received, and return what it holds."""
        with self._patience(f"rank {message.rank}"):
            message.work.wait(self.timeout)
        return message.values

    def _send(self, values: torch.Tensor, rank: int, kind: int) -> Message:
        with self._patience(f"rank {rank}"):
            return Message(values, dist.isend(values, rank, group=self._group(kind), tag=kind), rank)

    def _receive(self, values: torch.Tensor, rank: int, kind: int) -> Message:
        with self._patience(f"rank {rank}"):
            return Message(values, dist.irecv(values, rank, group=self._group(kind), tag=kind), rank)

    def _group(self, kind: int) -> Any:
        if self._groups is None:
            raise PipelineRankError("The connection to the other ranks was closed after an error.")
        return self._groups[0 if kind == CONTROL else 1]

    @contextmanager
    def _patience(self, whom: str) -> Iterator[None]:
        try:
            yield
        except PipelineRankError:
            raise
        except RuntimeError as error:  # what torch.distributed raises for timeouts and closed connections
            raise PipelineRankError(
                f"Rank {self.rank} waited for {whom}, which failed or did not answer within "
                f"{self.timeout.total_seconds():g} s: {error}"
            ) from error


_connected: dict[tuple[int, timedelta], tuple[Any, Any]] = {}


def place_of_stage(stages: int, rank: int | None = None, size: int | None = None) -> tuple[int, int, int | None]:
    """Return rank, number of ranks, and the stage that the rank has, by default of this process.

    Raises:
        ValueError: if there are neither as many ranks as stages, nor one more.
    """
    rank = dist.get_rank() if rank is None else rank
    size = dist.get_world_size() if size is None else size
    if size not in (stages, stages + 1):
        raise ValueError(
            f"`schedule='dist'` with {stages} stages needs {stages} ranks, or {stages + 1} to give the draft module "
            f"its own; there are {size}. (To decode other prompts on each rank, pass `schedule='serial'`.)"
        )
    if rank:
        return rank, size, rank - 1
    return rank, size, None if size == stages + 1 else stages - 1
