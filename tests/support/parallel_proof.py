"""What tests of parallel training run on every process, and how its results are compared."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parallel_faults import fault
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from pythia_fast import checkpoint
from pythia_fast.config import Config, load
from pythia_fast.data.commands import rows_from
from pythia_fast.data.loader import read_batch
from pythia_fast.model import Pythia, initial_weights, materialise
from pythia_fast.optim import DTYPES
from pythia_fast.parallel.data import Arrival, in_place_of
from pythia_fast.parallel.mesh import Mesh, joined
from pythia_fast.train import Trainer, train


def trainer_at_start(config: Config, mesh: Mesh, run: Path) -> Trainer:
    trainer = Trainer(config, run, mesh)
    trainer._initialise()
    return trainer


def step(trainer: Trainer, number: int) -> tuple[float, float]:
    """(loss, gradient norm) of one step on its batch."""
    c = trainer.config
    batch = read_batch(
        trainer.rows, number, c.train.batch_size, c.model.vocab_size, trainer._share()
    )
    loss, norm = trainer.train_step(trainer._staged(batch.tokens))
    return loss.item(), norm.item()


def follow(page: str, flags: list[str], steps: int, faulty: str | None = None) -> dict[str, Any]:
    """Losses, gradient norms, first moments after the first step, and this process's place."""
    config = load(page, flags)
    with joined(config) as mesh, fault(faulty):
        trainer = trainer_at_start(config, mesh, Path(page).parent / "run")
        found = [step(trainer, 0)]
        gradients = {
            n: g.float().clone().numpy()
            for n, g in trainer.optimizer.views(trainer.optimizer.grad).items()
        }
        moments = {n: t.float().numpy().copy() for n, t in whole(trainer).items()}
        found += [step(trainer, i) for i in range(1, steps)]
        valid = trainer.validate()
        place = {
            "part": mesh.part,
            "parts": mesh.degrees.tensor,
            "fused": trainer.model.fused is not None,
        }
        return {
            "steps": np.array(found),
            "moments": moments,
            "gradients": gradients,
            "valid": valid,
            **place,
        }


def whole(trainer: Trainer) -> dict[str, Tensor]:
    """First moments by name, of this process's tensor-parallel part."""
    o, parameters = trainer.optimizer, trainer.model.named_parameters()
    flat = o.exp_avg
    if o._sharded:
        flat = gathered(trainer, o.exp_avg)
    if o._full:
        return {n: in_place_of(p, o.views(flat)[n]).full_tensor() for n, p in parameters}
    return o.views(flat)


def gathered(trainer: Trainer, own: Tensor) -> Tensor:
    """The flat buffer of which each process has its own elements; gaps would show as NaN."""
    o = trainer.optimizer
    assert o._copies is not None
    flat = own.new_full((o.layout.size,), float("nan"))
    arrival = Arrival(flat, o.own, trainer.model, o._copies)
    arrival.start(own)
    arrival.finish()
    return flat


def exact_gradients(page: str, flags: list[str]) -> dict[str, Tensor]:
    """float64 gradients of the first step's mean loss, of the weights that the run computes with."""
    c = load(page, flags)
    model = Pythia(c.model)
    materialise(model, "cpu", torch.float64)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, drawn in initial_weights(c.model, c.train.seed):
            parameters[name].copy_(drawn.to(DTYPES[c.precision.compute]))
    rows = rows_from(c).tokens(0, c.train.batch_size)
    model.loss(torch.from_numpy(rows.astype(np.int64))).backward()
    return {n: p.grad for n, p in parameters.items() if p.grad is not None}


def collectives(page: str, flags: list[str]) -> dict[str, int]:
    """How often each collective runs in the second step."""
    config = load(page, flags)
    with joined(config) as mesh:
        trainer = trainer_at_start(config, mesh, Path(page).parent / "run")
        step(trainer, 0)
        counted = CommDebugMode()
        modules = counted.advanced_module_tracker  # by module it loses count at a second microbatch
        modules.__enter__, modules.__exit__ = lambda: None, lambda *_: None
        modules.module_parents_dict[""] = set()
        with counted:
            step(trainer, 1)
        return {str(op).partition(".")[2]: n for op, n in counted.get_comm_counts().items() if n}


def run(page: str, flags: list[str], directory: str, faulty: str | None = None) -> dict[str, Any]:
    """Trains to the last step; the last row of metrics.jsonl."""
    with fault(faulty):
        return train(load(page, flags), Path(directory))


def carry(page: str, flags: list[str], source: str, target: str, faulty: str | None = None) -> None:
    """Loads the newest checkpoint of run `source` and saves it again in run `target`."""
    config = load(page, flags)
    with joined(config) as mesh, fault(faulty):
        trainer = Trainer(config, Path(source), mesh)
        step = checkpoint.newest(Path(source))
        assert step is not None
        checkpoint.load(checkpoint.directory(Path(source), step), trainer.optimizer.state(), mesh)
        checkpoint.save(Path(target), step, trainer.optimizer.state(), {}, True, mesh)


def digests(directory: Path) -> dict[str, str]:
    """sha256 of every tensor of a run's newest checkpoint."""
    step = checkpoint.newest(directory)
    assert step is not None
    tensors = checkpoint.load_all(checkpoint.directory(directory, step), prefix="")
    return {n: hashlib.sha256(t.numpy().tobytes()).hexdigest() for n, t in tensors.items()}
