"""The ledger: which rows every step was trained on, and a digest of their token ids.

    {"step": s, "first_row": .., "last_row": .., "digest": sha256 of the ids, "running": ..}

`step` is the batch's number (0-based; rows [B·s, B·(s+1)), last_row inclusive); `running` chains
the digests, so that one value proves all data up to a step. `pythia-fast data digest` recomputes
the same from data and order alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pythia_fast.data.indexed import beside, bin_paths, split_prefix
from pythia_fast.data.loader import RUNNING_START, Batch, batch_digest, running_digest
from pythia_fast.data.order import Rows
from pythia_fast.errors import InputError
from pythia_fast.metrics import StepLog, read_steps


class Ledger:
    """Appends one row a step to `<run>/ledger.jsonl`, cut back to `steps` rows at the start."""

    def __init__(self, run: Path, steps: int) -> None:
        self.path = run / "ledger.jsonl"
        self._log = StepLog(self.path, keep_below=steps)
        rows = list(read_steps(self.path))
        if [row["step"] for row in rows] != list(range(steps)):
            raise InputError(
                f"{self.path}: {len(rows)} whole rows where {steps} are needed to resume"
            )
        self.running = rows[-1]["running"] if rows else RUNNING_START

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


def verify(run: Path, rows: Rows, batch_size: int, steps: Iterable[int]) -> None:
    """Recomputes the digests of `steps` (ascending) and compares them with the run's ledger.

    Raises InputError naming the first step whose tokens differ from those that were trained on.
    """
    wanted = set(steps)
    for row in read_steps(run / "ledger.jsonl"):
        step = row["step"]
        if step not in wanted:
            continue
        tokens = rows.tokens(step * batch_size, (step + 1) * batch_size)
        if batch_digest(tokens) != row["digest"]:
            raise InputError(
                f"{run / 'ledger.jsonl'}: the data differs from what was trained on, first at step "
                f"{step} (rows {row['first_row']} to {row['last_row']})"
            )


def to_verify(steps: int, tokens_per_step: int, data_changed: bool) -> Iterable[int]:
    """Which steps a resume recomputes: all where the data's files changed or the data is small.

    A long run on files of unchanged size and time of modification recomputes 256 steps spread
    over the run, the last one included; `data digest` recomputes them all.
    """
    if data_changed or steps * tokens_per_step <= 1_000_000_000 or steps <= 256:
        return range(steps)
    return sorted({round(i * (steps - 1) / 255) for i in range(256)})


def files_state(prefix: str) -> dict[str, list[int]]:
    """Path -> [bytes, time of modification in ns] of the token files."""
    path = split_prefix(prefix)
    files = [p for p in (beside(path, ".idx"), *bin_paths(path)) if p.is_file()]
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
