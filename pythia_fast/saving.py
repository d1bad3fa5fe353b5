"""Checkpoints saved beside training: copied in a moment, written while the next steps run.

The copy stays in one host buffer, pinned beside a GPU and reused from save to save; a thread writes
it, on a group of its own, so that its collectives never meet those of training. There is one save
at a time: the next waits for it. Memory: 12 bytes of the host a parameter that a process owns.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from pythia_fast import checkpoint
from pythia_fast.errors import InputError
from pythia_fast.parallel.mesh import Mesh
from pythia_fast.pieces import Pieces

State = Mapping[str, Tensor | Pieces]
_ALIGN = 64  # bytes


class Saver:
    """Saves the checkpoints of a run and prunes the rolling ones; a context manager.

    background: `save` returns as soon as the state is copied; else when it is published.
    """

    def __init__(self, run_dir: Path, mesh: Mesh, keep: int, background: bool) -> None:
        self._run_dir, self._keep = run_dir, keep
        self._mesh = mesh.aside() if background else mesh
        self._stage = Stage() if background else None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, step: int, state: State, extra: dict[str, Any], permanent: bool) -> None:
        """As `checkpoint.save`; all processes call it.

        Raises what a save before it has failed with, and in the foreground its own failure.
        """
        self.wait()
        if self._stage is None:
            self._write(step, state, extra, permanent)
            return
        work = (step, self._stage.copy(state), extra, permanent)
        self._thread = threading.Thread(target=self._attempt, args=work, name="save", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether the last save failed on this process; `wait` raises why, on all of them."""
        return self._failure is not None

    def wait(self) -> None:
        """Returns when nothing is being saved. Raises what the last save has failed with."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _attempt(self, *work: Any) -> None:
        try:
            if self._mesh.device.type == "cuda":
                torch.cuda.set_device(self._mesh.device)  # a thread begins on the first
            self._write(*work)
        except BaseException as error:
            self._failure = error

    def _write(self, step: int, state: State, extra: dict[str, Any], permanent: bool) -> None:
        checkpoint.save(self._run_dir, step, state, extra, permanent, self._mesh)
        self._mesh.together(lambda: self._mesh.main and checkpoint.prune(self._run_dir, self._keep))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        elif self._thread is not None and self._mesh.control is None:
            self._thread.join()  # among others one may be gone: what is half saved is no checkpoint


class Stage:
    """A copy of a state on the host, in one buffer that is made at the first and kept."""

    def __init__(self) -> None:
        self._buffer: np.ndarray | None = None
        self._used = 0

    def copy(self, state: State) -> dict[str, Tensor | Pieces]:
        """The state as it is now; the copy before this one is overwritten.

        Of pieces only what this process saves. Returns when a GPU has delivered.
        """
        boxes = [box for held in state.values() for box in _boxes(held)]
        on_gpu = any(box.is_cuda for box in boxes)
        if self._buffer is None:
            self._buffer = host_memory(sum(_room(box) for box in boxes), pinned=on_gpu)
        self._used = 0
        copied = {name: self._copied(held) for name, held in state.items()}
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return copied

    def _copied(self, held: Tensor | Pieces) -> Tensor | Pieces:
        if isinstance(held, Tensor):
            return self._put(held)
        boxes = [(offsets, self._put(box)) for offsets, box in held.boxes] if held.writes else []
        return Pieces(held.shape, held.dtype, held.writes, boxes)

    def _put(self, box: Tensor) -> Tensor:
        """A tensor whose storage is the box alone: DCP clones what is a part of a larger one."""
        copy, count = torch.empty(0, dtype=box.dtype), box.numel()
        if count:
            copy = torch.frombuffer(self._buffer, dtype=box.dtype, count=count, offset=self._used)
        copy = copy.view(box.shape)
        copy.copy_(box, non_blocking=True)
        self._used += _room(box)
        return copy


def host_memory(size: int, pinned: bool) -> np.ndarray:
    """uint8 (size,), of no larger an allocation: torch rounds pinned memory to a power of two.

    Raises InputError where the host does not pin so much.
    """
    memory = np.empty(size, np.uint8)
    if pinned:
        runtime: Any = torch.cuda.cudart()
        portable = 1  # cudaHostRegisterPortable: in every context
        error = int(runtime.cudaHostRegister(memory.ctypes.data, size, portable))
        if error:
            raise InputError(
                f"checkpoint.async = true: this host does not pin {size:,} bytes (CUDA error "
                f"{error}); false saves without"
            )
        weakref.finalize(memory, runtime.cudaHostUnregister, memory.ctypes.data)
    return memory


def _boxes(held: Tensor | Pieces) -> list[Tensor]:
    if isinstance(held, Tensor):
        return [held]
    return [box for _, box in held.boxes] if held.writes else []


def _room(box: Tensor) -> int:
    return math.ceil(box.nbytes / _ALIGN) * _ALIGN
