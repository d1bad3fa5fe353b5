"""The GPU's state is that during the run, not after it; by a reader that is no GPU."""

from __future__ import annotations

import threading
import time

import pytest

from bench import nvml
from bench.nvml import Sample, Sampler


def test_samples_are_taken_while_the_work_runs() -> None:
    """Idle before and after, busy between: the summary is of the busy samples."""
    busy, seen = threading.Event(), threading.Event()

    def read() -> Sample:
        if not busy.is_set():
            return Sample(time.monotonic(), power_w=70.0, clock_mhz=345.0, temp_c=30, reasons=1)
        seen.set()
        return Sample(time.monotonic(), power_w=690.0, clock_mhz=1755.0, temp_c=64, reasons=0x4)

    with Sampler(read, period=0.001) as sampler:
        busy.set()
        assert seen.wait(5)
        time.sleep(0.02)
        last = len(sampler.samples)
        busy.clear()
    sampler.samples = [*sampler.samples[:last], sampler.samples[-1]]
    summary = sampler.summary()
    assert summary["power_w"] > 600 and summary["clock_mhz"] == 1755.0
    assert summary["temp_c"] == 64 and summary["slowed_by"] == ["power cap"]


def summary_of(samples: list[Sample]) -> dict:
    sampler = Sampler(lambda: samples[0])
    sampler.samples = samples
    return sampler.summary()


def test_energy_is_the_counter_or_the_area_under_the_power() -> None:
    counted = [Sample(0.0, 100.0, energy_j=50.0), Sample(2.0, 300.0, energy_j=500.0)]
    assert summary_of(counted)["energy_j"] == 450.0
    area = [Sample(0.0, 100.0), Sample(2.0, 300.0), Sample(3.0, 300.0)]
    assert summary_of(area)["energy_j"] == pytest.approx(2 * 200 + 300)
    assert summary_of([Sample(0.0, 100.0), Sample(2.0)])["energy_j"] is None
    assert summary_of([Sample(0.0)])["power_w"] is None


def test_reasons_by_name() -> None:
    found = summary_of([Sample(0.0), Sample(1.0, reasons=0x25), Sample(2.0)])["slowed_by"]
    assert found == ["power cap", "thermal (software)"]


def test_without_a_gpu_everything_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert nvml.reader() is None and nvml.describe() is None
    with Sampler() as sampler:
        pass
    summary = sampler.summary()
    assert summary.pop("slowed_by") == [] and set(summary.values()) == {None}


def test_the_first_visible_device_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda i: ("index", i))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda u: ("uuid", u))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda h: f"GPU {h}".encode())
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "570")
    for visible, handle in (("3,1", ("index", 3)), ("GPU-ab", ("uuid", "GPU-ab"))):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        found = nvml.describe()
        assert found and found["device"] == f"GPU {handle}" and found["driver"] == "570"
        assert found["power_limit_w"] is None  # not permitted here
