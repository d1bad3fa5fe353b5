"""linear_cross_entropy against the reference: chunks, fp32 accumulation, memory, mutants."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_proof import Mutant, assert_close, assert_killed
from op_proof import DEVICE, DTYPES, Allocations, normal, wide_slice
from torch import Tensor

from pythia_fast.kernels import linear_cross_entropy as kernels
from pythia_fast.kernels import reference

FILE = "kernels/linear_cross_entropy.py"
MUTANTS = [
    Mutant("last chunk too long", FILE, "min(start + step, rows))", "min(start + step, rows - 1))"),
    Mutant("every chunk's targets are the first's", FILE, "targets[chunk], scale", "targets[: len(logits)], scale"),
    Mutant("dx always at the start", FILE, "out=dx[chunk]", "out=dx[: len(logits)]"),
    Mutant("weight gradient of the last chunk only", FILE, "start > 0 or add)", "add)"),
    Mutant("weight_grad overwritten", FILE, "start > 0 or add)", "start > 0)"),
    Mutant("weight_grad never overwritten", FILE, "start > 0 or add)", "start > 0 or weight_grad is not None)"),
    Mutant("dW of the whole x", FILE, "logits.t(), x[chunk], start", "logits.t(), x[: len(logits)], start"),
    Mutant("weight gradient in the narrow dtype", FILE, "total.addmm_(a.float(), b.float(), beta=beta)", "total.copy_(total.to(a.dtype) * beta + (a @ b))"),
    Mutant("incoming gradient ignored", FILE, "cross_entropy_bwd(gradient, dloss)", "cross_entropy_bwd(gradient, dloss * 0 + 1)"),
    Mutant("wrong incoming gradient not told", FILE, "torch.where(dloss == 1, dloss, torch.nan)", "dloss"),
    Mutant("no loss without a gradient", FILE, "[0].sum()", "[0].sum() * 0"),
    Mutant("a buffer for each chunk", FILE, "out=buffer[: chunk.stop - start]", "out=torch.empty_like(buffer[: chunk.stop - start])"),
]  # fmt: skip


def inputs(rows: int, h: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = normal(rows, h, dtype=dtype), normal(columns, h, dtype=dtype, scale=h**-0.5)
    return x, weight, torch.randint(columns, (rows,), device=DEVICE)


def results(op, x: Tensor, weight: Tensor, targets: Tensor, dloss: float = 1.0, **options):
    """(loss, dx, dW) of dloss · loss."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = op(x, weight, targets, **options)
    grads = torch.autograd.grad(loss, (x, weight), torch.tensor(dloss, device=x.device))
    return loss.detach(), *grads


def prove(module: ModuleType, x, weight, targets, dloss=1.0, scale=None, chunk_rows=None) -> None:
    exact = results(
        reference.linear_cross_entropy, x.double(), weight.double(), targets, dloss, scale=scale
    )
    same = results(reference.linear_cross_entropy, x, weight, targets, dloss, scale=scale)
    actual = results(
        module.linear_cross_entropy, x, weight, targets, dloss, scale=scale, chunk_rows=chunk_rows
    )
    for what, a, s, e in zip(("loss", "dx", "dW"), actual, same, exact, strict=True):
        assert a.dtype == s.dtype, what
        assert_close(a, s, e, what)
    with torch.no_grad():
        loss = module.linear_cross_entropy(x, weight, targets, scale, chunk_rows)
        torch.testing.assert_close(loss, actual[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_rows", [None, 16, 64, 100])
@pytest.mark.parametrize("rows,columns", [(1, 50), (63, 50), (65, 1000)])
@pytest.mark.usefixtures("poison")
def test_loss_and_gradients(
    rows: int, columns: int, chunk_rows: int | None, dtype: torch.dtype
) -> None:
    prove(kernels, *inputs(rows, 24, columns, dtype), chunk_rows=chunk_rows, scale=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,h", [(257, 96), (5, 768), (65, 1000), (3, 2560)])
@pytest.mark.usefixtures("poison")
def test_hidden_sizes(rows: int, h: int, dtype: torch.dtype) -> None:
    prove(kernels, *inputs(rows, h, 50, dtype), chunk_rows=64, scale=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poison")
def test_a_pythia_vocabulary(dtype: torch.dtype) -> None:
    prove(kernels, *inputs(3, 16, 50304, dtype), chunk_rows=2, scale=1.0)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 12),
    h=st.integers(1, 40),
    columns=st.integers(1, 80),
    chunk_rows=st.none() | st.integers(1, 14),
    sliced=st.booleans(),
)
def test_any_shape(rows: int, h: int, columns: int, chunk_rows: int | None, sliced: bool) -> None:
    x, weight, targets = inputs(rows, h, columns, torch.float32)
    x = wide_slice(x, 1, 2) if sliced else x
    prove(kernels, x, weight, targets, dloss=-2.0, scale=1.0, chunk_rows=chunk_rows)


def check_weight_grad(
    module: ModuleType, dtype: torch.dtype, chunk_rows: int | None, stays: bool = True
) -> None:
    """Two microbatches add up in fp32; what stood there stays or goes; the weight gets none."""
    first, second = inputs(20, 24, 50, dtype), inputs(20, 24, 50, dtype)
    weight = first[1].requires_grad_()
    total = torch.full((50, 24), 3.0, device=DEVICE)
    if not stays:
        total.fill_(float("nan"))
    exact = total.double() if stays else torch.zeros(50, 24, device=DEVICE).double()
    same = exact.to(dtype)
    for add, (x, _, targets) in zip((stays, True), (first, second), strict=True):
        x.requires_grad_()
        options = {"scale": 1.0, "chunk_rows": chunk_rows, "weight_grad": total, "add": add}
        module.linear_cross_entropy(x, weight, targets, **options).backward()
        wide = results(
            reference.linear_cross_entropy, x.double(), weight.double(), targets, scale=1.0
        )
        narrow = results(reference.linear_cross_entropy, x, weight, targets, scale=1.0)
        exact, same = exact + wide[2], same + narrow[2]
        assert x.grad is not None
        assert_close(x.grad, narrow[1], wide[1], "dx")
    assert weight.grad is None
    assert_close(total, same, exact, "dW")
    if dtype == torch.float16:  # only dlogits were rounded: well below the sums in fp16
        error, of_torch = ((t.double() - exact).abs().max() for t in (total, same))
        assert error < of_torch / 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_rows", [None, 7])
@pytest.mark.usefixtures("poison")
def test_weight_grad(chunk_rows: int | None, dtype: torch.dtype) -> None:
    for stays in (True, False):
        check_weight_grad(kernels, dtype, chunk_rows, stays)


def check_wrong_incoming_gradient(module: ModuleType) -> None:
    x, weight, targets = inputs(4, 24, 50, torch.float32)
    x.requires_grad_()
    total = torch.zeros(50, 24, device=DEVICE)
    loss = module.linear_cross_entropy(x, weight.requires_grad_(), targets, weight_grad=total)
    (2 * loss).backward()
    assert x.grad is not None and torch.isnan(x.grad).all()


@pytest.fixture
def no_check_of_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's check allocates; a GPU has none."""
    monkeypatch.setattr("pythia_fast.kernels.cross_entropy.check_targets", lambda *_: None)


def check_memory(module: ModuleType) -> None:
    """All that is ever allocated: the sum of the docstring, and a few numbers a row and chunk."""
    rows, h, columns = 16, 32, 1000
    x, weight, targets = inputs(rows, h, columns, torch.float32)
    for step in (4, 16):
        for total in (None, torch.zeros(columns, h, device=DEVICE)):
            leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
            with Allocations() as forward:
                options = {"chunk_rows": step, "weight_grad": total}
                loss = module.linear_cross_entropy(*leaves, targets, **options)
            bound = step * columns * 4 + rows * h * 4 + 4 * rows
            bound += 0 if total is not None else 4 * columns * h
            slack = 4 * rows + 64 * (rows // step + 1)
            assert sum(forward.sizes) <= bound + slack, (sum(forward.sizes), bound)
            with Allocations() as backward:
                loss.backward()
            assert sum(backward.sizes) <= 64
            with torch.no_grad(), Allocations() as alone:
                module.linear_cross_entropy(*leaves, targets, chunk_rows=step)
            assert sum(alone.sizes) <= step * columns * 4 + 4 * rows + slack


@pytest.mark.usefixtures("no_check_of_targets")
def test_memory() -> None:
    check_memory(kernels)


def check(module: ModuleType) -> None:
    torch.manual_seed(0)
    prove(module, *inputs(10, 24, 50, torch.float32), dloss=2.0, scale=1.0, chunk_rows=4)
    for stays in (True, False):
        check_weight_grad(module, torch.float16, 7, stays)
    check_wrong_incoming_gradient(module)
    check_memory(module)


@pytest.mark.usefixtures("no_check_of_targets")
def test_check_passes() -> None:
    check(kernels)


@pytest.mark.usefixtures("no_check_of_targets")
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_is_killed(mutant: Mutant, tmp_path: Path) -> None:
    assert_killed(mutant, check, tmp_path)


@pytest.mark.parametrize("which", ["x", "weight"])
def test_one_gradient_alone(which: str) -> None:
    """Only the product that is asked for is computed."""
    x, weight, targets = inputs(10, 24, 50, torch.float32)
    both = results(kernels.linear_cross_entropy, x, weight, targets, chunk_rows=4)
    leaf = (x if which == "x" else weight).requires_grad_()
    kernels.linear_cross_entropy(x, weight, targets, chunk_rows=4).backward()
    assert torch.equal(leaf.grad, both[1 if which == "x" else 2])
    assert (weight if which == "x" else x).grad is None


def test_weight_grad_of_a_frozen_weight_is_left_alone() -> None:
    x, weight, targets = inputs(4, 24, 50, torch.float32)
    total = torch.full((50, 24), 3.0, device=DEVICE)
    kernels.linear_cross_entropy(x.requires_grad_(), weight, targets, weight_grad=total).backward()
    with torch.no_grad():
        kernels.linear_cross_entropy(x, weight.requires_grad_(), targets, weight_grad=total)
    assert (total == 3).all() and x.grad is not None


def test_two_runs_are_equal_bit_for_bit() -> None:
    x, weight, targets = inputs(33, 24, 1000, torch.float32)
    runs = [results(kernels.linear_cross_entropy, x, weight, targets, chunk_rows=13) for _ in "12"]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("weight_grad", [False, True])
def test_empty(weight_grad: bool) -> None:
    x, weight, targets = inputs(0, 24, 50, torch.float32)
    x.requires_grad_(), weight.requires_grad_()
    total = torch.full((50, 24), 3.0, device=DEVICE) if weight_grad else None
    loss = kernels.linear_cross_entropy(x, weight, targets, weight_grad=total)
    loss.backward()
    assert loss.item() == 0 and x.grad.shape == (0, 24)
    if total is None:
        assert torch.equal(weight.grad, torch.zeros(50, 24, device=DEVICE))
    else:
        assert (total == 3).all()


def test_bad_input_names_the_argument() -> None:
    x, weight, targets = inputs(4, 24, 50, torch.float32)
    op = kernels.linear_cross_entropy
    with pytest.raises(TypeError, match="x: dtype float64"):
        op(x.double(), weight, targets)
    with pytest.raises(TypeError, match="weight: dtype float16, not float32"):
        op(x, weight.half(), targets)
    with pytest.raises(ValueError, match="x: rank 3"):
        op(x.view(2, 2, 24), weight, targets)
    with pytest.raises(ValueError, match="weight: shape"):
        op(x, weight[:, :23].contiguous(), targets)
    with pytest.raises(ValueError, match="targets: shape"):
        op(x, weight, targets[:2])
    with pytest.raises(TypeError, match="targets: dtype int32"):
        op(x, weight, targets.int())
    with pytest.raises(ValueError, match="chunk_rows: 0, expected at least 1"):
        op(x, weight, targets, chunk_rows=0)
    x.requires_grad_()
    with pytest.raises(TypeError, match="weight_grad: dtype float16"):
        op(x, weight, targets, weight_grad=torch.zeros(50, 24, device=DEVICE).half())
    with pytest.raises(ValueError, match="weight_grad: shape"):
        op(x, weight, targets, weight_grad=torch.zeros(24, 50, device=DEVICE))
    with pytest.raises(ValueError, match="targets: on meta"):
        op(x, weight, targets.to("meta"))
