"""The specification: one plain-torch function per op, same name and signature as the kernel's.

Shape letters, here and in every kernel file:

    B  batch (rows)        T  sequence          H  heads           D  head dim
    R  rotary dims (D/4)   h  hidden = H·D      V  vocabulary      M  rows·positions = B·T

Every function is differentiable by autograd and runs in any floating dtype (float64 for proofs).
Functions whose name ends in ``_`` write into their arguments and are not differentiable. A kernel
may overwrite the arguments that the docstring calls *consumed*; this file never does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pythia_fast.kernels.rounding import joined_master, philox, split_master, stochastic

# --- rotary ---------------------------------------------------------------------------------------


def rotary(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Partial rotary embedding of q and k inside the packed projection (GPT-NeoX half-rotation).

        q'[..., :R/2]  = q[..., :R/2]·cos − q[..., R/2:R]·sin
        q'[..., R/2:R] = q[..., R/2:R]·cos + q[..., :R/2]·sin      (k alike; v, q[..., R:] pass)

    qkv (B, T, H, 3·D), each head q|k|v, *consumed*; cos, sin (≥T, R/2), any floating dtype.
    Returns (B, T, H, 3·D). Source: Su et al. 2021, in the layout of GPT-NeoX.
    """
    q, k, v = qkv.chunk(3, dim=-1)
    return torch.cat((_rotate(q, cos, sin), _rotate(k, cos, sin), v), dim=-1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, H, D) -> the same with its first R dims rotated; products in the wider dtype."""
    half = cos.shape[-1]
    c = cos[: x.shape[1], None, :]  # (T, 1, R/2)
    s = sin[: x.shape[1], None, :]
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat(((x1 * c - x2 * s).to(x.dtype), (x2 * c + x1 * s).to(x.dtype), rest), dim=-1)


# --- attention ------------------------------------------------------------------------------------


def attention(
    qkv: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    doc_start: Tensor | None = None,
    deterministic: bool = True,
) -> Tensor:
    """Causal self-attention over a packed projection, rotary inside where tables are given.

        ctx = softmax(q kᵀ/√D + causal mask) v

    qkv (B, T, H, 3·D), *consumed*; cos, sin as in `rotary`, or None when qkv is already rotated.
    doc_start (B, T) int32, the position where the document of each position begins: nothing before
    it is seen. deterministic: for a kernel's backward pass; nothing here. Returns (B, T, H·D).
    """
    q, k, v = qkv.chunk(3, dim=-1)
    if cos is not None and sin is not None:
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
    if doc_start is None:
        ctx = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        at = torch.arange(qkv.shape[1], device=qkv.device)
        seen = (at <= at[:, None]) & (at >= doc_start[:, :, None])  # (B, T, T)
        ctx = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None])
    return ctx.transpose(1, 2).flatten(-2)


def attention_decode(
    q: Tensor, keys: Tensor, values: Tensor, filled: int, first: Tensor | None = None
) -> Tensor:
    """Attention of the newest positions over a cache: (B, Q, H·D) of q (B, Q, H, D), rotated.

    keys, values (B, H, S, D), of which positions [0, filled) are there, the last Q of them the
    queries' own. first (B,) int32: the first position of each row (those before it are padding; a
    query there sees itself alone), None: 0.
    """
    at = torch.arange(filled, device=q.device)
    own = at[filled - q.shape[1] :, None]
    start = torch.zeros(len(q), dtype=torch.int32, device=q.device) if first is None else first
    seen = ((at <= own) & (at >= start[:, None, None])) | (at == own)  # (B, Q, filled)
    k, v = keys[:, :, :filled], values[:, :, :filled]
    ctx = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=seen[:, None])
    return ctx.transpose(1, 2).flatten(-2)


# --- layer norm -----------------------------------------------------------------------------------


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """y = (x − mean(x)) / √(var(x) + eps) · weight + bias over the last dim (biased variance).

    x (..., h), weight and bias (h,). Returns (..., h) in x's dtype.
    """
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def dual_layer_norm(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """Two affine LayerNorms of the same x, and x itself: (x, norm1(x), norm2(x)).

    x is handed through so that the gradient of the residual stream meets the gradients of both
    norms in one backward pass. x (..., h); weights and biases (h,).
    """
    return x, layer_norm(x, weight1, bias1, eps), layer_norm(x, weight2, bias2, eps)


# --- parallel residual ----------------------------------------------------------------------------


def parallel_residual(
    x: Tensor, attn: Tensor, mlp: Tensor, attn_bias: Tensor, mlp_bias: Tensor
) -> Tensor:
    """y = x + ((attn + attn_bias) + (mlp + mlp_bias)): the sum that ends a GPT-NeoX block.

    x, attn, mlp (..., h): residual stream and the two branches before their output biases (h,).
    """
    return x + ((attn + attn_bias) + (mlp + mlp_bias))


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
    y = parallel_residual(x, attn, mlp, attn_bias, mlp_bias)
    return dual_layer_norm(y, weight1, bias1, weight2, bias2, eps)


# --- gelu -----------------------------------------------------------------------------------------


def gelu(x: Tensor, bias: Tensor, approximate: str = "tanh", out: Tensor | None = None) -> Tensor:
    """gelu(x + bias), by the tanh form (GPT-NeoX in training) or exactly by erf ("none").

        tanh: ½u(1 + tanh(√(2/π)(u + 0.044715u³)))      none: ½u(1 + erf(u/√2))      u = x + bias

    x (..., n), bias (n,). out: where the result goes, a (..., n) view of any row stride such as
    columns of a wider buffer; None allocates. Source: Hendrycks & Gimpel 2016.
    """
    y = F.gelu(x + bias, approximate=approximate)
    return y if out is None else out.copy_(y)


# --- cross entropy --------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, targets: Tensor, scale: float | None = None) -> Tensor:
    """scale · Σ_rows (logsumexp(logits) − logits[target]), an fp32 scalar (fp64 for fp64 logits).

    logits (M, V), *consumed* (a kernel leaves dlogits there); targets (M,) int64 in [0, V).
    scale: 1/M when None (the mean); the trainer passes 1/(positions of the whole step), so that
    microbatches and data-parallel ranks add up. Every column takes part in the softmax, padded
    vocabulary rows included.
    """
    scale = 1.0 / max(targets.numel(), 1) if scale is None else scale
    wide = logits if logits.dtype == torch.float64 else logits.float()
    nothing = torch.iinfo(torch.int64).min  # torch ignores −100, which is an id out of range here
    return F.cross_entropy(wide, targets, ignore_index=nothing, reduction="sum") * scale


def cross_entropy_stats(
    logits: Tensor, targets: Tensor, vocab_start: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """What one vocabulary shard adds: per row (max, Σexp(logit − max), target's logit), fp32.

    logits (M, V/p) are columns [vocab_start, vocab_start + V/p); the target's logit is NaN in a row
    whose target lies elsewhere. `cross_entropy_combine` makes the loss of all shards' numbers.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    local = targets - vocab_start
    here = (local >= 0) & (local < logits.shape[1])
    m = wide.amax(dim=1)
    s = (wide - m[:, None]).exp().sum(dim=1)
    index = torch.where(here, local, torch.zeros_like(local))[:, None]
    target = torch.where(here, wide.gather(1, index)[:, 0], torch.full_like(m, torch.nan))
    return m, s, target


def cross_entropy_combine(
    row_max: Tensor, row_sum: Tensor, row_target: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """scale · loss of each row, and its log-sum-exp over the whole vocabulary, (M,) fp32 each.

        m = max mᵢ    s = Σ sᵢ·exp(mᵢ − m)    lse = m + log s    loss = (m − t) + log s

    row_max, row_sum, row_target (p, M) fp32: what `cross_entropy_stats` gave on each of p shards, t
    the one target logit that is not NaN. Where no shard has it, the id is outside of the vocabulary
    (or a shard is missing): both results are NaN, and by lse the gradient of `cross_entropy_grad_`.
    """
    m = row_max.amax(dim=0)
    log_s = (row_sum * (row_max - m).exp()).sum(dim=0).log()
    here = ~row_target.isnan()
    target = torch.where(here, row_target, torch.zeros_like(row_target)).sum(dim=0)
    target = torch.where(here.any(dim=0), target, torch.full_like(m, torch.nan))
    lse = torch.where(here.any(dim=0), m + log_s, torch.full_like(m, torch.nan))
    return scale * ((m - target) + log_s), lse


def cross_entropy_grad_(
    logits: Tensor, targets: Tensor, lse: Tensor, scale: float, vocab_start: int = 0
) -> Tensor:
    """logits ← scale · (exp(logits − lse) − onehot(target)), in place; returns logits.

    logits (M, V/p) as in `cross_entropy_stats`; lse (M,) fp32 as `cross_entropy_combine` gives it.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    local = targets - vocab_start
    here = (local >= 0) & (local < logits.shape[1])
    grad = (wide - lse[:, None]).exp()
    rows = torch.nonzero(here)[:, 0]
    grad[rows, local[rows]] -= 1.0
    return logits.copy_(grad * scale)


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

    x (M, h), weight (V, h), targets (M,). chunk_rows bounds the logits that exist at once; None
    takes all M. weight_grad: (V, h) fp32; where given, a kernel *adds* the weight gradient there
    in fp32 (or, without `add`, overwrites it) and autograd gives weight none. The reference
    materialises everything and lets autograd work, so it takes weight_grad=None only. A kernel
    computes the gradients of x and weight along with the loss, before the gradient of the loss is
    known: with weight_grad, that must be 1.
    """
    if weight_grad is not None:
        raise ValueError("weight_grad: the reference leaves the weight gradient to autograd")
    scale = 1.0 / max(targets.numel(), 1) if scale is None else scale
    step = chunk_rows or max(targets.numel(), 1)
    chunks = zip(x.split(step), targets.split(step), strict=True)
    return sum(
        (cross_entropy(F.linear(xc, weight), tc, scale) for xc, tc in chunks),
        start=torch.zeros((), dtype=torch.float32, device=x.device),
    )


# --- embedding ------------------------------------------------------------------------------------


def embedding_grad_(grad: Tensor, dy: Tensor, ids: Tensor, add: bool = True) -> None:
    """The gradient of an embedding's weight, into grad: grad[i] += Σ dy over the positions of id i.

    grad (V, h) contiguous, fp32, bf16 or fp16; dy (..., h) floating; ids (...) int64 in [0, V], a
    position each, V of a row that is elsewhere. add: to what grad holds, else in its place. Sums in
    fp32. Deterministic.
    """
    wide = torch.promote_types(dy.dtype, torch.float32)
    total = F.pad(grad.to(wide) if add else torch.zeros_like(grad, dtype=wide), (0, 0, 0, 1))
    rows = dy.reshape(-1, dy.shape[-1]).to(wide)
    grad.copy_(total.index_put((ids.reshape(-1),), rows, accumulate=True)[:-1])


# --- optimizer ------------------------------------------------------------------------------------


def grad_norm(grad: Tensor) -> Tensor:
    """√Σg², an fp32 scalar on grad's device. grad: flat (n,), fp32, bf16 or fp16.

    In two levels: torch on a CPU adds up a vector in order, 0.6 % too little at 70 million.
    """
    wide = grad if grad.dtype == torch.float64 else grad.float()
    cut = wide.numel() // 1024 * 1024
    parts = torch.linalg.vector_norm(wide[:cut].view(-1, 1024), dim=1)
    return torch.linalg.vector_norm(torch.cat((parts, wide[cut:])))


def adamw_(
    weight: Tensor | None,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    decay_until: int,
    lr: Tensor,
    step: Tensor,
    grad_scale: Tensor,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> None:
    """One AdamW step over one flat buffer, in place (decoupled decay, as apex FusedAdam has it).

        g = grad·grad_scale     m = β₁m + (1−β₁)g     v = β₂v + (1−β₂)g²
        master −= lr·( (m/(1−β₁ᵗ)) / (√(v/(1−β₂ᵗ)) + eps) + wd·master )        weight = master

    master, exp_avg, exp_avg_sq (n,) fp32; grad (n,) fp32, bf16 or fp16; weight (n,) bf16 or fp16,
    or None when the model computes on master itself. Elements [0, decay_until) decay, the rest do
    not. lr, step (t, the count of this step, ≥ 1) and grad_scale are one-element fp32 tensors on
    the same device: nothing is read back to the host.
    """
    b1, b2 = betas
    g = grad.to(master.dtype) * grad_scale
    exp_avg.lerp_(g, 1 - b1)
    exp_avg_sq.mul_(b2).addcmul_(g, g, value=1 - b2)
    m_hat = exp_avg / (1 - b1**step)
    v_hat = exp_avg_sq / (1 - b2**step)
    update = m_hat / (v_hat.sqrt() + eps)
    update[:decay_until] += weight_decay * master[:decay_until]
    master.sub_(lr * update)
    if weight is not None:
        weight.copy_(master)


def adamw_list_(
    weights: list[Tensor] | None,
    masters: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grads: list[Tensor],
    decays: list[bool],
    lr: Tensor,
    step: Tensor,
    grad_scale: Tensor,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> None:
    """`adamw_` over tensors that do not share a buffer: one step of each, in place.

    The lists are of equal length, entry i of one shape; dtypes as in `adamw_`, one for all weights
    and one for all gradients. decays[i]: whether weight decay applies to tensor i.
    """
    for i, decay in enumerate(decays):
        weight = None if weights is None else weights[i].view(-1)
        state = (t[i].view(-1) for t in (masters, exp_avgs, exp_avg_sqs, grads))
        until = masters[i].numel() if decay else 0
        adamw_(weight, *state, until, lr, step, grad_scale, betas, eps, weight_decay)


def adamw_lean_(
    weight: Tensor,
    remainder: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    decay_until: int,
    lr: Tensor,
    step: Tensor,
    grad_scale: Tensor,
    seed: Tensor,
    first: int = 0,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> None:
    """One AdamW step in place on an exact fp32 master in two halves and bf16 moments.

        master bits = weight·2¹⁶ + remainder      weight = master to the nearest, half away from 0
        m, v: bf16, the cut-off part p (of 2¹⁶) rounded up where 16 random bits reach 2¹⁶ − p

    weight, exp_avg, exp_avg_sq (n,) bf16; remainder (n,) int16; grad (n,) fp32, bf16 or fp16;
    decay_until, lr, step, grad_scale as in `adamw_`; seed: one int64 in [0, 2³²) on the device;
    first: where element 0 stands in the buffer that these are a part of. The random bits of element
    i, at step t: word q of Philox 4x32-10 with key seed and counter (c, t), c = 1024·(i // 4096) +
    i mod 1024, q = i // 1024 mod 4; the low half for m, the high half for v.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)  # float64 keeps all of each
    master = joined_master(weight.bfloat16(), remainder).to(wide)
    m, v = exp_avg.to(wide), exp_avg_sq.to(wide)
    adamw_(None, master, m, v, grad, decay_until, lr, step, grad_scale, betas, eps, weight_decay)
    if wide == torch.float64:
        for state, exact in ((weight, master), (exp_avg, m), (exp_avg_sq, v)):
            state.copy_(exact)
        return
    for half, whole in zip((weight, remainder), split_master(master), strict=True):
        half.copy_(whole)
    i = torch.arange(first, first + len(grad), dtype=torch.int64, device=grad.device)
    counter, word = 1024 * (i // 4096) + i % 1024, i // 1024 % 4
    random = philox(seed.view(()), counter, step.long().view(())).gather(0, word[None])[0]
    exp_avg.copy_(stochastic(m, random & 0xFFFF))
    exp_avg_sq.copy_(stochastic(v, random >> 16))
