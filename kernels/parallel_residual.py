"""The sum that ends a GPT-NeoX block, alone or with the next block's two LayerNorms in one pass.

    y  = x + ((attn + attn_bias) + (mlp + mlp_bias))          in fp32, rounded once
    y1 = LN(y; w1, b1)     y2 = LN(y; w2, b2)                 of the rounded y (`layer_norm.py`)

    dy' = dy + LN-backward(dy1, dy2)       goes to x, attn and mlp: one tensor, no copy
    d attn_bias = d mlp_bias = Σ_rows dy'  computed once

Saved: nothing for the sum alone; with the norms y as it was written, its mean and rstd (M,) fp32.

The backward of the fused form is the LayerNorm kernel's, which also sums dx over rows; that of the
sum alone only reads dy. Both write fp32 partials (P, K, h), added in a fixed order (`rows.py`).

Bytes for M rows of 16-bit elements (e = 2), vectors left out:
    parallel_residual                  forward 4·e·M·h   backward 1·e·M·h
    parallel_residual_dual_layer_norm  forward 6·e·M·h   backward 5·e·M·h
About 5 FLOPs an element for the sum, 8 and 20 more for the norms: bound by memory bandwidth.

Loads in flight (bf16, sm_90): forward 6 to 15 independent 16-byte loads a thread, 96 to 144 KB an
SM. Column sum: the next two tiles of dy, 40 to 48 KB an SM.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from pythia_fast.kernels.aot_case import AotCase
from pythia_fast.kernels.checks import check, check_rows, check_vectors, grad_rows
from pythia_fast.kernels.layer_norm import FORWARD, layer_norm_bwd, row_statistics, store_norm
from pythia_fast.kernels.rows import (
    SUITE,
    Tile,
    add_rows,
    column_blocks,
    load_rows,
    load_vector,
    programs,
    row_case,
    store_column_sums,
    store_rows,
    sum_partials,
    tile_for,
    zero_rows,
)

# As BACKWARD of layer_norm.py: by hidden size, not yet by measurement. No more programs than keep
# 40 KB of loads in flight an SM: each writes h fp32 partials, which are read again.
COLUMN_SUM = {
    128: Tile(rows=32, warps=4, stages=3, per_sm=3),
    256: Tile(rows=16, warps=4, stages=3, per_sm=3),
    512: Tile(rows=8, warps=4, stages=3, per_sm=3),
    768: Tile(rows=4, warps=4, stages=3, per_sm=4),
    1024: Tile(rows=4, warps=4, stages=3, per_sm=3),
    2048: Tile(rows=2, warps=4, stages=3, per_sm=3),
    2560: Tile(rows=2, warps=4, stages=3, per_sm=2),
    4096: Tile(rows=1, warps=4, stages=3, per_sm=3),
    5120: Tile(rows=1, warps=4, stages=3, per_sm=2),
}


@triton.jit
def _parallel_residual_fwd_kernel(
    x,  # (M, H), row stride stride_x
    attn,  # (M, H), row stride stride_attn
    mlp,  # (M, H), row stride stride_mlp
    attn_bias,  # (H,)
    mlp_bias,  # (H,)
    y,  # (M, H) contiguous
    w1,  # (H,) or None: no norms
    b1,  # (H,) or None
    w2,  # (H,) or None
    b2,  # (H,) or None
    y1,  # (M, H) contiguous or None
    y2,  # (M, H) contiguous or None
    mean,  # (M,) fp32 or None
    rstd,  # (M,) fp32 or None
    M,
    stride_x,
    stride_attn,
    stride_mlp,
    eps,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTHS: tl.constexpr,
):
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < M
    i_row = o_row.to(tl.int64)

    b_x = load_rows(x + i_row * stride_x, m_row, H, WIDTHS)
    b_attn = load_rows(attn + i_row * stride_attn, m_row, H, WIDTHS)
    b_mlp = load_rows(mlp + i_row * stride_mlp, m_row, H, WIDTHS)
    b_attn = add_rows(b_attn, load_vector(attn_bias, H, WIDTHS))
    b_mlp = add_rows(b_mlp, load_vector(mlp_bias, H, WIDTHS))
    b_y = add_rows(b_x, add_rows(b_attn, b_mlp))
    store_rows(y + i_row * H, b_y, m_row, H, WIDTHS)
    if w1 is not None:
        b_y = round_rows(b_y, y.dtype.element_ty)
        b_mean, b_rstd, b_centred = row_statistics(b_y, eps, H, WIDTHS)
        tl.store(mean + o_row, b_mean, mask=m_row)
        tl.store(rstd + o_row, b_rstd, mask=m_row)
        store_norm(y1 + i_row * H, b_centred, b_rstd, w1, b1, m_row, H, WIDTHS)
        store_norm(y2 + i_row * H, b_centred, b_rstd, w2, b2, m_row, H, WIDTHS)


@triton.jit
def round_rows(b_a, dtype: tl.constexpr):
    """What a later reader of the stored rows will see, in fp32."""
    b = ()
    for i in tl.static_range(len(b_a)):
        b += (b_a[i].to(dtype).to(tl.float32),)
    return b


@triton.jit
def _parallel_residual_bwd_kernel(
    dy,  # (M, H), row stride stride_dy
    partials,  # (P, 1, H) fp32
    M,
    stride_dy,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTHS: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_program = tl.program_id(0)
    b_sum = zero_rows(ROWS, WIDTHS)
    for i_tile in tl.range(i_program, tl.cdiv(M, ROWS), tl.num_programs(0), num_stages=STAGES):
        o_row = i_tile * ROWS + tl.arange(0, ROWS)
        p_dy = dy + o_row.to(tl.int64) * stride_dy
        b_sum = add_rows(b_sum, load_rows(p_dy, o_row < M, H, WIDTHS))
    store_column_sums(partials + i_program * H, b_sum, H, WIDTHS)


def parallel_residual_fwd(
    x: Tensor,
    attn: Tensor,
    mlp: Tensor,
    attn_bias: Tensor,
    mlp_bias: Tensor,
    norms: tuple[tuple[Tensor, Tensor], ...] = (),
    eps: float = 1e-5,
) -> tuple[Tensor, ...]:
    """(y,), or with two (weight, bias) pairs (y, y1, y2, mean, rstd).

    x, attn, mlp (..., h) of one shape and dtype; vectors (h,) of one dtype. y, y1, y2 are
    contiguous, of x's shape and dtype; mean and rstd are (M,) fp32.
    """
    x_rows, attn_rows, mlp_rows = _check_inputs(x, attn, mlp)
    vectors = {"attn_bias": attn_bias, "mlp_bias": mlp_bias}
    for i, (weight, bias) in enumerate(norms, 1):
        vectors |= {f"weight{i}": weight, f"bias{i}": bias}
    check_vectors(vectors, x)
    (count, h), tile = x_rows.shape, tile_for(FORWARD, x.shape[-1])
    y, *ys = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(1 + len(norms)))
    mean, rstd = (
        torch.empty(count, dtype=torch.float32, device=x.device) if norms else None
        for _ in range(2)
    )
    (w1, b1), (w2, b2) = norms or ((None, None), (None, None))
    if count:
        _parallel_residual_fwd_kernel[(triton.cdiv(count, tile.rows),)](
            x=x_rows,
            attn=attn_rows,
            mlp=mlp_rows,
            attn_bias=attn_bias,
            mlp_bias=mlp_bias,
            y=y,
            w1=w1,
            b1=b1,
            w2=w2,
            b2=b2,
            y1=ys[0] if norms else None,
            y2=ys[1] if norms else None,
            mean=mean,
            rstd=rstd,
            M=count,
            stride_x=x_rows.stride(0),
            stride_attn=attn_rows.stride(0),
            stride_mlp=mlp_rows.stride(0),
            eps=eps,
            H=h,
            ROWS=tile.rows,
            WIDTHS=column_blocks(h),
            num_warps=tile.warps,
        )
    return (y, *ys, mean, rstd) if norms else (y,)


def parallel_residual_bwd(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ_rows dy, (h,) in dtype: the gradient of either bias. dy itself is the rest.

    dy (..., h), any strides (copied where its inner stride is not 1).
    """
    rows = grad_rows(dy, "dy", dy)
    (count, h), tile = rows.shape, tile_for(COLUMN_SUM, dy.shape[-1])
    if not count:
        return torch.zeros(h, dtype=dtype, device=dy.device)
    grid = min(programs(dy.device, tile.per_sm), triton.cdiv(count, tile.rows))
    partials = torch.empty(grid, 1, h, dtype=torch.float32, device=dy.device)
    _parallel_residual_bwd_kernel[(grid,)](
        dy=rows,
        partials=partials,
        M=count,
        stride_dy=rows.stride(0),
        H=h,
        ROWS=tile.rows,
        WIDTHS=column_blocks(h),
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
    return sum_partials(partials, dtype)[0]


def _check_inputs(x: Tensor, attn: Tensor, mlp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows (M, h) of three tensors of one shape, dtype and device."""
    check(x, "x")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: shape {tuple(x.shape)}, expected (..., h) with h ≥ 1")
    h = x.shape[-1]
    for branch, name in ((attn, "attn"), (mlp, "mlp")):
        check(branch, name, dtypes=(x.dtype,), shape=x.shape, device=x.device)
    return check_rows(x, "x", h), check_rows(attn, "attn", h), check_rows(mlp, "mlp", h)


class ParallelResidualFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, attn, mlp, attn_bias, mlp_bias):
        ctx.bias_dtype = attn_bias.dtype
        (y,) = parallel_residual_fwd(x, attn, mlp, attn_bias, mlp_bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        d_bias = parallel_residual_bwd(dy, ctx.bias_dtype)
        return dy, dy, dy, d_bias, d_bias


class ParallelResidualDualLayerNormFunction(torch.autograd.Function):
    """An output that nothing uses gives a gradient of zeros."""

    @staticmethod
    def forward(ctx, x, attn, mlp, attn_bias, mlp_bias, weight1, bias1, weight2, bias2, eps):
        norms = ((weight1, bias1), (weight2, bias2))
        y, y1, y2, mean, rstd = parallel_residual_fwd(x, attn, mlp, attn_bias, mlp_bias, norms, eps)
        ctx.save_for_backward(y, weight1, weight2, mean, rstd)
        return y, y1, y2

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dy1, dy2):
        y, w1, w2, mean, rstd = ctx.saved_tensors
        dx, sums = layer_norm_bwd(y, dy, (dy1, dy2), (w1, w2), mean, rstd, sum_dx=True)
        *d_norms, d_bias = sums
        return dx, dx, dx, d_bias, d_bias, *d_norms, None


def parallel_residual(
    x: Tensor, attn: Tensor, mlp: Tensor, attn_bias: Tensor, mlp_bias: Tensor
) -> Tensor:
    """y = x + ((attn + attn_bias) + (mlp + mlp_bias)): the sum that ends a GPT-NeoX block.

    x, attn, mlp (..., h) of one shape and dtype, rows at one stride: residual stream and the two
    branches before their output biases (h,), of one dtype. Returns y, contiguous, like x.
    """
    return ParallelResidualFunction.apply(x, attn, mlp, attn_bias, mlp_bias)


def parallel_residual_dual_layer_norm(
    x: Tensor,
    attn: Tensor,
    mlp: Tensor,
    attn_bias: Tensor,
    mlp_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """`parallel_residual`, then the next block's `dual_layer_norm`: (y, norm1(y), norm2(y))."""
    return ParallelResidualDualLayerNormFunction.apply(
        x, attn, mlp, attn_bias, mlp_bias, weight1, bias1, weight2, bias2, eps
    )


def aot_cases() -> Iterator[AotCase]:
    """Both forwards and the column sum at every hidden size; the fused backward is LayerNorm's."""
    fwd, bwd = _parallel_residual_fwd_kernel, _parallel_residual_bwd_kernel
    norms = ("w1", "b1", "w2", "b2", "y1", "y2", "mean", "rstd")
    wide = ("x", "attn", "mlp", "y", "y1", "y2")
    for dtype in ("bf16", "fp16"):
        for size, h in SUITE.items():
            tile = tile_for(FORWARD, h)
            yield row_case(f"{size} sum forward {dtype}", fwd, h, tile, wide, norms)
            yield row_case(f"{size} sum and dual forward {dtype}", fwd, h, tile, wide)
            yield row_case(f"{size} sum backward {dtype}", bwd, h, tile_for(COLUMN_SUM, h), ("dy",))
