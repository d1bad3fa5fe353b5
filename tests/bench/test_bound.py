"""The bound tells a small error from a large one, in the largest element and in the norm."""

from __future__ import annotations

import pytest
import torch

from bench.bound import assert_close, errors


def test_bound_is_twice_torch_and_a_little() -> None:
    exact = torch.linspace(-1, 1, 101, dtype=torch.float64)
    same = exact.float() + 1e-3
    assert errors(exact.float() + 1.9e-3, same, exact).within
    assert not errors(exact.float() + 2.1e-3, same, exact).within
    assert errors(exact.float(), exact.float(), exact).largest < 1e-7


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_is_never_within(bad: float) -> None:
    exact = torch.ones(4, dtype=torch.float64)
    actual = torch.tensor([1.0, 1.0, bad, 1.0])
    assert not errors(actual, exact.float(), exact).within
    with pytest.raises(AssertionError, match="not finite"):
        assert_close(actual, exact.float(), exact)


def test_norm_sees_what_the_absolute_slack_hides() -> None:
    """A gradient of 1e-6 that is wrong by half passes element by element, not in the norm."""
    exact = torch.full((1000,), 1e-6, dtype=torch.float64)
    found = errors((1.5 * exact).float(), exact.float(), exact)
    assert found.largest <= found.largest_allowed and not found.within
    assert errors(torch.zeros(0), torch.zeros(0), torch.zeros(0).double()).within


def test_shapes_must_agree() -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_close(torch.ones(3), torch.ones(4), torch.ones(4).double())
