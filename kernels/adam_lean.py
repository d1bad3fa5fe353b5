"""AdamW over one flat buffer with 8 bytes of state a parameter: 10 with a 16-bit gradient.

    master = join(weight, remainder)        g, m, v, update: as in `adam.py`, in fp32
    weight, remainder = split(master)       m, v rounded to bf16, stochastically

The fp32 master is exact: its bits are weight·2¹⁶ + remainder, as integers. The weight is the master
rounded to the nearest bf16, half away from zero, and the remainder (int16) is what that rounding
took, −2¹⁵ to 2¹⁵ − 1, so every master has one pair and every pair one master. (Half to even, which
casts do, would give the two masters halfway around an even weight the same pair.) A NaN becomes the
pair (0x7fc0, 0). Nothing else is lost between steps but the low bits of m and v.

m and v round up with the probability of the part that is cut off, so that an exponential average
moves where 5 % of a gradient are less than half a unit of bf16; the update itself uses both before
they are rounded. The random bits are Philox 4x32-10 (Salmon et al. 2011) of the key `seed` and the
counter (index, t): those of an element depend on neither programs nor ranges, and a resumed run
draws what an uninterrupted one would. A tile of 4·GROUP elements, counted from `first`, shares
GROUP counters: word q of counter i is for element 4·GROUP·(i // GROUP) + q·GROUP + i mod GROUP, its
low half for m and its high half for v.

Bytes a parameter: 20 with 16-bit gradients (8 of state read and written, gradient read, 2, and its
norm, 2), 24 with fp32 ones; about 45 operations, a third of them Philox: bound by memory bandwidth.
All arrays in 16 bits are handled as integers: nothing here computes in bf16.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from pythia_fast.kernels.adam import GRADIENTS, rates, scalars, unbias
from pythia_fast.kernels.aot_case import AotCase
from pythia_fast.kernels.checks import check

GROUP = 1024  # elements of a quarter of a tile: 8 a thread
WARPS = 4


@triton.jit
def _is_nan(b_bits):
    return (b_bits & 0x7FFFFFFF) > 0x7F800000


@triton.jit
def _stochastic(b, b_random):
    """fp32 -> bits of bf16, rounded up in size with the probability of the part cut off."""
    b_bits = b.to(tl.int32, bitcast=True)
    b_rounded = (b_bits + (b_random & 0xFFFF)) >> 16
    return tl.where(_is_nan(b_bits), 0x7FC0, b_rounded).to(tl.int16)


@triton.jit
def _lean_group(
    weight, remainder, exp_avg, exp_avg_sq, grad, o, m, b_random, b_decay, b_lr, b_scale, b_u1,
    b_u2, rate1, rate2, eps,
):  # fmt: skip
    b_w = tl.load(weight + o, mask=m).to(tl.int32)
    b_r = tl.load(remainder + o, mask=m).to(tl.int32)
    b_p = ((b_w << 16) + b_r).to(tl.float32, bitcast=True)
    b_m = (tl.load(exp_avg + o, mask=m).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    b_v = (tl.load(exp_avg_sq + o, mask=m).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    b_g = tl.load(grad + o, mask=m).to(tl.float32) * b_scale
    b_m += rate1 * (b_g - b_m)
    b_v += rate2 * (b_g * b_g - b_v)
    b_p -= b_lr * ((b_m * b_u1) / (tl.sqrt(b_v * b_u2) + eps) + b_decay * b_p)
    b_bits = b_p.to(tl.int32, bitcast=True)
    b_bits = tl.where(_is_nan(b_bits), 0x7FC00000, b_bits)
    b_w = (b_bits + 0x8000) >> 16
    tl.store(weight + o, b_w.to(tl.int16), mask=m)
    tl.store(remainder + o, (b_bits - (b_w << 16)).to(tl.int16), mask=m)
    b_random = b_random.to(tl.int32, bitcast=True)
    tl.store(exp_avg + o, _stochastic(b_m, b_random), mask=m)
    tl.store(exp_avg_sq + o, _stochastic(b_v, b_random >> 16), mask=m)


@triton.jit
def _adamw_lean_kernel(
    weight,  # (n,) int16, bits of bf16, as exp_avg and exp_avg_sq
    remainder,  # (n,) int16
    exp_avg,  # (n,)
    exp_avg_sq,  # (n,)
    grad,  # (n,) fp32, bf16 or fp16
    lr,  # (1,) fp32
    step,  # (1,) fp32
    grad_scale,  # (1,) fp32
    seed,  # (1,) int64, below 2³²
    n,  # elements
    first,  # index of element 0 in the whole buffer
    decay_until,  # elements before this one decay
    log_beta1,
    log_beta2,
    rate1,  # 1 − β₁
    rate2,  # 1 − β₂
    eps,
    weight_decay,
    GROUP: tl.constexpr,
):
    b_lr = tl.load(lr)
    b_step = tl.load(step)
    b_scale = tl.load(grad_scale)
    b_u1 = unbias(b_step, log_beta1)
    b_u2 = unbias(b_step, log_beta2)

    i_tile = first // (4 * GROUP) + tl.program_id(0).to(tl.int64)
    o_group = tl.arange(0, GROUP)
    i_counter = i_tile * GROUP + o_group
    b_zero = o_group * 0
    b_words = tl.philox(
        tl.load(seed), i_counter.to(tl.uint32), (i_counter >> 32).to(tl.uint32),
        b_zero + b_step.to(tl.int32), b_zero,
    )  # fmt: skip
    i_start = i_tile * (4 * GROUP) - first
    for q in tl.static_range(4):
        o = i_start + q * GROUP + o_group
        b_decay = tl.where(o < decay_until, weight_decay, 0.0)
        if (i_start >= 0) & (i_start + 4 * GROUP <= n):
            _lean_group(
                weight, remainder, exp_avg, exp_avg_sq, grad, o, None, b_words[q], b_decay, b_lr,
                b_scale, b_u1, b_u2, rate1, rate2, eps,
            )  # fmt: skip
        else:
            _lean_group(
                weight, remainder, exp_avg, exp_avg_sq, grad, o, (o >= 0) & (o < n), b_words[q],
                b_decay, b_lr, b_scale, b_u1, b_u2, rate1, rate2, eps,
            )  # fmt: skip


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

    weight, exp_avg, exp_avg_sq (n,) bf16; remainder (n,) int16; grad (n,) fp32, bf16 or fp16;
    decay_until, lr, step, grad_scale as in `adamw_`; seed: one int64 in [0, 2³²) on the device;
    first: where element 0 stands in the buffer that these are a part of. Raises ValueError,
    TypeError.
    """
    check(weight, "weight", dtypes=(torch.bfloat16,), rank=1)
    tensors = {"weight": weight, "remainder": remainder, "exp_avg": exp_avg,
               "exp_avg_sq": exp_avg_sq, "grad": grad}  # fmt: skip
    for name, tensor in tensors.items():
        dtypes = {"remainder": (torch.int16,), "grad": GRADIENTS}.get(name, (torch.bfloat16,))
        check(tensor, name, dtypes=dtypes, shape=weight.shape, device=weight.device)
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: strides {tensor.stride()}, must be contiguous")
    check(seed, "seed", dtypes=(torch.int64,), device=weight.device)
    n = weight.numel()
    if not 0 <= decay_until <= n or first < 0:
        raise ValueError(f"decay_until: {decay_until} of {n}, first: {first}: out of range")
    if n:
        tiles = triton.cdiv(first + n, 4 * GROUP) - first // (4 * GROUP)
        bits = {name: t.view(torch.int16) for name, t in tensors.items() if name != "grad"}
        _adamw_lean_kernel[(tiles,)](
            **bits,
            grad=grad,
            seed=seed,
            n=n,
            first=first,
            decay_until=decay_until,
            GROUP=GROUP,
            **scalars(lr, step, grad_scale, weight.device),
            **rates(betas, eps, weight_decay),
            num_warps=WARPS,
        )


def aot_cases() -> Iterator[AotCase]:
    """Gradients of each dtype; n and the boundary of decay are 64-bit from 2.8B on."""
    streams = dict.fromkeys(("weight", "remainder", "exp_avg", "exp_avg_sq"), "*i16")
    pointers = dict.fromkeys(("lr", "step", "grad_scale"), "*fp32") | {"seed": "*i64"}
    numbers = dict.fromkeys(rates((0.9, 0.95), 1e-8, 0.1), "fp32")
    integers = dict.fromkeys(("n", "first", "decay_until"), "i64")
    for grad in ("fp32", "bf16", "fp16"):
        yield AotCase(
            name=f"gradients {grad}",
            kernel=_adamw_lean_kernel,
            signature=streams | {"grad": f"*{grad}"} | pointers | integers | numbers
            | {"GROUP": "constexpr"},
            constexprs={"GROUP": GROUP},
            num_warps=WARPS,
            wide=(*streams, "grad"),
        )  # fmt: skip
