"""The kernels compiled for a C library, without a GPU: cubins, and an index of them.

Writes DIR/cubins/KEY.cubin with KEY.json beside it and DIR/index.json: a row a case and GPU, with
symbol, warps, shared memory, arguments in the order of the launch, constants, and what the case
promised and the cubin does not keep. KEY is a hash of what Triton's own key is made of, but for the
line that a function starts in: the kernel's source and what it calls, the signature, the constants,
the options, the GPU and the compiler. What is there under its key is kept, so that touching one
kernel compiles that kernel. `native/export.py` is the command, CMakeLists.txt builds the library.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from . import aot, grids

SIZES = ("14m", "31m", "70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")
DTYPES = ("bf16", "fp16")


def classes(sizes: Iterable[str]) -> set[str]:
    """What names of cases begin with, for these sizes of the suite.

    Head dims for attention; 1b has the hidden size of 1.4b, and all up to 2.8b the vocabulary of
    70m, whose row-wise kernels come with them.
    """
    from .rotary import SUITE

    sizes = set(sizes)
    found = sizes | {f"D={SUITE[size][1]}" for size in sizes}
    found |= {"1.4b"} if "1b" in sizes else set()
    return found | ({"70m"} if sizes - {"6.9b", "12b"} else set())


def is_wanted(name: str, sizes: Iterable[str], dtypes: Iterable[str]) -> bool:
    """Whether a case of this name belongs to a library of these sizes and 16-bit dtypes."""
    words = name.replace(",", " ").split()
    of_a_size = words[0].startswith("D=") or words[0].partition("/")[0] in SIZES
    if of_a_size and words[0].partition("/")[0] not in classes(sizes):
        return False
    return not set(words) & (set(DTYPES) - set(dtypes))


def export(
    out: Path,
    gpus: Iterable[str] = aot.ARCHITECTURES,
    sizes: Iterable[str] = SIZES,
    dtypes: Iterable[str] = ("bf16",),
    only: str = "",
    workers: int = 2,
    modules: Iterable[str] = (),
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Brings `out` up to date: the index, and counts of "compiled", "kept" and "deleted" files.

    modules: of the kernels, all by default. Raises RuntimeError where a kernel does not compile,
    with nothing of the index changed.
    """
    (out / "cubins").mkdir(parents=True, exist_ok=True)
    rows, counts = [], Counter(compiled=0, kept=0)
    with aot.compiling_processes(workers) as pool:
        listed = aot.list_jobs(pool, modules or aot.kernel_modules(), gpus, only)
        jobs = [job for job in listed if is_wanted(job.case, sizes, dtypes)]
        try:
            for row in _in_parallel(pool, jobs, out / "cubins"):
                counts["compiled" if row.pop("compiled") else "kept"] += 1
                rows.append(row)
                _progress(sum(counts.values()), len(jobs), counts["compiled"])
        except BaseException:  # an interrupt too leaves what has not begun
            pool.shutdown(cancel_futures=True)
            raise
    rows.sort(key=lambda r: (r["name"], aot.ARCHITECTURES.index(r["gpu"])))
    _check(rows)
    kept = {row["key"] for row in rows}
    stale = [f for f in (out / "cubins").iterdir() if f.stem not in kept]
    for file in stale:
        file.unlink()
    write_changed(out / "index.json", json.dumps(rows, indent=1))
    return rows, dict(counts) | {"deleted": len(stale)}


def _in_parallel(
    pool: ProcessPoolExecutor, jobs: list[aot.Job], directory: Path
) -> Iterable[dict[str, Any]]:
    pending = {pool.submit(_export, job, directory): job for job in jobs}
    for future in as_completed(pending):
        try:
            yield future.result()
        except Exception as error:
            job = pending[future]
            what = f"{job.module.rpartition('.')[2]}: {job.case}: {job.arch}"
            said = (str(error).strip() or "no message").splitlines()[-1]
            raise RuntimeError(f"{what}: {type(error).__name__}: {said}") from error


def _export(job: aot.Job, directory: Path) -> dict[str, Any]:
    """One cubin, compiled where its key is not there yet, and its row."""
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # no paths of this machine, a quarter of the size
    case = aot.case_of(job)
    key = _key(case, job.arch)
    path = directory / f"{key}.cubin"
    found = _found(path)
    if compiled := found is None:
        found = _compile(case, job.arch, path)
    measured = found.pop("measured") | {"arch": job.arch, "num_warps": case.num_warps}
    kernel = case.kernel.__name__
    module = job.module.rpartition(".")[2]
    arguments = [
        {"name": name, "type": kind, "aligned": aot.is_aligned(case, name)}
        for name, kind in aot.parameters(case).items()
    ]
    return {
        "name": c_name(module, case.name),
        "module": module,
        "case": case.name,
        "kernel": kernel,
        "gpu": job.arch,
        "key": key,
        **found,
        "violations": aot.violations(case, measured),
        "arguments": arguments,
        "comments": _comments(case.kernel.src),
        "constants": {name: repr(value) for name, value in case.constexprs.items()},
        "per_sm": case.per_sm,
        "grid": list(grids.GRIDS[kernel]),
        "compiled": compiled,
    }


def c_name(module: str, case: str) -> str:
    """layer_norm, "6.9b dual forward bf16" -> layer_norm_6_9b_dual_forward_bf16."""
    return re.sub(r"[^a-z0-9]+", "_", f"{module} {case.replace('=', '')}".lower()).strip("_")


def _key(case: Any, arch: str) -> str:
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler.compiler import make_backend
    from triton.runtime.cache import get_cache_key

    _forget_lines()
    c = aot.compilation(case, arch)
    backend = make_backend(c["target"])
    options = backend.parse_options(dict(c["options"]))
    key = get_cache_key(c["src"], backend, options, env_vars=get_cache_invalidating_env_vars())
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def _forget_lines() -> None:
    """The line a kernel or a function it calls starts in, which Triton's key ends in: without line
    tables a cubin does not depend on it. Functions of Triton's own come with its version."""
    from triton.runtime.jit import JITCallable

    for name, module in list(sys.modules.items()):
        if name.startswith(f"{aot.PACKAGE}."):
            for value in vars(module).values():
                if isinstance(value, JITCallable) and value.starting_line_number != 1:
                    value.starting_line_number, value.hash = 1, None


def _found(path: Path) -> dict[str, Any] | None:
    """What stands beside a cubin, None where either is missing or the cubin is another."""
    try:
        found = json.loads(path.with_suffix(".json").read_text())
        whole = found["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError, KeyError):
        return None
    return found if whole else None


def _compile(case: Any, arch: str, path: Path) -> dict[str, Any]:
    import triton

    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        compiled = triton.compile(**aot.compilation(case, arch))
    metadata, ptx = compiled.metadata, compiled.asm["ptx"]
    for what in ("global_scratch_size", "profile_scratch_size"):
        if getattr(metadata, what, 0):
            raise ValueError(f"{what}: a caller would have to allocate it")
    if getattr(metadata, "num_ctas", 1) != 1 or metadata.launch_cooperative_grid:
        raise ValueError("a cluster or a cooperative grid is not launched by the library")
    cubin, hidden = compiled.asm["cubin"], entry_parameters(ptx) - len(aot.parameters(case))
    if hidden not in range(3):
        raise ValueError(f"{hidden} parameters beside the kernel's own: up to 2 are known")
    found = {
        "symbol": metadata.name,
        "warps": metadata.num_warps,
        "shared": metadata.shared,
        # pointers to scratch memory that Triton appends to the arguments: null, none is asked for
        "hidden": hidden,
        "bytes": len(cubin),
        "sha256": hashlib.sha256(cubin).hexdigest(),
        "measured": aot.measure(case, compiled),
    }
    _replace(path, cubin)
    _replace(path.with_suffix(".json"), json.dumps(found).encode())
    return found


def entry_parameters(ptx: str) -> int:
    """How many parameters the kernel of a PTX text takes; functions may be declared before it."""
    entry = ptx[ptx.index(".entry") :]
    return len(re.findall(r"\.param\s+\.\w+", entry[: entry.index(")")]))


def _comments(source: str) -> dict[str, str]:
    """What the kernel's source says beside each argument: shape, strides."""
    return dict(re.findall(r"^ +(\w+),  # (.*)$", source, re.M))


def _check(rows: list[dict[str, Any]]) -> None:
    """A name is one case, with the same arguments on every GPU."""
    if not rows:
        raise RuntimeError("no kernel is selected")
    of_name = defaultdict(set)
    for row in rows:
        said = row["kernel"], row["case"], json.dumps([row["arguments"], row["grid"]])
        of_name[row["name"]].add(said)
    for name, said in of_name.items():
        if len(said) > 1:
            raise RuntimeError(f"{name}: two kernels or lists of arguments")


def write_changed(path: Path, text: str) -> None:
    """Leaves the file's time alone where it holds this text already."""
    if not path.exists() or path.read_text() != text:
        _replace(path, text.encode())


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)


def _progress(done: int, of: int, compiled: int) -> None:
    if sys.stderr.isatty() or done == of or done % 100 == 0:
        end = "\n" if done == of or not sys.stderr.isatty() else ""
        start = "\r" if sys.stderr.isatty() else ""
        line = f"{start}kernels {done}/{of}, {compiled} compiled"
        print(line, end=end, file=sys.stderr, flush=True)


def sizes_by_gpu(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """By GPU: kernels, different cubins, their bytes."""
    table: dict[str, dict[str, int]] = {}
    for gpu in aot.ARCHITECTURES:
        cubins = {row["key"]: row["bytes"] for row in rows if row["gpu"] == gpu}
        count = sum(row["gpu"] == gpu for row in rows)
        if count:
            table[gpu] = {"kernels": count, "cubins": len(cubins), "bytes": sum(cubins.values())}
    return table
