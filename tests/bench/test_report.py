"""README and figures are those of the committed rows; tables say what rows say."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import figures, report
from bench.record import Row
from pythia_fast.errors import CheckError, InputError

FIXED: Row = {
    "device": "NVIDIA H200", "driver": "570.1", "torch": "2.13.0", "triton": "3.7.1",
    "transformers": "5.23.0", "commit": "abc", "when": "2026-11-25T00:00:00+00:00", "load": 0.5,
    "part": "", "status": "ok",
}  # fmt: skip
MS = {"ms": [1.0, 2.0, 3.0], "ms_p20": 1.4, "ms_p50": 2.0, "ms_p80": 2.6}


def kernel(impl: str, ms: float, **more: object) -> Row:
    head = {"case": f"rotary 410m {impl}", "bench": "kernel", "kernel": "rotary", "size": "410m"}
    head |= {"impl": impl, "l2": "cold", "part": "forward", "gbps": 6000.0 / ms}
    return {**FIXED, **head, **MS, "ms_p50": ms, "frac_of_limit": 1.5 / ms, **more}


def step(impl: str, turn: int, ms: list[float], **more: object) -> Row:
    head = {"case": f"train 70m {impl}", "bench": "train", "size": "70m", "impl": impl}
    head |= {"turn": turn, "rows": 32, "positions": 2048, "compute": "bf16", "tokens": 65536}
    figures_ = {"mfu_causal": 0.45, "mfu_palm": 0.5, "joule_per_token": 5e-4, "peak_gb": 14.2}
    figures_ |= {"predicted_peak_gb": 14.1}
    return {**FIXED, **head, **MS, "ms": ms, "parameters": 70_426_624, **figures_, **more}


ROWS = [
    kernel("ours", 2.0), kernel("eager", 5.0),
    {**kernel("liger", 1.0), "status": "skipped", "reason": "No module named 'liger_kernel'"},
    step("ours", 0, [40.0, 41.0]), step("ours", 1, [42.0, 43.0]),
    step("compile", 0, [60.0, 62.0]), step("compile", 1, [64.0, 65.0]),
    {**step("eager", 0, []), "status": "out of memory", "reason": "12b: 80 GB", "case": "train x"},
]  # fmt: skip


def test_kernels_beside_their_peers() -> None:
    page = report.markdown(ROWS)
    assert "| rotary | 410m | forward | cold | 2.0000 | 3,000 GB/s | 75.0% | eager 2.50 |" in page
    assert "skipped: rotary 410m liger forward: No module named 'liger_kernel'" in page
    assert "NVIDIA H200" in page and "driver 570.1" in page and "commit abc" in page
    assert report.NO_GPU not in page


def test_readme_has_kernels_of_one_size() -> None:
    more = [kernel("ours", 1.0, size="70m", case="rotary 70m ours")]
    page = report.markdown([*ROWS, *more], brief=True)
    assert "| rotary | 410m |" in page and "| rotary | 70m |" not in page
    assert "| rotary | 70m |" in report.markdown([*ROWS, *more])


def test_turns_are_one_measurement() -> None:
    (ours,) = [row for row in report.training(ROWS) if row["impl"] == "ours"]
    assert ours["ms"] == [40.0, 41.0, 42.0, 43.0] and ours["ms_p50"] == 41.5
    assert [list(t) for t in ours["by_turn"]] == [[40.0, 41.0], [42.0, 43.0]]
    assert ours["tokens_per_s"] == pytest.approx(65536 / 41.5e-3)  # also their mean
    (late,) = report.training([step("ours", 0, [40.0, 41.0, 129.0])])
    assert late["tokens_per_s"] == pytest.approx(65536 / 70e-3)  # a stall counts
    page = report.markdown(ROWS)
    assert "| compile | 63.0 " in page and "| 1.51 |" in page  # two processes: no interval
    more = [
        step(i, n, [ms, ms + 1]) for i, ms in (("ours", 40.0), ("compile", 60.0)) for n in (2, 3)
    ]
    wide = report.markdown([*ROWS, *more])
    assert "| 1.50 (1.4" in wide and ") | 45.0% | 50.0% | 0.0005 | 14.10 | 14.20 |" in wide
    assert "out of memory: train x: 12b: 80 GB" in page


def test_a_sustained_row_stands_beside_the_others() -> None:
    """Compared among themselves, in the table and not in the figure."""
    longer = [
        step(impl, 0, ms, sustained=True, case=f"train sustained 70m {impl}")
        for impl, ms in (("ours", [50.0, 50.0]), ("compile", [100.0, 100.0]))
    ]
    page = report.markdown([*ROWS, *longer])
    assert (
        "bf16, sustained | compile | 100.0 (100.0 to 100.0) | 655 | 2.00 |".replace(
            "655", f"{65536 / 0.1:,.0f}"
        )
        in page
    )
    assert "| 1.51 |" in page
    before, after = figures.all_figures(ROWS), figures.all_figures([*ROWS, *longer])
    assert [f.digest for f in before] == [f.digest for f in after]


def test_what_was_not_held_to_fp32_is_said() -> None:
    rows = [step("ours", 0, [40.0, 41.0], unchecked="gradients: out of memory")]
    assert "Not held to fp32: train 70m ours: gradients: out of memory." in report.markdown(rows)


def test_without_a_gpu_it_is_said() -> None:
    rows = [{**row, "device": "AMD EPYC, 2 cores", "mfu_causal": None} for row in ROWS]
    page = report.markdown(rows)
    assert page.startswith(report.NO_GPU) and "MFU" not in page


def test_figures_of_everything(tmp_path: Path) -> None:
    """All are drawn; the digest in the PNG tells other data from these."""
    drawn = figures.all_figures(ROWS)
    assert [f.file for f in drawn] == [
        "bench-bounds.png", "bench-train-nvidia-h200.png", "bench-kernels-nvidia-h200.png",
    ]  # fmt: skip
    for figure in drawn:
        assert not figure.is_saved(tmp_path)
        figure.save(tmp_path)
        assert figure.is_saved(tmp_path)
    slower = figures.all_figures([kernel("ours", 3.0), *ROWS[1:]])
    assert [f.is_saved(tmp_path) for f in slower] == [True, True, False]


def test_what_has_no_figure_is_shown_as_such() -> None:
    _, training, kernels = figures.all_figures(ROWS)
    assert training.data["absent"] == [["eager", "70m", "out of memory"]]
    assert "eager" in training.data["impls"]
    assert kernels.data["absent"] == {"rotary": ["liger (skipped)"]}


def test_bounds_carry_the_measurements() -> None:
    (bounds, *_) = figures.all_figures(ROWS)
    assert bounds.data["measured"] == {"ours": {"70m": 45.0}, "compile": {"70m": 45.0}}
    assert bounds.data["bounds"]["A"][0] == pytest.approx(64.7, abs=0.05)
    assert bounds.data["bounds"]["B"][-1] == pytest.approx(69.6, abs=0.05)
    (empty,) = figures.all_figures([])
    assert "nothing measured yet" in empty.title


# --- the README -----------------------------------------------------------------------------------


def test_readme_and_figures_are_those_of_the_results() -> None:
    """Run `python -m bench.report` when this fails; never edit between the markers."""
    rows = report.committed()
    assert rows, "bench/results holds no rows"
    report.check(rows, report.REPOSITORY / "README.md", report.REPOSITORY / "docs")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    readme = tmp_path / "README.md"
    text = f"before\n{report.BEGIN}\n{report.END}\nafter\n"
    readme.write_text(report._replaced(text, report.readme_block(ROWS)))
    for figure in figures.all_figures(ROWS):
        figure.save(tmp_path)
    return readme


def test_a_readme_that_agrees(written: Path) -> None:
    report.check(ROWS, written, written.parent)
    text = written.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")


def test_a_changed_figure_or_word_is_found(written: Path) -> None:
    text = written.read_text()
    written.write_text(text.replace("3,000 GB/s", "3,100 GB/s"))
    with pytest.raises(CheckError, match="disagrees"):
        report.check(ROWS, written, written.parent)
    written.write_text(text)
    slower = [*ROWS[:-1], step("ours", 1, [44.0, 45.0])]
    with pytest.raises(CheckError, match="disagrees"):
        report.check(slower, written, written.parent)
    (written.parent / "bench-bounds.png").unlink()
    with pytest.raises(CheckError, match=r"bench-bounds\.png"):
        report.check(ROWS, written, written.parent)
    written.write_text("no block")
    with pytest.raises(InputError, match="no block"):
        report.check(ROWS, written, written.parent)


def test_command_on_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path / "none.jsonl"), "--out", str(tmp_path)]) == 2
    assert "none.jsonl" in capsys.readouterr().err
    assert report.main(["--check"]) in (0, 1)
