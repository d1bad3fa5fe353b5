"""Trains one run: `pythia-fast train CONFIG.toml`.

Read `Trainer.train_step` first: it is the whole step. `Trainer.run` is the loop around it: batches,
the ledger, metrics, validation, checkpoints. A run directory is the only state; started again, it
continues from its newest complete checkpoint, bit for bit.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pythia_fast import checkpoint, ledger
from pythia_fast.config import Config, differences, flatten, load, to_toml
from pythia_fast.data.commands import rows_from, valid_rows_from
from pythia_fast.data.loader import Loader
from pythia_fast.errors import CheckError, InputError
from pythia_fast.metrics import StepLog, Trackers, read_steps
from pythia_fast.model import Pythia, initialise
from pythia_fast.ops import select
from pythia_fast.optim import AdamW, learning_rate
from pythia_fast.progress import TrainProgress, say

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Stopped(Exception):
    """A signal arrived and the state is saved; carries the signal's number."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"{signal.Signals(signum).name}: saved at step {step}")
        self.signum = signum


class Trainer:
    """Model, optimizer and data of one run. The caller holds the run's lock."""

    def __init__(self, config: Config, run: Path) -> None:
        c = self.config = config
        self.run_dir = run
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            _keep_freed_memory()
        ops = select(c.kernels.backend, self.device)
        self.rows = rows_from(c)
        self.valid_rows = valid_rows_from(c)
        self.model = Pythia(c.model, ops)
        dtype = DTYPES[c.precision.compute]
        self.optimizer = AdamW(self.model, c.optimizer, ops, self.device, dtype)
        self.permanent = frozenset(checkpoint.schedule(c.checkpoint.steps, c.train.steps))
        self.step = 0  # updates done

    # --- the step ---

    def train_step(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """One optimizer step on tokens (batch_size, T + 1) int64.

        Returns the mean loss (nats a token) and the gradient norm before clipping, on the device.
        """
        c = self.config
        scale = 1.0 / (tokens.shape[0] * (tokens.shape[1] - 1))  # 1 / positions of the step
        loss = torch.zeros((), device=self.device)
        for rows in tokens.split(c.train.micro_batch_size):
            micro_loss = self.model.loss(rows, scale)
            micro_loss.backward()
            self.optimizer.accumulate()
            loss += micro_loss.detach()
        norm = self.optimizer.step(learning_rate(c.optimizer, self.step, c.train.steps))
        self.step += 1
        return loss, norm

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss of the first train.valid_rows held-out rows, nats a token."""
        assert self.valid_rows is not None
        c, n = self.config, min(self.config.train.valid_rows, len(self.valid_rows))
        total = torch.zeros((), device=self.device)
        for start in range(0, n, c.train.micro_batch_size):
            tokens = self.valid_rows.tokens(start, min(start + c.train.micro_batch_size, n))
            total += self.model.loss(self._to_device(tokens), 1.0 / (n * c.data.seq_len))
        return float(total.item())

    # --- the loop ---

    def run(self) -> dict[str, Any]:
        """Trains to the last step and returns the last row of metrics.jsonl."""
        c = self.config
        resumed = self._load_newest()
        if not resumed:
            initialise(self.model, c.train.seed)
            self.optimizer.sync_weights(from_model=True)
        with ExitStack() as stack:
            arrived = stack.enter_context(_signals())
            self.book = stack.enter_context(closing(ledger.Ledger(self.run_dir, self.step)))
            metrics_path = self.run_dir / "metrics.jsonl"
            self.metrics = stack.enter_context(closing(StepLog(metrics_path, self.step + 1)))
            trackers = stack.enter_context(closing(Trackers(c, self.run_dir)))
            if not resumed and 0 in self.permanent:
                self._save()
            loader = Loader(
                self.rows, c.train.batch_size, self.step, c.train.steps, c.model.vocab_size
            )
            stack.enter_context(closing(loader))
            progress = stack.enter_context(TrainProgress(c.train.steps, self.step))
            clock = _Clock(c.tokens_per_step)
            for batch in loader:
                loss, norm = self.train_step(self._to_device(batch.tokens))
                self.book.append(batch)
                clock.tick()
                stop = arrived[0] if arrived else None  # read once: a later one ends the next step
                save = self.step in self.permanent or self._every(c.checkpoint.every) or stop
                valid = self.valid_rows is not None and self._due(c.train.valid_every)
                if self._due(c.log.every) or save or valid:
                    row = self._row(loss.item(), norm.item(), clock.rate())
                    if valid:
                        row["valid_loss"] = self.validate()
                    self.metrics.append(row)
                    trackers.log(row)
                    progress.update(row)
                if save:
                    self._save()
                if save or valid:
                    clock.restart()
                if stop:
                    raise Stopped(stop, self.step)
        return self._last_row()

    def _every(self, steps: int) -> bool:
        return steps > 0 and self.step % steps == 0

    def _due(self, every: int) -> bool:
        return self._every(every) or self.step == self.config.train.steps

    def _row(self, loss: float, norm: float, tokens_per_s: float) -> dict[str, Any]:
        c = self.config
        if not math.isfinite(loss) or not math.isfinite(norm):
            newest = checkpoint.newest(self.run_dir)
            raise CheckError(
                f"step {self.step}: loss {loss}, gradient norm {norm}; "
                f"the newest checkpoint is step {newest} in {self.run_dir}"
            )
        return {
            "step": self.step,
            "tokens": self.step * c.tokens_per_step,
            "loss": loss,
            "lr": learning_rate(c.optimizer, self.step - 1, c.train.steps),
            "grad_norm": norm,
            "tokens_per_s": round(tokens_per_s, 1),
        }

    def _last_row(self) -> dict[str, Any]:
        rows = list(read_steps(self.run_dir / "metrics.jsonl"))
        return rows[-1] if rows else {"step": self.step}

    def _to_device(self, tokens: np.ndarray) -> Tensor:
        return torch.from_numpy(tokens.astype(np.int64)).to(self.device, non_blocking=True)

    # --- state on disk ---

    def _load_newest(self) -> bool:
        """Loads the newest complete checkpoint, if there is one, and checks its data."""
        checkpoint.clean(self.run_dir)
        step = checkpoint.newest(self.run_dir)
        if step is None:
            return False
        path = self.run_dir / "checkpoints" / f"step{step}"
        state = self.optimizer.state()
        if "ledger" not in checkpoint.read_manifest(path):  # imported: weights alone, no history
            checkpoint.load(path, {k: v for k, v in state.items() if k.startswith("model.")})
            self.optimizer.resume_at(0)
            say(f"starting from {path}")
            return True
        manifest = checkpoint.load(path, state)
        self.step = step
        self.optimizer.resume_at(step)
        changed = manifest["data_files"] != ledger.files_state(self.config.data.prefix)
        ledger.verify(
            self.run_dir, self.rows, self.config.train.batch_size,
            ledger.to_verify(step, self.config.tokens_per_step, changed),
        )  # fmt: skip
        say(f"resuming from {path}")
        return True

    def _save(self) -> None:
        self.book.sync()
        self.metrics.sync()
        extra = {
            "config": flatten(self.config),
            "config_digest": self.config.digest,
            "tokens": self.step * self.config.tokens_per_step,
            "ledger": self.book.running,
            "data_fingerprint": self.rows.fingerprint,
            "data_files": ledger.files_state(self.config.data.prefix),
        }
        permanent = self.step in self.permanent
        checkpoint.save(self.run_dir, self.step, self.optimizer.state(), extra, permanent)
        checkpoint.prune(self.run_dir, self.config.checkpoint.keep)


def _keep_freed_memory() -> None:
    """Stops glibc from handing large blocks back to the kernel at each free.

    Activations would otherwise be mapped and zeroed anew every step: 0.64 against 0.53 s a step of
    the quickstart on two cores. M_MMAP_THRESHOLD = -3 and M_TRIM_THRESHOLD = -1 of malloc.h.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 1 << 30)
        mallopt(-1, (1 << 31) - 1)


class _Clock:
    """Tokens per second since the last reading; saving and validation are left out."""

    def __init__(self, tokens_per_step: int) -> None:
        self._tokens_per_step = tokens_per_step
        self.restart()

    def restart(self) -> None:
        self._since, self._steps = time.perf_counter(), 0

    def tick(self) -> None:
        self._steps += 1

    def rate(self) -> float:
        rate = self._steps * self._tokens_per_step / (time.perf_counter() - self._since)
        self.restart()
        return rate


@contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM land in the list and end the run after its step; a second one at once."""
    arrived: list[int] = []

    def note(signum: int, _: object) -> None:
        if arrived:
            raise KeyboardInterrupt
        arrived.append(signum)
        say(f"{signal.Signals(signum).name}: saving after this step (again: stop at once)")

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield arrived
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def train(config: Config, run: Path) -> dict[str, Any]:
    """Trains `config` in the directory `run` to its last step, from wherever it stands.

    Returns the last row of metrics.jsonl. Raises InputError, CheckError (a loss that is not
    finite) or Stopped.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("training on several processes is not there yet: start a single one")
    for line in differences(config):
        say(f"differs from the published recipe: {line}")
    with checkpoint.RunLock(run):
        _keep_page(config, run / "config.toml")
        return Trainer(config, run).run()


def _keep_page(config: Config, path: Path) -> None:
    """Saves the resolved page; refuses to continue a run whose page decides other losses."""
    if path.exists():
        before = load(path).decisive
        for key, value in config.decisive.items():
            if value != before[key]:
                raise InputError(
                    f"{path.parent} was trained with {key} = {before[key]!r}, not {value!r}: "
                    "choose another directory with --run"
                )
    temporary = path.with_suffix(".tmp")
    temporary.write_text(to_toml(config))
    temporary.replace(path)
