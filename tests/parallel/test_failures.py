"""A process of a launch that is killed, stopped or raises: the others end soon, name it, and the
next start resumes at the newest complete checkpoint, to the bits of a run that was left alone.
"""

from __future__ import annotations

import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from launched import Fault, Launched, launch

from pythia_fast import checkpoint

LIMIT = 10  # seconds of parallel.timeout: other work may share the machine
FLAGS = ["--train.steps", "8", "--train.valid_every", "4", "--checkpoint.every", "2"]
STEP = 4  # of the fault
SAVED = {"init": [], "step": [0, 1, 2], "save": [0, 1, 2], "eval": [0, 1, 2]}


def arguments(page: Path, run: Path, *flags: str) -> list[str]:
    return ["train", str(page), "--run", str(run), *FLAGS, "--parallel.timeout", str(LIMIT), *flags]


@pytest.fixture(scope="module")
def straight(page: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Results of runs that nothing struck, by number of processes."""
    results = {}
    for world in (2, 4):
        run = tmp_path_factory.mktemp(f"straight{world}")
        ended = launch(world, arguments(page, run, *layout(world))).wait(240)
        assert [e.code for e in ended] == [0] * world, ended
        results[world] = tiny_run.result(run, 8)
    return results


def layout(world: int) -> list[str]:
    return ["--parallel.tensor", "2", "--train.micro_batch_size", "2"] if world == 4 else []


def orphans(launched: Launched) -> list[int]:
    return [pid for pid in launched.pids() if Path(f"/proc/{pid}").exists()]


def strike(page: Path, run: Path, world: int, fault: Fault) -> str:
    """Runs into the fault; what the launch said."""
    with launch(world, arguments(page, run, *layout(world)), fault) as launched:
        stopped = [fault.rank] if fault.how == "stop" else []
        struck = time.monotonic()
        ended = launched.wait(120, but=stopped)
        took = time.monotonic() - struck
        assert not orphans(launched)
    others = [e.code for rank, e in enumerate(ended) if rank != fault.rank]
    assert others == [1] * (world - 1), ended
    assert took < 90, "the limit, a look at who is silent, and the time to start"
    assert ended[fault.rank].code == {"kill": -9, "raise": 1, "stop": None}[fault.how]
    said = [line for e in ended for line in e.err.splitlines() if line.startswith("pythia-fast: ")]
    assert len(said) == 1, ended
    return said[0]


def trial(
    page: Path, run: Path, world: int, fault: Fault, straight: dict[int, dict[str, Any]]
) -> None:
    said = strike(page, run, world, fault)
    if not (fault.how == "raise" and fault.rank == 0):
        assert f"rank {fault.rank}" in said
    assert ("struck by the test" in said) == (fault.how == "raise")
    saved = SAVED[fault.phase]
    assert checkpoint.steps(run) == saved
    ended = launch(world, arguments(page, run, *layout(world))).wait(240)
    assert [e.code for e in ended] == [0] * world, ended
    if saved:
        assert f"resuming from {checkpoint.directory(run, saved[-1])}" in ended[0].err
    assert not [p for p in (run / "checkpoints").iterdir() if p.name.startswith(".")]
    result = tiny_run.result(run, 8)
    assert result == straight[world]


EVERYWHERE = [
    (2, Fault(how, phase, rank, STEP))
    for how, phase, rank in product(
        ("kill", "stop", "raise"), ("init", "step", "save", "eval"), (0, 1)
    )
] + [
    (4, Fault(how, phase, 2, STEP))
    for how, phase in product(("kill", "stop", "raise"), ("init", "step", "save", "eval"))
]
SAMPLE = [(2, Fault("kill", "step", 1, STEP)), (2, Fault("raise", "save", 1, STEP))]


@pytest.mark.parametrize(
    ("world", "fault"),
    [
        pytest.param(
            world, fault,
            id=f"{fault.how}-{fault.phase}-{fault.rank}of{world}",
            marks=() if (world, fault) in SAMPLE else pytest.mark.parallel,
        )
        for world, fault in EVERYWHERE
    ],
)  # fmt: skip
def test_the_others_end_and_the_next_start_resumes(
    world: int, fault: Fault, page: Path, straight: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    trial(page, tmp_path / "run", world, fault, straight)


@pytest.mark.parallel
def test_a_process_that_hangs_is_found_by_where_it_is(page: Path, tmp_path: Path) -> None:
    """It still gives signs of life: the time-out of a collective tells, once a step is done."""
    with launch(2, arguments(page, tmp_path / "run"), Fault("hang", "eval", 1, STEP)) as launched:
        ended = launched.wait(120)
    assert ended[0].code == ended[1].code == 1
    assert "a collective of rank 0 timed out: rank 1 is at train.py:" in ended[0].err
