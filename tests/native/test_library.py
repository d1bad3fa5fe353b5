"""The kernel library: what is exported, what is compiled again, and faults its C++ tests find.

CTest (`make library`) has the library's own tests; here is what is around them.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kernel_proof import REPOSITORY
from native_tools import COMPILER, needs_compiler

pytest.importorskip("triton.backends.nvidia")

from pythia_fast.kernels import aot, export, export_c, grids, rotary

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def cases() -> list[tuple[str, Any]]:
    """Of every kernel file, with its module's name."""
    return [
        (module.rpartition(".")[2], case)
        for module in aot.kernel_modules()
        for case in importlib.import_module(module).aot_cases()
    ]


# --- what is exported -----------------------------------------------------------------------------


def test_names_in_the_docs_are_kernels(cases: list[tuple[str, Any]]) -> None:
    text = (REPOSITORY / "docs/library.md").read_text()
    named = set(re.findall(r"pythia_(\w+)_args", text)) | set(
        re.findall(r"= pythia_(\w+)\(&", text)
    )
    assert named and named <= {export.c_name(module, case.name) for module, case in cases}


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
    assert tuple(rotary.SUITE) == export.SIZES
    assert all(export.is_wanted(c.name, export.SIZES, export.DTYPES) for _, c in cases)


def test_a_kernel_that_does_not_compile_leaves_the_index(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text("as it was")
    with pytest.raises(RuntimeError, match=r"aot_faults: does not compile: sm_90: .*power of 2"):
        export.export(tmp_path, ["sm_90"], only="does not compile", modules=["aot_faults"])
    with pytest.raises(RuntimeError, match="no kernel is selected"):
        export.export(tmp_path, ["sm_90"], only="of no name", modules=["aot_faults"])
    assert (tmp_path / "index.json").read_text() == "as it was"


def test_every_integer_has_a_word(cases: list[tuple[str, Any]]) -> None:
    for module, case in cases:
        arguments = [{"name": n, "type": kind} for n, kind in aot.parameters(case).items()]
        row = {
            "arguments": arguments,
            "comments": export._comments(inspect.getsource(case.kernel.fn)),
        }
        row |= {
            "constants": dict.fromkeys(case.constexprs, "1"),
            "grid": grids.GRIDS[case.kernel.__name__],
        }
        for field in export_c._fields(row):
            wordless = field["type"] in ("i32", "i64") and not field["comment"]
            assert not wordless, f"{module}: {case.name}: {field['name']}"
            assert "None" not in field["comment"], f"{module}: {case.name}: {field['name']}"


@pytest.mark.parametrize(
    ("before", "count"),
    [("", 3), (".extern .func (.param .b32 r) f\n(\n.param .b64 a\n)\n;\n", 3)],
)
def test_parameters_are_those_of_the_entry(before: str, count: int) -> None:
    entry = ".visible .entry k(\n\t.param .u64 .ptr .global .align 16 k_0,\n\t.param .u32 k_1,\n\t.param .f32 k_2\n)\n{ call (r), f, (a); }"
    assert export.entry_parameters(before + entry) == count


# --- incremental ----------------------------------------------------------------------------------

ONLY = "gelu: 14m tanh"  # both kernels of gelu.py


class Copy:
    """The files that the export reads, elsewhere; an editable install names this checkout."""

    def __init__(self, where: Path) -> None:
        self.root, self.out = where / "copy", where / "out"
        for part in ("kernels", "pythia_fast", "native"):
            shutil.copytree(REPOSITORY / part, self.root / part, symlinks=True)

    def export(self) -> tuple[int, int, int]:
        """Files that were compiled, kept and deleted."""
        done = subprocess.run(
            [sys.executable, self.root / "native/export.py", "--out", self.out, "--gpus", "sm_90",
             "--sizes", "14m", "--only", ONLY, "--json", "--workers", "1"],
            capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        self.said = done.stderr
        counts = json.loads(done.stdout)
        return counts["compiled"], counts["kept"], counts["deleted"]

    def change(self, file: str, old: str, new: str) -> None:
        path = self.root / file
        source = path.read_text()
        assert source.count(old) == 1, old
        path.write_text(source.replace(old, new))

    def cubins(self) -> dict[str, bytes]:
        return {f.name: f.read_bytes() for f in self.out.glob("cubins/*.cubin")}


def test_only_what_changed_is_compiled(tmp_path: Path) -> None:
    copy = Copy(tmp_path)
    assert copy.export() == (2, 0, 0)
    cubins = copy.cubins()
    header = copy.out / "pythia_kernels.h"
    written = header.stat().st_mtime_ns

    # a line above the kernels, and above a function of another file that they call
    for file in ("kernels/gelu.py", "kernels/rows.py"):
        copy.change(file, "\nfrom __future__", "\n# a line more\n\nfrom __future__")
    assert copy.export() == (0, 2, 0)
    assert header.stat().st_mtime_ns == written  # nothing to build again
    promises = [sys.executable, HERE / "check_promises.py", copy.out / "index.json"]
    assert subprocess.run(promises, capture_output=True).returncode == 0

    # a file that is not whole; what a case promises is no part of its key, but looked at each time
    damaged = next((copy.out / "cubins").glob("*.cubin"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    copy.change("kernels/gelu.py", "stages=3, per_sm=6)", "stages=3, per_sm=60)")
    assert copy.export() == (1, 1, 0)
    assert copy.cubins() == cubins  # to the bit: it does not depend on the line
    assert "gelu: 14m tanh backward bf16: sm_90: 8 programs fit an SM, 60 are launched" in copy.said
    assert subprocess.run(promises, capture_output=True).returncode == 1

    # of the forward, then of a function that both call
    copy.change("kernels/gelu.py", "b_u = b_x + b_bias[None, :]", "b_u = b_bias[None, :] + b_x")
    assert copy.export() == (1, 1, 2)  # .cubin, .json
    copy.change("kernels/gelu.py", "b_u2 = b_u * b_u\n", "b_u2 = (b_u * b_u)\n")
    assert copy.export() == (2, 0, 4)


def test_options_are_looked_at_before_anything_is_compiled() -> None:
    def check(*options: str, program: str = sys.executable) -> tuple[int, str]:
        command = [program, REPOSITORY / "native/export.py", "--check", *options]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    code, triton = check("--gpus", "sm_90", "--sizes", "70m")
    assert code == 0 and Path(triton.strip()).name == "__init__.py"
    code, said = check("--gpus", "sm_91")
    assert code == 2 and "invalid choice: 'sm_91'" in said
    bare = [sys.executable, "-S", REPOSITORY / "native/export.py", "--check"]
    done = subprocess.run(bare, capture_output=True, text=True, env={})
    assert (done.returncode, done.stdout) == (2, "") and "no torch and no triton" in done.stderr


def test_another_checkout_is_refused(tmp_path: Path) -> None:
    """That an editable install names, where the files beside the command are not there."""
    (tmp_path / "native").mkdir()
    shutil.copy(REPOSITORY / "native/export.py", tmp_path / "native")
    command = [sys.executable, tmp_path / "native/export.py", "--check"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PYTHONPATH": str(REPOSITORY)}
    )
    assert done.returncode == 1 and f"is not of {tmp_path}" in done.stderr


# --- faults that the C++ tests find ---------------------------------------------------------------

FAULTS = {  # file, text, what is there instead
    "shared memory is not asked for": ("launcher.cpp", "= 48 * 1024;", "= 480 * 1024;"),
    "no pointers to scratch memory": ("launcher.cpp", "i < image->hidden; ++i) parameters", "i < 0; ++i) parameters"),
    "code of one capability on another": ("launcher.cpp", "image.exact ? image.minor == device.minor", "image.exact ? true"),
    "alignment is not looked at": ("launcher.cpp", "return PYTHIA_BAD_ALIGNMENT;", "return PYTHIA_OK;"),
    "a null pointer is launched": ("launcher.cpp", "PYTHIA_POINTER && value == 0", "PYTHIA_POINTER && value == 1"),
    "a failure to load is kept": ("launcher.cpp", "if (result == SUCCESS) function_.store(out", "function_.store(out"),
    "a module of a kernel not found stays": ("launcher.cpp", "if (result != SUCCESS) d.module_unload(module);", ""),
    "contexts by their address": ("launcher.cpp", "driver->ctx_get_id != nullptr", "false"),
    "contexts share functions": ("launcher.cpp", "const std::pair key(context, &image);", "context = 0; const std::pair key(context, &image);"),
    "an invalid handle is final": ("launcher.cpp", "result == ERROR_INVALID_HANDLE ||", ""),
    "what was loaded anew is forgotten": ("launcher.cpp", "function_.store(fresh, std::memory_order_release);", ""),
    "what did not help stays loaded": ("launcher.cpp", "} else {\n            d.module_unload(module);", "} else {"),
    "one lock over every load": ("launcher.cpp", "    std::mutex mutex_;\n    std::atomic", "    inline static std::mutex mutex_;\n    std::atomic"),
    "the first kernel that fits not ends the loading": ("launcher.cpp", "if (status == PYTHIA_OK) status = s;", "if (s != PYTHIA_OK) return s;"),
    "a device is described once": ("launcher.cpp", "if (number != known)", "if (known < 0)"),
    "a grid turned round": ("launcher.cpp", "function, g.grid[0], g.grid[1]", "function, g.grid[1], g.grid[0]"),
    "an argument short": ("launcher.cpp", "parameters[count++] =\n", "if (i + 1 < kernel.argument_count) parameters[count++] =\n"),
    "an empty grid is launched": ("launcher.cpp", "if (g.grid[0] == 0 ||", "if (g.grid[0] == 1 << 30 ||"),
    "grids without limits": ("launcher.cpp", "grid[axis] > MAX_GRID[axis]", "false"),
    "too little shared memory": ("launcher.cpp", "static_cast<int>(best->shared) <= device.shared", "true"),
    "one attempt to open the driver": ("driver.cpp", "if (!opened) opened = open(", "static bool tried = false; if (!tried && (tried = true)) opened = open("),
    "the driver is opened at every call": ("driver.cpp", "if (!opened) opened = open(", "opened = open("),
    "a driver of CUDA 11 is none": ("driver.cpp", "return whole;", "return whole && d.ctx_get_id != nullptr;"),
    "cuInit's error is no driver": ("driver.cpp", "if (const auto s = status_of(only.init(0))) return s;", "if (status_of(only.init(0))) return PYTHIA_NO_DRIVER;"),
    "an empty name is opened": ("driver.cpp", "named != nullptr && *named != '\\0'", "named != nullptr"),
    "a remainder adds a program to none": ("launcher.hpp", "(a + b - 1) / b", "(a + b) / b"),
    "cdiv is rounded down": ("launcher.hpp", "(a + b - 1) / b", "a / b"),
    "a device of seven programs": ("tables.cpp", "* sms)", "* 7)"),
    "one program an SM": ("tables.cpp", "(int64_t{2} * sms)", "(int64_t{1} * sms)"),
    "min is max": ("tables.cpp", "std::min(", "std::max("),
}  # fmt: skip
TESTS = ("every_kernel", "grids", "without_driver", "other_gpus", "bad_arguments", "driver_errors", "dead_contexts", "threads", "loading", "load_all")  # fmt: skip
SOURCES = ("driver.cpp", "launcher.cpp", "tables.cpp")


class Built:
    """The library of some kernels in C++ of any text, and its tests; what stays is compiled once."""

    def __init__(self, where: Path) -> None:
        self.where = where
        rows, _ = export.export(
            where, ["sm_80", "sm_90"], ["1.4b"], only="forward bf16",
            modules=[f"{aot.PACKAGE}.{m}" for m in ("attention", "cross_entropy", "rotary", "gelu")],
        )  # fmt: skip
        native = REPOSITORY / "native"
        export_c.write_sources(rows, native / "pythia_kernels.h.in", where)
        for file in [*native.glob("*.[ch]pp"), *HERE.glob("*.[ch]pp"), *HERE.glob("consumer/*.c")]:
            shutil.copy(file, where)
        self.texts = {f: (where / f).read_text() for f in (*SOURCES, "launcher.hpp")}
        self.written = self.texts
        expected = [sys.executable, HERE / "expected.py", where / "index.json", where]
        subprocess.run(expected, check=True)
        (where / "drivers").mkdir()
        self.run("-shared", "-o", "libfake_cuda.so", "fake_cuda.cpp")
        self.run("-shared", "-o", "libfake_cuda_11.so", "-DCUDA_11", "fake_cuda.cpp")
        self.run("-shared", "-o", "libno_cuda.so", "no_cuda.cpp")
        self.run("-shared", "-o", "drivers/libcuda.so.1", "-DCAPABILITY=90", "fake_gpu.cpp")
        self.run("-c", "images.cpp", "test_launcher.cpp", "test_contexts.cpp", "main.c",
                 f'-DWITHOUT_SYMBOLS="{where}/libno_cuda.so"', f'-DGRIDS="{where}/grids.txt"')  # fmt: skip
        self.run("-c", *SOURCES)

    def run(self, *options: str) -> None:
        command = [str(COMPILER), "-std=c++17", "-fPIC", "-I.", *options]
        subprocess.run(command, check=True, cwd=self.where)

    def failures(self, file: str = "", old: str = "", new: str = "") -> list[str]:
        """The tests that fail with another text in a file."""
        texts = self.texts | ({file: self.texts[file].replace(old, new)} if file else {})
        changed = {f for f in texts if texts[f] != self.written[f]}
        for f in changed:
            (self.where / f).write_text(texts[f])
        self.written = texts
        if changed:
            self.run("-c", *(SOURCES if "launcher.hpp" in changed else changed))
        objects = [f"{Path(f).stem}.o" for f in (*SOURCES, "images.cpp")]
        tests = [*objects, "test_launcher.o", "test_contexts.o"]
        rest = ["-ldl", "-pthread", f"-Wl,-rpath,{self.where}"]
        self.run("-o", "test", *tests, "libfake_cuda.so", *rest)
        self.run("-o", "test_11", *tests, "libfake_cuda_11.so", *rest)
        self.run("-o", "consumer", *objects, "main.o", *rest)
        empty = {"PYTHIA_KERNELS_LIBCUDA": "", "LD_LIBRARY_PATH": str(self.where / "drivers")}
        programs = [([self.where / "test", test], {}) for test in TESTS]
        programs += [
            ([self.where / "test_11", test], {}) for test in ("every_kernel", "dead_contexts")
        ]
        programs += [([self.where / "consumer", "success"], empty)]
        return [
            " ".join(map(str, command))
            for command, environment in programs
            if subprocess.run(command, capture_output=True, env=os.environ | environment).returncode
        ]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("library"))


@needs_compiler
def test_the_library_has_none(built: Built) -> None:
    assert built.failures() == []


@needs_compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found(built: Built, fault: str) -> None:
    file, old, new = FAULTS[fault]
    count = built.texts[file].count(old)
    assert count == 1 or (file == "tables.cpp" and count), f"{fault}: the text is not there"
    assert built.failures(file, old, new)


@needs_compiler
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("int32_t T;", "float T;"),
        ("float scale_log2;", "int32_t scale_log2;"),
        ("void *ctx;", "int64_t ctx;"),
        ("void *qkv;", "void *other; void *qkv;"),
        (
            "_args *args, void *stream);\n\n/* attention: D=128",
            "_args *args, const void *stream);\n\n/* attention: D=128",
        ),
    ],
)
def test_another_layout_is_found(built: Built, tmp_path: Path, old: str, new: str) -> None:
    def compiles(text: str) -> bool:
        (tmp_path / "pythia_kernels.h").write_text(text)
        shutil.copy(built.where / "layout.c", tmp_path)
        command = [str(COMPILER), "-x", "c", "-std=c11", "-fsyntax-only", "layout.c"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0

    header = (built.where / "pythia_kernels.h").read_text()
    header = re.sub(r"PYTHIA_KERNELS_ASSERT\(sizeof.*", "", header)
    assert old in header and compiles(header)
    assert not compiles(header.replace(old, new))


def test_the_tests_that_ctest_runs_are_these() -> None:
    text = (HERE / "CMakeLists.txt").read_text()
    assert f"set(launcher_tests {' '.join(TESTS)})" in text
