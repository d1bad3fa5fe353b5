"""cross_entropy against the reference, and mutants that must die."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from cross_entropy_proof import inputs, loss_and_grad
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_proof import ATOL, Mutant, assert_close, assert_killed
from op_proof import DEVICE, DTYPES, wide_slice
from torch import Tensor

from pythia_fast.kernels import aot, reference
from pythia_fast.kernels import cross_entropy as kernels

FILE = "kernels/cross_entropy.py"
MUTANTS = [
    Mutant("tail columns left out of the sum", FILE, "    if MAIN < V:\n        o_v = MAIN + tile_offsets(TAIL, VEC)\n        b_x = tl.load(p_row + o_v, mask=o_v < V, other=float(\"-inf\")).to(tl.float32)\n        b_new", "    if MAIN < 0:\n        o_v = MAIN + tile_offsets(TAIL, VEC)\n        b_x = tl.load(p_row + o_v, mask=o_v < V, other=float(\"-inf\")).to(tl.float32)\n        b_new"),
    Mutant("padding enters the sum", FILE, 'mask=o_v < V, other=float("-inf")).to(tl.float32)\n        b_new', "mask=o_v < V, other=0.0).to(tl.float32)\n        b_new"),
    Mutant("last column left out", FILE, 'mask=o_v < V, other=float("-inf")).to(tl.float32)\n        b_new', 'mask=o_v < V - 1, other=float("-inf")).to(tl.float32)\n        b_new'),
    Mutant("lane sums not rescaled", FILE, "b_sum = b_sum * exp(b_max - b_new)", "b_sum = b_sum"),
    Mutant("lanes merged without their max", FILE, "tl.sum(b_sum * exp(b_max - b_m), axis=0)", "tl.sum(b_sum, axis=0)"),
    Mutant("full tiles not rescaled for the tail", FILE, "b_s * exp(b_m - b_new)", "b_s"),
    Mutant("no onehot", FILE, "exp(b_target - b_shift) - b_scale", "exp(b_target - b_shift)"),
    Mutant("onehot without scale", FILE, "exp(b_target - b_shift) - b_scale", "exp(b_target - b_shift) - 1.0"),
    Mutant("gradient without 1/sum", FILE, "tl.where(m_target, scale, float(\"nan\")) / b_sum", "tl.where(m_target, scale, float(\"nan\"))"),
    Mutant("loss without scale", FILE, "tl.store(losses + i_row, scale * ((b_max", "tl.store(losses + i_row, ((b_max"),
    Mutant("loss without log", FILE, "tl.log(b_sum)", "b_sum"),
    Mutant("row stride ignored", FILE, "p_row = logits + tl.cast(i_row, tl.int64) * stride", "p_row = logits + tl.cast(i_row, tl.int64) * V"),
    Mutant("negative targets are addresses", FILE, "(i_target >= 0) & (i_target < V)", "i_target < V"),
    Mutant("incoming gradient ignored", FILE, "if b_dloss != 1.0:", "if b_dloss == 12345.0:"),
    Mutant("backward stops after one tile", FILE, "range(0, N, BLOCK)", "range(0, BLOCK, BLOCK)"),
    Mutant("backward: one row a program", FILE, "        for i_row in tl.range(tl.program_id(0), M, tl.num_programs(0)):\n            p_row = dlogits", "        for i_row in tl.range(tl.program_id(0), tl.num_programs(0), tl.num_programs(0)):\n            p_row = dlogits"),
    Mutant("logits written without a gradient", FILE, "write_grad=False).sum()", "write_grad=True).sum()"),
    Mutant("version not counted", FILE, "    if write_grad:\n        torch.autograd.graph.increment_version(logits)", "    if False:\n        torch.autograd.graph.increment_version(logits)"),
]  # fmt: skip


def like(logits: Tensor) -> Tensor:
    """A copy of the same values and strides: the kernel writes into what it is given."""
    return torch.empty_strided(
        logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device
    ).copy_(logits)


def prove(module: ModuleType, logits: Tensor, targets: Tensor, dloss=1.0, scale=None) -> None:
    exact = loss_and_grad(reference.cross_entropy, logits.double(), targets, dloss, scale)
    same = loss_and_grad(reference.cross_entropy, logits, targets, dloss, scale)
    actual = loss_and_grad(module.cross_entropy, like(logits), targets, dloss, scale)
    assert actual[0].dtype == torch.float32 and actual[1].dtype == logits.dtype
    for what, a, s, e in zip(("loss", "gradient"), actual, same, exact, strict=True):
        assert_close(a, s, e, what)
    # the gradient's largest entries are 1/M: hold it to that size, not to the ATOL of size 1
    error = (actual[1].double() - exact[1]).abs().max().item()
    torch_error = (same[1].double() - exact[1]).abs().max().item()
    size = exact[1].abs().max().item()
    assert error <= 2 * torch_error + ATOL[logits.dtype] * size + 6e-8, f"gradient: {error:.3g}"
    with torch.no_grad():
        untouched = like(logits)
        forward = module.cross_entropy(untouched, targets, scale)
        torch.testing.assert_close(forward, actual[0], rtol=1e-6, atol=1e-6)
        assert torch.equal(untouched, logits)


SHAPES = [
    (1, 50), (63, 50), (65, 1000), (100, 50), (257, 1000), (1, 1), (2, 50304), (2, 50432), (2, 50688), (3, 16384),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,columns", SHAPES)
@pytest.mark.usefixtures("poison")
def test_loss_and_gradient(rows: int, columns: int, dtype: torch.dtype) -> None:
    prove(kernels, *inputs(rows, columns, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [50, 1001, 16385])
@pytest.mark.usefixtures("poison")
def test_rows_of_a_wider_buffer(columns: int, dtype: torch.dtype) -> None:
    """Nothing beside the slice is read or written."""
    logits, targets = inputs(7, columns, dtype)
    view = wide_slice(logits, before=3, after=5)
    loss, grad = loss_and_grad(kernels.cross_entropy, view, targets, 1.0, 0.5)
    whole = view._base
    assert whole is not None
    assert torch.isnan(whole[:, :3]).all() and torch.isnan(whole[:, 3 + columns :]).all()
    same = loss_and_grad(kernels.cross_entropy, logits.clone(), targets, 1.0, 0.5)
    assert torch.equal(loss, same[0]) and torch.equal(grad, same[1])
    assert grad.data_ptr() == view.data_ptr()  # in place


@pytest.mark.parametrize("scale,dloss", [(None, 3.0), (0.25, 1.0), (0.25, -2.0), (4096.0, 1.0), (0.0, 1.0)])  # fmt: skip
def test_scale_and_incoming_gradient(scale: float | None, dloss: float) -> None:
    prove(kernels, *inputs(5, 1000, torch.float32), dloss, scale)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(rows=st.integers(1, 9), columns=st.integers(1, 300), sliced=st.booleans())
def test_any_shape(rows: int, columns: int, sliced: bool) -> None:
    logits, targets = inputs(rows, columns, torch.float32)
    prove(kernels, wide_slice(logits, 1, 2) if sliced else logits, targets, dloss=2.0)


@pytest.mark.parametrize("columns", [50, 16500])
def test_extreme_logits(columns: int) -> None:
    """±1e4: the loss and gradient keep the precision of the differences."""
    logits, targets = inputs(6, columns, torch.float32)
    logits[:3] *= 3e3
    logits[3] += 1e4
    logits[4] -= 1e4
    logits[5] = 1e4
    prove(kernels, logits, targets)


@pytest.mark.parametrize("columns", [50, 16500])
def test_columns_of_minus_infinity(columns: int) -> None:
    """Probability and gradient 0, however many neighbours are −inf; the loss of one is +inf."""
    logits, targets = inputs(4, columns, torch.float32)
    logits[:, 1:-1] = -torch.inf
    targets[:] = torch.tensor([0, columns - 1, 0, columns - 1], device=DEVICE)
    prove(kernels, logits, targets)
    targets[2] = 5
    loss, grad = loss_and_grad(kernels.cross_entropy, logits.clone(), targets, 1.0, 1.0)
    assert loss.item() == torch.inf
    assert torch.isfinite(grad).all() and grad[2, 5].item() == -1.0
    logits[0] = -torch.inf
    loss, grad = loss_and_grad(kernels.cross_entropy, logits.clone(), targets, 1.0, 1.0)
    assert torch.isnan(loss) and torch.isnan(grad[0]).all() and torch.isfinite(grad[1:]).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_reported(bad: float) -> None:
    logits, targets = inputs(3, 1000, torch.float32)
    logits[1, 700] = bad
    loss, grad = loss_and_grad(kernels.cross_entropy, logits, targets, 1.0, None)
    assert torch.isnan(loss) and torch.isnan(grad[1]).any()
    assert torch.isfinite(grad[[0, 2]]).all()


def out_of_range(module: ModuleType) -> None:
    """Without the host's check, as on a GPU: NaN for the row, and nothing else."""
    logits, targets = inputs(4, 100, torch.float32)
    expected = loss_and_grad(module.cross_entropy, logits.clone(), targets, 1.0, 1.0)[1]
    for wrong in (-1, -100, 100, 2**31 + 5, 2**40, -(2**40)):
        targets[2] = wrong
        leaf = logits.clone()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "check_targets", lambda *_: None)
            losses = module.cross_entropy_fwd(leaf, targets, 1.0, write_grad=True)
        assert torch.isnan(losses).tolist() == [False, False, True, False]
        assert torch.isnan(leaf[2]).all()
        assert torch.equal(leaf[[0, 1, 3]], expected[[0, 1, 3]])


def fails_by_version(loss: Tensor) -> bool:
    try:
        loss.backward()
    except RuntimeError as error:
        return "modified by an inplace operation" in str(error)
    return False


def misuse(module: ModuleType) -> None:
    """Autograd tells whoever saved the logits, and whoever goes backward twice."""
    leaf, targets = inputs(3, 20, torch.float32)
    logits = leaf.requires_grad_() * 1
    saved_them = logits.exp().sum() + (logits * logits).sum()
    loss = module.cross_entropy(logits, targets)
    assert fails_by_version(saved_them)
    loss.backward(retain_graph=True)
    assert fails_by_version(loss)


def check(module: ModuleType) -> None:
    torch.manual_seed(0)
    out_of_range(module)
    for rows, columns in ((5, 50), (4, 33000)):  # tail alone; two full tiles and a tail
        logits, targets = inputs(rows, columns, torch.float32)
        logits += torch.linspace(-20, 20, columns, device=DEVICE)  # lanes and tiles differ in max
        prove(module, wide_slice(logits, 2, 3), targets, dloss=2.0, scale=0.7)
        prove(module, logits.flip(1).contiguous(), targets, dloss=2.0, scale=0.7)
    prove(module, *inputs(5, 50, torch.float32))  # padding by 0 would count beside these
    misuse(module)


def test_check_passes() -> None:
    check(kernels)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_is_killed(mutant: Mutant, tmp_path: Path) -> None:
    assert_killed(mutant, check, tmp_path)


@pytest.mark.parametrize("stride", [2**30 + 64, 2**31 + 64])
def test_row_offsets_are_64_bit(stride: int) -> None:
    """Rows beyond 2³¹ elements, in memory that is reserved but never touched between them."""
    try:
        rows = torch.empty_strided((4, 50), (stride, 1), dtype=torch.float16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"cannot reserve {6 * stride / 2**30:.0f} GiB: {error}")
    logits, targets = inputs(4, 50, torch.float16)
    rows.copy_(logits)
    expected = loss_and_grad(kernels.cross_entropy, logits, targets, 2.0, 1.0)
    actual = loss_and_grad(kernels.cross_entropy, rows, targets, 2.0, 1.0)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_two_rows_fit_an_sm_and_full_tiles_are_128_bit() -> None:
    """What the docstring claims of the compiled kernel: registers of two programs, no spill."""
    pytest.importorskip("triton.backends.nvidia")
    case = "cross_entropy: 70m forward with gradient bf16"
    (row,) = aot.compile_all([kernels.__name__], ["sm_90"], only=case, workers=1)
    assert row["violations"] == [] and row["spill_bytes"] == 0
    assert kernels.ROWS_PER_SM * row["registers"] * 32 * kernels.WARPS <= 65536
    full = kernels.BLOCK // (32 * kernels.WARPS * 8)  # accesses a thread
    assert row["accesses"]["logits"]["ld128"] == 2 * full
    assert row["accesses"]["logits"]["st128"] == full


def test_two_runs_are_equal_bit_for_bit() -> None:
    logits, targets = inputs(65, 1000, torch.float32)
    runs = [
        loss_and_grad(kernels.cross_entropy, logits.clone(), targets, 3.0, None) for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_wrong_target_is_named() -> None:
    logits, targets = inputs(4, 50, torch.float32)
    targets[3] = 50
    with pytest.raises(ValueError, match=r"targets: row 3 has id 50, not in \[0, 50\)"):
        kernels.check_targets(targets, 50)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=r"targets: row 3 has id 50, not in \[0, 50\)"):
            kernels.cross_entropy(logits, targets)
        targets[3] = -100  # torch's default ignore_index is no exception here
        with pytest.raises(ValueError, match="targets: row 3 has id -100"):
            kernels.cross_entropy(logits, targets)
        with pytest.raises(IndexError):
            reference.cross_entropy(logits, targets)


def test_empty() -> None:
    logits = torch.zeros(0, 50, device=DEVICE, requires_grad=True)
    targets = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    loss = kernels.cross_entropy(logits, targets)
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and logits.grad.shape == (0, 50)


def test_bad_input_names_the_argument() -> None:
    logits, targets = inputs(4, 50, torch.float32)
    with pytest.raises(TypeError, match="logits: dtype float64"):
        kernels.cross_entropy(logits.double(), targets)
    with pytest.raises(TypeError, match="targets: dtype int32, not int64"):
        kernels.cross_entropy(logits, targets.int())
    with pytest.raises(ValueError, match="logits: rank 3"):
        kernels.cross_entropy(logits.view(2, 2, 50), targets)
    with pytest.raises(ValueError, match="targets: shape"):
        kernels.cross_entropy(logits, targets[:3])
    with pytest.raises(ValueError, match="targets: on meta"):
        kernels.cross_entropy(logits, targets.to("meta"))
    with pytest.raises(ValueError, match="logits: strides"):
        kernels.cross_entropy(logits.t().contiguous().t(), targets)
    with pytest.raises(ValueError, match=r"logits: strides .* overlap"):
        kernels.cross_entropy(logits[:1].expand(4, 50), targets)
    with pytest.raises(ValueError, match="logits: shape"):
        kernels.cross_entropy(logits[:, :0], targets)
