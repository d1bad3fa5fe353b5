"""Compiles the kernels of a page ahead of its run, on a machine without a GPU: see `prebuilt.py`.

A process rehearses the page's step (`rehearsal.py`) with a cache of its own; what it compiled moves
to the directory, which may hold other pages and GPUs.
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

from pythia_fast.config import Config, to_toml
from pythia_fast.data.files import publish
from pythia_fast.errors import InputError
from pythia_fast.parallel.degrees import degrees

GPUS = ("A100", "H100", "H200", "B200")
VARIABLE = "PYTHIA_FAST_AOT"


def prebuild(config: Config, gpu: str, out: Path) -> dict[str, Any]:
    """Adds a page's kernels for a GPU to the directory `out`.

    What is there is not compiled again. Returns a row: "processes" of the page's layout, "ranks" of
    them that rehearsed, since all others launch what one of these does; "launched" (kernels by
    name), "compiled", "kept", "bytes" of the cubins compiled, "seconds". Raises InputError.
    """
    if gpu not in GPUS:
        raise InputError(f"--gpu {gpu}: not one of {', '.join(GPUS)}")
    degrees(config, config.parallel.processes)  # before anything is made
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    manifest_file = out / "manifest.json"
    manifest = json.loads(manifest_file.read_text()) if manifest_file.exists() else {}
    with tempfile.TemporaryDirectory(dir=out, prefix=".") as work:
        page, cache = Path(work) / "page.toml", Path(work) / "cache"
        page.write_text(to_toml(config))
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": str(cache), "TRITON_STORE_BINARY_ONLY": "1"}
        environment[VARIABLE] = str(out) if manifest else ""
        command = [sys.executable, "-m", "pythia_fast.rehearsal", str(page), gpu]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode == 2:
            raise InputError(done.stdout.strip())
        if done.returncode:
            raise InputError(f"the rehearsal of the page ended with exit code {done.returncode}")
        rehearsed = json.loads(done.stdout)
        compiled = [_move(file, out) for file in sorted(cache.glob("*/*.cubin"))]
    launched = rehearsed["kernels"]
    known = sorted({*manifest.get("kernels", []), *launched})
    with publish(manifest_file) as file:
        file.write(json.dumps({"triton": rehearsed["triton"], "kernels": known}).encode())
    return {
        "gpu": gpu,
        "processes": config.parallel.processes,
        "ranks": rehearsed["ranks"],
        "launched": len(launched),
        "compiled": len(compiled),
        "kept": rehearsed["different"] - len(compiled),
        "bytes": sum(compiled),
        "seconds": time.monotonic() - began,
    }


def _move(cubin: Path, out: Path) -> int:
    """A kernel's two files to the folder of its key; the one that is looked for, last."""
    folder = out / cubin.parent.name
    folder.mkdir(exist_ok=True)
    size = cubin.stat().st_size
    for file in (cubin, cubin.with_suffix(".json")):
        file.replace(folder / file.name)
    return size
