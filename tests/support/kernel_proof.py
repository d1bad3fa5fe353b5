"""How a kernel is proved without a GPU: an honest error bound, and mutants that must be killed.

The bound stands in `bench/bound.py`, which the GPU check and the benchmarks use too.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from bench.bound import ATOL, assert_close

__all__ = [
    "ATOL", "REPOSITORY", "Mutant", "assert_close", "assert_killed", "assert_sound", "load_mutant"
]  # fmt: skip

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Mutant:
    """One deliberate fault: `old` stands exactly once in `file` and becomes `new`."""

    name: str
    file: str  # relative to the repository, e.g. "kernels/rotary.py"
    old: str
    new: str


def load_mutant(mutant: Mutant, tmp_path: Path) -> ModuleType:
    """The mutated file as a module of its own, beside the real one (Triton reads its source)."""
    source = (REPOSITORY / mutant.file).read_text()
    assert source.count(mutant.old) == 1, (
        f"mutant {mutant.name!r}: its text stands {source.count(mutant.old)} times in {mutant.file}"
    )
    stem = Path(mutant.file).stem
    path = tmp_path / f"{stem}_mutant.py"
    path.write_text(source.replace(mutant.old, mutant.new))
    package = ".".join(Path(mutant.file).with_suffix("").parts)
    package = (
        package.replace("kernels", "pythia_fast.kernels", 1)
        if package.startswith("kernels")
        else package
    )
    spec = importlib.util.spec_from_file_location(f"{package}_mutant", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


BROKEN = (NameError, SyntaxError, AttributeError, TypeError, ImportError)


def assert_killed(mutant: Mutant, check: Callable[[ModuleType], None], tmp_path: Path) -> None:
    """`check(module)` passes on the real file elsewhere; on the mutant it must fail.

    A mutant that is merely broken code proves nothing about the check: its error is raised.
    """
    module = load_mutant(mutant, tmp_path)
    try:
        check(module)
    except BROKEN:
        raise
    except (Exception, pytest.fail.Exception):
        return
    raise AssertionError(f"mutant {mutant.name!r} survived")


def assert_sound(mutants: Sequence[Mutant], check: Callable[[ModuleType], None]) -> None:
    """`check` passes on the files that the mutants change: what kills them is the fault."""
    for file in sorted({mutant.file for mutant in mutants}):
        name = ".".join(Path(file).with_suffix("").parts)
        check(importlib.import_module(name.replace("kernels.", "pythia_fast.kernels.", 1)
                                      if name.startswith("kernels.") else name))  # fmt: skip
