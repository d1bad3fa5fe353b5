"""What a case of the benchmarks can do wrong, for `bench.processes.run` in tests."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def measure(fault: str, path: str = "") -> Iterator[dict[str, Any]]:
    if fault == "says nothing":
        return
    yield {"part": "first", "ms": [1.0]}
    match fault:
        case "none":
            yield {"part": "second", "ms": [2.0]}
        case "wrong":
            yield {"part": "second", "status": "wrong", "reason": "beyond the bound"}
        case "raises":
            raise RuntimeError("illegal memory access\nand more")
        case "memory":
            raise MemoryError
        case "out of memory":
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        case "dies":
            print("the last words", file=sys.stderr, flush=True)
            os.abort()
        case "exits":
            sys.exit(3)
        case "hangs":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            Path(path).write_text(str(child.pid))
            time.sleep(600)
