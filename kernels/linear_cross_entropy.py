"""The head's product and the softmax cross-entropy of its logits, a chunk of rows at a time.

For each chunk of C rows, with one logits buffer (C, V) for all of them:

    logits  = xᶜ Wᵀ                          matrix product, logits rounded to x's dtype
    losses  = cross_entropy(logits)          `cross_entropy.py`: dlogits replace the logits
    dxᶜ     = dlogits W                      matrix product
    dW     += dlogitsᵀ xᶜ                    matrix product, accumulated and kept in fp32

Everything is computed in the forward, where the logits are; saved: dx (M, h) in x's dtype and dW
(V, h) in the weight's. The backward multiplies both by the incoming gradient on the device, and
only where it is not 1. Without a gradient to compute, only the first two lines run.

dW adds up in `weight_grad` where given, which makes this its accumulation over microbatches; that
happens before the incoming gradient is known, so every factor belongs in `scale`. An incoming
gradient other than 1 then gives NaN for dx (a GPU is not waited for).

Memory beside the arguments, in bytes for element size e: C·V·e logits + M·h·e dx + 4·M losses, and
without weight_grad 4·V·h for dW, with its cast V·h·e at the end. At 12B (V = 50688, h = 5120), M =
16384 rows in chunks of 4096: 415 MB + 168 MB + 66 kB; materialised, the logits alone are 1661 MB.

FLOPs 6·M·V·h. Necessary bytes of the loss itself 4·V a row (e = 2), and each chunk after the first
reads and writes dW once more, 8·V·h: larger chunks amortise it. The products are cuBLAS's and bound
by the tensor cores; the loss is bound by memory bandwidth.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pythia_fast.kernels.checks import check
from pythia_fast.kernels.cross_entropy import cross_entropy_bwd, cross_entropy_fwd


def linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: float,
    chunk_rows: int | None,
    weight_grad: Tensor | None,
    needs: tuple[bool, bool],
    add: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(scale · loss of each row (M,) fp32, dx, dW); needs: whether x and weight take a gradient.

    dx (M, h) in x's dtype or None. dW (V, h) in fp32 or None; weight_grad itself where given, with
    what it held where `add`.
    """
    _check_inputs(x, weight, targets, chunk_rows, weight_grad)
    rows, vocab = x.shape[0], weight.shape[0]
    step = min(chunk_rows or rows, rows)
    buffer = torch.empty(step, vocab, dtype=x.dtype, device=x.device)
    losses = torch.empty(rows, dtype=torch.float32, device=x.device)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs[0] else None
    dw = weight_grad if needs[1] else None
    if needs[1] and dw is None:
        dw = torch.empty(weight.shape, dtype=torch.float32, device=x.device)
        add = False
    if dw is not None and not rows and not add:
        dw.zero_()
    for start in range(0, rows, step or 1):
        chunk = slice(start, min(start + step, rows))
        logits = torch.mm(x[chunk], weight.t(), out=buffer[: chunk.stop - start])
        cross_entropy_fwd(logits, targets[chunk], scale, any(needs), losses[chunk])
        if dx is not None:
            torch.mm(logits, weight, out=dx[chunk])
        if dw is not None:
            accumulate(dw, logits.t(), x[chunk], start > 0 or add)
    return losses, dx, dw


def linear_cross_entropy_bwd(
    dx: Tensor | None, dw: Tensor | None, dloss: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """dx and dW times the scalar dloss, in place."""
    for gradient in (dx, dw):
        if gradient is not None:
            cross_entropy_bwd(gradient, dloss)
    return dx, dw


def accumulate(total: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """total (n, k) = a (n, m) b (m, k), plus what it held where `add`; summed in fp32.

    total: fp32, or of their dtype, to which the sum is rounded once.
    """
    beta = 1 if add else 0
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=beta)
    elif a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, beta=beta, out=total)
    else:
        total.addmm_(a.float(), b.float(), beta=beta)


def _check_inputs(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk_rows: int | None,
    weight_grad: Tensor | None,
) -> None:
    check(x, "x", rank=2)
    check(weight, "weight", dtypes=(x.dtype,), shape=(None, x.shape[1]), device=x.device)
    check(targets, "targets", dtypes=(torch.int64,), shape=x.shape[:1], device=x.device)
    if weight.shape[0] == 0:
        raise ValueError(f"weight: shape {tuple(weight.shape)}, expected (V, h) with V ≥ 1")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows: {chunk_rows}, expected at least 1")
    if weight_grad is not None:
        dtypes = (torch.float32, x.dtype)
        check(weight_grad, "weight_grad", dtypes=dtypes, shape=weight.shape, device=x.device)


class LinearCrossEntropyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, scale, chunk_rows, weight_grad, add):
        losses, dx, dw = linear_cross_entropy_fwd(
            x, weight, targets, scale, chunk_rows, weight_grad, ctx.needs_input_grad[:2], add
        )
        ctx.added = dw is not None and weight_grad is not None
        ctx.save_for_backward(dx, None if ctx.added or dw is None else dw.to(weight.dtype))
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        if ctx.added:  # weight_grad took the gradient for dloss = 1: NaN · (dloss − 1) says so
            dloss = torch.where(dloss == 1, dloss, torch.nan)
        return *linear_cross_entropy_bwd(*ctx.saved_tensors, dloss), *(None,) * 5


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: float | None = None,
    chunk_rows: int | None = None,
    weight_grad: Tensor | None = None,
    add: bool = True,
) -> Tensor:
    """cross_entropy(x weightᵀ, targets, scale), computed chunk_rows rows at a time.

    x (M, h), weight (V, h) of x's dtype, targets (M,) int64 in [0, V); scale: 1/M when None.
    chunk_rows bounds the logits that exist at once; None takes all M. weight_grad: (V, h), fp32 or
    of x's dtype; where given, the weight gradient, summed in fp32, is *added* there (`add`; else it
    replaces what was there), autograd gives weight none, and the gradient of the returned loss must
    be 1. Returns an fp32 scalar.
    """
    scale = 1.0 / max(targets.numel(), 1) if scale is None else scale
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return LinearCrossEntropyFunction.apply(
            x, weight, targets, scale, chunk_rows, weight_grad, add
        )
    none = (False, False)
    return linear_cross_entropy_fwd(x, weight, targets, scale, chunk_rows, None, none)[0].sum()
