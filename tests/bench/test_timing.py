"""The CUDA timer against a simulated stream: the device's time alone, never the launch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import timing


class Stream:
    """A host clock and a device clock, in milliseconds; the device runs what the host queued."""

    def __init__(self, launch_ms: float, work_ms: float, waits: bool = False) -> None:
        self.host = self.device = 0.0
        self.launch_ms, self.work_ms, self.waits = launch_ms, work_ms, waits
        self.calls = 0

    def queue(self, ms: float) -> None:
        self.device = max(self.device, self.host) + ms

    def call(self, _: Any) -> None:
        self.calls += 1
        if self.waits:
            self.host = max(self.host, self.device)
        self.host += self.launch_ms
        self.queue(self.work_ms)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stream = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                stream.queue(0.0)
                self.at = stream.device

            def query(self) -> bool:
                return self.at <= stream.host

            def synchronize(self) -> None:
                stream.host = max(stream.host, self.at)

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: stream.queue(cycles / 2e6))


def timed(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> timing.Timed:
    stream.install(monkeypatch)
    return timing.cuda_timer(lambda: None, stream.call, l2="warm")


@pytest.mark.parametrize("launch_ms", [0.01, 0.4, 3.0, 20.0])
def test_launch_time_is_not_counted(launch_ms: float, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(launch_ms, work_ms=0.05)
    found = timed(stream, monkeypatch)
    assert found.ms == pytest.approx([0.05] * timing.REPEATS)
    assert found.device["host_late"] == 0
    discarded = stream.calls - timing.WARMUP - timing.REPEATS
    assert discarded == sum(0.5 * 2**i <= launch_ms for i in range(7))


def test_a_call_that_waits_for_the_device_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    found = timed(Stream(launch_ms=1.0, work_ms=0.05, waits=True), monkeypatch)
    assert found.device["host_late"] == timing.REPEATS == len(found.ms)


def test_mutant_without_the_discard_counts_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "LONGEST_HOLD", timing.HOLD_CYCLES)
    found = timed(Stream(launch_ms=3.0, work_ms=0.05), monkeypatch)
    assert min(found.ms) > 2.0 and found.device["host_late"] == timing.REPEATS
