"""Bad input on several processes: one line by rank 0, exit code 2 on all, soon, nothing written."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from launched import Launched, launch

from pythia_fast import checkpoint

SOON = 60  # seconds; a machine with nothing else to do needs two


@pytest.fixture(scope="module")
def trained(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps on 2 processes."""
    run = tmp_path_factory.mktemp("trained")
    ended = launch(2, arguments(page, run)).wait(120)
    assert [e.code for e in ended] == [0, 0], ended
    return run


def arguments(page: Path, run: Path, *flags: str) -> list[str]:
    return ["train", str(page), "--run", str(run), "--train.steps", "4", *flags]


def refused(
    world: int, given: Sequence[str] | Callable[[int], Sequence[str]], code: int = 2
) -> str:
    """The one line of the launch, without its prefix."""
    launched: Launched = launch(world, given)
    ended = launched.wait(SOON)
    assert [e.code for e in ended] == [code] * world, ended
    assert not any(e.err or e.out for e in ended[1:]), ended
    lines = [line for line in ended[0].err.splitlines() if "resuming from" not in line]
    assert len(lines) == 1 and lines[0].startswith("pythia-fast: "), ended[0]
    return lines[0].removeprefix("pythia-fast: ")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--parallel.tensor", "3"], "parallel.tensor = 3 .* the 2 processes"),
        (["--parallel.data", "4"], "parallel.data = 4 .* the 2 processes"),
        (["--parallel.tensor", "2", "--model.vocab_size", "65"], "model.vocab_size = 65 .* = 2"),
        (["--train.micro_batch_size", "8"], "train.batch_size = 8 .* parallel.data = 2 .* = 8"),
        (["--parallel.sequence", "true"], "parallel.sequence = true .* parallel.tensor > 1"),
        (["--parallel.tensr", "2"], "did you mean parallel.tensor"),
        (["--data.prefix", "nowhere/x"], "nowhere/x"),
    ],
)  # fmt: skip
def test_a_page_that_does_not_fit(flags: list[str], words: str, page: Path, tmp_path: Path) -> None:
    said = refused(2, arguments(page, tmp_path / "run", *flags))
    assert re.search(words, said), said
    assert not said.startswith("rank"), "all of them say it"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--train.seed", "7"], "rank 1 has train.seed = 7, rank 0 1234: all processes need the"),
        (["--train.seed", "x"], "command line: train.seed = 'x': expected a whole number"),
    ],
)
def test_a_page_of_one_process(flags: list[str], said: str, page: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert said in refused(2, lambda rank: arguments(page, run, *(flags if rank else [])))
    assert not run.exists()


ALONE = """
import os, sys
from pythia_fast import cli, train
from pythia_fast.errors import InputError
step = train.Trainer.train_step
def alone(self, tokens):
    if self.step == 2 and os.environ["RANK"] == "0":
        raise InputError("rank 0 alone")
    return step(self, tokens)
train.Trainer.train_step = alone
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("alone", [False, True], ids=["all at once", "one, others in a collective"])
def test_processes_started_by_hand_end_alike(alone: bool, page: Path, tmp_path: Path) -> None:
    """Without torchrun rank 0 holds the store: it stays until the other has read why."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank in (0, 1):
        flags = ["--train.seed", "7"] if rank and not alone else []
        command = [sys.executable, *(["-c", ALONE] if alone else ["-m", "pythia_fast"])]
        command += arguments(page, tmp_path / "run", *flags)
        environment = os.environ | launch | {"RANK": str(rank)}
        started.append(
            subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        )
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2], errors
    said = "rank 0 alone" if alone else "rank 1 has train.seed = 7, rank 0 1234"
    assert errors[0].splitlines()[-1].startswith(f"pythia-fast: {said}")
    assert errors[1] == ""


def data_of_each(page: Path, directory: Path, change: Callable[[Path], None]) -> Path:
    """A page whose relative prefix leads rank 1, in a directory of its own, to changed files."""
    for rank in (0, 1):
        home = directory / str(rank)
        home.mkdir()
        for file in page.parent.glob("*.[bi]*"):
            shutil.copy2(file, home)
    change(directory / "1" / "train.bin")
    own = directory / "own.toml"
    own.write_text(page.read_text().replace(f"{page.parent}/", ""))
    return own


def another_token(file: Path) -> None:
    """Of the same size and time: only reading tells."""
    tokens, time_ns = np.fromfile(file, np.uint16), file.stat().st_mtime_ns
    np.flipud(tokens).tofile(file)
    os.utime(file, ns=(time_ns, time_ns))


def longer(file: Path) -> None:
    with file.open("ab") as f:
        f.write(b"\0\0")


@pytest.mark.parametrize("change", [another_token, longer])
def test_other_data_on_one_process(
    change: Callable[[Path], None], page: Path, tmp_path: Path
) -> None:
    own, run = data_of_each(page, tmp_path, change), tmp_path / "run"
    ended = launch(2, arguments(own, run), homes=tmp_path).wait(SOON)
    assert [e.code for e in ended] == [2, 2], ended
    words = "rank 1 reads other data at train than rank 0" if change is another_token else "train"
    assert words in ended[0].err and len(ended[0].err.splitlines()) == 1
    assert not ended[1].err and not run.exists()


@pytest.mark.parametrize("check", ["train:check_same_data", "parallel.launch:check_same_page"])
def test_mutants_that_do_not_compare(check: str, page: Path, tmp_path: Path) -> None:
    """Without the comparison each of these runs trains on, and nothing tells."""
    own, run = data_of_each(page, tmp_path, another_token), tmp_path / "run"
    if check.startswith("train"):
        ended = launch(2, arguments(own, run), homes=tmp_path, without=check).wait(SOON)
    else:
        seeds = ["--train.seed", "7"]
        one = lambda rank: arguments(page, run, *(seeds if rank else []))  # noqa: E731
        ended = launch(2, one, without=f"{check},train:check_same_data").wait(SOON)
    assert [e.code for e in ended] == [0, 0], ended


def test_a_run_that_another_trainer_holds(page: Path, tmp_path: Path) -> None:
    with checkpoint.RunLock(tmp_path / "run"):
        said = refused(2, arguments(page, tmp_path / "run"))
    assert said == f"another process (pid {os.getpid()}) is training in {tmp_path / 'run'}"


def test_a_checkpoint_of_another_model(page: Path, trained: Path) -> None:
    before = tiny_run.result(trained, 4)
    said = refused(2, arguments(page, trained, "--model.layers", "3"))
    assert "was trained with model.layers = 2, not 3" in said
    assert tiny_run.result(trained, 4) == before


@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_or_damaged_shard(rank: int, page: Path, trained: Path, tmp_path: Path) -> None:
    """Files are verified by one process each; whoever finds it, all say the same."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    shard = checkpoint.directory(run, 4) / f"__{rank}_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    said = refused(2, arguments(page, run), code=1)
    assert said.startswith(f"{shard} is damaged") and f"remove {shard.parent}" in said
    shard.unlink()
    said = refused(2, arguments(page, run))
    assert said.startswith(f"{shard} is missing") and f"remove {shard.parent}" in said


def test_a_run_directory_that_one_process_does_not_see(page: Path, tmp_path: Path) -> None:
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
    ended = launch(2, arguments(page, Path("run")), homes=tmp_path).wait(SOON)
    assert [e.code for e in ended] == [2, 2] and ended[1].err == "", ended
    said = "pythia-fast: rank 1 does not see the run directory of rank 0: run must be on a file"
    assert ended[0].err.startswith(said) and len(ended[0].err.splitlines()) == 1
    assert not (tmp_path / "0" / "run").exists()
