"""rotary in place inside the packed projection, against the reference."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_proof import Mutant, assert_killed
from op_proof import DEVICE, DTYPES, far_rows, normal, prove
from torch import Tensor

from pythia_fast.kernels import reference
from pythia_fast.kernels import rotary as kernels

FILE = "kernels/rotary.py"
MUTANTS = [
    Mutant("signs swapped", FILE, "b_x1 * b_cos - b_x2 * b_sin, b_x2 * b_cos + b", "b_x1 * b_cos + b_x2 * b_sin, b_x2 * b_cos - b"),
    Mutant("backward turns forward", FILE, "        b_sin = -b_sin\n", "        b_sin = b_sin\n"),
    Mutant("k is not turned", FILE, "tl.store(p_k, b_k1", "tl.store(p_k, b_q1"),
    Mutant("v is turned for k", FILE, "p_k = p_q + D", "p_k = p_q + 2 * D"),
    Mutant("one more dim is turned", FILE, "& (o_r < HALF)[None, None, :]", "& (o_r < HALF + 1)[None, None, :]"),
    Mutant("the last position is left out", FILE, "m_table = (o_t < T)", "m_table = (o_t < T - 1)"),
    Mutant("a head of the next block", FILE, "m = m_table & (o_h < H)", "m = m_table & (o_h < H - 1)"),
    Mutant("interleaved pairs", FILE, "tl.store(p_q + HALF, ", "tl.store(p_q + 1, "),
    Mutant("sin by cos's stride", FILE, "p_sin = sin + o_t[:, None, None] * stride_sin", "p_sin = sin + o_t[:, None, None] * stride_cos"),
    Mutant("time by the packed stride", FILE, "o_t.to(tl.int64) * stride_t", "o_t.to(tl.int64) * (3 * H * D)"),
]  # fmt: skip

# (B, T, H, D): every head dim of the suite, H = 12 and 40 of its sizes, odd T
SHAPES = [(1, 1, 4, 32), (2, 63, 3, 64), (1, 65, 12, 64), (2, 100, 2, 80), (1, 33, 5, 128), (1, 9, 8, 256), (1, 257, 1, 32)]  # fmt: skip


def inputs(batch: int, positions: int, heads: int, d: int, dtype: torch.dtype, table=None):
    """qkv (B, T, H, 3·D), cos and sin (T + 3, R/2) in `table`'s dtype, and a gradient."""
    qkv, grad = (normal(batch, positions, heads, 3 * d, dtype=dtype) for _ in range(2))
    angles = torch.rand(positions + 3, d // 8, device=DEVICE) * 6.3
    return qkv, *(t.to(table or dtype) for t in (angles.cos(), angles.sin())), grad


def strided(t: Tensor) -> Tensor:
    """t (B, T, H, 3·D) inside a buffer with time outermost and room between its rows."""
    batch, positions, heads, packed = t.shape
    buffer = torch.full((positions, batch, heads * packed + 48), float("nan")).to(t.device, t.dtype)
    view = buffer[..., 16 : 16 + heads * packed].unflatten(-1, (heads, packed)).transpose(0, 1)
    return view.copy_(t)


def compare(op, qkv: Tensor, cos: Tensor, sin: Tensor, grad: Tensor, layout=torch.clone) -> None:
    """op on a copy of qkv laid out by `layout`; the reference gets the tables upcast alike."""

    def in_place(leaf: Tensor) -> Tensor:
        # a non-leaf in the wanted layout: the gradient flows through the copy
        own = layout(torch.empty_like(leaf).zero_()).detach()
        return op(own.copy_(leaf), cos, sin)

    def plain(leaf: Tensor) -> Tensor:
        wide = torch.promote_types(leaf.dtype, torch.float32)
        tables = (cos.to(wide), sin.to(wide)) if leaf.dtype == torch.float64 else (cos, sin)
        return reference.rotary(leaf, *tables)

    prove(in_place, plain, (qkv,), (grad,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poison")
def test_rotary(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    compare(kernels.rotary, *inputs(*shape, dtype))


@pytest.mark.parametrize("table", [torch.float32, torch.float16])
def test_tables_of_another_dtype(table: torch.dtype) -> None:
    dtype = torch.float16 if table == torch.float32 else torch.float32
    compare(kernels.rotary, *inputs(2, 9, 4, 64, dtype, table))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    positions=st.integers(1, 20),
    heads=st.integers(1, 13),
    half=st.integers(1, 11),
)
def test_any_shape_and_stride(batch: int, positions: int, heads: int, half: int) -> None:
    compare(kernels.rotary, *inputs(batch, positions, heads, 8 * half, torch.float32), strided)


def check(module: ModuleType) -> None:
    """Padded pairs (R/2 = 10), strides of all kinds, tables that are columns of one buffer."""
    qkv, cos, sin, grad = inputs(2, 21, 3, 80, torch.float32)
    both = torch.cat((cos, sin), dim=1)
    compare(module.rotary, qkv, cos, both[:, 10:], grad, strided)
    compare(module.rotary, *inputs(1, 3, 8, 64, torch.float32))


def test_check_passes() -> None:
    check(kernels)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_is_killed(mutant: Mutant, tmp_path: Path) -> None:
    assert_killed(mutant, check, tmp_path)


@pytest.mark.parametrize("d", [64, 80])
def test_touches_nothing_but_the_rotary_dims(d: int) -> None:
    """v, the rest of q and k, and the room between rows keep their bits, NaN included."""
    qkv, cos, sin, _ = inputs(2, 5, 3, d, torch.float16)
    view = strided(qkv)
    buffer = view._base
    q, k, v = view.unflatten(-1, (3, d)).unbind(-2)
    q[..., d // 4 :], k[..., d // 4 :] = float("nan"), float("inf")
    v.fill_(float("nan"))
    before = buffer.view(torch.int16).clone()
    out = kernels.rotary(view, cos, sin)
    assert out.data_ptr() == view.data_ptr()
    changed = buffer.view(torch.int16) != before
    rotary_dims = torch.zeros_like(view, dtype=torch.bool).unflatten(-1, (3, d))
    rotary_dims[..., :2, : d // 4] = True
    assert torch.isfinite(out.unflatten(-1, (3, d))[rotary_dims]).all()
    outside = torch.ones_like(changed)
    torch.as_strided(outside, view.shape, view.stride(), view.storage_offset()).copy_(
        ~rotary_dims.flatten(-2)
    )
    assert not changed[outside].any()


def test_backward_inverts_forward() -> None:
    qkv, cos, sin, _ = inputs(1, 7, 4, 64, torch.float32)
    back = kernels.rotary_bwd(kernels.rotary_fwd(qkv.clone(), cos, sin), cos, sin)
    torch.testing.assert_close(back, qkv, atol=1e-6, rtol=0)


def test_the_gradient_given_is_not_written() -> None:
    """Another branch may hold the same gradient: y + rotary(x) gives both one tensor."""
    qkv, cos, sin, grad = inputs(1, 7, 4, 64, torch.float32)
    leaf, other = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    kept = grad.clone()
    (other + kernels.rotary(leaf * 1, cos, sin)).backward(grad)
    assert torch.equal(grad, kept)
    assert torch.equal(other.grad, kept)
    assert not torch.equal(leaf.grad, kept)


def test_gradient_through_a_view_of_the_projection() -> None:
    """As a model has it: a linear layer's output viewed as heads, then turned in place."""
    x, weight = (normal(2, 5, 96, dtype=torch.float32), normal(288, 96, dtype=torch.float32))
    _, cos, sin, grad = inputs(2, 5, 3, 32, torch.float32)

    def run(op, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
        packed = torch.nn.functional.linear(*leaves).view(2, 5, 3, 96)
        return torch.autograd.grad(op(packed, cos.to(dtype), sin.to(dtype)), leaves, grad.to(dtype))

    pairs = zip(
        run(kernels.rotary, torch.float32), run(reference.rotary, torch.float64), strict=True
    )
    assert all((a - e).abs().max() < 1e-4 for a, e in pairs)


def test_autograd_sees_the_write() -> None:
    """What saved qkv for its own backward refuses to use the rotated values."""
    qkv, cos, sin, _ = inputs(1, 2, 2, 64, torch.float32)
    x = qkv.requires_grad_() * 1
    y = x * x
    kernels.rotary(x, cos, sin)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_offsets_beyond_32_bits() -> None:
    qkv, cos, sin, _ = inputs(1, 3, 2, 64, torch.float16)
    far = far_rows(qkv.view(3, 384)).view(1, 3, 2, 192)
    assert torch.equal(kernels.rotary_fwd(far, cos, sin), kernels.rotary_fwd(qkv, cos, sin))


def test_two_runs_are_equal_bit_for_bit() -> None:
    qkv, cos, sin, _ = inputs(2, 33, 4, 80, torch.float16)
    assert torch.equal(kernels.rotary(qkv.clone(), cos, sin), kernels.rotary(qkv, cos, sin))


@pytest.mark.parametrize("shape", [(0, 4, 2, 96), (2, 0, 2, 96)])
def test_empty_batch(shape: tuple[int, ...]) -> None:
    tables = [torch.ones(4, 4, device=DEVICE)] * 2
    leaf = torch.zeros(shape, device=DEVICE, requires_grad=True)
    out = kernels.rotary(leaf * 1, *tables)
    out.sum().backward()
    assert out.shape == leaf.grad.shape == shape


def test_bad_input_names_the_argument() -> None:
    qkv, cos, sin, _ = inputs(2, 5, 4, 64, torch.float32)
    with pytest.raises(ValueError, match="qkv: a leaf that requires grad"):
        kernels.rotary(qkv.clone().requires_grad_(), cos, sin)
    with pytest.raises(TypeError, match="qkv: dtype int64"):
        kernels.rotary(qkv.long(), cos, sin)
    with pytest.raises(ValueError, match="qkv: rank 3"):
        kernels.rotary(qkv[0], cos, sin)
    with pytest.raises(ValueError, match="qkv: shape"):
        kernels.rotary(qkv[..., :-1].contiguous(), cos, sin)
    with pytest.raises(ValueError, match="heads must lie 192 elements apart"):
        kernels.rotary(qkv[:, :, ::2], cos, sin)
    with pytest.raises(ValueError, match="qkv: strides"):
        kernels.rotary(qkv.transpose(2, 3).contiguous().transpose(2, 3), cos, sin)
    with pytest.raises(ValueError, match="cos: shape"):
        kernels.rotary(qkv, cos[:4], sin)
    with pytest.raises(ValueError, match="sin: shape"):
        kernels.rotary(qkv, cos, sin[:, :-1])
    with pytest.raises(ValueError, match="sin: on meta"):
        kernels.rotary(qkv, cos, sin.to("meta"))
    with pytest.raises(ValueError, match="cos: strides"):
        kernels.rotary(qkv, cos.t().contiguous().t(), sin)


@triton.jit
def _load_rotated_kernel(
    x, y, cos, sin, T, stride_table, D: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    m = (o_t < T)[:, None] & (o_d < D)[None, :]
    o = o_t[:, None] * D + o_d[None, :]
    b_x = kernels.load_rotated(x + o, o_t, o_d, cos, sin, stride_table, stride_table, m, HALF)
    tl.store(y + o, b_x, mask=m)


@pytest.mark.parametrize("d", [64, 80])
def test_load_rotated_inside_another_kernel(d: int) -> None:
    qkv, cos, sin, _ = inputs(1, 21, 1, d, torch.float32)
    q = qkv[0, :, 0, :d].contiguous()
    out = torch.full_like(q, float("nan"))
    _load_rotated_kernel[(2,)](
        x=q, y=out, cos=cos, sin=sin, T=21, stride_table=cos.stride(0),
        D=d, HALF=d // 8, BLOCK_T=16, BLOCK_D=128,
    )  # fmt: skip
    torch.testing.assert_close(out, reference.rotary(qkv, cos, sin)[0, :, 0, :d])
