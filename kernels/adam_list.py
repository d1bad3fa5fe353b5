"""AdamW over a list of tensors in one launch, through a table of their addresses.

    g = grad·grad_scale     m = β₁m + (1−β₁)g     v = β₂v + (1−β₂)g²
    master −= lr·( (m/(1−β₁ᵗ)) / (√(v/(1−β₂ᵗ)) + eps) + wd·master )        weight = master

The update of a tile, its precision and its scalars on the device are those of `adam.py`, to the
bit. What is added: a program reads its tensor and chunk (CHUNK parameters of one tensor), then the
addresses, size and decay of that tensor, and walks the chunk. Only a tensor's last tile that is not
full is masked. Addresses that are all multiples of 16 give accesses of 128 bits; one that is not
makes all of them narrow.

Bytes a parameter: 30 with 16-bit weights and fp32 gradients (master, m, v read and written, 24;
gradient read, 4; weight written, 2), 28 without weights, 2 fewer with 16-bit gradients; the tables
add 56 a tensor and 8 a chunk. About 25 FLOPs a parameter: bound by memory bandwidth.

Loads in flight (sm_90): a thread has 8 elements of each stream, 96 KB an SM or more.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from pythia_fast.kernels.adam import (
    BLOCK,
    WARPS,
    adamw_tile,
    check_state,
    rates,
    scalars,
    unbias,
)
from pythia_fast.kernels.aot_case import AotCase
from pythia_fast.kernels.checks import check

CHUNK = 32768  # parameters of one tensor that a program walks

_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


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
                **scalars(lr, step, grad_scale, self.chunks.device),
                **rates(betas, eps, weight_decay),
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
        check_state(weight, master, exp_avgs[i], exp_avg_sqs[i], grads[i], f"s[{i}]")
        for name, of in (("weights", weights), ("grads", grads)):
            if of is not None and of[i].dtype != of[0].dtype:
                raise TypeError(f"{name}[{i}]: dtype {of[i].dtype}, {name}[0] has {of[0].dtype}")


def aot_cases() -> Iterator[AotCase]:
    """Lists whose addresses are all multiples of 16, as the allocator makes them."""
    signature = {"table": "*i64", "chunks": "*i32"}
    signature |= dict.fromkeys(("lr", "step", "grad_scale"), "*fp32")
    signature |= dict.fromkeys(rates((0.9, 0.95), 1e-8, 0.1), "fp32")
    for weight, grad in ((tl.bfloat16, tl.float32), (tl.float16, tl.float32), (None, tl.float32)):
        constexprs = {"WEIGHT": weight, "GRAD": grad, "ALIGN": 16, "CHUNK": CHUNK, "BLOCK": BLOCK}
        yield AotCase(
            name=f"weights {weight}, gradients {grad}",
            kernel=_adamw_list_kernel,
            signature=signature | dict.fromkeys(constexprs, "constexpr"),
            constexprs=constexprs,
            num_warps=WARPS,
            wide=("?",),  # addresses from memory; only a tensor's last tile is element by element
            narrow={"?": {"ld32": 32, "st32": 24} | ({"st16": 8} if weight else {})},
        )
