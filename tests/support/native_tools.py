"""What the tests of native parts build with: cmake of the environment, the machine's C++ compiler."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

CMAKE = Path(sys.executable).parent / "cmake"  # of the extra `dev`
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(
    COMPILER is None, reason="no C++ compiler: the project is pure Python here, by design"
)
