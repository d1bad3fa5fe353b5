"""The kernel benchmarks without a GPU: rows and arithmetic, by a timer that is not a clock."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch
from fake_timing import two_milliseconds
from kernel_proof import REPOSITORY

from bench import check, runner
from bench.op import Draw, Op, results
from bench.op_table import OPS, find
from bench.runner import peer, worst
from pythia_fast.kernels import layer_norm, reference

KERNEL_FILES = sorted({op.file for op in OPS})


def rows_of(kernel: str, impl: str, dtype: str = "fp32", size: Any = check.TINY) -> list[dict]:
    return list(runner.measure(kernel, impl, size, dtype, 1, 3, timer=two_milliseconds))


def test_row_of_each_pass() -> None:
    forward, backward = rows_of("dual_layer_norm", "eager", size="14m")
    assert (forward["part"], backward["part"]) == ("forward", "backward")
    element = 3 * 128 * 4  # bytes of one (rows, h) tensor
    assert forward["gbps"] == pytest.approx(3 * element / 2e-3 / 1e9)
    assert backward["gbps"] == pytest.approx(5 * element / 2e-3 / 1e9)
    assert forward["ms"] == [1.0, 2.0, 3.0] and forward["ms_p50"] == 2.0
    assert 1.0 < forward["ms_p20"] < 2.0 < forward["ms_p80"] < 3.0
    assert forward["max_err"] <= forward["allowed_err"] and forward["clock_mhz"] == 1980.0


def test_row_of_a_matrix_product() -> None:
    (row,) = rows_of("linear_cross_entropy", "eager", size="14m")
    assert row["part"] == "both" and "gbps" not in row
    assert row["tflops"] == pytest.approx(6 * 3 * 128 * 50304 / 2e-3 / 1e12)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.label)
def test_every_op_runs_through_its_passes(op: Op) -> None:
    """With the reference in the kernel's place: consumed arguments, gradients, state."""
    for dtype in ("fp32", "fp16"):
        rows = rows_of(op.label, "eager", dtype)
        assert [row.get("part") for row in rows] == list(op.passes), rows


def test_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x, weight, bias, eps=1e-5):  # type: ignore[no-untyped-def]
        return reference.layer_norm(x, weight, bias, eps) * 1.01

    monkeypatch.setattr(layer_norm, "layer_norm", wrong)
    (row,) = rows_of("layer_norm", "ours")
    assert row["status"] == "wrong" and "beyond the bound" in row["reason"] and "ms" not in row


def test_a_kernel_of_ours_is_never_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an error of the process where it cannot be imported."""
    monkeypatch.delattr(layer_norm, "layer_norm")
    with pytest.raises(AttributeError):
        rows_of("layer_norm", "ours")


def test_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Absent: skipped; wrong: said; one that fails: its error, for the process to report."""

    def refuses(x, weight, bias):  # type: ignore[no-untyped-def]
        raise RuntimeError("head dim 80 is not supported")

    peers = {
        "absent": peer("no_such_package", lambda module: module.layer_norm),
        "outdated": peer("math", lambda module: module.layer_norm),
        "wrong": peer("math", lambda module: lambda x, weight, bias: 2 * x + weight + bias),
        "refuses": peer("math", lambda module: refuses),
        "right": peer("torch", lambda module: reference.layer_norm),
    }
    monkeypatch.setattr(runner, "peers", lambda op: peers)
    (absent,), (outdated,), (wrong,) = (
        rows_of("layer_norm", name) for name in ("absent", "outdated", "wrong")
    )
    assert absent["status"] == "skipped" and "no_such_package" in absent["reason"]
    assert outdated["status"] == "skipped" and "AttributeError" in outdated["reason"]
    assert wrong["status"] == "wrong" and "beyond the bound" in wrong["reason"]
    with pytest.raises(RuntimeError, match="head dim 80"):
        rows_of("layer_norm", "refuses")
    assert [row["part"] for row in rows_of("layer_norm", "right")] == ["forward", "backward"]


def test_equal_shapes_are_one_case() -> None:
    """1b and 1.4b have the same width; and every implementation has a case of its own."""
    cases = list(runner.cases(["layer_norm"], ["1b", "1.4b"]))
    impls = [*runner.OWN, "liger", "apex", "apex-fast"]
    assert [case.head["impl"] for case in cases] == impls
    assert {case.head["size"] for case in cases} == {"1b"}
    assert len({case.name for case in cases}) == len(cases)
    only = runner.cases(["layer_norm"], ["1b"], only=["ours"])
    assert [case.head["impl"] for case in only] == ["ours"]


def test_cases_are_calls_of_measure() -> None:
    for case in runner.cases([op.label for op in OPS]):
        inspect.signature(runner.measure).bind(**case.what)


@pytest.mark.parametrize("file", KERNEL_FILES)
def test_benchmark_files(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"bench.bench_{file}")
    assert file in runner.benchmarks()
    assert {op.label for op in OPS if op.file == file} == set(module.LABELS)
    assert set(getattr(module, "PEERS", {})) <= set(module.LABELS)
    assert (REPOSITORY / "bench" / f"bench_{file}.py").read_text().count("\n") < 100
    if not torch.cuda.is_available():
        assert runner.main(module.LABELS, argv=[]) == 2
        assert capsys.readouterr().err == "a benchmark needs a CUDA device; none is visible\n"


@pytest.mark.parametrize(("label", "gradients"), [("adamw_", "grad"), ("adamw_list_", "grads")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_torch_fused_adamw_is_the_reference(label: str, gradients: str, dtype: torch.dtype) -> None:
    """No pass of its own for the clip factor; it writes over gradients: a copy is handed in."""
    op = find(label)
    inputs = op.inputs(check.TINY, dtype, Draw(torch.device("cpu")))
    before = [t.clone() for t in inputs[gradients]]
    same = results(op, op.reference, inputs, dtype)
    exact = results(op, op.reference, inputs, dtype, torch.float64)
    fused = results(op, runner.peers(op)["torch-fused"](), inputs, dtype)
    where, found = worst(fused, same, exact, op, dtype)
    assert found.within, (where, found)
    assert all(map(torch.equal, inputs[gradients], before))


def test_the_parts_of_the_flat_buffer_are_aligned() -> None:
    """As optim.AdamW aligns them: a peer that takes the parts apart vectorises both."""
    inputs = find("adamw_").inputs(check.TINY, torch.float32, Draw(torch.device("cpu")))
    assert inputs["decay_until"] % 64 == 0 and 0 < inputs["decay_until"] < len(inputs["master"])
