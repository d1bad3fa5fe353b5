"""One parallel block as one autograd function on the kernels, the embedding below, the head above.

    n1, n2 = LN₁ x, LN₂ x            both norms of the same x in one pass (mean, rstd)
    qkv    = n1 Wqkvᵀ + bqkv         q and k turned in place
    u      = n2 W1ᵀ
    both   = [attention(qkv) | gelu(u + b1)]          one (M, 5h) buffer, M = B·T
    y      = (x + (bo + b2)) + both [Wo W2]ᵀ          one product, added in place

Saved: x, n1, n2 (2h), qkv (3h, turned), lse, u (4h), both (5h), mean and rstd: 15·h elements a
token beside the statistics. n1, n2 and both are operands of the weight gradients, u is what GELU's
derivative is made of (its own output does not give it back), and x is the block's input. With
`recompute` 9·h: n1, n2 and the GELU are made again from x and u, to the same bits; ctx is kept
apart and copied back into its columns.

x + (bo + b2) is written by the norms' kernel, which holds x in registers, and the product adds to
it where it lies: torch's out-of-place `addmm` would copy x there first (a pass of 2·h elements a
token), and neither adds a bias of its own; an epilogue of cuBLASLt that adds both is not to be had
from torch. So one more rounding of the residual stream than its sum alone has.

On P tensor-parallel processes a block holds H/P heads and 4h/P of the MLP: `both` is (M, 5h/P), the
last product a partial sum that meets the others before x joins it, and so is what both norms hand
back before dy joins it: one all-reduce of (M, h) each way (`parallel/tensor.py`), backward while
the gradients of the weights are made. With sequence parallelism x, y and their gradients are M/P
rows: x̂ is gathered and kept in the place of n1 and n2, dy is gathered, both sums are scattered.

Backward, dy (M, h): every product's operands lie ready, the residual's gradient joins inside the
norms' kernel, and nothing is copied by autograd, which sees x and y alone. The weights' gradients
are added in fp32 by the products themselves, in the optimizer's flat gradient; the first microbatch
of a step overwrites. Σ_rows dy, the gradient of bo and of b2, is a by-product of the block above:
its dx is this block's dy, and its norms' kernel sums dx before it is rounded. Zero-bubble pipelines
let the three products of the weights wait (`Block.waiting`), with their operands: no product then
runs beside the all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from pythia_fast.kernels.attention import attention_fwd
from pythia_fast.kernels.attention_bwd import attention_bwd
from pythia_fast.kernels.attention_tiles import DTYPES, HEAD_DIMS, turns
from pythia_fast.kernels.embedding import embedding_grad_
from pythia_fast.kernels.gelu import gelu_bwd, gelu_fwd
from pythia_fast.kernels.layer_norm import layer_norm_bwd, layer_norm_fwd
from pythia_fast.kernels.linear_cross_entropy import accumulate, linear_cross_entropy
from pythia_fast.kernels.parallel_residual import parallel_residual_bwd
from pythia_fast.kernels.rotary import rotary_fwd
from pythia_fast.model import Layer, Pythia
from pythia_fast.parallel.tensor import gathered, local_ids, scattered, summed, vocabulary_loss


class Sums(Protocol):
    """Who owns the fp32 gradients: the optimizer."""

    fresh: bool  # the next gradient overwrites instead of adding

    def hand_over(self, parameters: Iterable[Tensor]) -> list[Tensor]: ...

    def finished(self, grads: Iterable[Tensor]) -> None: ...


class Tensors(NamedTuple):
    """The weights of a block, or their gradients."""

    norm1: Tensor  # (h,), as all vectors but two
    norm1_bias: Tensor
    norm2: Tensor
    norm2_bias: Tensor
    qkv: Tensor  # (3h, h)
    qkv_bias: Tensor  # (3h,)
    mlp: Tensor  # (4h, h), W1
    mlp_bias: Tensor  # (4h,), b1
    out: Tensor  # (h, 5h), [Wo W2]
    attention_out_bias: Tensor  # bo
    mlp_out_bias: Tensor  # b2


class Block:
    """x (B, T, h) -> y: one layer's weights, and where their gradients add up."""

    def __init__(
        self, layer: Layer, sums: Sums, recompute: bool, parts: ProcessGroup | None, sequence: bool
    ) -> None:
        parameters = _parameters(layer)
        self.weights = _tensors([p.detach() for p in parameters])
        self.grads = _tensors(sums.hand_over(parameters))
        self.sums, self.recompute, self.parts, self.sequence = sums, recompute, parts, sequence
        vector = self.weights.norm1
        self.unit = torch.ones_like(vector), torch.zeros_like(vector)
        self.heads = layer.attention.heads
        self.eps, self.approximate = layer.input_layernorm.eps, layer.mlp.approximate
        self.below: Block | None = None  # whose y is x, and nothing else's
        self.is_top = True  # no block sums dy on its way
        # where the backward's half for the weights waits; None: it runs with the other
        self.waiting: list[Callable[[], None]] | None = None

    @property
    def inner(self) -> int:
        """Columns of the context: D times the heads at hand, h on a single process."""
        return self.weights.qkv.shape[0] // 3

    @property
    def norms(self) -> tuple[tuple[Tensor, Tensor], ...]:
        w = self.weights
        return (w.norm1, w.norm1_bias), (w.norm2, w.norm2_bias)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return cast(Tensor, BlockFunction.apply(x, self, cos, sin))


class BlockFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Block, cos: Tensor, sin: Tensor) -> Tensor:
        y, saved = block_fwd(x, block, cos, sin)
        ctx.block = block
        ctx.save_for_backward(x, cos, sin, *saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return block_bwd(dy.contiguous(), ctx.block, *ctx.saved_tensors), None, None, None


def block_fwd(
    x: Tensor, block: Block, cos: Tensor, sin: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """y like x (B, T, h), and what the backward needs beside x. cos, sin (≥T, R/2)."""
    w, inner = block.weights, block.inner
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    n1, n2, statistics = norms_fwd(x, block, y)

    both = n1.new_empty(*n1.shape[:-1], w.out.shape[1])  # [ctx | gelu]
    qkv = torch.addmm(w.qkv_bias, _rows(n1), w.qkv.t()).view(*n1.shape[:-1], block.heads, -1)
    _, lse = attention_fwd(rotary_fwd(qkv, cos, sin), out=both[..., :inner])
    u = torch.mm(_rows(n2), w.mlp.t())
    gelu_fwd(u, w.mlp_bias, block.approximate, out=_rows(both)[:, inner:])

    if block.parts is None:
        _rows(y).addmm_(_rows(both), w.out.t())
    else:
        partial = torch.mm(_rows(both), w.out.t()).view(n1.shape)
        y.add_(summed(partial, block.parts, block.sequence))
    left = (
        both[..., :inner].clone(memory_format=torch.contiguous_format) if block.recompute else both
    )
    norms = () if block.recompute or block.sequence else (n1, n2)
    return y, (*statistics, qkv, lse, u, left, *norms)


def norms_fwd(
    x: Tensor, block: Block, y: Tensor | None = None
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor | None]]:
    """Both norms of all rows, (B, T, h), and what `norms_bwd` needs: mean, rstd, x̂ or None.

    y, where given, becomes x + (bo + b2). On a part of the rows x̂ is made and gathered, once, and
    both norms are affine in it.
    """
    w = block.weights
    biases = None if y is None else (w.attention_out_bias, w.mlp_out_bias)
    if not block.sequence:
        (n1, n2), mean, rstd = layer_norm_fwd(x, block.norms, block.eps, y, biases)
        return n1, n2, (mean, rstd, None)
    assert block.parts is not None
    (own,), mean, rstd = layer_norm_fwd(x, (block.unit,), block.eps, y, biases)
    xhat = gathered(own, block.parts)
    n1, n2 = affine(xhat, block)
    return n1, n2, (mean, rstd, xhat)


def affine(xhat: Tensor, block: Block) -> tuple[Tensor, ...]:
    return tuple(torch.addcmul(bias, xhat, weight) for weight, bias in block.norms)


def operands(
    block: Block, x: Tensor, xhat: Tensor | None, u: Tensor, left: Tensor, *norms: Tensor
) -> tuple[Tensor, ...]:
    """(n1, n2, both) from what a block keeps; left: both, or under `recompute` ctx."""
    w, inner = block.weights, block.inner
    n1, n2 = norms or (affine(xhat, block) if xhat is not None else norms_fwd(x, block)[:2])
    if not block.recompute:
        return n1, n2, left
    both = n1.new_empty(*n1.shape[:-1], w.out.shape[1])
    both[..., :inner].copy_(left)
    gelu_fwd(u, w.mlp_bias, block.approximate, out=_rows(both)[:, inner:])
    return n1, n2, both


def block_bwd(
    dy: Tensor, block: Block,
    x: Tensor, cos: Tensor, sin: Tensor, mean: Tensor, rstd: Tensor, xhat: Tensor | None,
    qkv: Tensor, lse: Tensor, u: Tensor, *kept: Tensor,
) -> Tensor:  # fmt: skip
    """dx, contiguous like x; the gradients of the weights go to block.grads."""
    w, g, inner, add = block.weights, block.grads, block.inner, not block.sums.fresh
    n1, n2, both = operands(block, x, xhat, u, *kept)
    d_sum = _rows(dy if block.parts is None or not block.sequence else gathered(dy, block.parts))
    d_both = torch.mm(d_sum, w.out).view(both.shape)  # [d ctx | d gelu]

    d_gelu = _rows(d_both)[:, inner:]
    du, d_mlp_bias = gelu_bwd(u, w.mlp_bias, d_gelu, block.approximate, torch.float32)
    d_n2 = torch.mm(du, w.mlp).view(n2.shape)

    d_ctx = d_both[..., :inner]
    d_qkv = attention_bwd(qkv, both[..., :inner], lse, d_ctx, cos, sin).view(-1, 3 * inner)
    d_n1 = torch.mm(d_qkv, w.qkv).view(n1.shape)

    d_norms, finish = norms_bwd(x, dy, (d_n1, d_n2), block, mean, rstd, xhat)

    def weights() -> None:  # while processes add up what norms_bwd made
        accumulate(g.out, d_sum.t(), _rows(both), add)
        accumulate(g.mlp, du.t(), _rows(n2), add)
        accumulate(g.qkv, d_qkv.t(), _rows(n1), add)
        block.sums.finished([g.qkv, g.mlp, g.out])

    if block.waiting is None:
        weights()
    else:
        block.waiting.append(weights)
    dx, d_below = finish()

    totals = [g.norm1, g.norm1_bias, g.norm2, g.norm2_bias, g.qkv_bias, g.mlp_bias]
    vectors = [*d_norms, d_qkv.sum(0, dtype=torch.float32), d_mlp_bias]
    if block.is_top:
        totals += [g.attention_out_bias, g.mlp_out_bias]
        vectors += [parallel_residual_bwd(dy, torch.float32)] * 2
    if block.below is not None:
        totals += [block.below.grads.attention_out_bias, block.below.grads.mlp_out_bias]
        vectors += [d_below] * 2
    (torch._foreach_add_ if add else torch._foreach_copy_)(totals, vectors)
    block.sums.finished(totals)
    return dx


def norms_bwd(
    x: Tensor, dy: Tensor, d_norms: tuple[Tensor, Tensor], block: Block,
    mean: Tensor, rstd: Tensor, xhat: Tensor | None,
) -> tuple[list[Tensor], Callable[[], tuple[Tensor, Tensor]]]:  # fmt: skip
    """Gradients of both norms' weights and biases, and a call that gives dx and Σ_rows dx.

    Vectors (h,) in fp32. What the call waits for has set off: the sum over processes of what passed
    both norms, which are linear in the upstream gradient.
    """
    w, fp32 = block.weights, torch.float32
    weights = (w.norm1, w.norm2)
    if block.parts is None:
        dx, (*vectors, d_below) = layer_norm_bwd(
            x, dy, d_norms, weights, mean, rstd, sum_dx=True, sums_dtype=fp32
        )
        return vectors, lambda: (dx, d_below)
    if xhat is None:
        dx, sums = layer_norm_bwd(x, None, d_norms, weights, mean, rstd, sums_dtype=fp32)
        work = dist.all_reduce(dx, group=block.parts, async_op=True)

        def whole() -> tuple[Tensor, Tensor]:
            work.wait()
            return dx.add_(dy), parallel_residual_bwd(dx, fp32)

        return list(sums), whole

    d_xhat, sums = layer_norm_bwd(xhat, None, d_norms, weights, None, None, sums_dtype=fp32)
    own, work = scattered(d_xhat, block.parts, async_op=True)

    def part(source: Tensor = d_xhat) -> tuple[Tensor, Tensor]:  # which lives until it was sent
        if work is not None:
            work.wait()
        dx, (*_, d_below) = layer_norm_bwd(
            x, dy, (own,), block.unit[:1], mean, rstd, sum_dx=True, sums_dtype=fp32
        )
        return dx, d_below

    return list(sums), part


class EmbeddingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor, fused: Fused) -> Tensor:
        ctx.fused = fused
        if fused.parts is None:
            ctx.save_for_backward(tokens)
            return F.embedding(tokens, weight)
        ids, here = local_ids(tokens, len(weight), fused.parts)
        ctx.save_for_backward(ids.where(here, len(weight)))
        x = F.embedding(ids, weight).where(here[..., None], 0)
        return summed(x, fused.parts, fused.sequence)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[None, None, None]:
        (ids,), fused = ctx.saved_tensors, ctx.fused
        if fused.sequence:
            dx = gathered(dx, fused.parts)
        embedding_grad_(fused.embedding_grad, dx, ids, not fused.sums.fresh)
        fused.sums.finished([fused.embedding_grad])
        return None, None, None


class Fused:
    """A model's embedding, blocks and head where kernels run them and add up their gradients."""

    def __init__(
        self,
        model: Pythia,
        sums: Sums,
        recompute: bool = False,
        parts: ProcessGroup | None = None,
        sequence: bool = False,
    ) -> None:
        """parts: the tensor-parallel processes; None: this one has whole layers. sequence: each has
        rows of the residual stream of its own.
        """
        layers = cast(dict[str, Layer], model.gpt_neox.layers._modules)
        self.blocks = [Block(layer, sums, recompute, parts, sequence) for layer in layers.values()]
        numbered = zip(map(int, layers), self.blocks, strict=True)
        for (i, below), (j, above) in pairwise(numbered):
            if j == i + 1:  # else another stage of a pipeline begins
                above.below, below.is_top = below, False
        self.sums, self.ops, self.parts, self.sequence = sums, model.ops, parts, sequence
        if hasattr(model.gpt_neox, "embed_in"):
            self.embedding = model.gpt_neox.embed_in.weight
            (self.embedding_grad,) = sums.hand_over([self.embedding])
        if hasattr(model, "embed_out"):
            self.head = model.embed_out.weight
            (self.head_grad,) = sums.hand_over([self.head])

    def embed(self, tokens: Tensor) -> Tensor:
        """x (B, T, h) of tokens (B, T) int64."""
        return cast(Tensor, EmbeddingFunction.apply(self.embedding, tokens, self))

    def loss(self, x: Tensor, targets: Tensor, scale: float | None) -> Tensor:
        """scale·Σ of the rows' losses, or the mean; x (M, h), targets (M,) int64.

        The logits exist once, in x's dtype, and their gradient replaces them. The head's gradient
        is added here, before the backward pass: call it with grad enabled only to run that pass,
        with a gradient of 1.
        """
        add = not self.sums.fresh
        if self.parts is None:
            loss = linear_cross_entropy(x, self.head, targets, scale, None, self.head_grad, add=add)
        else:
            loss = VocabularyHead.apply(x, self, targets, scale, add)
        if loss.requires_grad:
            self.sums.finished([self.head_grad])
        return loss


class VocabularyHead(torch.autograd.Function):
    """`linear_cross_entropy` with V/P rows of the head; dx is this process's part of a sum."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, fused: Fused, targets: Tensor, scale: float | None, add: bool
    ) -> Tensor:
        assert fused.parts is not None
        scale = 1.0 / max(targets.numel(), 1) if scale is None else scale
        logits = torch.mm(x, fused.head.t())  # (M, V/P)
        losses, lse = vocabulary_loss(logits, targets, scale, fused.ops, fused.parts)
        if ctx.needs_input_grad[0]:
            start = fused.parts.rank() * logits.shape[1]
            fused.ops.cross_entropy_grad_(logits, targets, lse, scale, start)
            accumulate(fused.head_grad, logits.t(), x, add)
            ctx.save_for_backward(torch.mm(logits, fused.head))
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        (dx,) = ctx.saved_tensors
        return dx.mul_(torch.where(dloss == 1, dloss, torch.nan)), None, None, None, None


def takes(head_dim: int, rotary_dim: int, dtype: torch.dtype) -> bool:
    """Whether the attention kernel has this head dim, can turn these dims, and has this dtype."""
    return head_dim in HEAD_DIMS and turns(head_dim, rotary_dim // 2) and dtype in DTYPES


def joined(left: Tensor, right: Tensor) -> Tensor:
    """The matrix [left right] of which both are columns; ValueError where they are not."""
    rows, columns = left.shape[0], left.shape[1] + right.shape[1]
    adjacent = right.data_ptr() == left.data_ptr() + left.shape[1] * left.element_size()
    if not (adjacent and left.stride() == right.stride() == (columns, 1)):
        raise ValueError(
            f"strides {left.stride()} and {right.stride()} at {left.data_ptr():#x} and"
            f" {right.data_ptr():#x}: not the columns of one ({rows}, {columns}) matrix"
        )
    return left.as_strided((rows, columns), (columns, 1))


def _parameters(layer: Layer) -> list[Tensor]:
    n1, n2 = layer.input_layernorm, layer.post_attention_layernorm
    qkv, dense = layer.attention.query_key_value, layer.attention.dense
    mlp_in, mlp_out = layer.mlp.dense_h_to_4h, layer.mlp.dense_4h_to_h
    pairs = [(m.weight, m.bias) for m in (n1, n2, qkv, mlp_in)]
    return [*(p for pair in pairs for p in pair), dense.weight, mlp_out.weight,
            dense.bias, mlp_out.bias]  # fmt: skip


def _tensors(parts: list[Tensor]) -> Tensors:
    """parts: as `_parameters` orders them."""
    *first, dense, mlp_out, dense_bias, mlp_out_bias = parts
    return Tensors._make([*first, joined(dense, mlp_out), dense_bias, mlp_out_bias])


def _rows(t: Tensor) -> Tensor:
    """(B, T, n) as (M, n)."""
    return t.view(-1, t.shape[-1])
