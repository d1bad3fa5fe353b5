"""Causal flash attention over the packed projection, forward and backward, rotary inside.

    q', k' = rotated q, k       S = q' k'ᵀ/√D, −∞ above the diagonal       lse = log₂ Σ 2^(S·log₂e)
    P = 2^(S·log₂e − lse)       ctx = P v

    delta = Σ_d d_ctx·ctx       dv = Pᵀ d_ctx      dP = d_ctx vᵀ       dS = P ∘ (dP − delta)
    dq' = dS k'/√D              dk' = dSᵀ q'/√D    and the inverse rotation gives dq, dk

Saved: the rotated qkv (the projection's own memory, turned in place by `rotary_fwd`), ctx, and lse
(B, H, T) fp32. Statistics and accumulators are fp32; P and dS are rounded to qkv's dtype for the
products.

Forward: a program holds a tile of queries of one head and walks the keys; tiles below the diagonal
run without a mask. Backward: a program holds a tile of keys and walks the queries, five products a
tile, each written as its transpose (Sᵀ = k qᵀ, dPᵀ = v d_ctxᵀ, dqᵀ = kᵀ dSᵀ): Pᵀ and dSᵀ are then
operands as they come. dqᵀ is summed in fp32 scratch (segments, B·H, D, T): a program walks every
segments-th key tile of its head in order and adds to a segment that nobody else writes, so the bits
repeat; a last pass adds the segments in order, turns the sum back and writes dq. With
deterministic=False a program has one key tile and all add to one segment, in any order. At D = 256,
where registers do not hold dk, dv and dq, each has a launch of its own (eight products for five).

FLOPs: forward 2·B·H·T²·D (causal), backward 2.5 times that (4 times at D = 256). Bytes for e = 2,
M = B·T: forward 4·e·M·h, 4·M·H (lse) and the rotation's e·M·h; backward 9·e·M·h (delta 2, qkv 3,
d_ctx 1, dqkv 3) and for the scratch 4·M·h·(T/(2·keys) + segments), much of it in L2; what several
tiles of a head read again may come from L2. By the sm_90 report the forward is bound by
exponentials and shared memory at D ≤ 64 and by products above, the backward by shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from pythia_fast.kernels.aot_case import AotCase
from pythia_fast.kernels.attention_bwd import attention_bwd
from pythia_fast.kernels.attention_tiles import (
    HEAD_DIMS,
    LOWEST,
    Tile,
    add_keys,
    attention_cases,
    check_attention_qkv,
    check_attention_tables,
    check_ctx,
    check_documents,
    dot_rows,
    key_ranges,
    load_parts,
    long_first,
    of_qkv,
    products_of,
    store_part,
    tile_on,
    zero_parts,
)
from pythia_fast.kernels.checks import rows_overlap
from pythia_fast.kernels.rotary import rotary_fwd

# By head dim: tiles for 227 KB of shared memory a block (sm_90, sm_100), and for 99 KB. Chosen by
# the resource report (bench/NOTES.md), not yet by measurement. Tiles 128 wide have 8 warps: 4 can
# fault there on Hopper.
FORWARD = {
    32: (Tile(128, 64, warps=8, stages=3), Tile(128, 64, warps=8, stages=3)),
    64: (Tile(128, 64, warps=8, stages=3), Tile(128, 64, warps=8, stages=3)),
    80: (Tile(128, 64, warps=8, stages=3), Tile(128, 64, warps=8, stages=2)),
    128: (Tile(128, 128, warps=8, stages=2), Tile(64, 64, warps=4, stages=2)),
    256: (Tile(128, 64, warps=8, stages=2), Tile(64, 32, warps=8, stages=2)),
}


@triton.jit
def attend_tile(
    b_acc, b_sum, b_max, b_q, p_k, o_q, o_k, b_start, T, scale_log2,
    MASKED: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The online softmax over one tile of keys; MASKED: some query may not see some of them."""
    m_key = None
    if MASKED:
        m_key = o_k < T
    b_s = dot_rows(b_q, load_parts(p_k, m_key, PARTS))  # (BLOCK_M, BLOCK_N)
    if MASKED:
        m = o_k[None, :] <= o_q[:, None]
        if b_start is not None:
            m = m & (o_k[None, :] >= b_start[:, None])
        b_s = tl.where(m, b_s, float("-inf"))
    return add_keys(b_acc, b_sum, b_max, b_s, p_k + D, m_key, scale_log2, PARTS)


@triton.jit
def _attention_fwd_kernel(
    qkv,  # (B, T, H, 3·D), strides (stride_b, stride_t, 3·D, 1), q and k rotated
    ctx,  # (B, T, H·D), strides (stride_ob, stride_ot, 1)
    lse,  # (B, H, T) fp32
    doc_start,  # (B, T) int32, the first key that each query sees, or None: key 0
    T,
    heads,  # B·H
    stride_b,
    stride_t,
    stride_ob,
    stride_ot,
    scale_log2,  # log₂e/√D
    H,
    GROUP,  # heads whose tiles run together, which share L2
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    TILES = tl.cdiv(T, BLOCK_M)
    i_tile, i_head = long_first(TILES, heads, GROUP)
    i_m = (TILES - 1 - i_tile) * BLOCK_M
    o_q = i_m + tl.arange(0, BLOCK_M)
    m_q = o_q < T
    p_head = qkv + i_head // H * stride_b + i_head % H * (3 * D)
    b_q = load_parts(p_head + o_q * stride_t, m_q, PARTS)
    p_start = None
    b_start = None
    if doc_start is not None:
        p_start = doc_start + i_head // H * T
        b_start = tl.load(p_start + o_q, mask=m_q, other=0)

    b_acc = zero_parts(BLOCK_M, PARTS)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_max = tl.full((BLOCK_M,), LOWEST, tl.float32)
    p_k = p_head + D
    o_n = tl.arange(0, BLOCK_N)
    i_begin, i_full, i_edge, i_end = key_ranges(i_m, T, p_start, BLOCK_M, BLOCK_N)
    if doc_start is not None:
        for i_n in tl.range(i_begin, i_full, BLOCK_N):
            b_acc, b_sum, b_max = attend_tile(
                b_acc, b_sum, b_max, b_q, p_k + (i_n + o_n) * stride_t, o_q, i_n + o_n, b_start,
                T, scale_log2, True, D, PARTS,
            )  # fmt: skip
    for i_n in tl.range(i_full, i_edge, BLOCK_N):
        b_acc, b_sum, b_max = attend_tile(
            b_acc, b_sum, b_max, b_q, p_k + (i_n + o_n) * stride_t, o_q, i_n + o_n, None,
            T, scale_log2, False, D, PARTS,
        )  # fmt: skip
    for i_n in tl.range(i_edge, i_end, BLOCK_N):
        b_acc, b_sum, b_max = attend_tile(
            b_acc, b_sum, b_max, b_q, p_k + (i_n + o_n) * stride_t, o_q, i_n + o_n, b_start,
            T, scale_log2, True, D, PARTS,
        )  # fmt: skip

    tl.store(lse + i_head * T + o_q, b_max + tl.log2(b_sum), mask=m_q)
    p_ctx = ctx + i_head // H * stride_ob + i_head % H * D + o_q * stride_ot
    b_share = (1.0 / b_sum)[:, None]
    for i in tl.static_range(len(PARTS)):
        store_part(p_ctx, b_acc[i] * b_share, m_q, i, PARTS)


def attention_fwd(
    qkv: Tensor, doc_start: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(ctx, lse) of qkv (B, T, H, 3·D) whose q and k are rotated already.

    ctx (B, T, H·D) in qkv's dtype, written to out where given: any strides of B and T, such as
    columns of a wider buffer. lse (B, H, T) fp32 in base 2. doc_start as in `attention`.
    """
    check_attention_qkv(qkv)
    batch, positions, heads, packed = qkv.shape
    d = packed // 3
    if out is None:
        out = torch.empty(batch, positions, heads * d, dtype=qkv.dtype, device=qkv.device)
    _check_out(out, qkv)
    check_documents(doc_start, qkv)
    lse = torch.empty(batch, heads, positions, dtype=torch.float32, device=qkv.device)
    scalars = products_of(qkv)
    tile = tile_on(qkv.device, FORWARD[d])
    if batch * heads:
        _attention_fwd_kernel[(triton.cdiv(positions, tile.queries) * batch * heads,)](
            ctx=out,
            lse=lse,
            doc_start=doc_start,
            stride_ob=out.stride(0),
            stride_ot=out.stride(1),
            scale_log2=scalars["scale_log2"],
            GROUP=scalars["GROUP"],
            BLOCK_M=tile.queries,
            BLOCK_N=tile.keys,
            **of_qkv(qkv),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out, lse


def _check_out(out: Tensor, qkv: Tensor) -> None:
    """out is (B, T, H·D), its rows are apart from each other and lie in other memory than qkv."""
    check_ctx(out, "out", qkv)
    if out.numel() and rows_overlap(out, out.shape[2]):
        raise ValueError(f"out: strides {out.stride()} of shape {tuple(out.shape)} overlap")
    if out.numel() and out.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr():
        raise ValueError("out: shares memory with qkv, which is read while out is written")


class AttentionFunction(torch.autograd.Function):
    """Owns qkv, which it turns in place, and the gradient of it, which it turns back.

    Autograd hears of the write by qkv's version, not by `mark_dirty`, which asks that a view (the
    projection seen as heads) be returned alone.
    """

    @staticmethod
    def forward(ctx, qkv, cos, sin, doc_start, deterministic):
        check_attention_qkv(qkv)
        check_attention_tables(cos, sin, qkv)
        check_documents(doc_start, qkv)
        if cos is not None:
            rotary_fwd(qkv, cos, sin)
            torch.autograd.graph.increment_version(qkv)
        out, lse = attention_fwd(qkv, doc_start)
        ctx.deterministic = deterministic
        ctx.save_for_backward(qkv, out, lse, cos, sin, doc_start)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        qkv, out, lse, cos, sin, doc_start = ctx.saved_tensors
        if d_out.stride(-1) != 1:  # an expanded scalar
            d_out = d_out.clone(memory_format=torch.contiguous_format)
        d_qkv = attention_bwd(qkv, out, lse, d_out, cos, sin, doc_start, ctx.deterministic)
        return d_qkv, None, None, None, None


def attention(
    qkv: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    doc_start: Tensor | None = None,
    deterministic: bool = True,
) -> Tensor:
    """Causal self-attention over a packed projection, rotary inside where tables are given.

        ctx = softmax(q kᵀ/√D + causal mask) v

    qkv (B, T, H, 3·D) fp16 or bf16 (fp32 under the interpreter), D one of 32, 64, 80, 128, 256, any
    strides of B and T, *consumed*: q and k are turned in place where tables are given, so a leaf
    that requires grad is refused. cos, sin (≥T, R/2), any floating dtype, both or neither.
    doc_start (B, T) int32, the position where the document of each position begins: nothing before
    it is seen. Nondecreasing in T, from 0 to the position itself: checked on a CPU; on a GPU other
    values give wrong numbers, but nothing outside of the row is read. deterministic: whether the
    gradient repeats bit for bit. Returns (B, T, H·D). Source: Dao 2023, arXiv 2307.08691.
    """
    if cos is not None and torch.is_grad_enabled() and isinstance(qkv, Tensor):
        own = qkv if qkv._base is None else qkv._base
        if own.is_leaf and own.requires_grad:
            raise ValueError("qkv: a leaf that requires grad cannot be turned in place")
    return AttentionFunction.apply(qkv, cos, sin, doc_start, deterministic)


def aot_cases() -> Iterator[AotCase]:
    """Forward at every head dim, without and with documents."""
    for d in HEAD_DIMS:
        for what, absent in (("forward", ("doc_start",)), ("documents forward", ())):
            yield from attention_cases(what, _attention_fwd_kernel, d, FORWARD[d], absent, 2)
