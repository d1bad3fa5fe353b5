"""A training step in which nothing is computed, so that every kernel it launches gets compiled.

    python -m pythia_fast.rehearsal PAGE.toml GPU       in a process of its own (`prebuild.py`)

The step is the trainer's own, on the meta device: shapes, strides and offsets are those of the run,
and no tensor has memory. Of the processes of a layout one of each kind takes it, in a group that
sends nothing. Triton's JIT sees what it sees at a launch (dtypes, constants, which integers and
addresses are multiples of 16), for the GPU that is named, and launches nothing. With that its cache
holds the step's kernels under the keys that a run looks up.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pythia_fast.config import Config, load
from pythia_fast.errors import InputError
from pythia_fast.parallel.degrees import Degrees, degrees
from pythia_fast.progress import say

if TYPE_CHECKING:
    from pythia_fast.flat import Layout
    from pythia_fast.parallel.mesh import Mesh

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


# --- who rehearses what ---------------------------------------------------------------------------


def rehearse(config: Config) -> int:
    """A step and held-out rows of every rank that launches kernels of its own; how many these are.

    Raises InputError. Only where `stand_in` has made the kernels accept tensors without memory.
    """
    whole, count = degrees(config, config.parallel.processes), 0
    of_stage = whole.data * whole.tensor
    for stage in different_stages(config):
        layout, seen = None, set[tuple[object, ...]]()
        for rank in range(stage * of_stage, (stage + 1) * of_stage):
            _, copy, part = whole.coordinates(rank)
            kinds: set[tuple[object, ...]] = {("start", *vocabulary_start(config, part))}
            if layout is not None:
                kinds.add(("counts", *counts(config, layout, copy)))
                if kinds <= seen:
                    continue
            if whole.world > 1:
                say(f"rank {rank} of {whole.world}: stage {stage}, copy {copy}, part {part}")
            with place(whole, rank) as mesh:
                layout = rehearse_rank(config, mesh)
            seen |= {*kinds, ("counts", *counts(config, layout, copy))}
            count += 1
    return count


def different_stages(config: Config) -> Iterator[int]:
    """One place in the pipeline of each kind: layers, embedding, head of its stages."""
    from pythia_fast.parallel.pipeline import layers_of_stages

    every, seen = layers_of_stages(config), set[tuple[object, ...]]()
    for stage in range(config.parallel.pipeline):
        own = every[stage :: config.parallel.pipeline]
        kind = (own[0].start == 0, own[-1].stop == config.model.layers, *map(len, own))
        if kind not in seen:
            seen.add(kind)
            yield stage


def counts(config: Config, layout: Layout, copy: int) -> tuple[int, ...]:
    """How many elements of each kind of parameter a data-parallel process updates."""
    from pythia_fast.parallel.data import Ownership

    p = config.parallel
    shared = p.shard == "optimizer" and p.data > 1
    own = Ownership(layout.buckets, p.data if shared else 1, copy if shared else 0)
    ends = layout.decay_until, layout.replicated_from, layout.row_biases_from
    return own.size, *map(own.below, ends)


def vocabulary_start(config: Config, part: int) -> tuple[bool, bool]:
    """What Triton asks of the first token id of a tensor-parallel process: is it 1, 16·n?"""
    start = part * (config.model.vocab_size // config.parallel.tensor)
    return start == 1, start % 16 == 0


@contextmanager
def place(whole: Degrees, rank: int) -> Iterator[Mesh]:
    """The mesh of one of processes that do not exist: nothing is sent, nothing arrives."""
    import torch.distributed as dist
    import torch.distributed._tools.fake_collectives  # noqa: F401  torch < 2.13: on meta tensors
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from pythia_fast.parallel.mesh import Mesh

    if whole.world == 1:
        yield Mesh.alone(META)
        return
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=whole.world)
    try:
        yield Mesh(whole, rank, META)
    finally:
        dist.destroy_process_group()


# --- a rank's step --------------------------------------------------------------------------------


def rehearse_rank(config: Config, mesh: Mesh) -> Layout:
    """A step of few microbatches and a pass over held-out rows; where the parameters lie.

    Two microbatches: the first writes gradients, the second adds, and every second row begins at an
    odd multiple of 8 bytes. Of a pipeline twice as many as it has stages, and its own schedule.
    """
    from pythia_fast.assemble import assemble
    from pythia_fast.ops import select
    from pythia_fast.train import Trainer

    t, copies = config.train, mesh.degrees.data
    ranks = config.precision.ranks if copies == 1 else 1
    microbatches = min(
        t.batch_size // (copies * ranks * t.micro_batch_size), 2 * config.parallel.pipeline
    )
    rows = microbatches * ranks * t.micro_batch_size  # of this process
    config = replace(config, train=replace(t, batch_size=rows * copies))
    trainer: Any = object.__new__(Trainer)  # without its data
    ops = select("triton", META, config.kernels.deterministic)
    trainer.config, trainer.device, trainer.mesh = config, META, mesh
    trainer.model, trainer.optimizer, trainer.pipeline = assemble(config, mesh, ops)
    trainer._on_device(_tokens(rows, config))
    if config.data.valid_prefix:
        _evaluate(trainer)
    layout: Layout = trainer.optimizer.layout
    return layout


@torch.no_grad()
def _evaluate(trainer: Any) -> None:
    """Held-out rows: an odd and an even microbatch, and the last where it has fewer rows."""
    c = trainer.config
    whole, rest = divmod(c.train.valid_rows, c.train.micro_batch_size)
    rows = (whole if whole < 3 else 2 + whole % 2) * c.train.micro_batch_size + rest
    loss = trainer.model.loss if trainer.pipeline is None else trainer.pipeline.evaluate
    for microbatch in _tokens(rows, c).split(c.train.micro_batch_size):
        loss(microbatch, 1.0)


def _tokens(rows: int, config: Config) -> Tensor:
    return torch.empty((rows, config.data.seq_len + 1), dtype=torch.int64, device=META)


# --- what stands in for a GPU and for other processes ---------------------------------------------


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
    _stand_in_for_processes()
    return _compile_for(chip)


def _stand_in_for_processes() -> None:
    """What torch's fake groups lack: groups of another backend, tensors on the meta device."""
    import torch.distributed as dist
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    new_group, cpu = dist.new_group, {k: v for k, v in vars(torch.cpu).items() if k[0] != "_"}
    dist.new_group = lambda *ranks, **named: new_group(*ranks, **named | {"backend": None})
    dist.batch_isend_irecv = lambda p2p_op_list: []  # between stages
    torch.meta = SimpleNamespace(**cpu | {"current_device": lambda: 0})  # type: ignore[attr-defined]
    FSDPParamGroup._validate_no_meta_params = lambda self: None  # type: ignore[method-assign]


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
    try:
        ranks = rehearse(config)
    except InputError as error:
        print(error)
        return 2
    found = {"triton": triton.__version__, "kernels": sorted(launched), "ranks": ranks}
    print(json.dumps(found | {"different": sum(map(len, launched.values()))}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
