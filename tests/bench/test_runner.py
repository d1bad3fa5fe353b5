"""The benchmarks without a GPU: arguments, rows and arithmetic, by a timer that is not a clock."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_proof import REPOSITORY

from bench import check, timing
from bench.bench_adam import PEERS as ADAM_PEERS
from bench.cases import OPS, Draw, Op, find, results
from bench.compare import Run, main, peer, worst
from pythia_fast.kernels import layer_norm, reference

KERNEL_FILES = sorted({op.file for op in OPS})
TINY = ["--sizes", "14m", "--batch", "1", "--positions", "3", "--dtype", "fp32"]


def two_milliseconds(
    prepare: Callable[[], Any], call: Callable[[Any], Any], l2: str = "cold"
) -> timing.Times:
    call(prepare())
    return timing.Times(1.0, 2.0, 3.0)


def rows_of(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_row_of_each_pass(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*TINY, "--only", "eager"]
    assert main(("dual_layer_norm",), argv=argv, timer=two_milliseconds) == 0
    forward, backward = rows_of(capsys)
    assert (forward["pass"], backward["pass"]) == ("forward", "backward")
    element = 3 * 128 * 4  # bytes of one (rows, h) tensor
    assert forward["gbps"] == pytest.approx(3 * element / 2e-3 / 1e9)
    assert backward["gbps"] == pytest.approx(5 * element / 2e-3 / 1e9)
    columns = """kernel impl dtype size shape l2 pass ms_p20 ms_p50 ms_p80 tflops gbps frac_of_limit
        max_err allowed_err clock_mhz power_w temp_c triton torch driver commit copy_gbps"""
    assert set(columns.split()) <= set(forward)
    assert (forward["impl"], forward["shape"], forward["l2"]) == ("eager", [1, 3, 128], "cold")
    assert [forward[f"ms_{p}"] for p in ("p20", "p50", "p80")] == [1.0, 2.0, 3.0]


def test_row_of_a_matrix_product(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*TINY, "--only", "eager"]
    assert main(("linear_cross_entropy",), argv=argv, timer=two_milliseconds) == 0
    (row,) = rows_of(capsys)
    assert row["pass"] == "both" and row["gbps"] is None
    assert row["tflops"] == pytest.approx(6 * 3 * 128 * 50304 / 2e-3 / 1e12)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.label)
def test_every_op_runs_through_its_passes(op: Op) -> None:
    """With the reference in the kernel's place: consumed arguments, gradients, state."""
    for dtype in (torch.float32, torch.float16):
        run = Run(two_milliseconds, dtype, "cold", torch.device("cpu"))
        rows = list(run.rows(op, check.TINY, {}, ["eager"]))
        assert [row.get("pass") for row in rows] == list(op.passes), rows


def test_wrong_kernel_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(x, weight, bias, eps=1e-5):  # type: ignore[no-untyped-def]
        return reference.layer_norm(x, weight, bias, eps) * 1.01

    monkeypatch.setattr(layer_norm, "layer_norm", wrong)
    argv = [*TINY, "--only", "ours"]
    assert main(("layer_norm",), argv=argv, timer=two_milliseconds) == 1
    (row,) = rows_of(capsys)
    assert "beyond the bound" in row["error"] and "ms_p50" not in row


def test_peers(capsys: pytest.CaptureFixture[str]) -> None:
    """One that is absent and one that is wrong are skipped with a reason; a right one is timed."""
    peers = {
        "layer_norm": {
            "absent": peer("no_such_package", lambda module: module.layer_norm),
            "wrong": peer("math", lambda module: lambda x, weight, bias: 2 * x + weight + bias),
            "right": peer("torch", lambda module: reference.layer_norm),
        }
    }
    argv = [*TINY, "--only", "absent", "wrong", "right"]
    assert main(("layer_norm",), peers, argv, two_milliseconds) == 0
    absent, wrong, *right = rows_of(capsys)
    assert "no_such_package" in absent["skipped"]
    assert "beyond the bound" in wrong["skipped"]
    assert [row["pass"] for row in right] == ["forward", "backward"]


def test_equal_shapes_are_timed_once(capsys: pytest.CaptureFixture[str]) -> None:
    """1b and 1.4b have the same width."""
    argv = ["--sizes", "1b", "1.4b", "--batch", "1", "--positions", "2", "--only", "eager"]
    assert main(("layer_norm",), argv=[*argv, "--dtype", "fp32"], timer=two_milliseconds) == 0
    assert {row["size"] for row in rows_of(capsys)} == {"1b"}


@pytest.mark.parametrize("file", KERNEL_FILES)
def test_benchmark_files(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"bench.bench_{file}")
    assert {op.label for op in OPS if op.file == file} == set(module.LABELS)
    assert set(getattr(module, "PEERS", {})) <= set(module.LABELS)
    assert (REPOSITORY / "bench" / f"bench_{file}.py").read_text().count("\n") < 70
    if not torch.cuda.is_available():
        assert main(module.LABELS, argv=[]) == 2
        assert capsys.readouterr().err == "a benchmark needs a CUDA device; none is visible\n"


def test_torch_fused_adamw_is_the_reference() -> None:
    """The one peer of the optimizer."""
    op, dtype = find("adamw_"), torch.float16
    inputs = op.inputs(check.TINY, dtype, Draw(torch.device("cpu")))
    same = results(op, op.reference, inputs, dtype)
    exact = results(op, op.reference, inputs, dtype, torch.float64)
    fused = results(op, ADAM_PEERS["adamw_"]["torch-fused"](), inputs, dtype)
    where, found = worst(fused, same, exact, op, dtype)
    assert found.within, (where, found)


def test_percentiles() -> None:
    times = timing.Times.of([float(n) for n in range(1, 102)])
    assert (times.p20, times.p50, times.p80) == (21.0, 51.0, 81.0)
