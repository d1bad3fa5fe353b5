"""Data parallelism: D processes train on their own rows of a step and add up their gradients.

What a process updates of the flat buffers (`optim.AdamW`), by parallel.shard:

    none        all of it, as every other process does; gradients meet in an all-reduce
    optimizer   one part in D of each bucket: gradients meet in a reduce-scatter, once a step and
                in fp32; master weights and moments exist for that part alone; after the update the
                weights are gathered in the compute dtype, once a step

A bucket is a range of the flat buffers in units of D aligned parts. Parts of a process in the order
of their buckets are its own buffers, so that one launch updates them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.distributed import ProcessGroup

from pythia_fast.parallel.mesh import all_gather, reduce_scatter


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

    def reduce(self, own: Tensor, flat: Tensor, group: ProcessGroup) -> None:
        """own ← the sum over processes of its pieces of flat."""
        for part, bucket in zip(self.of_own(own), self.buckets, strict=True):
            reduce_scatter(part, flat[bucket], group=group)

    def gather(self, flat: Tensor, own: Tensor, group: ProcessGroup) -> None:
        """flat ← every process's own."""
        for part, bucket in zip(self.of_own(own), self.buckets, strict=True):
            all_gather(flat[bucket], part, group=group)
