"""Saving beside training: what is saved is the state of its step, whatever runs meanwhile."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny_run
import torch
from kernel_proof import Mutant, assert_killed
from torch import Tensor

from pythia_fast import checkpoint, saving, train
from pythia_fast.config import load, to_toml
from pythia_fast.errors import InputError
from pythia_fast.parallel.mesh import Mesh
from pythia_fast.pieces import Pieces

ALONE = Mesh.alone(torch.device("cpu"))


def state(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    pair = torch.randn(6, 10, generator=g)
    return {
        "model.left": pair[:, :4],  # columns of one matrix: no contiguous views
        "model.right": pair[:, 4:],
        "exp_avg.bias": torch.randn(7, generator=g),
        "exp_avg.none": torch.zeros(0, 3),
    }


def held_back(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing waits for the event."""
    go, write = threading.Event(), checkpoint.write_tensors

    def waiting(*args: Any) -> Any:
        assert go.wait(60)
        return write(*args)

    monkeypatch.setattr(checkpoint, "write_tensors", waiting)
    return go


def saves_the_state_of_its_step(
    module: ModuleType, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next step overwrites everything before a byte is written; twice, by the same buffer."""
    now, wanted = state(1), {}
    with module.Saver(run, ALONE, keep=9, background=True) as saver:
        for step in (1, 2):
            with monkeypatch.context() as patch:
                go = held_back(patch)
                wanted[step] = {name: t.clone() for name, t in now.items()}
                saver.save(step, now, {}, permanent=True)
                assert checkpoint.newest(run) == (step - 1 or None), "it did not wait for the disk"
                for tensor in now.values():
                    tensor.mul_(-3).add_(step)
                go.set()
                saver.wait()
            assert checkpoint.newest(run) == step
    for step, tensors in wanted.items():
        saved = checkpoint.load_all(checkpoint.directory(run, step), prefix="")
        assert saved.keys() == tensors.keys()
        assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items()), step


def test_a_step_meanwhile_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saves_the_state_of_its_step(saving, tmp_path / "run", monkeypatch)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("self._stage.copy(state)", "state"),
        ("copy.copy_(box, non_blocking=True)", "copy = box"),
        ("self._used += _room(box)", "self._used += box.nbytes // 2 // 64 * 64"),
        ("        self._used = 0\n        copied", "        copied"),
        ("        self.wait()\n        if self._stage is None", "        if self._stage is None"),
    ],
)
def test_mutants(old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(module: ModuleType) -> None:
        if "self.wait()" in old:
            one_save_at_a_time(module, tmp_path / f"{module.__name__}", monkeypatch)
        else:
            saves_the_state_of_its_step(module, tmp_path / f"{module.__name__}", monkeypatch)

    check(saving)
    assert_killed(Mutant(new, "pythia_fast/saving.py", old, new), check, tmp_path)


def one_save_at_a_time(module: ModuleType, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    with monkeypatch.context() as patch, module.Saver(run, ALONE, 9, background=True) as saver:
        go = held_back(patch)
        now = state(1)
        wanted = now["exp_avg.bias"].clone()
        saver.save(1, now, {}, permanent=True)
        threading.Timer(0.3, go.set).start()
        now["exp_avg.bias"].zero_()
        saver.save(2, now, {}, permanent=True)
        assert checkpoint.newest(run) == 1, "the second begins when the first is there"
    assert checkpoint.steps(run) == [1, 2]
    assert torch.equal(
        checkpoint.load_all(checkpoint.directory(run, 1), "exp_avg.")["bias"], wanted
    )


def test_a_box_is_copied_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DCP clones a tensor of a larger storage, which is what the boxes of a state are."""
    cloned: list[Tensor] = []
    monkeypatch.setattr(Tensor, "clone", lambda self, **_: cloned.append(self) or self.detach())
    with saving.Saver(tmp_path / "beside", ALONE, keep=9, background=True) as saver:
        saver.save(1, state(1), {}, permanent=True)
    assert not cloned
    with saving.Saver(tmp_path / "not", ALONE, keep=9, background=False) as saver:
        saver.save(1, state(1), {}, permanent=True)
    assert len(cloned) == 2  # both columns


def test_pinned_memory_is_registered_to_the_byte_while_it_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registered: dict[int, int] = {}

    class Runtime:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            assert flags == 1
            if size == 7:
                return 2  # cudaErrorMemoryAllocation
            registered[address] = size
            return 0

        def cudaHostUnregister(self, address: int) -> None:
            registered.pop(address)

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    memory = saving.host_memory(1000, pinned=True)
    assert registered == {memory.ctypes.data: 1000}
    tensor = torch.frombuffer(memory, dtype=torch.float32, count=3, offset=64)
    address = tensor.data_ptr()
    del memory
    assert registered == {address - 64: 1000}
    del tensor
    assert not registered
    saving.host_memory(1000, pinned=False)
    with pytest.raises(InputError, match=r"does not pin 7 bytes \(CUDA error 2\); false saves"):
        saving.host_memory(7, pinned=True)
    assert not registered


def test_one_buffer_is_reused_and_pieces_that_others_save_take_none_of_it() -> None:
    mine, theirs = torch.randn(4, 3), torch.randn(5)
    whole = torch.Size([8, 3])
    held = {
        "a": Pieces(whole, torch.float32, True, [(torch.Size([4, 0]), mine)]),
        "b": Pieces(theirs.shape, torch.float32, False, [(torch.Size([0]), theirs)]),
    }
    stage = saving.Stage()
    one, two = stage.copy(held), stage.copy(held)
    a, again, b = one["a"], two["a"], one["b"]
    assert isinstance(a, Pieces) and isinstance(again, Pieces) and isinstance(b, Pieces)
    assert b.boxes == [] and b.shape == theirs.shape and not b.writes
    assert a.boxes[0][1].data_ptr() == again.boxes[0][1].data_ptr() != mine.data_ptr()
    assert torch.equal(a.boxes[0][1], mine) and a.boxes[0][0] == torch.Size([4, 0])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.make_page(tmp_path_factory.mktemp("page"))


def test_a_run_saves_the_same_either_way(page: Path, tmp_path: Path) -> None:
    for name in ("true", "false"):
        config = load(page, ["--train.steps", "12", "--checkpoint.async", name])
        train.train(config, tmp_path / name)
    for step in checkpoint.steps(tmp_path / "true"):
        one, two = (tiny_run.result(tmp_path / name, step) for name in ("true", "false"))
        assert one == two
    assert checkpoint.steps(tmp_path / "true") == [0, 1, 2, 4, 5, 8, 10, 12]


def test_a_failure_ends_the_run_at_the_next_step(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint.write_tensors
    done = threading.Event()

    def full(path: Path, *args: Any) -> Any:
        if ".step5." in path.name:
            done.set()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, *args)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    step: Callable[..., Any] = train.Trainer.train_step

    def after_it(self: train.Trainer, tokens: Tensor) -> Any:
        if self.step == 5:
            assert done.wait(60)
            while not self.saver.failed:
                done.wait(0.01)
        return step(self, tokens)

    monkeypatch.setattr(train.Trainer, "train_step", after_it)
    run = tmp_path / "run"
    with pytest.raises(InputError, match=r"disk full while saving step 5 to .* is step 4"):
        train.train(load(page, ["--train.steps", "12", "--checkpoint.async", "true"]), run)
    assert len(tiny_run.rows(run / "ledger.jsonl")) == 6
    assert checkpoint.newest(run) == 4 and not list((run / "checkpoints").glob(".*"))


def test_the_last_save_is_waited_for_and_its_failure_told(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    config = load(page, ["--train.steps", "2", "--checkpoint.async", "true"])
    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(InputError, match="cannot save step"):
        train.train(config, tmp_path / "run")


def test_a_stop_waits_for_its_checkpoint(page: Path, tmp_path: Path) -> None:
    config = load(page, ["--checkpoint.async", "true"])
    tiny_run.train_stopping_at(train, config, tmp_path / "run", 7)
    assert checkpoint.newest(tmp_path / "run") == 7


def test_the_key_is_called_async(page: Path) -> None:
    config = load(page, ["--checkpoint.async", "true"])
    assert config.checkpoint.async_ and "\nasync = true\n" in to_toml(config)
    assert "checkpoint.async" not in config.decisive
    with pytest.raises(InputError, match=r"unknown key checkpoint.async_; did you mean"):
        load(page, ["--checkpoint.async_", "true"])
