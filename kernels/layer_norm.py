"""LayerNorm over the last dimension, one or two affine norms of the same x in one pass.

    x̂ = (x − mean) · rstd            mean = Σx/h     rstd = 1/√(Σ(x − mean)²/h + eps)
    yₖ = x̂ · wₖ + bₖ                 k = 1, or k = 1, 2 (`dual_layer_norm`)

    g  = Σₖ dyₖ · wₖ                 linear in the upstream gradients, so one pass serves both norms
    dx = d_residual + rstd · (g − Σg/h − x̂ · Σ(g·x̂)/h)
    dwₖ = Σ_rows dyₖ · x̂             dbₖ = Σ_rows dyₖ

Where other processes have normalised the rows, x is x̂ already: no mean and rstd, and dx = g.

The forward of the pair also writes x + (bias1' + bias2') where a fused block asks for it: the
residual stream that its last product is then added to in place (`pythia_fast/block.py`).

Saved: x as it came, mean and rstd (M,) fp32. All arithmetic is fp32; results round on store.

A program holds whole rows in registers (`rows.py`), so x is read once and the variance is that of
the centred values. The backward walks rows with a stride of P programs, keeps its column sums in
registers and writes them once, (P, 2 or 4, h) fp32; a second launch adds them in a fixed order.

Bytes for M rows of 16-bit elements (e = 2), weights and statistics left out:
    layer_norm       forward 2·e·M·h    backward 3·e·M·h
    dual_layer_norm  forward 3·e·M·h    backward 5·e·M·h  (x, d_residual, dy1, dy2 -> dx)
    with a residual  forward 4·e·M·h
plus partials 2·16·P·h bytes (written, read) in the backward of the pair. About 8 FLOPs an element
forward and 20 backward: both are bound by memory bandwidth, at every h.

Loads in flight (bf16, sm_90; 4.3 TB/s ask for 33 KB an SM and µs of latency): forward 2 to 5
independent 16-byte loads a thread, 40 to 70 KB an SM. Backward of the pair: the next two tiles of
four streams, 48 to 80 KB an SM; of one norm, two streams and half of that.
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
from pythia_fast.kernels.rows import (
    SUITE,
    Tile,
    add_rows,
    column_blocks,
    columns,
    load_rows,
    load_vector,
    multiply_add_rows,
    multiply_rows,
    padded,
    programs,
    row_case,
    store_column_sums,
    store_rows,
    sum_partials,
    sum_rows,
    tile_for,
    zero_rows,
)

# By hidden size; another size takes the next larger entry. Chosen by the resource report (no spill,
# 128-bit accesses, 16 to 64 KB of loads in flight an SM), not yet by measurement. A single row, so
# that no block changes layout, where a row has two blocks.
FORWARD = {
    128: Tile(rows=16, warps=4),
    256: Tile(rows=8, warps=4),
    512: Tile(rows=4, warps=4),
    768: Tile(rows=1, warps=1),
    1024: Tile(rows=2, warps=4),
    2048: Tile(rows=1, warps=4),
    2560: Tile(rows=1, warps=2),
    4096: Tile(rows=1, warps=8),
    5120: Tile(rows=1, warps=4),
}
BACKWARD = {
    128: Tile(rows=16, warps=8, stages=3, per_sm=2),
    256: Tile(rows=8, warps=8, stages=3, per_sm=2),
    512: Tile(rows=4, warps=8, stages=3, per_sm=2),
    768: Tile(rows=1, warps=2, stages=3, per_sm=4),
    1024: Tile(rows=2, warps=8, stages=3, per_sm=2),
    2048: Tile(rows=1, warps=8, stages=3, per_sm=2),
    2560: Tile(rows=1, warps=4, stages=3, per_sm=2),
    4096: Tile(rows=1, warps=8, stages=3, per_sm=1),
    5120: Tile(rows=1, warps=8, stages=3, per_sm=1),
}


@triton.jit
def row_statistics(b_x, eps, H: tl.constexpr, WIDTHS: tl.constexpr):
    """mean and rstd (ROWS,) of rows held in blocks, and x − mean (0 in padded columns)."""
    b_mean = sum_rows(b_x) / H
    b_centred = ()
    for i in tl.static_range(len(WIDTHS)):
        b_c = b_x[i] - b_mean[:, None]
        if padded(i, H, WIDTHS):
            b_c = tl.where((columns(i, WIDTHS) < H)[None, :], b_c, 0.0)
        b_centred += (b_c,)
    b_variance = sum_rows(multiply_rows(b_centred, b_centred)) / H
    return b_mean, 1.0 / tl.sqrt(b_variance + eps), b_centred


@triton.jit
def store_norm(p_rows, b_centred, b_rstd, w, b, m_row, H: tl.constexpr, WIDTHS: tl.constexpr):
    """Writes (x − mean)·rstd·w + b to the rows at p_rows; w, b (H,)."""
    b_w = load_vector(w, H, WIDTHS)
    b_b = load_vector(b, H, WIDTHS)
    b_y = ()
    for i in tl.static_range(len(WIDTHS)):
        b_y += (b_centred[i] * b_rstd[:, None] * b_w[i] + b_b[i],)
    store_rows(p_rows, b_y, m_row, H, WIDTHS)


@triton.jit
def _layer_norm_fwd_kernel(
    x,  # (M, H), row stride stride_x
    w1,  # (H,)
    b1,  # (H,)
    w2,  # (H,) or None: one norm
    b2,  # (H,) or None
    y1,  # (M, H) contiguous
    y2,  # (M, H) contiguous or None
    residual_b1,  # (H,) or None: no residual
    residual_b2,  # (H,) or None
    residual,  # (M, H) contiguous or None
    mean,  # (M,) fp32
    rstd,  # (M,) fp32
    M,
    stride_x,
    eps,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTHS: tl.constexpr,
):
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < M
    i_row = o_row.to(tl.int64)

    b_x = load_rows(x + i_row * stride_x, m_row, H, WIDTHS)
    if residual is not None:
        b_bias = add_rows(load_vector(residual_b1, H, WIDTHS), load_vector(residual_b2, H, WIDTHS))
        store_rows(residual + i_row * H, add_rows(b_x, b_bias), m_row, H, WIDTHS)
    b_mean, b_rstd, b_centred = row_statistics(b_x, eps, H, WIDTHS)
    tl.store(mean + o_row, b_mean, mask=m_row)
    tl.store(rstd + o_row, b_rstd, mask=m_row)
    store_norm(y1 + i_row * H, b_centred, b_rstd, w1, b1, m_row, H, WIDTHS)
    if w2 is not None:
        store_norm(y2 + i_row * H, b_centred, b_rstd, w2, b2, m_row, H, WIDTHS)


@triton.jit
def _layer_norm_bwd_kernel(
    x,  # (M, H), row stride stride_x
    d_residual,  # (M, H), row stride stride_dr, or None: no residual stream
    dy1,  # (M, H), row stride stride_dy1
    dy2,  # (M, H), row stride stride_dy2, or None: one norm
    w1,  # (H,)
    w2,  # (H,) or None
    mean,  # (M,) fp32, or None: x is x̂
    rstd,  # (M,) fp32 or None
    dx,  # (M, H) contiguous
    partials,  # (P, K, H) fp32: dw1, db1, then dw2, db2 of two norms, then Σdx where asked for
    M,
    stride_x,
    stride_dr,
    stride_dy1,
    stride_dy2,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTHS: tl.constexpr,
    SUM_DX: tl.constexpr,  # also sum dx over rows: the bias gradient of what was added into x
    STAGES: tl.constexpr,
):
    i_program = tl.program_id(0)
    b_w1 = load_vector(w1, H, WIDTHS)
    b_dw1 = zero_rows(ROWS, WIDTHS)
    b_db1 = zero_rows(ROWS, WIDTHS)
    if w2 is not None:
        b_w2 = load_vector(w2, H, WIDTHS)
        b_dw2 = zero_rows(ROWS, WIDTHS)
        b_db2 = zero_rows(ROWS, WIDTHS)
    if SUM_DX:
        b_sum = zero_rows(ROWS, WIDTHS)

    for i_tile in tl.range(i_program, tl.cdiv(M, ROWS), tl.num_programs(0), num_stages=STAGES):
        o_row = i_tile * ROWS + tl.arange(0, ROWS)
        m_row = o_row < M
        i_row = o_row.to(tl.int64)
        b_x = load_rows(x + i_row * stride_x, m_row, H, WIDTHS)
        b_dy1 = load_rows(dy1 + i_row * stride_dy1, m_row, H, WIDTHS)
        if w2 is not None:
            b_dy2 = load_rows(dy2 + i_row * stride_dy2, m_row, H, WIDTHS)
        if d_residual is not None:
            b_dr = load_rows(d_residual + i_row * stride_dr, m_row, H, WIDTHS)

        b_xhat = b_x
        if mean is not None:
            b_mean = tl.load(mean + o_row, mask=m_row, other=0.0)[:, None]
            b_rstd = tl.load(rstd + o_row, mask=m_row, other=0.0)[:, None]
            b_xhat = ()
            for i in tl.static_range(len(WIDTHS)):
                b_xhat += ((b_x[i] - b_mean) * b_rstd,)
        b_dw1 = multiply_add_rows(b_dw1, b_dy1, b_xhat)
        b_db1 = add_rows(b_db1, b_dy1)
        b_g = multiply_rows(b_dy1, b_w1)
        if w2 is not None:
            b_dw2 = multiply_add_rows(b_dw2, b_dy2, b_xhat)
            b_db2 = add_rows(b_db2, b_dy2)
            b_g = multiply_add_rows(b_g, b_dy2, b_w2)

        b_dx = b_g
        if mean is not None:
            b_mean_g = (sum_rows(b_g) / H)[:, None]
            b_mean_gx = (sum_rows(multiply_rows(b_g, b_xhat)) / H)[:, None]
            b_dx = ()
            for i in tl.static_range(len(WIDTHS)):
                b_dx += (b_rstd * (b_g[i] - b_mean_g - b_xhat[i] * b_mean_gx),)
        if d_residual is not None:
            b_dx = add_rows(b_dx, b_dr)
        store_rows(dx + i_row * H, b_dx, m_row, H, WIDTHS)
        if SUM_DX:
            b_sum = add_rows(b_sum, b_dx)

    K: tl.constexpr = (2 if w2 is None else 4) + (1 if SUM_DX else 0)
    p_partial = partials + i_program * K * H
    store_column_sums(p_partial, b_dw1, H, WIDTHS)
    store_column_sums(p_partial + H, b_db1, H, WIDTHS)
    if w2 is not None:
        store_column_sums(p_partial + 2 * H, b_dw2, H, WIDTHS)
        store_column_sums(p_partial + 3 * H, b_db2, H, WIDTHS)
    if SUM_DX:
        store_column_sums(p_partial + (K - 1) * H, b_sum, H, WIDTHS)


def layer_norm_fwd(
    x: Tensor,
    norms: tuple[tuple[Tensor, Tensor], ...],
    eps: float,
    residual: Tensor | None = None,
    residual_biases: tuple[Tensor, Tensor] | None = None,
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """((y1[, y2]), mean, rstd) of x (..., h) and one or two (weight, bias) pairs of (h,) each.

    Each y is contiguous, of x's shape and dtype; mean and rstd are (M,) fp32. residual: contiguous,
    like x; becomes x + (b1 + b2) of residual_biases (h,), for two norms.
    """
    rows = _check_inputs(x, norms)
    if residual is not None:
        _check_residual(residual, residual_biases, x)
    rb1, rb2 = residual_biases or (None, None)
    (count, h), tile = rows.shape, tile_for(FORWARD, x.shape[-1])
    ys = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in norms)
    mean, rstd = (torch.empty(count, dtype=torch.float32, device=x.device) for _ in range(2))
    (w1, b1), (w2, b2) = (*norms, (None, None))[:2]
    if count:
        _layer_norm_fwd_kernel[(triton.cdiv(count, tile.rows),)](
            x=rows,
            w1=w1,
            b1=b1,
            w2=w2,
            b2=b2,
            y1=ys[0],
            y2=ys[1] if len(ys) == 2 else None,
            residual_b1=rb1,
            residual_b2=rb2,
            residual=residual,
            mean=mean,
            rstd=rstd,
            M=count,
            stride_x=rows.stride(0),
            eps=eps,
            H=h,
            ROWS=tile.rows,
            WIDTHS=column_blocks(h),
            num_warps=tile.warps,
        )
    return ys, mean, rstd


def layer_norm_bwd(
    x: Tensor,
    d_residual: Tensor | None,
    dys: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    mean: Tensor | None,
    rstd: Tensor | None,
    sum_dx: bool = False,
    sums_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """dx in x's shape and dtype, and the column sums (K, h) in sums_dtype, None: the weights'.

    dys and weights are of one or two norms; d_residual (like x, or None) is added to dx. mean and
    rstd (M,) fp32, or None where x is x̂: dx is then dx̂. The sums are dw1, db1[, dw2, db2][, Σ_rows
    dx where sum_dx].
    """
    rows = check_rows(x, "x", x.shape[-1])
    (count, h), tile = rows.shape, tile_for(BACKWARD, x.shape[-1])
    check_vectors({f"weight{i}": w for i, w in enumerate(weights, 1)}, x)
    statistics = {"mean": mean, "rstd": rstd} if mean is not None or rstd is not None else {}
    for name, statistic in statistics.items():
        check(statistic, name, dtypes=(torch.float32,), shape=(count,), device=x.device)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sums = 2 * len(dys) + sum_dx
    sums_dtype = sums_dtype or weights[0].dtype
    if not count:
        return dx, torch.zeros(sums, h, dtype=sums_dtype, device=x.device)
    dy1, dy2 = (*(grad_rows(dy, f"dy{i}", x) for i, dy in enumerate(dys, 1)), None)[:2]
    if d_residual is not None:
        d_residual = grad_rows(d_residual, "d_residual", x)
    grid = min(programs(x.device, tile.per_sm), triton.cdiv(count, tile.rows))
    partials = torch.empty(grid, sums, h, dtype=torch.float32, device=x.device)
    _layer_norm_bwd_kernel[(grid,)](
        x=rows,
        d_residual=d_residual,
        dy1=dy1,
        dy2=dy2,
        w1=weights[0],
        w2=weights[1] if len(weights) == 2 else None,
        mean=mean,
        rstd=rstd,
        dx=dx,
        partials=partials,
        M=count,
        stride_x=rows.stride(0),
        stride_dr=0 if d_residual is None else d_residual.stride(0),
        stride_dy1=dy1.stride(0),
        stride_dy2=0 if dy2 is None else dy2.stride(0),
        H=h,
        ROWS=tile.rows,
        WIDTHS=column_blocks(h),
        SUM_DX=sum_dx,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
    return dx, sum_partials(partials, sums_dtype)


def _check_inputs(x: Tensor, norms: tuple[tuple[Tensor, Tensor], ...]) -> Tensor:
    """The rows (M, h) of x; weights and biases are (h,) on x's device, all of one dtype."""
    check(x, "x")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: shape {tuple(x.shape)}, expected (..., h) with h ≥ 1")
    rows = check_rows(x, "x", x.shape[-1])
    names = ("1", "2") if len(norms) == 2 else ("",)
    vectors = {}
    for suffix, (weight, bias) in zip(names, norms, strict=True):
        vectors |= {"weight" + suffix: weight, "bias" + suffix: bias}
    check_vectors(vectors, x)
    return rows


def _check_residual(residual: Tensor, biases: tuple[Tensor, Tensor] | None, x: Tensor) -> None:
    check(residual, "residual", dtypes=(x.dtype,), shape=x.shape, device=x.device)
    if not residual.is_contiguous():
        raise ValueError(f"residual: strides {residual.stride()}, expected a contiguous tensor")
    if biases is None:
        raise ValueError("residual_biases: None, expected two vectors")
    check_vectors({f"residual_biases[{i}]": b for i, b in enumerate(biases)}, x)


class LayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        (y,), mean, rstd = layer_norm_fwd(x, ((weight, bias),), eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, mean, rstd = ctx.saved_tensors
        dx, (dw, db) = layer_norm_bwd(x, None, (dy,), (weight,), mean, rstd)
        return dx, dw, db, None


class DualLayerNormFunction(torch.autograd.Function):
    """An output that nothing uses gives a gradient of zeros."""

    @staticmethod
    def forward(ctx, x, weight1, bias1, weight2, bias2, eps):
        (y1, y2), mean, rstd = layer_norm_fwd(x, ((weight1, bias1), (weight2, bias2)), eps)
        ctx.save_for_backward(x, weight1, weight2, mean, rstd)
        return x, y1, y2

    @staticmethod
    @once_differentiable
    def backward(ctx, d_residual, dy1, dy2):
        x, w1, w2, mean, rstd = ctx.saved_tensors
        dx, sums = layer_norm_bwd(x, d_residual, (dy1, dy2), (w1, w2), mean, rstd)
        return dx, *sums, None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """y = (x − mean(x)) / √(var(x) + eps) · weight + bias over the last dim (biased variance).

    x (..., h) with rows at one stride, fp32, fp16 or bf16; weight and bias (h,), of one dtype.
    Returns (..., h) in x's dtype, contiguous.
    """
    return LayerNormFunction.apply(x, weight, bias, eps)


def dual_layer_norm(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """Two affine LayerNorms of the same x, and x itself: (x, norm1(x), norm2(x)).

    x is handed through so that the gradient of the residual stream meets the gradients of both
    norms in one backward pass. Arguments as in `layer_norm`.
    """
    return DualLayerNormFunction.apply(x, weight1, bias1, weight2, bias2, eps)


def aot_cases() -> Iterator[AotCase]:
    """Both ops at every hidden size, and the backward of `parallel_residual_dual_layer_norm`."""
    fwd, bwd = _layer_norm_fwd_kernel, _layer_norm_bwd_kernel
    residual = ("residual_b1", "residual_b2", "residual")
    one, pair = ("w2", "b2", "y2", "dy2"), ()
    variants = (
        ("layer norm", (*one, "d_residual"), False),
        ("dual", pair, False),
        ("dual and bias", pair, True),
        ("dual of partial sums", ("d_residual",), False),
        ("dual of x̂", ("mean", "rstd", "d_residual"), False),
    )
    for dtype in ("bf16", "fp16"):
        for size, h in SUITE.items():
            tile, wide = tile_for(FORWARD, h), ("x", "y1", "y2", "residual")
            for what, absent in (
                ("layer norm", (*one, *residual)),
                ("dual", residual),
                ("dual and residual", pair),
            ):
                yield row_case(f"{size} {what} forward {dtype}", fwd, h, tile, wide, absent)
            tile, wide = tile_for(BACKWARD, h), ("x", "d_residual", "dy1", "dy2", "dx")
            for what, absent, sum_dx in variants:
                name = f"{size} {what} backward {dtype}"
                yield row_case(name, bwd, h, tile, wide, absent, SUM_DX=sum_dx)
