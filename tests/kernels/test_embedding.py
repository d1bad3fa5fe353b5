"""An embedding's gradient against torch's in float64: runs of ids over chunks, and mutants."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_proof import Mutant, assert_killed
from op_proof import DEVICE, DTYPES, normal, wide_slice
from torch import Tensor

from pythia_fast.kernels import embedding as kernels

FILE = "kernels/embedding.py"
MUTANTS = [
    Mutant("rows in the order of their ids", FILE, "i_row = tl.load(order + i)", "i_row = i"),
    Mutant("a run is not ended", FILE, "            b_sum = tl.zeros((BLOCK,), tl.float32)\n            whole", "            whole"),
    Mutant("every run taken for whole", FILE, "if whole & (i_id < V):", "if i_id < V:"),
    Mutant("runs that go on lost", FILE, "elif i + 1 == count:", "elif i + 1 == count - CHUNK:"),
    Mutant("parts in one slot", FILE, "2 * i_chunk + whole.to(tl.int64)", "2 * i_chunk"),
    Mutant("first part lost", FILE, "b_sum = tl.load(partials + (2 * i_chunk + 1) * H + o)", "b_sum = tl.zeros((BLOCK,), tl.float32)"),
    Mutant("one chunk of a long run", FILE, "        while goes_on:", "        if goes_on:"),
    Mutant("a run added once a chunk", FILE, "if goes_on & (i_before != i_id):", "if goes_on:"),
    Mutant("a run elsewhere added", FILE, "if whole & (i_id < V):", "if whole:"),
    Mutant("a long run elsewhere added", FILE, "== i_id) & (i_id < V)", "== i_id)"),
    Mutant("chunks elsewhere walked", FILE, "tl.where(i_id < V, tl", "tl.where(i_id >= 0, tl"),
    Mutant("written instead of added", FILE, "tl.load(p_row).to(tl.float32) + b_sum", "b_sum"),
    Mutant("not cleared", FILE, "        grad.zero_()", "        pass"),
    Mutant("read past the end", FILE, "i + 1 < M, other=-1)", "i + 1 < M, other=0)"),
]  # fmt: skip


def expected(start: Tensor, dy: Tensor, ids: Tensor, add: bool) -> tuple[Tensor, Tensor]:
    """torch's own gradient of an embedding in float64, and Σ|dy| of each row."""
    weight = torch.zeros(start.shape, dtype=torch.float64, device=start.device).requires_grad_()
    here = ids < len(start)
    dy, ids = dy[here], ids[here]
    found = []
    for cotangent in (dy.double(), dy.double().abs()):
        (gradient,) = torch.autograd.grad(
            torch.nn.functional.embedding(ids, weight), weight, cotangent
        )
        found.append(gradient)
    return found[0] + (start.double() if add else 0), found[1] + start.double().abs()


def check_one(
    module: ModuleType, ids: Tensor, vocab: int, h: int, dtype: torch.dtype, add: bool = True
) -> None:
    dy = wide_slice(normal(*ids.shape, h, dtype=dtype))
    for of in {torch.float32, dtype}:
        around = normal(vocab + 1, h, dtype=of)  # a row more, that nothing may touch
        again, grad = around.clone(), around[:-1]
        after = around[-1].clone()
        exact, size = expected(grad, dy, ids, add)
        module.embedding_grad_(grad, dy, ids, add)
        error = (grad.double() - exact).abs()
        allowed = torch.finfo(of).eps * exact.abs() + 4e-7 * size
        assert (error <= allowed).all(), f"{(error / allowed).max():.2f} of what is allowed"
        module.embedding_grad_(again[:-1], dy, ids, add)
        assert torch.equal(around, again) and torch.equal(around[-1], after)


def check(module: ModuleType) -> None:
    """Ids all equal, all different, runs that end at a chunk's end, and one over three chunks."""
    c = module.CHUNK
    runs = [1, c - 1, c, 2, 3 * c + 5, 1, 1, c - 9, 7]
    long = torch.repeat_interleave(torch.arange(len(runs)), torch.tensor(runs))
    long = long[torch.randperm(len(long))].to(DEVICE)
    for add in (True, False):
        check_one(module, long, len(runs) + 1, 48, torch.float32, add)
    check_one(module, torch.full((2 * c,), 3, device=DEVICE), 5, 32, torch.float32)
    check_one(module, torch.zeros(1, dtype=torch.int64, device=DEVICE), 1, 5, torch.float32)
    check_elsewhere(module)


def check_elsewhere(module: ModuleType) -> None:
    """Ids of no row here: none but these, a few, and chunks of them, of which dy is not read."""
    c = module.CHUNK
    for here, elsewhere in ((0, 5), (c + 3, 4), (c + 3, 5 * c), (2 * c, 2 * c)):
        ids = torch.cat((torch.randint(6, (here,)), torch.full((elsewhere,), 6)))
        made: list[Tensor] = []
        with mock.patch.object(torch, "empty", recorded(torch.empty, made)):
            check_one(module, ids[torch.randperm(len(ids))].to(DEVICE), 6, 16, torch.float32)
        partials = [t for t in made if t.dim() == 3]
        first = -(-here // c)  # of the chunks that are elsewhere altogether
        assert partials and all(t[first:].isnan().all() for t in partials)


def recorded(make: Callable[..., Tensor], made: list[Tensor]) -> Callable[..., Tensor]:
    def record(*shape: Any, **kind: Any) -> Tensor:
        made.append(make(*shape, **kind))
        return made[-1]

    return record


@pytest.mark.usefixtures("poison")
def test_check_passes() -> None:
    check(kernels)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_is_killed(mutant: Mutant, tmp_path: Path) -> None:
    assert_killed(mutant, check, tmp_path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_widths(dtype: torch.dtype) -> None:
    for h in (96, 768, 1024):
        check_one(kernels, torch.randint(9, (2, 20), device=DEVICE), 10, h, dtype)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(count=st.integers(1, 150), vocab=st.integers(1, 40))
def test_any_ids(count: int, vocab: int) -> None:
    check_one(kernels, torch.randint(vocab + 1, (count,), device=DEVICE), vocab, 16, torch.float32)


def test_nothing_to_add() -> None:
    grad = torch.ones(4, 8, device=DEVICE)
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    kernels.embedding_grad_(grad, torch.zeros(0, 8, device=DEVICE), none)
    assert grad.min() == 1
    kernels.embedding_grad_(grad, torch.zeros(0, 8, device=DEVICE), none, add=False)
    assert grad.max() == 0


def test_bad_input_names_the_argument() -> None:
    grad, dy = torch.zeros(4, 8, device=DEVICE), torch.zeros(3, 8, device=DEVICE)
    ids = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="grad: strides"):
        kernels.embedding_grad_(torch.zeros(4, 16, device=DEVICE)[:, :8], dy, ids)
    with pytest.raises(TypeError, match="ids: dtype int32"):
        kernels.embedding_grad_(grad, dy, ids.int())
    with pytest.raises(ValueError, match=r"dy: shape \(3, 8\), expected \(2, 8\)"):
        kernels.embedding_grad_(grad, dy, ids[:2])
    with pytest.raises(ValueError, match="dy: on meta"):
        kernels.embedding_grad_(grad, dy.to("meta"), ids)
