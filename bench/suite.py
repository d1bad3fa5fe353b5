"""The benchmark suite: baselines, training and kernels beside their peers, in order of value.

    python -m bench.suite --minutes 9 --out DIR [--only PART ...] [--json]

Each case is a process of its own with its own time limit. Rows are appended to
DIR/<device>-<date>.jsonl as each case ends, so that a killed run loses one case; run again from the
same commit, the suite continues. Afterwards DIR has report.md and figures. On a machine without a
GPU the same command measures the loader, the order of the data, checkpoints, a training step, the
start of the command line and the compiled kernels' resources, and says what it did not measure.

Parts: baselines, train, profile, kernels, data, startup, checkpoint, resources, or one kernel file.
Exit codes: 0 done, 1 our own code was wrong, crashed or hung, 2 bad input.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from bench.processes import Case
from bench.record import ResultFile, Row, file_name, read
from bench.session import Session
from pythia_fast.errors import InputError
from pythia_fast.progress import say

FIRST_SIZES = ("410m", "70m", "1.4b")  # small heads, small widths, large ones
CPU_SIZES = ("14m", "70m")
TURNS = 4  # of training where time allows: fewer processes have no interval
SUSTAINED, SUSTAINED_SHARE = 60.0, 1 / 6  # seconds of ours and of the best peer; of --minutes
STARTING = 20.0  # seconds of such a process before its first timed step
CPU_TURNS, CPU_SECONDS = 4, 4.0  # many short ones: a shared machine differs between processes
GPU_PARTS = ("baselines", "train", "profile", "kernels")
ANYWHERE = ("startup", "data", "checkpoint", "resources")
NOT_ON_A_CPU = {
    "baselines": "products, copies and attention of a GPU",
    "train": "training steps in bf16 of the sizes from 160m on, MFU, energy",
    "profile": "kernels of a step and the gaps between them",
    "kernels": "times of the Triton kernels and their peers",
}


Planned = Iterator[tuple[str, Case]]


def gpu_plan(minutes: float) -> Planned:
    """(part, case) of all that a GPU can be asked, in order of value."""
    from bench import bench_baselines, bench_profile, bench_train, runner

    sustained = min(bench_baselines.SUSTAINED, 60 * minutes / 9)
    labels, impls = runner.labels_of(runner.benchmarks()), bench_train.GPU_IMPLS
    other_sizes = tuple(s for s in bench_train.ALL_SIZES if s not in FIRST_SIZES)
    yield from _part("baselines", bench_baselines.cases(sustained))
    # the reference model, nothing of ours in it
    yield from _part("baselines", bench_train.cases(FIRST_SIZES, ("eager", "compile"), 0, True))
    yield from _part("kernels", runner.cases(labels, FIRST_SIZES[:1]))
    for sizes in (FIRST_SIZES, other_sizes):
        yield from _part("train", bench_train.cases(sizes, impls, 0, True))
        yield from _part("profile", bench_profile.cases(sizes, on_gpu=True))
        yield from _part("kernels", runner.cases(labels, sizes))
        yield from _part("train", bench_train.cases(sizes, impls, 1, True))
    yield from _anywhere()
    for turn in range(2, TURNS):
        yield from _part("train", bench_train.cases(FIRST_SIZES, impls, turn, True))


def sustained_seconds(minutes: float) -> float:
    """Of steps in each of the two processes that come last, whatever else there was time for."""
    return min(SUSTAINED, max(60 * minutes * SUSTAINED_SHARE / 2 - STARTING, 0.0))


def sustained_plan(rows: Sequence[Row], seconds: float) -> Planned:
    """Ours, and the peer that was fastest in `rows`, on the first size."""
    from bench import bench_train

    peer = bench_train.best_peer(rows, FIRST_SIZES[0])
    impls = ("ours", *([peer] if peer else []))
    if seconds > 0:
        cases = bench_train.cases(FIRST_SIZES[:1], impls, 0, True, seconds, sustained=True)
        yield from _part("train", cases)


def cpu_plan(small: bool = False) -> Planned:
    """What a machine without a GPU can be asked. small: a smoke test, whose times mean nothing."""
    from bench import bench_profile, bench_train

    sizes, seconds = (("tiny",), 0.2) if small else (CPU_SIZES, CPU_SECONDS)
    impls = ("ours", "transformers") if small else bench_train.CPU_IMPLS
    for turn in range(1 if small else CPU_TURNS):
        yield from _part("train", bench_train.cases(sizes, impls, turn, False, seconds))
    yield from _part("profile", bench_profile.cases(sizes, on_gpu=False))
    yield from _anywhere(small)


def _anywhere(small: bool = False) -> Planned:
    from bench import bench_checkpoint, bench_data, bench_resources, bench_startup

    yield from _part("startup", bench_startup.cases(small))
    *data, longest = bench_data.cases(small)
    yield from _part("data", data)
    yield from _part("checkpoint", bench_checkpoint.cases(small))
    yield from _part("resources", bench_resources.cases(small))
    yield "data", longest


def _part(part: str, cases: Iterable[Case]) -> Planned:
    return ((part, case) for case in cases)


def chosen(plan: Planned, parts: Sequence[str]) -> list[Case]:
    """The cases of the parts (kernel files among them), each once."""
    from bench.runner import labels_of

    labels = labels_of(parts)
    kept: dict[tuple[str, object], Case] = {}
    for part, case in plan:
        if part in parts or case.head.get("kernel") in labels:
            kept.setdefault((case.name, case.head.get("turn")), case)
    return list(kept.values())


def not_measured(parts: Sequence[str]) -> list[Row]:
    """Of a machine without a GPU: a row for each part that needs one."""
    return [
        {"case": f"{part} on a GPU", "part": "", "bench": part, "status": "not measured",
         "reason": f"no CUDA device here: {NOT_ON_A_CPU[part]}"}
        for part in GPU_PARTS
        if part in parts
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.suite", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.allow_abbrev = False
    parser.add_argument("--minutes", type=float, default=9.0, help="of all together (9)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder (runs/bench)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="e.g. baselines train layer_norm")
    parser.add_argument("--small", action="store_true", help="a smoke test on the CPU, no timing")
    parser.add_argument("--json", action="store_true", help="rows as JSON lines on stdout")
    options = parser.parse_args(argv)
    try:
        return run(options.minutes, options.out, options.only, options.json, options.small)
    except InputError as error:
        print(f"bench.suite: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def run(
    minutes: float, out: Path, only: Sequence[str] | None, json_lines: bool, small: bool = False
) -> int:
    """Measures, then writes the report. Raises InputError."""
    import torch

    from bench import report, runner

    if not minutes > 0:
        raise InputError(f"--minutes {minutes:g}: more than 0 is needed")
    all_parts, files = (*GPU_PARTS, *ANYWHERE), runner.benchmarks()
    for part in only or ():
        if part not in (*all_parts, *files):
            raise InputError(f"--only {part}: none of {', '.join((*all_parts, *files))}")
    parts = tuple(only or all_parts)
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # as NVML counts
    os.environ.pop("TRITON_INTERPRET", None)
    on_gpu = torch.cuda.is_available() and not small
    session = Session(json_lines=json_lines)
    path = out / file_name(session.fixed)
    earlier = read(path) if path.exists() else []
    with ResultFile(path) as file:
        session.attach(file, earlier)
        plan = gpu_plan(minutes) if on_gpu else cpu_plan(small)
        end = time.monotonic() + 60 * minutes
        steady = sustained_seconds(minutes) if on_gpu and "train" in parts else 0.0
        kept = 2 * (steady + STARTING) if steady else 0.0
        session.run(chosen(plan, parts), 60 * minutes - kept)
        if steady:
            last = chosen(sustained_plan(session.rows, steady), parts)
            session.run(last, end - time.monotonic())
        if not on_gpu:
            session.add(not_measured([*parts, *("kernels" for p in parts if p in files)]))
    written = report.write(read(path), out)
    say(f"rows in {path}; {', '.join(map(str, written))}")
    return 1 if session.failed else 0


if __name__ == "__main__":
    sys.exit(main())
