"""Progress for people, on stderr: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from pythia_fast.command import speaks

# of several processes the first speaks for all
console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=not speaks())
PLAIN_EVERY = 10.0  # seconds between lines where stderr is no terminal
WINDOW = 60.0  # seconds, of the rate and the time left of training


def say(message: str) -> None:
    """One plain line on stderr."""
    console.print(message, markup=False)


class PlainLines:
    """What is said where stderr is no terminal: a line every ten seconds at most."""

    def __init__(self) -> None:
        self._said = time.monotonic()

    def offer(self, line: Callable[[], str], last: bool = False) -> None:
        """Says line() if it is time for one; the last in any case."""
        if console.is_terminal:
            return
        if last or time.monotonic() - self._said >= PLAIN_EVERY:
            self._said = time.monotonic()
            say(line())


class TrainProgress:
    """Step, loss, tokens/s and time left of a training run.

    Both are of the last minute of the clock on the wall, saving and validation included, so that
    they agree with each other; metrics.jsonl has the rate of the steps alone.
    """

    def __init__(self, steps: int, done: int) -> None:
        self._steps = steps
        self._seen = deque([(time.monotonic(), done)])  # (time, steps done) of the window
        self._plain = PlainLines()
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("running", total=steps, completed=done)

    def __enter__(self) -> Self:
        self._bar.start()
        done = self._seen[0][1]
        if done < self._steps and not console.is_terminal:  # the first step may take minutes
            say(f"step {done}/{self._steps} running")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, row: dict[str, Any]) -> None:
        """row: one of metrics.jsonl."""
        loss = row["loss"]  # None: not finite, a skipped step in fp16
        text = "loss not finite" if loss is None else f"loss {loss:.4f}"
        if "valid_loss" in row:
            text += f" (held out {row['valid_loss']:.4f})"
        step, tokens_per_step = row["step"], row["tokens"] / row["step"]
        a_step = self._seconds_a_step(step)
        text += f"  {tokens_per_step / a_step:,.0f} tokens/s"
        text += f"  {a_step * (self._steps - step):,.0f} s left"
        self._bar.update(self._task, completed=step, description=text)
        self._plain.offer(lambda: f"step {step}/{self._steps}  {text}", last=step == self._steps)

    def _seconds_a_step(self, step: int) -> float:
        """Over the window that ends now, at `step`; at least since the row before."""
        now = time.monotonic()
        while len(self._seen) > 1 and now - self._seen[1][0] >= WINDOW:
            self._seen.popleft()
        since, before = self._seen[0]
        self._seen.append((now, step))
        return max(now - since, 1e-9) / max(step - before, 1)
