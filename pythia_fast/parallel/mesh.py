"""The mesh: which process this one is, and its groups. How many share what: `degrees.py`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pythia_fast.config import Config
from pythia_fast.errors import CheckError, Ending, InputError
from pythia_fast.parallel.degrees import AXES, Degrees, degrees
from pythia_fast.parallel.groups import START, join, shorten

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh, ProcessGroup

T = TypeVar("T")

# torch 2.13 gave them new names and calls the old ones deprecated
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class Mesh:
    """This process's place, and its groups: None where the axis has a single process."""

    def __init__(self, degrees: Degrees, rank: int, device: torch.device) -> None:
        self.degrees, self.rank, self.device = degrees, rank, device
        self.stage, self.copy, self.part = degrees.coordinates(rank)
        self.device_mesh: DeviceMesh | None = None
        self._settled = False
        self.control: ProcessGroup | None = None  # of all, on CPUs: nothing on a GPU waits for it
        if degrees.world > 1:
            from torch.distributed.device_mesh import init_device_mesh

            self.control = dist.new_group(backend="gloo", timeout=START)
            shape = (degrees.pipeline, degrees.data, degrees.tensor)
            self.device_mesh = init_device_mesh(device.type, shape, mesh_dim_names=AXES)

    @classmethod
    def alone(cls, device: torch.device) -> Self:
        """The mesh of a single process."""
        return cls(Degrees(), 0, device)

    def aside(self) -> Self:
        """This mesh with a control group of its own, for a thread beside training; all call it."""
        other = copy(self)
        if self.control is not None:
            other.control = dist.new_group(backend="gloo", timeout=START)
        return other

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

    def together(self, action: Callable[[], T]) -> list[T]:
        """What action() returned on every process, by rank.

        Where it raises InputError, CheckError or OSError on one, all raise what the first raised:
        nobody is left waiting, and all end the same way.
        """
        return together(self.control, action)

    def each(self, action: Callable[[], T]) -> T:
        """As `together`: this process's own result, whatever it is."""
        return each(self.control, action)

    def settle(self, seconds: float) -> None:
        """Time-outs of collectives once a first step is done, compiled and all: `seconds`."""
        if self.control is not None and not self._settled:
            axes = [g for g in (self.group(axis) for axis in AXES) if g is not None]
            assert dist.group.WORLD is not None
            shorten([dist.group.WORLD, self.control, *axes], seconds)
            self._settled = True

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


def together(group: ProcessGroup | None, action: Callable[[], T]) -> list[T]:
    """`Mesh.together` on the processes of a CPU group; None: this one alone."""
    if group is None:
        return [action()]
    outcome: tuple[T | None, Exception | None]
    try:
        outcome = action(), None
    except (InputError, CheckError, OSError) as error:
        outcome = None, error
    outcomes: list[Any] = [None] * group.size()
    dist.all_gather_object(outcomes, outcome, group=group)
    for _, raised in outcomes:
        if raised is not None:
            if isinstance(raised, Ending):
                raised.shared = True
            raise raised
    return [result for result, _ in outcomes]


def each(group: ProcessGroup | None, action: Callable[[], T]) -> T:
    """`Mesh.each` on the processes of a CPU group."""
    own: list[T] = []
    together(group, lambda: own.append(action()))
    return own[0]


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
    """The mesh on the processes of this launch; joins and leaves them where nobody has joined.

    Degrees are checked before anything is joined. Raises InputError on every process alike.
    """
    found = degrees(c, world_size())
    rank, device = int(os.environ.get("RANK", "0")), local_device()
    if found.world == 1:
        yield Mesh(found, 0, device)
        return
    here = not dist.is_initialized()  # else the launch has joined them
    if here:
        join(device)
    try:
        yield Mesh(found, rank, device)
    except Ending as error:
        error.rank = None if error.shared else rank
        raise
    finally:
        if here:
            dist.destroy_process_group()
