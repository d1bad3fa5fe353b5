"""Tiles of attention: parts of a head dim, products over them, order of programs, rotation back.

A head dim is held in parts whose widths are powers of two (80 = 64 + 16), a tuple of tiles
(ROWS, width), so that no product is padded. Products take tiles as they were loaded (16-bit) and
accumulate in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pythia_fast.kernels.aot_case import AotCase
from pythia_fast.kernels.checks import INTERPRETED, check
from pythia_fast.kernels.rotary import check_qkv, check_tables, rotate_pairs
from pythia_fast.kernels.rows import column_blocks, start, width

HEAD_DIMS = (32, 64, 80, 128, 256)
L2_SHARE = 16 << 20  # bytes of keys and values of the heads that run side by side
LOG2_E = 1.4426950408889634
LOWEST = tl.constexpr(-1e30)  # a maximum before any score: finite, so 2^(−∞ − it) is 0
# products need 16 bits; the interpreter takes fp32 for tests, and computes bf16 wrongly
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, torch.float16) if INTERPRETED else HALVES


# bytes a thread, of what outlives the loops; aot.py bounds what the loop itself spills
SPILLS = {"sm_80": 288, "sm_90": 72, "sm_100": 640}
SMALL_SHARED = 99 * 1024  # bytes a block, what the second tiles are made for
ROW_TILE = 64  # positions of a program that does no products


@dataclass(frozen=True)
class Tile:
    """Queries and keys of a tile, warps, and stages of the pipeline that loads tiles ahead."""

    queries: int
    keys: int
    warps: int
    stages: int


@triton.jit
def long_first(TILES, heads, GROUP):
    """(tile, head) of this program: the tiles of GROUP heads in order, then the next GROUP.

    Tile 0 is the longest, so long programs start first; the heads of a group share L2.
    """
    i_group = tl.program_id(0) // (TILES * GROUP)
    i_rest = tl.program_id(0) % (TILES * GROUP)
    members = tl.minimum(GROUP, heads - i_group * GROUP)
    return i_rest // members, (i_group * GROUP + i_rest % members).to(tl.int64)


@triton.jit
def key_ranges(i_m, T, p_start, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(begin, full, edge, end) of the keys that queries [i_m, i_m + BLOCK_M) see.

    [full, edge) is seen by all of them; [begin, full) and [edge, end) need a mask.
    """
    i_edge, i_end = i_m // BLOCK_N * BLOCK_N, tl.minimum(i_m + BLOCK_M, T)
    i_begin = 0
    i_full = 0
    if p_start is not None:
        i_begin = tl.load(p_start + i_m) // BLOCK_N * BLOCK_N
        i_begin = tl.minimum(tl.maximum(i_begin, 0), i_edge)  # in bounds whatever is given
        i_full = tl.cdiv(tl.load(p_start + i_end - 1), BLOCK_N) * BLOCK_N
        i_full = tl.minimum(tl.maximum(i_full, i_begin), i_edge)
    return i_begin, i_full, i_edge, i_end


@triton.jit
def part_columns(i: tl.constexpr, PARTS: tl.constexpr):
    """The dims of part i, (width,)."""
    return start(i, PARTS) + tl.arange(0, width(i, PARTS))


@triton.jit
def load_parts(p_rows, m_row, PARTS: tl.constexpr):
    """Rows at p_rows (ROWS,); 0 in rows outside m_row (None: all are in)."""
    b = ()
    for i in tl.static_range(len(PARTS)):
        p = p_rows[:, None] + part_columns(i, PARTS)[None, :]
        if m_row is None:
            b += (tl.load(p),)
        else:
            b += (tl.load(p, mask=m_row[:, None], other=0.0),)
    return b


@triton.jit
def store_part(p_rows, b_part, m_row, i: tl.constexpr, PARTS: tl.constexpr):
    """Writes part i to the rows at p_rows, rounded to their dtype."""
    p = p_rows[:, None] + part_columns(i, PARTS)[None, :]
    tl.store(p, b_part.to(p_rows.dtype.element_ty), mask=m_row[:, None])


@triton.jit
def zero_parts(ROWS: tl.constexpr, PARTS: tl.constexpr):
    b = ()
    for i in tl.static_range(len(PARTS)):
        b += (tl.zeros((ROWS, width(i, PARTS)), tl.float32),)
    return b


@triton.jit
def dot_rows(b_a, b_b):
    """a bᵀ over all parts: (A, D) and (B, D) -> (A, B)."""
    b_sum = tl.dot(b_a[0], tl.trans(b_b[0]), input_precision="ieee")
    for i in tl.static_range(1, len(b_a)):
        b_sum = tl.dot(b_a[i], tl.trans(b_b[i]), b_sum, input_precision="ieee")
    return b_sum


@triton.jit
def add_dot(b_sum, b_a, b_b):
    """sum + a b, part by part: (A, B) and (B, D) -> (A, D)."""
    b = ()
    for i in tl.static_range(len(b_b)):
        b += (tl.dot(b_a, b_b[i], b_sum[i], input_precision="ieee"),)
    return b


@triton.jit
def add_keys(b_acc, b_sum, b_max, b_s, p_v, m_key, scale_log2, PARTS: tl.constexpr):
    """(acc, sum, max) of the online softmax after one more tile of scores and values.

    b_s (A, B): q kᵀ, −∞ where unseen; p_v (B,): rows of v, m_key (B,) which exist (None: all).
    acc (A, D) and sum (A,) are relative to 2^max, max (A,) is of the scaled scores in base 2.
    """
    b_new = tl.maximum(b_max, tl.max(b_s, axis=1) * scale_log2)
    b_p = tl.exp2(b_s * scale_log2 - b_new[:, None])
    b_fade = tl.exp2(b_max - b_new)
    b_faded = ()
    for i in tl.static_range(len(PARTS)):
        b_faded += (b_acc[i] * b_fade[:, None],)
    b_v = load_parts(p_v, m_key, PARTS)
    b_acc = add_dot(b_faded, b_p.to(b_v[0].dtype), b_v)
    return b_acc, b_sum * b_fade + tl.sum(b_p, axis=1), b_new


@triton.jit
def halves(b_x):
    """Left and right half of the columns of a tile."""
    b_pair = tl.reshape(b_x, (b_x.shape[0], 2, b_x.shape[1] // 2))
    return tl.split(tl.permute(b_pair, (0, 2, 1)))


@triton.jit
def side_by_side(b_left, b_right):
    """The tile whose halves these are."""
    b_pair = tl.permute(tl.join(b_left, b_right), (0, 2, 1))
    return tl.reshape(b_pair, (b_left.shape[0], 2 * b_left.shape[1]))


@triton.constexpr_function
def halvings(columns, half):
    """How often a tile is halved until its left part is the 2·half columns that turn."""
    return (int(columns) // (2 * int(half))).bit_length() - 1


@triton.jit
def rotate_back(b_x, o_t, m_t, cos, sin, stride_cos, stride_sin, HALF: tl.constexpr):
    """The inverse rotation of a tile (ROWS, width) in fp32 whose first 2·HALF columns turn.

    cos, sin (≥T, HALF) by row strides; o_t, m_t (ROWS,): positions, and which of them exist. Where
    HALF is a power of two, pairs lie in one thread's registers and nothing else is touched.
    """
    p_cos, p_sin = cos + o_t[:, None] * stride_cos, sin + o_t[:, None] * stride_sin
    if HALF & (HALF - 1) == 0:
        o_pair = tl.arange(0, HALF)[None, :]
        b_cos = tl.load(p_cos + o_pair, mask=m_t[:, None], other=1.0).to(tl.float32)
        b_sin = tl.load(p_sin + o_pair, mask=m_t[:, None], other=0.0).to(tl.float32)
        b_turned, b_rest = b_x, ()
        for _ in tl.static_range(halvings(b_x.shape[1], HALF)):
            b_turned, b_right = halves(b_turned)
            b_rest += (b_right,)
        b_1, b_2 = halves(b_turned)
        b_1, b_2 = rotate_pairs(b_1, b_2, b_cos, b_sin, True)
        b_turned = side_by_side(b_1, b_2)
        for i in tl.static_range(len(b_rest)):
            b_turned = side_by_side(b_turned, b_rest[len(b_rest) - 1 - i])
    else:  # R/2 = 10: each column fetches its partner
        o_d = tl.arange(0, b_x.shape[1])
        m = m_t[:, None] & (o_d < 2 * HALF)[None, :]
        o_pair = tl.where(o_d < HALF, o_d, o_d - HALF)
        o_partner = tl.where(o_d < HALF, o_d + HALF, tl.where(o_d < 2 * HALF, o_pair, o_d))
        b_partner = tl.gather(b_x, tl.broadcast_to(o_partner[None, :], b_x.shape), axis=1)
        b_cos = tl.load(p_cos + o_pair[None, :], mask=m, other=1.0).to(tl.float32)
        b_sin = tl.load(p_sin + o_pair[None, :], mask=m, other=0.0).to(tl.float32)
        b_turned = b_x * b_cos + tl.where((o_d < HALF)[None, :], b_partner, -b_partner) * b_sin
    return b_turned


def of_qkv(qkv: Tensor) -> dict[str, Any]:
    batch, positions, heads, packed = qkv.shape
    return {
        "qkv": qkv,
        "T": positions,
        "heads": batch * heads,
        "stride_b": qkv.stride(0),
        "stride_t": qkv.stride(1),
        "H": heads,
        "D": packed // 3,
        "PARTS": column_blocks(packed // 3),
    }


def products_of(qkv: Tensor) -> dict[str, float | int]:
    """The scalars of kernels that compute scores: 1/√D, log₂e/√D, and heads side by side."""
    root = 1 / math.sqrt(qkv.shape[3] // 3)
    of_a_head = 2 * qkv.shape[1] * qkv.shape[3] // 3 * qkv.element_size()
    return {"scale": root, "scale_log2": LOG2_E * root, "GROUP": max(L2_SHARE // of_a_head, 1)}


def of_tables(cos: Tensor | None, sin: Tensor | None) -> dict[str, Any]:
    if cos is None or sin is None:
        return {"cos": None, "sin": None, "stride_cos": 0, "stride_sin": 0, "HALF": 0}
    strides = {"stride_cos": cos.stride(0), "stride_sin": sin.stride(0)}
    return {"cos": cos, "sin": sin, "HALF": cos.shape[1]} | strides


@lru_cache
def tile_on(device: torch.device, tiles: tuple[Tile, Tile]) -> Tile:
    """The first where a block may have 227 KB of shared memory, else the second."""
    return tiles[0 if shared_memory(device) >= 227 * 1024 else 1]


def shared_memory(device: torch.device) -> int:
    """Bytes that a block may have."""
    if device.type != "cuda":
        return 227 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def check_attention_qkv(qkv: Tensor) -> None:
    check_qkv(qkv)
    check(qkv, "qkv", dtypes=DTYPES)
    _, positions, heads, packed = qkv.shape
    if packed // 3 not in HEAD_DIMS:
        raise ValueError(
            f"qkv: head dim {packed // 3}, not one of {', '.join(map(str, HEAD_DIMS))}"
        )
    if positions == 0:
        raise ValueError(f"qkv: shape {tuple(qkv.shape)}, T must be at least 1")
    if positions * max(qkv.stride(1), heads * packed) >= 2**31:
        raise ValueError(f"qkv: strides {qkv.stride()}, a row must span less than 2^31 elements")


def check_ctx(ctx: Tensor, name: str, qkv: Tensor) -> None:
    batch, positions, heads, packed = qkv.shape
    h = heads * packed // 3
    check(ctx, name, dtypes=(qkv.dtype,), shape=(batch, positions, h), device=qkv.device)
    if positions * ctx.stride(1) >= 2**31:
        raise ValueError(f"{name}: strides {ctx.stride()}, a row must span less than 2^31 elements")


def turns(d: int, half: int) -> bool:
    """Whether the first 2·half of d dims lie in one part, where `rotate_back` can turn them."""
    return 2 * half <= column_blocks(d)[0]


def check_attention_tables(cos: Tensor | None, sin: Tensor | None, qkv: Tensor) -> None:
    """cos and sin are tables for qkv (B, T, H, 3·D), or both None."""
    if cos is None or sin is None:
        if cos is not sin:
            raise ValueError("cos, sin: both or neither")
        return
    check_tables(cos, sin, qkv)
    d, half = qkv.shape[3] // 3, cos.shape[1]
    if not turns(d, half):
        most = column_blocks(d)[0]
        raise ValueError(f"cos: {2 * half} rotary dims of {d}, at most the first {most} can turn")


def check_documents(doc_start: Tensor | None, qkv: Tensor) -> None:
    if doc_start is not None:
        shape = qkv.shape[:2]
        check(doc_start, "doc_start", dtypes=(torch.int32,), shape=shape, device=qkv.device)
        if not doc_start.is_contiguous():
            raise ValueError(f"doc_start: strides {doc_start.stride()}, must be contiguous")
        if doc_start.device.type == "cpu" and doc_start.numel():  # on a GPU this would wait
            at = torch.arange(shape[1], dtype=torch.int32)
            if doc_start.min() < 0 or (doc_start > at).any() or (doc_start.diff(dim=1) < 0).any():
                raise ValueError("doc_start: must be nondecreasing, from 0 to the position")


def attention_cases(
    what: str,
    kernel: triton.runtime.JITFunction,
    d: int,
    tiles: tuple[Tile, Tile],
    absent: tuple[str, ...] = (),
    products: int = 0,
    ordered: bool = False,
    wide: tuple[str, ...] = (),
    **constexprs: object,
) -> Iterator[AotCase]:
    """A launch at head dim d in bf16 and fp16, by the tile of each architecture.

    absent: arguments that are None; products: (queries, keys, D) products of a tile; ordered: as in
    AotCase; constexprs: of the kernel, or arguments that Triton takes for constants.
    """
    counts = ("T", "H", "heads", "segments", "GROUP", "dq_is_zero")
    tables = () if d // 8 % 16 == 0 else ("stride_cos", "stride_sin")
    for dtype in ("bf16", "fp16"):
        for tile, architectures in zip(tiles, (("sm_90", "sm_100"), ("sm_80",)), strict=True):
            values = {"D": d, "PARTS": column_blocks(d), "HALF": d // 8, "BLOCK_T": tile.queries}
            values |= {"BLOCK_M": tile.queries, "BLOCK_N": tile.keys, **constexprs}
            values |= dict.fromkeys(absent)
            values = {n: values[n] for n in kernel.arg_names if n in values}
            types = dict.fromkeys(("lse", "delta", "dq", "cos", "sin"), "*fp32")
            types |= dict.fromkeys(("doc_start", "doc_end"), "*i32")
            types |= dict.fromkeys(("qkv", "ctx", "d_ctx", "d_qkv"), f"*{dtype}")
            types |= {"scale": "fp32", "scale_log2": "fp32", "stride_segment": "i64"}
            types |= dict.fromkeys(values, "constexpr")
            yield AotCase(
                name=f"D={d} {what} {dtype}",
                kernel=kernel,
                signature={n: types.get(n, "i32") for n in kernel.arg_names},
                constexprs=values,
                num_warps=tile.warps,
                num_stages=tile.stages,
                architectures=architectures,
                wide=wide,
                not_aligned=tuple(n for n in (*counts, *tables) if n in kernel.arg_names),
                matrix=products > 0,
                ordered=ordered,
                loop_flops=2 * products * tile.queries * tile.keys * d,
                spill_budget=SPILLS if products else 0,
                shared_budget=SMALL_SHARED if architectures == ("sm_80",) else 0,
            )
