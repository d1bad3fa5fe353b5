"""What tests of `ranks` run on every process."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from pythia_fast.config import load
from pythia_fast.parallel.mesh import joined


def total() -> tuple[int, float]:
    """(rank, Σ of rank + 1 over all)."""
    dist.init_process_group("gloo")
    mine = torch.tensor(float(os.environ["RANK"]) + 1)
    dist.all_reduce(mine)
    rank = dist.get_rank()
    dist.destroy_process_group()
    return rank, mine.item()


def threads() -> int:
    """Of this process, gloo's among them."""
    return sum(1 for _ in Path("/proc/self/task").iterdir())


def one_raises(how: str) -> None:
    """Rank 1 raises, ends or hangs while the others wait for it."""
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        if how == "raises":
            raise ValueError("said by rank one")
        if how == "ends":
            os._exit(3)
        time.sleep(60)
    dist.all_reduce(torch.zeros(1))
    dist.destroy_process_group()


def waits(page: str, settled: float | None, late: float) -> tuple[float, bool, str | None]:
    """(seconds that a collective took, whether it failed, size of the flight recorder).

    Rank 1 comes `late` seconds late. settled: seconds of the time-outs; None: still those of a
    start.
    """
    with joined(load(page, ["--parallel.shard", "none"])) as mesh:
        if settled is not None:
            mesh.settle(settled)
        dist.barrier()
        if mesh.rank == 1:
            time.sleep(late)
        began, failed = time.monotonic(), False
        try:
            mesh.largest(1)
        except RuntimeError:
            failed = True
        return time.monotonic() - began, failed, os.environ.get("TORCH_FR_BUFFER_SIZE")
