"""Attention over a cache of keys and values, against the reference."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_proof import Mutant, assert_close, assert_killed
from op_proof import DEVICE, normal
from torch import Tensor

from pythia_fast.kernels import attention_decode as kernels
from pythia_fast.kernels import reference
from pythia_fast.kernels.attention_tiles import DTYPES

# a GPU's products take 16 bits, so fp32 and its small bounds are for the interpreter
WIDE = DTYPES[0]
TESTED = [d for d in DTYPES if d != torch.bfloat16]
TESTED += [pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="fp32 bounds, or a mutant")

FILE = "kernels/attention_decode.py"
MUTANTS = [
    Mutant("a query sees the next key", FILE, "m = (o_k[None, :] <= o_q[:, None])", "m = (o_k[None, :] <= o_q[:, None] + 1)"),
    Mutant("padding is seen", FILE, "(o_k >= i_first)[None, :]", "(o_k >= 0)[None, :]"),
    Mutant("padding sees nothing", FILE, " | (o_k[None, :] == o_q[:, None])", " | (o_k[None, :] == -1)"),
    Mutant("keys beyond the filled", FILE, "o_q = filled - Q + o_m", "o_q = filled + o_m"),
    Mutant("last stretch left out", FILE, "for i_s in range(stretches):\n        i_row = (i_head * stretches + i_s) * Q + o_m\n        b_share", "for i_s in range(stretches - 1):\n        i_row = (i_head * stretches + i_s) * Q + o_m\n        b_share"),
    Mutant("stretches not brought to one maximum", FILE, "tl.load(row_max + i_row, mask=m_q, other=LOWEST) - b_max)", "tl.load(row_max + i_row, mask=m_q, other=LOWEST) * 0)"),
    Mutant("values of the next head", FILE, "p_v = values + i_b * stride_b + i_h * stride_h", "p_v = values + i_b * stride_b + (i_h + 1) % H * stride_h"),
    Mutant("written to another query", FILE, "i_out = ((i_head // H) * Q + o_m) * H", "i_out = ((i_head // H) * Q + Q - 1 - o_m) * H"),
]  # fmt: skip


def inputs(batch: int, queries: int, heads: int, d: int, length: int, dtype: torch.dtype):
    """q (B, Q, H, D), keys and values (B, H, S, D): columns of a packed buffer and of a cache."""
    packed = normal(batch, queries, heads, 3 * d, dtype=dtype)
    cache = normal(2, batch, heads, length, d, dtype=dtype)
    return packed[..., :d], *cache


def compare(op, q: Tensor, keys: Tensor, values: Tensor, filled: int, first=None) -> None:
    """Split into stretches; what lies beyond `filled` is NaN: a kernel must not let it in."""
    for cache in (keys, values):
        cache[:, :, filled:] = float("nan")
    of_device = op.__globals__["programs"]
    op.__globals__["programs"] = lambda device, per_sm: 16
    try:
        actual = op(q, keys, values, filled, first)
    finally:
        op.__globals__["programs"] = of_device
    same = reference.attention_decode(q, keys, values, filled, first)
    wide = (t.double() for t in (q, keys, values))
    assert_close(actual, same, reference.attention_decode(*wide, filled, first))
    assert actual.dtype == q.dtype and actual.is_contiguous()


@pytest.mark.parametrize("dtype", TESTED)
@pytest.mark.parametrize("d", kernels.TILES)
@pytest.mark.parametrize(("queries", "filled"), [(1, 1), (1, 200), (5, 129), (16, 300)])
@pytest.mark.usefixtures("poison")
def test_attention_decode(queries: int, filled: int, d: int, dtype: torch.dtype) -> None:
    compare(kernels.attention_decode, *inputs(2, queries, 2, d, 310, dtype), filled)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data(), batch=st.integers(1, 3), queries=st.integers(1, 4), heads=st.integers(1, 3))
def test_rows_that_begin_late(data, batch: int, queries: int, heads: int) -> None:
    """Left padding of each row up to its very last position, as generation has it."""
    filled = data.draw(st.integers(queries, 150))
    first = [data.draw(st.integers(0, filled - 1)) for _ in range(batch)]
    tensors = inputs(batch, queries, heads, 64, 160, WIDE)
    starts = torch.tensor(first, dtype=torch.int32, device=DEVICE)
    compare(kernels.attention_decode, *tensors, filled, starts)


def check(module: ModuleType) -> None:
    starts = torch.tensor([0, 130], dtype=torch.int32, device=DEVICE)
    for first in (None, starts):
        compare(module.attention_decode, *inputs(2, 5, 2, 64, 300, WIDE), 133, first)
        compare(module.attention_decode, *inputs(2, 3, 2, 80, 300, WIDE), 290, first)


def test_check_passes() -> None:
    check(kernels)


@interpreted
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_is_killed(mutant: Mutant, tmp_path: Path) -> None:
    assert_killed(mutant, check, tmp_path)


@interpreted
def test_last_rows_of_causal_attention() -> None:
    """The newest positions over a cache of all keys are the last rows of attention itself."""
    qkv = normal(2, 90, 2, 3 * 64, dtype=WIDE)
    q, k, v = qkv.chunk(3, dim=-1)
    keys, values = (t.transpose(1, 2).contiguous() for t in (k, v))
    ctx = kernels.attention_decode(q[:, -4:], keys, values, 90)
    torch.testing.assert_close(ctx, reference.attention(qkv)[:, -4:], atol=1e-5, rtol=1e-5)


def test_empty_batch() -> None:
    assert kernels.attention_decode(*inputs(0, 1, 2, 64, 8, WIDE), 3).shape == (0, 1, 128)


def test_bad_input_names_the_argument() -> None:
    q, keys, values = inputs(2, 3, 2, 64, 8, WIDE)
    op = kernels.attention_decode
    with pytest.raises(ValueError, match="q: 17 positions, expected 1 to 16"):
        op(*inputs(1, 17, 1, 64, 20, WIDE), 20)
    with pytest.raises(ValueError, match="q: head dim 48"):
        op(*inputs(1, 1, 1, 48, 8, WIDE), 8)
    for filled in (2, 9):
        with pytest.raises(ValueError, match=f"filled: {filled}, expected 3 to 8"):
            op(q, keys, values, filled)
    with pytest.raises(TypeError, match="values: dtype float16, not float32"):
        op(q, keys, values.half(), 8)
    with pytest.raises(ValueError, match="keys: shape"):
        op(q, keys[:, :1], values, 8)
    with pytest.raises(ValueError, match="values: strides"):
        op(q, keys, values.transpose(1, 2).contiguous().transpose(1, 2), 8)
    with pytest.raises(TypeError, match="first: dtype int64, not int32"):
        op(q, keys, values, 8, torch.zeros(2, dtype=torch.int64, device=DEVICE))
