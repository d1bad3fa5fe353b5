"""Runs cases one after the other, writes their rows down, and shows where it stands."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from bench.processes import Case, run
from bench.record import ResultFile, Row, environment, is_ours, newest, stamp
from pythia_fast.progress import say

SHORTEST = 5.0  # seconds without which no case is begun
FAILED = frozenset({"wrong", "error", "crash", "timeout"})
REPEATED = FAILED | {"not run"}  # tried again by the next run


class Session:
    """The rows of one run on one device.

    The rates of the baselines' product and copy are kept; from then on every rate gets its share of
    one in "frac_of_limit", and which in "limit_of": of the product, steps get the sustained rate
    and kernels, timed for a moment, the rate before clocks fell ("burst").
    """

    def __init__(self, json_lines: bool = False) -> None:
        self.fixed = environment()
        self.rows: list[Row] = []
        self.limits: dict[str, Row] = {}  # by unit, the rows of the baselines
        self._file: ResultFile | None = None
        self._json = json_lines

    @property
    def failed(self) -> bool:
        """Whether our own code was wrong, failed, crashed or hung, here or in rows taken over."""
        return any(is_ours(row) and row["status"] in FAILED for row in self.rows)

    def attach(self, file: ResultFile, earlier: Sequence[Row]) -> None:
        """Writes to `file` from now on, and takes over the rows in it that this commit measured
        on this device; a tree with changes is never the same commit.
        """
        self._file = file
        commit = self.fixed["commit"]
        if commit is None or commit.endswith("-dirty"):
            return
        same = {"commit": commit, "device": self.fixed["device"]}
        measured = {_key(row): n for n, row in enumerate(earlier) if row["status"] not in REPEATED}
        stale = {
            id(row)
            for n, row in enumerate(earlier)
            if row["status"] in REPEATED and measured.get(_key(row), -1) > n
        }
        for row in newest([row for row in earlier if id(row) not in stale]):
            if all(row.get(key) == value for key, value in same.items()):
                self._learn(row)
                self.rows.append(row)

    def run(self, cases: Sequence[Case], seconds: float = float("inf")) -> None:
        """Each case in its process until the time is over; the others become rows "not run"."""
        end, minutes = time.monotonic() + seconds, f"{seconds / 60:.3g} minutes"
        again = {_key(row) for row in self.rows if row["status"] in REPEATED}
        done = {_key(row) for row in self.rows} - again
        todo = [case for case in cases if _key({"case": case.name, **case.head}) not in done]
        if len(todo) < len(cases):
            known = len(cases) - len(todo)
            say(f"{known} of {len(cases)} cases stand in the file from this commit")
        for number, case in enumerate(todo, start=1):
            left = end - time.monotonic()
            if left < SHORTEST:
                row = {"case": case.name, "part": "", **case.head}
                self.add([row | _not_run(f"the suite's {minutes} were over")])
                continue
            say(f"[{number}/{len(todo)}] {case.name}")
            rows = list(run(case, left))
            if rows[-1]["status"] == "timeout" and left < case.limit_s:  # ours to blame, not its
                rows[-1] |= _not_run(f"killed when the suite's {minutes} were over")
            self.add(rows)

    def add(self, rows: list[Row]) -> None:
        """The rows of one case: whole or not at all, so that what stands in a file is complete."""
        stamped = [stamp(row, self.fixed) for row in rows]
        when = max((row["when"] for row in stamped), default=None)
        for row in stamped:
            row["when"] = when
            self._learn(row)
            row |= self._share(row)
            if self._file is not None:
                self._file.append(row)
            print(json.dumps(row) if self._json else line(row), flush=True)
        again = {_key(row) for row in stamped if row["status"] != "not run"}
        self.rows = [row for row in self.rows if _key(row) not in again] + stamped

    def _learn(self, row: Row) -> None:
        if row["bench"] == "baseline" and row["status"] == "ok" and row.get("limit"):
            self.limits[row["limit"]] = row

    def _share(self, row: Row) -> Row:
        for unit, limit in self.limits.items():
            if row.get(unit) is not None:
                long = row["bench"] == "train" or "limit" in row
                of = "sustained" if long or f"{unit}_first" not in limit else "burst"
                rate = limit[unit if of == "sustained" else f"{unit}_first"]
                return {"frac_of_limit": row[unit] / rate, "limit_of": of}
        return {}


def _key(row: Row) -> tuple[Any, ...]:
    return row["case"], row.get("turn")


def _not_run(reason: str) -> dict[str, str]:
    return {"status": "not run", "reason": reason}


UNITS = {
    "ms_p50": "{:.4g} ms",
    "tokens_per_s": "{:,.0f} tokens/s",
    "rows_per_s": "{:,.0f} rows/s",
    "tflops": "{:.4g} TFLOP/s",
    "gbps": "{:.4g} GB/s",
    "frac_of_limit": "{:.1%} of the limit",
    "mfu_causal": "MFU {:.1%}",
    "peak_gb": "{:.2f} GB at most",
    "predicted_peak_gb": "{:.2f} GB by the plan",
    "joule_per_token": "{:.3g} J/token",
    "busy_ms": "{:.4g} ms busy with the profiler on",
    "registers": "{} registers",
}


def line(row: Row) -> str:
    """One row in words, every number with its unit."""
    name = " ".join(filter(None, (row["case"], row.get("part", ""))))
    if row["status"] != "ok":
        return f"{name}: {row['status']}: {row.get('reason', '')}"
    return f"{name}: " + ", ".join(
        text.format(row[key]) for key, text in UNITS.items() if row.get(key) is not None
    )
