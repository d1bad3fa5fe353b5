"""One case of a benchmark in a process of its own, which may die, hang or run out of memory.

Processes are forked from a server that has torch imported and no CUDA context (multiprocessing's
"forkserver"): a fresh process costs a fork and a context instead of ten seconds of imports, so that
every implementation on every shape can have one. Rows travel as they are made; a killed case keeps
those that it has given.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from bench.record import Row

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "bench.processes"])


@dataclass(frozen=True)
class Case:
    """`module.measure(**what)` yields rows; `head` stands in each, and in the row of a failure.

    limit_s: seconds after which its process is killed.
    """

    module: str
    name: str
    head: Row
    what: Row = field(default_factory=dict)
    limit_s: float = 60.0


def run(case: Case, seconds: float) -> Iterator[Row]:
    """The rows of one case within min(seconds, its limit); the last says what went wrong, if so.

    A row's "part" tells the rows of one case apart.
    """
    limit = min(seconds, case.limit_s)
    end = time.monotonic() + limit
    given: Row | None = None
    here, there = _CONTEXT.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile(prefix="pythia-fast-bench-", suffix=".log") as log:
        process = _CONTEXT.Process(target=_child, args=(case, there, log.name))
        process.start()
        there.close()
        try:
            while here.poll(max(end - time.monotonic(), 0)):
                given = here.recv()
                yield _row(case, given)
            yield _row(case, {"status": "timeout", "reason": f"killed after {limit:.0f} s"})
            return
        except EOFError:  # it has given all its rows, or died
            process.join(10)
        finally:
            _kill(process.pid)  # with what it has started; also when we are interrupted
            if process.is_alive():
                process.kill()  # where it has not become a group yet
            process.join(10)
        if process.exitcode:
            reason = _cause(process.exitcode, Path(log.name))
            yield _row(case, {"status": "crash", "reason": reason})
        elif given is None:
            yield _row(case, {"status": "error", "reason": "it measured nothing"})


def _row(case: Case, given: Row) -> Row:
    return {"case": case.name, "part": "", **case.head, "status": "ok", **given}


def _child(case: Case, rows: Connection, log: str) -> None:
    os.setsid()  # a group of its own, so that what it starts can be ended with it
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    try:
        for row in importlib.import_module(case.module).measure(**case.what):
            rows.send(row)
    except Exception as error:
        traceback.print_exc()
        rows.send(failure(error))


def failure(error: Exception) -> Row:
    """Status and reason of an exception; of a long message the first line."""
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    exhausted = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    if exhausted or "out of memory" in text.lower() or "can't allocate memory" in text:
        return {"status": "out of memory", "reason": text}
    return {"status": "error", "reason": text}


def _cause(code: int, log: Path) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        killed = " (the system's memory may have been over)" if -code == signal.SIGKILL else ""
        head = f"ended by {name}{killed}"
    else:
        head = f"exit code {code}"
    tail = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-3:]
    return ": ".join([head, *([" | ".join(tail)] if tail else [])])


def _kill(group: int | None) -> None:
    with suppress(ProcessLookupError, PermissionError):
        if group is not None:
            os.killpg(group, signal.SIGKILL)
