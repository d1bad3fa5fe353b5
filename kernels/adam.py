"""AdamW over one flat buffer, or over a list of tensors, in one launch; and the gradient's norm.

    g = grad·grad_scale     m = β₁m + (1−β₁)g     v = β₂v + (1−β₂)g²
    master −= lr·( (m/(1−β₁ᵗ)) / (√(v/(1−β₂ᵗ)) + eps) + wd·master )        weight = master

Forward only: the arguments are the state. All arithmetic is fp32; on a GPU the division and the
square root of the update are within 2 ulp. lr, t and grad_scale (the clip factor) are read on the
device and the bias corrections computed there, 1 − βᵗ = −expm1(t·ln β), so nothing waits for the
host and a step can be captured in a CUDA graph. m and v move as m + (1−β)(g − m), which needs no
rounded β.

Bytes a parameter: 30 with 16-bit weights and fp32 gradients (master, m, v read and written, 24;
gradient read, 4; weight written, 2), 28 without weights, 2 fewer with bf16 gradients; `grad_norm`
reads the gradient once more, 4 or 2. About 25 FLOPs a parameter: bound by memory bandwidth. There
is no pass that clears the gradient: the first microbatch of a step overwrites it.

Loads in flight (sm_90): a thread has 8 elements of each stream, 7 or 8 independent loads of 16
bytes, 126 to 168 KB an SM (the list form 96 KB or more); `grad_norm` has 8 of fp32 and 4 of bf16,
144 and 72 KB. Only a last tile that is not full is masked. Offsets are 64-bit.

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
CHUNK = 32768  # parameters of one tensor that a program of the list form walks
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
    grad,  # (n,) fp32 or bf16
    lr,  # (1,) fp32
    step,  # (1,) fp32
    grad_scale,  # (1,) fp32
    n,
    decay_until,
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
def address(p_entry, dtype: tl.constexpr, ALIGN: tl.constexpr):
    """The pointer whose address (int64) stands at p_entry."""
    return tl.multiple_of(tl.load(p_entry).to(tl.pointer_type(dtype)), ALIGN)


@triton.jit
def _adamw_list_kernel(
    table,  # (T, 7) int64: addresses of weight (0: none), master, m, v, grad; n; decays
    chunks,  # (C, 2) int32: tensor, chunk of it
    lr,  # (1,) fp32
    step,  # (1,) fp32
    grad_scale,  # (1,) fp32
    log_beta1,
    log_beta2,
    rate1,
    rate2,
    eps,
    weight_decay,
    WEIGHT: tl.constexpr,  # dtype of the weights, or None
    GRAD: tl.constexpr,  # dtype of the gradients
    ALIGN: tl.constexpr,  # every address is a multiple of this
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b_lr = tl.load(lr)
    b_step = tl.load(step)
    b_scale = tl.load(grad_scale)
    b_u1 = unbias(b_step, log_beta1)
    b_u2 = unbias(b_step, log_beta2)

    p_row = table + tl.load(chunks + 2 * tl.program_id(0)) * 7
    weight = None
    if WEIGHT is not None:
        weight = address(p_row, WEIGHT, ALIGN)
    master = address(p_row + 1, tl.float32, ALIGN)
    exp_avg = address(p_row + 2, tl.float32, ALIGN)
    exp_avg_sq = address(p_row + 3, tl.float32, ALIGN)
    grad = address(p_row + 4, GRAD, ALIGN)
    n = tl.load(p_row + 5)
    b_decay = weight_decay * tl.load(p_row + 6).to(tl.float32)

    i_chunk = tl.load(chunks + 2 * tl.program_id(0) + 1).to(tl.int64) * CHUNK
    for i_tile in range(0, tl.minimum(n - i_chunk, CHUNK).to(tl.int32), BLOCK):
        o = i_chunk + i_tile + tl.arange(0, BLOCK)
        if i_chunk + i_tile + BLOCK <= n:
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
    n,
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
    P,
    BLOCK: tl.constexpr,
):
    o = tl.arange(0, BLOCK)
    b_sum = tl.sum(tl.load(partials + o, mask=o < P, other=0.0), axis=0)
    tl.store(norm, tl.sqrt_rn(b_sum))


def grad_norm(grad: Tensor) -> Tensor:
    """√Σg², an fp32 scalar on grad's device. grad: flat (n,), fp32 or bf16. Deterministic."""
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

    master, exp_avg, exp_avg_sq (n,) fp32; grad (n,) fp32 or bf16; weight (n,) bf16 or fp16, or None
    when the model computes on master itself. Elements [0, decay_until) decay, the rest do not.
    lr, step (t, the count of this step, ≥ 1) and grad_scale are one-element fp32 tensors on the
    same device. Raises ValueError, TypeError.
    """
    check(master, "master", dtypes=(torch.float32,), rank=1)
    _check_state(weight, master, exp_avg, exp_avg_sq, grad)
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
            **_scalars(lr, step, grad_scale, master.device),
            **_rates(betas, eps, weight_decay),
            num_warps=WARPS,
        )


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
    """`adamw_` over tensors that do not share a buffer, in one launch through a table of addresses.

    The lists are of equal length, entry i of one shape and contiguous; dtypes as in `adamw_`, one
    for all weights and one for all gradients. decays[i]: whether weight decay applies to tensor i.
    Checks, table and copy are paid at every call: a training loop keeps an `AdamWList`, which a
    CUDA graph needs (RuntimeError here during its capture).
    """
    tensors = AdamWList(weights, masters, exp_avgs, exp_avg_sqs, grads, decays)
    tensors.step_(lr, step, grad_scale, betas, eps, weight_decay)


class AdamWList:
    """The tensors of `adamw_list_`, checked once, and the table of their addresses on the device.

    Holds tensors and table, so both live as long as it does: keep it with the CUDA graph that
    captured its `step_`. A tensor that is replaced, say a gradient made anew, needs a new one. The
    table is copied on the current stream; another stream must wait for it before `step_`.
    """

    def __init__(
        self,
        weights: list[Tensor] | None,
        masters: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        grads: list[Tensor],
        decays: list[bool],
    ) -> None:
        """Arguments as in `adamw_list_`. Raises ValueError, TypeError, RuntimeError (a capture)."""
        _check_lists(weights, masters, exp_avgs, exp_avg_sqs, grads, decays)
        self.columns = (weights, masters, exp_avgs, exp_avg_sqs, grads)
        rows = [
            [*(0 if c is None else c[i].data_ptr() for c in self.columns), p.numel(), int(decay)]
            for i, (p, decay) in enumerate(zip(masters, decays, strict=True))
            if p.numel()
        ]
        if not rows:
            self.chunks = None
            return
        device = masters[0].device
        if _capturing(device):
            raise RuntimeError(
                "adamw_list_: its table of addresses is copied from the host, which a CUDA graph"
                " cannot capture; make an AdamWList before, and capture its step_"
            )
        addresses = [a for row in rows for a in row[:5] if a]
        if len(set(addresses)) < len(addresses):
            raise ValueError("masters, exp_avgs, exp_avg_sqs, grads, weights: two share memory")
        self.table = _to_device(torch.tensor(rows, dtype=torch.int64), device)  # (T, 7)
        self.chunks = _to_device(_chunks(torch.tensor([row[5] for row in rows])), device)
        self.types = {
            "WEIGHT": None if weights is None else _TRITON[weights[0].dtype],
            "GRAD": _TRITON[grads[0].dtype],
            "ALIGN": 16 if all(a % 16 == 0 for a in addresses) else 2,
        }

    def step_(
        self,
        lr: Tensor,
        step: Tensor,
        grad_scale: Tensor,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        """One AdamW step of every tensor, in place and in one launch; arguments as in `adamw_`."""
        if self.chunks is not None:
            _adamw_list_kernel[(self.chunks.shape[0],)](
                table=self.table,
                chunks=self.chunks,
                **self.types,
                CHUNK=CHUNK,
                BLOCK=BLOCK,
                **_scalars(lr, step, grad_scale, self.chunks.device),
                **_rates(betas, eps, weight_decay),
                num_warps=WARPS,
            )


def _chunks(sizes: Tensor) -> Tensor:
    """(tensor, chunk of it) of every program, (C, 2) int32, for sizes (T,) of at least 1."""
    counts = (sizes + CHUNK - 1) // CHUNK
    tensor = torch.arange(len(sizes)).repeat_interleave(counts)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return torch.stack((tensor, torch.arange(len(tensor)) - first), dim=1).int()


def _to_device(host: Tensor, device: torch.device) -> Tensor:
    """From pinned memory, so that the host does not wait; the allocator keeps that until copied."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _check_lists(weights, masters, exp_avgs, exp_avg_sqs, grads, decays) -> None:
    lists = {"masters": masters, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "grads": grads}
    lists |= {"decays": decays} | ({} if weights is None else {"weights": weights})
    for name, entries in lists.items():
        if len(entries) != len(masters):
            raise ValueError(f"{name}: {len(entries)} entries, masters has {len(masters)}")
    for i, master in enumerate(masters):
        check(master, f"masters[{i}]", dtypes=(torch.float32,), device=masters[0].device)
        weight = None if weights is None else weights[i]
        _check_state(weight, master, exp_avgs[i], exp_avg_sqs[i], grads[i], f"s[{i}]")
        for name, of in (("weights", weights), ("grads", grads)):
            if of is not None and of[i].dtype != of[0].dtype:
                raise TypeError(f"{name}[{i}]: dtype {of[i].dtype}, {name}[0] has {of[0].dtype}")


def _check_state(weight, master, exp_avg, exp_avg_sq, grad, suffix: str = "") -> None:
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


def _scalars(lr: Tensor, step: Tensor, grad_scale: Tensor, device: torch.device):
    scalars = {"lr": lr, "step": step, "grad_scale": grad_scale}
    for name, tensor in scalars.items():
        check(tensor, name, dtypes=(torch.float32,), device=device)
        if tensor.numel() != 1:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected one element")
    return scalars


def _rates(betas: tuple[float, float], eps: float, weight_decay: float) -> dict[str, float]:
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


GRADIENTS: Sequence[torch.dtype] = (torch.float32, torch.bfloat16)
_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def aot_cases() -> Iterator[AotCase]:
    """Flat buffers of every kind; n and the boundary of decay are 64-bit from 2.8B on."""
    scalars = dict.fromkeys(("lr", "step", "grad_scale"), "*fp32")
    rates = dict.fromkeys(_rates((0.9, 0.95), 1e-8, 0.1), "fp32")
    state = dict.fromkeys(("master", "exp_avg", "exp_avg_sq"), "*fp32")
    for weight in ("bf16", "fp16", None):
        for grad in ("fp32", "bf16"):
            streams = {"weight": f"*{weight}" if weight else "constexpr", **state}
            signature = (
                streams | {"grad": f"*{grad}"} | scalars | {"n": "i64", "decay_until": "i64"}
            )
            constexprs = {"BLOCK": BLOCK} | ({} if weight else {"weight": None})
            yield AotCase(
                name=f"weights {weight}, gradients {grad}",
                kernel=_adamw_kernel,
                signature=signature | rates | {"BLOCK": "constexpr"},
                constexprs=constexprs,
                num_warps=WARPS,
                wide=tuple(n for n in (*streams, "grad") if signature[n] != "constexpr"),
            )
    for weight, grad in ((tl.bfloat16, tl.float32), (tl.float16, tl.float32), (None, tl.float32)):
        constexprs = {"WEIGHT": weight, "GRAD": grad, "ALIGN": 16, "CHUNK": CHUNK, "BLOCK": BLOCK}
        signature = {"table": "*i64", "chunks": "*i32"} | scalars | rates
        yield AotCase(
            name=f"list, weights {weight}, gradients {grad}",
            kernel=_adamw_list_kernel,
            signature=signature | dict.fromkeys(constexprs, "constexpr"),
            constexprs=constexprs,
            num_warps=WARPS,
            wide=("?",),  # addresses from memory; only a tensor's last tile is element by element
            narrow={"?": {"ld32": 32, "st32": 24} | ({"st16": 8} if weight else {})},
        )
    for grad in ("fp32", "bf16"):
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
