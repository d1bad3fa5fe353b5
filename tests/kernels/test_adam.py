"""AdamW kernels against torch.optim.AdamW and float64 numpy, the norm, and mutants that must die."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_proof import Mutant, assert_killed
from op_proof import BF16, DEVICE, scalar
from torch import Tensor

from pythia_fast.kernels import adam as kernels
from pythia_fast.kernels import reference

FILE = "kernels/adam.py"
MUTANTS = [
    Mutant("no clip factor", FILE, ".to(tl.float32) * b_grad_scale", ".to(tl.float32)"),
    Mutant("square of g lost", FILE, "b_g * b_g - b_v", "b_g - b_v"),
    Mutant("eps under the root", FILE, "(tl.sqrt(b_v * b_unbias2) + eps)", "tl.sqrt(b_v * b_unbias2 + eps)"),
    Mutant("eps forgotten", FILE, "b_unbias2) + eps", "b_unbias2)"),
    Mutant("second moment not unbiased", FILE, "tl.sqrt(b_v * b_unbias2)", "tl.sqrt(b_v)"),
    Mutant("decay not times lr", FILE, "b_lr * (b_update + b_decay * b_p)", "(b_lr * b_update + b_decay * b_p)"),
    Mutant("decay one element too far", FILE, "o < decay_until", "o <= decay_until"),
    Mutant("moments swapped", FILE, "tl.store(p_exp_avg + o, b_m", "tl.store(p_exp_avg + o, b_v"),
    Mutant("tail written past the end", FILE, "if i_start + BLOCK <= n:", "if i_start <= n:"),
    Mutant("series one power short", FILE, "static_range(8, 1, -1)", "static_range(2, 1, -1)"),
    Mutant("norm: no square", FILE, "b_sum += b_g * b_g", "b_sum += b_g"),
    Mutant("norm: no root", FILE, "tl.sqrt_rn(b_sum)", "b_sum"),
    Mutant("norm: first tiles only", FILE, "n, i_stride)", "i_stride, i_stride)"),
]  # fmt: skip

BETAS, EPS, DECAY = (0.9, 0.95), 1e-8, 0.1


def gradients(n: int, steps: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Gradients over many orders of magnitude, some exactly 0."""
    size = 10.0 ** torch.randint(-12, 1, (n,), device=DEVICE)
    made = [(torch.randn(n, device=DEVICE) * size).to(dtype) for _ in range(steps)]
    for g in made:
        g[::7] = 0
    return made


def float64_steps(
    master: np.ndarray, grads: list[np.ndarray], decay_until: int, lrs: list[float], scale: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """AdamW (Loshchilov & Hutter 2019, Algorithm 2) in float64, written out anew."""
    p, m, v = master.astype(np.float64), np.zeros(len(master)), np.zeros(len(master))
    decay = np.where(np.arange(len(p)) < decay_until, DECAY, 0.0)
    for t, (g, lr) in enumerate(zip(grads, lrs, strict=True), start=1):
        g = g.astype(np.float64) * scale
        m = BETAS[0] * m + (1 - BETAS[0]) * g
        v = BETAS[1] * v + (1 - BETAS[1]) * g**2
        m_hat, v_hat = m / (1 - BETAS[0] ** t), v / (1 - BETAS[1] ** t)
        p = p - lr * decay * p - lr * m_hat / (np.sqrt(v_hat) + EPS)
    return p, m, v


def assert_ulps(actual: Tensor, exact: np.ndarray, ulps: float, scale: np.ndarray | float) -> None:
    """|actual − exact| within so many units in the last place of `scale`, element by element."""
    unit = np.spacing(np.abs(scale).astype(np.float32)).astype(np.float64)
    error = np.abs(actual.cpu().double().numpy() - exact) / unit
    assert error.max() <= ulps, f"{error.max():.1f} ulp, allowed {ulps}"


def run_flat(
    module: ModuleType,
    master: Tensor,
    grads: list[Tensor],
    decay_until: int,
    lrs: list[float],
    scale: float,
    weight_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    master = master.clone()
    m, v = torch.zeros_like(master), torch.zeros_like(master)
    weight = None if weight_dtype is None else torch.empty_like(master, dtype=weight_dtype)
    for t, (g, lr) in enumerate(zip(grads, lrs, strict=True), start=1):
        kernel_scalars = (scalar(lr), scalar(t), scalar(scale))
        module.adamw_(weight, master, m, v, g, decay_until, *kernel_scalars, BETAS, EPS, DECAY)
    return master, m, v, weight


def check_flat(module: ModuleType, n: int = 2500, decay_until: int = 1300) -> None:
    """20 steps; the bounds are those of 20 fp32 roundings of the largest term of each sum."""
    steps = 20
    start = torch.randn(n, device=DEVICE)
    grads = gradients(n, steps)
    lrs = [1e-3 * t / steps for t in range(steps)]
    p, m, v, _ = run_flat(module, start, grads, decay_until, lrs, 0.37)
    numbers = [g.cpu().numpy() for g in grads]
    exact_p, exact_m, exact_v = float64_steps(start.cpu().numpy(), numbers, decay_until, lrs, 0.37)
    largest = np.abs(np.stack(numbers)).max(axis=0) * 0.37
    assert_ulps(m, exact_m, 4, largest)
    assert_ulps(v, exact_v, 4, largest**2)
    assert_ulps(p, exact_p, 12, np.maximum(np.abs(start.cpu().numpy()), 0.1))


def check_norm(module: ModuleType) -> None:
    programs = module.NORM_PROGRAMS
    try:
        for module.NORM_PROGRAMS in (2, programs):  # more tiles than programs, and fewer
            for n in (1, 63, 4096, 5 * 4096 + 17):
                grad = torch.randn(n, device=DEVICE) + 1
                norm, exact = module.grad_norm(grad), grad.double().square().sum().sqrt().item()
                assert norm.shape == () and norm.dtype == torch.float32
                assert norm.item() == pytest.approx(exact, rel=1e-6)
                assert torch.equal(norm, module.grad_norm(grad))
    finally:
        module.NORM_PROGRAMS = programs


def check(module: ModuleType) -> None:
    torch.manual_seed(0)
    guard = torch.full((2500 + module.BLOCK,), 7.0, device=DEVICE)  # nothing is written past n
    state = [guard.clone() for _ in range(4)]
    one = scalar(1.0)
    module.adamw_(None, *(s[:2500] for s in state), 0, one, one, one)
    assert all(torch.equal(s[2500:], guard[2500:]) for s in state)
    check_flat(module)
    check_norm(module)


@pytest.mark.usefixtures("poison")
def test_check_passes() -> None:
    check(kernels)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_is_killed(mutant: Mutant, tmp_path: Path) -> None:
    assert_killed(mutant, check, tmp_path)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(n=st.integers(1, 3000), data=st.data())
def test_any_size_and_boundary(n: int, data: st.DataObject) -> None:
    check_flat(kernels, n, data.draw(st.integers(0, n)))


@pytest.mark.parametrize("fused", [False, True])
def test_twenty_steps_like_torch(fused: bool) -> None:
    """Within 4 ulp of what torch.optim.AdamW makes of the same gradients."""
    n, steps, lr = 3000, 20, 1e-3
    start, grads = torch.randn(n, device=DEVICE), gradients(n, steps)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW(
        [parameter], lr=lr, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=fused
    )
    for g in grads:
        parameter.grad = g.clone()
        optimizer.step()
    p, m, v, _ = run_flat(kernels, start, grads, n, [lr] * steps, 1.0)
    state = optimizer.state[parameter]
    largest = torch.stack(grads).abs().amax(0).cpu().numpy()
    assert_ulps(m, state["exp_avg"].double().cpu().numpy(), 4, largest)
    assert_ulps(v, state["exp_avg_sq"].double().cpu().numpy(), 4, largest**2)
    scale = np.maximum(start.abs().cpu().numpy(), 0.1)
    assert_ulps(p, parameter.detach().double().cpu().numpy(), 12, scale)


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
def test_weight_is_the_rounded_master(dtype: torch.dtype) -> None:
    start, grads = torch.randn(1500, device=DEVICE), gradients(1500, 3)
    p, _, _, weight = run_flat(kernels, start, grads, 700, [1e-2] * 3, 1.0, dtype)
    assert weight is not None and torch.equal(weight, p.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradient_is_read_exactly(dtype: torch.dtype) -> None:
    start, grads = torch.randn(1500, device=DEVICE), gradients(1500, 3, dtype)
    narrow = run_flat(kernels, start, grads, 700, [1e-2] * 3, 1.0)
    wide = run_flat(kernels, start, [g.float() for g in grads], 700, [1e-2] * 3, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(narrow[:3], wide[:3], strict=True))
    torch.testing.assert_close(kernels.grad_norm(grads[0]), grads[0].float().norm())


def test_the_reference_norm_is_exact_for_long_buffers() -> None:
    grad = torch.randn(5_000_001)
    assert reference.grad_norm(grad).item() == pytest.approx(grad.double().norm().item(), rel=1e-6)


@pytest.mark.parametrize("t", [1, 2, 10, 1000, 143_000])
def test_bias_correction_keeps_its_precision(t: int) -> None:
    """From m = v = 0 the update is g·√(1 − β₂ᵗ)·(1 − β₁)/((1 − β₁ᵗ)·√(1 − β₂)·|g|), for any β."""
    for betas in ((0.9, 0.95), (0.9, 0.999), (0.99, 0.9999)):
        p, m, v = (torch.zeros(8, device=DEVICE) for _ in range(3))
        g = torch.ones(8, device=DEVICE)
        kernels.adamw_(None, p, m, v, g, 0, scalar(1), scalar(t), scalar(1), betas, 0.0, 0.0)
        b1, b2 = betas
        exact = -(1 - b1) / (1 - b1**t) / math.sqrt((1 - b2) / (1 - b2**t))
        assert p[0].item() == pytest.approx(exact, rel=5e-7)


def test_flat_like_reference() -> None:
    start, grads = torch.randn(300, device=DEVICE), gradients(300, 5)
    p, m, v, _ = run_flat(kernels, start, grads, 100, [1e-2] * 5, 0.5)
    q, w, u, _ = run_flat(reference, start, grads, 100, [1e-2] * 5, 0.5)
    for actual, expected in ((p, q), (m, w), (v, u)):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


def test_norm_reports_what_is_not_finite() -> None:
    for bad in (float("nan"), float("inf")):
        grad = torch.ones(5000, device=DEVICE)
        grad[4500] = bad
        assert not torch.isfinite(kernels.grad_norm(grad))


def test_empty() -> None:
    empty = [torch.zeros(0, device=DEVICE) for _ in range(4)]
    one = scalar(1.0)
    kernels.adamw_(None, *empty, 0, one, one, one)
    assert kernels.grad_norm(empty[0]).item() == 0


def test_bad_input_names_the_argument() -> None:
    p, m, v, g = (torch.zeros(8, device=DEVICE) for _ in range(4))
    one = scalar(1.0)

    def step(weight=None, master=p, exp_avg=m, grad=g, lr=one, t=one, **more):
        kernels.adamw_(weight, master, exp_avg, v, grad, 0, lr, t, one, **more)

    with pytest.raises(TypeError, match="master: dtype float16"):
        step(master=p.half())
    with pytest.raises(TypeError, match="weight: dtype float32, not bfloat16 or float16"):
        step(weight=p)
    with pytest.raises(TypeError, match="grad: dtype float64, not float32 or bfloat16 or float16"):
        step(grad=g.double())
    with pytest.raises(ValueError, match="exp_avg: shape"):
        step(exp_avg=m[:7])
    with pytest.raises(ValueError, match="exp_avg: strides"):
        step(exp_avg=torch.zeros(8, 2, device=DEVICE)[:, 0])
    with pytest.raises(ValueError, match="master: rank 2"):
        step(master=p.view(2, 4))
    with pytest.raises(TypeError, match="lr: expected a tensor, got float"):
        step(lr=1e-3)
    with pytest.raises(ValueError, match="step: shape"):
        step(t=torch.zeros(2, device=DEVICE))
    with pytest.raises(ValueError, match="grad: on meta"):
        step(grad=g.to("meta"))
    with pytest.raises(ValueError, match="betas"):
        step(betas=(1.0, 0.95))
