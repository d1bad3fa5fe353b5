"""The learning-rate schedules against published values."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import ModuleType

import pytest
from kernel_proof import Mutant, assert_killed

from pythia_fast import schedule
from pythia_fast.config import Optimizer

FILE = "pythia_fast/schedule.py"

# spot values for lr = 1e-3 over 143,000 steps (the original's schedule, computed independently)
SPOTS = {
    0: 0.0, 1: 6.993007e-7, 1430: 1e-3, 10000: 9.911642e-4, 50000: 7.413580e-4,
    72215: 5.078537e-4, 100000: 2.198675e-4, 115000: 1.009174e-4, 115139: 1e-4, 142999: 1e-4,
}  # fmt: skip


def check_schedule(module: ModuleType) -> None:
    c = Optimizer(lr=1e-3, min_lr=1e-4)
    for step, expected in SPOTS.items():
        assert module.learning_rate(c, step, 143000) == pytest.approx(expected, rel=1e-6, abs=0)


def test_neox_v1_schedule_at_the_published_spots() -> None:
    check_schedule(schedule)


SCHEDULE_MUTANTS = [
    Mutant("first update moves", FILE, "c.lr * step / warmup", "c.lr * (step + 1) / warmup"),
    Mutant("cosine over E − W", FILE, "math.cos(math.pi * k / steps)", "math.cos(math.pi * k / (steps - warmup))"),
    Mutant("cosine aims at min_lr", FILE,
           "max(c.lr / 2 * (1 + math.cos(math.pi * k / steps)), c.min_lr)",
           "c.min_lr + (c.lr - c.min_lr) / 2 * (1 + math.cos(math.pi * k / steps))"),
    Mutant("cosine not shifted by the warm-up", FILE, "k = min(step, steps - warmup) - warmup", "k = min(step, steps - warmup)"),
]  # fmt: skip


@pytest.mark.parametrize("mutant", SCHEDULE_MUTANTS, ids=lambda m: m.name)
def test_schedule_mutants_are_killed(mutant: Mutant, tmp_path: Path) -> None:
    assert_killed(mutant, check_schedule, tmp_path)


def test_textbook_cosine_rises_peaks_and_ends_at_min_lr() -> None:
    c = Optimizer(lr=1e-3, min_lr=1e-4, schedule="cosine", warmup=0.1)
    curve = [schedule.learning_rate(c, n, 100) for n in range(100)]
    assert curve[0] == pytest.approx(1e-4)  # (0 + 1)/10 of the peak
    assert max(curve) == pytest.approx(curve[9]) == pytest.approx(1e-3)
    assert curve[-1] == pytest.approx(1e-4)
    middle = 1e-4 + 9e-4 / 2 * (1 + math.cos(math.pi * 45 / 90))
    assert curve[54] == pytest.approx(middle)
    assert all(a >= b for a, b in itertools.pairwise(curve[9:]))


def test_no_warmup_starts_at_the_peak() -> None:
    c = Optimizer(lr=1e-3, min_lr=0.0, warmup=0.0)
    assert schedule.learning_rate(c, 0, 100) == 1e-3
