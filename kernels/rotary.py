"""Partial rotary embedding of q and k in place inside the packed projection (half-rotation form).

    x1' = x1·cos − x2·sin          x1 = x[..., :R/2], x2 = x[..., R/2:R]      for x = q and x = k
    x2' = x2·cos + x1·sin          v and x[..., R:] are neither read nor written

    backward: the conjugate, dx1 = dy1·cos + dy2·sin, dx2 = dy2·cos − dy1·sin (sin -> −sin)

Saved: cos and sin as they came. Products and sums are fp32 whatever the dtypes; one rounding.

One launch serves q and k of all heads. A program holds BLOCK_T positions of BLOCK_H heads; each
table entry it loads serves 2·BLOCK_H rotations.

Bytes for 16-bit elements (e = 2), tables left out: 2R read and 2R written of each head's 3D, so
4·e·R·B·T·H = e·B·T·h with R = D/4. Memory moves in sectors of 32 bytes, which R·e fills at
D = 64, 128 and 256; it is 16 of 32 bytes at D = 32 and 40 of 64 at D = 80. A thread has 4
independent 16-byte loads of qkv at those (12 programs an SM by the sm_90 report: 96 KB in flight),
8 of 8 bytes at D = 32, 32 of 4 at D = 80. 6 FLOPs a pair: bound by
memory bandwidth. `rotate_pairs` and `load_rotated` put the same sum inside another kernel, where it
moves nothing.

The gradient given by autograd may be shared, so `RotaryFunction` rotates a copy of it. A kernel
that owns dqkv calls `rotary_bwd` and pays only the bytes above.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from pythia_fast.kernels.aot_case import AotCase
from pythia_fast.kernels.checks import check, rows_overlap

# By R/2: elements of x1 that a program holds (BLOCK_T · BLOCK_H · R/2, rounded up), and warps.
TILE_SIZE = {4: 1024, 8: 1024, 10: 2048, 16: 1024, 32: 1024}
WARPS = 4
MAX_BLOCK_H = 8
# by R/2: accesses where 64 and 32 bits are all that is contiguous and aligned, as compiled
NARROW = {4: {"ld64": 8, "st64": 8}, 10: {"ld32": 32, "st32": 32}}
MAX_BATCH = 65535  # CUDA's limit of a grid's third axis

# (heads, head dim) of the suite, for ahead-of-time compilation
SUITE = {
    "14m": (4, 32),
    "31m": (8, 32),
    "70m": (8, 64),
    "160m": (12, 64),
    "410m": (16, 64),
    "1b": (8, 256),
    "1.4b": (16, 128),
    "2.8b": (32, 80),
    "6.9b": (32, 128),
    "12b": (40, 128),
}


@triton.jit
def rotate_pairs(b_x1, b_x2, b_cos, b_sin, CONJUGATE: tl.constexpr):
    """(x1·cos − x2·sin, x2·cos + x1·sin) in fp32; the inverse rotation where CONJUGATE."""
    if CONJUGATE:
        b_sin = -b_sin
    return b_x1 * b_cos - b_x2 * b_sin, b_x2 * b_cos + b_x1 * b_sin


@triton.jit
def load_rotated(p_x, o_t, o_d, cos, sin, stride_cos, stride_sin, m_x, HALF: tl.constexpr):
    """A tile of rotated rows of x in fp32, for the prologue of another kernel.

    p_x (BLOCK_T, BLOCK_D) points at elements (o_t, o_d) of rows whose first 2·HALF elements turn;
    m_x masks positions and dims. cos, sin (≥T, HALF) at row strides stride_cos, stride_sin.
    """
    m_rotary = m_x & (o_d < 2 * HALF)[None, :]
    o_pair = tl.where(o_d < HALF, o_d, o_d - HALF)
    o_partner = tl.where(o_d < HALF, HALF, -HALF)
    p_cos = cos + o_t[:, None] * stride_cos + o_pair[None, :]
    p_sin = sin + o_t[:, None] * stride_sin + o_pair[None, :]
    b_x = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
    b_partner = tl.load(p_x + o_partner[None, :], mask=m_rotary, other=0.0).to(tl.float32)
    b_cos = tl.load(p_cos, mask=m_rotary, other=1.0).to(tl.float32)
    b_sin = tl.load(p_sin, mask=m_rotary, other=0.0).to(tl.float32)
    return b_x * b_cos + tl.where((o_d < HALF)[None, :], -b_partner, b_partner) * b_sin


@triton.jit
def _rotary_kernel(
    qkv,  # (B, T, H, 3·D), strides (stride_b, stride_t, 3·D, 1), read and written
    cos,  # (≥T, HALF), row stride stride_cos
    sin,  # (≥T, HALF), row stride stride_sin
    T,
    stride_b,
    stride_t,
    stride_cos,
    stride_sin,
    H: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    CONJUGATE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_r = tl.arange(0, BLOCK_R)
    i_b = tl.program_id(2).to(tl.int64)

    # [BLOCK_T, 1, BLOCK_R]
    m_table = (o_t < T)[:, None, None] & (o_r < HALF)[None, None, :]
    p_cos = cos + o_t[:, None, None] * stride_cos + o_r[None, None, :]
    p_sin = sin + o_t[:, None, None] * stride_sin + o_r[None, None, :]
    b_cos = tl.load(p_cos, mask=m_table, other=0.0).to(tl.float32)
    b_sin = tl.load(p_sin, mask=m_table, other=0.0).to(tl.float32)

    # [BLOCK_T, BLOCK_H, BLOCK_R]
    m = m_table & (o_h < H)[None, :, None]
    i_row = i_b * stride_b + o_t.to(tl.int64) * stride_t
    p_q = qkv + i_row[:, None, None] + (o_h * 3 * D)[None, :, None] + o_r[None, None, :]
    p_k = p_q + D
    b_q1 = tl.load(p_q, mask=m, other=0.0).to(tl.float32)
    b_q2 = tl.load(p_q + HALF, mask=m, other=0.0).to(tl.float32)
    b_k1 = tl.load(p_k, mask=m, other=0.0).to(tl.float32)
    b_k2 = tl.load(p_k + HALF, mask=m, other=0.0).to(tl.float32)

    b_q1, b_q2 = rotate_pairs(b_q1, b_q2, b_cos, b_sin, CONJUGATE)
    b_k1, b_k2 = rotate_pairs(b_k1, b_k2, b_cos, b_sin, CONJUGATE)
    tl.store(p_q, b_q1.to(qkv.dtype.element_ty), mask=m)
    tl.store(p_q + HALF, b_q2.to(qkv.dtype.element_ty), mask=m)
    tl.store(p_k, b_k1.to(qkv.dtype.element_ty), mask=m)
    tl.store(p_k + HALF, b_k2.to(qkv.dtype.element_ty), mask=m)


def blocks(heads: int, half: int) -> tuple[int, int, int]:
    """(BLOCK_T, BLOCK_H, BLOCK_R): heads in the largest power of two that divides them, up to 8."""
    block_r = triton.next_power_of_2(half)
    block_h = min(heads & -heads, MAX_BLOCK_H)
    size = TILE_SIZE.get(half, 1024)
    return max(size // (block_h * block_r), 1), block_h, block_r


def rotary_fwd(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates q and k of qkv (B, T, H, 3·D) in place and returns qkv."""
    return _rotate_(qkv, cos, sin, conjugate=False)


def rotary_bwd(dqkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the gradient of the rotated qkv into that of qkv, in place, and returns it."""
    return _rotate_(dqkv, cos, sin, conjugate=True)


def _rotate_(qkv: Tensor, cos: Tensor, sin: Tensor, conjugate: bool) -> Tensor:
    check_qkv(qkv)
    check_tables(cos, sin, qkv)
    batch, positions, heads, packed = qkv.shape
    block_t, block_h, block_r = blocks(heads, cos.shape[1])
    if qkv.numel():
        _rotary_kernel[(triton.cdiv(positions, block_t), triton.cdiv(heads, block_h), batch)](
            qkv=qkv,
            cos=cos,
            sin=sin,
            T=positions,
            stride_b=qkv.stride(0),
            stride_t=qkv.stride(1),
            stride_cos=cos.stride(0),
            stride_sin=sin.stride(0),
            H=heads,
            D=packed // 3,
            HALF=cos.shape[1],
            CONJUGATE=conjugate,
            BLOCK_T=block_t,
            BLOCK_H=block_h,
            BLOCK_R=block_r,
            num_warps=WARPS,
        )
    return qkv


def check_qkv(qkv: Tensor) -> None:
    """qkv is (B, T, H, 3·D) with heads side by side and rows that do not overlap."""
    check(qkv, "qkv", rank=4)
    _, _, heads, packed = qkv.shape
    if packed % 3:
        raise ValueError(f"qkv: shape {tuple(qkv.shape)}, expected (B, T, H, 3·D)")
    if heads > 1 and qkv.stride(2) != packed:
        raise ValueError(f"qkv: strides {qkv.stride()}, heads must lie {packed} elements apart")
    if qkv.numel() and rows_overlap(qkv, heads * packed):
        raise ValueError(f"qkv: strides {qkv.stride()} of shape {tuple(qkv.shape)} overlap")
    if qkv.shape[0] > MAX_BATCH:
        raise ValueError(f"qkv: batch {qkv.shape[0]}, at most {MAX_BATCH} (the grid's third axis)")


def check_tables(cos: Tensor, sin: Tensor, qkv: Tensor) -> None:
    """cos and sin are (≥T, R/2) for qkv (B, T, H, 3·D)."""
    _, positions, _, packed = qkv.shape
    for table, name in ((cos, "cos"), (sin, "sin")):
        check(table, name, rank=2, device=qkv.device)
        if table.shape[0] < positions or table.shape[1] < 1 or 6 * table.shape[1] > packed:
            raise ValueError(
                f"{name}: shape {tuple(table.shape)}, expected (≥{positions}, R/2)"
                f" with 2 ≤ R ≤ {packed // 3}"
            )
    check(sin, "sin", shape=(None, cos.shape[1]))


class RotaryFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin):
        ctx.mark_dirty(qkv)
        ctx.save_for_backward(cos, sin)
        return rotary_fwd(qkv, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, dqkv):
        own = dqkv.clone(memory_format=torch.contiguous_format)
        return rotary_bwd(own, *ctx.saved_tensors), None, None


def rotary(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Partial rotary embedding of q and k inside the packed projection, in place; returns qkv.

    qkv (B, T, H, 3·D), each head q|k|v, any strides of B and T, heads and elements contiguous;
    written over, so a leaf that requires grad is refused. cos, sin (≥T, R/2), any floating dtype;
    they get no gradient. Source: Su et al. 2021, in the layout of GPT-NeoX.
    """
    if isinstance(qkv, Tensor) and qkv.is_leaf and qkv.requires_grad and torch.is_grad_enabled():
        raise ValueError("qkv: a leaf that requires grad cannot be rotated in place; pass a clone")
    return RotaryFunction.apply(qkv, cos, sin)


def aot_cases() -> Iterator[AotCase]:
    """Forward and backward at every size, with fp32 tables."""
    for dtype in ("bf16", "fp16"):
        for size, (heads, d) in SUITE.items():
            half = d // 8
            block_t, block_h, block_r = blocks(heads, half)
            shape = {"H": heads, "D": d, "HALF": half}
            tile = {"BLOCK_T": block_t, "BLOCK_H": block_h, "BLOCK_R": block_r}
            pointers = {"qkv": f"*{dtype}", "cos": "*fp32", "sin": "*fp32"}
            integers = ("T", "stride_b", "stride_t", "stride_cos", "stride_sin")
            for what, conjugate in (("forward", False), ("backward", True)):
                constexprs = shape | {"CONJUGATE": conjugate} | tile
                yield AotCase(
                    name=f"{size} {what} {dtype}",
                    kernel=_rotary_kernel,
                    signature=pointers
                    | dict.fromkeys(integers, "i32")
                    | dict.fromkeys(constexprs, "constexpr"),
                    constexprs=constexprs,
                    num_warps=WARPS,
                    num_stages=3,
                    wide=("qkv",) if half not in NARROW else (),
                    narrow={"qkv": NARROW[half]} if half in NARROW else {},
                    not_aligned=("T",) if half % 16 == 0 else ("T", "stride_cos", "stride_sin"),
                )
