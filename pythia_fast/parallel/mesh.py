"""The mesh: how many processes share what, and which of them this one is.

Ranks are numbered pipeline outermost, then data, tensor innermost, as in GPT-NeoX: the tensor
processes of one copy of a layer are neighbours, on the fastest links.

    rank = (stage·D + copy)·P + part        D data, P tensor
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
import torch.distributed as dist
from torch import Tensor

from pythia_fast.config import Config
from pythia_fast.errors import InputError

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh, ProcessGroup

# torch 2.13 gave them new names and calls the old ones deprecated
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

AXES = ("pipeline", "data", "tensor")


@dataclass(frozen=True)
class Degrees:
    """Processes along each axis; their product is the number of processes."""

    pipeline: int = 1
    data: int = 1
    tensor: int = 1

    @property
    def world(self) -> int:
        return self.pipeline * self.data * self.tensor

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(stage, copy, part) of a rank."""
        rest, part = divmod(rank, self.tensor)
        return *divmod(rest, self.data), part


def degrees(c: Config, world: int) -> Degrees:
    """The degrees of `c.parallel` on `world` processes; data = -1 takes what is left.

    Raises InputError naming the two numbers that do not fit.
    """
    p, m, t = c.parallel, c.model, c.train
    for name in ("tensor", "pipeline", "stages_per_rank"):
        if getattr(p, name) < 1:
            raise InputError(f"parallel.{name} = {getattr(p, name)} must be positive")
    if p.data < 1 and p.data != -1:
        raise InputError(f"parallel.data = {p.data}: expected a positive number, or -1")
    inner = p.tensor * p.pipeline
    data = max(world // inner, 1) if p.data == -1 else p.data
    if data * inner != world:
        product = f"parallel.tensor = {p.tensor} times parallel.pipeline = {p.pipeline}"
        if p.data != -1:
            product = f"parallel.data = {p.data} times {product}"
        verb = "does not divide" if p.data == -1 else "is not"
        raise InputError(f"{product} {verb} the {world} processes of this launch")
    for count, what in (
        (m.heads, "model.heads"), (m.vocab_size, "model.vocab_size"),
        *([(c.data.seq_len, "data.seq_len")] if p.sequence else []),
    ):  # fmt: skip
        if count % p.tensor:
            raise InputError(f"{what} = {count} is not divisible by parallel.tensor = {p.tensor}")
    if p.sequence and p.tensor == 1:
        raise InputError("parallel.sequence = true needs parallel.tensor > 1, which is 1")
    stages = p.pipeline * p.stages_per_rank
    if m.layers < stages:
        raise InputError(f"model.layers = {m.layers} are fewer than the {stages} pipeline stages")
    if t.batch_size % (data * t.micro_batch_size):
        raise InputError(
            f"train.batch_size = {t.batch_size} is not divisible by parallel.data = {data} times "
            f"train.micro_batch_size = {t.micro_batch_size}"
        )
    if c.precision.gradients != "fp32" and data not in (1, c.precision.sum_ranks):
        raise InputError(
            f"parallel.data = {data} is not precision.sum_ranks = {c.precision.sum_ranks}: 16-bit "
            "gradients add up over as many processes as ranks, or all on one"
        )
    return Degrees(p.pipeline, data, p.tensor)


class Mesh:
    """This process's place, and its groups: None where the axis has a single process."""

    def __init__(self, degrees: Degrees, rank: int, device: torch.device) -> None:
        self.degrees, self.rank, self.device = degrees, rank, device
        self.stage, self.copy, self.part = degrees.coordinates(rank)
        self.device_mesh: DeviceMesh | None = None
        self.control: ProcessGroup | None = None  # of all, on CPUs: nothing on a GPU waits for it
        if degrees.world > 1:
            from torch.distributed.device_mesh import init_device_mesh

            self.control = dist.new_group(backend="gloo")
            shape = (degrees.pipeline, degrees.data, degrees.tensor)
            self.device_mesh = init_device_mesh(device.type, shape, mesh_dim_names=AXES)

    @classmethod
    def alone(cls, device: torch.device) -> Self:
        """The mesh of a single process."""
        return cls(Degrees(), 0, device)

    @property
    def main(self) -> bool:
        """Whether this process writes the run's files and speaks for all."""
        return self.rank == 0

    def largest(self, value: int) -> int:
        """The largest of all processes' values; the host waits, a GPU does not."""
        if self.control is None:
            return value
        found = torch.tensor(value)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.control)
        return int(found)

    def sum_(self, total: Tensor, axis: str) -> Tensor:
        """total ← its sum along an axis; returns it."""
        group = self.group(axis)
        if group is not None:
            dist.all_reduce(total, group=group)
        return total

    def group(self, axis: str) -> ProcessGroup | None:
        """The processes that differ from this one along `axis` alone."""
        if getattr(self.degrees, axis) == 1:
            return None
        assert self.device_mesh is not None
        return self.device_mesh.get_group(axis)


def world_size() -> int:
    """Processes of this launch, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_device() -> torch.device:
    """The GPU of this process, by its number on the host; the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


@contextmanager
def joined(c: Config) -> Iterator[Mesh]:
    """Joins the processes of this launch (gloo on CPUs, NCCL on GPUs) and leaves them at the end.

    Degrees are checked before anything is joined. Raises InputError on every process alike.
    """
    found = degrees(c, world_size())
    rank, device = int(os.environ.get("RANK", "0")), local_device()
    if found.world == 1:
        yield Mesh(found, 0, device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Mesh(found, rank, device)
    finally:
        dist.destroy_process_group()
