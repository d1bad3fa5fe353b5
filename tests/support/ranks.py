"""Several processes of one test: started once, given one function after another.

    ranks = Ranks()                              # fixture of a module: close it at the end
    losses = ranks.call(4, losses_of, config)    # losses_of(config) on 4 processes, a result each

A function runs as torchrun would start it (RANK, WORLD_SIZE, MASTER_PORT ... in the environment),
joins its own process group (`mesh.joined`) and leaves it. It is passed by name: it stands in a
module of tests/support, since test files have no import name. torch is imported once, by the server
that the processes are forked from: 8 of them are there in a second after it.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any, Self

from kernel_proof import REPOSITORY

_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOAD = ["torch", "torch.distributed.device_mesh", "pythia_fast.train"]


class RanksFailed(AssertionError):
    """errors: rank -> what it raised (text of the traceback); "no answer" where it hung or died."""

    def __init__(self, errors: dict[int, str]) -> None:
        super().__init__("\n".join(f"--- rank {r}:\n{e}" for r, e in sorted(errors.items())))
        self.errors = errors


class Ranks:
    """Processes that wait for work. After a failure all are ended; the next call starts new ones."""

    def __init__(self) -> None:
        self._workers: list[tuple[ForkServerProcess, Connection]] = []

    def call(self, world: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:  # fmt: skip
        """function(*args) on each of `world` processes: their results by rank.

        Raises RanksFailed where one of them raises, dies, or has not answered after `timeout`
        seconds; the others have then 5 s left to say why they ended.
        """
        self._start(world)
        environment = {
            "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        }  # fmt: skip
        pending: dict[Any, int] = {}
        for rank, (_, pipe) in enumerate(self._workers[:world]):
            pipe.send(({**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, function, args))
            pending[pipe] = rank
        results, errors = [None] * world, {}
        until = time.monotonic() + timeout
        while pending and (left := until - time.monotonic()) > 0:
            for pipe in wait(list(pending), left):
                rank = pending.pop(pipe)
                try:
                    fine, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    fine, value = False, "no answer: the process ended"
                if fine:
                    results[rank] = value
                else:
                    errors[rank] = value
                    until = min(until, time.monotonic() + 5)
        errors |= dict.fromkeys(pending.values(), "no answer")
        if errors:
            self.close()
            raise RanksFailed(errors)
        return results

    def _start(self, count: int) -> None:
        _CONTEXT.set_forkserver_preload(_PRELOAD)
        while len(self._workers) < count:
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def close(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
        for process, _ in self._workers:
            process.join()
        self._workers = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _work(pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the tests' own process answers Ctrl-C
    while True:
        try:
            environment, function, args = pipe.recv()
        except EOFError:
            return
        os.environ.update(environment)
        try:
            answer = True, function(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        if not answer[0] and dist.is_initialized():
            pipe.send(answer)
            return  # its collectives may be half done
        pipe.send(answer)
        del answer
        gc.collect()  # a trainer's cycles hold its groups: 13 threads that wake up, 40 descriptors


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def torchrun(world: int, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """`torchrun --nproc-per-node world -m pythia_fast ARGUMENTS`, its output in pipes."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world),
        "--master-port", str(free_port()), "-m", "pythia_fast", *arguments,
    ]  # fmt: skip
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # one signal to the group ends them all
    )
