"""Counts what a fused step allocates at the sizes of the suite, on the meta device: no bytes move.

Launchers run as on a GPU up to the launch, which does nothing; products that add in fp32 into a
buffer allocate nothing there. Left out: cuBLAS's workspace, rounding of the caching allocator.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fake_cuda import Launches, tensors
from torch import Tensor

import pythia_fast.block
import pythia_fast.train
from pythia_fast.assemble import fuse
from pythia_fast.config import Config
from pythia_fast.kernels.attention_tiles import HALVES
from pythia_fast.lean import LeanAdamW
from pythia_fast.model import Pythia
from pythia_fast.ops import Ops, select
from pythia_fast.optim import AdamW
from pythia_fast.parallel.mesh import Mesh

META = torch.device("meta")
SMS = 132


class Live(Launches):
    """Bytes of all storages alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        for t in tensors(out):
            storage = t.untyped_storage()
            key = storage._cdata
            if key not in self.alive:
                self.alive[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, key)
        return out

    def launch(self, run: Any, arguments: list[Tensor]) -> None:
        pass

    def _freed(self, key: int) -> None:
        self.now -= self.alive.pop(key)


def _storage_address(storage: torch.UntypedStorage) -> int:
    """Different for different storages, of which none reaches into the next."""
    return storage._cdata << 48


def _address(t: Tensor) -> int:
    return _storage_address(t.untyped_storage()) + t.storage_offset() * t.itemsize


@contextmanager
def _like_a_gpu() -> Iterator[None]:
    kernels = "pythia_fast.kernels"
    nothing: Any = lambda *_, **__: None  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{kernels}.checks._check_device", nothing)
        patch.setattr(torch.UntypedStorage, "data_ptr", _storage_address)
        patch.setattr(torch.Tensor, "data_ptr", _address)
        patch.setattr("pythia_fast.block.accumulate", nothing)
        patch.setattr(f"{kernels}.linear_cross_entropy.accumulate", nothing)
        patch.setattr(f"{kernels}.cross_entropy.check_targets", nothing)
        patch.setattr("pythia_fast.block.DTYPES", HALVES)
        patch.setattr(f"{kernels}.attention_tiles.DTYPES", HALVES)
        for name in ("layer_norm", "gelu", "parallel_residual", "attention_bwd"):
            module = importlib.import_module(f"{kernels}.{name}")
            patch.setattr(module, "programs", lambda device, per_sm: SMS * per_sm)
        yield


def step_bytes(config: Config) -> tuple[int, int]:
    """(bytes that stay, most bytes at once) of a step of `Trainer` on the fused path."""
    with _like_a_gpu():
        trainer: Any = object.__new__(pythia_fast.train.Trainer)
        ops = select("triton", META)
        trainer.config, trainer.device, trainer.mesh = config, META, Mesh.alone(META)
        trainer.pipeline = None
        trainer.model = Pythia(config.model, ops)  # its parameters have no memory of their own
        return _counted(trainer, ops)


def _counted(trainer: Any, ops: Ops) -> tuple[int, int]:
    config = trainer.config
    with Live() as live:
        of = (trainer.model, config.optimizer, config.precision, ops, META)
        lean = config.optimizer.states == "lean"
        trainer.optimizer = LeanAdamW(*of, seed=0) if lean else AdamW(*of)
        fuse(trainer.model, trainer.optimizer, config, trainer.mesh)
        assert trainer.model.fused is not None
        tokens = torch.empty(
            config.train.batch_size, config.data.seq_len + 1, dtype=torch.int64, device=META
        )
        for _ in range(2):
            results = trainer._on_device(tokens)
            del results
        return live.now, live.peak
