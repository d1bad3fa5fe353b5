"""What stands in for CUDA events in tests of the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.timing import Timed


def two_milliseconds(
    prepare: Callable[[], Any], call: Callable[[Any], Any], l2: str = "cold"
) -> Timed:
    """A timer: runs the call once; the median is 2 ms."""
    call(prepare())
    return Timed([1.0, 2.0, 3.0], {"clock_mhz": 1980.0, "slowed_by": []})


class FakeClock:
    """A step clock on which every step takes 4 ms."""

    def __init__(self) -> None:
        self.marks = self.steps = 0

    def mark(self) -> None:
        self.marks += 1

    def intervals(self) -> list[float]:
        marks, self.marks = self.marks, 0
        self.steps += marks - 1
        return [4.0] * (marks - 1)
