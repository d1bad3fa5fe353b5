"""Tensor and sequence parallelism: P processes share each layer's matrices.

Every parameter keeps its name; `split_dim` says which dim of it is cut into P contiguous parts:
rows of the products that enter the block and of both embeddings, columns of the two that leave it.
Norms and row-parallel biases are on every process. The model file does not know of it: the model is
built from local shapes (`localise`) on ops that carry the collectives (`tensor_ops`).

Collectives of a microbatch, (B, T, h) each unless said otherwise:

    forward     embedding 1, a layer 1 (attention and MLP are summed first), cross-entropy 1 of
                (3, M) fp32: maximum, sum of exponentials and target's logit of each row
    backward    a layer 1, final norm 1: the LayerNorm backward is linear in the upstream gradient,
                so partial sums pass through both norms of a layer before they meet

An all-reduce each; with sequence parallelism, where a process keeps one P-th of the residual
stream, a reduce-scatter towards it and an all-gather of normalised rows from it, of equal volume.
That part is M/P of the M = B·T rows as they lie in memory, so that nothing is permuted around a
collective; its shape is written (B, T/P, h), but which positions it holds matters to nothing that
is done to it.
Gradients of the norms, and with sequence parallelism of the row-parallel biases, are then partial
sums, reduced once a step by the optimizer (`AdamW.apply`).

GPT-NeoX sums attention and MLP first too, but reduces twice backward (mappings.py:110-139).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from pythia_fast.model import Attention
from pythia_fast.ops import Ops
from pythia_fast.parallel.mesh import all_gather, reduce_scatter

_ROWS = (
    "embed_in.weight", "embed_out.weight", "query_key_value.weight", "query_key_value.bias",
    "dense_h_to_4h.weight", "dense_h_to_4h.bias",
)  # fmt: skip
_COLUMNS = ("attention.dense.weight", "dense_4h_to_h.weight")


def split_dim(name: str) -> int | None:
    """The dim of a parameter that tensor-parallel processes share; None: each has all of it.

    Rows of query_key_value are whole heads: h0: q k v | h1: q k v ...
    """
    if name.endswith(_ROWS):
        return 0
    return 1 if name.endswith(_COLUMNS) else None


def local_part(name: str, whole: Tensor, parts: int, part: int) -> Tensor:
    """What process `part` of `parts` holds of a whole parameter: a view."""
    dim = split_dim(name)
    if dim is None or parts == 1:
        return whole
    return whole.narrow(dim, part * (whole.shape[dim] // parts), whole.shape[dim] // parts)


def localise(model: nn.Module, parts: int) -> None:
    """Gives a model on the meta device the shapes of one of `parts` processes."""
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        local = nn.Parameter(local_part(name, parameter.detach(), parts, 0).clone())
        setattr(model.get_submodule(owner), leaf, local)
    for module in model.modules():
        if isinstance(module, Attention):
            module.heads //= parts


# --- collectives ----------------------------------------------------------------------------------


class SumBackward(torch.autograd.Function):
    """x itself; its gradient is the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        total = dy.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class SumForward(torch.autograd.Function):
    """The sum of all processes' x (contiguous, *consumed*); the gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.mark_dirty(x)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


class Gather(torch.autograd.Function):
    """(B, T/P, h) -> (B, T, h); the gradient is summed over processes and scattered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return gathered(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return scattered(dy, ctx.group)[0], None


class Scatter(torch.autograd.Function):
    """(B, T, h) -> the sum over processes of this one's rows, (B, T/P, h)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return scattered(x, group)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return gathered(dy, ctx.group), None


def gathered(x: Tensor, group: ProcessGroup) -> Tensor:
    """(B, T/P, h) of every process -> (B, T, h)."""
    whole = x.new_empty(x.shape[0], x.shape[1] * group.size(), *x.shape[2:])
    all_gather(whole.view(-1), x.reshape(-1), group=group)
    return whole


def scattered(
    x: Tensor, group: ProcessGroup, async_op: bool = False
) -> tuple[Tensor, dist.Work | None]:
    """(B, T, h) -> the sum over processes of this one's rows, (B, T/P, h); there after wait()."""
    own = x.new_empty(x.shape[0], x.shape[1] // group.size(), *x.shape[2:])
    work = reduce_scatter(own.view(-1), x.reshape(-1), group=group, async_op=async_op)
    return own, work


def summed(x: Tensor, group: ProcessGroup, sequence: bool) -> Tensor:
    """The sum over processes of x (B, T, h), *consumed*: whole, or (sequence) its own rows."""
    if sequence:
        return scattered(x, group)[0]
    dist.all_reduce(x, group=group)
    return x


def _all(x: Tensor, group: ProcessGroup) -> Tensor:
    """(P, ...) of every process's x."""
    parts = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    all_gather(parts, x, group=group)
    return parts.unflatten(0, (group.size(), -1))


# --- ops ------------------------------------------------------------------------------------------


def tensor_ops(ops: Ops, group: ProcessGroup, sequence: bool) -> Ops:
    """`ops` on the processes of `group`, residual stream whole or (sequence) in P parts of T."""

    def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
        ids, here = local_ids(tokens, weight.shape[0], group)
        x = F.embedding(ids, weight).where(here[..., None], 0)
        return Scatter.apply(x, group) if sequence else SumForward.apply(x, group)

    def parallel_residual(x: Tensor, attn: Tensor, mlp: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
        both = attn + mlp
        both = Scatter.apply(both, group) if sequence else SumForward.apply(both, group)
        return (x.float() + (both.float() + (b1.float() + b2.float()))).to(x.dtype)

    def cross_entropy(logits: Tensor, targets: Tensor, scale: float | None = None) -> Tensor:
        scale = 1.0 / max(targets.numel(), 1) if scale is None else scale
        return VocabularyLoss.apply(logits, targets, scale, ops, group)

    parts = replace(
        ops, embedding=embedding, parallel_residual=parallel_residual, cross_entropy=cross_entropy
    )
    norms = _sequence_norms(ops, group) if sequence else _whole_norms(ops, group)
    return replace(parts, **norms)


def local_ids(tokens: Tensor, rows: int, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Ids within this process's `rows` rows of the vocabulary, 0 elsewhere, and which are here."""
    local = tokens - group.rank() * rows
    here = (local >= 0) & (local < rows)
    return local.where(here, 0), here


def _whole_norms(ops: Ops, group: ProcessGroup) -> dict[str, Any]:
    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
        return ops.layer_norm(SumBackward.apply(x, group), weight, bias, eps)

    def dual_layer_norm(
        x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, eps: float = 1e-5
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, n1, n2 = ops.dual_layer_norm(SumBackward.apply(x, group), w1, b1, w2, b2, eps)
        return x, n1, n2

    return {"layer_norm": layer_norm, "dual_layer_norm": dual_layer_norm}


def _sequence_norms(ops: Ops, group: ProcessGroup) -> dict[str, Any]:
    """x̂ is made of the rows at hand and gathered once; both norms are affine in it."""

    def normalised(x: Tensor, eps: float) -> Tensor:
        one, zero = x.new_ones(x.shape[-1]), x.new_zeros(x.shape[-1])
        return Gather.apply(ops.layer_norm(x, one, zero, eps), group)

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
        return torch.addcmul(bias, normalised(x, eps), weight)

    def dual_layer_norm(
        x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, eps: float = 1e-5
    ) -> tuple[Tensor, Tensor, Tensor]:
        xhat = normalised(x, eps)
        return x, torch.addcmul(b1, xhat, w1), torch.addcmul(b2, xhat, w2)

    return {"layer_norm": layer_norm, "dual_layer_norm": dual_layer_norm}


class VocabularyLoss(torch.autograd.Function):
    """scale·Σ of the rows' losses of logits (M, V/P), which are *consumed*; targets (M,) whole ids.

    As `cross_entropy` over the whole vocabulary. The same value on every process.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, scale: float, ops: Ops, group: ProcessGroup
    ) -> Tensor:
        losses, lse = vocabulary_loss(logits, targets, scale, ops, group)
        ctx.save_for_backward(logits, targets, lse)
        ctx.ops, ctx.scale, ctx.start = ops, scale, group.rank() * logits.shape[1]
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, lse = ctx.saved_tensors
        grad = ctx.ops.cross_entropy_grad_(logits, targets, lse, ctx.scale, ctx.start)
        return grad.mul_(dloss), None, None, None, None


def vocabulary_loss(
    logits: Tensor, targets: Tensor, scale: float, ops: Ops, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """(scale · loss, log-sum-exp) of each row (M,) fp32, by one all-gather of (3, M)."""
    stats = torch.stack(
        ops.cross_entropy_stats(logits, targets, group.rank() * logits.shape[1])
    )  # (3, M)
    parts = _all(stats, group)
    row_max, row_sum, row_target = (parts[:, i].contiguous() for i in range(3))
    return ops.cross_entropy_combine(row_max, row_sum, row_target, scale)
