"""Every public op has a kernel, a reference of equal signature, tests with mutants, a benchmark,
and cases for ahead-of-time compilation."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest
from kernel_proof import REPOSITORY, Mutant

from bench.op_table import OPS
from pythia_fast.kernels import reference
from pythia_fast.kernels.aot_case import AotCase

KERNELS = REPOSITORY / "kernels"
MIN_MUTANTS = 3


def public_functions(path: Path) -> list[str]:
    """Names of the top-level functions without a leading underscore."""
    body = ast.parse(path.read_text()).body
    return [n.name for n in body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]


def files_defining(op: str) -> list[str]:
    """The kernel files, by stem, that define a function of this name."""
    files = sorted(p for p in KERNELS.glob("*.py") if p.stem != "reference")
    return [p.stem for p in files if op in public_functions(p)]


SPECIFIED = public_functions(KERNELS / "reference.py")
FILE_OF = {op: files_defining(op) for op in SPECIFIED}
WRITTEN = sorted((op, file) for op, files in FILE_OF.items() for file in files)
FILES = sorted({file for _, file in WRITTEN})
COMPILED = [f for f in FILES if "@triton.jit" in (KERNELS / f"{f}.py").read_text()]


@pytest.mark.parametrize("op", SPECIFIED)
def test_every_reference_has_one_kernel(op: str) -> None:
    assert len(FILE_OF[op]) == 1, f"{op}: kernel files {FILE_OF[op]}"


@pytest.mark.parametrize(("op", "file"), WRITTEN)
def test_signature_is_the_reference(op: str, file: str) -> None:
    module = importlib.import_module(f"pythia_fast.kernels.{file}")
    kernel, specified = (
        inspect.signature(getattr(module, op)),
        inspect.signature(getattr(reference, op)),
    )
    assert kernel == specified
    assert inspect.getdoc(getattr(module, op)), f"{op} has no docstring"


@pytest.mark.parametrize(("op", "file"), WRITTEN)
def test_op_is_in_the_table_of_check_and_benchmarks(op: str, file: str) -> None:
    assert file in {entry.file for entry in OPS if entry.name == op}


@pytest.mark.parametrize("file", FILES)
def test_file_has_benchmark(file: str) -> None:
    module = importlib.import_module(f"bench.bench_{file}")
    labels = {entry.label for entry in OPS if entry.file == file}
    assert set(module.LABELS) == labels


@pytest.mark.parametrize("file", FILES)
def test_file_has_tests_with_mutants(file: str) -> None:
    """The list is run by a test that takes each mutant and asserts that it is killed."""
    path = REPOSITORY / "tests/kernels" / f"test_{file}.py"
    assert path.exists(), f"{path.name} is missing"
    tree = ast.parse(path.read_text())
    lists = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign) and "MUTANTS" in ast.unparse(node)[:8]
    ]
    assert len(lists) == 1 and isinstance(lists[0], ast.List | ast.Tuple)
    mutants = [ast.unparse(element) for element in lists[0].elts]
    assert len(mutants) >= MIN_MUTANTS
    assert all(text.startswith(f"{Mutant.__name__}(") for text in mutants), mutants
    runs = [
        n
        for n in tree.body
        if isinstance(n, ast.FunctionDef) and "assert_killed(" in ast.unparse(n)
    ]
    assert any("MUTANTS" in ast.unparse(d) for n in runs for d in n.decorator_list), (
        f"{path.name}: no test is parametrised by MUTANTS and calls assert_killed"
    )


def test_only_the_composed_op_has_no_kernel_of_its_own() -> None:
    """It is matrix products of cuBLAS around the kernel of cross_entropy.py."""
    assert set(FILES) - set(COMPILED) == {"linear_cross_entropy"}


@pytest.mark.parametrize("file", COMPILED)
def test_file_has_cases_for_compilation(file: str) -> None:
    """Of bf16 and fp16, each with every runtime argument and constant that its kernel takes."""
    module = importlib.import_module(f"pythia_fast.kernels.{file}")
    cases: list[AotCase] = list(module.aot_cases())
    kinds = {kind for case in cases for kind in case.signature.values()}
    # an address from memory has its dtype as a constant
    kinds |= {f"*{value}" for case in cases for value in case.constexprs.values()}
    assert {"*bf16", "*fp16"} <= kinds
    for case in cases:
        constants = {n for n, kind in case.signature.items() if kind == "constexpr"}
        assert constants == set(case.constexprs), case.name
        # "?" is an address that the kernel has read from memory
        assert set(case.wide) <= (set(case.signature) | {"?"}) - constants, case.name
        assert set(case.narrow) <= {*case.signature, "?"} - constants, case.name
        assert set(case.not_aligned) <= {n for c in cases for n in c.signature}, case.name
        assert set(case.signature) == set(case.kernel.arg_names), case.name
