"""expected.py INDEX OUT: what the library must say of each kernel of the index, by other means.

OUT/grids.txt: a line a kernel, GPU and set of integers, with the grid as Python evaluates the
formula: "name major minor sms x y z member=value ...". OUT/layout.c: assertions for a C compiler,
on the type of every function and on the type and offset of every member.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# no grid beyond CUDA's limits is asked for
LIMITS = (2**31 - 1, 65535, 65535)
# member i of n: products of different small numbers; primes, so that nothing divides; ones; a batch
# of thousands, where walks fill the device
INTEGERS = (
    lambda i: 16 * (i + 2),
    lambda i: (97, 101, 103, 107, 109, 113)[i % 6],
    lambda i: 1,
    lambda i: (8191, 3, 5, 2)[i % 4],
    lambda i: (1000003, 2, 1, 3)[i % 4],
)
MULTIPROCESSORS = (13, 148)
C = {"i32": ("int32_t", 4), "i64": ("int64_t", 8), "fp32": ("float", 4)}  # type, bytes
POINTER = ("void *", 8)


def members(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and Triton's types: the arguments, then what the grid alone is made of."""
    found = [(a["name"], a["type"]) for a in row["arguments"]]
    known = {name for name, _ in found} | set(row["constants"])
    return found + [(name, "i32") for name in used(row) if name not in known]


def used(row: dict[str, Any]) -> list[str]:
    """The names in the grid's formulas, in order."""
    scope = {"cdiv", "min", "PER_SM", "SMS"}
    words = "".join(c if c.isalnum() or c == "_" else " " for c in " ".join(row["grid"])).split()
    return [w for w in dict.fromkeys(words) if not w[0].isdigit() and w not in scope]


def grids(row: dict[str, Any]) -> Iterator[str]:
    kinds = dict(members(row))
    free = [name for name in used(row) if name in kinds]
    constants = {n: eval(v) for n, v in row["constants"].items() if n in used(row)}
    major, minor = divmod(int(row["gpu"].removeprefix("sm_")), 10)
    functions = {"cdiv": lambda a, b: -(-a // b), "min": min}
    seen = set()
    for number, integers in enumerate(INTEGERS):
        values = {name: integers(i) for i, name in enumerate(free)}
        sms = MULTIPROCESSORS[number % 2]
        scope = constants | values | {"PER_SM": row["per_sm"], "SMS": sms}
        grid = [eval(formula, functions, scope) for formula in row["grid"]]
        grid += [1] * (3 - len(grid))
        said = " ".join(
            map(str, (major, minor, sms, *grid, *(f"{n}={v}" for n, v in values.items())))
        )
        if said not in seen and all(0 <= g <= limit for g, limit in zip(grid, LIMITS, strict=True)):
            seen.add(said)
            yield f"{row['name']} {said}"


def layout(row: dict[str, Any]) -> Iterator[str]:
    struct = f"pythia_{row['name']}_args"
    yield f"pythia_status pythia_{row['name']}(const {struct} *, void *);"  # no other declaration
    end = 0
    for name, kind in members(row):
        c_type, size = POINTER if kind.startswith("*") else C[kind]
        start = -(-end // size) * size  # a member is aligned to its own size
        end = start + size
        yield (
            f"_Static_assert(offsetof({struct}, {name}) == {start} &&"
            f" _Generic((({struct} *)0)->{name}, {c_type}: 1, default: 0),"
            f' "{row["name"]}: {name}");'
        )


def main(index: str, out: str) -> None:
    rows = json.loads(Path(index).read_text())
    lines = [line for row in rows for line in grids(row)]
    Path(out, "grids.txt").write_text("\n".join(lines) + "\n")
    of_name = {row["name"]: row for row in rows}
    source = ['#include "pythia_kernels.h"']
    source += [line for row in of_name.values() for line in layout(row)]
    Path(out, "layout.c").write_text("\n".join([*source, "int main(void) { return 0; }"]) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
