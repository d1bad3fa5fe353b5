"""Registers, spills and shared memory of every kernel, from ahead-of-time compilation.

    python -m bench.suite --only resources

What a machine without a GPU can say about the kernels; `make aot` prints the same in full. Nothing
of it is a timing.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench.processes import Case
from bench.record import Row

ARCHITECTURE = "sm_90"
KEPT = ("registers", "spill_bytes", "shared_bytes", "matrix", "num_warps", "num_stages", "dtype")


def cases(small: bool = False) -> Iterator[Case]:
    """small: one compilation in forty."""
    what = {"arch": ARCHITECTURE, "every": 41 if small else 1}
    name = f"resources {ARCHITECTURE}"
    yield Case("bench.bench_resources", name, {"bench": "resources", **what}, what, 400.0)


def measure(arch: str, every: int) -> Iterator[Row]:
    from pythia_fast.kernels.aot import compile_all, kernel_modules

    for found in compile_all(kernel_modules(), [arch], every=every):
        row: Row = {"part": f"{found['module']}: {found['case']}", "kernel": found["kernel"]}
        if "error" in found:
            yield row | {"status": "error", "reason": found["error"]}
            continue
        row |= {key: found[key] for key in KEPT}
        loop = found["hot_loop"] or {}
        row |= {"bound_cycles": loop.get("bound"), "bound_by": loop.get("bound_by")}
        broken = found["violations"]
        yield row | ({"status": "wrong", "reason": "; ".join(broken)} if broken else {})
