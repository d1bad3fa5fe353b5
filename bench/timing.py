"""Times on the GPU: CUDA events, medians, an explicit L2 policy, and the copy rate to compare with.

Each repetition prepares its inputs, evicts L2 (policy "cold"), holds the stream for a moment so
that the host runs ahead of the GPU, and records two events around the call. What is timed is the
GPU's work, not the launch.
"""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

WARMUP = 5
REPEATS = 50
FLUSH_BYTES = 512 << 20  # ten times the 50 MB of an H200's L2
COPY_BYTES = 2 << 30
HOLD_CYCLES = 1_000_000  # about half a millisecond


@dataclass(frozen=True)
class Times:
    """20th, 50th and 80th percentile in milliseconds."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, milliseconds: list[float]) -> Times:
        cuts = statistics.quantiles(milliseconds, n=10, method="inclusive")
        return cls(cuts[1], statistics.median(milliseconds), cuts[7])


class Timer(Protocol):
    """Times call(prepare()), prepare untimed, under an L2 policy of "cold" or "warm"."""

    def __call__(
        self, prepare: Callable[[], Any], call: Callable[[Any], Any], l2: str = "cold"
    ) -> Times: ...


def cuda_timer(prepare: Callable[[], Any], call: Callable[[Any], Any], l2: str = "cold") -> Times:
    """`Timer` with CUDA events: WARMUP calls, then REPEATS of them.

    "cold" writes FLUSH_BYTES between preparation and call; "warm" leaves in L2 what preparation
    put there, as a producer does.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda") if l2 == "cold" else None
    milliseconds = []
    for repeat in range(WARMUP + REPEATS):
        state = prepare()
        if flush is not None:
            flush.zero_()
        torch.cuda._sleep(HOLD_CYCLES)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(state)
        end.record()
        end.synchronize()
        if repeat >= WARMUP:
            milliseconds.append(start.elapsed_time(end))
    return Times.of(milliseconds)


def copy_rate(timer: Timer) -> float:
    """GB/s of a device-to-device copy, bytes read plus bytes written."""
    source = torch.randn(COPY_BYTES // 4, device="cuda").view(torch.uint8)
    target = torch.empty_like(source)
    times = timer(lambda: None, lambda _: target.copy_(source))
    return 2 * COPY_BYTES / times.p50 / 1e6


def product_rate(rows: int, inner: int, columns: int, dtype: torch.dtype, timer: Timer) -> float:
    """TFLOP/s of torch's (rows, inner) x (inner, columns) on N(0, 1) data."""
    left = torch.randn(rows, inner, device="cuda", dtype=dtype)
    right = torch.randn(columns, inner, device="cuda", dtype=dtype)
    times = timer(lambda: None, lambda _: torch.nn.functional.linear(left, right))
    return 2 * rows * inner * columns / times.p50 / 1e9


def environment() -> dict[str, Any]:
    """Versions and commit: the columns that are the same in every row of a run."""
    import triton

    return {
        "triton": triton.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "driver": _nvml(lambda n, _: n.nvmlSystemGetDriverVersion()),
        "commit": _commit(),
    }


def device_state() -> dict[str, Any]:
    """SM clock in MHz, power in W and temperature in °C now; None where NVML cannot say."""
    return {
        "clock_mhz": _nvml(lambda n, h: n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_SM)),
        "power_w": _nvml(lambda n, h: n.nvmlDeviceGetPowerUsage(h) / 1000),
        "temp_c": _nvml(lambda n, h: n.nvmlDeviceGetTemperature(h, n.NVML_TEMPERATURE_GPU)),
    }


def _nvml(read: Callable[[Any, Any], Any]) -> Any:
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        return read(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
    except Exception:  # no NVML, no device, no permission: the column stays empty
        return None


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent, capture_output=True, text=True,
        )  # fmt: skip
    except OSError:  # no git here
        return None
    return done.stdout.strip() or None
