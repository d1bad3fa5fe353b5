"""A run small enough for tests: a learnable corpus, its page, and processes that train it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from corpus import write_pair
from kernel_proof import REPOSITORY

PAGE = """
[model]
layers = 2
hidden = 32
heads = 2
vocab_size = 64
[data]
prefix = "{data}/train"
valid_prefix = "{data}/valid"
seq_len = 16
[train]
steps = 40
batch_size = 8
micro_batch_size = 4
valid_every = 20
valid_rows = 8
[optimizer]
lr = 1e-2
min_lr = 1e-3
[precision]
compute = "fp32"
[checkpoint]
every = 5
"""


def documents(count: int, seed: int) -> list[np.ndarray]:
    """Runs of ids that each follow from the last one: a model learns them in a few steps."""
    random = np.random.default_rng(seed)
    return [
        (random.integers(0, 64) + np.arange(random.integers(20, 60)) * random.integers(1, 4)) % 64
        for _ in range(count)
    ]


def make_page(directory: Path, name: str = "tiny") -> Path:
    write_pair(directory / "train", documents(300, 0))
    write_pair(directory / "valid", documents(20, 1))
    page = directory / f"{name}.toml"
    page.write_text(PAGE.format(data=directory))
    return page


def start(page: Path, run: Path, *flags: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pythia_fast", "train", str(page), "--run", str(run), *flags]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 120) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def train_stopping_at(module: ModuleType, config: object, run: Path, step: int) -> None:
    """Trains in this process until a SIGTERM arrives within `step`."""
    original = module.Trainer.train_step

    def stopping(self, tokens):  # type: ignore[no-untyped-def]
        result = original(self, tokens)
        if self.step == step:
            signal.raise_signal(signal.SIGTERM)
        return result

    module.Trainer.train_step = stopping
    try:
        with pytest.raises(module.Stopped) as stopped:
            module.train(config, run)
        assert stopped.value.signum == signal.SIGTERM
    finally:
        module.Trainer.train_step = original


def wait_for(
    condition: Callable[[], bool], process: subprocess.Popen[str], timeout: float = 60
) -> bool:
    """Polls until condition holds; False where the process ended first."""
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        if condition():
            return True
        if process.poll() is not None:
            return condition()
        time.sleep(0.002)
    raise AssertionError("waited in vain")


def rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    whole = path.read_text().rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def result(run: Path, step: int) -> dict[str, Any]:
    """What must be equal bit for bit: tensors' bytes, metrics without timing, ledger."""
    import hashlib

    from pythia_fast import checkpoint

    path = checkpoint.directory(run, step)
    digest = hashlib.sha256()
    for prefix in ("model.", "exp_avg.", "exp_avg_sq."):
        for name, tensor in sorted(checkpoint.load_all(path, prefix=prefix).items()):
            digest.update(f"{prefix}{name}".encode() + tensor.numpy().tobytes())
    metrics = [
        {k: v for k, v in r.items() if k != "tokens_per_s"} for r in rows(run / "metrics.jsonl")
    ]
    return {
        "tensors": digest.hexdigest(),
        "metrics": metrics,
        "ledger": rows(run / "ledger.jsonl"),
        "running": checkpoint.read_manifest(path)["ledger"],
        "checkpoints": checkpoint.steps(run),
    }
