"""A trainer on the fused path under the interpreter, and its step on a recorder of graphs."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import tiny_run
from fake_cuda import Cuda
from torch import Tensor

import pythia_fast.graph
import pythia_fast.train
from pythia_fast.config import Config, load

STEPS = 5
FLAGS = ["--model.hidden", "64", "--model.layers", "1", "--train.batch_size", "2",
         "--train.micro_batch_size", "1", "--train.steps", str(STEPS),
         "--kernels.backend", "triton"]  # fmt: skip


def page(directory: Path, *flags: str) -> Config:
    return load(tiny_run.make_page(directory), [*FLAGS, *flags])


def fresh(config: Config, run: Path, train: ModuleType = pythia_fast.train) -> Any:
    trainer = train.Trainer(config, run)
    trainer._load_newest()
    return trainer


def batch(trainer: Any, step: int) -> Tensor:
    rows = trainer.config.train.batch_size
    return trainer._staged(trainer.rows.tokens(rows * step, rows * (step + 1)))


def on_a_graph(trainer: Any, module: ModuleType = pythia_fast.graph) -> Cuda:
    """The trainer with its step recorded and replayed, and the fake's log."""
    module.cuda = cuda = Cuda()  # type: ignore[attr-defined]
    trainer.compute = module.StepGraph(trainer._on_device, trainer.device)
    return cuda
