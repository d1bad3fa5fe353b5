"""`pythia-fast` on several processes of a launch, without torchrun: exit codes and output of each.

    ended = launch(2, ["train", page, "--run", run]).wait()      # [(code, stdout, stderr), ...]

Forked from a server that has imported torch once, as `ranks.py` does; each process gets the
environment that torchrun would give it. A fault makes one of them fail at a named place.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOAD = ["torch", "torch.distributed.device_mesh", "pythia_fast.train", "pythia_fast.cli"]


class Fault(NamedTuple):
    """How rank `rank` fails at `phase` ("init", "step", "save", "eval") of step `step`."""

    how: str  # "kill": SIGKILL, "stop": SIGSTOP, "raise", "hang", "full": of a disk
    phase: str
    rank: int
    step: int = 2


class Ended(NamedTuple):
    code: int | None  # negative: by that signal; None: it was still there
    out: str
    err: str


class Launched:
    """The processes of a launch; a context manager that leaves none behind."""

    def __init__(
        self, processes: list[ForkServerProcess], directory: Path, store: dist.Store
    ) -> None:
        self.processes, self._directory, self._store = processes, directory, store
        self._started = time.monotonic()

    def pids(self) -> list[int]:
        return [p.pid for p in self.processes if p.pid is not None]

    def wait(self, timeout: float = 60, but: Sequence[int] = ()) -> list[Ended]:
        """What became of each within `timeout` seconds; then none is left. but: ranks not waited
        for, which are killed at once when the others have ended."""
        until = time.monotonic() + timeout
        for rank, process in enumerate(self.processes):
            if rank not in but:
                process.join(max(until - time.monotonic(), 0.01))
        self.seconds = time.monotonic() - self._started
        codes = [p.exitcode for p in self.processes]
        self.close()
        return [
            Ended(code, self.read(r, "out"), self.read(r, "err")) for r, code in enumerate(codes)
        ]

    def read(self, rank: int, stream: str) -> str:
        return (self._directory / f"{rank}.{stream}").read_text(errors="replace")

    def close(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def launch(
    world: int,
    arguments: Sequence[str] | Callable[[int], Sequence[str]],
    fault: Fault | None = None,
    homes: Path | None = None,
    without: str = "",
) -> Launched:
    """Starts `pythia-fast ARGUMENTS` as each rank; arguments may depend on the rank.

    homes: rank r works in the directory homes/r. without: "module:function,...", which do nothing.
    """
    _CONTEXT.set_forkserver_preload(_PRELOAD)
    directory = Path(tempfile.mkdtemp(prefix="launched-"))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's
    shared = {
        "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    processes = []
    for rank in range(world):
        given = [str(a) for a in (arguments(rank) if callable(arguments) else arguments)]
        mine = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        home = None if homes is None else homes / str(rank)
        work = (mine, given, directory / str(rank), fault, home, without)
        process = _CONTEXT.Process(target=_work, args=work, daemon=True)
        process.start()
        processes.append(process)
    return Launched(processes, directory, store)


def _work(
    environment: dict[str, str],
    arguments: list[str],
    output: Path,
    fault: Fault | None,
    home: Path | None,
    without: str,
) -> None:
    import importlib

    import torch

    from pythia_fast.cli import main

    for name, fd in (("out", 1), ("err", 2)):
        to = os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(to, fd)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    from pythia_fast import progress

    progress.console.file = sys.stderr
    progress.console.quiet = environment["RANK"] != "0"  # imported before there was a rank
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    torch.set_num_threads(1)
    if home is not None:
        os.chdir(home)
    for module, _, function in (name.partition(":") for name in without.split(",") if name):
        setattr(importlib.import_module(f"pythia_fast.{module}"), function, lambda *_: None)
    if fault is not None and fault.rank == int(environment["RANK"]):
        arm(fault)
    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# --- faults ---------------------------------------------------------------------------------------


def arm(fault: Fault) -> None:
    """Makes this process fail as `fault` says, once."""
    import pythia_fast.train
    from pythia_fast import storage
    from pythia_fast.train import Trainer

    def strike() -> None:
        if fault.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault.how == "raise":
            raise ValueError("struck by the test")
        elif fault.how == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif fault.how == "hang":
            time.sleep(600)

    current: list[Any] = []  # the trainer

    def at(owner: Any, name: str, due: Callable[..., bool], after: bool = False) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if owner is Trainer:
                current[:] = [args[0]]
            if not after and due(*args):
                strike()
            result = real(*args, **kwargs)
            if after and due(*args):
                strike()
            return result

        setattr(owner, name, call)

    def step_is(number: int) -> Callable[..., bool]:
        return lambda *_: bool(current) and getattr(current[0], "step", -1) == number

    if fault.phase == "init":  # the processes have met, nothing is loaded
        at(pythia_fast.train, "assemble", lambda *_: True)
    elif fault.phase == "step":  # a backward pass is done, its gradients have met nobody
        from pythia_fast.optim import AdamW

        at(Trainer, "train_step", lambda *_: False)
        at(AdamW, "accumulate", step_is(fault.step - 1), after=True)
    elif fault.phase == "save":  # files are open, the checkpoint is not published
        directory = f".step{fault.step}."
        at(storage._SyncedFiles, "create_stream", lambda _, path, *__: directory in str(path))
    elif fault.phase == "eval":
        at(Trainer, "validate", step_is(fault.step))
