"""What tests of parallel training run on every process, and how its results are compared."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parallel_faults import fault
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from pythia_fast import checkpoint
from pythia_fast.config import Config, load
from pythia_fast.data.commands import rows_from
from pythia_fast.data.loader import Batch, read_batch
from pythia_fast.errors import InputError
from pythia_fast.model import Pythia, initial_weights, materialise
from pythia_fast.optim import DTYPES
from pythia_fast.parallel.data import Arrival, in_place_of
from pythia_fast.parallel.mesh import Mesh, joined
from pythia_fast.train import Trainer, train


def trainer_at_start(config: Config, mesh: Mesh, run: Path) -> Trainer:
    trainer = Trainer(config, run, mesh)
    trainer._initialise()
    return trainer


def batch_of(trainer: Trainer, number: int) -> Batch:
    """What this process reads of a step's batch."""
    c, share = trainer.config, trainer._share()
    return read_batch(trainer.rows, number, c.train.batch_size, c.model.vocab_size, share)


def step(trainer: Trainer, number: int) -> tuple[float, float]:
    """(loss, gradient norm) of one step on its batch."""
    loss, norm = trainer.train_step(trainer._staged(batch_of(trainer, number).tokens))
    return loss.item(), norm.item()


def follow(page: str, flags: list[str], steps: int, faulty: str | None = None) -> dict[str, Any]:
    """Losses and norms of each step, the first one's rows and gradients, and this place.

    Gradients are summed over data-parallel processes; of this process's stage and part.
    """
    config = load(page, flags)
    with joined(config) as mesh, fault(faulty):
        trainer = trainer_at_start(config, mesh, Path(page).parent / "run")
        found = [step(trainer, 0)]
        gradients = held(trainer, trainer.optimizer._own_grad)
        found += [step(trainer, i) for i in range(1, steps)]
        valid = trainer.validate()
        place = {
            "part": mesh.part,
            "copy": mesh.copy,
            "fused": trainer.model.fused is not None,
        }
        return {
            "steps": np.array(found),
            "rows": batch_of(trainer, 0).tokens,
            "valid": valid,
            "gradients": {n: t.float().numpy() for n, t in gradients.items()},
            **place,
        }


def held(trainer: Trainer, own: Tensor) -> dict[str, Tensor]:
    """A buffer of this process's own elements, whole; padding and gaps would show as NaN."""
    o = trainer.optimizer
    if o._full:
        like = dict(trainer.model.named_parameters())
        parts = o.views(own).items()
        return {name: whole(in_place_of(like[name], part)) for name, part in parts}
    flat = own
    if o._sharded:
        flat = gathered(trainer, own)
    return {name: view.clone() for name, view in o.views(flat).items()}


def gathered(trainer: Trainer, own: Tensor) -> Tensor:
    """The flat buffer of which each process has its own elements; gaps would show as NaN."""
    o = trainer.optimizer
    assert o._copies is not None
    flat = own.new_full((o.layout.size,), float("nan"))
    arrival = Arrival(flat, o.own, trainer.model, o._copies)
    arrival.start(own)
    arrival.finish()
    return flat


def whole(t: Tensor) -> Tensor:
    """A copy; of a DTensor, from all processes' parts."""
    return t.full_tensor() if isinstance(t, DTensor) else t.clone()


@dataclass(frozen=True)
class Exact:
    """A parameter's gradient in float64, and Σ‖gₘ‖ over the step's microbatches."""

    gradient: Tensor
    sizes: float


def refusal(page: str, flags: list[str]) -> str:
    """What a process says that joins none of such a launch; "" where it does."""
    try:
        with joined(load(page, flags)):
            return ""
    except InputError as error:
        return str(error)


def exact_gradients(page: str, flags: list[str]) -> dict[str, Exact]:
    """Of the first step's mean loss, of the weights that the run computes with."""
    c = load(page, flags)
    model = Pythia(c.model)
    materialise(model, "cpu", torch.float64)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, drawn in initial_weights(c.model, c.train.seed):
            parameters[name].copy_(drawn.to(DTYPES[c.precision.compute]))
    rows = torch.from_numpy(rows_from(c).tokens(0, c.train.batch_size).astype(np.int64))
    found = {n: Exact(torch.zeros_like(p), 0.0) for n, p in parameters.items()}
    microbatches = rows.split(c.train.micro_batch_size)
    for microbatch in microbatches:
        model.loss(microbatch, 1 / rows[:, 1:].numel()).backward()
        for name, p in parameters.items():
            assert p.grad is not None
            one = found[name]
            found[name] = Exact(one.gradient + p.grad, one.sizes + p.grad.norm().item())
            p.grad = None
    return found


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
