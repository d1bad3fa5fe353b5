"""How the processes of one launch meet, watch each other, and end together.

    with Launch() as launch:             # as torchrun started them
        config = launch.page(read)       # one page: a failure of one is the failure of all
        ...                              # no failure leaves this block: `_end` ends the process

A process that dies, stops or raises leaves the others waiting in a collective. Here each writes a
sign of life into the launch's store every second, and watches that of the next rank. The first to
know why the launch fails writes a verdict; all end with its exit code, one of them prints its line:

    raised      by the rank that raised, at once
    killed      by a rank whose collective broke, after a look at who is silent (5 s)
    stopped     by the rank before it, after `limit` seconds of silence
    hung        by a rank whose collective timed out: where everyone's main thread is

The store is torchrun's own where there is one, with the attempt's number before every key: a
restart never reads what a dead attempt wrote.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

import torch.distributed as dist

from pythia_fast.config import Config
from pythia_fast.errors import Ending, Terminated, outcome
from pythia_fast.parallel.degrees import degrees
from pythia_fast.parallel.groups import START, has_agent_store, join, launch_store
from pythia_fast.parallel.mesh import local_device, together
from pythia_fast.parallel.same import check_same_page

BEAT = 1.0  # seconds between signs of life
LOOK = 5.0  # seconds without one after which a rank is called silent, once something has broken
GRACE = 5.0  # seconds in which a main thread may end by itself after a verdict


@dataclass(frozen=True)
class Verdict:
    """Why a launch ended: one line, the exit code of all. silent: ranks that say nothing more."""

    line: str
    code: int = 1
    silent: tuple[int, ...] = ()


class Launch:
    """This process among those of its launch; a context manager that no failure leaves.

    limit: seconds of silence after which a rank is given up.
    """

    def __init__(self) -> None:
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.limit = START.total_seconds()
        self._known: Verdict | None = None  # what this process has read or given
        self._ending = threading.Lock()  # held by the thread that ends the process
        self._over = threading.Event()

    def __enter__(self) -> Self:
        _die_with_torchrun()
        signal.signal(signal.SIGTERM, _terminate)
        self._main = threading.get_ident()
        self._store: dist.Store | None = None  # a connection of its own: others may wait in theirs
        try:
            join(local_device())
            self._control = dist.new_group(backend="gloo", timeout=START)
            self._store = launch_store(is_master=False)
            self._beat(0)
            dist.barrier(self._control)  # everyone has given a sign of life
        except Exception as error:
            self._end(error)
        self._watcher = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is None:
            try:
                dist.barrier(self._control)
                self._over.set()
                self._watcher.join()  # not within the store's code when the interpreter goes
                dist.destroy_process_group()
            except Exception as late:
                self._end(late)
        else:
            self._end(error)

    def page(self, read: Callable[[], Config]) -> Config:
        """The page that read() gives on every process; its time-out is the launch's.

        Raises InputError on all where it cannot be read on one or does not fit the launch, or
        names the first key that differs.
        """

        def fitting() -> Config:
            config = read()
            degrees(config, self.world)
            return config

        pages = together(self._control, fitting)
        check_same_page(pages)
        config = pages[self.rank]
        self.limit = config.parallel.timeout
        return config

    # --- the thread that watches ---

    def _watch(self) -> None:
        follower, seen, since, count = (self.rank + 1) % self.world, "", time.monotonic(), 0
        while not self._over.wait(BEAT):
            count += 1
            try:
                self._beat(count)
                beat = self._beats([follower])[0]
                verdict = self._verdict()
            except Exception:  # the store is gone: collectives fail by themselves
                return
            now = time.monotonic()
            if beat != seen:
                seen, since = beat, now
            elif now - since > self.limit and verdict is None:
                line = f"rank {follower} has not answered for {self.limit:g} s"
                verdict = self._give(Verdict(line, silent=(follower,)))
            if verdict is not None:
                self._leave(verdict)
                time.sleep(GRACE)
                self._finish(verdict)

    def _beat(self, count: int) -> None:
        assert self._store is not None
        self._store.set(f"beat {self.rank}", f"{count} {_position(self._main)}")

    def _beats(self, ranks: list[int]) -> list[str]:
        assert self._store is not None
        return [b.decode() for b in self._store.multi_get([f"beat {r}" for r in ranks])]

    # --- verdicts ---

    def _give(self, verdict: Verdict) -> Verdict:
        """The launch's verdict: this one where it is the first."""
        if self._store is None:  # the launch has not met
            return verdict
        found = self._store.compare_set("verdict", "", json.dumps(asdict(verdict)))
        return Verdict(**json.loads(found))

    def _verdict(self) -> Verdict | None:
        if self._store is None or not self._store.check(["verdict"]):
            return None
        return Verdict(**json.loads(self._store.get("verdict")))

    def _end(self, error: BaseException) -> NoReturn:
        """Ends this process: for a verdict that there is, or for `error`."""
        if not self._ending.acquire(blocking=False):
            time.sleep(2 * GRACE)  # the watch ends the process
        for s in (signal.SIGTERM, signal.SIGINT):
            signal.signal(s, signal.SIG_IGN)
        gone = Verdict("rank 0, or the torchrun that holds the launch's store, does not answer")
        # what holds the store may itself be stopped: asking it then takes for ever
        late = threading.Timer(
            2 * (LOOK + GRACE), lambda: self._finish(self._known or gone, locked=True)
        )
        late.start()
        try:
            verdict = self._known or self._settle(error)
        except dist.DistError:  # no store: it went with the process that held it
            verdict = self._known or replace(gone, silent=(0,) if self.rank else ())
        self._leave(verdict)
        self._finish(verdict, locked=True)

    def _settle(self, error: BaseException) -> Verdict:
        """The verdict on this process's `error`: another's, or its own."""
        verdict = self._verdict()
        if verdict is None and self._store and isinstance(error, RuntimeError | Terminated):
            verdict = self._look(error)
        shared = isinstance(error, Ending) and error.shared
        if verdict is None and self.rank > 0 and isinstance(error, Ending) and not shared:
            verdict = self._said_by_all()
        if verdict is not None:
            return verdict
        known = outcome(error)
        if known is None:
            traceback.print_exception(error)
        line, code = known or (" ".join(f"{type(error).__name__}: {error}".split()), 1)
        where = f"rank {self.rank}: " if self.rank > 0 and line and not shared else ""
        return self._give(Verdict(where + line, code))

    def _said_by_all(self) -> Verdict | None:
        """Rank 0's verdict, where all raise the same, if each by itself: it names no rank."""
        until = time.monotonic() + GRACE
        while time.monotonic() < until:
            if (verdict := self._verdict()) is not None:
                return verdict
            time.sleep(BEAT / 20)
        return None

    def _look(self, error: Exception) -> Verdict | None:
        """The verdict on a collective that broke: who is silent, or who is elsewhere."""
        others = [r for r in range(self.world) if r != self.rank]
        before, until = self._beats(others), time.monotonic() + LOOK
        while time.monotonic() < until:
            time.sleep(BEAT / 4)
            if (verdict := self._verdict()) is not None:
                return verdict
        after = self._beats(others)
        silent = [r for r, a, b in zip(others, before, after, strict=True) if a == b]
        if silent:
            who = f"rank{'s' * (len(silent) > 1)} {', '.join(map(str, silent))}"
            verb = "do" if len(silent) > 1 else "does"
            line = f"{who} {verb} not answer: killed, stopped, or the host is gone"
            return self._give(Verdict(line, silent=tuple(silent)))
        if "imed out" in str(error):
            places = {r: b.partition(" ")[2] for r, b in zip(others, after, strict=True)}
            where = "; ".join(f"rank {r} is at {place}" for r, place in places.items())
            return self._give(Verdict(f"a collective of rank {self.rank} timed out: {where}"))
        return None

    def _leave(self, verdict: Verdict) -> None:
        """This process knows the verdict. Rank 0 goes last where it holds the store itself."""
        self._known = verdict
        if self._store is None or has_agent_store():
            return
        with suppress(dist.DistError):
            self._store.set(f"left {self.rank}", "")
            others = [f"left {r}" for r in range(self.world) if r not in verdict.silent]
            until = time.monotonic() + (LOOK if self.rank == 0 else 0)
            while time.monotonic() < until and not self._store.check(others):
                time.sleep(BEAT / 20)

    def _finish(self, verdict: Verdict, locked: bool = False) -> NoReturn:
        """Prints the verdict, on one process, tells torchrun, and ends this one."""
        if not locked and not self._ending.acquire(blocking=False):
            time.sleep(2 * GRACE + LOOK)  # the main thread ends the process
        speaker = min(set(range(self.world)) - set(verdict.silent), default=0)
        if self.rank == speaker and verdict.line:
            print(f"pythia-fast: {verdict.line}", file=sys.stderr)
        _tell_torchrun(verdict)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(verdict.code)


def _position(thread: int) -> str:
    """The innermost line of this package that a thread is at: file:line (function)."""
    frame: FrameType | None = sys._current_frames().get(thread)
    package = str(Path(__file__).parents[1])
    while frame is not None and not frame.f_code.co_filename.startswith(package):
        frame = frame.f_back
    if frame is None:
        return "?"
    name = Path(frame.f_code.co_filename).relative_to(package)
    return f"{name}:{frame.f_lineno} ({frame.f_code.co_name})"


def _tell_torchrun(verdict: Verdict) -> None:
    """Puts the line into the table that torchrun prints of its failed processes."""
    if (path := os.environ.get("TORCHELASTIC_ERROR_FILE")) is not None:
        row: dict[str, Any] = {"message": verdict.line, "timestamp": int(time.time())}
        with suppress(OSError):
            Path(path).write_text(json.dumps(row))


def _terminate(signum: int, _: object) -> NoReturn:
    raise Terminated(signal.Signals(signum).name)


def _die_with_torchrun() -> None:
    """SIGTERM where torchrun dies: it starts its processes in sessions of their own.

    Source: prctl(2), PR_SET_PDEATHSIG = 1.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
