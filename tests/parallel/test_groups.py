"""Time-outs of collectives: patient until a first step is done, then not; the flight recorder."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import tiny_run
from launched import Fault, launch
from rank_checks import waits
from ranks import Ranks

from pythia_fast.parallel import groups


def test_patient_at_the_start_and_short_after_a_step(tmp_path: Path) -> None:
    page = str(tiny_run.make_page(tmp_path))
    with Ranks() as ranks:
        took, failed, recorded = ranks.call(2, waits, page, None, 4.0)[0]
        assert not failed and took > 3 and recorded == "2000"
        took, failed, _ = ranks.call(2, waits, page, 1.0, 4.0)[0]
        assert failed and 0.9 < took < 3.5
    assert groups.START.total_seconds() == 1800


@pytest.mark.parametrize("world", [2])
def test_sigterm_before_there_is_anything_to_save(world: int, tmp_path: Path) -> None:
    """Not a failure of anybody: 143, and nothing is written."""
    page, run = tiny_run.make_page(tmp_path), tmp_path / "run"
    with launch(
        world, ["train", str(page), "--run", str(run)], Fault("hang", "init", 1)
    ) as started:
        while not run.exists():  # rank 0 holds the lock, rank 1 hangs
            time.sleep(0.05)
        time.sleep(1)
        for process in started.processes:
            assert process.pid is not None
            process.terminate()
        ended = started.wait(60)
    assert [e.code for e in ended] == [128 + signal.SIGTERM] * world, ended
    assert not run.exists()
