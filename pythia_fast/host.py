"""The trainer and its host: memory kept, time taken, signals noted."""

from __future__ import annotations

import ctypes
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pythia_fast.progress import say


def keep_freed_memory() -> None:
    """Stops glibc from handing large blocks back to the kernel at each free.

    Activations would otherwise be mapped and zeroed anew every step: 0.64 against 0.53 s a step of
    the quickstart on two cores. M_MMAP_THRESHOLD = -3 and M_TRIM_THRESHOLD = -1 of malloc.h.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 1 << 30)
        mallopt(-1, (1 << 31) - 1)


class Clock:
    """Tokens per second since the last reading; saving and validation are left out."""

    def __init__(self, tokens_per_step: int) -> None:
        self._tokens_per_step = tokens_per_step
        self.restart()

    def restart(self) -> None:
        self._since, self._steps = time.perf_counter(), 0

    def tick(self) -> None:
        self._steps += 1

    def rate(self) -> float:
        rate = self._steps * self._tokens_per_step / (time.perf_counter() - self._since)
        self.restart()
        return rate


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM land in the list and end the run after its step; two SIGINT at once."""
    arrived: list[int] = []

    def note(signum: int, _: object) -> None:
        again = bool(arrived)
        arrived.append(signum)
        if not again:
            say(f"{signal.Signals(signum).name}: saving after this step (Ctrl-C again: at once)")
        elif signum == signal.SIGINT:  # a job's manager and torchrun may both pass on a SIGTERM
            raise KeyboardInterrupt

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield arrived
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
