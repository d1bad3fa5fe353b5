"""What this machine can run, what is missing, and how to get it: `pythia-fast doctor`."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pythia_fast.errors import InputError


def examine() -> list[dict[str, Any]]:
    """One row a capability: {"what", "ok", "required", "found"}; `found` says how to get it."""
    import torch

    rows = [
        _row("python", sys.version_info >= (3, 11), sys.version.split()[0], required=True),
        _row("torch", True, torch.__version__, required=True),
        _package("triton", "kernels: pip install triton (Linux only)"),
        _gpu(),
        _package("tensorboard", f"log.tensorboard: {install('tensorboard')}"),
        _package("wandb", f"log.wandb: {install('wandb')}"),
        _package("lm-eval", f"benchmarks over checkpoints: {install('eval')}"),
        _package("transformers", "tests, peers of the benchmarks: make .venv/.installed-dev"),
    ]
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    otherwise = "none; pure Python is used. For the kernel library: apt-get install g++"
    rows.append(_row("C++ compiler", bool(compiler), compiler or otherwise))
    cmake = shutil.which("cmake")
    otherwise = "none. For the kernel library (docs/library.md): pip install cmake"
    rows.append(_row("cmake", bool(cmake), cmake or otherwise))
    return rows + _prebuilt()


def _prebuilt() -> list[dict[str, Any]]:
    """The directory of kernels that a run on a GPU would use, where there is one."""
    if importlib.util.find_spec("triton") is None:
        return []
    from triton import __version__

    from pythia_fast import prebuilt

    found = prebuilt.chosen()
    if found is None:
        return []
    source, directory = found
    what = f"{source}: {directory}"
    try:
        version = prebuilt.version_of(directory)
    except InputError as error:
        return [_row("prebuilt kernels", False, f"{source}: {error}")]
    if version != __version__:
        return [_row("prebuilt kernels", False, f"{what} is of triton {version}, not used")]
    kernels = list(directory.glob("*/*.cubin"))
    whole = sum(prebuilt.sealed(f.parent, f.stem) is not None for f in kernels)
    what = f"{what}, {whole} of {len(kernels)} whole"
    return [_row("prebuilt kernels", whole == len(kernels) > 0, what)]


def install(extra: str) -> str:
    """The command, in the root of a clone, that installs an extra of pyproject.toml."""
    return f".venv/bin/pip install -e '.[{extra}]'"


def _gpu() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return _row("GPU", False, "none; training runs on the CPU with the reference ops")
    p = torch.cuda.get_device_properties(0)
    found = f"{torch.cuda.device_count()} x {p.name}, sm_{p.major}{p.minor}, "
    found += f"{p.total_memory / 2**30:.0f} GiB"
    good = (p.major, p.minor) >= (8, 0)
    return _row("GPU", good, found if good else f"{found}; sm_80 or later is needed")


def _package(name: str, otherwise: str) -> dict[str, Any]:
    try:
        return _row(name, True, version(name))
    except PackageNotFoundError:
        present = importlib.util.find_spec(name.replace("-", "_")) is not None
        return _row(name, present, "present" if present else f"missing. {otherwise}")


def _row(what: str, ok: bool, found: str, required: bool = False) -> dict[str, Any]:
    return {"what": what, "ok": ok, "required": required, "found": found}
