"""The learning-rate schedules: the original's curve and the textbook cosine."""

from __future__ import annotations

import math

from pythia_fast.config import Optimizer


def learning_rate(c: Optimizer, step: int, steps: int) -> float:
    """Learning rate of the update numbered `step` (0-based) of `steps`.

    `step` counts updates or steps, as optimizer.schedule_counts says.

    neox-v1: W = warmup·steps; n ≤ W: lr·n/W, so the first update moves nothing; then
    max(lr/2·(1 + cos(π·k/steps)), min_lr) with k = min(n, steps − W) − W. The cosine aims at 0,
    not at min_lr, and is cut off flat. Source: GPT-NeoX v1.0 learning_rates.py:61-93.
    cosine: rises over the same W as (n + 1)/W, then falls from lr to min_lr at the last update.
    """
    warmup = c.warmup * steps
    if c.schedule == "neox-v1":
        if warmup > 0 and step <= warmup:
            return c.lr * step / warmup
        k = min(step, steps - warmup) - warmup
        return max(c.lr / 2 * (1 + math.cos(math.pi * k / steps)), c.min_lr)
    if step + 1 < warmup:
        return c.lr * (step + 1) / warmup
    done = (step + 1 - warmup) / max(steps - warmup, 1)
    return c.min_lr + (c.lr - c.min_lr) / 2 * (1 + math.cos(math.pi * min(done, 1.0)))
