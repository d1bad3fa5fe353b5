"""What a run writes down as its steps pass: ledger, metrics, trackers, progress on the terminal.

One process of a run writes; on the others the same calls do nothing.
"""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pythia_fast.config import Config
from pythia_fast.data.loader import RUNNING_START, Batch
from pythia_fast.ledger import Ledger
from pythia_fast.metrics import StepLog, Trackers
from pythia_fast.progress import TrainProgress


class Journal:
    """Continues the files of `run` after `step` steps; a context manager."""

    def __init__(
        self, config: Config, run: Path, step: int, running: str, first_step: int, writes: bool
    ) -> None:
        """running: the ledger's digest after `step` steps. writes: this process is the one.

        Raises InputError where the ledger is not that of the checkpoint.
        """
        self._ledger: Ledger | None = None
        with ExitStack() as stack:
            if writes:
                self._ledger = stack.enter_context(closing(Ledger(run, step, running, first_step)))
                metrics = StepLog(run / "metrics.jsonl", step + 1)
                self._metrics = stack.enter_context(closing(metrics))
                self._trackers = stack.enter_context(closing(Trackers(config, run)))
                progress = TrainProgress(config.train.steps, step)
                self._progress = stack.enter_context(progress)
            self._stack = stack.pop_all()

    @property
    def running(self) -> str:
        """The running digest of all batches so far."""
        return RUNNING_START if self._ledger is None else self._ledger.running

    def trained(self, batch: Batch) -> None:
        """A step is done; its batch goes into the ledger."""
        if self._ledger is not None:
            self._ledger.append(batch)

    def log(self, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl."""
        if self._ledger is not None:
            self._metrics.append(row)
            self._trackers.log(row)
            self._progress.update(row)

    def sync(self) -> None:
        """What was written so far survives a power loss."""
        if self._ledger is not None:
            self._ledger.sync()
            self._metrics.sync()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, _)
