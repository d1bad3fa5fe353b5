"""What one process of several does in the tests of data parallelism."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from kernel_proof import Mutant, load_mutant
from parallel_proof import held, whole
from parallel_proof import step as one_step
from torch import Tensor

import pythia_fast.assemble
import pythia_fast.flat
import pythia_fast.optim
import pythia_fast.train
from pythia_fast.config import load
from pythia_fast.parallel import data
from pythia_fast.parallel.mesh import all_gather, joined
from pythia_fast.train import Trainer

# clipped from the first step on, so that the norm reaches the weights; 8 microbatches a step
SMALL = """
--model.hidden 64 --model.heads 4 --train.batch_size 16 --train.micro_batch_size 2 --train.steps 8
--optimizer.clip 0.5 --optimizer.warmup 0.1
""".split()


def steps(page: Path, flags: list[str], count: int, bucket: int = 1) -> dict[str, Any]:
    """`count` steps from the initial weights, each process on its own rows.

    losses, norms, lr; gradients of the first step and weights and moments of the last, whole;
    early: buckets of the last step that set off before its backward pass was over, of how many.
    """
    pythia_fast.flat.BUCKET = bucket  # elements: else a small model has a single one
    config = load(page, [*SMALL, *flags])
    with joined(config) as mesh:
        trainer = Trainer(config, page.parent / "no-run", mesh)
        trainer._initialise()
        losses, norms, early = [], [], []
        reduction = trainer.optimizer._reduction
        if reduction is not None:
            finish = reduction.finish
            reduction.finish = lambda: (early.append(len(reduction._running)), finish())  # type: ignore[method-assign]
        for step in range(count):
            loss, norm = one_step(trainer, step)
            losses.append(loss)
            norms.append(norm)
            if step == 0:
                gradients = held(trainer, trainer.optimizer._own_grad)
        o = trainer.optimizer
        if o.arrival is not None:
            o.arrival.finish()
        return {
            "losses": losses, "norms": norms, "updates": o.updates, "gradients": gradients,
            "weights": {n: whole(p.detach()) for n, p in trainer.model.named_parameters()},
            "master": held(trainer, o.master), "exp_avg_sq": held(trainer, o.exp_avg_sq),
            "valid": trainer.validate(), "early": early, "buckets": len(o.layout.buckets), "states": o.master.numel(),
            "fused": trainer.model.fused is not None,
        }  # fmt: skip


USED_BY = {  # what of a mutated file takes the place of the real one, and where
    "pythia_fast/parallel/data.py": (
        (pythia_fast.optim, "Ownership"),
        (pythia_fast.optim, "Reduction"),
        (pythia_fast.optim, "Arrival"),
        (pythia_fast.assemble, "shard_fully"),
    ),
    "pythia_fast/optim.py": ((pythia_fast.assemble, "AdamW"),),
    "pythia_fast/data/loader.py": ((pythia_fast.train, "Share"),),
    "pythia_fast/model.py": ((pythia_fast.assemble, "Pythia"),),
    "pythia_fast/train.py": ((sys.modules[__name__], "Trainer"),),
}


def steps_of_mutant(
    page: Path, flags: list[str], count: int, mutant: Mutant, late: bool = False
) -> dict[str, Any]:
    with TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        module = load_mutant(mutant, Path(directory))
        if late:
            patch.setattr(module if hasattr(module, "all_gather") else data, "all_gather", Late)
        for user, name in USED_BY[mutant.file]:
            patch.setattr(user, name, getattr(module, name))
        return steps(page, flags, count)


class Late:
    """An all-gather that brings nothing before it is waited for."""

    def __init__(self, *tensors: Tensor, async_op: bool, **group: Any) -> None:
        self.tensors, self.group = tensors, group

    def wait(self) -> None:
        all_gather(*self.tensors, **self.group)


def late_steps(page: Path, flags: list[str], count: int) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "all_gather", Late)
        return steps(page, flags, count)
