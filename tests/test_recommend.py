"""Which layouts are offered, in what order, and the command and page that say so."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from kernel_proof import REPOSITORY, Mutant, assert_killed

from bench import layouts as pages
from pythia_fast import plan, recommend
from pythia_fast.cli import main
from pythia_fast.communication import fabric
from pythia_fast.config import Config, load
from pythia_fast.estimate import Estimate
from pythia_fast.parallel.degrees import Degrees, degrees


def config(size: str, *flags: str) -> Config:
    return load(REPOSITORY / f"configs/pythia-{size}.toml", ["--recipe", "modern", *flags])


def test_every_layout_is_one_that_training_accepts() -> None:
    c = config("2.8b")
    found = list(recommend.candidates(c, 64))
    assert len(set(found)) == len(found) > 500
    for at in found:
        page = recommend.page(c, at)
        assert degrees(page, 64) == Degrees(at.pipeline, at.data, at.tensor)
        assert page.train.batch_size % (at.data * at.rows) == 0
    assert {at.tensor for at in found} == {1, 2, 4, 8}
    assert {at.schedule for at in found} == {"1f1b", "interleaved-1f1b"}


def test_keys_that_the_page_sets_are_kept() -> None:
    flags = "--parallel.pipeline 4 --parallel.schedule zero-bubble --parallel.shard none".split()
    found = set(recommend.candidates(config("2.8b", *flags), 32))
    assert {(at.pipeline, at.schedule, at.shard) for at in found} == {(4, "zero-bubble", "none")}
    assert {
        at.data for at in recommend.candidates(config("2.8b", "--parallel.data", "16"), 64)
    } == {16}


def test_the_recommended_one_is_fast_and_simple() -> None:
    rows = recommend.rows(config("12b"), 256, "H100")
    assert [row["recommended"] for row in rows] == [True] + [False] * (len(rows) - 1)
    times = [row["seconds_per_step"]["total"] for row in rows]
    assert times[1:] == sorted(times[1:]) and times[0] <= recommend.AS_FAST * min(times)
    keys = [(r["data"], r["tensor"], r["pipeline"], r["shard"]) for r in rows]
    assert len(set(keys)) == len(keys)
    for row in rows:
        assert row["measured"] is False
        assert row["memory_bytes"]["total"] <= row["memory_bytes"]["usable"] < 84e9
        assert sum(row["layers_of_stages"]) == 36
        step = row["seconds_per_step"]
        parts = ("compute", "optimizer", "bubble", "tensor", "data", "pipeline")
        assert step["total"] == pytest.approx(sum(step[part] for part in parts))
        assert row["tokens_per_s"] == pytest.approx(1024 * 2048 / step["total"])
        assert row["hours"] == pytest.approx(step["total"] * 143_000 / 3600)


def test_recommended_flags_are_that_layout() -> None:
    c = config("6.9b")
    for row in recommend.rows(c, 64, "A100-40GB")[:20]:
        again = config("6.9b", *recommend.flags(row).split())
        for key in ("tensor", "pipeline", "sequence", "schedule", "stages_per_rank"):
            assert getattr(again.parallel, key) == row[key]
        assert again.train.micro_batch_size == row["micro_batch_size"]
        assert row["data"] == 1 or again.parallel.shard == row["shard"]


def test_a_second_and_no_torch() -> None:
    """The largest plan there is, in a process of its own."""
    code = (
        "import sys, time; from pythia_fast.cli import main; begin = time.process_time();"
        "code = main(['plan', 'configs/pythia-12b.toml', '--recipe', 'modern', '--gpus', '1024',"
        "'--gpu', 'h200', '--json']);"
        "print(time.process_time() - begin, 'torch' in sys.modules, 'numpy' in sys.modules, code,"
        "file=sys.stderr)"
    )
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    seconds, *others = done.stderr.split()
    assert others == ["False", "False", "0"], time.perf_counter() - begin
    assert float(seconds) < 1.0
    assert len([json.loads(line) for line in done.stdout.splitlines()]) > 10


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    page = str(REPOSITORY / "configs/pythia-1b.toml")
    arguments = ["plan", page, "--recipe", "modern", "--gpus", "8", "--gpu", "a100"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "not measured" in out and "NVLink 3, InfiniBand HDR" in out
    assert main([*arguments, "--network", "ndr", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0]["links"] == "NVLink 3, InfiniBand NDR" and rows[0]["recommended"]
    assert out.splitlines()[2].split()[:4] == [
        str(rows[0][key]) for key in ("data", "tensor", "pipeline", "shard")
    ]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--gpus 2048", "--gpus 2048: 1 to 1024 are planned"),
        ("--gpus 0", "--gpus 0: 1 to 1024 are planned"),
        ("--gpus 8 --gpu h999", "H200, H100, A100, A100-40GB are"),
        ("--gpus 8 --network edr", "--network EDR: not known here; HDR, NDR are"),
        ("--gpus 8 --recipe modern --precision.compute fp32", "plans are for bf16 and fp16"),
        (
            "--gpus 8 --gpu h100 --recipe modern --parallel.data 4 --parallel.tensor 2 --parallel.shard none",
            "layouts fits in 95%",
        ),
        (
            "--gpus 8 --recipe modern --parallel.tensor 3",
            "parallel.tensor = 3 times parallel.pipeline = 1 does not divide the 8",
        ),
        (
            "--gpus 7 --recipe modern --parallel.data 7",
            "train.batch_size = 1024 is not divisible by parallel.data = 7",
        ),
        (
            "--gpus 24 --precision.sum_ranks 64",
            "train.batch_size = 1024 is not divisible by parallel.data = 24",
        ),
        (
            "--gpus 16 --precision.sum_ranks 64",
            "parallel.data = 16 is not precision.sum_ranks = 64",
        ),
        (
            "--gpus 8 --recipe modern --parallel.schedule zero-bubble --parallel.stages_per_rank 2",
            "stages_per_rank = 2: zero-bubble is planned with one stage a process",
        ),
        ("--parallel.pipeline 0", "parallel.pipeline = 0 must be positive"),
        ("--parallel.tensor 3", "model.heads = 40 is not divisible by parallel.tensor = 3"),
        ("--gpus 8 --recipe modern --timeline x.png", "--parallel.pipeline above 1 is needed"),
    ],
)
def test_bad_input(flags: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(REPOSITORY / "configs/pythia-12b.toml"), *flags.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1


def test_the_page_of_layouts_is_true() -> None:
    """`python -m bench.layouts` would write what docs/ has."""
    docs = REPOSITORY / "docs"
    text = (docs / pages.PAGE).read_text(encoding="utf-8")
    assert text == pages.page(), "run python -m bench.layouts"
    assert all(figure.is_saved(docs) for figure in pages.figures())
    assert set(re.findall(r"\((pipeline-.*?)\)", text)) == {
        path.name for path in docs.glob("pipeline-*.png")
    }


# --- mutants --------------------------------------------------------------------------------------

FILE = "pythia_fast/recommend.py"


def check(module: ModuleType) -> None:
    rows = module.rows(config("12b"), 16, "H100")
    times = [row["seconds_per_step"]["total"] for row in rows]
    assert all(r["memory_bytes"]["total"] <= 0.95 * 84e9 for r in rows)
    assert times[1:] == sorted(times[1:]) and times[0] <= 1.01 * min(times)
    keys = [(r["data"], r["tensor"], r["pipeline"], r["shard"]) for r in rows]
    assert len(set(keys)) == len(keys)
    # the fastest microbatch and schedule of each that fits
    card, on = plan.GPUS["H100"], fabric("H100")
    fastest: dict[tuple[int, int, int, str], float] = {}
    for at in recommend.candidates(config("12b"), 16):
        one = Estimate(config("12b"), at, card, on)
        if one.memory().total <= 0.95 * 84e9:
            key = at.data, at.tensor, at.pipeline, at.shard
            fastest[key] = min(one.step().total, fastest.get(key, math.inf))
    assert dict(zip(keys, times, strict=True)) == fastest
    # on 256 GPUs a small model's simplest layout is too slow
    times = [row["seconds_per_step"]["total"] for row in module.rows(config("70m"), 256, "H200")]
    assert times[0] <= 1.01 * min(times)
    # of 1.4b, weights on every GPU are the simplest and within 1 % of the fastest
    assert module.rows(config("1.4b"), 8, "H100")[0]["shard"] == "optimizer"
    kept = module.candidates(config("1.4b", "--parallel.pipeline", "4"), 16)
    assert {at.pipeline for at in kept} == {4}
    page = load(REPOSITORY / "configs/pythia-12b.toml")  # 16-bit gradients of 64 ranks
    assert {at.data for at in module.candidates(page, 128)} == {64}
    on_one = list(module.candidates(page, 8))  # all ranks, one after the other
    assert {(at.data, at.tensor) for at in on_one} == {(1, 8)}
    assert max(at.rows for at in on_one) == 1024 // 64
    page = config("1.4b", "--parallel.pipeline", "2", "--train.micro_batch_size", "4")
    given = {"parallel.schedule", "parallel.tensor", "train.micro_batch_size"}
    found = list(module.candidates(page, 8, given))
    assert {(at.schedule, at.tensor, at.rows) for at in found} == {("1f1b", 1, 4)}
    rounds = module.candidates(config("1.4b", "--parallel.pipeline", "3"), 3)
    assert "interleaved-1f1b" not in {at.schedule for at in rounds}  # 2^n are no rounds of three


MUTANTS = [
    Mutant("what does not fit is offered", FILE, "> FILLED * card.memory", "> 2 * card.memory"),
    Mutant("slowest first", FILE, "key=lambda entry: entry[0])", "key=lambda entry: -entry[0])"),
    Mutant("the slowest of each", FILE, "or seconds < best[key][0]", "or seconds > 9 + best[key][0]"),
    Mutant("the simplest at any price", FILE, "entry[0] <= AS_FAST * fastest", "entry[0] <= 9 * fastest"),
    Mutant("keys of the page searched", FILE, "if kept(key) else searched", "if False else searched"),
    Mutant("given defaults searched", FILE, 'f"parallel.{key}" in given or ', ""),
    Mutant("given rows searched", FILE, 'if "train.micro_batch_size" in given:', "if False:"),
    Mutant("what does not run is offered", FILE, "            if _runs(c, layout):\n", "            if layout:\n"),
    Mutant("microbatches of two ranks", FILE, "(max(data, c.precision.ranks) * rows)", "(data * rows)"),
]  # fmt: skip


def test_check() -> None:
    check(recommend)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_killed(mutant: Mutant, tmp_path: Path) -> None:
    assert_killed(mutant, check, tmp_path)
