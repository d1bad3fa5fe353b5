"""Seconds until `pythia-fast --help` has answered, and until a step's kernels are there.

    python -m bench.suite --only startup

Fresh processes. Kernels: of a step in bf16, compiled into an empty cache or found in the directory
of `pythia-fast prebuild`. "rehearsal" is the step without a GPU and without its arithmetic
(`pythia_fast/rehearsal.py`): imports, the host's part of two microbatches, compilation. "first
step" is the trainer's, on a GPU alone, to the end of its first step.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bench import train_peers
from bench.bench_train import configuration, synthetic_batch
from bench.processes import Case
from bench.record import Row, times
from pythia_fast.config import load, to_toml
from pythia_fast.errors import InputError
from pythia_fast.prebuild import GPUS, prebuild
from pythia_fast.prebuilt import VARIABLE

REPEATS, KERNEL_REPEATS = 15, 3
ROOT = Path(__file__).resolve().parents[1]


def cases(small: bool = False) -> Iterator[Case]:
    yield Case("bench.bench_startup", "pythia-fast --help", {"bench": "startup"})
    size = "tiny" if small else "70m"
    what: Row = {"size": size, "repeats": 1 if small else KERNEL_REPEATS}
    name = f"kernels of {size}"
    yield Case("bench.bench_startup", name, {"bench": "startup", **what}, what, 300.0)


def measure(size: str | None = None, repeats: int = REPEATS) -> Iterator[Row]:
    """size None: the command line. Else a row a part: compiled or prebuilt, rehearsal or step."""
    if size is None:
        yield times(_milliseconds(["-m", "pythia_fast", "--help"], {}, repeats))
        return
    gpu = _gpu()
    with tempfile.TemporaryDirectory(prefix="pythia-fast-bench-") as name:
        where = Path(name)
        config = configuration(size, 2, 512 if size != "tiny" else 32, "bf16")
        page, kernels = where / "page.toml", where / "kernels"
        page.write_text(to_toml(config))
        built = prebuild(config, gpu, kernels)
        about = {"gpu": gpu, "kernels": built["compiled"], "kernel_bytes": built["bytes"]}
        runs = {"rehearsal": ["-m", "pythia_fast.rehearsal", str(page), gpu]}
        if torch.cuda.is_available():
            runs["first step"] = ["-m", "bench.bench_startup", str(page)]
        for what, command in runs.items():
            for form, extra in (("compiled", {}), ("prebuilt", {VARIABLE: str(kernels)})):
                taken = _milliseconds(command, extra, repeats)
                yield {"part": f"{what}, {form}", **about, **times(taken)}


def _gpu() -> str:
    """This GPU, or the one whose kernels are compiled where there is none.

    Raises InputError for a GPU of which no kernels are prebuilt.
    """
    if not torch.cuda.is_available():
        return "H100"
    name = torch.cuda.get_device_name()
    for gpu in GPUS:
        if gpu in name:
            return gpu
    raise InputError(f"{name}: kernels are prebuilt for {', '.join(GPUS)}")


def _milliseconds(command: Sequence[str], extra: dict[str, str], repeats: int) -> list[float]:
    """Of fresh processes, each with a Triton cache that is empty."""
    known = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", VARIABLE)}
    taken = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(prefix="pythia-fast-bench-") as cache:
            environment = known | {"TRITON_CACHE_DIR": cache} | extra
            began = time.perf_counter()
            subprocess.run(
                [sys.executable, *command], check=True, capture_output=True, cwd=ROOT,
                env=environment,
            )  # fmt: skip
            taken.append(1e3 * (time.perf_counter() - began))
    return taken


def first_step(page: Path) -> None:
    config, device = load(page, []), torch.device("cuda")
    stepper = train_peers.make("ours", config, device)
    stepper.step(synthetic_batch(config, device))
    torch.cuda.synchronize()


if __name__ == "__main__":
    first_step(Path(sys.argv[1]))
