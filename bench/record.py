"""Result rows: where they were measured, and a file of them that a killed run leaves whole.

A row is a JSON object. Every row has

    case      the name of what was measured; equal names are compared between files
    bench     kernel, baseline, train, profile, data, order, startup, checkpoint, resources or
              check
    status    ok, or why there is no figure: skipped (an optional peer), wrong (it ran and its
              result is beyond the bound), error, out of memory, crash, timeout (killed at its
              limit), not run (the suite's time was over), not measured (this machine cannot)
    reason    where the status is not ok
    ms        times of the repetitions in milliseconds, where something was timed

and the columns of `environment`.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Self

from bench import nvml
from pythia_fast.data.files import publish
from pythia_fast.errors import InputError

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
# peers and libraries whose versions stand in a row where they are installed
OPTIONAL = (
    "liger-kernel", "flash-attn", "quack-kernels", "apex",
    "nvidia-cublas", "nvidia-cublas-cu12", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13",
)  # fmt: skip


def environment() -> Row:
    """Device, driver, versions, clocks and commit, asked without making a CUDA context."""
    columns: Row = nvml.describe() or {
        "device": f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores",
        "driver": None,
        "clock_max_mhz": _cpu_mhz(),
    }
    return {
        **columns,
        **{name: _version(name) for name in ("torch", "triton", "transformers", "numpy")},
        **{name: found for name in OPTIONAL if (found := _version(name))},
        "python": platform.python_version(),
        "commit": _commit(),
    }


def is_ours(row: Row) -> bool:
    """Whether what a row measured is this project's own; its variants are "ours ..."."""
    return str(row.get("impl", "ours")).partition(" ")[0] == "ours"


def stamp(row: Row, fixed: Row) -> Row:
    """The row with `fixed` (an `environment`), the load of the host and the time of day."""
    return {
        **row,
        **fixed,
        "load": round(os.getloadavg()[0], 1),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def times(milliseconds: list[float]) -> Row:
    """The columns of a timed row: every repetition, and its 20th, 50th and 80th percentile."""
    spread = milliseconds if len(milliseconds) > 1 else milliseconds * 2
    cuts = quantiles(spread, n=10, method="inclusive")
    return {
        "ms": [round(value, 5) for value in milliseconds],
        "ms_p20": cuts[1],
        "ms_p50": median(milliseconds),
        "ms_p80": cuts[7],
    }


class ResultFile:
    """Appends rows, each on disk before the next is measured."""

    def __init__(self, path: Path) -> None:
        """Drops a last line that a kill has torn. Raises InputError for a file of other things."""
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = "".join(json.dumps(row) + "\n" for row in read(path)) if path.exists() else ""
        if path.exists() and path.stat().st_size != len(whole.encode()):
            with publish(path) as file:
                file.write(whole.encode())
        self._file = path.open("a")

    def append(self, row: Row) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def read(path: Path) -> list[Row]:
    """The rows of a file without a torn last one. Raises InputError where it holds other things."""
    try:
        lines = path.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from None
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not {"case", "bench", "status"} <= set(row):
            raise InputError(f"{path}: line {number} is no row of the benchmarks")
        rows.append(row)
    return rows


def newest(rows: Iterable[Row]) -> list[Row]:
    """The rows of the last run of each case and turn on each device.

    A run that had no time for a case ("not run") leaves what an earlier one found.
    """
    runs: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = (row["device"], row["case"], row.get("turn"))
        kept = runs.setdefault(key, [])
        if kept and (row["when"] == kept[0]["when"] or kept[0]["status"] == "not run"):
            if row["when"] != kept[0]["when"]:
                kept.clear()
            kept.append(row)
        elif not kept or (row["when"] > kept[0]["when"] and row["status"] != "not run"):
            runs[key] = [row]
    return [row for kept in runs.values() for row in kept]


def file_name(fixed: Row) -> str:
    """<device>-<date>.jsonl."""
    device = re.sub(r"[^a-z0-9]+", "-", str(fixed["device"]).lower()).strip("-")
    return f"{device}-{datetime.now(UTC):%Y-%m-%d}.jsonl"


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _cpu_mhz() -> float | None:
    found = re.findall(r"^cpu MHz\s*: ([\d.]+)", Path("/proc/cpuinfo").read_text(), re.M)
    return max(map(float, found), default=None)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent, capture_output=True, text=True,
        )  # fmt: skip
    except OSError:  # no git here
        return None
    return done.stdout.strip() or None
