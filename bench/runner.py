"""The benchmark of a kernel: ours or a peer on one shape, checked against float64, then timed.

Each `bench_<file>.py` names its ops (LABELS) and peers (PEERS) and calls `main`. Each (op, shape,
implementation) is a case, in a process of its own. A peer whose package is absent is a row
"skipped" with its reason, one that refuses an "error", one beyond the bound "wrong".
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from bench import timing
from bench.bound import Errors, errors
from bench.op import SIZES, Draw, Op, Shape, arguments, call, results, shape, upstream
from bench.op_table import OPS, find
from bench.processes import Case
from bench.record import Row, times

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEFAULT_SIZES = ("410m", "70m", "1.4b", "160m", "1b", "2.8b", "6.9b", "12b")
BATCH, POSITIONS = 8, 2048
OWN = ("ours", "eager", "compile")
LIMIT = 60.0  # seconds of one case

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
    granted = dtype if op.products else None
    found = {}
    for name, tensor in exact.items():
        if actual[name].shape != tensor.shape:
            raise AssertionError(f"{name}: shape {tuple(actual[name].shape)}")
        found[name] = errors(actual[name], same[name], tensor, granted)
    name = max(found, key=lambda n: found[n].margin)
    return name, found[name]


def measure(
    kernel: str,
    impl: str,
    size: str | Shape,
    dtype: str = "bf16",
    batch: int = BATCH,
    positions: int = POSITIONS,
    l2: str = "cold",
    timer: timing.Timer | None = None,
) -> Iterator[Row]:
    """A row a pass of one implementation, or one row that says why there is none.

    timer: what stands in for CUDA events in a test on the CPU, which then is the device.
    """
    op, kind, device = find(kernel), DTYPES[dtype], torch.device("cpu" if timer else "cuda")
    s = shape(size, batch, positions) if isinstance(size, str) else size
    try:
        function = _load(op, impl)
    except Exception as error:  # absent, or built for another torch
        if impl in OWN:
            raise
        yield {"status": "skipped", "reason": f"{type(error).__name__}: {error}".splitlines()[0]}
        return
    inputs = op.inputs(s, kind, Draw(device))
    same = results(op, op.reference, inputs, kind)
    exact = results(op, op.reference, inputs, kind, torch.float64)
    where, found = worst(results(op, function, inputs, kind), same, exact, op, kind)
    del same, exact
    row: Row = {"max_err": found.largest, "allowed_err": found.largest_allowed}
    if not found.within:
        yield row | {"status": "wrong", "reason": f"{where}: {found} is beyond the bound"}
        return
    for which in op.passes:
        timed = _time(op, function, inputs, which, kind, l2, timer or timing.cuda_timer)
        figures = {**times(timed.ms), **_rate(op, s, inputs, which, timed.ms, kind)}
        yield row | {"part": which, **figures, **timed.device}


def _load(op: Op, impl: str) -> Callable[..., Any]:
    """The function of an implementation; raises where a package is absent."""
    if impl == "ours":
        return op.kernel
    if impl == "eager":
        return op.reference
    if impl == "compile":
        return torch.compile(op.reference, dynamic=False)
    return peers(op)[impl]()


def peers(op: Op) -> Mapping[str, Peer]:
    """Those that the op's benchmark file names."""
    module = importlib.import_module(f"bench.bench_{op.file}")
    return getattr(module, "PEERS", {}).get(op.label, {})


def _time(
    op: Op,
    function: Callable[..., Any],
    inputs: dict[str, Any],
    which: str,
    dtype: torch.dtype,
    l2: str,
    timer: timing.Timer,
) -> timing.Timed:
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
            return outputs, leaves, upstream(op, outputs, dtype)

        return timer(prepare, lambda state: gradients(*state), l2)

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

    return timer(passed, run, l2)


def _rate(
    op: Op, s: Shape, inputs: dict[str, Any], which: str, ms: list[float], dtype: torch.dtype
) -> Row:
    """TFLOP/s where products bound the op, else GB/s of necessary bytes; of the median."""
    p50 = times(ms)["ms_p50"]
    if op.flops:
        return {"tflops": op.flops[which](s, inputs) / p50 / 1e9}
    return {"gbps": op.bytes_moved[which](s, dtype.itemsize) / p50 / 1e6}


# --- cases and the command ------------------------------------------------------------------------


def benchmarks() -> list[str]:
    """The kernel files that have a benchmark with LABELS: a new one is found by itself."""
    stems = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))
    modules = {stem: importlib.import_module(f"bench.{stem}") for stem in stems}
    return [s.removeprefix("bench_") for s, module in modules.items() if hasattr(module, "LABELS")]


def cases(
    labels: Iterable[str],
    sizes: Iterable[str] = DEFAULT_SIZES,
    only: Iterable[str] | None = None,
    dtype: str = "bf16",
    batch: int = BATCH,
    positions: int = POSITIONS,
    l2: str = "cold",
) -> Iterator[Case]:
    """Every implementation of the ops on each distinct shape, sizes outermost. only: impls."""
    seen = set()
    for size in sizes:
        s = shape(size, batch, positions)
        for op in (find(label) for label in labels):
            if (op.label, op.key(s)) in seen:
                continue
            seen.add((op.label, op.key(s)))
            for impl in (*OWN, *peers(op)):
                if only and impl not in only:
                    continue
                what: Row = {"kernel": op.label, "impl": impl, "size": size}
                what |= {"dtype": dtype, "l2": l2}
                name = f"{op.label} {size} {batch}x{positions} {dtype} {l2} {impl}"
                head = {"bench": "kernel", **what, "shape": list(op.key(s))}
                what |= {"batch": batch, "positions": positions}
                yield Case("bench.runner", name, head, what, LIMIT)


def labels_of(files: Iterable[str]) -> list[str]:
    """The ops of kernel files, in the order of the table of ops."""
    files = set(files)
    return [op.label for op in OPS if op.file in files]


def main(labels: tuple[str, ...], argv: list[str] | None = None) -> int:
    """The command of one benchmark file: the limits of the GPU, then the kernel and its peers."""
    from bench import bench_baselines
    from bench.session import Session

    parser = argparse.ArgumentParser(description=f"Times {', '.join(labels)} against peers.")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(DEFAULT_SIZES))
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--batch", type=int, default=BATCH, help="rows of a microbatch (8)")
    parser.add_argument("--positions", type=int, default=POSITIONS, help="of a row (2048)")
    parser.add_argument("--impl", nargs="+", help="e.g. ours eager compile liger")
    parser.add_argument("--l2", choices=("cold", "warm"), default="cold")
    parser.add_argument("--json", action="store_true", help="rows as JSON lines on stdout")
    options = parser.parse_args(argv)
    if options.batch < 1 or options.positions < 1:
        parser.error("--batch and --positions: at least 1")
    if not torch.cuda.is_available():
        print("a benchmark needs a CUDA device; none is visible", file=sys.stderr)
        return 2
    planned = cases(
        labels, options.sizes, options.impl, options.dtype, options.batch, options.positions,
        options.l2,
    )  # fmt: skip
    session = Session(json_lines=options.json)
    session.run([*bench_baselines.limits(seconds=20), *planned])
    return 1 if session.failed else 0
