"""What moved between two result files by more than the noise.

    python -m bench.compare OLD.jsonl NEW.jsonl [--least 0.01] [--json]

For every case that both have timed: the ratio of the medians of all repetitions, with a 95 %
interval from a bootstrap over processes and, within each, repetitions. Moved is what has 1 outside
of its interval and changed by more than --least. Fewer than four processes a side say too little
of the noise between processes: what moved is then a hint, and no interval is given; of a single
repetition nothing is said.
Exit codes: 0 nothing of ours is slower or no longer measured, 1 something is, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.record import Row, is_ours, newest, read
from pythia_fast.errors import InputError

RESAMPLES = 2000
PROCESSES = 4  # on each side, from which on an interval is given
STILL = ("no", "unknown")
INTERVAL = (2.5, 97.5)  # percentiles
Samples = list[np.ndarray]  # milliseconds, one array a process


def ratio_interval(
    old: Samples, new: Samples, seed: int = 0, middle: Callable[..., Any] = np.median
) -> tuple[float, float, float]:
    """middle(new)/middle(old) and its interval. middle: np.mean where stalls count."""
    random = np.random.default_rng(seed)
    drawn = _middles(new, random, middle) / _middles(old, random, middle)
    low, high = np.percentile(drawn, INTERVAL)
    point = middle(np.concatenate(new)) / middle(np.concatenate(old))
    return float(point), float(low), float(high)


def _middles(
    samples: Samples, random: np.random.Generator, middle: Callable[..., Any]
) -> np.ndarray:
    """(RESAMPLES,) middles, each of as many processes, each of as many repetitions as measured."""
    if len(samples) == 1:
        return np.asarray(middle(random.choice(samples[0], (RESAMPLES, len(samples[0]))), axis=1))
    found = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        processes = random.integers(len(samples), size=len(samples))
        found[i] = middle(
            np.concatenate([random.choice(samples[p], len(samples[p])) for p in processes])
        )
    return found


def compare(old: Sequence[Row], new: Sequence[Row], least: float) -> Iterator[Row]:
    """A row for each case and part of both, and for each that stopped being measured."""
    before, after = _by_case(old), _by_case(new)
    for key in before:
        was, now = before[key], after.get(key) or after.get((key[0], ""))  # "": why it failed
        row: dict[str, Any] = {"case": key[0], "part": key[1], "impl": was[-1].get("impl", "ours")}
        if now is None:
            continue  # another selection of cases
        if _status(was) != _status(now):
            worse = _status(was) == "ok"
            reason = now[-1].get("reason", "")
            yield row | {"moved": "lost" if worse else "new", "now": _status(now), "reason": reason}
        elif _status(now) == "ok" and _samples(was) and _samples(now):
            samples = _samples(was), _samples(now)
            ratio, low, high = ratio_interval(*samples)
            if any(sum(map(len, side)) == 1 for side in samples):
                yield row | {"moved": "unknown", "ratio": ratio, "low": None, "high": None}
                continue
            beyond = not low <= 1 <= high and abs(ratio - 1) > least
            moved = ("slower" if ratio > 1 else "faster") if beyond else "no"
            known = enough(*samples)
            ends = {"low": low if known else None, "high": high if known else None}
            yield row | {"moved": moved, "ratio": ratio, **ends}


def enough(*sides: Samples) -> bool:
    """Whether each side has the processes that an interval needs."""
    return all(len(side) >= PROCESSES for side in sides)


def _by_case(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in newest(rows):
        found.setdefault((row["case"], row["part"]), []).append(row)
    return found


def _samples(rows: Sequence[Row]) -> Samples:
    return [np.array(row["ms"]) for row in rows if "ms" in row]


def _status(rows: Sequence[Row]) -> str:
    """Of all turns together: ok where one is."""
    return "ok" if any(r["status"] == "ok" for r in rows) else str(rows[-1]["status"])


def line(row: Row) -> str:
    name = " ".join(filter(None, (row["case"], row["part"])))
    if "ratio" not in row:
        return f"{row['moved']:7} {name}: {row['now']} {row['reason']}".rstrip()
    interval = f"(fewer than {PROCESSES} processes: no interval)"
    if row["low"] is not None:
        interval = f"[{row['low']:.4f}, {row['high']:.4f}]"
    return f"{row['moved']:7} {name}: x {row['ratio']:.4f} {interval}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--least", type=float, default=0.01, help="share that counts (0.01)")
    parser.add_argument("--json", action="store_true", help="a JSON line a case")
    options = parser.parse_args(argv)
    try:
        old, new = read(options.old), read(options.new)
        if not _by_case(old).keys() & _by_case(new).keys():
            raise InputError(f"{options.old} and {options.new} have no case in common")
    except InputError as error:
        print(f"bench.compare: {error}", file=sys.stderr)
        return 2
    devices = {str(row["device"]) for row in (*old, *new)}
    if len(devices) > 1:
        print(f"not one device: {'; '.join(sorted(devices))}", file=sys.stderr)
    rows = list(compare(old, new, options.least))
    for row in rows:
        if options.json:
            print(json.dumps(row))
        elif row["moved"] not in STILL:
            print(line(row))
    moved = [row for row in rows if row["moved"] not in STILL]
    print(f"{len(rows)} cases compared, {len(moved)} moved", file=sys.stderr)
    return 1 if any(r["moved"] in ("slower", "lost") and is_ours(r) for r in moved) else 0


if __name__ == "__main__":
    sys.exit(main())
