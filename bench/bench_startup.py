"""Seconds until `pythia-fast --help` has answered, in fresh processes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench.processes import Case
from bench.record import Row, times

REPEATS = 15


def cases() -> Iterator[Case]:
    yield Case("bench.bench_startup", "pythia-fast --help", {"bench": "startup"})


def measure() -> Iterator[Row]:
    command = [sys.executable, "-m", "pythia_fast", "--help"]
    where = Path(__file__).resolve().parents[1]
    milliseconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, cwd=where)
        milliseconds.append(1e3 * (time.perf_counter() - began))
    yield times(milliseconds)
