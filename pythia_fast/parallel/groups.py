"""Process groups of a launch: how they are joined, and how long their collectives may wait."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

START = timedelta(minutes=30)  # until the first step is done: imports, loading, compilation


def join(device: torch.device) -> None:
    """Joins the processes of this launch: gloo on CPUs, NCCL on GPUs.

    Time-outs are those of a start; `shorten` follows the first step. NCCL records its last
    collectives and writes them to a file when one times out (torchfrtrace reads them).
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    rank, world = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = launch_store(is_master=rank == 0)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=START)


def shorten(groups: list[dist.ProcessGroup], seconds: float) -> None:
    """Time-outs of groups once everyone runs; NCCL's twice, since a host can name who is missing.

    The host's own collectives (gloo) therefore fail first.
    """
    for group in groups:
        factor = 2 if dist.get_backend(group) == "nccl" else 1
        _set_pg_timeout(timedelta(seconds=factor * seconds), group)


def has_agent_store() -> bool:
    """Whether torchrun holds the launch's store; else rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def launch_store(is_master: bool) -> dist.Store:
    """A connection of its own to the store of this attempt: torchrun's, else rank 0's."""
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=is_master and not has_agent_store(),
        timeout=START,
        wait_for_workers=False,
        multi_tenant=True,
    )
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
