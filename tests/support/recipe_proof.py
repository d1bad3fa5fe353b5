"""A trainer and an optimizer to put beside numpy, and what a recipe's tests share."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

import pythia_fast.optim
import pythia_fast.train
from pythia_fast.config import Config, resolve
from pythia_fast.ops import REFERENCE

BATCH = 8


def fresh_trainer(
    config: Config, run: Path, module: ModuleType = pythia_fast.train
) -> pythia_fast.train.Trainer:
    """A trainer whose every parameter is random, biases and LayerNorms too: no fault can hide."""
    trainer = module.Trainer(config, run)
    trainer._load_newest()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, view in trainer.optimizer.views(trainer.optimizer.master).items():
            drawn = torch.randn(view.shape, generator=generator)
            view.copy_(drawn * 0.2 + ("norm.weight" in name))
    trainer.optimizer.sync_weights()
    return trainer


def batch(trainer: pythia_fast.train.Trainer, step: int) -> np.ndarray:
    return trainer.rows.tokens(step * BATCH, (step + 1) * BATCH).astype(np.int64)


class Plain(torch.nn.Module):
    """One decaying matrix: what the optimizer does to gradients, without a model."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.dense = torch.nn.Linear(16, 8, bias=False)


def optimizer_for(module: ModuleType = pythia_fast.optim, **keys: Any) -> Any:
    """An AdamW on `Plain`, weights 0; keys are dotted with "__"."""
    config = resolve({k.replace("__", "."): v for k, v in keys.items()})
    device = torch.device("cpu")
    return module.AdamW(Plain(), config.optimizer, config.precision, REFERENCE, device)


FP16 = {"precision__compute": "fp16", "precision__gradients": "fp16", "precision__gradient_sum": "fp16",
        "precision__loss_scaling": "hysteresis"}  # fmt: skip


def accumulate(optimizer: Any, gradients: np.ndarray) -> None:
    """gradients (ranks, microbatches, 8, 16) in the weights' dtype, as backward would leave them."""
    parameter = optimizer._parameters[0][0]
    for share in gradients:
        for gradient in share:
            parameter.grad = torch.from_numpy(gradient).to(parameter.dtype)
            optimizer.accumulate()
        optimizer.end_rank()
