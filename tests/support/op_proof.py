"""An op against its reference: outputs and every gradient, within the bound of `kernel_proof`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from kernel_proof import assert_close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from bench.bound import rounding_errors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter gets bf16 wrong, so that dtype is for a GPU
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)
DTYPES = [torch.float32, torch.float16, BF16]


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype)


def scalar(value: float) -> Tensor:
    """(1,) fp32: what the optimizer's kernels read on the device."""
    return torch.tensor([value], dtype=torch.float32, device=DEVICE)


def wide_slice(t: Tensor, before: int = 16, after: int = 32) -> Tensor:
    """t's values as columns [before, before + h) of a wider buffer that is NaN elsewhere."""
    buffer = torch.full((*t.shape[:-1], before + t.shape[-1] + after), float("nan"))
    buffer = buffer.to(t.device, t.dtype)
    view = buffer[..., before : before + t.shape[-1]]
    view.copy_(t)
    return view


def outputs_and_grads(
    op: Callable[..., Tensor | tuple[Tensor, ...]],
    args: Sequence[Tensor],
    cotangents: Sequence[Tensor],
) -> list[Tensor]:
    """Outputs of op(*args), then the gradient of each argument."""
    leaves = [a.detach().requires_grad_() for a in args]
    out = op(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    return [*outs, *torch.autograd.grad(outs, leaves, list(cotangents))]


def prove(
    op: Callable[..., Tensor | tuple[Tensor, ...]],
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    args: Sequence[Tensor],
    cotangents: Sequence[Tensor],
) -> None:
    """op in the arguments' dtype, beside plain torch in that dtype and in float64.

    args and cotangents may be strided views; all arguments are differentiated.
    """
    actual = outputs_and_grads(op, args, cotangents)
    same = outputs_and_grads(reference, args, cotangents)
    exact = outputs_and_grads(
        reference, [a.double() for a in args], [c.double() for c in cotangents]
    )
    for i, (a, s, e) in enumerate(zip(actual, same, exact, strict=True)):
        assert a.dtype == s.dtype, f"result {i}: {a.dtype}, expected {s.dtype}"
        what = f"result {i} of {len(cotangents)} outputs and {len(args)} gradients"
        assert_close(a, s, e, what)
        if a.dtype != torch.float32:
            found = rounding_errors(a, e)
            assert found.within, f"{what}: more than fp32 rounded at the end: {found}"


def far_rows(rows: Tensor) -> Tensor:
    """rows (3, n) at a row stride of 2³⁰ elements, so that the last lies 2³¹ elements in.

    Memory that nobody touches costs nothing on a CPU; skips where even the address space is short.
    """
    try:
        buffer = torch.empty(2**31 + rows.shape[1], dtype=rows.dtype, device=rows.device)
    except RuntimeError:
        pytest.skip("needs 4 GiB of address space")
    view = buffer.as_strided(rows.shape, (2**30, 1))
    return view.copy_(rows)


class Allocations(TorchDispatchMode):
    """Bytes of every storage that operations make anew, freed ones included."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}  # fmt: skip
        for t in tree_iter(out):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given:
                self.sizes.append(t.untyped_storage().nbytes())
        return out
