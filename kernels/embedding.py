"""The gradient of an embedding, added to its rows where they lie.

    grad[i] += Σ dy[m] over the positions m whose id is i        (one of dy's rows a position)

The positions are put in order of their ids, those of one id as they stand (a stable sort of torch).
A program walks CHUNK of them over BLOCK columns, adds rows of equal id in fp32 and writes each sum
to its row of `grad`, which no other program touches; a run of equal ids that reaches past the chunk
goes to `partials` instead, and a second launch adds its parts in order. So the sum is the same
every time, and an id that thousands of positions share (a space, a comma) is read by many programs.

Where vocabulary-parallel processes have V rows each, an id of V names a row that is elsewhere: such
positions come last in the order, and of their dy no more is read than the chunk they begin in.

Nothing is saved. Bytes, for e bytes an element of dy: M·h·e read, and 8·h a different id (fp32);
24·M for the order; where it is not to be added to, `grad` is cleared first, 4·V·h. The dense
gradient that autograd makes instead is V·h·e written twice and read once beside 8·V·h to add it.
Bound by memory bandwidth.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from pythia_fast.kernels.aot_case import AotCase
from pythia_fast.kernels.checks import FLOATING, check, grad_rows
from pythia_fast.kernels.rows import SUITE

CHUNK = 32  # positions of a program
BLOCK = 512  # columns of a program, or the largest power of two that divides h


@triton.jit
def _add(p_row, b_sum):
    b = tl.load(p_row).to(tl.float32) + b_sum
    tl.store(p_row, b.to(p_row.dtype.element_ty))


@triton.jit
def _embedding_chunks_kernel(
    grad,  # (V, h)
    dy,  # (M, h), rows `stride` apart
    ids,  # (M,) int64, ascending
    order,  # (M,) int64, the position of each
    partials,  # (chunks, 2, h) fp32: of a run that began before the chunk, and of one that goes on
    M,
    V,  # a position whose id is not below V is passed over
    stride,
    H: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_chunk = tl.program_id(0).to(tl.int64)
    i_start = i_chunk * CHUNK
    ids += i_start
    order += i_start
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i_id = tl.load(ids).to(tl.int32)
    count = tl.where(i_id < V, tl.minimum(M - i_start, CHUNK).to(tl.int32), 0)
    # begins in this chunk
    whole = tl.load(ids - 1, mask=i_start > 0, other=-1).to(tl.int32) != i_id
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for i in range(count):
        i_row = tl.load(order + i)
        b_sum += tl.load(dy + i_row * stride + o).to(tl.float32)
        i_next = tl.load(ids + i + 1, mask=i_start + i + 1 < M, other=-1).to(tl.int32)
        if i_next != i_id:
            if whole & (i_id < V):
                _add(grad + i_id.to(tl.int64) * H + o, b_sum)
            elif i_id < V:
                tl.store(partials + 2 * i_chunk * H + o, b_sum)
            b_sum = tl.zeros((BLOCK,), tl.float32)
            whole = True
        elif i + 1 == count:
            tl.store(partials + (2 * i_chunk + whole.to(tl.int64)) * H + o, b_sum)
        i_id = i_next


@triton.jit
def _embedding_runs_kernel(
    grad,  # (V, h)
    ids,  # (M,) int64, ascending
    partials,  # (chunks, 2, h) fp32
    M,
    V,  # ids not below V are passed over
    H: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds up the run that begins in chunk program_id(0) and goes on after it, if there is one."""
    i_chunk = tl.program_id(0).to(tl.int64)
    i_start, i_after = i_chunk * CHUNK, (i_chunk + 1) * CHUNK
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i_id = tl.load(ids + i_after - 1, mask=i_after < M, other=-1)
    goes_on = (tl.load(ids + i_after, mask=i_after < M, other=-2) == i_id) & (i_id < V)
    i_before = tl.load(ids + i_start - 1, mask=i_start > 0, other=-2)  # ascending: of all before
    if goes_on & (i_before != i_id):
        i_last = i_chunk
        while goes_on:  # scalars alone: Triton 3.7 does not compile a while over a tensor in an if
            i_last += 1
            i_after = (i_last + 1) * CHUNK
            goes_on = tl.load(ids + i_after, mask=i_after < M, other=-2) == i_id
        b_sum = tl.load(partials + (2 * i_chunk + 1) * H + o)
        for i in range(i_chunk + 1, i_last + 1):
            b_sum += tl.load(partials + 2 * i * H + o)
        _add(grad + i_id * H + o, b_sum)


def embedding_grad_(grad: Tensor, dy: Tensor, ids: Tensor, add: bool = True) -> None:
    """The gradient of an embedding's weight, into grad: grad[i] += Σ dy over the positions of id i.

    grad (V, h) contiguous, fp32, bf16 or fp16; dy (..., h) floating; ids (...) int64 in [0, V], a
    position each, V of a row that is elsewhere. add: to what grad holds, else in its place. Sums in
    fp32. Deterministic.
    """
    check(grad, "grad", dtypes=FLOATING, rank=2)
    if not grad.is_contiguous():
        raise ValueError(f"grad: strides {grad.stride()}, must be contiguous")
    check(ids, "ids", dtypes=(torch.int64,), last_stride=None, device=grad.device)
    check(dy, "dy", shape=(*ids.shape, grad.shape[1]), last_stride=None, device=grad.device)
    if not add:
        grad.zero_()
    count, h = ids.numel(), grad.shape[1]
    if not count or not h:
        return
    rows = grad_rows(dy, "dy", dy)
    sorted_ids, order = torch.sort(ids.reshape(-1), stable=True)
    chunks, block = triton.cdiv(count, CHUNK), _block(h)
    partials = torch.empty(chunks, 2, h, dtype=torch.float32, device=grad.device)
    grid, tiles = (chunks, h // block), _tiles(h)
    _embedding_chunks_kernel[grid](
        grad=grad,
        dy=rows,
        ids=sorted_ids,
        order=order,
        partials=partials,
        M=count,
        V=len(grad),
        stride=rows.stride(0),
        **tiles,
    )
    _embedding_runs_kernel[grid](
        grad=grad, ids=sorted_ids, partials=partials, M=count, V=len(grad), **tiles
    )


def _block(h: int) -> int:
    return min(h & -h, BLOCK)


def _tiles(h: int) -> dict[str, int]:
    """8 elements a thread where a block has that many for a warp."""
    block = _block(h)
    return {"H": h, "CHUNK": CHUNK, "BLOCK": block, "num_warps": max(block // 256, 1)}


def aot_cases() -> Iterator[AotCase]:
    """Every hidden size, gradients in fp32; in the dtype of dy for the lean states."""
    for size, h in SUITE.items():
        tiles = _tiles(h)
        warps = tiles.pop("num_warps")
        constants = dict.fromkeys(tiles, "constexpr")
        for dtype in ("bf16", "fp16"):
            for grad in ("fp32", dtype):
                wide = ("dy", "partials", *(["grad"] if grad == "fp32" or h > 128 else []))
                common = {"grad": f"*{grad}", "ids": "*i64", "partials": "*fp32"}
                common |= {"M": "i32", "V": "i32"}
                walk = common | {"dy": f"*{dtype}", "order": "*i64", "stride": "i32"}
                yield AotCase(
                    name=f"{size} chunks {dtype} into {grad}",
                    kernel=_embedding_chunks_kernel,
                    signature=walk | constants,
                    constexprs=dict(tiles),
                    num_warps=warps,
                    wide=tuple(n for n in wide if h > 128 or n != "dy"),
                    not_aligned=("M", "V"),
                )
                yield AotCase(
                    name=f"{size} runs {dtype} into {grad}",
                    kernel=_embedding_runs_kernel,
                    signature=common | constants,
                    constexprs=dict(tiles),
                    num_warps=warps,
                    wide=tuple(n for n in wide if n != "dy"),
                    not_aligned=("M", "V"),
                )
