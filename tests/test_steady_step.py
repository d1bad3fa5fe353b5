"""A steady step reads nothing back unless it logs, keeps nothing, and allocates as the one before.

Without a GPU a read is what torch has no other way to do it by: `item` and its kin. What a step
allocates is counted storage by storage; on a graph the host allocates nothing at all.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny_run
import torch
from fake_cuda import READS, Launches, address, tensors
from fused_run import batch, fresh, on_a_graph, page
from kernel_proof import Mutant, assert_killed, assert_sound
from torch.multiprocessing.reductions import StorageWeakRef

import pythia_fast.train as real
from pythia_fast.config import load

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a GPU counts for itself: test_step_on_gpu.py"
)


class Counted(Launches):
    """Operations by name, values read back, and (bytes, dtype) of each storage made."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.reads: list[str] = []
        self.made: list[tuple[int, torch.dtype]] = []
        self.storages: list[StorageWeakRef] = []
        self.inside = False  # of a kernel: the interpreter reads its arguments as it likes

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.operations.append(str(func))
        if func in READS:
            self.reads.append(str(func))
        given = {address(t) for t in tensors(args, kwargs)}
        out = func(*args, **kwargs)
        for t in tensors(out):
            if address(t) not in given:
                storage = t.untyped_storage()
                self.made.append((storage.nbytes(), t.dtype))
                self.storages.append(StorageWeakRef(storage))
        return out

    def launch(self, run: Any, arguments: Any) -> None:
        self.inside = True
        run()
        self.inside = False

    def alive(self) -> int:
        gc.collect()
        return sum(not storage.expired() for storage in self.storages)


def _noted(count: Counted, name: str) -> Any:
    method = getattr(torch.Tensor, name)

    def read(t: Any, *args: Any, **kwargs: Any) -> Any:
        if not count.inside:
            count.reads.append(name)
        return method(t, *args, **kwargs)

    return read


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    """With the ways out of torch that no operation shows."""
    count = Counted()
    with monkeypatch.context() as patch, count:
        for name in ("cpu", "numpy", "tolist", "__array__"):
            patch.setattr(torch.Tensor, name, _noted(count, name))
        yield count


@pytest.fixture(autouse=True)
def _no_check_of_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pythia_fast.kernels.cross_entropy.check_targets", lambda *_: None)


def check_step(module: ModuleType) -> None:
    """Launch by launch: what steps 3 and 4 do is equal, and nothing of them stays."""
    directory = check_step.directory  # type: ignore[attr-defined]
    patch = pytest.MonkeyPatch()
    trainer = fresh(page(directory), directory / "run", module)
    counts = []
    for step in range(4):
        tokens = batch(trainer, step)
        with counted(patch) as count:
            results = trainer.train_step(tokens)
        assert count.reads == []
        del results
        assert count.alive() == 0 or step == 0, "tables are made in the first step"
        counts.append(count)
    assert counts[3].made == counts[2].made and len(counts[3].made) > 50
    assert counts[3].operations == counts[2].operations


@pytest.fixture
def _directory(tmp_path: Path) -> None:
    check_step.directory = check_run.directory = tmp_path  # type: ignore[attr-defined]


TRAIN = "pythia_fast/train.py"
STEP_MUTANTS = [
    Mutant("norm read", TRAIN, "/ factor, norm\n", "/ factor, norm + 0 * norm.item()\n"),
    Mutant("loss read", TRAIN, "loss += micro_loss.detach()", "loss += float(micro_loss.detach().numpy())"),
    Mutant("losses kept", TRAIN, "norm = optimizer.apply()", "norm = optimizer.apply(); self.losses = getattr(self, 'losses', []); self.losses.append(loss)"),
    Mutant("a step allocates more and more", TRAIN, "norm = optimizer.apply()", "norm = optimizer.apply(); tokens.new_empty(self.step + 1)"),
]  # fmt: skip


@pytest.mark.usefixtures("_directory")
def test_a_step_launch_by_launch() -> None:
    assert_sound(STEP_MUTANTS, check_step)


@pytest.mark.usefixtures("_directory")
@pytest.mark.parametrize("mutant", STEP_MUTANTS, ids=lambda m: m.name)
def test_mutants_of_the_step_are_killed(mutant: Mutant, tmp_path: Path) -> None:
    assert_killed(mutant, check_step, tmp_path)


def test_a_replayed_step_is_four_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens and the optimizer's three scalars; the host allocates nothing."""
    trainer = fresh(page(tmp_path), tmp_path / "run")
    on_a_graph(trainer)
    for step in range(5):
        tokens = batch(trainer, step)
        with counted(monkeypatch) as count:
            trainer.train_step(tokens)
    written = [name for name in count.operations if "select" not in name]
    assert written == ["aten.fill_.Scalar"] * 3 + ["aten.copy_.default"]
    assert count.made == [] and count.reads == []


# --- in a run -------------------------------------------------------------------------------------


def check_run(module: ModuleType) -> None:
    """Values are read in the steps that log, validate or save, and in no other."""
    directory = check_run.directory  # type: ignore[attr-defined]
    config = load(tiny_run.make_page(directory), [
        "--train.steps", "12", "--log.every", "5", "--train.valid_every", "100",
        "--checkpoint.every", "0", "--checkpoint.steps", "[7]",
    ])  # fmt: skip
    reads: dict[int, int] = {}
    trainer = module.Trainer(config, directory / f"run-{id(module)}")
    patch, item = pytest.MonkeyPatch(), torch.Tensor.item

    def counting(t: torch.Tensor) -> Any:
        reads[trainer.step] = reads.get(trainer.step, 0) + 1
        return item(t)

    try:
        patch.setattr(torch.Tensor, "item", counting)
        with module.checkpoint.RunLock(trainer.run_dir):
            trainer.run()
    finally:
        patch.undo()
    assert set(reads) == {5, 7, 10, 12}


RUN_MUTANTS = [
    Mutant("looked at in every step", TRAIN, "                if save or log:\n", "                if True:\n"),
    Mutant("not looked at before saving", TRAIN, "                if save or log:\n", "                if log:\n"),
]  # fmt: skip


@pytest.mark.usefixtures("_directory")
def test_a_run_reads_where_it_logs_or_saves() -> None:
    check_run(real)


@pytest.mark.usefixtures("_directory")
@pytest.mark.parametrize("mutant", RUN_MUTANTS, ids=lambda m: m.name)
def test_mutants_of_the_run_are_killed(mutant: Mutant, tmp_path: Path) -> None:
    assert_killed(mutant, check_run, tmp_path)
