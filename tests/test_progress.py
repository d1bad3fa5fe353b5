"""Progress lines of training: at once, and with a rate and a time left that agree."""

from __future__ import annotations

import re

import pytest

from pythia_fast import progress
from pythia_fast.progress import TrainProgress

TOKENS = 1024  # a step


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(progress, "say", lines.append)
    return lines


def row(step: int) -> dict[str, float]:
    return {"step": step, "tokens": step * TOKENS, "loss": 2.0, "tokens_per_s": 1e9}


def rate_and_left(line: str) -> tuple[float, float]:
    found = re.search(r"([\d,]+) tokens/s  ([\d,]+) s left$", line)
    assert found, line
    return float(found[1].replace(",", "")), float(found[2].replace(",", ""))


def test_the_first_line_does_not_wait_for_the_first_step(
    clock: list[float], said: list[str]
) -> None:
    with TrainProgress(1, 0) as training:
        assert said == ["step 0/1 running"]
        clock[0] += 200
        training.update(row(1))
    assert said[1:] == ["step 1/1  loss 2.0000  5 tokens/s  0 s left"]


def test_a_run_that_is_done_is_not_running(said: list[str]) -> None:
    with TrainProgress(7, 7):
        pass
    assert said == []


def test_rate_and_time_left_are_of_one_window(clock: list[float], said: list[str]) -> None:
    """A slow start (compilation, 300 s) leaves both when the minute has gone by."""
    steps, resumed = 1000, 500
    with TrainProgress(steps, resumed) as training:
        clock[0] += 300
        training.update(row(resumed + 1))
        for step in range(resumed + 2, 700):
            clock[0] += 1
            training.update(row(step))
            if said[-1].startswith(f"step {step}/"):  # said just now
                rate, left = rate_and_left(said[-1])
                assert rate * left == pytest.approx(TOKENS * (steps - step), rel=0.1)
    rate, left = rate_and_left(said[1])
    assert (rate, left) == (3, 300 * 499)
    rate, left = rate_and_left(said[-1])
    assert rate == 1024 and left == pytest.approx(steps - 699, abs=10)


def test_a_step_longer_than_the_window_is_its_own(clock: list[float], said: list[str]) -> None:
    with TrainProgress(10, 0) as training:
        for step, seconds in ((1, 500), (2, 100), (3, 100)):
            clock[0] += seconds
            training.update(row(step))
    assert [rate_and_left(line)[1] for line in said[1:]] == [4500, 800, 700]
