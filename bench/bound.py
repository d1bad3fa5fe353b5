"""The error bound of every kernel, in tests, in the GPU check and before each timing.

A kernel may err against float64 at most twice as much as plain torch errs in the same dtype, plus a
small term, in the largest element (flash-attention's bound). On real shapes the same is asked of
the 2-norms, relative to that of the exact result: free of scale, it sees an error in a gradient of
1/tokens as well as in a loss of ten.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# absolute slack by dtype, on values of order one
ATOL = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Errors:
    """max|actual − exact| against what it may be, and the same of the 2-norms over ‖exact‖₂."""

    largest: float
    largest_allowed: float
    norm: float
    norm_allowed: float

    @property
    def within(self) -> bool:
        return self.largest <= self.largest_allowed and self.norm <= self.norm_allowed


def errors(
    actual: Tensor, torch_same: Tensor, exact: Tensor, dtype: torch.dtype | None = None
) -> Errors:
    """actual: the kernel's; torch_same: plain torch in the dtype under test; exact: float64.

    dtype: whose ATOL is granted, torch_same's where None. A NaN or an infinity is never within.
    """
    if actual.numel() == 0:
        return Errors(0.0, 0.0, 0.0, 0.0)
    slack = ATOL[dtype or torch_same.dtype]
    error = (actual.double() - exact).abs()
    torch_error = (torch_same.double() - exact).abs()
    size, norm = exact.abs().max().item(), exact.norm().item()
    return Errors(
        largest=error.max().item(),
        largest_allowed=2 * torch_error.max().item() + slack * max(1.0, size),
        norm=error.norm().item() / norm if norm else error.norm().item(),
        norm_allowed=(2 * torch_error.norm().item() / norm if norm else 0.0) + slack,
    )


def assert_close(actual: Tensor, torch_same: Tensor, exact: Tensor, what: str = "") -> None:
    """Shape, finiteness and the bound on the largest element; the message says by how much not."""
    assert actual.shape == exact.shape, f"{what}: shape {actual.shape}, expected {exact.shape}"
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    found = errors(actual, torch_same, exact)
    assert found.largest <= found.largest_allowed, (
        f"{what}: error {found.largest:.3g} exceeds {found.largest_allowed:.3g}"
    )
