"""Small kernels, each with one fault that the ahead-of-time report must find, and two without."""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl

from pythia_fast.kernels import layer_norm
from pythia_fast.kernels.aot_case import AotCase


@triton.jit
def copy(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, i < n), i < n)


@triton.jit
def matmul(
    a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        left = tl.load(a + rm[:, None] * K + (k + rk)[None, :])
        right = tl.load(b + (k + rk)[:, None] * N + rn[None, :])
        total = tl.dot(left, right, total)
        if MASKED:
            total = tl.where((rn < k)[None, :], total, 0.0)
    tl.store(c + rm[:, None] * N + rn[None, :], total.to(c.dtype.element_ty))


@triton.jit
def center(x, y, n, BLOCK: tl.constexpr):
    """BLOCK values stay in registers between the sum and the store."""
    i = tl.arange(0, BLOCK)
    values = tl.load(x + i, i < n, other=0.0)
    tl.store(y + i, values - tl.sum(values) / n, i < n)


@triton.jit
def sum_rows(x, y, n, BLOCK: tl.constexpr):
    """A loop of one 128-bit load a thread and iteration."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        total += tl.load(x + start + tl.arange(0, BLOCK))
    tl.store(y + tl.arange(0, BLOCK), total)


@triton.jit
def copy_with_tail(x, y):
    """1024 + 256 of 16 bits by 128 threads: 128 bits each, then 32."""
    i = tl.arange(0, 1024)
    tl.store(y + i, tl.load(x + i))
    i = 1024 + tl.arange(0, 256)
    tl.store(y + i, tl.load(x + i))


_COPY = AotCase(
    name="good copy",
    kernel=copy,
    signature={"x": "*bf16", "y": "*bf16", "n": "i32", "BLOCK": "constexpr"},
    constexprs={"BLOCK": 1024},
    num_warps=4,
    num_stages=1,
    wide=("x", "y"),
)
_MATMUL = AotCase(
    name="good matmul",
    kernel=matmul,
    signature={
        **dict.fromkeys("abc", "*bf16"),
        **dict.fromkeys("MNK", "i32"),
        **dict.fromkeys(("BM", "BN", "BK", "MASKED"), "constexpr"),
    },
    constexprs={"BM": 128, "BN": 128, "BK": 64, "MASKED": False},
    num_warps=8,
    num_stages=3,
    wide=("a", "b", "c"),
    matrix=True,
    loop_flops=2 * 128 * 128 * 64,
)
_CENTER = AotCase(
    name="spills",
    kernel=center,
    signature={"x": "*fp32", "y": "*fp32", "n": "i32", "BLOCK": "constexpr"},
    constexprs={"BLOCK": 16384},
    num_warps=1,
    num_stages=1,
)


_TAIL = AotCase(
    name="tail kept",
    kernel=copy_with_tail,
    signature={"x": "*bf16", "y": "*bf16"},
    constexprs={},
    num_warps=4,
    num_stages=1,
    wide=("x", "y"),
    narrow={"x": {"ld32": 1}, "y": {"st32": 1}},
)
_ROW = next(c for c in layer_norm.aot_cases() if c.name == "2.8b layer norm backward bf16")


def aot_cases() -> list[AotCase]:
    huge = {"BM": 128, "BN": 256, "BK": 128, "MASKED": False}
    masked = {**_MATMUL.constexprs, "MASKED": True}
    return [
        _COPY,
        _MATMUL,
        replace(_COPY, name="narrow load", not_aligned=("x",)),
        replace(_COPY, name="no such pointer", wide=("z",)),
        _TAIL,
        replace(_TAIL, name="tail not promised", narrow={"x": {"ld32": 1}}),
        replace(_TAIL, name="main block narrow", not_aligned=("x",)),
        replace(
            _TAIL,
            name="only a tail",
            narrow={"x": {"ld16": 10}, "y": {"st32": 1}},
            not_aligned=("x",),
        ),
        replace(_ROW, name="rows"),
        replace(_ROW, name="rows off their alignment", not_aligned=("M", "stride_x")),
        replace(_COPY, name="no matrix instruction", matrix=True),
        replace(_COPY, name="fits often enough", per_sm=16),
        replace(_COPY, name="does not fit", per_sm=17),  # 16 blocks of 4 warps
        replace(
            _MATMUL, name="too much shared memory", constexprs=huge, num_stages=4, loop_flops=0
        ),
        replace(_MATMUL, name="mask in the loop", constexprs=masked, architectures=("sm_90",)),
        replace(_MATMUL, name="padded product", loop_flops=128 * 128 * 64),
        _CENTER,
        replace(_CENTER, name="spills within budget", spill_budget=1 << 20),
        replace(_CENTER, name="does not compile", constexprs={"BLOCK": 1000}),
        AotCase(
            name="loop",
            kernel=sum_rows,
            signature={"x": "*fp32", "y": "*fp32", "n": "i32", "BLOCK": "constexpr"},
            constexprs={"BLOCK": 512},
            num_warps=4,
            num_stages=1,
            wide=("x", "y"),
        ),
    ]
