"""parallel_residual, alone and with the next block's norms, against the reference."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_proof import Mutant, assert_killed
from op_proof import DEVICE, DTYPES, normal, outputs_and_grads, prove, wide_slice

from pythia_fast.kernels import parallel_residual as kernels
from pythia_fast.kernels import reference
from pythia_fast.kernels.layer_norm import dual_layer_norm

FILE = "kernels/parallel_residual.py"
MUTANTS = [
    Mutant("attention bias lost", FILE, "add_rows(b_attn, load_vector(attn_bias", "add_rows(b_attn, load_vector(mlp_bias"),
    Mutant("residual stream lost", FILE, "b_y = add_rows(b_x, add", "b_y = add_rows(b_mlp, add"),
    Mutant("branch by the wrong stride", FILE, "attn + i_row * stride_attn", "attn + i_row * stride_x"),
    Mutant("last row left out", FILE, "m_row = o_row < M\n", "m_row = o_row < M - 1\n"),
    Mutant("norms swapped", FILE, "b_rstd, w2, b2, m_row", "b_rstd, w1, b1, m_row"),
    Mutant("column sum misses a row", FILE, "load_rows(p_dy, o_row < M, ", "load_rows(p_dy, o_row < M - 1, "),
    Mutant("every program sums all rows", FILE, "tl.range(i_program, ", "tl.range(0, "),
    Mutant("partials overwrite each other", FILE, "partials + i_program * H", "partials"),
    Mutant("bias gradient of the norms' first sum", FILE, "*d_norms, d_bias = sums", "d_bias, *d_norms = sums"),
    Mutant("residual gradient lost", FILE, "layer_norm_bwd(y, dy, ", "layer_norm_bwd(y, None, "),
]  # fmt: skip

SHAPES = [(1, 96), (63, 128), (65, 768), (100, 96), (257, 128), (5, 1000), (3, 2560), (2, 5120)]


def sum_inputs(rows: int, h: int, dtype: torch.dtype):
    """(x, attn, mlp, attn_bias, mlp_bias), (dy,)."""
    streams = (normal(rows, h, dtype=dtype) for _ in range(3))
    return (*streams, *(normal(h, dtype=dtype) for _ in range(2))), (normal(rows, h, dtype=dtype),)


def fused_inputs(rows: int, h: int, dtype: torch.dtype):
    """(x, attn, mlp, attn_bias, mlp_bias, weight1, bias1, weight2, bias2), (dy, dy1, dy2)."""
    args, cotangents = sum_inputs(rows, h, dtype)
    vectors = (normal(h, dtype=dtype) for _ in range(4))
    return (*args, *vectors), (*cotangents, *(normal(rows, h, dtype=dtype) for _ in range(2)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,h", SHAPES)
@pytest.mark.usefixtures("poison")
def test_parallel_residual(rows: int, h: int, dtype: torch.dtype) -> None:
    prove(kernels.parallel_residual, reference.parallel_residual, *sum_inputs(rows, h, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,h", SHAPES)
@pytest.mark.usefixtures("poison")
def test_parallel_residual_dual_layer_norm(rows: int, h: int, dtype: torch.dtype) -> None:
    prove(
        kernels.parallel_residual_dual_layer_norm,
        reference.parallel_residual_dual_layer_norm,
        *fused_inputs(rows, h, dtype),
    )


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    positions=st.integers(1, 12),
    h=st.integers(1, 200),
    sliced=st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_any_shape(batch: int, positions: int, h: int, sliced: list[bool]) -> None:
    args, grads = fused_inputs(batch * positions, h, torch.float32)
    streams = [t.view(batch, positions, h) for t in (*args[:3], *grads)]
    streams = [
        wide_slice(t, before=2 * i, after=3) if s else t
        for i, (t, s) in enumerate(zip(streams, sliced, strict=True))
    ]
    prove(
        kernels.parallel_residual_dual_layer_norm,
        reference.parallel_residual_dual_layer_norm,
        (*streams[:3], *args[3:]),
        streams[3:],
    )


def check(module: ModuleType) -> None:
    """Both ops on strided rows that do not fill their last tile."""
    args, cotangents = fused_inputs(41, 96, torch.float32)
    args = (args[0], wide_slice(args[1]), *args[2:])
    cotangents = tuple(map(wide_slice, cotangents))
    prove(module.parallel_residual, reference.parallel_residual, args[:5], cotangents[:1])
    fused = "parallel_residual_dual_layer_norm"
    prove(getattr(module, fused), getattr(reference, fused), args, cotangents)
    args, cotangents = sum_inputs(257, 96, torch.float32)
    prove(module.parallel_residual, reference.parallel_residual, args, cotangents)


def test_check_passes() -> None:
    check(kernels)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_is_killed(mutant: Mutant, tmp_path: Path) -> None:
    assert_killed(mutant, check, tmp_path)


def test_sum_is_rounded_once() -> None:
    """1 + (2⁻¹² + (−1 + 2⁻¹²)) in fp16: only the fp32 sum keeps both small terms."""
    one = torch.ones(1, 96, dtype=torch.float16, device=DEVICE)
    small, zero = one * 2.0**-12, torch.zeros(96, dtype=torch.float16, device=DEVICE)
    y = kernels.parallel_residual(one, small, small, zero - 1, zero)
    assert torch.equal(y, one * 2.0**-11)


def test_norms_are_those_of_the_rounded_sum() -> None:
    """In fp16 the fused op gives bit for bit what the two kernels give one after the other."""
    args, _ = fused_inputs(17, 96, torch.float16)
    y, y1, y2 = kernels.parallel_residual_dual_layer_norm(*args)
    apart = dual_layer_norm(kernels.parallel_residual(*args[:5]), *args[5:])
    assert all(torch.equal(a, b) for a, b in zip((y, y1, y2), apart, strict=True))


def test_leaf_gradients_do_not_share_memory() -> None:
    """One dy serves x, attn and mlp; what accumulates on one must not reach another."""
    args, cotangents = fused_inputs(3, 96, torch.float32)
    leaves = [a.detach().requires_grad_() for a in args]
    for _ in range(2):
        torch.autograd.backward(
            kernels.parallel_residual_dual_layer_norm(*leaves), list(cotangents)
        )
    once = outputs_and_grads(kernels.parallel_residual_dual_layer_norm, args, cotangents)[3:]
    for leaf, grad in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * grad)


def test_backward_of_the_sum_copies_nothing() -> None:
    args, (dy,) = sum_inputs(3, 96, torch.float32)
    dx, d_attn, d_mlp, *_ = outputs_and_grads(kernels.parallel_residual, args, (dy,))[1:]
    assert dx.data_ptr() == d_attn.data_ptr() == d_mlp.data_ptr() == dy.data_ptr()


def test_two_runs_are_equal_bit_for_bit() -> None:
    args, cotangents = fused_inputs(65, 128, torch.float32)
    op = kernels.parallel_residual_dual_layer_norm
    first, second = (outputs_and_grads(op, args, cotangents) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_unused_norms() -> None:
    """Only y is used: the gradient passes through, the norms' weights get zeros."""
    args, (dy, _, _) = fused_inputs(5, 96, torch.float32)
    leaves = [a.detach().requires_grad_() for a in args]
    y, _, _ = kernels.parallel_residual_dual_layer_norm(*leaves)
    grads = torch.autograd.grad(y, leaves, dy)
    assert all(torch.equal(g, dy) for g in grads[:3])
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads[5:])


def test_empty_batch() -> None:
    streams = [torch.zeros(2, 0, 96, device=DEVICE, requires_grad=True) for _ in range(3)]
    vectors = [torch.ones(96, device=DEVICE, requires_grad=True) for _ in range(6)]
    outs = kernels.parallel_residual_dual_layer_norm(*streams, *vectors)
    out = kernels.parallel_residual(*streams, *vectors[:2])
    assert all(o.shape == (2, 0, 96) for o in (*outs, out))
    sum(o.sum() for o in (*outs, out)).backward()
    assert all(torch.equal(v.grad, torch.zeros_like(v)) for v in vectors)


def test_bad_input_names_the_argument() -> None:
    x = torch.zeros(4, 6, 96, device=DEVICE)
    w = torch.ones(96, device=DEVICE)
    with pytest.raises(TypeError, match="mlp: dtype float16, not float32"):
        kernels.parallel_residual(x, x, x.half(), w, w)
    with pytest.raises(ValueError, match="attn: shape"):
        kernels.parallel_residual(x, x[:2], x, w, w)
    with pytest.raises(ValueError, match="mlp: strides"):
        kernels.parallel_residual(x, x, torch.zeros(6, 4, 96, device=DEVICE).transpose(0, 1), w, w)
    with pytest.raises(TypeError, match="mlp_bias: dtype"):
        kernels.parallel_residual(x, x, x, w, w.half())
    with pytest.raises(ValueError, match="bias2: shape"):
        kernels.parallel_residual_dual_layer_norm(x, x, x, w, w, w, w, w, w[1:])
    with pytest.raises(ValueError, match="attn: on meta"):
        kernels.parallel_residual(x, x.to("meta"), x, w, w)
