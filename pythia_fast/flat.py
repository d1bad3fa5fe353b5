"""Where each parameter lies in the flat buffers of the optimizer.

Parameters stand by kind, so that what decays, what tensor-parallel processes replicate and what
they sum are ranges; within a kind in the model's order. The matrices of a layer are a group of
their own, in whole units, so that data-parallel processes can split them bucket by bucket.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

ALIGN = 128  # elements; every parameter starts on a 256-byte boundary even in bf16
BUCKET = 1 << 25  # elements that are reduced at once, at least


class Slot(NamedTuple):
    """Where a parameter lies in the flat buffers; rows of a matrix are `stride` elements apart."""

    start: int
    shape: torch.Size
    stride: int

    def of(self, flat: Tensor) -> Tensor:
        strides = (self.stride, 1)[-len(self.shape) :]
        return flat.as_strided(self.shape, strides, flat.storage_offset() + self.start)


@dataclass(frozen=True)
class Layout:
    """slots by name; the first element that does not decay, is replicated, is a row bias; buckets.

    Buckets are ranges of whole units one after another; the last ends where the buffers end.
    """

    slots: dict[str, Slot]
    decay_until: int
    replicated_from: int
    row_biases_from: int
    buckets: tuple[slice, ...]

    @property
    def size(self) -> int:
        return self.buckets[-1].stop


def lay_out(
    shapes: dict[str, torch.Size], decay_embeddings: bool, copies: int = 1, paired: bool = True
) -> Layout:
    """copies: data-parallel processes that own a part of each bucket. paired: see `_place`."""
    unit = copies * ALIGN
    slots: dict[str, Slot] = {}
    end, ends = 0, []  # where each kind ends
    cuts = [0]  # where a bucket may end
    for kind in range(4):
        of_kind = {n: s for n, s in shapes.items() if _kind(n, decay_embeddings) == kind}
        for group in _groups(of_kind) if kind == 0 else [of_kind]:
            placed, end = _place(group, end, paired)
            slots |= placed
            if kind == 0:
                end = -(-end // unit) * unit
                cuts.append(end)
        ends.append(end)
    cuts.append(-(-end // unit) * unit)
    decay_until, replicated_from, row_biases_from, _ = ends
    return Layout(slots, decay_until, replicated_from, row_biases_from, tuple(_buckets(cuts)))


def _kind(name: str, decay_embeddings: bool) -> int:
    """Rank of a parameter in the flat buffers.

    0 decays: matrices, both embeddings included unless decay_embeddings is off. 1 does not decay:
    biases of query_key_value and dense_h_to_4h, split over tensor-parallel ranks. 2: LayerNorms,
    replicated there. 3: biases of the two row-parallel products, replicated and summed.
    """
    if name.endswith(("attention.dense.bias", "dense_4h_to_h.bias")):
        return 3
    if "norm" in name:
        return 2
    embedding = name.split(".")[-2:-1] in (["embed_in"], ["embed_out"])
    return 1 if name.endswith("bias") or (embedding and not decay_embeddings) else 0


def _groups(shapes: dict[str, torch.Size]) -> Iterator[dict[str, torch.Size]]:
    """A layer's parameters together, each embedding alone, in order."""

    def group(name: str) -> str:
        head, found, rest = name.partition("layers.")
        return head + found + rest.partition(".")[0] if found else name

    for _, names in itertools.groupby(shapes, key=group):
        yield {name: shapes[name] for name in names}


def _buckets(cuts: list[int]) -> Iterator[slice]:
    """Ranges between cuts of at least BUCKET elements, the last apart and perhaps smaller."""
    start = 0
    for cut, after in itertools.pairwise([*cuts[1:], cuts[-1]]):
        if cut - start >= BUCKET or after == cuts[-1]:
            if cut > start:
                yield slice(start, cut)
            start = cut


_LEFT, _RIGHT = "attention.dense.weight", "mlp.dense_4h_to_h.weight"


def _place(shapes: dict[str, torch.Size], start: int, paired: bool) -> tuple[dict[str, Slot], int]:
    """Slots of parameters (matrices, vectors) one after another from `start`, and where they end.

    paired: attention.dense.weight (h, h) and mlp.dense_4h_to_h.weight (h, 4h) of a layer are the
    columns of one (h, 5h) matrix: [ctx | gelu] [Wo W2]ᵀ is then one product over both.
    """
    slots: dict[str, Slot] = {}
    for name in shapes:
        if name in slots:  # came with its partner
            continue
        pair = (name, name.removesuffix(_LEFT) + _RIGHT)
        together = paired and name.endswith(_LEFT) and pair[1] in shapes
        joined = pair if together else pair[:1]
        columns = [shapes[n][-1] for n in joined]
        for n, before in zip(joined, itertools.accumulate(columns, initial=0), strict=False):
            slots[n] = Slot(start + before, shapes[n], sum(columns))
        start += -(-sum(shapes[n].numel() for n in joined) // ALIGN) * ALIGN
    return slots, start
