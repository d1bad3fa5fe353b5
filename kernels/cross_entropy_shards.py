"""Cross-entropy over a vocabulary in p shards: the two sweeps of each, and the sum between them.

    mᵢ = max x    sᵢ = Σ exp(x − mᵢ)    tᵢ = x_target where shard i has it, else NaN      (shard i)
    m = max mᵢ    s = Σ sᵢ·exp(mᵢ − m)    lse = m + log s    loss = (m − t) + log s       (all)
    dlogits = scale · (exp(x − lse) − onehot(target))                                     (shard i)

`cross_entropy_stats` is the first line, `cross_entropy_combine` the second, from the statistics
that an all-gather brings, `cross_entropy_grad_` the third, over the logits and in their dtype. No
autograd here: who owns the collective between the sweeps owns the backward. Statistics, losses and
lse are fp32.

Necessary bytes a row of V/p 16-bit logits: 2·V/p for the statistics and 4·V/p for the gradient;
where the vocabulary is whole, `cross_entropy.py` sweeps twice for 4·V, but a row does not stay in
cache while ranks wait for each other. The combination moves 12·p + 8 bytes a row. The sweeps are
those of `cross_entropy.py`, together about 12 FLOPs and 2.1 exp an element: bound by memory
bandwidth, with 4 independent 16-byte loads a thread in flight, 64 KB an SM (bf16, sm_90).

Targets are ids of the whole vocabulary. One that lies in no shard (or whose shard is missing) is
never used as an address: loss and lse of its row are NaN, and by lse its gradient on every shard.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from pythia_fast.kernels.aot_case import AotCase
from pythia_fast.kernels.checks import check
from pythia_fast.kernels.cross_entropy import (
    check_logits,
    exp,
    logits_case,
    row_grid,
    row_max_sum,
    row_tiles,
    store_gradient,
)

BLOCK_COMBINE = 512  # rows whose shards a program combines

SHARDS = (("6.9b/2", 25216), ("12b/2", 25344), ("12b/4", 12672))  # columns of one


@triton.jit
def _cross_entropy_stats_kernel(
    logits,  # (M, V) of one shard, row stride stride
    targets,  # (M,) int64, columns of the whole vocabulary
    row_max,  # (M,) fp32
    row_sum,  # (M,) fp32
    row_target,  # (M,) fp32
    M,
    stride,
    vocab_start,  # id of the shard's first column
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    VEC: tl.constexpr,
):
    for i_row in tl.range(tl.program_id(0), M, tl.num_programs(0)):
        p_row = logits + tl.cast(i_row, tl.int64) * stride
        i_target = tl.load(targets + i_row) - vocab_start
        m_target = (i_target >= 0) & (i_target < V)
        b_target = tl.load(p_row + i_target, mask=m_target, other=float("nan")).to(tl.float32)

        b_max, b_sum = row_max_sum(p_row, V, BLOCK, TAIL, VEC)
        tl.store(row_max + i_row, b_max)
        tl.store(row_sum + i_row, b_sum)
        tl.store(row_target + i_row, b_target)


@triton.jit
def _cross_entropy_combine_kernel(
    row_max,  # (S, M) fp32, row stride stride_max
    row_sum,  # (S, M) fp32, row stride stride_sum
    row_target,  # (S, M) fp32, row stride stride_target; NaN: the target is of another shard
    losses,  # (M,) fp32
    lse,  # (M,) fp32
    S,  # shards
    M,
    stride_max,
    stride_sum,
    stride_target,
    scale,  # of the losses and of dlogits
    BLOCK: tl.constexpr,
):
    o_row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_row = o_row < M
    b_m = tl.load(row_max + o_row, mask=m_row, other=0.0)
    b_s = tl.load(row_sum + o_row, mask=m_row, other=1.0)
    b_target = tl.load(row_target + o_row, mask=m_row, other=0.0)
    for i_shard in range(1, S):
        b_max = tl.load(row_max + i_shard * stride_max + o_row, mask=m_row, other=0.0)
        b_new = tl.maximum(b_m, b_max)
        b_sum = tl.load(row_sum + i_shard * stride_sum + o_row, mask=m_row, other=0.0)
        b_s = exp(b_m - b_new) * b_s + exp(b_max - b_new) * b_sum
        b_m = b_new
        b_t = tl.load(row_target + i_shard * stride_target + o_row, mask=m_row, other=0.0)
        b_target = tl.where(b_t == b_t, b_t, b_target)
    b_log = tl.log(b_s)
    tl.store(losses + o_row, scale * ((b_m - b_target) + b_log), mask=m_row)
    # no shard has the target: NaN, and so will be the gradient
    b_lse = tl.where(b_target == b_target, b_m + b_log, b_target)
    tl.store(lse + o_row, b_lse, mask=m_row)


@triton.jit
def _cross_entropy_grad_kernel(
    logits,  # (M, V) of one shard, row stride stride; dlogits afterwards
    targets,  # (M,) int64, columns of the whole vocabulary
    lse,  # (M,) fp32, over all shards
    M,
    stride,
    vocab_start,  # id of the shard's first column
    scale,  # of the losses and of dlogits
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    VEC: tl.constexpr,
):
    for i_row in tl.range(tl.program_id(0), M, tl.num_programs(0)):
        p_row = logits + tl.cast(i_row, tl.int64) * stride
        i_target = tl.load(targets + i_row) - vocab_start
        m_target = (i_target >= 0) & (i_target < V)
        b_target = tl.load(p_row + i_target, mask=m_target, other=0.0).to(tl.float32)
        b_lse = tl.load(lse + i_row)
        store_gradient(
            p_row, i_target, m_target, b_target, b_lse, scale, scale, V, BLOCK, TAIL, VEC
        )


def cross_entropy_stats(
    logits: Tensor, targets: Tensor, vocab_start: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """What one vocabulary shard adds: per row (max, Σexp(logit − max), target's logit), fp32.

    logits (M, V/p) are columns [vocab_start, vocab_start + V/p); the target's logit is NaN in a row
    whose target lies elsewhere. `cross_entropy_combine` makes the loss of all shards' numbers.
    """
    check_logits(logits, targets)
    count, device = logits.shape[0], logits.device
    stats = tuple(torch.empty(count, dtype=torch.float32, device=device) for _ in range(3))
    if count:
        _cross_entropy_stats_kernel[row_grid(logits)](
            logits=logits,
            targets=targets,
            row_max=stats[0],
            row_sum=stats[1],
            row_target=stats[2],
            M=count,
            stride=logits.stride(0),
            vocab_start=vocab_start,
            **row_tiles(logits),
        )
    return stats


def cross_entropy_combine(
    row_max: Tensor, row_sum: Tensor, row_target: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """scale · loss of each row, and its log-sum-exp over the whole vocabulary, (M,) fp32 each.

        m = max mᵢ    s = Σ sᵢ·exp(mᵢ − m)    lse = m + log s    loss = (m − t) + log s

    row_max, row_sum, row_target (p, M) fp32: what `cross_entropy_stats` gave on each of p shards, t
    the one target logit that is not NaN. Where no shard has it, the id is outside of the vocabulary
    (or a shard is missing): both results are NaN, and by lse the gradient of `cross_entropy_grad_`.
    """
    fp32, device = (torch.float32,), row_max.device if isinstance(row_max, Tensor) else None
    check(row_max, "row_max", dtypes=fp32, rank=2)
    for statistic, name in ((row_sum, "row_sum"), (row_target, "row_target")):
        check(statistic, name, dtypes=fp32, shape=row_max.shape, device=device)
    shards, count = row_max.shape
    if shards == 0:
        raise ValueError(f"row_max: shape {tuple(row_max.shape)}, expected (p, M) with p ≥ 1")
    losses, lse = (torch.empty(count, dtype=torch.float32, device=device) for _ in range(2))
    if count:
        _cross_entropy_combine_kernel[(triton.cdiv(count, BLOCK_COMBINE),)](
            row_max=row_max,
            row_sum=row_sum,
            row_target=row_target,
            losses=losses,
            lse=lse,
            S=shards,
            M=count,
            stride_max=row_max.stride(0),
            stride_sum=row_sum.stride(0),
            stride_target=row_target.stride(0),
            scale=float(scale),
            BLOCK=BLOCK_COMBINE,
            num_warps=4,
        )
    return losses, lse


def cross_entropy_grad_(
    logits: Tensor, targets: Tensor, lse: Tensor, scale: float, vocab_start: int = 0
) -> Tensor:
    """logits ← scale · (exp(logits − lse) − onehot(target)), in place; returns logits.

    logits (M, V/p) as in `cross_entropy_stats`; lse (M,) fp32 as `cross_entropy_combine` gives it.
    """
    check_logits(logits, targets)
    check(lse, "lse", dtypes=(torch.float32,), shape=targets.shape, device=logits.device)
    if len(targets):
        _cross_entropy_grad_kernel[row_grid(logits)](
            logits=logits,
            targets=targets,
            lse=lse,
            M=logits.shape[0],
            stride=logits.stride(0),
            vocab_start=vocab_start,
            scale=float(scale),
            **row_tiles(logits),
        )
    torch.autograd.graph.increment_version(logits)
    return logits


def aot_cases() -> Iterator[AotCase]:
    """Shards of the largest vocabularies, and the combination of any number of them."""
    for dtype in ("bf16", "fp16"):
        for size, columns in SHARDS:
            row = {"logits": f"*{dtype}", "targets": "*i64"}
            rest = {"M": "i32", "stride": "i32", "vocab_start": "i32"}
            stats = row | dict.fromkeys(("row_max", "row_sum", "row_target"), "*fp32") | rest
            name = f"{size} shard statistics {dtype}"
            yield logits_case(name, _cross_entropy_stats_kernel, stats, dtype, columns, "ld")
            grad = row | {"lse": "*fp32"} | rest | {"scale": "fp32"}
            name = f"{size} shard gradient {dtype}"
            yield logits_case(name, _cross_entropy_grad_kernel, grad, dtype, columns, "ld st")
    statistics = dict.fromkeys(("row_max", "row_sum", "row_target", "losses", "lse"), "*fp32")
    yield AotCase(
        name="combination of shards",
        kernel=_cross_entropy_combine_kernel,
        signature=statistics
        | dict.fromkeys(("S", "M", "stride_max", "stride_sum", "stride_target"), "i32")
        | {"scale": "fp32", "BLOCK": "constexpr"},
        constexprs={"BLOCK": BLOCK_COMBINE},
        num_warps=4,
        wide=tuple(statistics),
        not_aligned=("S",),
    )
