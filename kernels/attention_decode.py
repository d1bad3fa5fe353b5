"""Attention of a few new queries over a cache of keys and values, for generation.

    ctx = softmax(q kᵀ/√D) v over the keys of a row from its first position up to the query's own

The keys are split: a program holds the queries of one head and one stretch of the cache and writes
its unnormalised sum, its maximum and its sum of exponentials in fp32; a second launch combines the
stretches in order,

    m = max mᵢ      ctx = Σ accᵢ·2^(mᵢ − m) / Σ lᵢ·2^(mᵢ − m)

so that a single row fills the GPU. Queries are padded to a tile of 16, the least that a matrix
product takes.

Bytes for e = 2: the cache read once, 4·S·D·B·H; the partials, 8·Q·D·B·H a stretch, stay in L2.
4·Q·S·D·B·H FLOPs: bound by memory bandwidth for up to 16 queries.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from pythia_fast.kernels.aot_case import AotCase
from pythia_fast.kernels.attention_tiles import (
    DTYPES,
    HEAD_DIMS,
    LOG2_E,
    LOWEST,
    Tile,
    add_keys,
    dot_rows,
    load_parts,
    store_part,
    zero_parts,
)
from pythia_fast.kernels.checks import check
from pythia_fast.kernels.rows import column_blocks, programs

QUERIES = 16
# 16 queries are no wgmma shape: mma.sync, whose tiles 4 warps may share at any width
TILES = {
    32: Tile(QUERIES, 128, warps=4, stages=3),
    64: Tile(QUERIES, 64, warps=4, stages=3),
    80: Tile(QUERIES, 64, warps=4, stages=3),
    128: Tile(QUERIES, 64, warps=4, stages=3),
    256: Tile(QUERIES, 32, warps=4, stages=2),
}
PER_SM = 2  # programs per SM that the stretches should make, if the cache is long enough


@triton.jit
def _attention_decode_kernel(
    q,  # (B, Q, H, D), strides (stride_qb, stride_qt, stride_qh, 1)
    keys,  # (B, H, S, D), strides (stride_b, stride_h, D, 1)
    values,  # as keys
    first,  # (B,) int32, the first position of each row, or None: 0
    acc,  # (B·H, STRETCHES, Q, D) fp32
    row_max,  # (B·H, STRETCHES, Q) fp32, in base 2
    row_sum,  # (B·H, STRETCHES, Q) fp32
    Q,  # queries of a sequence
    H,
    filled,  # positions of the cache that hold keys
    stretch,  # keys of a program, a multiple of BLOCK_N
    stride_qb,
    stride_qt,
    stride_qh,
    stride_b,
    stride_h,
    scale_log2,  # log₂e/√D
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_head = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_head // H, i_head % H
    o_m = tl.arange(0, BLOCK_M)
    m_q = o_m < Q
    o_q = filled - Q + o_m  # positions
    b_q = load_parts(q + i_b * stride_qb + i_h * stride_qh + o_m * stride_qt, m_q, PARTS)
    i_first = 0
    if first is not None:
        i_first = tl.load(first + i_b)
    p_k = keys + i_b * stride_b + i_h * stride_h
    p_v = values + i_b * stride_b + i_h * stride_h

    b_acc = zero_parts(BLOCK_M, PARTS)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_max = tl.full((BLOCK_M,), LOWEST, tl.float32)
    i_begin = tl.program_id(1) * stretch
    for i_n in tl.range(i_begin, tl.minimum(i_begin + stretch, filled), BLOCK_N):
        o_k = i_n + tl.arange(0, BLOCK_N)
        m_k = o_k < filled
        b_s = dot_rows(b_q, load_parts(p_k + o_k * D, m_k, PARTS))
        m = (o_k[None, :] <= o_q[:, None]) & (
            (o_k >= i_first)[None, :] | (o_k[None, :] == o_q[:, None])
        )
        b_s = tl.where(m & m_k[None, :], b_s, float("-inf"))
        b_acc, b_sum, b_max = add_keys(
            b_acc, b_sum, b_max, b_s, p_v + o_k * D, m_k, scale_log2, PARTS
        )

    i_row = (i_head * tl.num_programs(1) + tl.program_id(1)) * Q + o_m
    tl.store(row_max + i_row, b_max, mask=m_q)
    tl.store(row_sum + i_row, b_sum, mask=m_q)
    for i in tl.static_range(len(PARTS)):
        store_part(acc + i_row * D, b_acc[i], m_q, i, PARTS)


@triton.jit
def _attention_combine_kernel(
    acc,  # (B·H, STRETCHES, Q, D) fp32
    row_max,  # (B·H, STRETCHES, Q) fp32
    row_sum,  # (B·H, STRETCHES, Q) fp32
    ctx,  # (B, Q, H·D) contiguous
    Q,  # queries of a sequence
    H,
    stretches,  # of the keys, a program each
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    i_head = tl.program_id(0).to(tl.int64)
    o_m = tl.arange(0, BLOCK_M)
    m_q = o_m < Q
    b_max = tl.full((BLOCK_M,), LOWEST, tl.float32)
    for i_s in range(stretches):
        i_row = (i_head * stretches + i_s) * Q + o_m
        b_max = tl.maximum(b_max, tl.load(row_max + i_row, mask=m_q, other=LOWEST))
    b_acc = zero_parts(BLOCK_M, PARTS)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    for i_s in range(stretches):
        i_row = (i_head * stretches + i_s) * Q + o_m
        b_share = tl.exp2(tl.load(row_max + i_row, mask=m_q, other=LOWEST) - b_max)
        b_sum += b_share * tl.load(row_sum + i_row, mask=m_q, other=1.0)
        b_part = load_parts(acc + i_row * D, m_q, PARTS)
        b_added = ()
        for i in tl.static_range(len(PARTS)):
            b_added += (b_acc[i] + b_share[:, None] * b_part[i],)
        b_acc = b_added
    i_out = ((i_head // H) * Q + o_m) * H + i_head % H
    for i in tl.static_range(len(PARTS)):
        store_part(ctx + i_out * D, b_acc[i] / b_sum[:, None], m_q, i, PARTS)


def attention_decode(
    q: Tensor, keys: Tensor, values: Tensor, filled: int, first: Tensor | None = None
) -> Tensor:
    """Attention of the newest positions over a cache: (B, Q, H·D) of q (B, Q, H, D), rotated.

    keys, values (B, H, S, D), one pair of strides of B and H, of which positions [0, filled) are
    there, the last Q of them the queries' own. first (B,) int32: the first position of each row
    (those before it are padding; a query there sees itself alone), None: 0. D is one of 32, 64, 80,
    128, 256, Q at most 16; dtypes as in `attention`, all the same. No gradient.
    """
    _check_inputs(q, keys, values, filled, first)
    batch, queries, heads, d = q.shape
    tile = TILES[d]
    ctx = torch.empty(batch, queries, heads * d, dtype=q.dtype, device=q.device)
    if not ctx.numel():
        return ctx
    most = triton.cdiv(filled, tile.keys)
    wanted = triton.cdiv(programs(q.device, PER_SM), batch * heads)
    stretch = triton.cdiv(most, min(wanted, most)) * tile.keys
    stretches = triton.cdiv(filled, stretch)
    shape = (batch * heads, stretches, queries)
    acc = torch.empty(*shape, d, dtype=torch.float32, device=q.device)
    row_max, row_sum = (torch.empty(shape, dtype=torch.float32, device=q.device) for _ in range(2))
    partials = {"acc": acc, "row_max": row_max, "row_sum": row_sum, "Q": queries, "H": heads}
    partials |= {"D": d, "PARTS": column_blocks(d), "BLOCK_M": QUERIES}
    _attention_decode_kernel[(batch * heads, stretches)](
        q=q,
        keys=keys,
        values=values,
        first=first,
        filled=filled,
        stretch=stretch,
        stride_qb=q.stride(0),
        stride_qt=q.stride(1),
        stride_qh=q.stride(2),
        stride_b=keys.stride(0),
        stride_h=keys.stride(1),
        scale_log2=LOG2_E / d**0.5,
        BLOCK_N=tile.keys,
        **partials,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    _attention_combine_kernel[(batch * heads,)](
        ctx=ctx, stretches=stretches, **partials, num_warps=4
    )
    return ctx


def _check_inputs(
    q: Tensor, keys: Tensor, values: Tensor, filled: int, first: Tensor | None
) -> None:
    check(q, "q", dtypes=DTYPES, rank=4)
    batch, queries, heads, d = q.shape
    if d not in TILES:
        raise ValueError(f"q: head dim {d}, not one of {', '.join(map(str, HEAD_DIMS))}")
    if not 1 <= queries <= QUERIES:
        raise ValueError(f"q: {queries} positions, expected 1 to {QUERIES}")
    for name, cache in (("keys", keys), ("values", values)):
        check(cache, name, dtypes=(q.dtype,), shape=(batch, heads, None, d), device=q.device)
        if cache.stride(2) != d or cache.stride() != keys.stride():
            raise ValueError(f"{name}: strides {cache.stride()}, positions must lie {d} apart")
    if keys.shape != values.shape:
        raise ValueError(f"values: shape {tuple(values.shape)}, keys has {tuple(keys.shape)}")
    if not queries <= filled <= keys.shape[2]:
        raise ValueError(f"filled: {filled}, expected {queries} to {keys.shape[2]}")
    if first is not None:
        check(first, "first", dtypes=(torch.int32,), shape=(batch,), device=q.device)


def aot_cases() -> Iterator[AotCase]:
    """Both launches at every head dim, without and with padded rows."""
    fp32 = dict.fromkeys(("acc", "row_max", "row_sum"), "*fp32")
    decode, combine = _attention_decode_kernel, _attention_combine_kernel
    for dtype in ("bf16", "fp16"):
        half = dict.fromkeys(("q", "keys", "values", "ctx"), f"*{dtype}")
        types = half | fp32 | {"first": "*i32", "scale_log2": "fp32"}
        for d, tile in TILES.items():
            values = {"D": d, "PARTS": column_blocks(d), "BLOCK_M": QUERIES, "BLOCK_N": tile.keys}
            for what, kernel, absent in (
                ("decode", decode, {"first": None}),
                ("padded decode", decode, {}),
                ("combine", combine, {}),
            ):
                constexprs = {n: values[n] for n in kernel.arg_names if n in values} | absent
                own = types | dict.fromkeys(constexprs, "constexpr")
                yield AotCase(
                    name=f"D={d} {what} {dtype}",
                    kernel=kernel,
                    signature={n: own.get(n, "i32") for n in kernel.arg_names},
                    constexprs=constexprs,
                    num_warps=tile.warps,
                    num_stages=tile.stages if kernel is decode else 3,
                    wide=("keys", "values") if kernel is decode else (),
                    not_aligned=("Q", "H", "filled", "stretches"),
                    matrix=kernel is decode,
                    spill_budget={"sm_80": 8, "sm_90": 0, "sm_100": 0},  # an address, once
                )
