"""The kernel library: what is exported, what is compiled again, and faults its C++ tests find.

CTest (`make library`) has the library's own tests; here is what is around them.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kernel_proof import REPOSITORY

pytest.importorskip("triton.backends.nvidia")

from pythia_fast.kernels import aot, export, export_c, grids

HERE = Path(__file__).parent
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.fixture(scope="module")
def cases() -> list[tuple[str, Any]]:
    """Of every kernel file, with its module's name."""
    return [
        (module.rpartition(".")[2], case)
        for module in aot.kernel_modules()
        for case in importlib.import_module(module).aot_cases()
    ]


# --- what is exported -----------------------------------------------------------------------------


def test_every_case_has_a_name_and_a_grid_of_its_own(cases: list[tuple[str, Any]]) -> None:
    seen = set()
    for module, case in cases:
        terms = {n for f in grids.GRIDS[case.kernel.__name__] for n in grids.names(f)}
        for gpu in case.architectures:
            seen.add((export.c_name(module, case.name), gpu))
        # what a formula takes from a launch is an integer
        kinds = {case.signature.get(n, "i32") for n in terms}
        assert kinds <= {"i32", "i64", "constexpr"}, case.name
    assert len(seen) == sum(len(case.architectures) for _, case in cases)


@pytest.mark.parametrize(
    ("sizes", "dtypes", "name", "wanted"),
    [
        (["70m"], ["bf16"], "70m dual forward bf16", True),
        (["70m"], ["bf16"], "70m dual forward fp16", False),
        (["70m"], ["bf16", "fp16"], "70m dual forward fp16", True),
        (["70m"], ["bf16"], "1.4b dual forward bf16", False),
        (["1b"], ["bf16"], "1.4b dual forward bf16", True),  # h = 2048 of both
        (["2.8b"], ["bf16"], "70m forward with gradient bf16", True),  # V = 50304 of both
        (["12b"], ["bf16"], "70m forward with gradient bf16", False),
        (["12b"], ["bf16"], "12b/4 shard gradient bf16", True),
        (["2.8b"], ["bf16"], "D=80 forward bf16", True),
        (["2.8b"], ["bf16"], "D=64 forward bf16", False),
        (["14m"], ["bf16"], "weights fp16, gradients fp32", False),
        (["14m"], ["bf16"], "weights None, gradients fp32", True),
        (["14m"], ["bf16"], "norm of partials", True),
    ],
)
def test_selection(sizes: list[str], dtypes: list[str], name: str, wanted: bool) -> None:
    assert export.is_wanted(name, sizes, dtypes) is wanted


def test_selection_of_everything_is_everything(cases: list[tuple[str, Any]]) -> None:
    assert all(export.is_wanted(c.name, export.SIZES, export.DTYPES) for _, c in cases)


def test_a_kernel_that_does_not_compile_leaves_the_index(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text("as it was")
    with pytest.raises(RuntimeError, match=r"aot_faults: does not compile: sm_90: .*power of 2"):
        export.export(tmp_path, ["sm_90"], only="does not compile", modules=["aot_faults"])
    with pytest.raises(RuntimeError, match="no kernel is selected"):
        export.export(tmp_path, ["sm_90"], only="of no name", modules=["aot_faults"])
    assert (tmp_path / "index.json").read_text() == "as it was"


def test_sizes_of_structs() -> None:
    def of(*kinds: str) -> int:
        arguments = [{"name": f"a{i}", "type": kind} for i, kind in enumerate(kinds)]
        row = {"arguments": arguments, "comments": {}, "constants": {}, "grid": ["1"]}
        return export_c._struct_bytes(row)

    assert [of("i32"), of("i32", "*fp32"), of("*fp32", "i32")] == [4, 16, 16]
    assert [of("i32", "fp32", "i64", "i32"), of("i32", "i32", "i32")] == [24, 12]


# --- incremental ----------------------------------------------------------------------------------

# both kernels of gelu.py, whose tail has no kernels after it
ONLY = "gelu: 14m tanh"


def run_export(repository: Path, out: Path) -> dict[str, Any]:
    command = [sys.executable, "-S", "-c", _WITHOUT_EDITABLE, json.dumps(sys.path), "export"]
    command += ["--out", str(out), "--gpus", "sm_90", "--sizes", "14m", "--only", ONLY, "--json"]
    done = subprocess.run(
        [*command, "--workers", "1"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(repository)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# an editable install's import hook would find this checkout instead of the copy
_WITHOUT_EDITABLE = (
    "import json, os, sys; sys.path[:] = [os.environ['PYTHONPATH'], *json.loads(sys.argv.pop(1))];"
    "from pythia_fast.kernels.export import main; sys.argv.pop(0); sys.exit(main(sys.argv[1:]))"
)


def test_only_what_changed_is_compiled(tmp_path: Path) -> None:
    repository, out = tmp_path / "copy", tmp_path / "out"
    for part in ("kernels", "pythia_fast", "native"):
        shutil.copytree(REPOSITORY / part, repository / part, symlinks=True)
    assert run_export(repository, out)["compiled"] == 2
    header = out / "pythia_kernels.h"
    written = header.stat().st_mtime_ns
    counts = run_export(repository, out)
    assert (counts["compiled"], counts["kept"], counts["deleted"]) == (0, 2, 0)
    assert header.stat().st_mtime_ns == written  # nothing to build again

    file = repository / "kernels/gelu.py"
    source = file.read_text()
    assert source.count("b_u = b_x + b_bias[None, :]") == 1  # of the forward
    file.write_text(source.replace("b_u = b_x + b_bias[None, :]", "b_u = b_bias[None, :] + b_x"))
    counts = run_export(repository, out)
    assert (counts["compiled"], counts["kept"], counts["deleted"]) == (1, 1, 2)  # .cubin, .json

    source = file.read_text()
    assert source.count("b_u2 = b_u * b_u\n") == 1  # of a function that both call
    file.write_text(source.replace("b_u2 = b_u * b_u\n", "b_u2 = (b_u * b_u)\n"))
    assert run_export(repository, out)["compiled"] == 2

    cubin = next((out / "cubins").glob("*.cubin"))
    cubin.write_bytes(cubin.read_bytes()[:-1])
    assert run_export(repository, out)["compiled"] == 1


# --- faults that the C++ tests find ---------------------------------------------------------------

FAULTS = {
    "shared memory is not asked for": ("= 48 * 1024;", "= 480 * 1024;"),
    "no pointers to scratch memory": ("i < image->hidden; ++i) parameters", "i < 0; ++i) parameters"),
    "code of one capability on another": ("image.exact ? image.minor == device.minor", "image.exact ? true"),
    "alignment is not looked at": ("return PYTHIA_BAD_ALIGNMENT;", "return PYTHIA_OK;"),
    "a null pointer is launched": ("PYTHIA_POINTER && value == 0", "PYTHIA_POINTER && value == 1"),
    "a failure to load is kept": ("functions_.erase(place);", ""),
    "a module of a kernel not found stays": ("if (result != SUCCESS) d.module_unload(module);", ""),
    "contexts by their address": ("driver->ctx_get_id != nullptr", "false"),
    "contexts share functions": ("const std::pair key(id, &image);", "id = 0; const std::pair key(id, &image);"),
    "a grid turned round": ("function, g.grid[0], g.grid[1]", "function, g.grid[1], g.grid[0]"),
    "an argument short": ("parameters[count++] =\n", "if (i + 1 < kernel.argument_count) parameters[count++] =\n"),
    "an empty grid is launched": ("if (g.grid[0] == 0 ||", "if (g.grid[0] == 1 << 30 ||"),
    "grids without limits": ("grid[axis] > MAX_GRID[axis]", "false"),
    "too little shared memory": ("static_cast<int>(best->shared) <= device.shared", "true"),
    "one attempt to open the driver": ("if (!only.open(", "static bool tried = false; if (std::exchange(tried, true) || !only.open("),
}  # fmt: skip
TESTS = ("every_kernel", "without_driver", "other_gpus", "bad_arguments", "driver_errors", "threads", "load_all")  # fmt: skip


class Built:
    """The C++ tests against launchers of any text; objects that stay are compiled once."""

    def __init__(self, where: Path) -> None:
        self.where = where
        export.export(
            where, ["sm_80", "sm_90"], ["1.4b"], only="forward bf16",
            modules=[f"{aot.PACKAGE}.{m}" for m in ("attention", "rotary", "gelu")],
        )  # fmt: skip
        self.library("libfake_cuda.so", HERE / "fake_cuda.cpp")
        self.library("libno_cuda.so", HERE / "no_cuda.cpp")
        self.compile(where / "tables.cpp", where / "images.cpp", HERE / "test_launcher.cpp")

    def run(self, *options: str) -> None:
        subprocess.run([str(COMPILER), "-std=c++17", "-fPIC", *options], check=True, cwd=self.where)

    def library(self, name: str, source: Path) -> None:
        self.run("-shared", "-o", name, str(source))

    def compile(self, *sources: Path) -> None:
        defined = [
            f'-D{name}="{self.where / file}"'
            for name, file in (
                ("FAKE_CUDA", "libfake_cuda.so"),
                ("WITHOUT_SYMBOLS", "libno_cuda.so"),
            )
        ]
        includes = ["-I", str(REPOSITORY / "native"), "-I", str(self.where), "-I", str(HERE)]
        self.run(*defined, *includes, "-c", *map(str, sources))

    def failures(self, launcher: str) -> list[str]:
        """The tests that fail with a launcher of this text."""
        source = self.where / "launcher.cpp"
        source.write_text(launcher)
        self.compile(source)
        objects = ("launcher.o", "tables.o", "images.o", "test_launcher.o", "libfake_cuda.so")
        self.run("-o", "test", *objects, "-ldl", "-pthread", f"-Wl,-rpath,{self.where}")
        return [
            test
            for test in TESTS
            if subprocess.run([self.where / "test", test], capture_output=True).returncode
        ]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    return Built(tmp_path_factory.mktemp("library"))


LAUNCHER = (REPOSITORY / "native/launcher.cpp").read_text()


def test_the_launcher_has_none(built: Built) -> None:
    assert built.failures(LAUNCHER) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found(built: Built, fault: str) -> None:
    old, new = FAULTS[fault]
    assert LAUNCHER.count(old) == 1, f"{fault}: the text is not there once"
    assert built.failures(LAUNCHER.replace(old, new))


def test_the_tests_that_ctest_runs_are_these() -> None:
    text = (HERE / "CMakeLists.txt").read_text()
    assert f"set(launcher_tests {' '.join(TESTS)})" in text
