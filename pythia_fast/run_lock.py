"""One trainer a run: a lock that the kernel releases however its holder ends."""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from pythia_fast.errors import InputError


def holder(run_dir: Path) -> str:
    """What the last holder of a run's lock wrote into it: pid, host, a random word; empty: none."""
    try:
        return (run_dir / ".lock").read_text(errors="replace")
    except OSError:
        return ""


class RunLock:
    """`with RunLock(run):` one process at a time; the kernel releases it however the holder ends.

    Raises InputError naming the holder's pid. Creates the run directory; what fails before it
    wrote a file there leaves no directory and no lock behind.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir, self._file = run_dir, run_dir / ".lock"
        self._fd = -1
        self._made: list[Path] = []  # directories, the innermost first

    def __enter__(self) -> Self:
        try:
            path = (self._run_dir, *self._run_dir.parents)
            self._made = [directory for directory in path if not directory.exists()]
            for file in (p for p in path if p.exists() and not p.is_dir()):
                raise InputError(f"{file} is not a directory")
            self._lock()
            while os.fstat(self._fd).st_nlink == 0:  # a failing holder has just removed it
                os.close(self._fd)
                self._lock()
        except BlockingIOError:
            pid = (
                os.pread(self._fd, 20, 0).decode("ascii", "replace").partition("\n")[0] or "unknown"
            )
            os.close(self._fd)
            raise InputError(
                f"another process (pid {pid}) is training in {self._run_dir}"
            ) from None
        except OSError as error:
            done = "written" if self._fd < 0 else "locked"
            if self._fd >= 0:
                os.close(self._fd)
            raise InputError(f"{self._run_dir} cannot be {done}: {error.strerror}") from error
        os.ftruncate(self._fd, 0)
        words = f"{os.getpid()}\n{socket.gethostname()} {secrets.token_hex(8)}\n"
        os.pwrite(self._fd, words.encode(), 0)
        os.fsync(self._fd)  # hosts that share the directory read it
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is not None:
            self._leave_nothing()
        os.close(self._fd)

    def _lock(self) -> None:
        self._fd = -1
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _leave_nothing(self) -> None:
        with suppress(OSError):  # not empty: others use the directory
            if list(self._run_dir.iterdir()) == [self._file]:
                self._file.unlink()
                for directory in self._made:
                    directory.rmdir()
