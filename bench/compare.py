"""One benchmark: our kernel and its peers on the shapes of the suite, as JSON lines on stdout.

Each `bench_<file>.py` names its ops and peers and calls `main`. A configuration is timed only after
it has been checked against float64; one that fails is a row with "error" and exit code 1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from bench import timing
from bench.bound import Errors, errors
from bench.cases import SIZES, Draw, Op, Shape, arguments, call, find, results, shape, upstream

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEFAULT_SIZES = ("70m", "160m", "410m", "1b", "2.8b", "6.9b", "12b")

Peer = Callable[[], Callable[..., Any]]  # raises ImportError where its package is absent


def peer(module: str, adapt: Callable[[Any], Callable[..., Any]]) -> Peer:
    """A function of another package: adapt(imported module) has the kernel's own signature."""
    return lambda: adapt(importlib.import_module(module))


def worst(
    actual: Mapping[str, torch.Tensor],
    same: Mapping[str, torch.Tensor],
    exact: Mapping[str, torch.Tensor],
    op: Op,
    dtype: torch.dtype,
) -> tuple[str, Errors]:
    """The result nearest to its bound (or beyond it), and its errors.

    Where matrix products come first, fp32 results too are granted the slack of their inputs.
    """
    granted = dtype if op.flops else None
    found = {}
    for name, tensor in exact.items():
        if actual[name].shape != tensor.shape:
            raise AssertionError(f"{name}: shape {tuple(actual[name].shape)}")
        found[name] = errors(actual[name], same[name], tensor, granted)
    name = max(found, key=lambda n: _margin(found[n]))
    return name, found[name]


def _margin(e: Errors) -> float:
    ratios = (e.largest / (e.largest_allowed or 1), e.norm / (e.norm_allowed or 1))
    return max(float("inf") if r != r else r for r in ratios)  # a NaN is worst


def main(
    labels: tuple[str, ...],
    peers: Mapping[str, Mapping[str, Peer]] | None = None,
    argv: list[str] | None = None,
    timer: timing.Timer | None = None,
) -> int:
    """The command of one benchmark file. peers: by label, then by implementation.

    timer: what stands in for CUDA events in a test on the CPU. Returns the exit code.
    """
    parser = argparse.ArgumentParser(description=f"Times {', '.join(labels)} against peers.")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(DEFAULT_SIZES))
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--batch", type=int, default=8, help="rows of a microbatch (default 8)")
    parser.add_argument("--positions", type=int, default=2048, help="of a row (default 2048)")
    parser.add_argument("--only", nargs="+", metavar="IMPL", help="e.g. ours eager compile liger")
    parser.add_argument("--l2", choices=("cold", "warm"), default="cold")
    options = parser.parse_args(argv)
    if options.batch < 1 or options.positions < 1:
        parser.error("--batch and --positions: at least 1")
    if timer is None and not torch.cuda.is_available():
        print("a benchmark needs a CUDA device; none is visible", file=sys.stderr)
        return 2
    device = torch.device("cpu" if timer else "cuda")
    run = Run(timer or timing.cuda_timer, DTYPES[options.dtype], options.l2, device)
    failed = False
    for label in labels:
        op, done = find(label), set()
        for size in options.sizes:
            s = shape(size, options.batch, options.positions)
            if op.key(s) in done:
                continue
            done.add(op.key(s))
            for row in run.rows(op, s, (peers or {}).get(label, {}), options.only):
                failed |= "error" in row
                print(json.dumps(row), flush=True)
    return 1 if failed else 0


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Reset first: beyond eight shapes of one function torch.compile falls back to eager."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


class Run:
    """What all rows of one command share: timer, dtype, L2 policy, and the measured copy rate."""

    def __init__(
        self, timer: timing.Timer, dtype: torch.dtype, l2: str, device: torch.device
    ) -> None:
        self.timer, self.dtype, self.l2, self.device = timer, dtype, l2, device
        self.fixed = timing.environment()
        self.copy_gbps = timing.copy_rate(timer) if device.type == "cuda" else None

    def rows(
        self, op: Op, s: Shape, peers: Mapping[str, Peer], only: list[str] | None
    ) -> Iterator[dict[str, Any]]:
        """A row for each implementation and pass, "skipped" or "error" in the place of times."""
        inputs = op.inputs(s, self.dtype, Draw(self.device))
        same = results(op, op.reference, inputs, self.dtype)
        exact = results(op, op.reference, inputs, self.dtype, torch.float64)
        limit = self._limit(op, s)
        implementations: dict[str, Peer] = {
            "ours": lambda: op.kernel,
            "eager": lambda: op.reference,
            "compile": lambda: _compiled(op.reference),
            **peers,
        }
        for name, load in implementations.items():
            if only and name not in only:
                continue
            head = {"kernel": op.label, "impl": name, "dtype": str(self.dtype)[6:]} | {
                "size": s.size, "shape": list(op.key(s)), "l2": self.l2, **self.fixed,
            }  # fmt: skip
            # only our own kernel must run and keep the bound; a peer's row says that it does not
            verdict = "error" if name == "ours" else "skipped"
            try:
                function = load()
                actual = results(op, function, inputs, self.dtype)
                where, found = worst(actual, same, exact, op, self.dtype)
                del actual
            except Exception as error:  # a package that is absent, a shape that is refused
                yield head | {verdict: f"{type(error).__name__}: {error}"}
                continue
            head |= {"max_err": found.largest, "allowed_err": found.largest_allowed}
            if not found.within:
                yield head | {verdict: f"{where}: {found} is beyond the bound"}
                continue
            for which in op.passes:
                times = self._time(op, function, inputs, which)
                yield head | self._figures(op, s, which, times, limit)

    def _time(
        self, op: Op, function: Callable[..., Any], inputs: dict[str, Any], which: str
    ) -> timing.Times:
        def forward() -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor]]:
            values = arguments(op, inputs)
            return call(op, function, values), [values[n] for n in op.differentiable]

        def gradients(
            outputs: tuple[torch.Tensor, ...], leaves: list[torch.Tensor], above: Any
        ) -> None:
            torch.autograd.grad(outputs, leaves, above)

        if which == "backward":

            def prepare() -> Any:
                outputs, leaves = forward()
                return outputs, leaves, upstream(op, outputs, self.dtype)

            return self.timer(prepare, lambda state: gradients(*state), self.l2)

        def passed() -> tuple[dict[str, Any], list[torch.Tensor]]:
            """What a consumed argument needs is copied before the clock starts."""
            values = arguments(op, inputs)
            leaves = [values[n] for n in op.differentiable]
            for name in set(op.consumed) & set(op.differentiable):
                values[name] = values[name].clone()
            return values, leaves

        def run(state: tuple[dict[str, Any], list[torch.Tensor]]) -> None:
            values, leaves = state
            outputs = function(**values)
            if which == "both":
                torch.autograd.grad(outputs, leaves)

        return self.timer(passed, run, self.l2)

    def _limit(self, op: Op, s: Shape) -> float | None:
        """TFLOP/s of the plain product of the same shape, in the same run."""
        if not op.flops or self.device.type != "cuda":
            return None
        return timing.product_rate(s.rows, s.hidden, s.vocab, self.dtype, self.timer)

    def _figures(
        self, op: Op, s: Shape, which: str, times: timing.Times, limit: float | None
    ) -> dict[str, Any]:
        row: dict[str, Any] = {
            "pass": which, "ms_p20": times.p20, "ms_p50": times.p50, "ms_p80": times.p80,
            "tflops": None, "gbps": None, "frac_of_limit": None,
            "copy_gbps": self.copy_gbps, "product_tflops": limit, **timing.device_state(),
        }  # fmt: skip
        if op.flops:
            row["tflops"] = op.flops(s) / times.p50 / 1e9
            row["frac_of_limit"] = limit and row["tflops"] / limit
        else:
            row["gbps"] = op.bytes_moved[which](s, self.dtype.itemsize) / times.p50 / 1e6
            row["frac_of_limit"] = self.copy_gbps and row["gbps"] / self.copy_gbps
        return row
