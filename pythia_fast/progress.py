"""Progress for people, on stderr: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False, soft_wrap=True)
PLAIN_EVERY = 10.0  # seconds between lines where stderr is no terminal


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
    """Step, loss, tokens/s and time left of a training run."""

    def __init__(self, steps: int, done: int) -> None:
        self._steps, self._start = steps, done
        self._began = time.monotonic()
        self._plain = PlainLines()
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=done)

    def __enter__(self) -> Self:
        self._bar.start()
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
        text += f"  {row['tokens_per_s']:,.0f} tokens/s"
        self._bar.update(self._task, completed=row["step"], description=text)
        done = max(row["step"] - self._start, 1)
        left = (time.monotonic() - self._began) / done * (self._steps - row["step"])
        self._plain.offer(
            lambda: f"step {row['step']}/{self._steps}  {text}  {left:.0f} s left",
            last=row["step"] == self._steps,
        )
