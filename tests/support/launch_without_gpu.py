"""Runs every launcher through Triton's own JIT, up to the launch, on a machine without a GPU.

    python tests/support/launch_without_gpu.py [--record]       (TRITON_INTERPRET unset)

What the interpreter and hand-written signatures skip happens here as on a GPU: argument binding by
keyword, specialisation on 1 and on alignment, the check that globals are constant, compilation for
sm_90. A driver that only names the target stands in for CUDA's. Prints a line a kernel; exit code 1
when one is refused. --record compiles nothing and prints each launch at the sizes of the suite as a
JSON line: kernel, constants, warps and stages, grid and integers.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class NamedTarget:
    """The part of a Triton driver that compilation asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


driver.set_active(NamedTarget())
compiled: Counter[str] = Counter()
refused: list[str] = []
run_for_real = JITFunction.run


def run(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
    try:
        run_for_real(self, *arguments, grid=grid, warmup=True, **keywords)
        compiled[self.__name__] += 1
    except Exception as error:
        reason = (str(error).splitlines() or [""])[-1]
        refused.append(f"{self.__name__}: {type(error).__name__}: {reason}")


def record(self: JITFunction, *, grid: Any, warmup: bool, **keywords: Any) -> None:
    """What an AotCase says of a launch."""
    constant = {p.name for p in self.params if p.is_constexpr}
    # Triton makes constants of ones: these two decide the form of a kernel
    constant |= {n for n in ("segments", "dq_is_zero") if keywords.get(n) == 1}
    constexprs = {n: keywords[n] for n in self.arg_names if n in constant or keywords[n] is None}
    row = {"kernel": self.__name__, "constexprs": constexprs}
    row |= {"num_warps": keywords["num_warps"], "num_stages": keywords.get("num_stages", 3)}
    integers = {n: v for n, v in keywords.items() if n in self.arg_names and type(v) is int}
    row |= {"grid": grid, "integers": integers}
    print(json.dumps(row, default=str))


RECORD = sys.argv[1:] == ["--record"]
JITFunction.run = record if RECORD else run

from pythia_fast.kernels import (  # noqa: E402
    adam,
    adam_lean,
    adam_list,
    attention,
    attention_bwd,
    attention_decode,
    attention_dq,
    checks,
    cross_entropy,
    cross_entropy_shards,
    embedding,
    gelu,
    layer_norm,
    linear_cross_entropy,
    parallel_residual,
    rotary,
)
from pythia_fast.kernels import rows as suite_rows  # noqa: E402

if RECORD:  # a walk is as many programs as its `per_sm`
    suite_rows.multiprocessors = lambda device: 1
checks.INTERPRETED = True  # CPU tensors pass the launchers' checks
BF16 = torch.bfloat16


def rows(count: int, hidden: int) -> None:
    x, w = torch.randn(count, hidden).to(BF16), torch.randn(hidden).to(BF16)
    layer_norm.layer_norm_fwd(x, ((w, w),), 1e-5)
    layer_norm.layer_norm_fwd(x, ((w, w), (w, w)), 1e-5, torch.empty_like(x), (w, w))
    _, mean, rstd = layer_norm.layer_norm_fwd(x, ((w, w), (w, w)), 1e-5)
    layer_norm.layer_norm_bwd(x, x, (x, x), (w, w), mean, rstd, True)
    layer_norm.layer_norm_bwd(x, x, (x, x), (w, w), mean, rstd)
    layer_norm.layer_norm_bwd(x, None, (x,), (w,), mean, rstd)
    layer_norm.layer_norm_bwd(x, None, (x, x), (w, w), mean, rstd)
    layer_norm.layer_norm_bwd(x, None, (x, x), (w, w), None, None)
    parallel_residual.parallel_residual_fwd(x, x, x, w, w)
    parallel_residual.parallel_residual_fwd(x, x, x, w, w, ((w, w), (w, w)))
    parallel_residual.parallel_residual_bwd(x, BF16)


def mlp(count: int, width: int) -> None:
    x, bias = torch.randn(count, width).to(BF16), torch.randn(width).to(BF16)
    for form in gelu.APPROXIMATE:
        gelu.gelu_fwd(x, bias, form)
        gelu.gelu_bwd(x, bias, x, form)


def losses(count: int, vocabulary: int) -> None:
    logits = torch.randn(count, vocabulary).to(BF16)
    targets = torch.zeros(count, dtype=torch.int64)
    for write_grad in (True, False):
        cross_entropy.cross_entropy_fwd(logits, targets, 1.0, write_grad)
    cross_entropy.cross_entropy_bwd(logits, torch.ones(()))


def head(count: int, hidden: int) -> None:
    x, weight = torch.randn(count, hidden).to(BF16), torch.randn(50, hidden).to(BF16)
    linear_cross_entropy.linear_cross_entropy_bwd(x, weight, torch.ones(()))


def shards(count: int, vocabulary: int) -> None:
    logits = torch.randn(count, vocabulary).to(BF16)
    targets = torch.zeros(count, dtype=torch.int64)
    stats = cross_entropy_shards.cross_entropy_stats(logits, targets, 1)
    for number in (1, 4):
        cross_entropy_shards.cross_entropy_combine(*(s.expand(number, -1) for s in stats))
    cross_entropy_shards.cross_entropy_grad_(logits, targets, torch.zeros(count), 1.0, 1)


def optimizer(size: int, dtype: torch.dtype | None) -> None:
    one = torch.ones(1)
    state = [torch.zeros(size) for _ in range(4)]
    weight = None if dtype is None else torch.zeros(size, dtype=dtype)
    weights = None if weight is None else [weight]
    adam.adamw_(weight, *state, 1, one, one, one)
    adam_list.adamw_list_(weights, *[[tensor] for tensor in state], [True], one, one, one)
    halves = [torch.zeros(size, dtype=t) for t in (BF16, torch.int16, BF16, BF16)]
    adam_lean.adamw_lean_(*halves, state[0], 1, one, one, one, torch.zeros(1, dtype=torch.int64))
    adam.grad_norm(state[0])
    adam.grad_norm(state[0].bfloat16())


def rows_of_ids(count: int, hidden: int, dtype: torch.dtype) -> None:
    dy, ids = torch.randn(count, hidden).to(dtype), torch.zeros(count, dtype=torch.int64)
    for grad in (torch.zeros(3, hidden), torch.zeros(3, hidden, dtype=dtype)):
        embedding.embedding_grad_(grad, dy, ids)


def positions(batch: int, length: int, heads: int, dim: int) -> None:
    qkv, table = torch.randn(batch, length, heads, 3 * dim).to(BF16), torch.randn(length, dim // 8)
    for dtype in (torch.float32, BF16):
        rotary.rotary_fwd(qkv, table.to(dtype), table.to(dtype))
        rotary.rotary_bwd(qkv, table.to(dtype), table.to(dtype))


def attend(length: int, heads: int, dim: int, segments: int) -> None:
    attention_bwd._segments = lambda heads, key_tiles, sms: min(segments, key_tiles)
    qkv, table = torch.randn(1, length, heads, 3 * dim).to(BF16), torch.randn(length, dim // 8)
    starts = torch.zeros(1, length, dtype=torch.int32)
    for doc_start in (None, starts):
        ctx, lse = attention.attention_fwd(qkv, doc_start)
        attention_bwd.attention_bwd(qkv, ctx, lse, ctx, table, table, doc_start)
    attention_bwd.attention_bwd(qkv, ctx, lse, ctx, table, table, deterministic=False)
    if not RECORD:
        attention_bwd.attention_bwd(qkv, ctx, lse, ctx)
    cache = torch.randn(1, heads, length, dim).to(BF16)
    for first in (None, torch.zeros(1, dtype=torch.int32)):
        attention_decode.attention_decode(qkv[:, -1:, :, :dim], cache, cache, length, first)


def one_segment(length: int, heads: int, dim: int) -> None:
    """The walk over all key tiles of a head by one program; Triton makes a constant of the 1."""
    attention_bwd._segments = lambda heads, key_tiles, sms: 1
    qkv, table = torch.randn(1, length, heads, 3 * dim).to(BF16), torch.randn(length, dim // 8)
    ctx, lse = attention.attention_fwd(qkv)
    attention_bwd.attention_bwd(qkv, ctx, lse, ctx, table, table)


def suite() -> None:
    """Launches whose cases the ahead-of-time report lists, at every size."""
    for hidden in suite_rows.SUITE.values():
        rows(112, hidden)
        mlp(16, 4 * hidden)
        head(2, hidden)
        rows_of_ids(40, hidden, BF16)
    for vocabulary in (50304, 50432, 50688):
        losses(8, vocabulary)
    for shard in (25216, 25344, 12672):
        shards(8, shard)
    for heads, dim in rotary.SUITE.values():
        positions(1, 2, heads, dim)
    for weight in (torch.float16, BF16, None):
        optimizer(10000, weight)
    for column in (0, 1):
        for module in (attention, attention_bwd, attention_dq):
            module.tile_on = lambda device, tiles, column=column: tiles[column]
        for dim in attention.HEAD_DIMS:
            attend(600, 2, dim, segments=2)
            one_segment(600, 2, dim)


if RECORD:
    suite()
    sys.exit(0)
for shape in ((1, 1), (3, 96), (16, 768)):
    rows(*shape)
    mlp(*shape)
for shape in ((1, 1), (5, 1000), (2, 50304)):
    losses(*shape)
    shards(*shape)
for shape in ((1, 1), (100, 96), (16, 768)):
    rows_of_ids(*shape, BF16)
for size in (1, 10000):
    optimizer(size, BF16)
    optimizer(size, None)
for sizes in ((1, 1, 1, 32), (2, 5, 3, 80)):
    positions(*sizes)
for length, heads, dim, segments in ((17, 3, 80, 1), (600, 16, 64, 2), (300, 1, 256, 1)):
    attend(length, heads, dim, segments)
for name, count in sorted(compiled.items()):
    print(f"{name} {count}")
for line in refused:
    print(f"refused: {line}", file=sys.stderr)
sys.exit(1 if refused else 0)
