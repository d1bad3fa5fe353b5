"""The matrix of layouts: from one of each kind to every other, bytes by sha256 and the next losses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from parallel_proof import carry, digests, run
from ranks import Ranks

from pythia_fast import checkpoint

PAGE = """
--model.heads 4 --model.layers 4 --train.micro_batch_size 1 --train.batch_size 8 --train.steps 6
--optimizer.warmup 0.1 --checkpoint.every 2
""".split()
TENSOR2, PIPELINE2 = ["--parallel.tensor", "2"], ["--parallel.pipeline", "2"]
INTERLEAVED = ["--parallel.schedule", "interleaved-1f1b", "--parallel.stages_per_rank", "2"]
LAYOUTS = {
    "alone": (1, []),
    "data 2": (2, []),
    "data 4, whole states": (4, ["--parallel.shard", "none"]),
    "tensor 2": (2, TENSOR2),
    "tensor 4": (4, ["--parallel.tensor", "4"]),
    "tensor 2, data 2": (4, TENSOR2),
    "sequence 2, data 2, whole states": (
        4, [*TENSOR2, "--parallel.sequence", "true", "--parallel.shard", "none"],
    ),
    "pipeline 2": (2, PIPELINE2),
    "pipeline 4": (4, ["--parallel.pipeline", "4"]),
    "pipeline 2, interleaved": (2, [*PIPELINE2, *INTERLEAVED]),
    "pipeline 2, data 2": (4, PIPELINE2),
    "pipeline 2, tensor 2": (4, [*PIPELINE2, *TENSOR2]),
    "all three": (8, [*PIPELINE2, *TENSOR2]),
    "weights sharded 4": (4, ["--parallel.shard", "full"]),
}  # fmt: skip
SOURCES = ("alone", "all three", "tensor 2, data 2", "weights sharded 4")
# Losses of two more steps: sums of fp32 cut in up to eight parts, and Adam's steps on gradients of
# rounding alone; a state that is not the right one moves them by 6e-2 (the last test).
LOSS = 2e-5


@pytest.fixture(scope="module")
def runs(ranks: Ranks, page: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run on each source layout, as it stood after 4 of its 6 steps."""
    found = {}
    for name in SOURCES:
        world, flags = LAYOUTS[name]
        found[name] = tmp_path_factory.mktemp("run") / "run"
        ranks.call(world, run, str(page), [*PAGE, *flags], str(found[name]))
        shutil.rmtree(checkpoint.directory(found[name], 6))
    return found


def losses(directory: Path) -> list[float]:
    return [row["loss"] for row in tiny_run.rows(directory / "metrics.jsonl")]


@pytest.mark.parallel
@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", SOURCES)
def test_a_checkpoint_goes_on_in_any_layout(
    source: str, target: str, ranks: Ranks, page: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    if source == target:
        pytest.skip("no change")
    here, (world, flags) = runs[source], LAYOUTS[target]
    wanted: dict[str, Any] = digests(here)
    assert len(wanted) == 3 * 52 and checkpoint.newest(here) == 4
    ranks.call(world, carry, str(page), [*PAGE, *flags], str(here), str(tmp_path / "carried"))
    assert digests(tmp_path / "carried") == wanted
    on = tmp_path / "on"
    shutil.copytree(here, on)
    ranks.call(world, run, str(page), [*PAGE, *flags], str(on))
    assert losses(on)[:4] == losses(here)[:4]
    assert losses(on)[4:] == pytest.approx(losses(here)[4:], rel=LOSS)
    ledgers = [tiny_run.rows(directory / "ledger.jsonl") for directory in (on, here)]
    assert ledgers[0] == ledgers[1] and len(ledgers[0]) == 6


@pytest.mark.parallel
def test_a_wrong_state_is_seen_in_the_next_losses(ranks: Ranks, page: Path, tmp_path: Path) -> None:
    """Mutant: each process of two saves the boxes of the other one."""
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    for directory, faults in ((right, []), (wrong, ["boxes of the other process"])):
        ranks.call(2, run, str(page), [*PAGE, *TENSOR2], str(directory), *faults)
        shutil.rmtree(checkpoint.directory(directory, 6))
        ranks.call(1, run, str(page), PAGE, str(directory))
    assert losses(wrong)[:4] == losses(right)[:4]
    assert losses(wrong)[4:] != pytest.approx(losses(right)[4:], rel=100 * LOSS)
