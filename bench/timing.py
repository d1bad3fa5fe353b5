"""Times on the GPU: CUDA events, every repetition kept, an explicit L2 policy.

Each repetition prepares its inputs, evicts L2 (policy "cold"), holds the stream for a moment so
that the host runs ahead of the GPU, and records two events around the call. A repetition whose
first event the GPU had passed before the host had queued the second is discarded, and the hold is
doubled: what is timed is the GPU's work, not the launch. A call that itself waits for the GPU can
never be timed so; its rows say how many repetitions were late. L2 is evicted by reading: what
preparation left dirty is written back before the clock starts, and the lines that take its place
are clean, so that no write-back of ours is counted as the kernel's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch

from bench.nvml import Sampler

WARMUP = 5
REPEATS = 50
FLUSH_BYTES = 512 << 20  # eight times the 60 MB of an H200's L2
HOLD_CYCLES, LONGEST_HOLD = 1_000_000, 64_000_000  # about half a millisecond, and 32


class Timed(NamedTuple):
    """Milliseconds of each repetition, and the GPU's state while they ran (nvml.Sampler)."""

    ms: list[float]
    device: dict[str, Any]


class Timer(Protocol):
    """Times call(prepare()), prepare untimed, under an L2 policy of "cold" or "warm"."""

    def __call__(
        self, prepare: Callable[[], Any], call: Callable[[Any], Any], l2: str = "cold"
    ) -> Timed: ...


def cuda_timer(prepare: Callable[[], Any], call: Callable[[Any], Any], l2: str = "cold") -> Timed:
    """`Timer` with CUDA events: WARMUP calls, then REPEATS of them.

    "cold" reads FLUSH_BYTES between preparation and call; "warm" leaves in L2 what preparation put
    there, as a producer does. "host_late" of the row: repetitions that may hold launch time,
    because the longest hold did not let the host run ahead.
    """
    flush = torch.zeros(FLUSH_BYTES // 4, device="cuda") if l2 == "cold" else None
    milliseconds: list[float] = []
    hold, late = HOLD_CYCLES, 0
    for _ in range(WARMUP):
        call(prepare())
    with Sampler() as sampler:
        while len(milliseconds) < REPEATS:
            state = prepare()
            if flush is not None:
                flush.amax()
            torch.cuda._sleep(hold)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call(state)
            end.record()
            behind = start.query()  # the GPU was there before the whole call was queued
            end.synchronize()
            if behind and hold < LONGEST_HOLD:
                hold *= 2
                continue
            late += behind
            milliseconds.append(start.elapsed_time(end))
    device = sampler.summary()
    del device["energy_j"]  # most of it is preparation's
    return Timed(milliseconds, device | {"host_late": late})


class StepClock(Protocol):
    """Marks the ends of steps without holding up the device; `intervals` waits for it."""

    def mark(self) -> None: ...

    def intervals(self) -> list[float]:
        """Milliseconds between successive marks; forgets them."""


class WallClock:
    """For the CPU."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        self._marks.append(time.perf_counter())

    def intervals(self) -> list[float]:
        marks, self._marks = self._marks, []
        return [1e3 * (b - a) for a, b in pairwise(marks)]


class CudaClock:
    """CUDA events: the host queues the next step while the GPU is busy with this one."""

    def __init__(self) -> None:
        self._marks: list[torch.cuda.Event] = []

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def intervals(self) -> list[float]:
        torch.cuda.synchronize()
        marks, self._marks = self._marks, []
        return [a.elapsed_time(b) for a, b in pairwise(marks)]


def step_clock(device: torch.device) -> StepClock:
    return CudaClock() if device.type == "cuda" else WallClock()
