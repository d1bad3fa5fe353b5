"""Data parallelism: D processes train on their own rows of a step and add up their gradients.

What a process updates of the flat buffers (`optim.AdamW`), by parallel.shard:

    none        all of it, as every other process does; gradients meet in an all-reduce
    full        its rows of every parameter, by FSDP2: a layer's weights are gathered in the compute
                dtype when it runs, its gradients meet in a reduce-scatter in fp32 each microbatch
    optimizer   one part in D of each bucket: gradients meet in a reduce-scatter, once a step and
                in fp32; master weights and moments exist for that part alone; after the update the
                weights are gathered in the compute dtype, once a step, while the next step begins

A bucket is a range of the flat buffers in units of D aligned parts. Parts of a process in the order
of their buckets are its own buffers, so that one launch updates them. Gradients are summed, never
averaged: the loss is divided by the positions of the whole step.

Bytes that a process sends in a step of N parameters: 2·g·N·(D−1)/D for gradients of g bytes where
nothing is sharded; (g + w)·N·(D−1)/D with optimizer states sharded and weights of w bytes; and with
everything sharded (g + 2w)·N·(D−1)/D a microbatch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup, Work

from pythia_fast.parallel.mesh import Mesh, all_gather, reduce_scatter

if TYPE_CHECKING:
    from pythia_fast.model import Pythia


@dataclass(frozen=True)
class Ownership:
    """Which elements of a flat buffer this process updates.

    buckets: ranges of the flat buffer one after another, each a multiple of `copies` elements.
    """

    buckets: tuple[slice, ...]
    copies: int = 1
    copy: int = 0

    @property
    def pieces(self) -> list[slice]:
        """This process's part of each bucket, flat."""
        own = []
        for bucket in self.buckets:
            length = (bucket.stop - bucket.start) // self.copies
            own.append(
                slice(bucket.start + self.copy * length, bucket.start + (self.copy + 1) * length)
            )
        return own

    def bucket(self, view: Tensor) -> int:
        """The bucket in which a view of the whole flat buffer lies."""
        return bisect_right(self.buckets, view.storage_offset(), key=lambda b: b.start) - 1

    @property
    def size(self) -> int:
        return sum(piece.stop - piece.start for piece in self.pieces)

    def below(self, position: int) -> int:
        """How many of the own elements lie below a flat position."""
        return sum(min(max(position - p.start, 0), p.stop - p.start) for p in self.pieces)

    def of_own(self, own: Tensor) -> list[Tensor]:
        """The parts of a buffer of `size` elements, a bucket each."""
        return list(own.split([p.stop - p.start for p in self.pieces]))

    def take(self, own: Tensor, flat: Tensor) -> None:
        """own ← this process's pieces of flat."""
        for part, piece in zip(self.of_own(own), self.pieces, strict=True):
            part.copy_(flat[piece])


class Reduction:
    """Adds a flat gradient up over data-parallel processes, a bucket at a time.

    A bucket sets off as soon as `finished` has named all that lies in it, so that the last
    microbatch's backward pass goes on meanwhile; what is never named sets off in `finish`. Every
    process names in the same order.
    """

    def __init__(
        self, grad: Tensor, total: Tensor, own: Ownership, views: Iterable[Tensor],
        group: ProcessGroup,
    ) -> None:  # fmt: skip
        """grad: flat, what this process accumulates. total: where the sums of own elements go, in
        the dtype in which they are formed; grad itself where that is its own and all are owned.
        views: of grad, all that `finished` may name.
        """
        self.grad, self.own, self.group = grad, own, group
        self.in_place = total is grad
        self.totals = own.of_own(total)
        self._elements = [0] * len(own.buckets)
        for view in views:
            self._elements[own.bucket(view)] += view.numel()
        self._left = list(self._elements)  # elements that are not finished
        self._running: dict[int, tuple[Work, Tensor]] = {}  # with the source, which must live on

    def finished(self, grads: Iterable[Tensor]) -> None:
        """These views of grad are what they will be in this step."""
        for view in grads:
            bucket = self.own.bucket(view)
            self._left[bucket] -= view.numel()
            if self._left[bucket] == 0:
                self._start(bucket)

    def finish(self) -> None:
        """Starts what has not been started, and waits for all sums."""
        for bucket in range(len(self._left)):
            if bucket not in self._running:
                self._start(bucket)
        for work, _ in self._running.values():
            work.wait()
        self._running = {}
        self._left = list(self._elements)

    def _start(self, bucket: int) -> None:
        source, total = self.grad[self.own.buckets[bucket]], self.totals[bucket]
        if self.own.copies > 1:
            source = source.to(total.dtype)
            work = reduce_scatter(total, source, group=self.group, async_op=True)
        else:
            if not self.in_place:
                total.copy_(source)
            work = dist.all_reduce(total, group=self.group, async_op=True)
        assert work is not None
        self._running[bucket] = work, source


class Arrival:
    """Brings the weights of a step from their owners, a bucket at a time, while the step begins.

    A bucket is waited for when a module runs that has weights in it: `before`. The last, in which
    the vectors of all layers are, sets off first, the others in their order, that of use.
    """

    def __init__(
        self, weight: Tensor, own: Ownership, model: nn.Module, group: ProcessGroup
    ) -> None:
        """weight: flat, of which the model's parameters are views."""
        # autograd counts writes to a buffer as a whole: here one arrives beside others in use
        self._weight, self._own, self._group = weight.data, own, group
        self._wanted = {
            module: sorted({own.bucket(p) for p in module.parameters()})
            for module in model.modules()
        }
        self._running: dict[int, Work] = {}

    def start(self, own: Tensor) -> None:
        """weight ← every process's own, which must stay as it is until all has arrived."""
        assert not self._running, "what was under way was not waited for"
        parts = list(zip(self._own.buckets, self._own.of_own(own), strict=True))
        for i in range(-1, len(parts) - 1):
            bucket, part = parts[i]
            work = all_gather(self._weight[bucket], part, group=self._group, async_op=True)
            assert work is not None
            self._running[i % len(parts)] = work

    def before(self, module: nn.Module) -> None:
        """Returns when the weights of a module are there; beside a GPU, its stream waits."""
        if self._running:
            for bucket in self._wanted[module]:
                self._wait(bucket)

    def finish(self) -> None:
        for bucket in list(self._running):
            self._wait(bucket)

    def _wait(self, bucket: int) -> None:
        work = self._running.pop(bucket, None)
        if work is not None:
            work.wait()


# --- parameters that FSDP2 shards -----------------------------------------------------------------


def shard_fully(model: Pythia, mesh: Mesh, compute: torch.dtype) -> None:
    """Splits the rows of each (meta) parameter over data-parallel processes, a layer a group.

    Parameters become DTensors, of which the optimizer's fp32 master holds the local part: FSDP2
    reads anew, before its first forward pass, what the model's parameters then are.
    """
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    assert mesh.device_mesh is not None
    copies = mesh.device_mesh["data"]
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    for layer in model.gpt_neox.layers:
        fully_shard(layer, mesh=copies, mp_policy=policy)
    fully_shard(model, mesh=copies, mp_policy=policy)
    register_fsdp_forward_method(model, "loss")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # a sum: the loss has been divided
            module.set_force_sum_reduction_for_comms(True)


def at_hand(t: Any) -> Tensor:
    """What this process holds of a DTensor; any other tensor as it is."""
    return t.to_local() if hasattr(t, "to_local") else t


def put_(parameter: Any, whole: Tensor, dtype: torch.dtype) -> None:
    """parameter ← what this process holds of `whole`, rounded to dtype on the way."""
    if hasattr(parameter, "to_local"):
        copies = parameter.device_mesh
        whole = whole.chunk(copies.size())[copies.get_local_rank()]
    at_hand(parameter).copy_(whole.to(dtype))


def in_place_of(parameter: Any, local: Tensor) -> Tensor:
    """`local` as what this process holds of a parameter like that one."""
    if not hasattr(parameter, "to_local"):
        return local
    from torch.distributed.tensor import DTensor  # half a second of imports

    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements,
        run_check=False, shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip
