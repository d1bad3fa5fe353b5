"""Step logs that survive a kill, the optional trackers, and the entropy printed beside the loss."""

from __future__ import annotations

import json
import math
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st

from pythia_fast.config import load, resolve
from pythia_fast.errors import InputError
from pythia_fast.metrics import StepLog, Trackers, entropy, read_steps
from pythia_fast.train import train


def write(path: Path, count: int) -> bytes:
    log = StepLog(path, keep_below=0)
    for step in range(count):
        log.append({"step": step, "loss": 0.5 + step})
    log.sync()
    log.close()
    return path.read_bytes()


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(0, 200), keep=st.integers(0, 8))
def test_a_torn_log_keeps_its_whole_rows_below_the_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, cut: int, keep: int
) -> None:
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    data = write(path, 6)
    path.write_bytes(data[:cut])
    whole = data[:cut].count(b"\n")
    StepLog(path, keep_below=keep).close()
    expected = b"".join(data.splitlines(keepends=True)[: min(whole, keep)])
    assert path.read_bytes() == expected
    assert [row["step"] for row in read_steps(path)] == list(range(min(whole, keep)))


def test_appending_after_a_cut_leaves_no_step_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 6)
    log = StepLog(path, keep_below=3)
    log.append({"step": 3, "loss": -1.0})
    log.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[3]["loss"] == -1.0


def test_entropy_of_known_distributions() -> None:
    assert entropy(np.array([5, 5, 0, 5, 5])) == pytest.approx(math.log(4))
    assert entropy(np.array([7, 0])) == 0.0
    expected = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    assert entropy(np.array([1, 3])) == pytest.approx(expected)


ROW = {"step": 3, "loss": 1.5, "tokens": 12, "note": "text"}


def test_wandb_gets_the_numbers_of_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    fake = types.ModuleType("wandb")
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((values, step)),
        finish=lambda: calls.append("finish"),
    )
    fake.init = lambda **arguments: calls.append(arguments) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (tmp_path / "mine").mkdir()
    trackers = Trackers(resolve({"log.wandb": "suite"}), tmp_path / "mine")
    trackers.log(ROW)
    trackers.close()
    assert calls[0]["project"] == "suite" and calls[0]["name"] == "mine"
    again = Trackers(resolve({"log.wandb": "suite"}), tmp_path / "mine")
    assert calls.pop()["id"] == calls[0]["id"]  # a resumed run continues its curve
    del again
    assert calls[0]["resume"] == "allow" and calls[0]["config"]["train.steps"] == 143000
    assert calls[1:] == [({"loss": 1.5, "tokens": 12}, 3), "finish"]


def test_tensorboard_gets_the_numbers_of_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = lambda folder: types.SimpleNamespace(  # type: ignore[attr-defined]
        add_scalar=lambda *a: calls.append(a), close=lambda: calls.append(folder)
    )
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    trackers = Trackers(resolve({"log.tensorboard": True}), tmp_path)
    trackers.log(ROW)
    trackers.close()
    assert calls == [("loss", 1.5, 3), ("tokens", 12, 3), str(tmp_path / "tensorboard")]


@pytest.mark.parametrize(
    ("key", "value", "module"),
    [("log.wandb", "x", "wandb"), ("log.tensorboard", True, "torch.utils.tensorboard")],
)
def test_a_missing_tracker_says_how_to_get_it(
    key: str, value: Any, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # makes its import fail
    extra = key.removeprefix("log.")
    command = re.escape(f".venv/bin/pip install -e '.[{extra}]'")
    with pytest.raises(InputError, match=f"^{key} needs the package {extra}: {command}$"):
        Trackers(resolve({key: value}), tmp_path)
    page = tiny_run.make_page(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=command):
        train(load(page, [f"--{key}", str(value).lower()]), tmp_path / "runs" / "x")
    assert sorted(tmp_path.rglob("*")) == before
