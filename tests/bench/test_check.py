"""The GPU check without a GPU: its plan, its rows, its processes, and what it would catch."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from kernel_proof import REPOSITORY

from bench import check
from bench.op import SIZES, shape
from bench.op_table import OPS, find
from bench.record import RESULTS
from pythia_fast.kernels import layer_norm, reference

CPU = torch.device("cpu")
needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the kernels are compiled for the GPU here"
)


# --- plan -----------------------------------------------------------------------------------------


def test_plan_covers_every_op_on_every_distinct_shape_once() -> None:
    tasks = [t for t in check.plan(None, False) if not t.tool]
    planned = [(t.label, find(t.label).key(t.shape)) for t in tasks]
    wanted = {
        (op.label, op.key(shape(s, check.BATCH, check.POSITIONS))) for op in OPS for s in SIZES
    }
    wanted |= {
        (op.label, op.key(shape(s, *check.ODD)))
        for op in OPS if op.file in ("attention", "attention_decode") for s in SIZES
    }  # fmt: skip
    assert len(planned) == len(set(planned)) and set(planned) == wanted
    assert {t.dtypes for t in tasks} == {("bf16", "fp16")}
    for tool in check.TOOLS:
        of_tool = [t for t in check.plan(None, False) if t.tool == tool]
        assert [t.label for t in of_tool if t.shape == check.SMALL] == [o.label for o in OPS]
        walks = {t.label: 0 for t in of_tool} | Counter(
            t.label for t in of_tool if t.shape in check.WALKS
        )
        assert {label for label, count in walks.items() if count == len(check.WALKS)} == {
            o.label for o in OPS if o.file == "attention"
        }


def test_plan_begins_with_each_op_once() -> None:
    first = check.plan(None, False)[: len(OPS)]
    assert [t.label for t in first] == [op.label for op in OPS]
    assert [t.label for t in check.plan(["gelu"], False)[:2]] == ["gelu tanh", "gelu erf"]


def test_shapes_reach_every_entry_of_the_tile_tables() -> None:
    """Every key of an integer-keyed table in a kernel file is a width of one of the ten sizes."""
    shapes = [shape(s, 1, 1) for s in SIZES]
    widths = {
        n for s in shapes
        for n in (s.hidden, 4 * s.hidden, s.vocab, s.head_dim, s.head_dim // 4, s.head_dim // 8)
    }  # fmt: skip
    for file in sorted({op.file for op in OPS}):
        if not (REPOSITORY / "kernels" / f"{file}.py").exists():
            continue
        module = importlib.import_module(f"pythia_fast.kernels.{file}")
        for name, table in vars(module).items():
            if name.isupper() and isinstance(table, dict) and all(type(k) is int for k in table):
                assert set(table) <= widths, f"{file}.{name}: {sorted(set(table) - widths)}"


# --- what one case catches ------------------------------------------------------------------------


def layer_norm_row(monkeypatch: pytest.MonkeyPatch, kernel) -> dict:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(layer_norm, "layer_norm", kernel)
    return check.check_case(find("layer_norm"), check.TINY, torch.float32, CPU)


def test_right_kernel_is_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    assert layer_norm_row(monkeypatch, reference.layer_norm)["status"] == "ok"


def test_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def biased(x, weight, bias, eps=1e-5):  # type: ignore[no-untyped-def]
        return reference.layer_norm(x, weight, bias, eps=1e-2)

    assert layer_norm_row(monkeypatch, biased)["status"] == "wrong"


def test_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def detached(x, weight, bias, eps=1e-5):  # type: ignore[no-untyped-def]
        return reference.layer_norm(x, weight, bias, eps) + 0.01 * (bias - bias.detach())

    row = layer_norm_row(monkeypatch, detached)
    assert (row["status"], row["where"]) == ("wrong", "d_bias")


def test_element_never_written_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def partial(x, weight, bias, eps=1e-5):  # type: ignore[no-untyped-def]
        y = reference.layer_norm(x, weight, bias, eps)
        fresh = torch.empty_like(y)
        fresh[..., 1:] = y[..., 1:]
        return fresh

    assert layer_norm_row(monkeypatch, partial)["status"] == "wrong"
    assert not torch.are_deterministic_algorithms_enabled()


def test_changing_bits_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def drifting(x, weight, bias, eps=1e-5):  # type: ignore[no-untyped-def]
        calls.append(1)
        return reference.layer_norm(x, weight, bias, eps) * (1 + 1e-7 * len(calls))

    assert layer_norm_row(monkeypatch, drifting)["status"] == "not deterministic"


# --- processes ------------------------------------------------------------------------------------


def child(code: str, seconds: float = 30.0) -> tuple[list[dict], dict | None]:
    return check.run_child([sys.executable, "-c", code], dict(os.environ), seconds)


def test_rows_before_a_crash_are_kept() -> None:
    rows, failure = child("import os; print('{\"a\": 1}', flush=True); os.abort()")
    assert rows == [{"a": 1}]
    assert failure and failure["status"] == "crash" and failure["rc"] == -6


def test_python_error_is_quoted() -> None:
    _, failure = child("raise RuntimeError('illegal memory access')")
    assert failure and "illegal memory access" in failure["error"]


def test_hanging_child_is_ended() -> None:
    started = time.monotonic()
    _, failure = child("import time; time.sleep(60)", seconds=0.5)
    assert failure and failure["status"] == "timeout" and time.monotonic() - started < 10


def test_sanitizer_findings_are_quoted() -> None:
    code = f"print('========= Invalid __global__ read'); raise SystemExit({check.SANITIZER_FOUND_ERRORS})"
    _, failure = child(code)
    assert failure and failure["status"] == "sanitizer errors"
    assert "Invalid __global__ read" in failure["error"]


def test_no_time_left_is_a_row() -> None:
    (row,) = check.run_task(check.plan(["rotary"], True)[0], deadline=time.monotonic() - 1)
    assert row["status"] == "not run"


def test_no_sanitizer_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_sanitizer", lambda: None)
    task = next(t for t in check.plan(["rotary"], False) if t.tool == "memcheck")
    (row,) = check.run_task(task, deadline=time.monotonic() + 60)
    assert (row["status"], row["tool"]) == ("not found", "memcheck")


def test_sanitizer_wraps_the_same_child(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(check, "_sanitizer", lambda: "/opt/compute-sanitizer")
    monkeypatch.setattr(check, "run_child", lambda *a: seen.append(a) or ([], None))
    task = next(t for t in check.plan(["rotary"], False) if t.tool == "racecheck")
    assert check.run_task(task, deadline=time.monotonic() + 60) == []
    command, environment, _ = seen[0]
    assert command[:3] == ["/opt/compute-sanitizer", "--tool", "racecheck"]
    assert command[-2] == "--one" and json.loads(command[-1]) == json.loads(
        json.dumps(asdict(task))
    )
    assert environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"


@needs_interpreter
def test_command_under_the_interpreter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_text('{"an earlier": "run"}\n')
    argv = ["--interpret", "--workers", "1", "--only", "parallel_residual", "--out", str(out)]
    assert check.main(argv) == 0
    earlier, *rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert earlier == {"an earlier": "run"}
    assert [row["dtype"] for row in rows] == ["fp32", "fp16"]
    assert {row["status"] for row in rows} == {"ok"}
    printed = capsys.readouterr()
    assert [json.loads(line) for line in printed.out.splitlines()] == rows
    assert printed.err == f"2 ok; rows appended to {out}\n"


def test_rows_stay_out_of_the_readmes_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default lies outside of bench/results, whose rows the README must agree with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        check,
        "run_task",
        lambda task, *_: [{"op": task.label, "size": "tiny", "tool": None, "status": "ok"}],
    )
    committed = sorted(RESULTS.iterdir())
    assert check.main(["--interpret", "--only", "rotary"]) == 0
    assert capsys.readouterr().err == "1 ok; rows appended to runs/check.jsonl\n"
    assert len((tmp_path / "runs" / "check.jsonl").read_text().splitlines()) == 1
    assert sorted(RESULTS.iterdir()) == committed
    with pytest.raises(SystemExit):
        check.main(["--help"])
    assert "(runs/check.jsonl)" in capsys.readouterr().out


@needs_interpreter
def test_command_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_trained_twice_is_the_same_and_a_difference_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = check.repeated("tiny", 120)
    assert row["status"] == "ok" and len(row["digest"]) == 64, row
    digests = iter("ab")
    monkeypatch.setattr(check, "run_child", lambda *_: ([{"digest": next(digests)}], None))
    assert check.repeated("tiny", 1)["status"] == "not deterministic"
    monkeypatch.setattr(check, "run_child", lambda *_: ([], {"status": "crash"}))
    assert check.repeated("tiny", 1)["status"] == "crash"
