"""CMakeLists.txt around the kernel library: without a compiler, and in a wheel."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from kernel_proof import REPOSITORY
from native_tools import CMAKE, needs_compiler

BIN = Path(sys.executable).parent


def configure(build: Path, *options: str) -> tuple[int, str]:
    """Without a C++ compiler."""
    command = [str(CMAKE), "-S", REPOSITORY, "-B", build, *options]
    environment = os.environ | {"CXX": "/nowhere/c++"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def test_without_a_compiler(tmp_path: Path) -> None:
    code, said = configure(tmp_path / "library")
    assert code and "pythia_kernels: no C++ compiler found; name one with CXX=" in said
    code, said = configure(tmp_path / "wheel", "-DSKBUILD=2", "-DPYTHIA_KERNELS=ON")
    assert code and "no C++ compiler found" in said  # it was asked for
    code, said = configure(tmp_path / "pure", "-DSKBUILD=2")
    assert not code and "not asked for" in said


@pytest.mark.parametrize("carries", [False, pytest.param(True, marks=needs_compiler)])
def test_wheel(tmp_path: Path, carries: bool) -> None:
    options = {"KERNELS": "ON", "GPUS": "sm_90", "SIZES": "14m", "ONLY": "gelu: 14m tanh"}
    command = [sys.executable, "-m", "pip", "wheel", REPOSITORY, "--no-deps", "--quiet"]
    command += ["--no-build-isolation", "--wheel-dir", tmp_path]
    if carries:
        command += [w for k, v in options.items() for w in ("-C", f"cmake.define.PYTHIA_{k}={v}")]
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(command, check=True, env=environment)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        file.extractall(tmp_path / "installed")
    listed = subprocess.run(
        ["git", "ls-files", "pythia_fast/*.py", "kernels/*.py"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    modules = {name.replace("kernels/", "pythia_fast/kernels/", 1) if name.startswith("kernels/")
               else name for name in listed}  # fmt: skip
    assert len(modules) > 80 and modules <= names
    package = tmp_path / "installed/pythia_fast"
    assert (package / "lib").exists() == carries
    if carries:
        header = (package / "include/pythia_kernels.h").read_text()
        assert "pythia_gelu_14m_tanh_forward_bf16" in header
        assert (package / "lib/cmake/pythia_kernels/pythia_kernels-config.cmake").exists()
        library = ctypes.CDLL(package / "lib/libpythia_kernels.so")
        find = library.pythia_kernels_find
        find.argtypes, find.restype = [ctypes.c_char_p], ctypes.c_void_p
        assert find(b"gelu_14m_tanh_forward_bf16") and not find(b"attention_d64_forward_bf16")
