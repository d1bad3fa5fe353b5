"""The regression guard: a shift beyond the noise is found, noise is not, a lost case is said."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from kernel_proof import Mutant, assert_killed

compare = importlib.import_module("bench.compare")
FILE = "bench/compare.py"


def row(case: str, ms: list[float] | None = None, **more: object) -> dict:
    fixed = {"part": "", "bench": "kernel", "impl": "ours", "status": "ok", "device": "X"}
    fixed |= {"case": case, "when": "2026-01-01T00:00:00+00:00"}
    return fixed | ({} if ms is None else {"ms": ms}) | more


def noisy(seed: int, centre: float, spread: float = 0.01) -> list[float]:
    return list(centre * (1 + spread * np.random.default_rng(seed).standard_normal(50)))


def check(module: ModuleType) -> None:
    """3 % slower and faster are seen over 1 % of noise; the same is not, nor is a shift below
    --least; processes that differ among themselves are noise."""

    def moved(old: list[list[float]], new: list[list[float]], least: float = 0.01) -> str:
        def rows(turns: list[list[float]]) -> list[dict]:
            return [row("a", ms, turn=n) for n, ms in enumerate(turns)]

        (found,) = module.compare(rows(old), rows(new), least)
        return str(found["moved"])

    assert moved([noisy(1, 10.0)], [noisy(2, 10.3)]) == "slower"
    assert moved([noisy(1, 10.3)], [noisy(2, 10.0)]) == "faster"
    assert moved([noisy(1, 10.3)], [noisy(2, 10.0)], least=0.05) == "no"
    seeds = range(10, 90, 2)
    alarms = [moved([noisy(s, 10.0)], [noisy(s + 1, 10.0)], least=0.0) != "no" for s in seeds]
    assert sum(alarms) <= 8  # of 40, at 5 % each
    # two processes at 9.6 and 10.4 against two at 10.0 and 10.6: the processes differ as much
    assert moved(
        [noisy(1, 9.6, 1e-3), noisy(2, 10.4, 1e-3)], [noisy(3, 10.0, 1e-3), noisy(4, 10.6, 1e-3)]
    ) == "no"  # fmt: skip
    # ... and a shift of everything is one
    assert moved(
        [noisy(1, 9.6, 1e-3), noisy(2, 9.7, 1e-3)], [noisy(3, 10.5, 1e-3), noisy(4, 10.6, 1e-3)]
    ) == "slower"  # fmt: skip


MUTANTS = [
    Mutant("no interval", FILE, "not low <= 1 <= high and ", ""),
    Mutant("no least", FILE, " and abs(ratio - 1) > least", ""),
    Mutant("upside down", FILE, '"slower" if ratio > 1', '"slower" if ratio < 1'),
    Mutant(
        "processes are not drawn", FILE,
        "random.integers(len(samples), size=len(samples))", "range(len(samples))",
    ),
    Mutant("a narrow interval", FILE, "(2.5, 97.5)", "(40.0, 60.0)"),
]  # fmt: skip


def test_compare() -> None:
    check(compare)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_is_killed(mutant: Mutant, tmp_path: Path) -> None:
    assert_killed(mutant, check, tmp_path)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = write(tmp_path / "old.jsonl", [
        row("slow", noisy(1, 1.0)), row("same", noisy(3, 1.0)), row("peer", noisy(5, 1.0)),
        row("gone", noisy(7, 1.0), part="forward"), row("broken", noisy(9, 1.0)),
    ])  # fmt: skip
    new = write(tmp_path / "new.jsonl", [
        row("slow", noisy(2, 1.2)), row("same", noisy(4, 1.0)),
        row("peer", noisy(6, 1.5), impl="eager"),
        row("broken", None, status="crash", reason="SIGSEGV"),
    ])  # fmt: skip
    assert compare.main([str(old), str(new), "--json"]) == 1
    out, err = capsys.readouterr()
    found = {r["case"]: r["moved"] for r in map(json.loads, out.splitlines())}
    assert found == {"slow": "slower", "same": "no", "peer": "slower", "broken": "lost"}
    assert err == "4 cases compared, 3 moved\n"
    assert compare.main([str(old), str(new)]) == 1
    out = capsys.readouterr().out
    assert "slower  slow: x 1.2" in out and "fewer than 4 processes: no interval" in out
    assert "lost    broken: crash SIGSEGV" in out
    assert "same" not in out


@pytest.mark.parametrize(("processes", "known"), [(1, False), (3, False), (4, True)])
def test_an_interval_needs_four_processes(processes: int, known: bool) -> None:
    def rows(first: int, centre: float) -> list[dict]:
        return [row("a", noisy(first + n, centre), turn=n) for n in range(processes)]

    (found,) = compare.compare(rows(1, 1.0), rows(20, 1.2), 0.01)
    assert found["moved"] == "slower" and (found["low"] is not None) is known
    assert ("[1.1" in compare.line(found)) is known
    (found,) = compare.compare(rows(1, 1.0), rows(20, 1.2)[:3], 0.01)
    assert found["low"] is None


def test_a_stall_is_in_the_ratio_of_means() -> None:
    steady, stalled = [np.full(10, 1.0)], [np.array([1.0] * 9 + [11.0])]
    assert compare.ratio_interval(steady, stalled)[0] == 1.0
    assert compare.ratio_interval(steady, stalled, middle=np.mean)[0] == 2.0


def test_a_crash_that_lost_its_parts_is_lost(tmp_path: Path) -> None:
    old = [row("a", [1.0] * 9, part="forward")]
    (found,) = compare.compare(old, [row("a", status="timeout", reason="killed")], 0.01)
    assert (found["moved"], found["now"]) == ("lost", "timeout")


def test_of_a_single_repetition_nothing_is_said() -> None:
    (found,) = compare.compare([row("a", [1.0])], [row("a", [2.0])], 0.01)
    assert found["moved"] == "unknown" and found["ratio"] == 2.0


def test_only_ours_fails_the_guard(tmp_path: Path) -> None:
    old = write(tmp_path / "old.jsonl", [row("a", noisy(1, 1.0), impl="eager")])
    new = write(tmp_path / "new.jsonl", [row("a", noisy(2, 2.0), impl="eager")])
    assert compare.main([str(old), str(new)]) == 0


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = write(tmp_path / "a", [row("a", [1.0])]), write(tmp_path / "b", [row("b", [1.0])])
    for pair, said in (((old, new), "no case in common"), ((old, tmp_path / "c"), "c")):
        assert compare.main([str(p) for p in pair]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
