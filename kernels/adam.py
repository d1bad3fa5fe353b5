"""AdamW over one flat buffer in one launch; and the gradient's norm.

    g = grad·grad_scale     m = β₁m + (1−β₁)g     v = β₂v + (1−β₂)g²
    master −= lr·( (m/(1−β₁ᵗ)) / (√(v/(1−β₂ᵗ)) + eps) + wd·master )        weight = master

Forward only: the arguments are the state. All arithmetic is fp32; on a GPU the division and the
square root of the update are within 2 ulp. lr, t and grad_scale (the clip factor) are read on the
device and the bias corrections computed there, 1 − βᵗ = −expm1(t·ln β), so nothing waits for the
host and a step can be captured in a CUDA graph. m and v move as m + (1−β)(g − m), which needs no
rounded β.

Bytes a parameter: 30 with 16-bit weights and fp32 gradients (master, m, v read and written, 24;
gradient read, 4; weight written, 2), 28 without weights, 2 fewer with 16-bit gradients; `grad_norm`
reads the gradient once more, 4 or 2. About 25 FLOPs a parameter: bound by memory bandwidth. There
is no pass that clears the gradient: the first microbatch of a step overwrites it.

Loads in flight (sm_90): a thread has 8 elements of each stream, 7 or 8 independent loads of 16
bytes, 126 to 168 KB an SM; `grad_norm` has 8 of fp32 and 4 of bf16, 144 and 72 KB. Only a last tile
that is not full is masked. Offsets are 64-bit. Tensors that share no buffer: `adam_list.py`.

`grad_norm` is deterministic, and the same on any device: NORM_PROGRAMS programs walk the buffer
with a fixed stride and write one fp32 partial each, which a second launch adds in a fixed order.
Σg² is fp32: gradients beyond 1.8e19 give an infinite norm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pythia_fast.kernels.aot_case import AotCase
from pythia_fast.kernels.checks import check

BLOCK = 1024  # parameters of a tile
WARPS = 4
NORM_PROGRAMS = 2048
NORM_BLOCK = 4096
NORM_WARPS = 4


@triton.jit
def unbias(b_step, log_beta):
    """1/(1 − βᵗ), where 1 − eʸ (y = t·ln β) comes from its series if it would cancel."""
    b_y = b_step * log_beta
    b_series = 1.0
    for i in tl.static_range(8, 1, -1):
        b_series = 1.0 + b_series * b_y / i
    return 1.0 / tl.where(b_y > -0.3, -b_y * b_series, 1.0 - tl.exp(b_y))


@triton.jit
def adamw_tile(
    p_weight,
    p_master,
    p_exp_avg,
    p_exp_avg_sq,
    p_grad,
    o,  # (BLOCK,) offsets from the pointers
    m,  # (BLOCK,) or None: all
    b_decay,  # weight decay, a scalar or (BLOCK,)
    b_lr,
    b_grad_scale,
    b_unbias1,
    b_unbias2,
    rate1,
    rate2,
    eps,
):
    b_g = tl.load(p_grad + o, mask=m).to(tl.float32) * b_grad_scale
    b_p = tl.load(p_master + o, mask=m)
    b_m = tl.load(p_exp_avg + o, mask=m)
    b_v = tl.load(p_exp_avg_sq + o, mask=m)
    b_m += rate1 * (b_g - b_m)
    b_v += rate2 * (b_g * b_g - b_v)
    b_update = (b_m * b_unbias1) / (tl.sqrt(b_v * b_unbias2) + eps)
    b_p -= b_lr * (b_update + b_decay * b_p)
    tl.store(p_master + o, b_p, mask=m)
    tl.store(p_exp_avg + o, b_m, mask=m)
    tl.store(p_exp_avg_sq + o, b_v, mask=m)
    if p_weight is not None:
        tl.store(p_weight + o, b_p.to(p_weight.dtype.element_ty), mask=m)


@triton.jit
def _adamw_kernel(
    weight,  # (n,) bf16 or fp16, or None
    master,  # (n,) fp32
    exp_avg,  # (n,) fp32
    exp_avg_sq,  # (n,) fp32
    grad,  # (n,) fp32, bf16 or fp16
    lr,  # (1,) fp32
    step,  # (1,) fp32
    grad_scale,  # (1,) fp32
    n,  # elements
    decay_until,  # elements before this one decay
    log_beta1,
    log_beta2,
    rate1,  # 1 − β₁
    rate2,  # 1 − β₂
    eps,
    weight_decay,
    BLOCK: tl.constexpr,
):
    b_lr = tl.load(lr)
    b_step = tl.load(step)
    b_scale = tl.load(grad_scale)
    b_u1 = unbias(b_step, log_beta1)
    b_u2 = unbias(b_step, log_beta2)

    i_start = tl.program_id(0).to(tl.int64) * BLOCK
    o = i_start + tl.arange(0, BLOCK)
    b_decay = tl.where(o < decay_until, weight_decay, 0.0)
    if i_start + BLOCK <= n:
        adamw_tile(
            weight, master, exp_avg, exp_avg_sq, grad, o, None, b_decay, b_lr, b_scale,
            b_u1, b_u2, rate1, rate2, eps,
        )  # fmt: skip
    else:
        adamw_tile(
            weight, master, exp_avg, exp_avg_sq, grad, o, o < n, b_decay, b_lr, b_scale,
            b_u1, b_u2, rate1, rate2, eps,
        )  # fmt: skip


@triton.jit
def _square_sum_kernel(
    grad,  # (n,)
    partials,  # (P,) fp32
    n,  # elements
    BLOCK: tl.constexpr,
):
    i_stride = tl.num_programs(0).to(tl.int64) * BLOCK
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for i_start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, i_stride):
        o = i_start + tl.arange(0, BLOCK)
        b_g = tl.load(grad + o, mask=o < n, other=0.0).to(tl.float32)
        b_sum += b_g * b_g
    tl.store(partials + tl.program_id(0), tl.sum(b_sum, axis=0))


@triton.jit
def _root_sum_kernel(
    partials,  # (P,) fp32
    norm,  # () fp32
    P,  # partials
    BLOCK: tl.constexpr,
):
    o = tl.arange(0, BLOCK)
    b_sum = tl.sum(tl.load(partials + o, mask=o < P, other=0.0), axis=0)
    tl.store(norm, tl.sqrt_rn(b_sum))


def grad_norm(grad: Tensor) -> Tensor:
    """√Σg², an fp32 scalar on grad's device. grad: flat (n,), fp32, bf16 or fp16. Deterministic."""
    check(grad, "grad", dtypes=GRADIENTS, rank=1)
    norm = torch.empty((), dtype=torch.float32, device=grad.device)
    if not grad.numel():
        return norm.zero_()
    count = min(triton.cdiv(grad.numel(), NORM_BLOCK), NORM_PROGRAMS)
    partials = torch.empty(count, dtype=torch.float32, device=grad.device)
    _square_sum_kernel[(count,)](
        grad=grad, partials=partials, n=grad.numel(), BLOCK=NORM_BLOCK, num_warps=NORM_WARPS
    )
    _root_sum_kernel[(1,)](
        partials=partials, norm=norm, P=count, BLOCK=NORM_PROGRAMS, num_warps=NORM_WARPS
    )
    return norm


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

    master, exp_avg, exp_avg_sq (n,) fp32; grad (n,) fp32, bf16 or fp16; weight (n,) bf16 or fp16,
    or None when the model computes on master itself. Elements [0, decay_until) decay, the rest do
    not. lr, step (t, the count of this step, ≥ 1) and grad_scale are one-element fp32 tensors on
    the same device. Raises ValueError, TypeError.
    """
    check(master, "master", dtypes=(torch.float32,), rank=1)
    check_state(weight, master, exp_avg, exp_avg_sq, grad)
    if not 0 <= decay_until <= master.numel():
        raise ValueError(f"decay_until: {decay_until}, expected 0 to {master.numel()}")
    if master.numel():
        _adamw_kernel[(triton.cdiv(master.numel(), BLOCK),)](
            weight=weight,
            master=master,
            exp_avg=exp_avg,
            exp_avg_sq=exp_avg_sq,
            grad=grad,
            n=master.numel(),
            decay_until=decay_until,
            BLOCK=BLOCK,
            **scalars(lr, step, grad_scale, master.device),
            **rates(betas, eps, weight_decay),
            num_warps=WARPS,
        )


def check_state(weight, master, exp_avg, exp_avg_sq, grad, suffix: str = "") -> None:
    """Everything has master's shape and device, and is contiguous; suffix: of the names."""
    fp32 = (torch.float32,)
    tensors = {
        "master": (master, fp32),
        "exp_avg": (exp_avg, fp32),
        "exp_avg_sq": (exp_avg_sq, fp32),
        "grad": (grad, GRADIENTS),
    }
    if weight is not None:
        tensors["weight"] = (weight, (torch.bfloat16, torch.float16))
    for name, (tensor, dtypes) in tensors.items():
        check(tensor, name + suffix, dtypes=dtypes, shape=master.shape, device=master.device)
        if not tensor.is_contiguous():
            raise ValueError(f"{name + suffix}: strides {tensor.stride()}, must be contiguous")
    if master.numel() and len({t.data_ptr() for t, _ in tensors.values()}) < len(tensors):
        raise ValueError(f"{', '.join(n + suffix for n in tensors)}: two of them share memory")


def scalars(
    lr: Tensor, step: Tensor, grad_scale: Tensor, device: torch.device
) -> dict[str, Tensor]:
    """What the kernels read on the device, by argument: fp32, one element each."""
    tensors = {"lr": lr, "step": step, "grad_scale": grad_scale}
    for name, tensor in tensors.items():
        check(tensor, name, dtypes=(torch.float32,), device=device)
        if tensor.numel() != 1:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected one element")
    return tensors


def rates(betas: tuple[float, float], eps: float, weight_decay: float) -> dict[str, float]:
    """What the kernels are given as numbers, by argument."""
    b1, b2 = betas
    if not (0 < b1 < 1 and 0 < b2 < 1):
        raise ValueError(f"betas: {betas}, expected two numbers between 0 and 1")
    return {
        "log_beta1": math.log(b1),
        "log_beta2": math.log(b2),
        "rate1": 1 - b1,
        "rate2": 1 - b2,
        "eps": float(eps),
        "weight_decay": float(weight_decay),
    }


GRADIENTS: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16)


def aot_cases() -> Iterator[AotCase]:
    """Flat buffers of every kind; n and the boundary of decay are 64-bit from 2.8B on."""
    pointers = dict.fromkeys(("lr", "step", "grad_scale"), "*fp32")
    numbers = dict.fromkeys(rates((0.9, 0.95), 1e-8, 0.1), "fp32")
    state = dict.fromkeys(("master", "exp_avg", "exp_avg_sq"), "*fp32")
    for weight in ("bf16", "fp16", None):
        for grad in ("fp32", "bf16", "fp16"):
            streams = {"weight": f"*{weight}" if weight else "constexpr", **state}
            signature = (
                streams | {"grad": f"*{grad}"} | pointers | {"n": "i64", "decay_until": "i64"}
            )
            constexprs = {"BLOCK": BLOCK} | ({} if weight else {"weight": None})
            yield AotCase(
                name=f"weights {weight}, gradients {grad}",
                kernel=_adamw_kernel,
                signature=signature | numbers | {"BLOCK": "constexpr"},
                constexprs=constexprs,
                num_warps=WARPS,
                wide=tuple(n for n in (*streams, "grad") if signature[n] != "constexpr"),
            )
    for grad in ("fp32", "bf16", "fp16"):
        yield AotCase(
            name=f"norm of {grad}",
            kernel=_square_sum_kernel,
            signature={"grad": f"*{grad}", "partials": "*fp32", "n": "i64", "BLOCK": "constexpr"},
            constexprs={"BLOCK": NORM_BLOCK},
            num_warps=NORM_WARPS,
            wide=("grad",),
        )
    yield AotCase(
        name="norm of partials",
        kernel=_root_sum_kernel,
        signature={"partials": "*fp32", "norm": "*fp32", "P": "i32", "BLOCK": "constexpr"},
        constexprs={"BLOCK": NORM_PROGRAMS},
        num_warps=NORM_WARPS,
        wide=("partials",),
    )
