"""A case may die, hang or run out of memory: it becomes a row, and what it gave before is kept."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from bench.processes import Case, failure, run


def rows_of(fault: str, seconds: float = 60.0, **what: str) -> list[dict]:
    head = {"bench": "kernel", "size": "70m"}
    case = Case("bench_faults", f"fault {fault}", head, {"fault": fault, **what}, 60.0)
    rows = list(run(case, seconds))
    for row in rows:
        assert row["case"] == f"fault {fault}" and row["bench"] == "kernel"
        assert row["size"] == "70m" and row["status"] and "part" in row
    return rows


def test_rows_in_order() -> None:
    assert [(r["part"], r["status"]) for r in rows_of("none")] == [
        ("first", "ok"), ("second", "ok"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "status", "reason"),
    [
        ("raises", "error", "RuntimeError: illegal memory access"),
        ("memory", "out of memory", "MemoryError"),
        ("out of memory", "out of memory", "Tried to allocate 2.00 GiB"),
        ("dies", "crash", "SIGABRT"),
        ("exits", "crash", "exit code 3"),
    ],
)
def test_faults(fault: str, status: str, reason: str) -> None:
    first, last = rows_of(fault)
    assert first["status"] == "ok" and first["ms"] == [1.0]
    assert last["status"] == status and reason in last["reason"] and "\n" not in last["reason"]


def test_a_case_without_rows_is_a_row() -> None:
    (row,) = rows_of("says nothing")
    assert (row["status"], row["reason"]) == ("error", "it measured nothing")


def test_last_words_are_quoted() -> None:
    assert "the last words" in rows_of("dies")[-1]["reason"]


def test_hanging_case_is_killed_with_what_it_started(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    rows_of("none")  # the server is up
    started = time.monotonic()
    first, last = rows_of("hangs", seconds=3.0, path=str(file))
    assert time.monotonic() - started < 30
    assert first["part"] == "first" and last["status"] == "timeout"
    assert last["reason"] == "killed after 3 s"
    grandchild = int(file.read_text())
    for _ in range(100):
        if not _runs(grandchild):
            break
        time.sleep(0.05)
    assert not _runs(grandchild)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_a_module_that_is_absent_is_a_row() -> None:
    (row,) = run(Case("no_such_benchmark", "none", {"bench": "kernel"}), 60.0)
    assert row["status"] == "error" and "no_such_benchmark" in row["reason"]


def test_torchs_own_out_of_memory() -> None:
    import torch

    assert failure(torch.OutOfMemoryError("at 12b"))["status"] == "out of memory"
    assert failure(ValueError())["status"] == "error"
