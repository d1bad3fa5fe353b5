"""Saving and loading a checkpoint: bytes a second to the disk under the run, and of the copy first.

    python -m bench.suite --only checkpoint

Weights and both moments of a size in fp32, each tensor's rows split over the processes. `save` ends
when the checkpoint is published and synced; `load` verifies every sha256 and reads, from the page
cache; `stage` is the copy that `checkpoint.async` makes before training goes on.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from bench.processes import Case
from bench.record import Row, times

REPEATS = 4
PARTS = ("save", "load", "stage")


def cases(small: bool = False) -> Iterator[Case]:
    """The state of 70m on one process and on two, which gloo joins."""
    for processes in (1, 2):
        what: Row = {"size": "14m" if small else "70m", "processes": processes}
        if small:
            what["repeats"] = 1
        name = f"checkpoint {what['size']}, {processes} process{'es' * (processes > 1)}"
        yield Case("bench.bench_checkpoint", name, {"bench": "checkpoint", **what}, what, 240.0)


def measure(size: str, processes: int, repeats: int = REPEATS) -> Iterator[Row]:
    """A row for each of PARTS: milliseconds, gb of all processes, gbps."""
    with tempfile.TemporaryDirectory(prefix="pythia-fast-bench-") as directory:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        command = [sys.executable, "-m", "bench.bench_checkpoint", directory, size, str(repeats)]
        launch = {**os.environ, "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
        started = [
            subprocess.Popen(
                command,
                cwd=Path(__file__).resolve().parents[1],
                env={**launch, "MASTER_PORT": str(port), "RANK": str(rank)},
                stdout=subprocess.PIPE,
            )
            for rank in range(processes)
        ]
        outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError("a process failed")
    found = json.loads(outputs[0])
    for part in PARTS:
        row = times(found[part])
        yield {"part": part, "gb": found["gb"], **row, "gbps": found["gb"] / row["ms_p50"] * 1e3}


def _process(directory: Path, size: str, repeats: int) -> Row:
    """One of the processes; the times are those of the slowest."""
    from pythia_fast import checkpoint
    from pythia_fast.config import resolve
    from pythia_fast.model import Pythia
    from pythia_fast.ops import select
    from pythia_fast.parallel.degrees import Degrees
    from pythia_fast.parallel.groups import join
    from pythia_fast.parallel.mesh import Mesh, local_device, world_size
    from pythia_fast.pieces import Pieces
    from pythia_fast.saving import Stage

    device, world = local_device(), world_size()
    if world > 1:
        join(device)
    mesh = Mesh(Degrees(data=world), int(os.environ["RANK"]), device)
    model = Pythia(
        resolve({"model.preset": f"pythia-{size}"}).model, select("reference", device, True)
    )
    state: dict[str, Tensor | Pieces] = {}
    total = 0
    for kind in ("model", "exp_avg", "exp_avg_sq"):
        for name, parameter in model.named_parameters():
            shape, rows = parameter.shape, -(-len(parameter) // world)
            start = min(mesh.rank * rows, len(parameter))
            own = torch.randn(min(rows, len(parameter) - start), *shape[1:], device=device)
            offsets = torch.Size([start, *[0] * (len(shape) - 1)])
            state[f"{kind}.{name}"] = Pieces(shape, own.dtype, True, [(offsets, own)])
            total += 4 * shape.numel()
    stage, run = Stage(), directory / "run"
    path = checkpoint.directory(run, 0)

    def save() -> None:
        checkpoint.save(run, 0, state, {}, True, mesh)

    works: dict[str, Callable[[], object]] = {
        "save": save,
        "load": lambda: checkpoint.load(path, state, mesh),
        "stage": lambda: stage.copy(state),
    }
    found: Row = {"gb": total / 1e9, **{part: [] for part in PARTS}}
    for turn in range(repeats + 1):  # the first fills caches
        for part, work in works.items():
            if part == "save" and mesh.main:
                shutil.rmtree(path, ignore_errors=True)
            mesh.largest(0)  # all begin
            began = time.perf_counter()
            work()
            took = mesh.largest(round(1e6 * (time.perf_counter() - began))) / 1e3
            if turn:
                found[part].append(took)
    return found


if __name__ == "__main__":
    result = _process(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    print(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
