"""How a kernel is proved without a GPU: an honest error bound, and mutants that must be killed.

The bound (flash-attention's, for any dtype): the kernel may err against float64 at most twice as
much as plain torch errs in the same dtype, plus a small absolute term.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]

# absolute slack by dtype, on values of order one
ATOL = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def assert_close(actual: Tensor, torch_same: Tensor, exact: Tensor, what: str = "") -> None:
    """max|actual − exact| ≤ 2·max|torch_same − exact| + ATOL·max(1, max|exact|), and no NaN.

    actual: the kernel's; torch_same: plain torch in the dtype under test; exact: float64.
    """
    assert actual.shape == exact.shape, f"{what}: shape {actual.shape}, expected {exact.shape}"
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    if actual.numel() == 0:
        return
    error = (actual.double() - exact).abs().max().item()
    allowed = 2 * (torch_same.double() - exact).abs().max().item()
    allowed += ATOL[torch_same.dtype] * max(1.0, exact.abs().max().item())
    assert error <= allowed, f"{what}: error {error:.3g} exceeds {allowed:.3g}"


@dataclass(frozen=True)
class Mutant:
    """One deliberate fault: `old` stands exactly once in `file` and becomes `new`."""

    name: str
    file: str  # relative to the repository, e.g. "kernels/rotary.py"
    old: str
    new: str


def load_mutant(mutant: Mutant, tmp_path: Path) -> ModuleType:
    """The mutated file as a module of its own, beside the real one (Triton reads its source)."""
    source = (REPOSITORY / mutant.file).read_text()
    assert source.count(mutant.old) == 1, (
        f"mutant {mutant.name!r}: its text stands {source.count(mutant.old)} times in {mutant.file}"
    )
    stem = Path(mutant.file).stem
    path = tmp_path / f"{stem}_mutant.py"
    path.write_text(source.replace(mutant.old, mutant.new))
    package = ".".join(Path(mutant.file).with_suffix("").parts)
    package = (
        package.replace("kernels", "pythia_fast.kernels", 1)
        if package.startswith("kernels")
        else package
    )
    spec = importlib.util.spec_from_file_location(f"{package}_mutant", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


def assert_killed(mutant: Mutant, check: Callable[[ModuleType], None], tmp_path: Path) -> None:
    """`check(module)` passes on the real file elsewhere; on the mutant it must raise."""
    module = load_mutant(mutant, tmp_path)
    try:
        check(module)
    except Exception:
        return
    raise AssertionError(f"mutant {mutant.name!r} survived")
