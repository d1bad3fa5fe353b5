"""A checkpoint's tensor that no single process holds: boxes of it, and torch's planners for them.

Names, shapes and boxes of a checkpoint are those of the whole model, so that what one layout of
processes saved any other can load. A process that owns a flat range of a row-major matrix owns up
to three boxes of it: part of a first row, whole rows, part of a last row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    ChunkStorageMetadata,
    DefaultLoadPlanner,
    DefaultSavePlanner,
)
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


@dataclass
class Pieces:
    """What one process has of a tensor of `shape`.

    boxes: (offsets in the whole tensor, a view of the process's memory) each. writes: whether this
    process is the one that saves them; every process loads them.
    """

    shape: torch.Size
    dtype: torch.dtype
    writes: bool = True
    boxes: list[tuple[torch.Size, Tensor]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes that this process saves."""
        return sum(box.nbytes for _, box in self.boxes) if self.writes else 0

    @property
    def is_cuda(self) -> bool:
        return any(box.is_cuda for _, box in self.boxes)

    def at(self, offsets: Sequence[int] | None) -> Tensor:
        """The box at these offsets."""
        wanted = torch.Size(offsets or ())
        return next(box for where, box in self.boxes if where == wanted)

    # --- what torch.distributed.checkpoint asks for (torch.distributed._checkpointable) ---

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        if not self.writes:
            return []
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets, box.shape) for offsets, box in self.boxes]


class SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        held = self.state_dict[index.fqn]
        return held.at(index.offset) if isinstance(held, Pieces) else super().lookup_object(index)


class LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Any = None, is_coordinator: bool = False
    ) -> None:
        """As the default does, which would walk into every value that is not a tensor."""
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        held = self.state_dict[index.fqn]
        return held.at(index.offset) if isinstance(held, Pieces) else super().lookup_tensor(index)


def boxes_of(
    own: Tensor, piece: slice, start: int, shape: torch.Size, stride: int
) -> Iterator[tuple[torch.Size, Tensor]]:
    """Boxes of a parameter within flat positions `piece`: (offsets in it, view of `own`) each.

    own: the process's memory of piece, 1-D. The parameter begins at flat position start; rows of a
    matrix are `stride` elements apart, a vector is one row.
    """
    columns = shape[-1]
    rows = math.prod(shape[:-1])
    first = min(max(-(-(piece.start - start - columns + 1) // stride), 0), rows)
    last = min(-(-(piece.stop - start) // stride), rows)  # behind the last row that begins in it
    row = first
    while row < last:
        begin = start + row * stride
        low, high = max(piece.start, begin), min(piece.stop, begin + columns)
        count = 1
        if high - low == columns:  # and as many whole rows as follow
            count = min(last, (piece.stop - begin - columns) // stride + row + 1) - row
        if low < high:
            size, strides = (count, high - low), (stride, 1)
            view = own.as_strided(size, strides, own.storage_offset() + low - piece.start)
            if len(shape) == 1:
                yield torch.Size((low - begin,)), view[0]
            else:
                yield torch.Size((row, low - begin)), view
        row += count
