"""Every kernel passes Triton's own JIT as on a GPU: see tests/support/launch_without_gpu.py."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton
from kernel_proof import REPOSITORY

from pythia_fast.kernels import grids

SCRIPT = Path("tests/support/launch_without_gpu.py")
LAUNCHED = (
    "adam", "adam_lean", "adam_list", "attention", "attention_bwd", "attention_decode", "attention_dq",
    "cross_entropy", "cross_entropy_shards", "embedding", "gelu", "layer_norm",
    "parallel_residual", "rotary", "rows",
)  # fmt: skip


def launch(repository: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-S", "-c", _WITHOUT_EDITABLE, str(repository / SCRIPT),
         json.dumps(sys.path), *options],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip


# an editable install's import hook would find this checkout instead of the mutated copy
_WITHOUT_EDITABLE = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv.pop(2)); sys.argv.pop(0);"
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


def test_every_launched_kernel_compiles_by_the_jit() -> None:
    done = launch(REPOSITORY)
    assert done.returncode == 0, done.stderr
    compiled = {line.split()[0] for line in done.stdout.splitlines()}
    launched = set()
    for file in (REPOSITORY / "kernels").glob("*.py"):
        launched |= set(re.findall(r"^ +(\w+_kernel)\[", file.read_text(), re.M))
    assert compiled == launched


@pytest.fixture(scope="module")
def recorded() -> list[dict[str, Any]]:
    """Every launch at the sizes of the suite."""
    done = launch(REPOSITORY, "--record")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_reported_cases_are_the_launches(recorded: list[dict[str, Any]]) -> None:
    """Constants, warps and stages of `aot_cases` are those that the launchers give to the JIT."""
    assert set(per_sm()) == {identity(row) for row in recorded}


def identity(row: dict[str, Any]) -> str:
    """What is compiled: kernel, constants, warps and stages."""
    what = ("kernel", "constexprs", "num_warps", "num_stages")
    return json.dumps({k: row[k] for k in what}, sort_keys=True, default=str)


def per_sm() -> dict[str, set[int]]:
    """What the cases of each compilation say."""
    found: dict[str, set[int]] = {}
    for name in LAUNCHED:
        for case in importlib.import_module(f"pythia_fast.kernels.{name}").aot_cases():
            row = {"kernel": case.kernel.__name__, "constexprs": case.constexprs}
            row |= {"num_warps": case.num_warps, "num_stages": case.num_stages}
            found.setdefault(identity(row), set()).add(case.per_sm)
    return found


def test_grids_are_those_of_the_launchers(recorded: list[dict[str, Any]]) -> None:
    """Formulas for callers without Python, on a device of one multiprocessor, with the programs
    an SM of `aot_cases()`; what only a grid has (a batch, a list's chunks) is solved for by axis."""
    assert {row["kernel"] for row in recorded} == set(grids.GRIDS)
    compared, filled = 0, set()
    of_sm = per_sm()
    for row in recorded:
        formulas = grids.GRIDS[row["kernel"]]
        assert len(formulas) == len(row["grid"])
        (programs,) = of_sm[identity(row)]
        known = row["constexprs"] | row["integers"] | {"SMS": 1, "PER_SM": programs}
        for formula, axis in zip(formulas, row["grid"], strict=True):
            unknown = [n for n in grids.names(formula) if n not in known]
            if not unknown:
                assert eval(formula, {"cdiv": triton.cdiv}, known) == axis, (row, formula)
                compared += 1
                if axis == programs:
                    filled.add(identity(row))
            for name in unknown:
                one, two = (eval(formula, {"cdiv": triton.cdiv}, known | {name: n}) for n in (1, 2))
                assert two == 2 * one and axis % one == 0, (row, formula)
    assert compared > len(recorded) / 2
    walks = {i for i in of_sm if "PER_SM" in str(grids.GRIDS[json.loads(i)["kernel"]])}
    assert walks <= filled, sorted(walks - filled)


def test_a_global_that_is_not_constant_is_refused(tmp_path: Path) -> None:
    """A NaN is never equal to itself: Triton takes it for a global that has changed."""
    for part in ("kernels", "pythia_fast", "tests/support"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        subprocess.run(["cp", "-R", str(REPOSITORY / part), str(tmp_path / part)], check=True)
    file = tmp_path / "kernels" / "cross_entropy.py"
    text = file.read_text()
    assert 'other=float("nan")' in text
    text = text.replace('other=float("nan")', "other=NAN")
    file.write_text(
        text.replace(
            "\n\n\n@triton.jit", '\n\nNAN = tl.constexpr(float("nan"))\n\n\n@triton.jit', 1
        )
    )
    done = launch(tmp_path)
    assert done.returncode == 1
    assert "refused: _cross_entropy_fwd_kernel" in done.stderr
