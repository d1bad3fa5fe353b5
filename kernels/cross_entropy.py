"""Softmax cross-entropy over the vocabulary, whose gradient replaces the logits in the same launch.

    m = max x    s = Σ exp(x − m)    loss = (m − x_target) + log s
    dlogits = scale · (exp(x − m)/s − onehot(target))

Saved: nothing beside the logits, which hold dlogits (in their dtype) when the forward returns. The
backward multiplies them by the incoming gradient; its programs read that scalar on the device and
return at once when it is 1, so the host never waits. Statistics and losses are fp32.

A program takes one row at a time and sweeps it twice: an online max and sum (each lane of a tile
keeps its own pair: one exp an element and one more for every 16 bytes, no barrier in the loop),
then the gradient. The row is not kept in registers: the compiler holds it in fp32, 49 registers a
thread of 1024, and spills. Two rows an SM are in flight instead, 2 · 100.6 KB at V = 50304, which
the first sweep leaves in L1 (256 KB an SM) or at the worst in L2 (264 rows, 26.5 MB of 60 MB on an
H200).

Loads in flight (bf16, sm_90): 4 independent 16-byte loads a thread, 64 KB an SM.

Necessary bytes a row of V 16-bit logits: 4·V with the gradient (read, written), 2·V without. About
12 FLOPs and 2.1 exp an element: bound by memory bandwidth (the exps of a row take 60 % of the time
its bytes take at 4.3 TB/s over 132 SMs of 16 exp a clock, so both must overlap).

A target outside [0, V) is never used as an address: its row's loss and gradient are NaN. Tensors on
the CPU are checked instead (ValueError); `check_targets` does the same anywhere, at the price of a
host synchronisation. A logit of −inf has probability 0; a row with NaN, +inf or nothing above
−1e38 gives NaN.

fp16: dlogits are rounded when they are written, so the loss scale belongs in `scale`, not on the
loss. Tensor parallel: `cross_entropy_shards.py` sweeps the shards of a vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from pythia_fast.kernels.aot_case import AotCase
from pythia_fast.kernels.checks import check
from pythia_fast.kernels.rows import SUITE, programs

BLOCK = 16384  # columns of a full tile: 4 independent 16-byte loads a thread for 16 bits
WARPS = 16
ROWS_PER_SM = 2

VOCABULARIES = (("70m", 50304), ("6.9b", 50432), ("12b", 50688))  # 50304 up to 2.8B

LOWEST = tl.constexpr(-1e38)  # finite, so that −inf − LOWEST is not NaN


@triton.jit
def exp(b_x):
    """eˣ as ex2.approx.ftz(x·log₂e): 2 instructions, where tl.exp keeps subnormals and takes 5."""
    return tl.exp2(b_x * 1.4426950408889634)


@triton.jit
def tile_offsets(WIDTH: tl.constexpr, VEC: tl.constexpr):
    """Columns [WIDTH/VEC, VEC]: the VEC of a lane are one 16-byte access."""
    return tl.arange(0, WIDTH // VEC)[:, None] * VEC + tl.arange(0, VEC)[None, :]


@triton.jit
def row_max_sum(p_row, V: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, VEC: tl.constexpr):
    """(m, Σ exp(x − m)) of the V logits at p_row, m ≥ LOWEST."""
    MAIN: tl.constexpr = V // BLOCK * BLOCK
    b_m = LOWEST
    b_s = 0.0
    if MAIN > 0:
        o_v = tile_offsets(BLOCK, VEC)
        b_max = tl.full((BLOCK // VEC,), LOWEST, tl.float32)
        b_sum = tl.zeros((BLOCK // VEC,), tl.float32)
        for i_v in range(0, MAIN, BLOCK):
            b_x = tl.load(p_row + i_v + o_v).to(tl.float32)  # [BLOCK/VEC, VEC]
            b_new = tl.maximum(b_max, tl.max(b_x, axis=1))
            b_sum = b_sum * exp(b_max - b_new) + tl.sum(exp(b_x - b_new[:, None]), axis=1)
            b_max = b_new
        b_m = tl.max(b_max, axis=0)
        b_s = tl.sum(b_sum * exp(b_max - b_m), axis=0)
    if MAIN < V:
        o_v = MAIN + tile_offsets(TAIL, VEC)
        b_x = tl.load(p_row + o_v, mask=o_v < V, other=float("-inf")).to(tl.float32)
        b_new = tl.maximum(tl.max(tl.max(b_x, axis=1), axis=0), b_m)
        b_s = b_s * exp(b_m - b_new) + tl.sum(tl.sum(exp(b_x - b_new), axis=1), axis=0)
        b_m = b_new
    return b_m, b_s


@triton.jit
def store_gradient(
    p_row,
    i_target,  # column of the target
    m_target,  # whether this row has one here
    b_target,  # the target's logit, as loaded
    b_shift,
    b_factor,
    b_scale,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    VEC: tl.constexpr,
):
    """x ← factor · exp(x − shift) − scale · onehot(target) for the V logits at p_row.

    The target's column is written once more at the end, which spares every element a comparison;
    the barriers keep that logit's load before, and that store after, all stores of the sweep.
    """
    MAIN: tl.constexpr = V // BLOCK * BLOCK
    tl.debug_barrier()
    for i_v in range(0, MAIN, BLOCK):
        p = p_row + i_v + tile_offsets(BLOCK, VEC)
        b_d = b_factor * exp(tl.load(p).to(tl.float32) - b_shift)
        tl.store(p, b_d.to(p_row.dtype.element_ty))
    if MAIN < V:
        o_v = MAIN + tile_offsets(TAIL, VEC)
        b_x = tl.load(p_row + o_v, mask=o_v < V, other=float("-inf")).to(tl.float32)
        b_d = b_factor * exp(b_x - b_shift)
        tl.store(p_row + o_v, b_d.to(p_row.dtype.element_ty), mask=o_v < V)
    tl.debug_barrier()
    b_d = b_factor * exp(b_target - b_shift) - b_scale
    tl.store(p_row + i_target, b_d.to(p_row.dtype.element_ty), mask=m_target)


@triton.jit
def _cross_entropy_fwd_kernel(
    logits,  # (M, V), row stride stride; dlogits afterwards where GRAD
    targets,  # (M,) int64
    losses,  # (M,) fp32
    M,
    stride,
    scale,  # of the losses and of dlogits
    V: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    VEC: tl.constexpr,
):
    for i_row in tl.range(tl.program_id(0), M, tl.num_programs(0)):
        p_row = logits + tl.cast(i_row, tl.int64) * stride
        i_target = tl.load(targets + i_row)
        m_target = (i_target >= 0) & (i_target < V)
        b_target = tl.load(p_row + i_target, mask=m_target, other=float("nan")).to(tl.float32)

        b_max, b_sum = row_max_sum(p_row, V, BLOCK, TAIL, VEC)
        tl.store(losses + i_row, scale * ((b_max - b_target) + tl.log(b_sum)))
        if GRAD:
            b_factor = tl.where(m_target, scale, float("nan")) / b_sum
            store_gradient(
                p_row, i_target, m_target, b_target, b_max, b_factor, scale, V, BLOCK, TAIL, VEC
            )


@triton.jit
def _cross_entropy_bwd_kernel(
    dlogits,  # (M, N), row stride stride, multiplied in place
    dloss,  # () the gradient of the loss
    M,
    stride,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    b_dloss = tl.load(dloss).to(tl.float32)
    if b_dloss != 1.0:
        for i_row in tl.range(tl.program_id(0), M, tl.num_programs(0)):
            p_row = dlogits + tl.cast(i_row, tl.int64) * stride
            for i_n in range(0, N, BLOCK):
                o_n = i_n + tile_offsets(BLOCK, VEC)
                b_d = tl.load(p_row + o_n, mask=o_n < N, other=0.0).to(tl.float32) * b_dloss
                tl.store(p_row + o_n, b_d.to(p_row.dtype.element_ty), mask=o_n < N)


def cross_entropy_fwd(
    logits: Tensor, targets: Tensor, scale: float, write_grad: bool, losses: Tensor | None = None
) -> Tensor:
    """scale · loss of each row, (M,) fp32; dlogits over the logits where write_grad.

    logits (M, V) with rows at one stride, targets (M,) int64. losses: where the result goes, None
    allocates. Raises ValueError, TypeError.
    """
    check_logits(logits, targets)
    if not logits.is_cuda:
        check_targets(targets, logits.shape[1])
    if losses is None:
        losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    check(losses, "losses", dtypes=(torch.float32,), shape=targets.shape, device=logits.device)
    if len(losses):
        _cross_entropy_fwd_kernel[row_grid(logits)](
            logits=logits,
            targets=targets,
            losses=losses,
            M=logits.shape[0],
            stride=logits.stride(0),
            scale=float(scale),
            GRAD=write_grad,
            **row_tiles(logits),
        )
    if write_grad:
        torch.autograd.graph.increment_version(logits)
    return losses


def cross_entropy_bwd(dlogits: Tensor, dloss: Tensor) -> Tensor:
    """dlogits (M, N) times the scalar dloss, in place; not touched where dloss is 1."""
    check(dlogits, "dlogits", rank=2)
    check(dloss, "dloss", shape=(), device=dlogits.device)
    if dlogits.numel():
        tiles = _bwd_tiles(dlogits)
        per_sm = ROWS_PER_SM * WARPS // tiles["num_warps"]
        _cross_entropy_bwd_kernel[row_grid(dlogits, per_sm)](
            dlogits=dlogits,
            dloss=dloss,
            M=dlogits.shape[0],
            stride=dlogits.stride(0),
            **tiles,
        )
    torch.autograd.graph.increment_version(dlogits)
    return dlogits


def check_targets(targets: Tensor, vocab_size: int) -> None:
    """Raises ValueError with the first row whose id is not in [0, vocab_size); waits for a GPU."""
    wrong = ((targets < 0) | (targets >= vocab_size)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"targets: row {row} has id {int(targets[row])}, not in [0, {vocab_size})")


def check_logits(logits: Tensor, targets: Tensor) -> None:
    """logits (M, V), whose rows do not overlap, with targets (M,) int64; not the ids themselves."""
    check(logits, "logits", rank=2)
    check(targets, "targets", dtypes=(torch.int64,), shape=logits.shape[:1], device=logits.device)
    if logits.shape[1] == 0:
        raise ValueError(f"logits: shape {tuple(logits.shape)}, expected (M, V) with V ≥ 1")
    if logits.shape[0] > 1 and logits.stride(0) < logits.shape[1]:
        raise ValueError(f"logits: strides {logits.stride()}, the rows overlap")


def row_grid(rows: Tensor, per_sm: int = ROWS_PER_SM) -> tuple[int]:
    """One program a row, or those that fit the device, which then walk."""
    return (min(rows.shape[0], programs(rows.device, per_sm)),)


def row_tiles(logits: Tensor) -> dict[str, int]:
    """Tile sizes of a row: full tiles of BLOCK columns, then the narrowest that holds the rest."""
    columns, vec = logits.shape[1], 16 // logits.element_size()
    tail = max(triton.next_power_of_2(columns % BLOCK), vec)
    return {"V": columns, "BLOCK": BLOCK, "TAIL": tail, "VEC": vec, "num_warps": WARPS}


def _bwd_tiles(rows: Tensor) -> dict[str, int]:
    """The same of the backward; as many warps as a tile has 16 bytes for each thread."""
    columns, vec = rows.shape[1], 16 // rows.element_size()
    block = min(BLOCK, max(triton.next_power_of_2(columns), 32 * vec))
    warps = min(block // (32 * vec), WARPS)
    return {"N": columns, "BLOCK": block, "VEC": vec, "num_warps": warps}


class CrossEntropyFunction(torch.autograd.Function):
    """A second backward over the same graph raises: the gradient stands where the logits stood."""

    @staticmethod
    def forward(ctx, logits, targets, scale):
        losses = cross_entropy_fwd(logits, targets, scale, write_grad=True)
        ctx.save_for_backward(logits)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        (dlogits,) = ctx.saved_tensors
        return cross_entropy_bwd(dlogits.detach(), dloss), None, None


def cross_entropy(logits: Tensor, targets: Tensor, scale: float | None = None) -> Tensor:
    """scale · Σ_rows (logsumexp(logits) − logits[target]), an fp32 scalar.

    logits (M, V) with rows at one stride, *consumed*: where they require a gradient, it replaces
    them here, and whoever saved them for a backward of its own is told so by autograd. Otherwise
    they are only read. targets (M,) int64 in [0, V). scale: 1/M when None.
    """
    scale = 1.0 / max(targets.numel(), 1) if scale is None else scale
    if torch.is_grad_enabled() and logits.requires_grad:
        return CrossEntropyFunction.apply(logits, targets, scale)
    return cross_entropy_fwd(logits, targets, scale, write_grad=False).sum()


def aot_cases() -> Iterator[AotCase]:
    """Every vocabulary of the suite; the backward also scales the (M, h) and (V, h) gradients of
    `linear_cross_entropy`."""
    for dtype in ("bf16", "fp16"):
        for size, columns in VOCABULARIES:
            row = {"logits": f"*{dtype}", "targets": "*i64", "losses": "*fp32"}
            row |= {"M": "i32", "stride": "i32", "scale": "fp32"}
            for what, grad in (("forward with gradient", True), ("forward", False)):
                name = f"{size} {what} {dtype}"
                sweeps = "ld ld st" if grad else "ld"
                more = {"GRAD": grad}
                yield logits_case(
                    name, _cross_entropy_fwd_kernel, row, dtype, columns, sweeps, more
                )
        row = {"dlogits": f"*{dtype}", "dloss": "*fp32", "M": "i32", "stride": "i32"}
        widths = [(f"{size} backward", columns) for size, columns in VOCABULARIES]
        widths += [(f"{size} backward of the head", h) for size, h in SUITE.items()]
        for what, columns in widths:
            constexprs = _bwd_tiles(torch.empty(0, columns, dtype=_DTYPES[dtype]))
            warps = constexprs.pop("num_warps")
            yield AotCase(
                name=f"{what} {dtype}",
                kernel=_cross_entropy_bwd_kernel,
                signature=row | dict.fromkeys(constexprs, "constexpr"),
                constexprs=constexprs,
                num_warps=warps,
                wide=("dlogits",),
                per_sm=ROWS_PER_SM * WARPS // warps,
            )


def logits_case(name, kernel, arguments, dtype, columns, sweeps: str, more=None) -> AotCase:
    """A kernel over rows of `logits` of `dtype`, `columns` wide.

    sweeps: over the row, "ld" or "st"; a tail of few elements a thread and the target (read once,
    and written once with the gradient) are narrow beside the full tiles.
    """
    constexprs = row_tiles(torch.empty(0, columns, dtype=_DTYPES[dtype])) | (more or {})
    warps = constexprs.pop("num_warps")
    narrow = Counter(f"{kind}16" for kind in set(sweeps.split()))
    if columns % BLOCK and constexprs["TAIL"] < 8 * 32 * warps:
        narrow.update(f"{kind}{constexprs['TAIL'] // (2 * warps)}" for kind in sweeps.split())
    return AotCase(
        name=name,
        kernel=kernel,
        signature=arguments | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        num_warps=warps,
        wide=("logits",),
        narrow={"logits": narrow},
        per_sm=ROWS_PER_SM,
        spill_budget=8,  # sm_100: one address, outside the loops
    )


_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
