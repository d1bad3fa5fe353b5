"""Result files: whole after a kill, columns in every row, the newest run of a case."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import nvml, record
from bench.record import ResultFile, environment, newest, read, stamp, times
from pythia_fast.errors import InputError

ROW = {"case": "a", "part": "", "bench": "kernel", "status": "ok"}


def at(second: int, **more: object) -> dict:
    return {**ROW, "device": "X", "when": f"2026-01-01T00:00:{second:02}+00:00", **more}


def test_every_row_says_where_it_was_measured() -> None:
    row = stamp(ROW, environment())
    columns = "device driver clock_max_mhz torch triton transformers numpy python commit load when"
    assert set(columns.split()) <= set(row)
    assert row["device"] and row["torch"] and row["commit"]


def test_environment_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {"device": "NVIDIA H200", "driver": "570", "clock_max_mhz": 1980, "power_limit_w": 700.0}
    monkeypatch.setattr(nvml, "describe", lambda: gpu)
    assert environment().items() >= gpu.items()
    assert record.file_name(environment()).startswith("nvidia-h200-2")


def test_appended_rows_survive_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    with ResultFile(path) as file:
        file.append(ROW)
        assert read(path) == [ROW]  # on disk before the file is closed
    with path.open("a") as torn:
        torn.write('{"case": "b", "ben')
    assert read(path) == [ROW]
    with ResultFile(path) as file:
        file.append({**ROW, "case": "c"})
    assert [row["case"] for row in read(path)] == ["a", "c"]


@pytest.mark.parametrize("text", ["not json\n", "[1]\n", '{"step": 1}\n', '{"case": "a"}\n'])
def test_a_file_of_something_else_is_refused_and_left(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + text)
    with pytest.raises(InputError, match="line 2"):
        ResultFile(path)
    assert path.read_text().endswith(text)
    with pytest.raises(InputError, match="nowhere"):
        read(tmp_path / "nowhere.jsonl")


def test_newest_run_of_a_case() -> None:
    """All rows of one run stand or fall together; not run is no news; turns are kept apart."""
    failed, first = at(1, status="crash"), [at(2, part="forward"), at(2, part="backward")]
    assert newest([failed, *first]) == first
    assert newest([*first, at(3, status="not run")]) == first
    assert newest([at(1, status="not run"), *first]) == first
    assert newest([*first, at(4, status="crash")]) == [at(4, status="crash")]
    turns = [at(1, turn=0), at(2, turn=1)]
    assert newest([*turns, at(3, turn=0)]) == [at(3, turn=0), turns[1]]
    other = at(1, device="Y")
    assert newest([*first, other]) == [*first, other]


def test_percentiles() -> None:
    row = times([float(n) for n in range(1, 102)])
    assert (row["ms_p20"], row["ms_p50"], row["ms_p80"]) == (21.0, 51.0, 81.0)
    assert len(row["ms"]) == 101
    assert times([2.0])["ms_p20"] == times([2.0])["ms_p80"] == 2.0
