"""What a run writes down: JSON lines keyed by step, and the optional trackers.

A step log survives being killed: rows are appended whole, a torn last line is dropped, and a
resumed run cuts the file back to its checkpoint, so no step stands twice.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pythia_fast.config import Config, flatten
from pythia_fast.data.files import publish
from pythia_fast.doctor import install
from pythia_fast.errors import InputError


class StepLog:
    """An append-only file of JSON objects with ascending "step"."""

    def __init__(self, path: Path, keep_below: int) -> None:
        """Opens for appending after dropping every row with step >= keep_below.

        Raises InputError, the file untouched, where a line other than a torn last one is damaged.
        """
        kept = [line for row, line in _rows(path) if row["step"] < keep_below]
        with publish(path) as file:
            file.writelines(kept)
        self._file = path.open("ab")

    def append(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Durable on disk: called before a checkpoint that relies on these rows is published."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_steps(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a step log without a torn last one; empty where there is no file."""
    return (row for row, _ in _rows(path))


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    if not path.exists():
        return
    before = -1
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return  # torn by a kill in the middle of its write
            try:
                row = json.loads(line)
                step = row["step"]
                if not isinstance(step, int) or step <= before:
                    raise ValueError
            except (ValueError, TypeError, KeyError):
                raise InputError(f"{path}: line {number} is damaged") from None
            before = step
            yield row, line


def require_trackers(config: Config) -> None:
    """Raises InputError where a tracker that the configuration asks for is not installed."""
    for key, wanted, module in (
        ("tensorboard", config.log.tensorboard, "torch.utils.tensorboard"),
        ("wandb", config.log.wandb, "wandb"),
    ):
        try:
            if wanted:
                importlib.import_module(module)
        except ImportError:
            raise InputError(f"log.{key} needs the package {key}: {install(key)}") from None


class Trackers:
    """TensorBoard and Weights & Biases, where the configuration asks for them."""

    def __init__(self, config: Config, run: Path) -> None:
        self._tensorboard = self._wandb = None
        require_trackers(config)
        if config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(run / "tensorboard"))
        if config.log.wandb:
            import wandb

            self._wandb = wandb.init(
                project=config.log.wandb, name=run.name, dir=run, id=_wandb_id(run),
                resume="allow", config=flatten(config),
            )  # fmt: skip

    def log(self, row: dict[str, Any]) -> None:
        values = {k: v for k, v in row.items() if k != "step" and isinstance(v, int | float)}
        if self._tensorboard is not None:
            for key, value in values.items():
                self._tensorboard.add_scalar(key, value, row["step"])
        if self._wandb is not None:
            self._wandb.log(values, step=row["step"])

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _wandb_id(run: Path) -> str:
    """The id under which a run continues after a resume, drawn once and kept with it."""
    path = run / "wandb.id"
    if not path.exists():
        path.write_text(secrets.token_hex(8))
    return path.read_text()


def entropy(counts: np.ndarray) -> float:
    """−Σ p log p in nats of an array of counts: the loss of the best model without context."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())
