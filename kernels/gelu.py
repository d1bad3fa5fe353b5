"""Bias + GELU, the tanh form (GPT-NeoX in training) or the exact one by erf.

    u = x + bias       y = u·Φ(u)
    tanh: Φ = ½(1 + tanh(z/2)) = 1/(1 + e⁻ᶻ)     z = 2√(2/π)·(u + 0.044715·u³)
    none: Φ = ½(1 + erf(u/√2))                   erf by Abramowitz & Stegun 7.1.26, within 1.5e-7

    dx = dy·(Φ + u·Φ')       tanh: Φ' = Φ·(Φ·e⁻ᶻ)·dz/du       none: Φ' = e^(−u²/2)/√(2π)
    d bias = Σ_rows dx       summed before dx is rounded

Saved: x and bias as they came. Arithmetic is fp32. Both forms take one 2ˣ and one reciprocal root
an element, and share them between Φ and Φ'; Φ·e⁻ᶻ stands for 1 − Φ, which would cancel.

The forward may write into columns of a wider buffer, for example [ctx | gelu] of row stride 5h. In
the backward a program owns BLOCK_N columns and walks every P-th tile of rows, keeps its column sum
in registers and writes it once, (P, n) fp32; a second launch adds the P partials in a fixed order.

Bytes for M rows of n 16-bit elements (e = 2), bias left out: forward 2·e·M·n, backward 3·e·M·n
and 8·P·n for the partials. About 10 (tanh) and 17 (none) FLOPs an element forward, 17 and 23
backward, and 2 special-function results: bound by memory bandwidth, but not by much. Compiled for
sm_90 the forward issues 54 % (tanh) and 74 % (none) of the instructions that an H200 can issue
while it moves those bytes at 4.3 TB/s and 1.83 GHz, the backward 63 % and 65 %.

Loads in flight (bf16, sm_90): forward 4 independent 16-byte loads a thread, 80 to 96 KB an SM (48
KB at n = 512). Backward: the next two tiles of x and dy, 96 KB an SM (48 KB at n = 512).
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
from pythia_fast.kernels.rows import SUITE, Tile, programs, sum_partials

BLOCK_N = 1024
FORWARD = Tile(rows=4, warps=4)
BACKWARD = Tile(rows=2, warps=4, stages=3, per_sm=6)

APPROXIMATE = ("tanh", "none")


@triton.jit
def gelu_cdf(b_u, TANH: tl.constexpr):
    """(Φ(u), Φ'(u)): the normal distribution function, or its tanh form, and the derivative.

    1/d is taken as rsqrt(d)², one special-function result without a division's range checks.
    """
    b_u2 = b_u * b_u
    if TANH:
        # e⁻ᶻ = 2^(−z·log₂e), z = u·(c₁ + c₃u²), c₁ = 2√(2/π), c₃ = 0.044715·c₁; at most 2¹²⁶
        b_e = tl.exp2(tl.minimum(-b_u * (2.302208198 + 0.1029432397 * b_u2), 126.0))
        b_root = tl.rsqrt(1.0 + b_e)
        b_cdf = b_root * b_root
        b_pdf = b_cdf * (b_cdf * b_e) * (1.5957691216 + 0.2140644488 * b_u2)
    else:
        # ½·erfc(x) = t·(a₁ + a₂t + ... + a₅t⁴)·e^(−x²)/2, t = 1/(1 + p·x), x = |u|/√2
        b_root = tl.rsqrt(1.0 + 0.2316418882 * tl.abs(b_u))
        b_t = b_root * b_root
        b_e = tl.exp2(-0.7213475204 * b_u2)
        b_p = 0.7107068705 + b_t * (-0.7265760135 + b_t * 0.5307027145)
        b_p = b_t * (0.127414796 + b_t * (-0.142248368 + b_t * b_p))
        b_tail = b_p * b_e
        b_cdf = tl.where(b_u < 0, b_tail, 1.0 - b_tail)
        b_pdf = 0.3989422804 * b_e
    return b_cdf, b_pdf


@triton.jit
def _gelu_fwd_kernel(
    x,  # (M, N), row stride stride_x
    bias,  # (N,)
    y,  # (M, N), row stride stride_y
    M,
    stride_x,
    stride_y,
    N: tl.constexpr,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    o_m = (tl.program_id(0) // TILES_N) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = (tl.program_id(0) % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = (o_m < M)[:, None] & (o_n < N)[None, :]
    i_m = o_m.to(tl.int64)[:, None]

    # [BLOCK_M, BLOCK_N]
    b_x = tl.load(x + i_m * stride_x + o_n[None, :], mask=m, other=0.0).to(tl.float32)
    b_bias = tl.load(bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)
    b_u = b_x + b_bias[None, :]
    b_cdf, _ = gelu_cdf(b_u, TANH)
    tl.store(y + i_m * stride_y + o_n[None, :], (b_u * b_cdf).to(y.dtype.element_ty), mask=m)


@triton.jit
def _gelu_bwd_kernel(
    x,  # (M, N), row stride stride_x
    bias,  # (N,)
    dy,  # (M, N), row stride stride_dy
    dx,  # (M, N) contiguous
    partials,  # (P, 1, N) fp32
    M,
    P,  # programs that walk the rows of a column block
    stride_x,
    stride_dy,
    N: tl.constexpr,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    i_p = tl.program_id(0) // TILES_N
    o_n = (tl.program_id(0) % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    b_bias = tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i_tile in tl.range(i_p, tl.cdiv(M, BLOCK_M), P, num_stages=STAGES):
        o_m = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        m = (o_m < M)[:, None] & m_n[None, :]
        i_m = o_m.to(tl.int64)[:, None]
        # [BLOCK_M, BLOCK_N]
        b_x = tl.load(x + i_m * stride_x + o_n[None, :], mask=m, other=0.0).to(tl.float32)
        b_dy = tl.load(dy + i_m * stride_dy + o_n[None, :], mask=m, other=0.0).to(tl.float32)
        b_u = b_x + b_bias
        b_cdf, b_pdf = gelu_cdf(b_u, TANH)
        b_dx = b_dy * (b_cdf + b_u * b_pdf)
        tl.store(dx + i_m * N + o_n[None, :], b_dx.to(dx.dtype.element_ty), mask=m)
        b_sum += b_dx
    tl.store(partials + i_p * N + o_n, tl.sum(b_sum, axis=0), mask=m_n)


def gelu_fwd(
    x: Tensor, bias: Tensor, approximate: str = "tanh", out: Tensor | None = None
) -> Tensor:
    """gelu(x + bias) in x's shape and dtype, written to out where given.

    x, out (..., n) with rows at one stride; bias (n,). Raises ValueError, TypeError.
    """
    x_rows = _check_inputs(x, bias, approximate)
    count, n = x_rows.shape
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        out_rows = out.view(count, n)
    else:
        out_rows = _check_out(out, x)
    if count:
        block_n = min(BLOCK_N, triton.next_power_of_2(n))
        tiles = triton.cdiv(count, FORWARD.rows) * triton.cdiv(n, block_n)
        _gelu_fwd_kernel[(tiles,)](
            x=x_rows,
            bias=bias,
            y=out_rows,
            M=count,
            stride_x=x_rows.stride(0),
            stride_y=out_rows.stride(0),
            N=n,
            TANH=approximate == "tanh",
            BLOCK_M=FORWARD.rows,
            BLOCK_N=block_n,
            num_warps=FORWARD.warps,
        )
    return out


def gelu_bwd(
    x: Tensor,
    bias: Tensor,
    dy: Tensor,
    approximate: str = "tanh",
    sum_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(dx, d bias): dx contiguous in x's shape and dtype, d bias (n,) in sum_dtype, None: bias's.

    dy like x, for example columns of a wider buffer. Raises ValueError, TypeError.
    """
    x_rows = _check_inputs(x, bias, approximate)
    count, n = x_rows.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not count:
        return dx, torch.zeros_like(bias, dtype=sum_dtype)
    dy_rows = grad_rows(dy, "dy", x)
    block_n = min(BLOCK_N, triton.next_power_of_2(n))
    tiles_n = triton.cdiv(n, block_n)
    walkers = max(programs(x.device, BACKWARD.per_sm) // tiles_n, 1)
    walkers = min(walkers, triton.cdiv(count, BACKWARD.rows))
    partials = torch.empty(walkers, 1, n, dtype=torch.float32, device=x.device)
    _gelu_bwd_kernel[(walkers * tiles_n,)](
        x=x_rows,
        bias=bias,
        dy=dy_rows,
        dx=dx,
        partials=partials,
        M=count,
        P=walkers,
        stride_x=x_rows.stride(0),
        stride_dy=dy_rows.stride(0),
        N=n,
        TANH=approximate == "tanh",
        BLOCK_M=BACKWARD.rows,
        BLOCK_N=block_n,
        STAGES=BACKWARD.stages,
        num_warps=BACKWARD.warps,
    )
    return dx, sum_partials(partials, sum_dtype or bias.dtype)[0]


def _check_inputs(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    """The rows (M, n) of x."""
    if approximate not in APPROXIMATE:
        raise ValueError(f"approximate: {approximate!r}, not 'tanh' or 'none'")
    check(x, "x")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: shape {tuple(x.shape)}, expected (..., n) with n ≥ 1")
    check_vectors({"bias": bias}, x)
    return check_rows(x, "x", x.shape[-1])


def _check_out(out: Tensor, x: Tensor) -> Tensor:
    """The rows (M, n) of out, which are apart from each other and begin elsewhere than x's."""
    check(out, "out", dtypes=(x.dtype,), shape=x.shape, device=x.device)
    rows = check_rows(out, "out", x.shape[-1])
    if rows.shape[0] > 1 and rows.stride(0) < rows.shape[1]:
        raise ValueError(f"out: strides {out.stride()} of shape {tuple(out.shape)} overlap")
    if out.numel() and _overlap(rows, x.reshape(rows.shape)):
        raise ValueError("out: shares memory with x, which the backward pass needs")
    return rows


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two (M, n) views may share an element; separate columns of one buffer do not."""
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    if a.shape[0] == 1 or a.stride(0) != b.stride(0):
        return a.shape[0] > 1 or abs(a.storage_offset() - b.storage_offset()) < a.shape[1]
    apart = (a.storage_offset() - b.storage_offset()) % a.stride(0)
    return not a.shape[1] <= apart <= a.stride(0) - a.shape[1]


class GeluFunction(torch.autograd.Function):
    """`out` comes first: autograd takes the argument written in place to be the first."""

    @staticmethod
    def forward(ctx, out, x, bias, approximate):
        ctx.approximate = approximate
        ctx.save_for_backward(x, bias)
        if out is not None:
            ctx.mark_dirty(out)
        return gelu_fwd(x, bias, approximate, out)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return None, *gelu_bwd(*ctx.saved_tensors, dy, ctx.approximate), None


def gelu(x: Tensor, bias: Tensor, approximate: str = "tanh", out: Tensor | None = None) -> Tensor:
    """gelu(x + bias), by the tanh form (GPT-NeoX in training) or exactly by erf ("none").

    x (..., n), bias (n,), rows at one stride. out: where the result goes, a (..., n) view of any
    row stride such as columns of a wider buffer; None allocates. Source: Hendrycks & Gimpel 2016.
    """
    return GeluFunction.apply(out, x, bias, approximate)


def aot_cases() -> Iterator[AotCase]:
    """Both forms, forward and backward, at every MLP width 4h."""
    for dtype in ("bf16", "fp16"):
        for size, h in SUITE.items():
            for form in APPROXIMATE:
                yield _case(f"{size} {form} forward {dtype}", _gelu_fwd_kernel, 4 * h, FORWARD)
                yield _case(f"{size} {form} backward {dtype}", _gelu_bwd_kernel, 4 * h, BACKWARD)


def _case(name: str, kernel, n: int, tile: Tile) -> AotCase:
    _, form, _, dtype = name.split()
    constexprs = {"N": n, "TANH": form == "tanh", "BLOCK_M": tile.rows, "BLOCK_N": min(BLOCK_N, n)}
    if "STAGES" in kernel.arg_names:
        constexprs["STAGES"] = tile.stages
    types = {"partials": "*fp32", "M": "i32", "P": "i32"}
    types |= {a: "i32" for a in kernel.arg_names if a.startswith("stride")}
    types |= dict.fromkeys(constexprs, "constexpr")
    return AotCase(
        name=name,
        kernel=kernel,
        signature={a: types.get(a, f"*{dtype}") for a in kernel.arg_names},
        constexprs=constexprs,
        num_warps=tile.warps,
        wide=tuple(a for a in ("x", "y", "dy", "dx") if a in kernel.arg_names),
        per_sm=tile.per_sm,
        not_aligned=("M", "P"),
    )
