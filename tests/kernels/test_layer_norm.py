"""layer_norm and dual_layer_norm against the reference, and mutants that must die."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_proof import Mutant, assert_killed
from op_proof import DEVICE, DTYPES, far_rows, normal, outputs_and_grads, prove, wide_slice

from pythia_fast.kernels import layer_norm as kernels
from pythia_fast.kernels import reference

FILE = "kernels/layer_norm.py"
MUTANTS = [
    Mutant("eps is forgotten", FILE, "tl.sqrt(b_variance + eps)", "tl.sqrt(b_variance)"),
    Mutant(
        "padded columns enter the variance",
        FILE,
        "b_c = tl.where((columns(i, WIDTHS) < H)[None, :], b_c, 0.0)",
        "b_c = b_c + 0.0",
    ),
    Mutant("mean over a wrong count", FILE, "sum_rows(b_x) / H", "sum_rows(b_x) / (H + 1)"),
    Mutant("last row left out", FILE, "    m_row = o_row < M\n    i_row", "    m_row = o_row < M - 1\n    i_row"),
    Mutant("second norm with the first weight", FILE, "b_rstd, w2, b2, m_row", "b_rstd, w1, b2, m_row"),
    Mutant("residual gradient lost", FILE, "b_dx = add_rows(b_dx, b_dr)", "b_dx = add_rows(b_dx, b_dx)"),
    Mutant("projection on x̂ lost", FILE, "- b_mean_g - b_xhat[i] * b_mean_gx", "- b_mean_g"),
    Mutant("mean of g lost", FILE, "(b_g[i] - b_mean_g - b", "(b_g[i] - b"),
    Mutant("second norm's weight in g", FILE, "(b_g, b_dy2, b_w2)", "(b_g, b_dy2, b_w1)"),
    Mutant("dw2 from dy1", FILE, "(b_dw2, b_dy2, b_xhat)", "(b_dw2, b_dy1, b_xhat)"),
    Mutant("each program starts at 0", FILE, "tl.range(i_program, ", "tl.range(0, "),
    Mutant("partials of a single slot", FILE, "partials + i_program * K * H", "partials + i_program * H"),
    Mutant("dy's row stride", FILE, "dy1 + i_row * stride_dy1", "dy1 + i_row * H"),
    Mutant("x's row stride", FILE, "\n    b_x = load_rows(x + i_row * stride_x, m_row", "\n    b_x = load_rows(x + i_row * H, m_row"),
    Mutant("one norm's gradient of x̂", FILE, "        b_dx = b_g\n", "        b_dx = b_dy1\n"),
    Mutant("x̂ taken for its gradient", FILE, "        b_xhat = b_x\n", "        b_xhat = b_dy1\n"),
    Mutant("a single residual bias", FILE, "load_vector(residual_b2, H", "load_vector(residual_b1, H"),
    Mutant("residual of the wrong rows", FILE, "store_rows(residual + i_row * H", "store_rows(residual + (i_row ^ 1) * H"),
]  # fmt: skip

SHAPES = [(1, 96), (63, 128), (65, 768), (100, 96), (257, 512), (7, 1000), (3, 2560), (2, 5120)]


def single_inputs(rows: int, h: int, dtype: torch.dtype):
    """(x, weight, bias), (dy,): x far from zero mean, so that a lost mean shows."""
    x = normal(rows, h, dtype=dtype) + 0.5
    return (x, *(normal(h, dtype=dtype) for _ in range(2))), (normal(rows, h, dtype=dtype),)


def dual_inputs(rows: int, h: int, dtype: torch.dtype):
    """(x, weight1, bias1, weight2, bias2), (d_residual, dy1, dy2)."""
    x = normal(rows, h, dtype=dtype) + 0.5
    vectors = (normal(h, dtype=dtype) for _ in range(4))
    return (x, *vectors), tuple(normal(rows, h, dtype=dtype) for _ in range(3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,h", SHAPES)
@pytest.mark.usefixtures("poison")
def test_layer_norm(rows: int, h: int, dtype: torch.dtype) -> None:
    prove(kernels.layer_norm, reference.layer_norm, *single_inputs(rows, h, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,h", SHAPES)
@pytest.mark.usefixtures("poison")
def test_dual_layer_norm(rows: int, h: int, dtype: torch.dtype) -> None:
    prove(kernels.dual_layer_norm, reference.dual_layer_norm, *dual_inputs(rows, h, dtype))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    positions=st.integers(1, 12),
    h=st.integers(1, 200),
    sliced=st.booleans(),
)
def test_any_shape(batch: int, positions: int, h: int, sliced: bool) -> None:
    (x, *vectors), grads = dual_inputs(batch * positions, h, torch.float32)
    x, *grads = (t.view(batch, positions, h) for t in (x, *grads))
    if sliced:
        x, *grads = (wide_slice(t, before=3, after=2) for t in (x, *grads))
    prove(kernels.dual_layer_norm, reference.dual_layer_norm, (x, *vectors), grads)


def check_residual(module: ModuleType, rows: int, h: int, dtype: torch.dtype) -> None:
    """x + (b1 + b2) rounded once, and the norms of x as without it."""
    (x, w1, b1, w2, b2), _ = dual_inputs(rows, h, dtype)
    x, residual = wide_slice(x), torch.empty(rows, h, dtype=dtype, device=DEVICE)
    norms = ((w1, b1), (w2, b2))
    ys, *statistics = module.layer_norm_fwd(x, norms, 1e-5, residual, (w2, b1))
    assert torch.equal(residual, (x.float() + (w2.float() + b1.float())).to(dtype))
    alone, *of_alone = module.layer_norm_fwd(x, norms, 1e-5)
    for a, b in zip((*ys, *statistics), (*alone, *of_alone), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,h", [(1, 96), (65, 768), (5, 1000)])
@pytest.mark.usefixtures("poison")
def test_residual(rows: int, h: int, dtype: torch.dtype) -> None:
    check_residual(kernels, rows, h, dtype)


def check_normalised(module: ModuleType, rows: int, h: int, dtype: torch.dtype) -> None:
    """Two affine norms of x̂ that came from elsewhere, against their gradients in float64."""
    (xhat, w1, b1, w2, b2), (_, dy1, dy2) = dual_inputs(rows, h, dtype)
    dx, sums = module.layer_norm_bwd(
        wide_slice(xhat), None, (dy1, dy2), (w1, w2), None, None, sums_dtype=torch.float32
    )
    exact = [t.double().requires_grad_() for t in (xhat, w1, b1, w2, b2)]
    x, v1, c1, v2, c2 = exact
    ys = (x * v1 + c1, x * v2 + c2)
    wanted = torch.autograd.grad(ys, exact, (dy1.double(), dy2.double()))
    assert dx.dtype == dtype
    for found, true in zip((dx, *sums), wanted, strict=True):
        terms = max(rows, 2)
        eps = 2 * torch.finfo(found.dtype).eps
        # a sum of `terms` products of normal numbers, added in fp32 and rounded once
        assert (found.double() - true).abs().max() < eps * true.abs().max() + 1e-6 * terms


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,h", [(1, 96), (65, 768), (5, 1000)])
@pytest.mark.usefixtures("poison")
def test_rows_that_are_normalised(rows: int, h: int, dtype: torch.dtype) -> None:
    check_normalised(kernels, rows, h, dtype)


def check(module: ModuleType) -> None:
    """The smallest inputs that every mutant above fails on: padded columns, strides, several rows."""
    for h in (96, 100):
        args, cotangents = dual_inputs(40, h, torch.float32)
        args = (args[0] * 1e-2, *args[1:])  # a small variance, so that eps counts
        args = (wide_slice(args[0]), *args[1:])
        cotangents = tuple(map(wide_slice, cotangents))
        prove(module.dual_layer_norm, reference.dual_layer_norm, args, cotangents)
    check_residual(module, 40, 100, torch.float16)
    check_normalised(module, 40, 100, torch.float32)


def test_check_passes() -> None:
    check(kernels)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_is_killed(mutant: Mutant, tmp_path: Path) -> None:
    assert_killed(mutant, check, tmp_path)


def test_gradients_of_other_strides() -> None:
    """Autograd hands over expanded and transposed gradients."""
    x, w, b = single_inputs(12, 96, torch.float64)[0]

    def loss(op, dtype):
        leaf = x.to(dtype).requires_grad_()
        y = op(leaf, w.to(dtype), b.to(dtype))
        (y.view(3, 4, 96).transpose(0, 2) ** 2).sum().add(y.sum()).backward()
        return leaf.grad

    actual, exact = loss(kernels.layer_norm, torch.float32), loss(reference.layer_norm, x.dtype)
    assert (actual - exact).abs().max() < 1e-4


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_unused_outputs(used: tuple[int, ...]) -> None:
    args, cotangents = dual_inputs(5, 96, torch.float32)

    def some(op):
        return lambda *a: tuple(op(*a)[i] for i in used)

    used_grads = [cotangents[i] for i in used]
    actual, exact = (
        _grads(some(op), [a.to(dtype) for a in args], used_grads)
        for op, dtype in ((kernels.dual_layer_norm, torch.float32), (reference.dual_layer_norm, torch.float64))
    )  # fmt: skip
    for a, e in zip(actual, exact, strict=True):
        expected = torch.zeros_like(a) if e is None else e
        assert (a - expected).abs().max() < 1e-4


def _grads(op, args, cotangents):
    leaves = [a.detach().requires_grad_() for a in args]
    cotangents = [c.to(args[0].dtype) for c in cotangents]
    return torch.autograd.grad(op(*leaves), leaves, cotangents, allow_unused=True)


def test_two_runs_are_equal_bit_for_bit() -> None:
    args, cotangents = dual_inputs(65, 768, torch.float32)
    first = outputs_and_grads(kernels.dual_layer_norm, args, cotangents)
    second = outputs_and_grads(kernels.dual_layer_norm, args, cotangents)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_offsets_beyond_32_bits() -> None:
    args, cotangents = single_inputs(3, 96, torch.float16)
    near = outputs_and_grads(kernels.layer_norm, args, cotangents)
    far = outputs_and_grads(kernels.layer_norm, (far_rows(args[0]), *args[1:]), cotangents)
    assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))


def test_statistics_are_fp32_and_a_constant_row_is_its_bias() -> None:
    x = torch.full((2, 96), 3.0, dtype=torch.float16, device=DEVICE)
    w, b = (normal(96, dtype=torch.float16) for _ in range(2))
    (y,), mean, rstd = kernels.layer_norm_fwd(x, ((w, b),), 1e-5)
    assert mean.dtype == rstd.dtype == torch.float32
    assert torch.equal(y, b.expand(2, 96))
    torch.testing.assert_close(rstd, torch.full_like(rstd, 1e-5**-0.5))


@pytest.mark.parametrize("shape", [(0, 96), (2, 0, 96)])
def test_empty_batch(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, device=DEVICE, requires_grad=True)
    vectors = [torch.ones(96, device=DEVICE, requires_grad=True) for _ in range(4)]
    outs = kernels.dual_layer_norm(x, *vectors)
    assert all(o.shape == shape for o in outs)
    sum(o.sum() for o in outs).backward()
    assert x.grad.shape == shape
    assert all(torch.equal(v.grad, torch.zeros_like(v)) for v in vectors)


def test_bad_input_names_the_argument() -> None:
    x = torch.zeros(4, 6, 96, device=DEVICE)
    w = torch.ones(96, device=DEVICE)
    with pytest.raises(TypeError, match="x: dtype float64"):
        kernels.layer_norm(x.double(), w, w)
    with pytest.raises(TypeError, match="x: expected a tensor, got list"):
        kernels.layer_norm([1.0], w, w)
    with pytest.raises(ValueError, match="weight: shape"):
        kernels.layer_norm(x, w[:-1], w)
    with pytest.raises(ValueError, match="bias: on meta"):
        kernels.layer_norm(x, w, w.to("meta"))
    with pytest.raises(TypeError, match="weight2: dtype float16, not float32"):
        kernels.dual_layer_norm(x, w, w, w.half(), w)
    with pytest.raises(ValueError, match="x: strides"):
        kernels.layer_norm(x.transpose(0, 1), w, w)
    with pytest.raises(ValueError, match="x: strides"):
        kernels.layer_norm(torch.zeros(96, 4, device=DEVICE).t(), w, w)
    with pytest.raises(ValueError, match="x: shape"):
        kernels.layer_norm(torch.zeros(4, 0, device=DEVICE), w, w)
