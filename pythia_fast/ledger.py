"""The ledger: which rows every step was trained on, and a digest of their token ids.

    {"step": s, "first_row": .., "last_row": .., "digest": sha256 of the ids, "running": ..}

`step` is the batch's number (0-based; rows [B·s, B·(s+1)), last_row inclusive); `running` chains
the digests, so that one value proves all data up to a step. `pythia-fast data digest` recomputes
the same from data and order alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pythia_fast.data.files import ahead, progress
from pythia_fast.data.indexed import beside, bin_paths, split_prefix
from pythia_fast.data.loader import RUNNING_START, Batch, batch_digest, running_digest
from pythia_fast.data.order import Rows
from pythia_fast.errors import InputError
from pythia_fast.metrics import StepLog, read_steps


class Ledger:
    """Appends one row a step to `<run>/ledger.jsonl`, cut back to steps below `steps` first."""

    def __init__(
        self, run: Path, steps: int, expected: str = RUNNING_START, first: int = 0
    ) -> None:
        """expected: the running digest after `steps` steps, as the checkpoint recorded it.

        first: the step with which the ledger begins, that of an imported checkpoint.

        Raises InputError where a row is missing or the chain of digests does not lead there.
        """
        self.path = run / "ledger.jsonl"
        rows = [row for row in read_steps(self.path) if row["step"] < steps]
        if len(rows) != steps - first:
            needed = f"{steps - first} are needed to resume"
            raise InputError(f"{self.path}: {len(rows)} rows where {needed}")
        self.running = RUNNING_START
        for row in rows:
            self.running = running_digest(self.running, str(row.get("digest")))
        if self.running != expected:
            raise InputError(f"{self.path} is not the ledger of the checkpoint at step {steps}")
        self._log = StepLog(self.path, keep_below=steps)

    def append(self, batch: Batch) -> None:
        self.running = running_digest(self.running, batch.digest)
        self._log.append(
            {
                "step": batch.step,
                "first_row": batch.first_row,
                "last_row": batch.last_row,
                "digest": batch.digest,
                "running": self.running,
            }
        )

    def sync(self) -> None:
        self._log.sync()

    def close(self) -> None:
        self._log.close()


def verify(run: Path, rows: Rows, batch_size: int, steps: Sequence[int]) -> None:
    """Recomputes the digests of `steps` (ascending) and compares them with the run's ledger.

    Raises InputError naming the first step whose tokens differ from those that were trained on;
    between two of `steps` it searches for it.
    """
    recorded = {row["step"]: row for row in read_steps(run / "ledger.jsonl")}

    def same(step: int) -> bool:
        tokens = rows.tokens(step * batch_size, (step + 1) * batch_size)
        return batch_digest(tokens) == recorded[step]["digest"]

    good = -1
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        progress("checking the data against the ledger", len(steps), "steps") as advance,
    ):
        for step, matches in zip(steps, ahead(pool, same, steps, depth=16), strict=True):
            if not matches:
                first = next(s for s in range(good + 1, step + 1) if s == step or not same(s))
                row = recorded[first]
                raise InputError(
                    f"{run / 'ledger.jsonl'}: the data differs from what was trained on, first at "
                    f"step {first} (rows {row['first_row']} to {row['last_row']})"
                )
            good = step
            advance(1, "")


_FULL = 1_000_000_000  # tokens that are recomputed in seconds


def to_verify(first: int, stop: int, tokens_per_step: int, data_changed: bool) -> Sequence[int]:
    """Which of the steps [first, stop) a resume recomputes: all where the data changed or is small.

    A long run on files of unchanged size and time of modification recomputes 256 steps spread
    over the run, first and last included; `data digest --against` recomputes them all.
    """
    steps = stop - first
    if data_changed or steps * tokens_per_step <= _FULL or steps <= 256:
        return range(first, stop)
    return sorted({first + round(i * (steps - 1) / 255) for i in range(256)})


def files_state(prefix: str) -> dict[str, list[int]]:
    """Name -> [bytes, time of modification in ns] of the token files."""
    path = split_prefix(prefix)
    files = [p for p in (beside(path, ".idx"), *bin_paths(path)) if p.is_file()]
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
