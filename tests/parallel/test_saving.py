"""Saving by several processes, beside training and not: the same bytes, and one disk that is full."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_run
from launched import Fault, launch

from pythia_fast import checkpoint

FLAGS = "--train.steps 8 --checkpoint.every 2 --train.valid_every 4 --parallel.timeout 20".split()
TENSOR2 = ["--parallel.tensor", "2", "--train.micro_batch_size", "2"]


def arguments(page: Path, run: Path, *flags: str) -> list[str]:
    return ["train", str(page), "--run", str(run), *FLAGS, *flags]


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (2, []),
        pytest.param(4, TENSOR2, marks=pytest.mark.parallel),
        pytest.param(2, ["--parallel.shard", "full"], marks=pytest.mark.parallel),
        pytest.param(2, ["--parallel.pipeline", "2"], marks=pytest.mark.parallel),
    ],
)
def test_every_checkpoint_is_the_same_either_way(
    world: int, flags: list[str], page: Path, tmp_path: Path
) -> None:
    for name in ("true", "false"):
        more = [*flags, "--checkpoint.async", name]
        ended = launch(world, arguments(page, tmp_path / name, *more)).wait(120)
        assert [e.code for e in ended] == [0] * world, ended
    steps = checkpoint.steps(tmp_path / "true")
    assert steps == checkpoint.steps(tmp_path / "false") == [0, 1, 2, 4, 6, 8]
    for step in steps:
        one, two = (tiny_run.result(tmp_path / name, step) for name in ("true", "false"))
        assert one == two


@pytest.mark.parametrize("beside", ["false", "true"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_one_process_ends_all(
    rank: int, beside: str, page: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    fault = Fault("full", "save", rank, step=4)
    flags = ["--checkpoint.async", beside]
    ended = launch(2, arguments(page, run, *flags), fault).wait(120)
    assert [e.code for e in ended] == [2, 2], ended
    said = [line for line in ended[0].err.splitlines() if line.startswith("pythia-fast: ")]
    assert len(said) == 1 and "disk full while saving step 4 to" in said[0], ended
    assert said[0].endswith("the newest complete checkpoint is step 2")
    assert ended[1].err == ""
    assert checkpoint.steps(run) == [0, 1, 2]
    assert not [p for p in (run / "checkpoints").iterdir() if p.name.startswith(".")]
