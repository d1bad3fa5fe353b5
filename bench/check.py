"""Correctness of every kernel on a GPU, on the shapes of all ten sizes, in one command.

    python -m bench.check [--minutes 8] [--out FILE] [--only LABEL ...] [--interpret]

Every (op, shape) runs in a process of its own, so that a crash or an illegal access is a row and
not the end; the shapes reach every entry of each kernel's tile table. Results, gradients and
in-place updates are held to the bound of `bench/bound.py` in bf16 and fp16, with fresh memory
filled with NaN, and a second run must give the same bits. compute-sanitizer then runs memcheck and
racecheck on small shapes, where it is installed. Then 20 steps of the 70M model are
trained twice, from two starts of the process, and the digests of losses, weights and moments must
agree. Rows are JSON lines, appended to FILE as they
come (default runs/check.jsonl: rows under bench/results/ are the README's). Exits 1 when a row is
neither "ok" nor "not found"; "not run" means that time was over.

--interpret does the same on tiny shapes in fp32 and fp16 under Triton's interpreter, on a CPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.bound import worst_rounding
from bench.op import SIZES, Draw, Op, Shape, results, shape
from bench.op_table import OPS, find
from bench.record import Row, environment, stamp
from bench.runner import DTYPES, worst

REPOSITORY = Path(__file__).resolve().parents[1]
OUT = Path("runs/check.jsonl")
BATCH, POSITIONS = 4, 2048
ODD = (1, 1000)  # of attention besides: tiles that end early, one head's keys over several programs
FIRST_SIZE = "70m"  # each op is seen once on it before anything else
LONGEST = 180.0  # seconds of one process
TINY = Shape("tiny", batch=2, positions=5, layers=1, hidden=96, heads=3, vocab=50)
SMALL = Shape("small", batch=1, positions=65, layers=1, hidden=768, heads=12, vocab=1000)
# attention under the tools: several tiles, several key tiles a program, every way to dq
WALKS = tuple(
    Shape(f"small D={d}", batch=8, positions=600, layers=1, hidden=8 * d, heads=8, vocab=50)
    for d in (64, 80, 256)
)
TOOLS = ("memcheck", "racecheck")
TRAINED, STEPS = "train", 20  # what stands for an op where whole steps are repeated
REPEATS = 10  # runs of attention that must give the same bits; of another op, one more
SANITIZER_FOUND_ERRORS = 77


@dataclass(frozen=True)
class Task:
    """One process: an op on one shape, plainly or under a tool of compute-sanitizer."""

    label: str
    shape: Shape
    dtypes: tuple[str, ...]
    tool: str | None = None


# --- one case, in this process --------------------------------------------------------------------


def check_case(op: Op, s: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Kernel against float64 and plain torch, then against itself; a row with its "status"."""
    inputs = op.inputs(s, dtype, Draw(device))
    same = results(op, op.reference, inputs, dtype)
    exact = results(op, op.reference, inputs, dtype, torch.float64)
    with _poisoned():
        actual = results(op, op.kernel, inputs, dtype)
        more = REPEATS if op.file == "attention" and device.type == "cuda" else 1
        others = [results(op, op.kernel, inputs, dtype) for _ in range(more)]
    where, found = worst(actual, same, exact, op, dtype)
    if found.within and not op.products:
        where, found = worst_rounding(actual, exact) or (where, found)
    repeats = not op.repeats or all(
        torch.equal(_bits(actual[name]), _bits(again[name])) for again in others for name in actual
    )
    status = "wrong" if not found.within else "ok" if repeats else "not deterministic"
    return {"status": status, "where": where, **asdict(found)}


def _bits(t: torch.Tensor) -> torch.Tensor:
    """So that a NaN that is meant equals itself."""
    return t.flatten().view(torch.uint8)


class _poisoned:
    """torch.empty gives NaN (what torch does where deterministic algorithms are asked for)."""

    def __enter__(self) -> None:
        self.before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *error: object) -> None:
        torch.use_deterministic_algorithms(self.before)


def _run_one(text: str) -> int:
    """What a child does: the rows of one task, given as JSON, on stdout."""
    fields = json.loads(text)
    task = Task(**fields | {"shape": Shape(**fields["shape"])})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for dtype in task.dtypes:
        started = time.perf_counter()
        row = check_case(find(task.label), task.shape, DTYPES[dtype], device)
        print(json.dumps({"dtype": dtype, **row, **_seconds(started)}), flush=True)
    return 0


# --- all of them ----------------------------------------------------------------------------------


def plan(only: list[str] | None, interpret: bool) -> list[Task]:
    """Every task in order of value: each op once, memcheck, the other shapes, racecheck."""
    chosen = [op for op in OPS if not only or op.label in only or op.name in only]
    if interpret:
        return [Task(op.label, TINY, ("fp32", "fp16")) for op in chosen]
    half = ("bf16", "fp16")
    memcheck, racecheck = (
        [
            Task(op.label, s, ("bf16",), tool)
            for op in chosen
            for s in (SMALL, *(WALKS if op.file == "attention" else ()))
        ]
        for tool in TOOLS
    )
    first = [Task(op.label, shape(FIRST_SIZE, BATCH, POSITIONS), half) for op in chosen]
    seen = {(t.label, find(t.label).key(t.shape)) for t in first}
    rest = []
    for size in SIZES:
        for op in chosen:
            for rows in ((BATCH, POSITIONS), *([ODD] if op.file.startswith("attention") else [])):
                s = shape(size, *rows)
                if (op.label, op.key(s)) not in seen:
                    seen.add((op.label, op.key(s)))
                    rest.append(Task(op.label, s, half))
    return first + memcheck + rest + racecheck


def run_task(task: Task, deadline: float, interpret: bool = False) -> list[dict[str, Any]]:
    """The rows of one task, from a child process that may die, hang or not be started."""
    head: dict[str, Any] = {"op": task.label, "size": task.shape.size, "tool": task.tool}
    head["shape"] = list(find(task.label).key(task.shape))
    left = deadline - time.monotonic()
    if left <= 0:
        return [head | {"status": "not run"}]
    command = [sys.executable, "-m", "bench.check", "--one", json.dumps(asdict(task))]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # the products repeat their bits
    if interpret:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    if task.tool:
        sanitizer = _sanitizer()
        if sanitizer is None:
            return [head | {"status": "not found", "error": "compute-sanitizer is not installed"}]
        code = ["--error-exitcode", str(SANITIZER_FOUND_ERRORS)]
        command = [sanitizer, "--tool", task.tool, *code, *command]
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # the allocator's slack hides overruns
    rows, failure = run_child(command, environment, min(left, LONGEST))
    rows = [head | row for row in rows]
    return [*rows, head | failure] if failure else rows


def run_child(
    command: list[str], environment: dict[str, str], seconds: float
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The JSON rows that a command printed, and a row about how it failed, if it did."""
    started = time.perf_counter()
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as child:  # fmt: skip
        try:
            out, err = child.communicate(timeout=seconds)
            status = "crash"
        except subprocess.TimeoutExpired:
            child.kill()
            out, err = child.communicate()
            status = "timeout"
    # a killed child may leave its last line cut short
    rows = [json.loads(s) for s in out.splitlines() if s.startswith("{") and s.endswith("}")]
    if child.returncode == 0:
        return rows, None
    if child.returncode == SANITIZER_FOUND_ERRORS:
        status = "sanitizer errors"
        err = "\n".join(line for line in out.splitlines() if line.startswith("====="))
    tail = "\n".join((err.strip() or out.strip()).splitlines()[-5:])
    return rows, {"status": status, "rc": child.returncode, "error": tail, **_seconds(started)}


def _sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )


def _seconds(started: float) -> dict[str, float]:
    return {"seconds": round(time.perf_counter() - started, 3)}


def digest_of_steps(size: str, steps: int = STEPS) -> str:
    """sha256 of losses, weights and moments after steps of the trainer on one batch, in bf16."""
    from bench import bench_train, train_peers  # the data and the trainer: not for every case

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, positions, compute = (16, POSITIONS, "bf16") if device.type == "cuda" else (4, 16, "fp32")
    config = bench_train.configuration(size, rows, positions, compute)
    config = replace(config, train=replace(config.train, micro_batch_size=rows // 2))
    stepper = train_peers.make("ours", config, device)
    tokens = bench_train.synthetic_batch(config, device)
    found = hashlib.sha256()
    for _ in range(steps):
        found.update(repr(stepper.step(tokens)[0].item()).encode())
    for name, state in sorted(train_peers.state(stepper).items()):
        found.update(name.encode() + state.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def repeated(size: str, seconds: float) -> dict[str, Any]:
    """A row on two processes that train the same steps."""
    head = {"op": TRAINED, "size": size, "tool": None, "shape": [STEPS]}
    command = [sys.executable, "-m", "bench.check", "--digest", size]
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    rows, started = [], time.perf_counter()
    for _ in range(2):
        found, failure = run_child(command, environment, seconds)
        if failure is not None:
            return head | failure
        rows += found
    same = len(rows) == 2 and rows[0] == rows[1]
    return head | rows[0] | {"status": "ok" if same else "not deterministic"} | _seconds(started)


def _all_rows(
    tasks: list[Task], deadline: float, workers: int, interpret: bool
) -> Iterator[dict[str, Any]]:
    with ThreadPoolExecutor(workers) as pool:
        pending = [pool.submit(run_task, task, deadline, interpret) for task in tasks]
        for future in as_completed(pending):
            yield from future.result()
    if not interpret and {task.label for task in tasks} == {op.label for op in OPS}:
        left = deadline - time.monotonic()
        if left > 0:
            yield repeated(FIRST_SIZE, min(left, LONGEST))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=8.0, help="of all together (default 8)")
    parser.add_argument("--out", type=Path, default=OUT, help=f"rows are appended to it ({OUT})")
    parser.add_argument("--only", nargs="+", metavar="OP", choices=_names(), help="ops by name")
    parser.add_argument("--workers", type=int, default=4, help="processes at once (default 4)")
    parser.add_argument("--interpret", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--one", metavar="TASK", help=argparse.SUPPRESS)
    parser.add_argument("--digest", metavar="SIZE", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.workers < 1 or options.minutes <= 0:
        parser.error("--workers: at least 1; --minutes: more than 0")
    if options.one:
        return _run_one(options.one)
    if options.digest:
        print(json.dumps({"digest": digest_of_steps(options.digest)}))
        return 0
    if not options.interpret and not torch.cuda.is_available():
        print("the check needs a CUDA device (or --interpret); none is visible", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * options.minutes
    tasks = plan(options.only, options.interpret)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    fixed = environment()
    with options.out.open("a") as file:
        for found in _all_rows(tasks, deadline, options.workers, options.interpret):
            row = _stamped(found, fixed)
            line = json.dumps(row)
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
            counts[row["status"]] += 1
    summary = ", ".join(f"{n} {status}" for status, n in counts.most_common())
    print(f"{summary}; rows appended to {options.out}", file=sys.stderr)
    return 0 if set(counts) <= {"ok", "not found"} else 1


def _stamped(row: dict[str, Any], fixed: Row) -> Row:
    """The row with the columns of every result file."""
    words = ("check", row["op"], row["size"], row.get("dtype"), row["tool"])
    return stamp({"case": " ".join(filter(None, words)), "bench": "check", **row}, fixed)


def _names() -> list[str]:
    return sorted({op.label for op in OPS} | {op.name for op in OPS})


if __name__ == "__main__":
    sys.exit(main())
