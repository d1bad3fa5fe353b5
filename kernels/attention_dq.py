"""dq of attention's backward pass: the sum over segments, or a kernel of its own.

`attention_bwd.py` adds dq'ᵀ into fp32 scratch (segments, B·H, D, T) where registers hold dk, dv and
dq; `add_segments` adds the segments in order, turns the sum back and writes dq. Bytes: 4·segments
read and e written an element of dq.

Elsewhere `dq_apart` walks the keys once more for each tile of queries, three products a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pythia_fast.kernels.aot_case import AotCase
from pythia_fast.kernels.attention_tiles import (
    HEAD_DIMS,
    ROW_TILE,
    Tile,
    add_dot,
    attention_cases,
    dot_rows,
    key_ranges,
    load_parts,
    long_first,
    part_columns,
    rotate_back,
    store_part,
    tile_on,
    zero_parts,
)
from pythia_fast.kernels.rows import column_blocks

# By head dim: (sm_90 and sm_100, 99 KB of shared memory), as in `attention.py`.
DQ_APART = {256: (Tile(128, 32, warps=8, stages=2), Tile(32, 32, warps=4, stages=1))}


@triton.jit
def _attention_bwd_sum_kernel(
    dq,  # (segments, B·H, D, PADDED) fp32
    cos,  # (≥T, HALF), row stride stride_cos, or None: nothing turns
    sin,  # (≥T, HALF), row stride stride_sin, or None
    d_qkv,  # (B, T, H, 3·D) contiguous; dq is written
    T,
    PADDED,  # T in whole tiles of BLOCK_T, so that no load needs a mask
    H,
    stride_cos,
    stride_sin,
    stride_segment,  # elements from one segment of dq to the next
    segments,  # of dq
    keys,  # of a tile of the kernel that wrote dq, a multiple of BLOCK_T
    D: tl.constexpr,
    PARTS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    i_h = tl.program_id(0) % H  # the heads of a position lie side by side
    o_t = tl.program_id(0) // H * BLOCK_T + tl.arange(0, BLOCK_T)
    i_b = tl.program_id(1).to(tl.int64)
    m_t = o_t < T
    p_out = d_qkv + i_b * T * (3 * D * H) + i_h * (3 * D) + o_t * (3 * D * H)
    p_head = dq + (i_b * H + i_h) * D * PADDED
    # segment s begins with key s·keys, which no query before it sees
    last = tl.minimum(segments, tl.program_id(0) // H * BLOCK_T // keys + 1)
    for i in tl.static_range(len(PARTS)):
        p = p_head + part_columns(i, PARTS)[:, None] * PADDED + o_t[None, :]
        b_sum = tl.load(p)  # (width, BLOCK_T)
        for _ in range(1, last):
            p += stride_segment
            b_sum += tl.load(p)
        b_x = tl.trans(b_sum)
        if cos is not None and i == 0:
            b_x = rotate_back(b_x, o_t, m_t, cos, sin, stride_cos, stride_sin, HALF)
        store_part(p_out, b_x, m_t, i, PARTS)


@triton.jit
def attend_tile_dq(
    b_dq, b_q, b_grad, b_lse, b_delta, p_k, o_q, o_k, b_start, T, scale_log2,
    MASKED: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dq + dS k over one tile of keys."""
    m_key = None
    if MASKED:
        m_key = o_k < T
    b_k = load_parts(p_k, m_key, PARTS)
    b_p = tl.exp2(dot_rows(b_q, b_k) * scale_log2 - b_lse[:, None])  # (BLOCK_M, BLOCK_N)
    if MASKED:
        m = o_k[None, :] <= o_q[:, None]
        if b_start is not None:
            m = m & (o_k[None, :] >= b_start[:, None])
        b_p = tl.where(m, b_p, 0.0)
    b_ds = b_p * (dot_rows(b_grad, load_parts(p_k + D, m_key, PARTS)) - b_delta[:, None])
    return add_dot(b_dq, b_ds.to(b_k[0].dtype), b_k)


@triton.jit
def _attention_bwd_dq_kernel(
    qkv,  # (B, T, H, 3·D), strides (stride_b, stride_t, 3·D, 1), q and k rotated
    d_ctx,  # (B, T, H·D), strides (stride_gb, stride_gt, 1)
    lse,  # (B, H, T) fp32
    delta,  # (B, H, T) fp32
    cos,  # (≥T, HALF), row stride stride_cos, or None: nothing turns
    sin,  # (≥T, HALF), row stride stride_sin, or None
    doc_start,  # (B, T) int32, the first key that each query sees, or None: key 0
    d_qkv,  # (B, T, H, 3·D) contiguous; dq is written
    T,
    heads,  # B·H
    stride_b,
    stride_t,
    stride_gb,
    stride_gt,
    stride_cos,
    stride_sin,
    scale,  # 1/√D
    scale_log2,  # log₂e/√D
    H,
    GROUP,  # heads whose tiles run together, which share L2
    D: tl.constexpr,
    PARTS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    TILES = tl.cdiv(T, BLOCK_M)
    i_tile, i_head = long_first(TILES, heads, GROUP)
    i_b, i_h = i_head // H, i_head % H
    i_m = (TILES - 1 - i_tile) * BLOCK_M
    o_q = i_m + tl.arange(0, BLOCK_M)
    m_q = o_q < T
    p_head = qkv + i_b * stride_b + i_h * (3 * D)
    b_q = load_parts(p_head + o_q * stride_t, m_q, PARTS)
    b_grad = load_parts(d_ctx + i_b * stride_gb + i_h * D + o_q * stride_gt, m_q, PARTS)
    b_lse = tl.load(lse + i_head * T + o_q, mask=m_q, other=0.0)
    b_delta = tl.load(delta + i_head * T + o_q, mask=m_q, other=0.0)
    p_start = None
    b_start = None
    if doc_start is not None:
        p_start = doc_start + i_b * T
        b_start = tl.load(p_start + o_q, mask=m_q, other=0)

    b_dq = zero_parts(BLOCK_M, PARTS)
    p_k = p_head + D
    o_n = tl.arange(0, BLOCK_N)
    i_begin, i_full, i_edge, i_end = key_ranges(i_m, T, p_start, BLOCK_M, BLOCK_N)
    if doc_start is not None:
        for i_n in tl.range(i_begin, i_full, BLOCK_N):
            b_dq = attend_tile_dq(
                b_dq, b_q, b_grad, b_lse, b_delta, p_k + (i_n + o_n) * stride_t, o_q, i_n + o_n,
                b_start, T, scale_log2, True, D, PARTS,
            )  # fmt: skip
    for i_n in tl.range(i_full, i_edge, BLOCK_N):
        b_dq = attend_tile_dq(
            b_dq, b_q, b_grad, b_lse, b_delta, p_k + (i_n + o_n) * stride_t, o_q, i_n + o_n,
            None, T, scale_log2, False, D, PARTS,
        )  # fmt: skip
    for i_n in tl.range(i_edge, i_end, BLOCK_N):
        b_dq = attend_tile_dq(
            b_dq, b_q, b_grad, b_lse, b_delta, p_k + (i_n + o_n) * stride_t, o_q, i_n + o_n,
            b_start, T, scale_log2, True, D, PARTS,
        )  # fmt: skip

    p_out = d_qkv + i_b * T * (3 * D * H) + i_h * (3 * D) + o_q * (3 * D * H)
    for i in tl.static_range(len(PARTS)):
        b_x = b_dq[i] * scale
        if cos is not None and i == 0:
            b_x = rotate_back(b_x, o_q, m_q, cos, sin, stride_cos, stride_sin, HALF)
        store_part(p_out, b_x, m_q, i, PARTS)


def add_segments(dq: Tensor, d_qkv: Tensor, tables: dict[str, Any], keys: int) -> None:
    """Writes dq into d_qkv (B, T, H, 3·D) from dq (segments, B·H, D, padded) fp32.

    tables: `of_tables`; keys: of a tile of the kernel that added to dq. Bytes: 4 read a segment
    and element of dq, 2 written.
    """
    batch, positions, heads, _ = d_qkv.shape
    segments, _, d, padded = dq.shape
    _attention_bwd_sum_kernel[(triton.cdiv(positions, ROW_TILE) * heads, batch)](
        dq=dq,
        d_qkv=d_qkv,
        T=positions,
        PADDED=padded,
        H=heads,
        stride_segment=dq.stride(0),
        segments=segments,
        D=d,
        PARTS=column_blocks(d),
        BLOCK_T=ROW_TILE,
        keys=keys,
        **tables,
        num_warps=4,
    )


def dq_apart(qkv: Tensor, operands: dict[str, Any], doc_start: Tensor | None) -> None:
    """Writes dq into d_qkv; operands: what `attention_bwd` gives its kernels."""
    tile = tile_on(qkv.device, DQ_APART[qkv.shape[3] // 3])
    tiles = triton.cdiv(qkv.shape[1], tile.queries)
    _attention_bwd_dq_kernel[(tiles * qkv.shape[0] * qkv.shape[2],)](
        doc_start=doc_start,
        BLOCK_M=tile.queries,
        BLOCK_N=tile.keys,
        **operands,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def aot_cases() -> Iterator[AotCase]:
    """Both ways at the head dims that take them."""
    kernel, rows = _attention_bwd_dq_kernel, Tile(ROW_TILE, ROW_TILE, warps=4, stages=3)
    for d, tiles in DQ_APART.items():
        yield from attention_cases("dq", kernel, d, tiles, ("doc_start",), 3)
        yield from attention_cases("documents dq", kernel, d, tiles, (), 3)
    kernel, wide = _attention_bwd_sum_kernel, ("dq", "d_qkv")
    for d in [d for d in HEAD_DIMS if d not in DQ_APART]:
        yield from attention_cases("sum", kernel, d, (rows, rows), wide=wide)
        yield from attention_cases("one sum", kernel, d, (rows, rows), wide=wide, segments=1)
