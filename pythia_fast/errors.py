"""The ways a command ends that are not a bug: one line, or none, and an exit code."""

from __future__ import annotations


class Ending(Exception):
    """One line that says what and where.

    shared: every process of the launch raises it, so that the first alone need say it. rank: of
    the process that alone raised it.
    """

    shared = False
    rank: int | None = None


class InputError(Ending):
    """What the user gave cannot be used. Exit code 2."""


class CheckError(Ending):
    """The thing that was checked is wrong. Exit code 1."""


class Terminated(Exception):
    """SIGTERM outside of training, where there is nothing to save. Exit code 143."""


def outcome(error: BaseException) -> tuple[str, int] | None:
    """(line, exit code) of a command that ends with `error`; None: a bug, which has a traceback."""
    line = " ".join(str(error).split())
    if isinstance(error, InputError | CheckError):
        return line, 2 if isinstance(error, InputError) else 1
    if isinstance(error, KeyboardInterrupt):
        return "", 130
    if isinstance(error, Terminated):
        return line, 143
    if isinstance(error, OSError):  # a full disk, a folder that may not be written
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}", 2
    return None
