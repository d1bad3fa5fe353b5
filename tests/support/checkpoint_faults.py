"""Savers that die: run as a script, it forks savers of checkpoints, kills them and checks the rest.

    python checkpoint_faults.py random DIR TRIALS    SIGKILL after a random time
    python checkpoint_faults.py points DIR           death before and after each system call
    python checkpoint_faults.py limit DIR            a real limit on the size of a file

One JSON object on stdout. Forking starts a saver in milliseconds: torch is imported once.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pythia_fast import checkpoint
from pythia_fast.errors import InputError

SYSTEM_CALLS = ("open", "write", "fsync", "mkdir", "rename", "unlink", "rmdir")


def contents(step: int) -> dict[str, Tensor]:
    """What the checkpoint of `step` must hold, to the bit."""
    g = torch.Generator().manual_seed(step)
    return {
        "model.a": torch.randn(64, 48, generator=g),
        "model.b": torch.randn(7, generator=g).bfloat16(),
        "exp_avg.a": torch.randint(-(2**31), 2**31 - 1, (64, 48), generator=g, dtype=torch.int32),
        "step": torch.tensor(float(step)),
    }


def save(run: Path, step: int) -> Path:
    return checkpoint.save(run, step, contents(step), {"tokens": 8 * step}, step % 10 == 0)


def holds_exactly(run: Path, step: int) -> bool:
    """Whether the checkpoint of `step` loads and equals `contents(step)` bit for bit."""
    want = contents(step)
    into = {name: torch.zeros_like(tensor) for name, tensor in want.items()}
    manifest = checkpoint.load(checkpoint.directory(run, step), into)
    same = all(
        torch.equal(into[n].view(torch.uint8), t.view(torch.uint8))
        for n, t in want.items()
        if t.dim()
    )
    return same and bool(into["step"] == want["step"]) and manifest["tokens"] == 8 * step


def hidden(run: Path) -> list[str]:
    root = run / "checkpoints"
    return [p.name for p in root.iterdir() if p.name.startswith(".")] if root.is_dir() else []


class Calls:
    """Names the system calls of SYSTEM_CALLS and runs `on(k, when)` around each, k from 0."""

    def __init__(self, on: Callable[[int, str], None]) -> None:
        self.names: list[str] = []
        self._on, self._real = on, {n: getattr(os, n) for n in SYSTEM_CALLS}

    def points(self) -> list[int]:
        """Every call but writes, of which torch makes hundreds: each tenth."""
        writes = [k for k, name in enumerate(self.names) if name == "write"]
        others = [k for k, name in enumerate(self.names) if name != "write"]
        return sorted([*others, *writes[::10], *writes[-1:]])

    def __enter__(self) -> Calls:
        for name, real in self._real.items():
            setattr(os, name, self._wrap(name, real))
        return self

    def __exit__(self, *_: object) -> None:
        for name, real in self._real.items():
            setattr(os, name, real)

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            k = len(self.names)
            self.names.append(name)
            self._on(k, "before")
            try:
                return real(*args, **kwargs)
            finally:
                self._on(k, "after")

        return call


def in_child(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def save_for_ever(run: Path) -> None:
    with checkpoint.RunLock(run):
        checkpoint.clean(run)
        step = (checkpoint.newest(run) or 0) + 1
        while True:
            save(run, step)
            checkpoint.prune(run, keep=2)
            step += 1


def random_kills(run: Path, trials: int) -> dict[str, Any]:
    draw = random.Random(7)
    exact = torn = 0
    for _ in range(trials):
        pid = in_child(lambda: save_for_ever(run))
        time.sleep(draw.uniform(0.02, 0.3))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        torn += bool(hidden(run))
        newest = checkpoint.newest(run)
        exact += newest is None or holds_exactly(run, newest)
    permanent_lost = [s for s in range(10, (newest or 0), 10) if s not in checkpoint.steps(run)]
    return {"exact": exact, "torn": torn, "newest": newest, "permanent_lost": permanent_lost}


def crash_points(run: Path) -> dict[str, Any]:
    """Dies before and after each system call of save(2) and prune, after a complete step 1."""
    faults = 0
    failures = []

    def save_and_prune(root: Path) -> None:
        save(root, 2)
        checkpoint.prune(root, keep=1)

    for root in (run / "warm", run / "count"):
        save(root, 1)
        with Calls(lambda k, when: None) as calls:
            save_and_prune(root)
    for k in calls.points():
        for when in ("before", "after"):
            root = run / f"{k}{when}"
            save(root, 1)

            def die(at: int, moment: str, k: int = k, when: str = when) -> None:
                if (at, moment) == (k, when):
                    os._exit(9)

            def work(root: Path = root, die: Callable[[int, str], None] = die) -> None:
                with Calls(die):
                    save_and_prune(root)

            _, status = os.waitpid(in_child(work), 0)
            faults += os.waitstatus_to_exitcode(status) == 9
            newest = checkpoint.newest(root)
            checkpoint.clean(root)
            if newest is None or not holds_exactly(root, newest) or hidden(root):
                failures.append(f"{when} call {k}: newest {newest}")
    return {"points": 2 * len(calls.points()), "faults": faults, "failures": failures}


def file_limit(run: Path) -> dict[str, Any]:
    save(run, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
    try:
        save(run, 2)
        message = ""
    except InputError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return {
        "message": message,
        "steps": checkpoint.steps(run),
        "exact": holds_exactly(run, 1),
        "hidden": hidden(run),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    mode, directory = sys.argv[1], Path(sys.argv[2])
    if mode == "random":
        report = random_kills(directory, int(sys.argv[3]))
    else:
        report = {"points": crash_points, "limit": file_limit}[mode](directory)
    print(json.dumps(report))
