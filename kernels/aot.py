"""Ahead-of-time compilation of every kernel, without a GPU, and what it says about each.

    python -m pythia_fast.kernels.aot [--arch sm_90 ...] [--only NAME] [--every N] [--json]

Compiles each case of each kernel file (`aot_cases()`) to a cubin and reports registers, spills,
shared memory, how many programs an SM holds, the matrix instruction, the width of every pointer's
global accesses and the static bound of the hot loop. Exits 1, with one line for each on stderr,
when a kernel spills beyond its budget, needs more shared memory than the chip has, does not fit an
SM as often as it is launched for each, lacks a matrix instruction or accesses memory narrowly where
its case says wide. A compilation says nothing about speed or correctness.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .aot_case import AotCase

PACKAGE = __package__ or "pythia_fast.kernels"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}  # bytes a block
SM_SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}  # bytes an SM
SM_REGISTERS, SM_WARPS, SM_BLOCKS = 65536, 64, 32  # of all three
WIDE_BITS = 128
# accesses to local memory among the instructions of the hot loop; sm_100 runs the tiles of sm_90
LOOP_SPILLS = {"sm_80": 0.01, "sm_90": 0.01, "sm_100": 0.015}
EXACT_FLOPS = {"sm_90": 1.05}  # at most so many issued for one needed, where they can be counted


@dataclass(frozen=True)
class Job:
    """One compilation: a case of a module, for one architecture."""

    module: str
    case: str
    arch: str


def kernel_modules() -> list[str]:
    """The modules of this directory that define `aot_cases`, by their source alone."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return [
        f"{PACKAGE}.{f.stem}" for f in files if re.search(r"^def aot_cases\(", f.read_text(), re.M)
    ]


def compile_all(
    modules: Iterable[str],
    architectures: Iterable[str] = ARCHITECTURES,
    only: str = "",
    every: int = 1,
    workers: int = 2,
) -> Iterator[dict[str, Any]]:
    """Report rows as they are ready, from processes that import the kernels uninterpreted.

    only: a part of "module: case name". every: of all compilations (architecture runs fastest) take
    one in so many, the first included; a sample that crosses cases and architectures where `every`
    shares no factor with either. A row that failed has "error"; every row has "violations".
    """
    with compiling_processes(workers) as pool:
        jobs = list_jobs(pool, modules, architectures, only)
        pending: dict[Future[dict[str, Any]], Job] = {
            pool.submit(_report, job): job for job in jobs[::every]
        }
        for future in as_completed(pending):
            try:
                yield future.result()
            except BrokenProcessPool:
                yield _failure(pending[future], "the compiling process died")


def compiling_processes(workers: int) -> ProcessPoolExecutor:
    """Processes that import the kernels uninterpreted."""
    return ProcessPoolExecutor(workers, get_context("spawn"), _uninterpreted)


def list_jobs(
    pool: ProcessPoolExecutor, modules: Iterable[str], architectures: Iterable[str], only: str = ""
) -> list[Job]:
    """Every compilation whose "module: case name" contains `only`; architecture runs fastest."""
    architectures = tuple(architectures)
    names = {module: pool.submit(_case_names, module) for module in modules}
    return [
        Job(module, name, arch)
        for module, listed in names.items()
        for name, own in listed.result()
        if only in f"{module.rpartition('.')[2]}: {name}"
        for arch in architectures
        if arch in own
    ]


def case_of(job: Job) -> AotCase:
    cases = importlib.import_module(job.module).aot_cases()
    return next(c for c in cases if c.name == job.case and job.arch in c.architectures)


def _uninterpreted() -> None:
    """A worker's first act: Triton reads this when a kernel is decorated."""
    os.environ.pop("TRITON_INTERPRET", None)


def _case_names(module: str) -> list[tuple[str, tuple[str, ...]]]:
    """Each case's name and architectures; a name stands once for an architecture."""
    cases = [(c.name, c.architectures) for c in importlib.import_module(module).aot_cases()]
    names = [(name, arch) for name, architectures in cases for arch in architectures]
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated:
        raise ValueError(f"{module}: aot_cases() repeats the name {repeated[0][0]!r}")
    return cases


def _report(job: Job) -> dict[str, Any]:
    try:
        case = case_of(job)
        row = _identity(job, case) | compile_case(case, job.arch)
    except Exception as error:  # a compiler's error is a row of the report
        message = (str(error).strip() or "no message").splitlines()[-1]
        return _failure(job, f"{type(error).__name__}: {message}")
    return row | {"resident": resident(row), "violations": violations(case, row)}


def _identity(job: Job, case: AotCase) -> dict[str, Any]:
    pointers = [t[1:] for t in case.signature.values() if t.startswith("*")]
    half = next((t for t in pointers if t in ("bf16", "fp16")), None)
    return {
        "module": job.module.rpartition(".")[2],
        "kernel": case.kernel.__name__,
        "case": case.name,
        "arch": job.arch,
        "dtype": half or next(iter(pointers), None),
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
    }


def _failure(job: Job, error: str) -> dict[str, Any]:
    row = {"module": job.module.rpartition(".")[2], "kernel": None, "case": job.case}
    return row | {"arch": job.arch, "error": error, "violations": [error]}


def parameters(case: AotCase) -> dict[str, str]:
    """Type by name of the arguments that are passed at a launch, in the kernel's order."""
    signature = {name: case.signature[name] for name in case.kernel.arg_names}
    return {name: kind for name, kind in signature.items() if kind != "constexpr"}


def is_aligned(case: AotCase, name: str) -> bool:
    """Whether a pointer's address, or an integer, is promised to be a multiple of 16."""
    return case.signature[name].startswith(("*", "i")) and name not in case.not_aligned


def compilation(case: AotCase, arch: str) -> dict[str, Any]:
    """The arguments of triton.compile: source, target, options."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: case.signature[name] for name in case.kernel.arg_names}  # in its order
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(signature)
        if is_aligned(case, name)
    }
    return {
        "src": ASTSource(case.kernel, signature, case.constexprs, aligned),
        "target": GPUTarget("cuda", int(arch.removeprefix("sm_")), 32),
        "options": {"num_warps": case.num_warps, "num_stages": case.num_stages},
    }


def compile_case(case: AotCase, arch: str) -> dict[str, Any]:
    """Compile for one architecture; registers, memory, accesses and the hot loop of the result."""
    import triton

    from .assembly import hot_loop_report, tcgen05_flops

    compiled = triton.compile(**compilation(case, arch))
    sass = _tool("nvdisasm", "-c", "-ndf", cubin=compiled.asm["cubin"])
    loop = None
    if sass:
        flops = tcgen05_flops(compiled.asm["ptx"])
        loop = hot_loop_report(sass, int(arch.removeprefix("sm_")), case.num_warps, flops)
    return measure(case, compiled) | {"triton": triton.__version__, "hot_loop": loop}


def measure(case: AotCase, compiled: Any) -> dict[str, Any]:
    """Registers, memory and accesses of what triton.compile made of a case."""
    from .assembly import global_accesses, matrix_instruction

    named = enumerate(parameters(case).items())
    pointers = {i: name for i, (name, kind) in named if kind.startswith("*")}
    ptx = compiled.asm["ptx"]
    usage = _tool("cuobjdump", "--dump-resource-usage", cubin=compiled.asm["cubin"]) or ""
    resources = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": resources.get("REG"),
        "spill_bytes": max(resources["STACK"], resources["LOCAL"]) if resources else None,
        "shared_bytes": compiled.metadata.shared,
        "matrix": matrix_instruction(ptx),
        "accesses": global_accesses(ptx, pointers),
        "hot_loop": None,
    }


def _tool(name: str, *options: str, cubin: bytes) -> str | None:
    """What a tool of the Triton wheel prints about a cubin; None where it cannot read it."""
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        try:
            done = subprocess.run([path, *options, file.name], capture_output=True, text=True)
        except OSError:
            return None
    return done.stdout if done.returncode == 0 else None


def violations(case: AotCase, row: dict[str, Any]) -> list[str]:
    """What this case promised and the compiled kernel does not keep."""
    found = []
    if row["spill_bytes"] is None:
        found.append("registers and spills unknown: cuobjdump could not read the cubin")
    elif row["spill_bytes"] > (budget := spill_budget(case, row["arch"])):
        found.append(f"spills {row['spill_bytes']} bytes a thread, budget {budget}")
    if loop := row["hot_loop"]:
        found += _loop_violations(case, loop, row["arch"])
    limit = case.shared_budget or SHARED_LIMIT[row["arch"]]
    if row["shared_bytes"] > limit:
        found.append(f"needs {row['shared_bytes']} bytes of shared memory, the chip has {limit}")
    elif (fit := resident(row)) is not None and fit < case.per_sm:
        found.append(f"{fit} programs fit an SM, {case.per_sm} are launched for each")
    if case.matrix and row["matrix"] is None:
        found.append("no matrix instruction in the PTX")
    for pointer in dict.fromkeys((*case.wide, *case.narrow)):
        accesses = row["accesses"].get(pointer, {})
        narrow = {a: n for a, n in accesses.items() if int(a.lstrip("abcdelmorst")) < WIDE_BITS}
        if narrow != dict(case.narrow.get(pointer, {})):
            found.append(
                f"{pointer}: accesses narrower than {WIDE_BITS} bits ({_listed(narrow)}),"
                f" expected {_listed(case.narrow.get(pointer, {}))}"
            )
        elif pointer in case.wide and len(narrow) == len(accesses):
            found.append(f"{pointer}: no access of {WIDE_BITS} bits found")
    return found


def spill_budget(case: AotCase, arch: str) -> int:
    return case.spill_budget if isinstance(case.spill_budget, int) else case.spill_budget[arch]


def _loop_violations(case: AotCase, loop: dict[str, Any], arch: str) -> list[str]:
    found = []
    if loop["spills"] > LOOP_SPILLS[arch] * loop["instructions"]["issue"]:
        found.append(f"the hot loop spills ({loop['spills']} accesses to local memory)")
    if case.ordered and not loop["ordered"]:
        found.append("no barrier between the last atomic and the next turn of the loop around it")
    if not case.loop_flops:
        return found
    if loop["selects"]:
        found.append(f"the hot loop masks ({loop['selects']} selects)")
    issued, needed = loop["flops"], case.loop_flops
    if arch in EXACT_FLOPS and not needed <= (issued or 0) <= EXACT_FLOPS[arch] * needed:
        found.append(f"the hot loop issues {issued} FLOPs, {needed} are needed")
    return found


def resident(row: dict[str, Any]) -> int | None:
    """Programs that an SM holds at once; None where the registers are unknown.

    CUDA C++ Programming Guide, compute capabilities: registers are given to a warp in units of 256,
    1 KB of shared memory is kept for each block (8.0 and later).
    """
    if row["registers"] is None:
        return None
    registers = 32 * -(-max(row["registers"], 1) // 8) * 8 * row["num_warps"]
    shared = SM_SHARED[row["arch"]] // (row["shared_bytes"] + 1024)
    return min(SM_REGISTERS // registers, SM_WARPS // row["num_warps"], shared, SM_BLOCKS)


def _listed(accesses: Mapping[str, int]) -> str:
    return ", ".join(f"{n} x {a}" for a, n in accesses.items()) or "none"


# --- command --------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pythia_fast.kernels.aot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--only", default="", help="cases whose 'file: name' contains this text")
    parser.add_argument("--every", type=int, default=1, help="compile one in so many (a sample)")
    parser.add_argument("--json", action="store_true", help="one JSON line a case on stdout")
    parser.add_argument("--workers", type=int, default=2, help="compiling processes (default 2)")
    arguments = parser.parse_args(argv)
    if arguments.workers < 1 or arguments.every < 1:
        parser.error("--workers and --every: at least 1")

    rows = []
    for row in compile_all(
        kernel_modules(),
        arguments.arch,
        only=arguments.only,
        every=arguments.every,
        workers=arguments.workers,
    ):
        rows.append(row)
        if arguments.json:
            print(json.dumps(row), flush=True)
        elif sys.stderr.isatty():
            print(f"\r{len(rows)} compiled", end="", file=sys.stderr, flush=True)
    if not rows:
        print(f"no case contains {arguments.only!r}", file=sys.stderr)
        return 2
    rows.sort(
        key=lambda r: (r["module"], r["kernel"] or "", r["case"], ARCHITECTURES.index(r["arch"]))
    )
    if not arguments.json:
        _print_table(rows)
    broken = [(row, line) for row in rows for line in row["violations"]]
    for row, line in broken:
        print(f"{row['module']}: {row['case']}: {row['arch']}: {line}", file=sys.stderr)
    return 1 if broken else 0


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    caption = "bytes and cycles: one block, one iteration of the hot loop (one pass where *)"
    table = Table(caption=caption)
    for title in ("kernel", "case", "arch", "matrix", "accesses"):
        table.add_column(title, overflow="fold")
    for title in ("regs", "spill", "shared", "per SM", "bytes", "issue", "bound", "B/cycle"):
        table.add_column(title, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*_cells(row))
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def _cells(row: dict[str, Any]) -> list[str]:
    first = [row["kernel"] or row["module"], row["case"], row["arch"]]
    if "error" in row:
        return [*first, "", row["error"]]
    accesses = "\n".join(
        f"{pointer} {' '.join(f'{n}x{a}' for a, n in counts.items())}"
        for pointer, counts in row["accesses"].items()
    )
    resources = [str(row[k]) for k in ("registers", "spill_bytes", "shared_bytes", "resident")]
    cells = [*first, row["matrix"] or "-", accesses, *resources]
    loop = row["hot_loop"]
    if loop is None:
        return [*cells, "", "not available", "", ""]
    once = "" if loop["loop"] else "*"
    figures = (f"{loop['global_bytes']}", f"{loop['cycles']['issue']:.0f}{once}")
    bound = f"{loop['bound']:.0f}{once} {loop['bound_by']}"
    return [*cells, *figures, bound, f"{loop['bytes_per_cycle']:.1f}"]


if __name__ == "__main__":
    sys.exit(main())
