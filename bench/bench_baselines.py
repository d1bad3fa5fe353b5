"""What the machine and its libraries give, without a kernel of ours: the limits to compare with.

    python -m bench.suite --only baselines

The sustained product (60 s of 8192³ on N(0, 1) data; zeros would run faster) and a copy, the
products of every size (forward, gradient of the data, gradient of the weights), and torch's
attention with flash and with cuDNN pinned at the suite's five head dims.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from bench import timing
from bench.nvml import Sampler
from bench.op import SIZES, Draw, shape
from bench.processes import Case
from bench.record import Row, times

SUSTAINED = 60.0  # seconds
LAST = 20.0  # of them, whose median is the limit: clocks have settled
SIDE = 8192
FIRST = 5  # measurements whose median is the rate of a burst
CHUNK = 20  # products a measurement, about 30 ms
KEPT = 100  # measurements that a row carries
COPY_BYTES = 2 << 30
TOKENS = 16384  # rows of a microbatch's products
POSITIONS, ATTENTION_ROWS = 2048, 8
HEAD_DIMS = {32: "14m", 64: "410m", 80: "2.8b", 128: "1.4b", 256: "1b"}  # and a size that has it
ATTENTION = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION"}  # of SDPBackend

Scale = dict[str, int]


def limits(seconds: float = SUSTAINED) -> Iterator[Case]:
    """The rates that every other is a share of: the product at first and sustained, and a copy."""
    yield _case("product", f"{SIDE}x{SIDE}x{SIDE} bf16", seconds + 60, seconds=seconds)
    yield _case("copy", f"{COPY_BYTES >> 30} GB", 60.0)


def cases(seconds: float = SUSTAINED) -> Iterator[Case]:
    """In order of value."""
    yield from limits(seconds)
    for head_dim, size in HEAD_DIMS.items():
        for impl in ATTENTION:
            name = f"head dim {head_dim} {ATTENTION_ROWS}x{POSITIONS} bf16 {impl}"
            yield _case("attention", name, 60.0, impl=impl, size=size)
    for size in SIZES:
        yield _case("products", f"{size} {TOKENS} tokens bf16", 90.0, size=size)


def _case(kind: str, name: str, limit_s: float, **what: Any) -> Case:
    head = {"bench": "baseline", "kind": kind, **what}
    return Case("bench.bench_baselines", f"{kind} {name}", head, {"kind": kind, **what}, limit_s)


def measure(
    kind: str,
    timer: timing.Timer | None = None,
    scale: Scale | None = None,
    **what: Any,
) -> Iterator[Row]:
    """The rows of one kind. timer and scale: what a test on the CPU puts in the place of CUDA."""
    device = torch.device("cpu" if timer else "cuda")
    dtype = torch.float32 if timer else torch.bfloat16
    draw = Draw(device)

    def normal(*size: int) -> torch.Tensor:
        return draw(*size, dtype=dtype)

    kinds: dict[str, Callable[..., Iterator[Row]]] = {
        "product": _product, "copy": _copy, "products": _products, "attention": _attention,
    }  # fmt: skip
    yield from kinds[kind](normal, timer or timing.cuda_timer, scale or {}, **what)


def _product(
    normal: Callable[..., torch.Tensor], timer: timing.Timer, scale: Scale, seconds: float
) -> Iterator[Row]:
    side = scale.get("side", SIDE)
    left, right = normal(side, side), normal(side, side)
    left @ right  # the library chooses its algorithm
    clock = timing.step_clock(left.device)
    rates: list[tuple[float, float]] = []  # seconds since the start, TFLOP/s
    began = time.monotonic()
    with Sampler() as sampler:
        while (now := time.monotonic() - began) < seconds or not rates:
            clock.mark()
            for _ in range(CHUNK):
                left @ right
            clock.mark()
            (whole,) = clock.intervals()
            rates.append((now, CHUNK * 2 * side**3 / whole / 1e9))
    settled = [rate for at, rate in rates if at >= rates[-1][0] - LAST]
    row = times([2 * side**3 / rate / 1e9 for rate in settled[:: -(-len(settled) // KEPT)]])
    rate = 2 * side**3 / row["ms_p50"] / 1e9
    burst = median(rate for _, rate in rates[:FIRST])
    yield {"limit": "tflops", "tflops": rate, "tflops_first": burst, "seconds": seconds} | {
        **row,
        **sampler.summary(),
    }


def _copy(normal: Callable[..., torch.Tensor], timer: timing.Timer, scale: Scale) -> Iterator[Row]:
    size = scale.get("copy_bytes", COPY_BYTES)
    source = normal(size // normal(1).itemsize)
    target = torch.empty_like(source)
    timed = timer(lambda: None, lambda _: target.copy_(source))
    row = times(timed.ms)
    yield {"limit": "gbps", "gbps": 2 * size / row["ms_p50"] / 1e6, **row, **timed.device}


def _products(
    normal: Callable[..., torch.Tensor], timer: timing.Timer, scale: Scale, size: str
) -> Iterator[Row]:
    s, rows = shape(size, 1, 1), scale.get("tokens", TOKENS)
    h, v = s.hidden, scale.get("vocab", s.vocab)
    layers = {"qkv": (3 * h, h), "dense": (h, h), "mlp in": (4 * h, h), "mlp out": (h, 4 * h)}
    for layer, (outputs, inputs) in (layers | {"head": (v, h)}).items():
        x, weight, dy = normal(rows, inputs), normal(outputs, inputs), normal(rows, outputs)
        forms = {"forward": (x, weight.T), "data": (dy, weight), "weight": (dy.T, x)}
        for which, pair in forms.items():
            timed = timer(partial(tuple, pair), lambda operands: torch.mm(*operands))
            row = times(timed.ms)
            rate = 2 * rows * outputs * inputs / row["ms_p50"] / 1e9
            yield {
                "part": f"{layer} {which}", "shape": [rows, outputs, inputs], "tflops": rate,
                **row, **timed.device,
            }  # fmt: skip


def _attention(
    normal: Callable[..., torch.Tensor], timer: timing.Timer, scale: Scale, impl: str, size: str
) -> Iterator[Row]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    rows, positions = scale.get("rows", ATTENTION_ROWS), scale.get("positions", POSITIONS)
    s = shape(size, rows, positions)
    q, k, v = (normal(rows, s.heads, positions, s.head_dim).requires_grad_() for _ in range(3))
    gradient = torch.randn_like(q)
    # two products of T²·D a head, half of them masked; the backward has five
    work = 2 * rows * s.heads * positions**2 * s.head_dim
    on_cpu = q.device.type == "cpu"
    backend = SDPBackend.MATH if on_cpu else getattr(SDPBackend, ATTENTION[impl])
    with sdpa_kernel(backend):

        def forward() -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        passes = {
            "forward": (lambda: None, lambda _: forward(), 1.0),
            "backward": (forward, lambda y: torch.autograd.grad(y, (q, k, v), gradient), 2.5),
        }
        for which, (prepare, run, share) in passes.items():
            timed = timer(prepare, run)
            row = times(timed.ms)
            yield {
                "part": which, "shape": [rows, s.heads, positions, s.head_dim],
                "tflops": share * work / row["ms_p50"] / 1e9, **row, **timed.device,
            }  # fmt: skip
