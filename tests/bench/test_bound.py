"""The bound tells a small error from a large one, in the largest element and in the norm."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from kernel_proof import Mutant, assert_killed

from bench import bound
from bench.bound import assert_close

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
        assert not errors(torch.tensor([1.0, bad]), torch.ones(2), torch.ones(2).double()).within


MUTANTS = [
    Mutant("three times torch", FILE, "2 * torch_error.max()", "3 * torch_error.max()"),
    Mutant("no norm", FILE, " and self.norm <= self.norm_allowed", ""),
    Mutant("no largest", FILE, "self.largest <= self.largest_allowed and ", ""),
    Mutant("absolute norm", FILE, "norm=error.norm().item() / norm if norm else", "norm="),
    Mutant(
        "nan passes",
        FILE,
        "self.largest <= self.largest_allowed and self.norm <= self.norm_allowed",
        "not (self.largest > self.largest_allowed or self.norm > self.norm_allowed)",
    ),
]


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
