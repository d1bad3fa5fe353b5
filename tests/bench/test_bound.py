"""The bound tells a small error from a large one, in the largest element and in the norm."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from kernel_proof import Mutant, assert_killed, load_mutant

from bench import bound
from bench.bound import assert_close
from bench.op import Draw, Shape, results
from bench.op_table import find

FILE = "bench/bound.py"


def check(module: ModuleType) -> None:
    """Twice torch's error passes and more does not; the norm sees what absolute slack hides."""
    errors = module.errors
    exact = torch.linspace(-1, 1, 101, dtype=torch.float64)
    same = exact.float() + 1e-3
    assert errors(exact.float() + 1.9e-3, same, exact).within
    assert not errors(exact.float() + 2.1e-3, same, exact).within
    assert errors(exact.float(), exact.float(), exact).largest < 1e-7
    one_off = exact.float()
    one_off[50] += 3e-3
    assert not errors(one_off, same, exact).within
    # a gradient of 1e-8 that is wrong by half passes element by element, not in the norm
    exact = torch.full((1000,), 1e-8, dtype=torch.float64)
    found = errors((1.5 * exact).float(), exact.float(), exact)
    assert found.largest <= found.largest_allowed and not found.within
    assert errors(torch.zeros(0), torch.zeros(0), torch.zeros(0).double()).within
    for bad in (float("nan"), float("inf")):
        found = errors(torch.tensor([1.0, bad]), torch.ones(2), torch.ones(2).double())
        assert not found.within and found.margin == float("inf")
    known = torch.tensor([1.0, float("nan"), 3.0])  # NaN is a result like any other where exact
    assert errors(known, known, known.double()).within
    assert not errors(torch.ones(3), known, known.double()).within
    assert not errors(known + 1, known, known.double()).within
    check_rounding(module)


def check_rounding(module: ModuleType) -> None:
    """One rounding to 16 bits passes, a second one too, and a shift by 2/3 of a unit does not."""
    for dtype in (torch.float16, torch.bfloat16):
        unit = torch.finfo(dtype).eps
        exact = torch.linspace(1, 2, 4096, dtype=torch.float64)
        once = exact.to(dtype)
        assert module.rounding_errors(once, exact).within
        assert module.rounding_errors(((exact + unit).to(dtype) - unit).to(dtype), exact).within
        for wrong in ((exact + 0.65 * unit).to(dtype), (exact - 0.65 * unit).to(dtype)):
            assert not module.rounding_errors(wrong, exact).within
            found = module.errors(wrong, once, exact)
            assert found.within  # which the wider bound lets pass
        # an element that happens to be exact in 16 bits may be off by half a unit, not by two
        one = torch.ones(1, dtype=torch.float64)
        assert module.rounding_errors(one.to(dtype) + unit, one).within
        assert not module.rounding_errors(one.to(dtype) + 3 * unit, one).within
        one_off = once.clone()
        one_off[7] += 4 * unit  # hidden in the norm
        assert not module.rounding_errors(one_off, exact).within
        assert not module.rounding_errors(once.fill_(float("nan")), exact).within
    same = {"a": exact.float(), "b": exact.half()}
    assert module.worst_rounding(same, {"a": exact, "b": exact})[0] == "b"
    assert module.worst_rounding({"a": exact.float()}, {"a": exact}) is None


MUTANTS = [
    Mutant("three times torch", FILE, "2 * _largest(torch_error)", "3 * _largest(torch_error)"),
    Mutant("three roundings", FILE, "2 * max(rounding", "3 * max(rounding"),
    Mutant(
        "16-bit slack for a rounding",
        FILE,
        "slack = ATOL[torch.float32]",
        "slack = ATOL[actual.dtype]",
    ),
    Mutant("no half unit", FILE, "max(rounding, half_unit)", "rounding"),
    Mutant("largest element unbounded", FILE, "exact, 2 * half_unit", "exact, 20 * half_unit"),
    Mutant(
        "fp32 results for 16 bits",
        FILE,
        "if t.dtype in (torch.float16, torch.bfloat16)",
        "if t.dtype",
    ),
    Mutant(
        "any NaN forgiven", FILE, "actual.isnan() & exact.isnan()", "actual.isnan() | exact.isnan()"
    ),
    Mutant("no norm", FILE, " and self.norm <= self.norm_allowed", ""),
    Mutant("no largest", FILE, "self.largest <= self.largest_allowed and ", ""),
    Mutant("absolute norm", FILE, "norm=error.norm().item() / scale", "norm=error.norm().item()"),
    Mutant(
        "nan passes",
        FILE,
        "self.largest <= self.largest_allowed and self.norm <= self.norm_allowed",
        "not (self.largest > self.largest_allowed or self.norm > self.norm_allowed)",
    ),
]


SUMS_IN_16_BITS = [
    Mutant(
        f"{what} kept in 16 bits", "kernels/layer_norm.py", line,
        f"{line}\n        {name} = ({name}[0].to(x.dtype.element_ty).to(tl.float32),)",
    )
    for what, name, line in (
        ("dw", "b_dw1", "b_dw1 = multiply_add_rows(b_dw1, b_dy1, b_xhat)"),
        ("db", "b_db1", "b_db1 = add_rows(b_db1, b_dy1)"),
    )
]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts on three programs of 500 rows each")
@pytest.mark.parametrize("mutant", SUMS_IN_16_BITS, ids=lambda m: m.name)
def test_sums_kept_in_16_bits_pass_the_wide_bound_alone(mutant: Mutant, tmp_path: Path) -> None:
    draw = Draw(torch.device("cpu"))
    op, s = find("layer_norm"), Shape("odd", 1, 1500, layers=1, hidden=128, heads=1, vocab=1)
    inputs = op.inputs(s, torch.float16, draw)
    exact = results(op, op.reference, inputs, torch.float16, torch.float64)
    same = results(op, op.reference, inputs, torch.float16)
    right = results(op, op.kernel, inputs, torch.float16)
    wrong = results(op, load_mutant(mutant, tmp_path).layer_norm, inputs, torch.float16)
    name = f"d_{'weight' if mutant.name.startswith('dw') else 'bias'}"
    assert bound.errors(wrong[name], same[name], exact[name]).within
    assert not bound.rounding_errors(wrong[name], exact[name]).within
    found = bound.worst_rounding(right, exact)
    assert found is not None and found[1].margin < 0.7, found


def test_bound() -> None:
    check(bound)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_is_killed(mutant: Mutant, tmp_path: Path) -> None:
    assert_killed(mutant, check, tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_is_said(bad: float) -> None:
    actual = torch.tensor([1.0, 1.0, bad, 1.0])
    with pytest.raises(AssertionError, match="not finite"):
        assert_close(actual, torch.ones(4), torch.ones(4).double())


def test_shapes_must_agree() -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_close(torch.ones(3), torch.ones(4), torch.ones(4).double())
