"""Where one training step spends its time: by kernel, and in gaps between kernels.

    python -m bench.suite --only profile

torch.profiler around steps of our trainer after its warm-up: one that is thrown away, two that are
recorded, the second of which is reported, since the first carries the profiler's own start. On a
CPU, time by operator. The summary is enough to plan the next speed-up without a GPU at hand; it is
not a timing (profiling slows the host down).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from bench import bench_train
from bench.processes import Case
from bench.record import Row

LONGEST = 25  # kernels by name that a row carries
GAPS = 10  # gaps that a row carries
SCHEDULE = {"wait": 0, "warmup": 1, "active": 2}  # steps
MARK = "ProfilerStep"
NAME = 90  # characters of a kernel's name


class Interval(NamedTuple):
    """A kernel or copy on the device; microseconds."""

    name: str
    start: float
    end: float


def cases(sizes: Sequence[str], on_gpu: bool) -> Iterator[Case]:
    for case in bench_train.cases(sizes, ("ours",), 0, on_gpu):
        what = {k: v for k, v in case.what.items() if k not in ("seconds", "sustained")}
        name = case.name.replace("train ", "profile ", 1)
        yield Case("bench.bench_profile", name, {"bench": "profile", **what}, what, 120.0)


def measure(size: str, impl: str, rows: int, positions: int, compute: str) -> Iterator[Row]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = bench_train.configuration(size, rows, positions, compute)
    tokens = bench_train.synthetic_batch(config, device)
    config, warm = bench_train.fitting(impl, config, tokens, [])
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    planned = schedule(**SCHEDULE)
    with profile(activities=activities, schedule=planned, acc_events=True) as recorded:
        for number in range(sum(SCHEDULE.values())):
            if number:
                recorded.step()
            loss, _ = warm.stepper.step(tokens)
            loss.item()  # the device is done before the next step begins
    events = last_step(recorded.events() or [])
    micro = {"micro_batch_size": config.train.micro_batch_size}
    if device.type == "cpu":
        yield micro | operators(events)
        return
    on_device = [e for e in events if e.device_type == DeviceType.CUDA]
    yield micro | kernels(
        [Interval(e.name, e.time_range.start, e.time_range.end) for e in on_device]
    )


def last_step(events: Sequence[Any]) -> list[Any]:
    """The profiler's events from the begin of its last step on, its own marks left out."""
    marks = [e.time_range.start for e in events if e.name.startswith(MARK)]
    begin = max(marks, default=0.0)
    return [e for e in events if e.time_range.start >= begin and not e.name.startswith(MARK)]


def operators(events: Sequence[Any]) -> Row:
    """Milliseconds of each of torch's operators on the CPU, what it calls left out."""
    by_name: defaultdict[str, list[float]] = defaultdict(list)
    for e in events:
        if e.name.startswith("aten::"):
            by_name[e.name].append(e.self_cpu_time_total / 1e3)
    return {
        "busy_ms": sum(map(sum, by_name.values())),
        "calls": sum(map(len, by_name.values())),
        **_by_name({name: (len(ms), sum(ms)) for name, ms in by_name.items()}),
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
