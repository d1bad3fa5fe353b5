"""The error bound of every kernel, in tests, in the GPU check and before each timing.

A kernel may err against float64 at most twice as much as plain torch errs in the same dtype, plus a
small term, in the largest element (flash-attention's bound). On real shapes the same is asked of
the 2-norms, relative to that of the exact result: free of scale, it sees an error in a gradient of
1/tokens as well as in a loss of ten.

That is wide for what a kernel computes in fp32 and rounds to 16 bits at its end, above all for sums
over many rows: torch may be careless there, and ATOL grants several roundings. `rounding_errors`
asks more: twice the error of the exact result's own rounding (one more rounding on the way), and
fp32's slack.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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

    @property
    def margin(self) -> float:
        """How much of the bound is used up, beyond 1 where it is broken; infinite for a NaN."""
        parts = ((self.largest, self.largest_allowed), (self.norm, self.norm_allowed))
        ratios = [error / allowed if allowed else error and math.inf for error, allowed in parts]
        return max(math.inf if math.isnan(r) else r for r in ratios)


def errors(
    actual: Tensor, torch_same: Tensor, exact: Tensor, dtype: torch.dtype | None = None
) -> Errors:
    """actual: the kernel's; torch_same: plain torch in the dtype under test; exact: float64.

    dtype: whose ATOL is granted, torch_same's where None. A NaN is within only where the exact
    result is one, an infinity never.
    """
    torch_error = _error(torch_same, exact)
    slack = ATOL[dtype or torch_same.dtype]
    return _errors(actual, exact, 2 * _largest(torch_error), 2 * torch_error.norm().item(), slack)


def rounding_errors(actual: Tensor, exact: Tensor) -> Errors:
    """The same for a result in 16 bits that was computed in fp32 and rounded at its end.

    Half a unit in the last place of the largest element is granted where the exact result happens
    to be rounded by less, as a single element may be.
    """
    rounding = _error(exact.to(actual.dtype), exact).norm().item()
    half_unit = torch.finfo(actual.dtype).eps / 2 * _largest(_known(exact))
    slack = ATOL[torch.float32]
    return _errors(actual, exact, 2 * half_unit, 2 * max(rounding, half_unit), slack)


def worst_rounding(
    actual: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> tuple[str, Errors] | None:
    """Of the results in 16 bits, the one nearest to that bound or beyond it; None if none is."""
    half = [name for name, t in actual.items() if t.dtype in (torch.float16, torch.bfloat16)]
    found = {name: rounding_errors(actual[name], exact[name]) for name in half}
    return max(found.items(), key=lambda item: item[1].margin, default=None)


def _errors(actual: Tensor, exact: Tensor, largest: float, norm: float, slack: float) -> Errors:
    """largest, norm: allowed beside the slack, which counts on values of order one."""
    error, known = _error(actual, exact), _known(exact)
    size, scale = _largest(known), known.norm().item() or 1.0
    return Errors(
        largest=_largest(error),
        largest_allowed=largest + slack * max(1.0, size),
        norm=error.norm().item() / scale,
        norm_allowed=norm / scale + slack,
    )


def _error(actual: Tensor, exact: Tensor) -> Tensor:
    """|actual − exact|, 0 where both are NaN."""
    error = (exact - actual).abs_()  # in float64; logits are gigabytes of it
    return error.masked_fill_(actual.isnan() & exact.isnan(), 0.0)


def _known(exact: Tensor) -> Tensor:
    unknown = exact.isnan()
    return torch.where(unknown, 0.0, exact) if unknown.any() else exact


def _largest(t: Tensor) -> float:
    return torch.linalg.vector_norm(t, math.inf).item() if t.numel() else 0.0


def assert_close(actual: Tensor, torch_same: Tensor, exact: Tensor, what: str = "") -> None:
    """Shape, finiteness and the bound on the largest element; the message says by how much not."""
    assert actual.shape == exact.shape, f"{what}: shape {actual.shape}, expected {exact.shape}"
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    found = errors(actual, torch_same, exact)
    assert found.largest <= found.largest_allowed, (
        f"{what}: error {found.largest:.3g} exceeds {found.largest_allowed:.3g}"
    )
