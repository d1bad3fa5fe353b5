"""Bias + GELU against the reference, in both forms, and mutants that must die."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_proof import Mutant, assert_killed
from op_proof import DEVICE, DTYPES, far_rows, normal, outputs_and_grads, prove, wide_slice

from pythia_fast.kernels import gelu as kernels
from pythia_fast.kernels import reference

FILE = "kernels/gelu.py"
MUTANTS = [
    Mutant("no bias", FILE, "b_u = b_x + b_bias[None, :]", "b_u = b_x + 0 * b_bias[None, :]"),
    Mutant("cubic term's factor", FILE, "0.1029432397", "0.1129432397"),
    Mutant("slope without its factor 3", FILE, "0.2140644488", "0.0713548163"),
    Mutant("1 − Φ without its exponential", FILE, "b_cdf * (b_cdf * b_e) *", "b_cdf * b_cdf *"),
    Mutant("no bound on the exponent", FILE, "tl.minimum(-b_u * (2.302208198 + 0.1029432397 * b_u2), 126.0)", "-b_u * (2.302208198 + 0.1029432397 * b_u2)"),
    Mutant("last coefficient of erf", FILE, "0.5307027145", "0.5297027145"),
    Mutant("tail on the wrong side", FILE, "tl.where(b_u < 0, ", "tl.where(b_u > 0, "),
    Mutant("density without ½", FILE, "tl.exp2(-0.7213475204 * b_u2)", "tl.exp2(-1.4426950409 * b_u2)"),
    Mutant("density lost", FILE, "b_dy * (b_cdf + b_u * b_pdf)", "b_dy * b_cdf"),
    Mutant("y's row stride", FILE, "y + i_m * stride_y", "y + i_m * N"),
    Mutant("dy's row stride", FILE, "dy + i_m * stride_dy", "dy + i_m * N"),
    Mutant("last row left out", FILE, "m = (o_m < M)[:, None] & (o_n < N)", "m = (o_m < M - 1)[:, None] & (o_n < N)"),
    Mutant("first column tile only", FILE, "o_n = (tl.program_id(0) % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N)\n    m_n", "o_n = tl.arange(0, BLOCK_N)\n    m_n"),
    Mutant("partials overwrite each other", FILE, "partials + i_p * N", "partials"),
    Mutant("every program sums all rows", FILE, "tl.range(i_p, ", "tl.range(0, "),
]  # fmt: skip

SHAPES = [(1, 384), (63, 512), (65, 96), (100, 1000), (257, 128), (3, 3072), (2, 4000), (2, 10240)]
FORMS = ["tanh", "none"]


def inputs(rows: int, n: int, dtype: torch.dtype):
    """(x, bias), (dy,): x wide enough for both tails."""
    x, bias = normal(rows, n, dtype=dtype, scale=3.0), normal(n, dtype=dtype)
    return (x, bias), (normal(rows, n, dtype=dtype),)


def prove_form(module: ModuleType, form: str, args, cotangents) -> None:
    prove(
        partial(module.gelu, approximate=form),
        partial(reference.gelu, approximate=form),
        args,
        cotangents,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,n", SHAPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("poison")
def test_gelu(rows: int, n: int, form: str, dtype: torch.dtype) -> None:
    prove_form(kernels, form, *inputs(rows, n, dtype))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    positions=st.integers(1, 12),
    n=st.integers(1, 1500),
    form=st.sampled_from(FORMS),
    sliced=st.booleans(),
)
def test_any_shape(batch: int, positions: int, n: int, form: str, sliced: bool) -> None:
    (x, bias), (dy,) = inputs(batch * positions, n, torch.float32)
    x, dy = (t.view(batch, positions, n) for t in (x, dy))
    if sliced:
        x, dy = wide_slice(x, before=1, after=2), wide_slice(dy, before=5, after=0)
    prove_form(kernels, form, (x, bias), (dy,))


def into_columns(module: ModuleType, form: str, rows: int, n: int, dtype: torch.dtype) -> None:
    """out is columns [h, 5h) of a buffer, its gradient a slice of the buffer's gradient."""
    h = n // 4
    args, _ = inputs(rows, n, dtype)
    ctx = normal(rows, h, dtype=dtype)
    grad = normal(rows, h + n, dtype=dtype)

    def joined(op):
        def run(x, bias):
            buffer = torch.cat((ctx, torch.zeros_like(x).fill_(float("nan"))), dim=1).to(x.dtype)
            out = op(x, bias, form, buffer[:, h:])
            assert out.data_ptr() == buffer[:, h:].data_ptr()
            return buffer

        return run

    prove(joined(module.gelu), joined(reference.gelu), args, (grad,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("poison")
def test_out_in_columns_of_a_wider_buffer(form: str, dtype: torch.dtype) -> None:
    into_columns(kernels, form, 65, 384, dtype)


def check(module: ModuleType) -> None:
    """Both forms; two column tiles, strided dy, rows that do not fill a tile, out in columns."""
    for form in FORMS:
        (x, bias), (dy,) = inputs(33, 1100, torch.float32)
        x[0] = -200.0  # e⁻ᶻ would overflow
        prove_form(module, form, (x, bias), (wide_slice(dy),))
        into_columns(module, form, 9, 96, torch.float32)


def test_check_passes() -> None:
    check(kernels)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_is_killed(mutant: Mutant, tmp_path: Path) -> None:
    assert_killed(mutant, check, tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_extreme_values_stay_finite(form: str) -> None:
    """The identity far to the right, 0 far to the left; slope 1 and 0; the whole fp16 range."""
    big = torch.finfo(torch.float16).max
    x = torch.tensor([[-big, -200.0, -30.0, 0.0, 30.0, 200.0, big]], device=DEVICE).half()
    bias = torch.zeros(7, dtype=torch.float16, device=DEVICE)
    y, dx = outputs_and_grads(partial(kernels.gelu, approximate=form), (x, bias), (x * 0 + 1,))[:2]
    assert torch.equal(y, torch.relu(x))
    assert torch.equal(dx, torch.tensor([[0, 0, 0, 0.5, 1, 1, 1]], device=DEVICE).half())


def test_backward_takes_a_slice_and_gives_contiguous() -> None:
    (x, bias), (dy,) = inputs(5, 96, torch.float32)
    dx, d_bias = kernels.gelu_bwd(wide_slice(x), bias, wide_slice(dy))
    again = kernels.gelu_bwd(x, bias, dy)
    assert dx.is_contiguous()
    assert torch.equal(dx, again[0])
    assert torch.equal(d_bias, again[1])


def test_offsets_beyond_32_bits() -> None:
    (x, bias), (dy,) = inputs(3, 96, torch.float16)
    out = kernels.gelu_fwd(x, bias, out=far_rows(torch.zeros_like(x)))
    assert torch.equal(out, kernels.gelu_fwd(far_rows(x), bias))
    near, far = kernels.gelu_bwd(x, bias, dy), kernels.gelu_bwd(far_rows(x), bias, far_rows(dy))
    assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))


def test_two_runs_are_equal_bit_for_bit() -> None:
    args, cotangents = inputs(257, 96, torch.float16)
    first, second = (outputs_and_grads(kernels.gelu, args, cotangents) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(0, 96), (2, 0, 96)])
def test_empty_batch(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, device=DEVICE, requires_grad=True)
    bias = torch.ones(96, device=DEVICE, requires_grad=True)
    y = kernels.gelu(x, bias)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert torch.equal(bias.grad, torch.zeros_like(bias))


def test_bad_input_names_the_argument() -> None:
    x, bias = torch.zeros(4, 6, 96, device=DEVICE), torch.ones(96, device=DEVICE)
    with pytest.raises(ValueError, match="approximate: 'quick'"):
        kernels.gelu(x, bias, "quick")
    with pytest.raises(TypeError, match="x: dtype int64"):
        kernels.gelu(x.long(), bias)
    with pytest.raises(ValueError, match="bias: shape"):
        kernels.gelu(x, bias[1:])
    with pytest.raises(ValueError, match="bias: on meta"):
        kernels.gelu(x, bias.to("meta"))
    with pytest.raises(ValueError, match="x: strides"):
        kernels.gelu(x.transpose(0, 1), bias)
    with pytest.raises(TypeError, match="out: dtype float16, not float32"):
        kernels.gelu(x, bias, out=x.half())
    with pytest.raises(ValueError, match="out: shape"):
        kernels.gelu(x, bias, out=torch.empty(24, 96, device=DEVICE))
    with pytest.raises(ValueError, match="out: strides"):
        kernels.gelu(x, bias, out=torch.empty(6, 4, 96, device=DEVICE).transpose(0, 1))
    with pytest.raises(ValueError, match=r"out: strides .* overlap"):
        kernels.gelu(x, bias, out=torch.empty(96, device=DEVICE).expand(4, 6, 96))
    with pytest.raises(ValueError, match="out: shares memory with x"):
        kernels.gelu(x, bias, out=x)
