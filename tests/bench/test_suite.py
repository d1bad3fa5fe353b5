"""The suite end to end on a CPU at small size, its GPU plan call by call, and bad input."""

from __future__ import annotations

import importlib
import inspect
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_proof import REPOSITORY

from bench import bench_baselines, bench_train, processes, report, runner, session, suite
from bench.op import SIZES
from bench.op_table import OPS
from bench.processes import Case
from bench.record import ResultFile, Row, read
from pythia_fast.cli import main as pythia_fast

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="measures the GPU here")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`suite.run` changes it for its processes; monkeypatch puts it back."""
    for name in ("CUDA_DEVICE_ORDER", "TRITON_INTERPRET"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)


@without_gpu
def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every part that a CPU can measure has a row; what it cannot is said; no time is looked at."""
    out = tmp_path / "out"
    assert suite.main(["--small", "--out", str(out), "--json"]) == 0
    printed, progress = capsys.readouterr()
    (path,) = out.glob("*.jsonl")
    rows = read(path)
    assert list(map(json.loads, printed.splitlines())) == rows
    assert "[1/12]" in progress
    measured = {row["bench"] for row in rows if row["status"] == "ok"}
    assert measured == {"train", "profile", "startup", "data", "checkpoint", "resources"}
    missing = {row["bench"] for row in rows if row["status"] == "not measured"}
    assert missing == set(suite.GPU_PARTS) and len(rows) > 12
    for row in rows:
        assert row["status"] in ("ok", "not measured"), row
        assert all(row[k] for k in ("case", "device", "torch", "commit", "when", "python"))
    impls = {row["impl"] for row in rows if row["bench"] == "train" and row["status"] == "ok"}
    assert impls == {"ours", "transformers"}
    page = (out / "report.md").read_text()
    assert report.NO_GPU in page and "not measured: kernels on a GPU" in page
    for figure in out.glob("*.png"):
        assert figure.name in page and figure.stat().st_size > 10_000
    # a second run adds to the file and draws again
    assert suite.main(["--small", "--out", str(out), "--only", "startup"]) == 0
    assert read(path)[: len(rows)] == rows


def gpu_plan() -> list[tuple[str, Case]]:
    return list(suite.gpu_plan(9.0))


def test_gpu_plan_is_calls_that_exist() -> None:
    for _, case in gpu_plan():
        measure = importlib.import_module(case.module).measure
        inspect.signature(measure).bind(**case.what)


@without_gpu
def test_gpu_cases_without_a_gpu_are_rows() -> None:
    """A case of each kind in its own process: an absent peer is skipped, the others say why not."""
    found = {}
    for _, case in gpu_plan():
        kind = (case.module, case.head.get("kind"), case.head.get("impl") == "liger")
        if case.module in ("bench.runner", "bench.bench_baselines") and kind not in found:
            found[kind] = list(processes.run(case, 60.0))
    assert len(found) == 6
    for (_, _, peer), (row,) in found.items():
        assert row["status"] == ("skipped" if peer else "error"), row
        assert ("liger_kernel" if peer else "NVIDIA") in row["reason"] or "CUDA" in row["reason"]


def test_gpu_plan_is_in_order_of_value_and_complete() -> None:
    plan = gpu_plan()
    parts = [part for part, _ in plan]
    limits = [case.name for case in bench_baselines.limits()]
    assert [case.name for _, case in plan[:2]] == limits
    first_of_ours = next(i for i, (_, c) in enumerate(plan) if c.head.get("impl") == "ours")
    assert set(parts[:first_of_ours]) == {"baselines"}
    eager = {c.head["size"] for p, c in plan if p == "baselines" and c.head["bench"] == "train"}
    assert eager == set(suite.FIRST_SIZES)
    trained = {(c.head["size"], c.head["turn"]) for p, c in plan if p == "train"}
    two = {(size, turn) for size in SIZES for turn in (0, 1)}
    assert trained == two | {(size, turn) for size in suite.FIRST_SIZES for turn in (2, 3)}
    impls = [c.head["impl"] for p, c in plan if p == "train"]
    first = [i for i in bench_train.GPU_IMPLS if i != "ours lean"]  # of the largest sizes alone
    assert impls[: len(first)] == first
    lean = {c.head["size"] for p, c in plan if p == "train" and c.head["impl"] == "ours lean"}
    assert lean == set(bench_train.LARGE)
    assert bench_train.GPU_IMPLS[-1] == bench_train.V1  # after the peers
    assert {c.head["kernel"] for p, c in plan if p == "kernels"} == {op.label for op in OPS}
    assert {"profile", *suite.ANYWHERE} <= set(parts)


def test_sustained_rows_come_last_of_ours_and_the_best_peer() -> None:
    assert suite.sustained_seconds(60.0) == 60.0 and suite.sustained_seconds(9.0) == 25.0
    assert suite.sustained_seconds(1.0) == 0.0 and not list(suite.sustained_plan([], 0.0))
    head = {"bench": "train", "status": "ok", "size": "410m"}
    rates = {"ours": 9.0, "compile": 3.0, "eager": 2.0}
    rows = [head | {"impl": impl, "tokens_per_s": rate} for impl, rate in rates.items()]
    for known, impls in ((rows, ["ours", "compile"]), ([], ["ours"])):
        found = list(suite.sustained_plan(known, 60.0))
        assert [case.head["impl"] for _, case in found] == impls
        for part, case in found:
            assert part == "train" and case.head["sustained"] and case.what["seconds"] == 60.0
            inspect.signature(bench_train.measure).bind(**case.what)


def test_parts_are_chosen_once() -> None:
    every = suite.chosen(iter(gpu_plan()), (*suite.GPU_PARTS, *suite.ANYWHERE))
    keys = [(case.name, case.head.get("turn")) for case in every]
    assert len(keys) == len(set(keys))
    norms = suite.chosen(iter(gpu_plan()), ["layer_norm"])
    assert {case.head["kernel"] for case in norms} == {"layer_norm", "dual_layer_norm"}
    assert not suite.chosen(iter(suite.cpu_plan()), ["kernels"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--minutes", "0"], "--minutes 0"), (["--only", "attentoin"], "--only attentoin: none of")],
)
def test_bad_input(flags: list[str], said: str, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    assert suite.main([*flags, "--out", str(out)]) == 2
    assert pythia_fast(["bench", *flags, "--out", str(out)]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2 and all(said in line for line in err) and not out.exists()


# --- session --------------------------------------------------------------------------------------


def fault(kind: str, name: str = "", **head: object) -> Case:
    what = {"fault": kind}
    name = name or f"case {kind}"
    return Case("bench_faults", name, {"bench": "kernel", "impl": "ours", **head}, what, 30.0)


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the tree had no changes: only then does a run continue an earlier one."""
    fixed = {"device": "X", "commit": "abc", "torch": "2"}
    monkeypatch.setattr(session, "environment", lambda: dict(fixed))


def run(path: Path, cases: list[Case], seconds: float = 60.0) -> session.Session:
    earlier = read(path) if path.exists() else []
    one = session.Session()
    with ResultFile(path) as file:
        one.attach(file, earlier)
        one.run(cases, seconds)
    return one


def test_a_second_run_continues(tmp_path: Path, clean: None) -> None:
    """What is measured stays; what crashed or had no time is tried again."""
    path = tmp_path / "rows.jsonl"
    none, raises, dies = fault("none"), fault("raises"), fault("dies")
    assert run(path, [none, raises, dies]).failed
    first = read(path)
    assert [row["status"] for row in first] == ["ok", "ok", "ok", "error", "ok", "crash"]
    run(path, [none, raises, dies, fault("none", "late")])
    added = read(path)[len(first) :]
    again = ["case raises", "case raises", "case dies", "case dies"]
    assert [row["case"] for row in added] == [*again, "late", "late"]


def test_a_resumed_suite_remembers_its_failures(tmp_path: Path, clean: None) -> None:
    """Until the case is measured again; a wrong one and an error are tried again."""
    path = tmp_path / "rows.jsonl"
    good = fault("none", "good")
    for kind in ("raises", "wrong"):
        bad = fault(kind, f"bad {kind}")
        assert run(path, [good, bad]).failed
        assert run(path, [good]).failed  # it is not in this selection
        assert run(path, [good, bad], seconds=1.0).failed  # there was no time
        assert not run(path, [good, fault("none", f"bad {kind}")]).failed
        assert not run(path, [good]).failed


def test_another_commit_starts_over(tmp_path: Path, clean: None, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "rows.jsonl"
    run(path, [fault("none")])
    for commit in ("abd", "abc-dirty", None):
        fixed = {"device": "X", "commit": commit}
        monkeypatch.setattr(session, "environment", lambda fixed=fixed: dict(fixed))
        before = len(read(path))
        run(path, [fault("none")])
        assert len(read(path)) == before + 2


def test_no_time_left_is_a_row(tmp_path: Path, clean: None) -> None:
    path = tmp_path / "rows.jsonl"
    assert not run(path, [fault("none")], seconds=1.0).failed
    (row,) = read(path)
    assert row["status"] == "not run" and "minutes were over" in row["reason"]
    assert row["impl"] == "ours" and row["when"]


def test_a_case_killed_by_the_suites_end_did_not_hang(tmp_path: Path, clean: None) -> None:
    """Its own limit was not reached: it is tried again, and nothing of ours is wrong."""
    path = tmp_path / "rows.jsonl"
    case = fault("hangs")
    case.what["path"] = str(tmp_path / "pid")
    assert not run(path, [case], seconds=session.SHORTEST + 0.5).failed
    assert [row["status"] for row in read(path)] == ["ok", "not run"]
    assert run(path, [replace(case, limit_s=2.0)]).failed
    assert [row["status"] for row in read(path)[2:]] == ["ok", "timeout"]


def test_a_peers_failure_is_not_ours(tmp_path: Path, clean: None) -> None:
    assert not run(tmp_path / "rows.jsonl", [fault("dies", impl="liger")]).failed


def test_rates_are_shares_of_the_limits_of_the_same_run(clean: None) -> None:
    one = session.Session()
    row: Row = {"case": "x", "part": "", "bench": "kernel", "status": "ok", "impl": "ours"}
    one.add([{**row, "gbps": 1000.0}])
    limit = {**row, "bench": "baseline", "limit": "gbps", "gbps": 4000.0, "case": "copy"}
    product = {**limit, "case": "product", "limit": "tflops", "tflops": 400.0, "gbps": None}
    one.add([limit, product | {"tflops_first": 800.0}])
    row["case"] = "y"
    step = {**row, "bench": "train"}
    one.add([{**row, "gbps": 1000.0}, {**row, "tflops": 200.0}, {**row, "ms_p50": 1.0}])
    one.add([{**step, "tflops": 200.0, "case": "z"}])
    assert [r.get("frac_of_limit") for r in one.rows] == [None, 1.0, 1.0, 0.25, 0.25, None, 0.5]
    of = [r.get("limit_of") for r in one.rows]
    assert of == [None, "sustained", "sustained", "sustained", "burst", None, "sustained"]


def test_lines_for_people() -> None:
    row: Row = {"case": "rotary 70m ours", "part": "forward", "status": "ok", "ms_p50": 0.5}
    assert session.line(row | {"gbps": 3000.0, "frac_of_limit": 0.75}) == (
        "rotary 70m ours forward: 0.5 ms, 3000 GB/s, 75.0% of the limit"
    )
    failed = row | {"status": "timeout", "reason": "killed after 60 s"}
    assert session.line(failed) == "rotary 70m ours forward: timeout: killed after 60 s"


def test_every_benchmark_file_is_found() -> None:
    written = {p.stem.removeprefix("bench_") for p in (REPOSITORY / "bench").glob("bench_*.py")}
    others = {"baselines", "train", "profile", "data", "startup", "checkpoint", "resources"}
    assert set(runner.benchmarks()) == written - others == {op.file for op in OPS}
