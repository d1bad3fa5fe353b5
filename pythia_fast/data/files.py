"""Files that are whole or absent, one builder at a time, ordered work ahead, progress on stderr."""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import BinaryIO, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

HASH_BYTES = 8 << 20


@contextmanager
def publish(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears under `path`, synced and complete, or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Holds the advisory lock file `path`; it falls with its process, so it is never stale.

    Yields whether it is held: some network file systems have no locks. What is built under one is
    deterministic and published whole, so that two builders then waste work but no data.
    """
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True


def sha256_file(path: Path, advance: Callable[[float, str], None] | None = None) -> str:
    """Hex sha256 of a file's bytes, read once and not mapped. advance: told the bytes hashed."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(HASH_BYTES):
            digest.update(block)
            if advance is not None:
                advance(len(block), "")
    return digest.hexdigest()


def ahead(
    pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], depth: int
) -> Iterator[Result]:
    """function(item) of each item, in order, at most `depth` of them computed ahead in `pool`."""
    rest = iter(items)
    pending: deque[Future[Result]] = deque()
    try:
        pending.extend(pool.submit(function, item) for item in islice(rest, depth))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(function, item) for item in islice(rest, 1))
            yield result
    finally:
        for future in pending:
            future.cancel()


@contextmanager
def progress(label: str, total: float, unit: str) -> Iterator[Callable[[float, str], None]]:
    """A bar on stderr, or a line every ten seconds; yields advance(amount, new label or "")."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from pythia_fast.progress import PlainLines, console

    share = TextColumn("{task.percentage:3.0f} % of {task.total:,.0f} " + unit)
    columns = (TextColumn("{task.description}"), BarColumn(), share, TimeRemainingColumn())
    plain, quiet = PlainLines(), not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task(label, total=total)

        def line() -> str:
            state = bar.tasks[task]
            return f"{state.description}: {state.percentage:.0f} % of {total:,.0f} {unit}"

        def advance(amount: float, relabel: str = "") -> None:
            bar.update(task, advance=amount, description=relabel or None)
            if relabel:
                bar.refresh()
            plain.offer(line)

        yield advance
