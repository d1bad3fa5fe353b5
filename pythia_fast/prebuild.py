"""Compiles the kernels of a page ahead of its run, on a machine without a GPU: see `prebuilt.py`.

A process rehearses the page's step (`rehearsal.py`) with a cache of its own; what it compiled is
copied to the directory, which may hold other pages and GPUs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import triton

from pythia_fast.config import Config, to_toml
from pythia_fast.data.files import publish
from pythia_fast.errors import InputError
from pythia_fast.parallel.degrees import degrees
from pythia_fast.prebuilt import SEAL, VARIABLE, seal, version_of
from pythia_fast.rehearsal import CHIPS

GPUS = tuple(CHIPS)


def prebuild(config: Config, gpu: str, out: Path) -> dict[str, Any]:
    """Adds a page's kernels for a GPU to the directory `out`; several may do so at once.

    What is there is not compiled again. Returns a row: "processes" of the page's layout, "ranks" of
    them that rehearsed, since all others launch what one of these does; "kernels" that they launch,
    of which some are "compiled" in several forms and others "kept"; "bytes" of the cubins compiled,
    "seconds". Raises InputError.
    """
    if gpu not in GPUS:
        raise InputError(f"--gpu {gpu}: not one of {', '.join(GPUS)}")
    if config.kernels.backend == "reference":
        raise InputError("kernels.backend = 'reference' launches no kernel")
    degrees(config, config.parallel.processes)  # before anything is made
    began = time.monotonic()
    manifest = out / "manifest.json"
    there = manifest.exists()
    if there and version_of(out) != triton.__version__:
        raise InputError(
            f"{out} is of triton {version_of(out)}, this is {triton.__version__}: name another"
        )
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pythia-fast-prebuild-") as work:
        rehearsed = _rehearse(config, gpu, Path(work), str(out) if there else "")
        compiled = [_keep(file, out) for file in sorted(Path(work).glob("cache/*/*.cubin"))]
    if not there:
        with publish(manifest) as file:
            file.write(json.dumps({"triton": triton.__version__}).encode())
    return {
        "gpu": gpu,
        "processes": config.parallel.processes,
        "ranks": rehearsed["ranks"],
        "kernels": len(rehearsed["kernels"]),
        "compiled": len(compiled),
        "kept": rehearsed["different"] - len(compiled),
        "bytes": sum(compiled),
        "seconds": time.monotonic() - began,
    }


def _rehearse(config: Config, gpu: str, work: Path, known: str) -> dict[str, Any]:
    """What a process of its own said, which compiled into work/cache what is not in `known`."""
    page = work / "page.toml"
    page.write_text(to_toml(config))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(work / "cache"), "TRITON_STORE_BINARY_ONLY": "1"}
    environment[VARIABLE] = known
    command = [sys.executable, "-m", "pythia_fast.rehearsal", str(page), gpu]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    *_, said = done.stdout.strip().splitlines() or [""]
    if done.returncode == 2:
        raise InputError(said)
    if done.returncode:
        raise InputError(f"the rehearsal of the page ended with exit code {done.returncode}")
    rehearsed: dict[str, Any] = json.loads(said)
    return rehearsed


def _keep(cubin: Path, out: Path) -> int:
    """A kernel's files in the folder of its key, the seal last; the size of the cubin."""
    folder, name = out / cubin.parent.name, cubin.stem
    folder.mkdir(exist_ok=True)
    for file in (cubin, cubin.with_suffix(".json")):
        with publish(folder / file.name) as kept:
            kept.write(file.read_bytes())
    with publish(folder / f"{name}{SEAL}") as kept:
        kept.write(seal(cubin.parent, name).encode())
    return cubin.stat().st_size
