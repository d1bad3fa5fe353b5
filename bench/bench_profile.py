"""Where one training step spends its time: by kernel, and in gaps between kernels.

    python -m bench.suite --only profile

torch.profiler around one step of our trainer after its warm-up; on a CPU, time by operator. The
summary is enough to plan the
next speed-up without a GPU at hand; it is not a timing (profiling slows the host down).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench import bench_train
from bench.processes import Case
from bench.record import Row

LONGEST = 25  # kernels by name that a row carries
GAPS = 10  # gaps that a row carries
NAME = 90  # characters of a kernel's name


class Interval(NamedTuple):
    """A kernel or copy on the device; microseconds."""

    name: str
    start: float
    end: float


def cases(sizes: Sequence[str], on_gpu: bool) -> Iterator[Case]:
    for case in bench_train.cases(sizes, ("ours",), 0, on_gpu):
        what = {k: v for k, v in case.what.items() if k != "seconds"}
        name = case.name.replace("train ", "profile ", 1)
        yield Case("bench.bench_profile", name, {"bench": "profile", **what}, what, 120.0)


def measure(size: str, impl: str, rows: int, positions: int, compute: str) -> Iterator[Row]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = bench_train.configuration(size, rows, positions, compute)
    tokens = bench_train.synthetic_batch(config, device)
    config, stepper, _ = bench_train.fitting(impl, config, tokens, [])
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as recorded:
        stepper.step(tokens).item()
    micro = {"micro_batch_size": config.train.micro_batch_size}
    if device.type == "cpu":
        yield micro | operators(recorded)
        return
    on_device = [e for e in recorded.events() or [] if e.device_type == DeviceType.CUDA]
    yield micro | kernels(
        [Interval(e.name, e.time_range.start, e.time_range.end) for e in on_device]
    )


def operators(recorded: profile) -> Row:
    """Milliseconds of each of torch's operators on the CPU, what it calls left out."""
    averages = [e for e in recorded.key_averages() if e.key.startswith("aten::")]
    by_name = {e.key: (e.count, e.self_cpu_time_total / 1e3) for e in averages}
    return {
        "busy_ms": sum(ms for _, ms in by_name.values()),
        "calls": sum(count for count, _ in by_name.values()),
        **_by_name(by_name),
    }


def kernels(intervals: Sequence[Interval]) -> Row:
    """Milliseconds: from the first start to the last end, busy (overlaps counted once), by name,
    and idle between kernels, the longest gaps with their neighbours.
    """
    if not intervals:
        return {"status": "error", "reason": "the profiler recorded no kernel"}
    ordered = sorted(intervals, key=lambda i: i.start)
    by_name: defaultdict[str, list[float]] = defaultdict(list)
    for i in ordered:
        by_name[i.name].append(i.end - i.start)
    gaps, latest = [], ordered[0]
    for before, after in pairwise(ordered):
        latest = max(latest, before, key=lambda i: i.end)
        if after.start > latest.end:
            gaps.append((after.start - latest.end, latest.name, after.name))
    span = max(i.end for i in ordered) - ordered[0].start
    idle = sum(length for length, _, _ in gaps)
    return {
        "span_ms": span / 1e3,
        "busy_ms": (span - idle) / 1e3,
        "idle_ms": idle / 1e3,
        "calls": len(ordered),
        "gaps": len(gaps),
        "longest_gaps": [
            {"us": round(length, 1), "after": a[:NAME], "before": b[:NAME]}
            for length, a, b in sorted(gaps, reverse=True)[:GAPS]
        ],
        **_by_name({n: (len(t), sum(t) / 1e3) for n, t in by_name.items()}),
    }


def _by_name(found: dict[str, tuple[int, float]]) -> Row:
    """found: calls and milliseconds. The longest of them, and the rest together."""
    ordered = sorted(found.items(), key=lambda item: -item[1][1])
    return {
        "by_name": [
            {"name": name[:NAME], "calls": calls, "ms": round(ms, 4)}
            for name, (calls, ms) in ordered[:LONGEST]
        ],
        "other_ms": sum(ms for _, (_, ms) in ordered[LONGEST:]),
    }
