"""Backward pass of `attention.py`, whose docstring has its formulas and its order of work."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from pythia_fast.kernels.aot_case import AotCase
from pythia_fast.kernels.attention_dq import add_segments, dq_apart
from pythia_fast.kernels.attention_tiles import (
    HEAD_DIMS,
    ROW_TILE,
    Tile,
    add_dot,
    attention_cases,
    check_attention_qkv,
    check_attention_tables,
    check_ctx,
    check_documents,
    dot_rows,
    load_parts,
    long_first,
    of_qkv,
    of_tables,
    part_columns,
    products_of,
    rotate_back,
    store_part,
    tile_on,
    zero_parts,
)
from pythia_fast.kernels.checks import check
from pythia_fast.kernels.rows import programs

# By head dim: (sm_90 and sm_100, 99 KB of shared memory), as in `attention.py`.
BACKWARD = {
    32: (Tile(64, 128, warps=8, stages=2), Tile(64, 128, warps=8, stages=2)),
    64: (Tile(64, 128, warps=8, stages=3), Tile(32, 128, warps=8, stages=2)),
    80: (Tile(32, 128, warps=8, stages=2), Tile(32, 64, warps=4, stages=2)),
    128: (Tile(32, 128, warps=8, stages=3), Tile(16, 64, warps=4, stages=2)),
}
# dk, dv and dq at once do not fit in registers: a launch for each
DK_APART = {256: (Tile(32, 128, warps=8, stages=2), Tile(32, 64, warps=8, stages=1))}
DV_APART = {256: (Tile(64, 128, warps=8, stages=2), Tile(32, 64, warps=8, stages=1))}


@triton.jit
def _attention_bwd_delta_kernel(
    ctx,  # (B, T, H·D), strides (stride_ob, stride_ot, 1)
    d_ctx,  # (B, T, H·D), strides (stride_gb, stride_gt, 1)
    delta,  # (B, H, T) fp32
    T,
    stride_ob,
    stride_ot,
    stride_gb,
    stride_gt,
    H,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    i_h = tl.program_id(0) % H  # the heads of a position lie side by side
    o_t = tl.program_id(0) // H * BLOCK_T + tl.arange(0, BLOCK_T)
    i_b = tl.program_id(1).to(tl.int64)
    m_t = o_t < T
    b_ctx = load_parts(ctx + i_b * stride_ob + i_h * D + o_t * stride_ot, m_t, PARTS)
    b_grad = load_parts(d_ctx + i_b * stride_gb + i_h * D + o_t * stride_gt, m_t, PARTS)
    b_delta = tl.zeros((BLOCK_T,), tl.float32)
    for i in tl.static_range(len(PARTS)):
        b_delta += tl.sum(b_ctx[i].to(tl.float32) * b_grad[i].to(tl.float32), axis=1)
    tl.store(delta + (i_b * H + i_h) * T + o_t, b_delta, mask=m_t)


@triton.jit
def attend_tile_bwd(
    b_dk, b_dv, b_k, b_v, p_q, p_grad, p_lse, p_delta, p_dq, o_q, o_k, b_end, begin_dq,
    T, PADDED, scale, scale_log2,
    MASKED: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, ADD_DQ: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """The products of one tile of queries; begin_dq: nothing has been added to its dq yet."""
    m_q = o_q < T
    b_q = load_parts(p_q, m_q, PARTS)
    b_st = dot_rows(b_k, b_q)  # (BLOCK_N, BLOCK_M)
    # beyond the last query d_ctx and delta are 0, and with them all that P = 1 there could add
    b_lse = tl.load(p_lse + o_q, mask=m_q, other=0.0)
    b_pt = tl.exp2(b_st * scale_log2 - b_lse[None, :])
    if MASKED:
        m = o_k[:, None] <= o_q[None, :]
        if b_end is not None:
            m = m & (o_q[None, :] < b_end[:, None])
        b_pt = tl.where(m, b_pt, 0.0)
    b_grad = load_parts(p_grad, m_q, PARTS)
    if DV:
        b_dv = add_dot(b_dv, b_pt.to(b_k[0].dtype), b_grad)
    if DK:
        b_delta = tl.load(p_delta + o_q, mask=m_q, other=0.0)
        b_dst = (b_pt * (dot_rows(b_v, b_grad) - b_delta[None, :])).to(b_k[0].dtype)
        b_dk = add_dot(b_dk, b_dst, b_q)
    if ADD_DQ:
        for i in tl.static_range(len(PARTS)):
            p = p_dq + part_columns(i, PARTS)[:, None] * PADDED + o_q[None, :]
            b_dqt = tl.dot(tl.trans(b_k[i]), b_dst, input_precision="ieee") * scale
            if begin_dq:
                tl.store(p, b_dqt)
            else:
                tl.atomic_add(p, b_dqt, sem="relaxed")
    return b_dk, b_dv


@triton.jit
def query_ranges(i_n, T, p_end, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(begin, full, edge, end) of the queries that see keys [i_n, i_n + BLOCK_N).

    Those of [full, edge) see all of them; [begin, full) and [edge, end) need a mask.
    """
    i_last = tl.minimum(i_n + BLOCK_N, T)
    i_begin, i_full = i_n // BLOCK_M * BLOCK_M, tl.cdiv(i_last, BLOCK_M) * BLOCK_M
    i_edge = T
    i_end = T
    if p_end is not None:
        i_end = tl.load(p_end + i_last - 1)
        i_edge = tl.maximum(tl.load(p_end + i_n) // BLOCK_M * BLOCK_M, i_full)
    return i_begin, i_full, i_edge, i_end


@triton.jit
def _attention_bwd_kernel(
    qkv,  # (B, T, H, 3·D), strides (stride_b, stride_t, 3·D, 1), q and k rotated
    d_ctx,  # (B, T, H·D), strides (stride_gb, stride_gt, 1)
    lse,  # (B, H, T) fp32
    delta,  # (B, H, T) fp32
    cos,  # (≥T, HALF), row stride stride_cos, or None: nothing turns
    sin,  # (≥T, HALF), row stride stride_sin, or None
    doc_end,  # (B, T) int32, the query after the last that sees each key, or None: T
    dq,  # (segments, B·H, D, PADDED) fp32, or None: dq is summed elsewhere
    d_qkv,  # (B, T, H, 3·D) contiguous; dk and dv are written
    T,
    PADDED,  # T in whole tiles of queries
    heads,  # B·H
    stride_b,
    stride_t,
    stride_gb,
    stride_gt,
    stride_cos,
    stride_sin,
    stride_segment,  # 0: all programs add to one segment
    dq_is_zero,  # 0: the first key tile of a segment writes dq, the others add
    scale,  # 1/√D
    scale_log2,  # log₂e/√D
    segments,  # programs of a head: segment s has key tiles s, s + segments, ...
    H,
    GROUP,  # heads whose tiles run together, which share L2
    D: tl.constexpr,
    PARTS: tl.constexpr,
    HALF: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_segment, i_head = long_first(segments, heads, GROUP)
    i_b, i_h = i_head // H, i_head % H
    p_head = qkv + i_b * stride_b + i_h * (3 * D)
    p_ctx = d_ctx + i_b * stride_gb + i_h * D
    p_lse, p_delta = lse + i_head * T, delta + i_head * T
    ADD_DQ: tl.constexpr = dq is not None
    p_dq = None
    if ADD_DQ:
        p_dq = dq + i_segment.to(tl.int64) * stride_segment + i_head * D * PADDED
    o_m = tl.arange(0, BLOCK_M)

    for i_n in tl.range(i_segment * BLOCK_N, T, segments * BLOCK_N):
        o_k = i_n + tl.arange(0, BLOCK_N)
        m_k = o_k < T
        b_k = load_parts(p_head + D + o_k * stride_t, m_k, PARTS)
        b_v = load_parts(p_head + 2 * D + o_k * stride_t, m_k, PARTS)
        b_dk = zero_parts(BLOCK_N, PARTS)
        b_dv = zero_parts(BLOCK_N, PARTS)
        begin_dq = (i_n == i_segment * BLOCK_N) & (dq_is_zero == 0)
        p_end = None
        b_end = None
        if doc_end is not None:
            p_end = doc_end + i_b * T
            b_end = tl.load(p_end + o_k, mask=m_k, other=0)
        i_begin, i_full, i_edge, i_end = query_ranges(i_n, T, p_end, BLOCK_M, BLOCK_N)
        for i_m in tl.range(i_begin, i_full, BLOCK_M):
            b_dk, b_dv = attend_tile_bwd(
                b_dk, b_dv, b_k, b_v, p_head + (i_m + o_m) * stride_t,
                p_ctx + (i_m + o_m) * stride_gt, p_lse, p_delta, p_dq, i_m + o_m, o_k, b_end,
                begin_dq, T, PADDED, scale, scale_log2, True, DK, DV, ADD_DQ, PARTS,
            )  # fmt: skip
        for i_m in tl.range(i_full, i_edge, BLOCK_M):
            b_dk, b_dv = attend_tile_bwd(
                b_dk, b_dv, b_k, b_v, p_head + (i_m + o_m) * stride_t,
                p_ctx + (i_m + o_m) * stride_gt, p_lse, p_delta, p_dq, i_m + o_m, o_k, None,
                begin_dq, T, PADDED, scale, scale_log2, False, DK, DV, ADD_DQ, PARTS,
            )  # fmt: skip
        if doc_end is not None:
            for i_m in tl.range(i_edge, i_end, BLOCK_M):
                b_dk, b_dv = attend_tile_bwd(
                    b_dk, b_dv, b_k, b_v, p_head + (i_m + o_m) * stride_t,
                    p_ctx + (i_m + o_m) * stride_gt, p_lse, p_delta, p_dq, i_m + o_m, o_k, b_end,
                    begin_dq, T, PADDED, scale, scale_log2, True, DK, DV, ADD_DQ, PARTS,
                )  # fmt: skip

        p_dk = d_qkv + i_b * T * (3 * D * H) + i_h * (3 * D) + D + o_k * (3 * D * H)
        for i in tl.static_range(len(PARTS)):
            if DV:
                store_part(p_dk + D, b_dv[i], m_k, i, PARTS)
            if DK:
                b_x = b_dk[i] * scale
                if cos is not None and i == 0:
                    b_x = rotate_back(b_x, o_k, m_k, cos, sin, stride_cos, stride_sin, HALF)
                store_part(p_dk, b_x, m_k, i, PARTS)
        tl.debug_barrier()  # the next key tile adds to dq where other threads of this one wrote it


def attention_bwd(
    qkv: Tensor,
    ctx: Tensor,
    lse: Tensor,
    d_ctx: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    doc_start: Tensor | None = None,
    deterministic: bool = True,
) -> Tensor:
    """The gradient (B, T, H, 3·D), contiguous, of qkv before rotation.

    qkv (rotated), ctx and lse as `attention_fwd` took and gave them; d_ctx like ctx, any strides of
    B and T. cos, sin: the tables that q and k were turned by, None where they were not.
    """
    check_attention_qkv(qkv)
    check_ctx(ctx, "ctx", qkv)
    check_ctx(d_ctx, "d_ctx", qkv)
    check_documents(doc_start, qkv)
    batch, positions, heads, packed = qkv.shape
    shape = (batch, heads, positions)
    check(lse, "lse", dtypes=(torch.float32,), shape=shape, device=qkv.device)
    if not lse.is_contiguous():
        raise ValueError(f"lse: strides {lse.stride()}, must be contiguous")
    check_attention_tables(cos, sin, qkv)
    d_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if not batch * heads:
        return d_qkv
    delta = _delta(qkv, ctx, d_ctx)
    operands = {"lse": lse, "delta": delta, "d_ctx": d_ctx, "d_qkv": d_qkv}
    operands |= {"stride_gb": d_ctx.stride(0), "stride_gt": d_ctx.stride(1)}
    operands |= of_qkv(qkv) | products_of(qkv)
    tables = of_tables(cos, sin)
    doc_end = None if doc_start is None else _document_ends(doc_start)
    if packed // 3 in BACKWARD:
        _launch(qkv, operands, tables, doc_end, deterministic)
    else:
        _launch_apart(qkv, operands | tables, doc_end)
        dq_apart(qkv, operands | tables, doc_start)
    return d_qkv


def _delta(qkv: Tensor, ctx: Tensor, d_ctx: Tensor) -> Tensor:
    """Σ_d d_ctx·ctx, (B, H, T) fp32."""
    batch, positions, heads, _ = qkv.shape
    delta = torch.empty(batch, heads, positions, dtype=torch.float32, device=qkv.device)
    of_heads = {k: v for k, v in of_qkv(qkv).items() if k in ("T", "H", "D", "PARTS")}
    _attention_bwd_delta_kernel[(triton.cdiv(positions, ROW_TILE) * heads, batch)](
        ctx=ctx,
        d_ctx=d_ctx,
        delta=delta,
        stride_ob=ctx.stride(0),
        stride_ot=ctx.stride(1),
        stride_gb=d_ctx.stride(0),
        stride_gt=d_ctx.stride(1),
        **of_heads,
        BLOCK_T=ROW_TILE,
        num_warps=4,
    )
    return delta


def _launch(qkv, operands, tables, doc_end, deterministic: bool) -> None:
    """dq, dk and dv in five products a tile, and the sum over segments of dq."""
    batch, positions, heads, packed = qkv.shape
    d, of_all = packed // 3, batch * heads
    tile = tile_on(qkv.device, BACKWARD[d])
    segments = key_tiles = triton.cdiv(positions, tile.keys)
    if deterministic:
        segments = _segments(of_all, key_tiles, programs(qkv.device, 1))
    zeroed = not deterministic or doc_end is not None
    padded = triton.cdiv(positions, ROW_TILE) * ROW_TILE
    shape = (segments if deterministic else 1, of_all, d, padded)
    dq = (torch.zeros if zeroed else torch.empty)(shape, dtype=torch.float32, device=qkv.device)
    _attention_bwd_kernel[(segments * of_all,)](
        doc_end=doc_end,
        dq=dq,
        PADDED=padded,
        stride_segment=dq.stride(0) if deterministic else 0,
        dq_is_zero=int(zeroed),
        segments=segments,
        DK=True,
        DV=True,
        BLOCK_M=tile.queries,
        BLOCK_N=tile.keys,
        **operands,
        **tables,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    add_segments(dq, operands["d_qkv"], tables, tile.keys)


def _launch_apart(qkv, operands, doc_end) -> None:
    """dk and dv by a launch each, three and two products a tile."""
    batch, positions, heads, packed = qkv.shape
    for table, dk in ((DK_APART, True), (DV_APART, False)):
        tile = tile_on(qkv.device, table[packed // 3])
        key_tiles = triton.cdiv(positions, tile.keys)
        _attention_bwd_kernel[(key_tiles * batch * heads,)](
            doc_end=doc_end,
            dq=None,
            PADDED=0,
            stride_segment=0,
            dq_is_zero=0,
            segments=key_tiles,
            DK=dk,
            DV=not dk,
            BLOCK_M=tile.queries,
            BLOCK_N=tile.keys,
            **operands,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


def _document_ends(doc_start: Tensor) -> Tensor:
    """(B, T) int32: for each position, where the document that it lies in ends."""
    at = torch.arange(doc_start.shape[1], dtype=torch.int32, device=doc_start.device)
    return torch.searchsorted(doc_start, at.repeat(len(doc_start), 1), right=True, out_int32=True)


def _segments(heads: int, key_tiles: int, sms: int) -> int:
    """Programs a head, so that the last wave over the SMs is nearly full; each costs a scratch."""

    def cost(segments: int) -> float:
        return triton.cdiv(heads * segments, sms) / segments + 0.03 * segments * heads / sms

    return min(range(1, min(key_tiles, 16) + 1), key=cost)


def aot_cases() -> Iterator[AotCase]:
    """All launches at every head dim, with fp32 tables, without and with documents."""
    kernel, launches = _attention_bwd_kernel, []
    for d, tiles in BACKWARD.items():
        # Triton makes constants of ones, so each of these is a kernel of its own
        for what, absent, ones in (
            ("backward", ("doc_end",), {}),
            ("one segment", ("doc_end",), {"segments": 1}),
            ("any order", ("doc_end",), {"dq_is_zero": 1}),
            ("documents", (), {"dq_is_zero": 1}),
        ):
            flags = {"DK": True, "DV": True} | ones
            launches.append((what, d, tiles, 5, absent, flags))
    for tables, dk, products in ((DK_APART, True, 3), (DV_APART, False, 2)):
        for d, tiles in tables.items():
            for what, absent in (("", ("dq", "doc_end")), ("documents ", ("dq",))):
                name = what + ("dk" if dk else "dv")
                launches.append((name, d, tiles, products, absent, {"DK": dk, "DV": not dk}))
    for what, d, tiles, products, absent, flags in launches:
        ordered = products == 5
        yield from attention_cases(what, kernel, d, tiles, absent, products, ordered, **flags)
    for d in HEAD_DIMS:
        rows = Tile(ROW_TILE, ROW_TILE, warps=4, stages=3)
        wide = ("ctx", "d_ctx")
        yield from attention_cases("delta", _attention_bwd_delta_kernel, d, (rows, rows), wide=wide)
