"""A training step in which nothing is computed, so that every kernel it launches gets compiled.

    python -m pythia_fast.rehearsal PAGE.toml GPU       in a process of its own (`prebuild.py`)

The step is the trainer's own, on the meta device: shapes, strides and offsets are those of the run,
and no tensor has memory. Triton's JIT sees what it sees at a launch (dtypes, constants, which
integers and addresses are multiples of 16), for the GPU that is named, and launches nothing. With
that its cache holds the step's kernels under the keys that a run looks up.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pythia_fast.config import Config, load
from pythia_fast.progress import say

META = torch.device("meta")


class Chip(NamedTuple):
    capability: int  # 90: sm_90
    multiprocessors: int
    shared: int  # bytes that a block may have


CHIPS = {
    "A100": Chip(80, 108, 163 * 1024),
    "H100": Chip(90, 132, 227 * 1024),
    "H200": Chip(90, 132, 227 * 1024),
    "B200": Chip(100, 148, 227 * 1024),
}


class Argument:
    """What a launch tells Triton of a tensor: its dtype, and whether its address is a multiple."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self._offset = int(tensor.storage_offset()) * tensor.itemsize

    def data_ptr(self) -> int:
        return (1 << 20) + self._offset  # CUDA gives memory by multiples of 512 bytes

    def ptr_range(self) -> int:
        return 0


def rehearse(config: Config) -> None:
    """Two microbatches, of which the first writes gradients and the second adds, and an update.

    Two also because every second row begins at an odd multiple of 8 bytes. With held-out data their
    loss without gradients, too. Only where `stand_in` has made the kernels accept such tensors.
    """
    from pythia_fast.assemble import assemble
    from pythia_fast.ops import select
    from pythia_fast.parallel.mesh import Mesh
    from pythia_fast.train import Trainer

    trainer: Any = object.__new__(Trainer)  # without its data
    ops = select("triton", META, config.kernels.deterministic)
    trainer.config, trainer.device, trainer.mesh = config, META, Mesh.alone(META)
    trainer.model, trainer.optimizer, trainer.pipeline = assemble(config, trainer.mesh, ops)
    count = 2 * config.train.micro_batch_size * config.precision.ranks
    shape = (min(count, config.train.batch_size), config.data.seq_len + 1)
    tokens = torch.empty(shape, dtype=torch.int64, device=META)
    trainer._on_device(tokens)
    if config.data.valid_prefix:
        with torch.no_grad():
            for rows in tokens.split(config.train.micro_batch_size):
                trainer.model.loss(rows, 1.0)


def stand_in(chip: Chip) -> dict[str, set[str]]:
    """Tensors without memory are accepted, and stand for those of `chip`.

    Returns the keys of what has been launched by the kernel's name, which fills as that goes on.

    For the rest of the process: nothing here is put back.
    """
    from pythia_fast import block
    from pythia_fast.kernels import attention_tiles, checks, cross_entropy, linear_cross_entropy
    from pythia_fast.kernels import rows as row_kernels

    nothing: Any = lambda *_, **__: None  # noqa: E731
    checks.INTERPRETED = True  # tensors need not be a GPU's
    checks._check_device = nothing
    cross_entropy.check_targets = nothing
    block.accumulate = linear_cross_entropy.accumulate = nothing  # products of cuBLAS
    row_kernels.multiprocessors = lambda device: chip.multiprocessors
    attention_tiles.shared_memory = lambda device: chip.shared
    torch.UntypedStorage.data_ptr = lambda self: self._cdata << 48  # type: ignore[method-assign]
    torch.Tensor.data_ptr = lambda self: (  # type: ignore[method-assign]
        (self.untyped_storage()._cdata << 48) + self.storage_offset() * self.itemsize
    )
    torch.Tensor.item = lambda self: 1.0  # type: ignore[method-assign]
    torch.Tensor.__bool__ = lambda self: True  # type: ignore[method-assign]
    return _compile_for(chip)


def _compile_for(chip: Chip) -> dict[str, set[str]]:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class NamedTarget:
        """The part of a Triton driver that compilation asks for."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", chip.capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    driver.set_active(NamedTarget())
    launched: dict[str, set[str]] = defaultdict(set)
    compile_and_launch = JITFunction.run

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        given = {k: Argument(v) if isinstance(v, Tensor) else v for k, v in keywords.items()}
        if self.__name__ not in launched:
            say(self.__name__)
        kernel = compile_and_launch(self, *arguments, grid=grid, warmup=True, **given)
        launched[self.__name__].add(kernel.hash)

    JITFunction.run = run
    return launched


def main(page: str, gpu: str) -> int:
    import triton

    from pythia_fast.prebuilt import PrebuiltCache

    if os.environ.get("TRITON_INTERPRET"):
        raise RuntimeError("TRITON_INTERPRET is set: nothing would be compiled")
    PrebuiltCache.missed = True  # to compile is what this is for
    config = load(Path(page), [])
    launched = stand_in(CHIPS[gpu])
    rehearse(config)
    found = {"triton": triton.__version__, "kernels": sorted(launched)}
    print(json.dumps(found | {"different": sum(map(len, launched.values()))}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
