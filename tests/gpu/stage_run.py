"""`StageRun`: where the results of a measurement go, and how much of its time is left."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_specdec.bench.kernels import copy_bandwidth, timed


class StageRun:
    """One measurement of several stages, each of whose results is written as soon as it is there.

    Args:
        folder (`Path`): gets `results.jsonl`, one result per line, and `tracebacks.txt` with what went wrong.
        budget (`float`): seconds that all stages together may take.
        tiny (`bool`): rehearse on the CPU, in sizes of which no figure means anything.
    """

    def __init__(self, folder: Path, budget: float, tiny: bool) -> None:
        self.folder, self.budget, self.tiny = folder, budget, tiny
        self.device = torch.device("cpu" if tiny else "cuda")
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.stage, self.failed = "", list[str]()
        self._started, self._bandwidth = time.perf_counter(), 0.0
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (time.perf_counter() - self._started)

    def note(self, what: str, **values: Any) -> None:
        """Write one result: the stage's name, `what` it is, and its values."""
        seconds = self.budget - self.left
        line = {"stage": self.stage, "what": what, "at": round(seconds, 1), **values}
        self._append("results.jsonl", json.dumps(line, default=str))
        short = " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())
        print(f"[{seconds:6.1f}] {self.stage}: {what} {short[:230]}", flush=True)

    def _append(self, name: str, text: str) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")

    def run(self, name: str, stage: Callable[[StageRun], None], seconds: float) -> None:
        """Run one stage; an error is written down, and does not stop the stages after it.

        Args:
            name (`str`): of the stage.
            stage (`Callable[[StageRun], None]`): what runs.
            seconds (`float`): how long it takes at most, by estimate. With less than 0.6 of it left, it is left out.
        """
        self.stage = name
        if self.left < 0.6 * seconds:
            self.note("left out: too little time", left=self.left, estimate=seconds)
            return
        before = self.left
        try:
            stage(self)
        except Exception as error:
            self.failed.append(name)
            self.note("FAILED", error=f"{type(error).__name__}: {error}"[:400])
            self._append("tracebacks.txt", f"== {name}\n{traceback.format_exc()}")
        self.free()
        self.note("stage took", seconds=before - self.left)

    @property
    def bandwidth(self) -> float:
        """The rate of a copy in 1e9 bytes per second, reads and writes counted; measured once."""
        self._bandwidth = self._bandwidth or copy_bandwidth(self.device, (1 << 20) if self.tiny else (2 << 30))
        return self._bandwidth

    def timed(self, run: Callable[[], Any], cold: bool = True) -> float:
        """Return the median milliseconds of `run()`; see `bench.kernels.timed`."""
        return timed(run, self.device, 2 if self.tiny else None, cold)

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def free(self) -> None:
        """Give back memory that nothing refers to any more."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
