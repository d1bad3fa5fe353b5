"""The block cut of a row, and the reduction that ends every sum over rows."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_proof import Mutant, assert_close, assert_killed
from op_proof import normal

from pythia_fast.kernels import rows as kernels
from pythia_fast.kernels.rows import SUITE, Tile, column_blocks, tile_for

FILE = "kernels/rows.py"
MUTANTS = [
    Mutant("last partial left out", FILE, "m = (i_p + o_p < P)", "m = (i_p + o_p < P - 1)"),
    Mutant("first rows only", FILE, "partials + (i_p + o_p)[:, None]", "partials + o_p[:, None]"),
    Mutant("sum starts over", FILE, "b_sum += tl.load(partials", "b_sum = tl.load(partials"),
    Mutant("last column left out", FILE, "mask=o_n < N)\n\n\ndef", "mask=o_n < N - 1)\n\n\ndef"),
]


@pytest.mark.parametrize("columns", [1, 2, 96, 128, 768, 1000, 2560, 4096, 5120])
def test_column_blocks_cover_a_row(columns: int) -> None:
    """Powers of two, at most two of them, and never more than twice the row's length."""
    widths = column_blocks(columns)
    assert all(w & (w - 1) == 0 for w in widths)
    assert len(widths) <= 2
    assert columns <= sum(widths) < 2 * columns or columns == sum(widths) == 1
    assert len(widths) == 1 or widths[0] < columns


@pytest.mark.parametrize("h,widths", [(768, (512, 256)), (2560, (2048, 512)), (5120, (4096, 1024))])
def test_hidden_sizes_waste_no_lane(h: int, widths: tuple[int, ...]) -> None:
    assert column_blocks(h) == widths


def test_tile_of_a_size_between_two_entries() -> None:
    table = {128: Tile(rows=2, warps=4), 512: Tile(rows=1, warps=8)}
    assert [tile_for(table, h) for h in (1, 128, 129, 512, 9999)] == [
        *(table[128],) * 2,
        *(table[512],) * 3,
    ]


def test_the_suite_is_the_published_one() -> None:
    """h of configs of EleutherAI/pythia; 1B has the h of 1.4B."""
    assert sorted(SUITE.values()) == [128, 256, 512, 768, 1024, 2048, 2560, 4096, 5120]


def check(module: ModuleType) -> None:
    for count, vectors, h in ((1, 1, 7), (65, 3, 33), (264, 2, 96)):
        partials = normal(count, vectors, h, dtype=torch.float32)
        out = module.sum_partials(partials, torch.float32)
        assert_close(out, partials.sum(0), partials.double().sum(0), f"{count} partials")


@pytest.mark.usefixtures("poison")
def test_check_passes() -> None:
    check(kernels)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_is_killed(mutant: Mutant, tmp_path: Path) -> None:
    assert_killed(mutant, check, tmp_path)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(count=st.integers(1, 200), vectors=st.integers(1, 5), h=st.integers(1, 130))
def test_any_shape(count: int, vectors: int, h: int) -> None:
    partials = normal(count, vectors, h, dtype=torch.float32)
    exact = partials.double().sum(0)
    assert_close(kernels.sum_partials(partials, torch.float32), partials.sum(0), exact)


def test_rounds_once_to_the_dtype_asked_for() -> None:
    """2048 + 1 + 1 is 2050 in fp32 and in fp16, but 2048 when fp16 rounds after every term."""
    partials = torch.ones(3, 1, 4, device=normal(1, dtype=torch.float32).device)
    partials[0] = 2048
    out = kernels.sum_partials(partials, torch.float16)
    assert out.dtype == torch.float16
    assert (out == 2050).all()
