"""What the GPU does while it is measured: power, clocks, temperature, why it slows down, energy.

Read by a thread during the timed calls, because a GPU that has just run dry says nothing about
them. Everything is None or empty where NVML, the device or the permission is missing.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Any, Self

PERIOD = 0.02  # seconds between samples
# bits of nvmlClocksEventReasons (nvml.h)
REASONS = {
    0x001: "idle",
    0x002: "application clocks",
    0x004: "power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "thermal (software)",
    0x040: "thermal (hardware)",
    0x080: "power brake",
    0x100: "display clocks",
}


@dataclass(frozen=True)
class Sample:
    """seconds: of a monotonic clock; energy_j: since the driver was loaded."""

    seconds: float
    power_w: float | None = None
    clock_mhz: float | None = None
    temp_c: float | None = None
    reasons: int = 0
    energy_j: float | None = None


Reader = Callable[[], Sample]


class Sampler:
    """Samples in a thread between enter and exit; `summary` afterwards.

    read: what takes a sample, NVML's of the visible device where None.
    """

    def __init__(self, read: Reader | None = None, period: float = PERIOD) -> None:
        self._read, self._period = read or reader(), period
        self.samples: list[Sample] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> Self:
        if self._read is not None:
            self.samples.append(self._read())
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._read is not None:
            self._stop.set()
            self._thread.join()
            self.samples.append(self._read())  # energy is a difference of the ends

    def _loop(self) -> None:
        assert self._read is not None
        while not self._stop.wait(self._period):
            self.samples.append(self._read())

    def summary(self) -> dict[str, Any]:
        """Mean power in W, median and lowest SM clock in MHz, highest temperature in °C, reasons
        for lower clocks by name, energy in J; of the samples between the ends where there are any.
        """
        during = self.samples[1:-1] or self.samples
        seen = {name for s in during for bit, name in REASONS.items() if s.reasons & bit}
        return {
            "power_w": _of(fmean, [s.power_w for s in during]),
            "clock_mhz": _of(median, [s.clock_mhz for s in during]),
            "clock_mhz_min": _of(min, [s.clock_mhz for s in during]),
            "temp_c": _of(max, [s.temp_c for s in during]),
            "slowed_by": sorted(seen - {"idle"}),
            "energy_j": self._energy(),
        }

    def _energy(self) -> float | None:
        """The driver's counter where it has one, else power over time by the trapezoid rule."""
        if len(self.samples) < 2:
            return None
        first, last = self.samples[0], self.samples[-1]
        if first.energy_j is not None and last.energy_j is not None:
            return last.energy_j - first.energy_j
        known = [(s.seconds, s.power_w) for s in self.samples if s.power_w is not None]
        if len(known) < len(self.samples):
            return None
        return sum((t1 - t0) * (p0 + p1) / 2 for (t0, p0), (t1, p1) in pairwise(known))


def _of(reduce: Callable[[list[float]], float], values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return round(reduce(known), 1) if known else None


def reader() -> Reader | None:
    """Takes a sample of the first visible device; None where NVML does not answer."""
    opened = _open()
    if opened is None:
        return None
    n, handle = opened
    reasons = getattr(
        n, "nvmlDeviceGetCurrentClocksEventReasons",
        getattr(n, "nvmlDeviceGetCurrentClocksThrottleReasons", None),
    )  # fmt: skip

    def read() -> Sample:
        power = _try(n.nvmlDeviceGetPowerUsage, handle)
        energy = _try(n.nvmlDeviceGetTotalEnergyConsumption, handle)
        return Sample(
            seconds=time.monotonic(),
            power_w=None if power is None else power / 1e3,
            clock_mhz=_try(n.nvmlDeviceGetClockInfo, handle, n.NVML_CLOCK_SM),
            temp_c=_try(n.nvmlDeviceGetTemperature, handle, n.NVML_TEMPERATURE_GPU),
            reasons=_try(reasons, handle) or 0,
            energy_j=None if energy is None else energy / 1e3,
        )

    return read


def describe() -> dict[str, Any] | None:
    """Name, driver, highest SM clock in MHz and power limit in W of the first visible device."""
    opened = _open()
    if opened is None:
        return None
    n, handle = opened
    limit = _try(n.nvmlDeviceGetEnforcedPowerLimit, handle)
    return {
        "device": _text(n.nvmlDeviceGetName(handle)),
        "driver": _text(n.nvmlSystemGetDriverVersion()),
        "clock_max_mhz": _try(n.nvmlDeviceGetMaxClockInfo, handle, n.NVML_CLOCK_SM),
        "power_limit_w": None if limit is None else limit / 1e3,
    }


def _open() -> tuple[Any, Any] | None:
    """NVML and the handle of the device that CUDA calls 0 (under CUDA_DEVICE_ORDER=PCI_BUS_ID)."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    try:
        import pynvml as n

        n.nvmlInit()
        if first.startswith(("GPU-", "MIG-")):
            return n, n.nvmlDeviceGetHandleByUUID(first)
        return (n, n.nvmlDeviceGetHandleByIndex(int(first))) if int(first) >= 0 else None
    except Exception:  # no package, no driver, no such device
        return None


def _try(function: Any, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception:  # not supported, not permitted
        return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
