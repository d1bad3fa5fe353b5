"""Whole rows as tiles: the device functions and the reduction that the row-wise kernels share.

A row of H columns is cut into blocks whose widths are powers of two (2560 = 2048 + 512) and lives
in registers as a tuple of fp32 tiles (ROWS, width): no lane idles where H is no power of two, and
each element is loaded once. Only a last block that reaches past H is masked (96 = 64 + 32, but
1000 < 1024).

Sums over rows (weight and bias gradients) are deterministic: each of P programs walks its rows in
order and writes one fp32 partial (K, H); `sum_partials` adds the P partials in a fixed order. P
follows the number of SMs, so the bits are those of one GPU model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from pythia_fast.kernels.aot_case import AotCase

# the hidden sizes of the suite, for ahead-of-time compilation (1B and 1.4B share one)
SUITE = {
    "14m": 128,
    "31m": 256,
    "70m": 512,
    "160m": 768,
    "410m": 1024,
    "1.4b": 2048,
    "2.8b": 2560,
    "6.9b": 4096,
    "12b": 5120,
}


# the (M, h) arguments that the row-wise kernels only store
WRITTEN = ("y", "y1", "y2", "residual", "dx")


@dataclass(frozen=True)
class Tile:
    """How a kernel walks (M, h): the rows a program holds at once, and its warps."""

    rows: int
    warps: int
    stages: int = 1  # of a walk: stages − 1 tiles are fetched ahead by cp.async; 1 = plain loads
    per_sm: int = 1  # of a walk: programs per SM, no more than it can hold (one wave)


def tile_for(table: dict[int, Tile], h: int) -> Tile:
    """The entry of h, or of the next larger size in the table, or the largest."""
    return table[min((n for n in table if n >= h), default=max(table))]


@lru_cache
def column_blocks(columns: int) -> tuple[int, ...]:
    """Widths of the blocks of one row: the largest power of two, then the rest rounded up."""
    main = 1 << (columns.bit_length() - 1)
    if columns == main:
        return (main,)
    tail = triton.next_power_of_2(columns - main)
    return (main, tail) if tail < main else (2 * main,)


@lru_cache
def programs(device: torch.device, per_sm: int) -> int:
    """How many programs fill the device (three under the interpreter: enough to test strides)."""
    return per_sm * multiprocessors(device) or 3


def multiprocessors(device: torch.device) -> int:
    """0 without a GPU."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.constexpr_function
def width(i, WIDTHS):
    """Width of block i."""
    return int(WIDTHS[i])


@triton.constexpr_function
def start(i, WIDTHS):
    """First column of block i."""
    return sum(int(w) for w in WIDTHS[:i])


@triton.constexpr_function
def padded(i, H, WIDTHS):
    """Block i reaches past the row's end."""
    return sum(int(w) for w in WIDTHS[: i + 1]) > H


@triton.jit
def columns(i: tl.constexpr, WIDTHS: tl.constexpr):
    """Column offsets of block i, (width,)."""
    return start(i, WIDTHS) + tl.arange(0, width(i, WIDTHS))


@triton.jit
def zero_rows(ROWS: tl.constexpr, WIDTHS: tl.constexpr):
    b = ()
    for i in tl.static_range(len(WIDTHS)):
        b += (tl.zeros((ROWS, width(i, WIDTHS)), tl.float32),)
    return b


@triton.jit
def load_rows(p_rows, m_row, H: tl.constexpr, WIDTHS: tl.constexpr):
    """Rows at p_rows (ROWS,) as fp32 blocks; 0 in rows outside m_row (ROWS,) and columns past H."""
    b = ()
    for i in tl.static_range(len(WIDTHS)):
        o_column = columns(i, WIDTHS)
        m = m_row[:, None]
        if padded(i, H, WIDTHS):
            m = m & (o_column < H)[None, :]
        p = p_rows[:, None] + o_column[None, :]
        b += (tl.load(p, mask=m, other=0.0).to(tl.float32),)
    return b


@triton.jit
def store_rows(p_rows, b, m_row, H: tl.constexpr, WIDTHS: tl.constexpr):
    """Writes blocks to the rows at p_rows, rounded to their dtype."""
    for i in tl.static_range(len(WIDTHS)):
        o_column = columns(i, WIDTHS)
        m = m_row[:, None]
        if padded(i, H, WIDTHS):
            m = m & (o_column < H)[None, :]
        p = p_rows[:, None] + o_column[None, :]
        tl.store(p, b[i].to(p_rows.dtype.element_ty), mask=m)


@triton.jit
def load_vector(p_vector, H: tl.constexpr, WIDTHS: tl.constexpr):
    """A vector (H,) as fp32 blocks (1, width)."""
    b = ()
    for i in tl.static_range(len(WIDTHS)):
        o_column = columns(i, WIDTHS)
        if padded(i, H, WIDTHS):
            b_i = tl.load(p_vector + o_column, mask=o_column < H, other=0.0)
        else:
            b_i = tl.load(p_vector + o_column)
        b += (b_i.to(tl.float32)[None, :],)
    return b


@triton.jit
def store_column_sums(p_vector, b, H: tl.constexpr, WIDTHS: tl.constexpr):
    """Writes the column sums of blocks (ROWS, width) to p_vector (H,) fp32."""
    for i in tl.static_range(len(WIDTHS)):
        o_column = columns(i, WIDTHS)
        tl.store(p_vector + o_column, tl.sum(b[i], axis=0), mask=o_column < H)


@triton.jit
def add_rows(b_a, b_b):
    """a + b, block by block."""
    b = ()
    for i in tl.static_range(len(b_a)):
        b += (b_a[i] + b_b[i],)
    return b


@triton.jit
def multiply_add_rows(b_a, b_b, b_c):
    """a + b·c, block by block."""
    b = ()
    for i in tl.static_range(len(b_a)):
        b += (b_a[i] + b_b[i] * b_c[i],)
    return b


@triton.jit
def multiply_rows(b_a, b_b):
    """a·b, block by block."""
    b = ()
    for i in tl.static_range(len(b_a)):
        b += (b_a[i] * b_b[i],)
    return b


@triton.jit
def sum_rows(b_a):
    """Sum of each row over all blocks, (ROWS,).

    The sum of a single row is taken as a scalar: a tensor would carry the layout of one block to
    the others, whose tiles would then be moved through shared memory.
    """
    if b_a[0].shape[0] == 1:
        b_sum = tl.sum(b_a[0])
        for i in tl.static_range(1, len(b_a)):
            b_sum += tl.sum(b_a[i])
        return tl.full((1,), b_sum, tl.float32)
    b_sums = tl.sum(b_a[0], axis=1)
    for i in tl.static_range(1, len(b_a)):
        b_sums += tl.sum(b_a[i], axis=1)
    return b_sums


@triton.jit
def _sum_partials_kernel(
    partials,  # (P, N) fp32
    out,  # (N,)
    P,  # rows of partials
    N,  # columns
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_p = tl.arange(0, BLOCK_P)
    b_sum = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for i_p in range(0, P, BLOCK_P):
        m = (i_p + o_p < P)[:, None] & (o_n < N)[None, :]
        b_sum += tl.load(partials + (i_p + o_p)[:, None] * N + o_n[None, :], mask=m, other=0.0)
    tl.store(out + o_n, tl.sum(b_sum, axis=0).to(out.dtype.element_ty), mask=o_n < N)


def sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """partials (P, K, H) fp32 -> their sum over P, (K, H) in dtype, always in the same order."""
    count, size = partials.shape[0], partials[0].numel()
    out = torch.empty(partials.shape[1:], dtype=dtype, device=partials.device)
    block_n = 32
    _sum_partials_kernel[(triton.cdiv(size, block_n),)](
        partials=partials,
        out=out,
        P=count,
        N=size,
        BLOCK_P=64,
        BLOCK_N=block_n,
        num_warps=4,
    )
    return out


def aot_cases() -> Iterator[AotCase]:
    """The reduction that ends every bias and weight gradient; not one of bandwidth: its partials
    are a few MB and come from the L2 cache."""
    for dtype in ("bf16", "fp16", "fp32"):
        yield AotCase(
            name=f"sum_partials {dtype}",
            kernel=_sum_partials_kernel,
            signature={"partials": "*fp32", "out": f"*{dtype}", "P": "i32", "N": "i32"}
            | {"BLOCK_P": "constexpr", "BLOCK_N": "constexpr"},
            constexprs={"BLOCK_P": 64, "BLOCK_N": 32},
            num_warps=4,
            wide=("partials",),
            not_aligned=("P",),
        )


def row_case(
    name: str,
    kernel: triton.runtime.JITFunction,
    h: int,
    tile: Tile,
    wide: tuple[str, ...],
    absent: tuple[str, ...] = (),
    **constexprs: object,
) -> AotCase:
    """A launch of a row-wise kernel whose case name ends with its dtype; absent: None arguments.

    wide: its (M, h) tensors. All accesses are 128 bits a thread but those of a second block that
    has only 64 bits for each (4 elements: 8 would double the registers of a walk).
    """
    wide = tuple(n for n in wide if n not in absent)
    stages = tile.stages if "STAGES" in kernel.arg_names else 1  # each stage repeats the loads
    narrow = {}
    if column_blocks(h)[1:] == (128 * tile.warps // tile.rows,):
        narrow = {n: {"st64": 1} if n in WRITTEN else {"ld64": stages} for n in wide}
    values = {"H": h, "ROWS": tile.rows, "WIDTHS": column_blocks(h), "STAGES": tile.stages}
    values |= constexprs | dict.fromkeys(absent)
    values = {n: values[n] for n in kernel.arg_names if n in values}
    types = dict.fromkeys(("mean", "rstd", "partials"), "*fp32") | {"M": "i32", "eps": "fp32"}
    types |= {n: "i32" for n in kernel.arg_names if n.startswith("stride")}
    types |= dict.fromkeys(values, "constexpr")
    return AotCase(
        name=name,
        kernel=kernel,
        signature={n: types.get(n, f"*{name.split()[-1]}") for n in kernel.arg_names},
        constexprs=values,
        num_warps=tile.warps,
        wide=wide,
        narrow=narrow,
        per_sm=tile.per_sm,
        not_aligned=("M",),
    )
