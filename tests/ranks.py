"""Running a function on several processes of `torch.distributed`, over gloo on this machine."""

from __future__ import annotations

import io
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


LIMIT = 120
"""Seconds until processes that still run are killed."""


class Died:
    """Stands for what a process returned that ended without returning."""


def run_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what `function(rank, *arguments)` returned on each of `size` ranks, or the exception that it raised.

    The function and all that it returns must be picklable; `Died` stands for a process that ended by itself.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ranks_preload"])  # imports once what every process needs
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes, processes = [], []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        processes.append(context.Process(target=_run, args=(rank, size, port, theirs, function, arguments)))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    end, found = time.monotonic() + LIMIT, []
    for pipe, process in zip(pipes, processes, strict=True):
        try:
            answered = pipe.poll(max(0.0, end - time.monotonic()))
            found.append(_read(pipe.recv_bytes()) if answered else TimeoutError(f"no answer within {LIMIT} s"))
        except EOFError:
            found.append(Died())
        process.join(5)
        process.kill()
    return found


def _read(content: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(content), weights_only=False)


def _run(rank: int, size: int, port: int, pipe: Any, function: Any, arguments: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    try:
        result = function(rank, *arguments)
    except BaseException as error:  # noqa: BLE001 - handed to the test
        traceback.print_exc()
        result = error
    stream = io.BytesIO()
    torch.save(result, stream)  # whole tensors: those of the pipe itself are shared with a process that ends here
    pipe.send_bytes(stream.getvalue())
    pipe.close()
    os._exit(0)  # without waiting for ranks that may be gone
