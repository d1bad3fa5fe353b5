"""Cross-entropy over vocabulary shards against the whole vocabulary, and mutants that must die."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cross_entropy_proof import inputs, loss_and_grad
from kernel_proof import Mutant, assert_close, assert_killed
from op_proof import DEVICE, DTYPES
from torch import Tensor

from pythia_fast.kernels import cross_entropy_shards as kernels
from pythia_fast.kernels import reference

FILE = "kernels/cross_entropy_shards.py"
MUTANTS = [
    Mutant("shard: start added", FILE, "- vocab_start\n        m_target = (i_target >= 0) & (i_target < V)\n        b_target = tl.load(p_row + i_target, mask=m_target, other=float(\"nan\"))", "+ vocab_start\n        m_target = (i_target >= 0) & (i_target < V)\n        b_target = tl.load(p_row + i_target, mask=m_target, other=float(\"nan\"))"),
    Mutant("shard gradient: start ignored", FILE, " - vocab_start\n        m_target = (i_target >= 0) & (i_target < V)\n        b_target = tl.load(p_row + i_target, mask=m_target, other=0.0)", "\n        m_target = (i_target >= 0) & (i_target < V)\n        b_target = tl.load(p_row + i_target, mask=m_target, other=0.0)"),
    Mutant("shard gradient: first row's lse", FILE, "tl.load(lse + i_row)", "tl.load(lse)"),
    Mutant("shard without the target gives 0", FILE, 'mask=m_target, other=float("nan")', "mask=m_target, other=0.0"),
    Mutant("combined without the first shard's max", FILE, "exp(b_m - b_new) * b_s +", "b_s +"),
    Mutant("combined without a shard's max", FILE, "+ exp(b_max - b_new) * b_sum", "+ b_sum"),
    Mutant("last shard left out", FILE, "for i_shard in range(1, S):", "for i_shard in range(1, S - 1):"),
    Mutant("last shard's target alone", FILE, "b_target = tl.where(b_t == b_t, b_t, b_target)", "b_target = b_t"),
    Mutant("no target, no matter", FILE, "b_lse = tl.where(b_target == b_target, b_m + b_log, b_target)", "b_lse = b_m + b_log"),
    Mutant("first rows only", FILE, "o_row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)", "o_row = tl.arange(0, BLOCK)"),
    Mutant("combined loss without scale", FILE, "tl.store(losses + o_row, scale * ((b_m", "tl.store(losses + o_row, ((b_m"),
    Mutant("shard gradient: row stride ignored", FILE, "p_row = logits + tl.cast(i_row, tl.int64) * stride\n        i_target = tl.load(targets + i_row) - vocab_start\n        m_target = (i_target >= 0) & (i_target < V)\n        b_target = tl.load(p_row + i_target, mask=m_target, other=0.0)", "p_row = logits + tl.cast(i_row, tl.int64) * V\n        i_target = tl.load(targets + i_row) - vocab_start\n        m_target = (i_target >= 0) & (i_target < V)\n        b_target = tl.load(p_row + i_target, mask=m_target, other=0.0)"),
]  # fmt: skip


SPLITS = [(0, 17, 50), (0, 1, 20, 50), (0, 16400, 20000), (0, 999, 1000)]


def check_shards(module: ModuleType, bounds: tuple[int, ...], dtype: torch.dtype) -> None:
    """Unequal shards, combined by the formula of the docstring, are the whole vocabulary."""
    logits, targets = inputs(5, bounds[-1], dtype)
    logits[1] += 5  # so that row maxima differ between rows
    pieces = [logits[:, a:b] for a, b in pairwise(bounds)]
    stats = [
        module.cross_entropy_stats(p, targets, a) for p, a in zip(pieces, bounds, strict=False)
    ]
    stacked = [torch.stack(s) for s in zip(*stats, strict=True)]
    scale = 0.2
    losses, lse = module.cross_entropy_combine(*stacked, scale)
    assert {t.dtype for t in (*stacked, losses, lse)} == {torch.float32}
    exact = loss_and_grad(reference.cross_entropy, logits.double(), targets, 1.0, scale)
    same = loss_and_grad(reference.cross_entropy, logits, targets, 1.0, scale)
    assert_close(losses.sum(), same[0], exact[0], "loss")
    torch.testing.assert_close(lse.double(), logits.double().logsumexp(1), rtol=1e-6, atol=1e-6)
    for mine, specified in zip(
        (losses, lse), reference.cross_entropy_combine(*stacked, scale), strict=True
    ):
        torch.testing.assert_close(mine, specified, rtol=1e-6, atol=1e-6)
    for piece, (a, m_i, s_i, t_i) in zip(pieces, zip(bounds, *zip(*stats, strict=True), strict=False), strict=True):  # fmt: skip
        expected = reference.cross_entropy_stats(piece.double(), targets, a)
        assert torch.equal(m_i.double(), expected[0])
        torch.testing.assert_close(t_i.double(), expected[2], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(s_i.double(), expected[1], rtol=1e-5, atol=0)
    for piece, a in zip(pieces, bounds, strict=False):
        assert module.cross_entropy_grad_(piece, targets, lse, scale, a) is piece
    assert_close(logits, same[1], exact[1], "gradient")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bounds", SPLITS)
@pytest.mark.usefixtures("poison")
def test_shards(bounds: tuple[int, ...], dtype: torch.dtype) -> None:
    check_shards(kernels, bounds, dtype)


def combine_many_rows(module: ModuleType) -> None:
    """More than one program, rows that fill no tile, slices as an all-gather gives them."""
    rows = 2 * module.BLOCK_COMBINE + 17
    gathered = torch.rand(3, 3, rows, device=DEVICE) + 0.5
    maxima, sums, target = gathered.unbind(1)
    maxima[:] = 30 * torch.randn(3, rows, device=DEVICE)
    sums = torch.cat((sums, sums), dim=1)[:, :rows]
    holder = torch.randint(3, (rows,), device=DEVICE)
    target[torch.arange(3, device=DEVICE)[:, None] != holder] = float("nan")
    actual = module.cross_entropy_combine(maxima, sums, target, 0.5)
    exact = reference.cross_entropy_combine(maxima.double(), sums.double(), target.double(), 0.5)
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-6, atol=1e-5)


def out_of_all_shards(module: ModuleType) -> None:
    """An id that no shard holds: NaN for its loss and its gradient on every shard, nothing else."""
    logits, targets = inputs(5, 50, torch.float32)
    bounds = (0, 20, 30, 50)

    def step(targets: Tensor, bounds: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        mine, shards = logits.clone(), list(pairwise(bounds))
        stats = [module.cross_entropy_stats(mine[:, a:b], targets, a) for a, b in shards]
        losses, lse = module.cross_entropy_combine(*map(torch.stack, zip(*stats, strict=True)))
        for a, b in shards:
            module.cross_entropy_grad_(mine[:, a:b], targets, lse, 1.0, a)
        return losses, mine

    expected = step(targets, bounds)
    assert torch.isfinite(expected[0]).all() and torch.isfinite(expected[1]).all()
    others = torch.arange(5, device=DEVICE) != 3
    for wrong in (-1, -100, 50, 2**31 + 5, -(2**40)):
        targets[3] = wrong
        losses, gradient = step(targets, bounds)
        assert torch.isnan(losses[3]) and torch.isnan(gradient[3]).all()
        assert torch.equal(losses[others], expected[0][others])
        assert torch.equal(gradient[others], expected[1][others])


def check(module: ModuleType) -> None:
    torch.manual_seed(0)
    check_shards(module, (0, 20, 50), torch.float32)
    out_of_all_shards(module)
    combine_many_rows(module)


def test_check_passes() -> None:
    check(kernels)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_is_killed(mutant: Mutant, tmp_path: Path) -> None:
    assert_killed(mutant, check, tmp_path)


def test_empty() -> None:
    logits = torch.zeros(0, 50, device=DEVICE)
    targets = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert all(t.shape == (0,) for t in kernels.cross_entropy_stats(logits, targets))
    none = torch.zeros(2, 0, device=DEVICE)
    assert [t.shape for t in kernels.cross_entropy_combine(none, none, none)] == [(0,), (0,)]
    kernels.cross_entropy_grad_(logits, targets, targets.float(), 1.0)


def test_bad_input_names_the_argument() -> None:
    logits, targets = inputs(4, 50, torch.float32)
    stats = torch.zeros(2, 4, device=DEVICE)
    with pytest.raises(TypeError, match="row_max: expected a tensor, got list"):
        kernels.cross_entropy_combine([stats], stats, stats)
    with pytest.raises(TypeError, match="row_sum: dtype float16, not float32"):
        kernels.cross_entropy_combine(stats, stats.half(), stats)
    with pytest.raises(ValueError, match="row_target: shape"):
        kernels.cross_entropy_combine(stats, stats, stats[:1])
    with pytest.raises(ValueError, match="row_max: rank 1"):
        kernels.cross_entropy_combine(stats[0], stats[0], stats[0])
    with pytest.raises(ValueError, match=r"row_max: shape \(0, 4\), expected \(p, M\)"):
        kernels.cross_entropy_combine(stats[:0], stats[:0], stats[:0])
    with pytest.raises(TypeError, match="lse: dtype float64"):
        kernels.cross_entropy_grad_(logits, targets, logits[:, 0].double(), 1.0)
    with pytest.raises(ValueError, match="lse: shape"):
        kernels.cross_entropy_grad_(logits, targets, logits[:3, 0].contiguous(), 1.0)
