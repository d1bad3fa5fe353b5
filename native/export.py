"""The kernels of this checkout as cubins and C++ sources (kernels/export.py, export_c.py).

    python native/export.py --out DIR [--gpus sm_90 ...] [--sizes 70m ...] [--dtypes bf16 fp16]
                            [--only TEXT] [--workers N] [--json]

CMakeLists.txt runs it. --check looks at the other options and at the compiler alone, and prints the
file that is new where Triton is another version. Exit code 2, with one line, where there is nothing
to compile with or a kernel does not compile.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# This checkout, whatever is installed: the hook of an editable install comes before sys.path. The
# compiling processes run these lines too.
sys.path.insert(0, str(ROOT))
sys.meta_path.insert(0, PathFinder)

from pythia_fast.kernels import aot, export, export_c  # noqa: E402

if not Path(export.__file__).resolve().is_relative_to(ROOT):
    sys.exit(f"native/export.py: {export.__file__} is not of {ROOT}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="native/export.py")
    parser.add_argument("--out", type=Path, required="--check" not in sys.argv)
    parser.add_argument("--gpus", nargs="+", choices=aot.ARCHITECTURES, default=aot.ARCHITECTURES)
    parser.add_argument("--sizes", nargs="+", choices=export.SIZES, default=export.SIZES)
    parser.add_argument("--dtypes", nargs="+", choices=export.DTYPES, default=["bf16"])
    parser.add_argument("--only", default="", help="cases whose 'file: name' contains this text")
    parser.add_argument("--workers", type=positive, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true", help="the counts as a JSON line")
    parser.add_argument("--check", action="store_true", help="look at the options, compile nothing")
    a = parser.parse_args()
    missing = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"export: {sys.executable} has no {' and no '.join(missing)}: they compile the kernels;"
            " 'make .venv/.installed' makes an environment, -DPython3_EXECUTABLE= names another",
            file=sys.stderr,
        )
        return 2
    if a.check:
        print(importlib.util.find_spec("triton").origin)
        return 0
    try:
        rows, counts = export.export(a.out, a.gpus, a.sizes, a.dtypes, a.only, a.workers)
    except RuntimeError as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("export: interrupted; what is compiled is kept", file=sys.stderr)
        return 130
    export_c.write_sources(rows, ROOT / "native/pythia_kernels.h.in", a.out)
    for row in rows:
        for line in row["violations"]:
            print(f"{row['module']}: {row['case']}: {row['gpu']}: {line}", file=sys.stderr)
    table = export.sizes_by_gpu(rows)
    if a.json:
        print(json.dumps(counts | {"gpus": table}))
        return 0
    print(", ".join(f"{n} {what}" for what, n in counts.items()))
    for gpu, row in table.items():
        print(f"{gpu}: {row['kernels']} kernels, {row['bytes'] / 1e6:.2f} MB")
    return 0


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


if __name__ == "__main__":
    sys.exit(main())
