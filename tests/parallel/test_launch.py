"""torchrun itself: signals, restarts, several nodes, Slurm, what it prints, what it leaves behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_run
from kernel_proof import REPOSITORY
from ranks import free_port

from pythia_fast import checkpoint
from pythia_fast.parallel import launch

FLAGS = """
--model.heads 4 --train.micro_batch_size 2 --train.valid_every 4 --checkpoint.every 2
--parallel.timeout 20
""".split()
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
FAULTY = str(REPOSITORY / "tests" / "support" / "faulty.py")


class Started:
    """A launcher in a session of its own, output in a file; its descendants can be counted."""

    def __init__(self, output: Path, command: list[str], **environment: str) -> None:
        self.output = output
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **environment}
        with output.open("w") as f:
            self.process = subprocess.Popen(
                command, cwd=REPOSITORY, env=env, stdout=f, stderr=f, start_new_session=True
            )
        self.seen: set[int] = set()

    def descendants(self) -> set[int]:
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                pid, rest = stat.read_text().split(" (", 1)
            except OSError:
                continue
            parents[int(pid)] = int(rest.rpartition(") ")[2].split()[1])
        found = {self.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        self.seen |= found
        return found - {self.process.pid}

    def until(self, words: str, timeout: float = 120) -> None:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            self.descendants()
            if words in self.text():
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(self.text())

    def end(self, timeout: float = 180) -> int:
        until = time.monotonic() + timeout
        while self.process.poll() is None and time.monotonic() < until:
            self.descendants()
            time.sleep(0.1)
        assert self.process.returncode is not None, self.text()
        return self.process.returncode

    def left(self, within: float = 60) -> list[int]:
        """Processes that it started and that are still there after `within` seconds."""
        until = time.monotonic() + within
        while (there := [p for p in self.seen if running(p)]) and time.monotonic() < until:
            time.sleep(0.1)
        return there

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def close(self) -> None:
        for pid in self.descendants() | {p for p in self.seen if running(p)}:
            os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


Start = Callable[..., Started]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Started] = []

    def begin(*command: str, **environment: str) -> Started:
        one = Started(tmp_path / f"output{len(started)}", list(command), **environment)
        started.append(one)
        return one

    yield begin
    for one in started:
        one.close()


def said(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("pythia-fast: ")]


@pytest.mark.parallel
def test_sigterm_on_four_processes_and_the_resume_on_two(
    page: Path, tmp_path: Path, start: Start
) -> None:
    run = tmp_path / "run"
    four = start(
        *TORCHRUN, "--nproc-per-node", "4", "--master-port", str(free_port()), "-m", "pythia_fast",
        "--", "train", str(page), "--run", str(run), *FLAGS, "--train.steps", "2000",
        "--parallel.tensor", "2", "--parallel.pipeline", "2", "--optimizer.warmup", "0",
        "--checkpoint.steps", "[]",
    )  # fmt: skip
    four.until("step 0/2000 running")
    while checkpoint.newest(run) is None:
        four.descendants()
        time.sleep(0.05)
    four.process.send_signal(signal.SIGTERM)
    four.end()
    assert not four.left(), four.text()
    lines = said(four.text())
    assert len(lines) == 1, four.text()
    match = re.fullmatch(
        r"pythia-fast: SIGTERM: saved at step (\d+); the same command continues", lines[0]
    )
    assert match is not None
    step = int(match[1])
    assert checkpoint.newest(run) == step
    two = start(
        *TORCHRUN, "--nproc-per-node", "2", "--master-port", str(free_port()), "-m", "pythia_fast",
        "--", "train", str(page), "--run", str(run), *FLAGS, "--train.steps", "2000",
        "--optimizer.warmup", "0", "--checkpoint.steps", "[]",
    )  # fmt: skip
    two.until(f"resuming from {checkpoint.directory(run, step)}")
    while (checkpoint.newest(run) or 0) <= step:
        two.descendants()
        assert two.process.poll() is None, two.text()
        time.sleep(0.05)
    two.process.send_signal(signal.SIGINT)
    two.end()
    assert not two.left() and "SIGINT: saved at step" in two.text()
    rows = tiny_run.rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)) and len(rows) > step
    batches = tiny_run.rows(run / "ledger.jsonl")
    assert [batch["step"] for batch in batches] == list(range(len(rows)))


def test_bad_input_under_torchrun(page: Path, tmp_path: Path, start: Start) -> None:
    """Exit code 2 of every process stands in torchrun's table with the line; its own code is 1."""
    one = start(
        *TORCHRUN, "--nproc-per-node", "2", "--master-port", str(free_port()), "-m", "pythia_fast",
        "train", str(page), "--parallel.tensor", "3",
    )  # fmt: skip
    assert one.end() == 1
    line = "parallel.tensor = 3 times parallel.pipeline = 1 does not divide the 2 processes"
    assert [s for s in said(one.text()) if line in s] == said(one.text())
    assert len(said(one.text())) == 1
    assert len(re.findall(r"exitcode +: 2 ", one.text())) == 2
    assert len(re.findall(rf"traceback : {line}", one.text())) == 2


RESTARTS = [("kill", "step", 1), ("kill", "save", 0), ("stop", "step", 0), ("raise", "eval", 1)]


@pytest.mark.parallel
@pytest.mark.parametrize(("how", "phase", "rank"), RESTARTS)
def test_torchrun_restarts_what_failed(
    how: str, phase: str, rank: int, page: Path, tmp_path: Path, start: Start
) -> None:
    run = tmp_path / "run"
    one = start(
        *TORCHRUN, "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", FAULTY, "--",
        how, phase, str(rank), "4", "train", str(page), "--run", str(run), *FLAGS,
        "--train.steps", "8", "--checkpoint.steps", "[]",
        TORCH_ELASTIC_SHUTDOWN_TIMEOUT="5",
    )  # fmt: skip
    assert one.end() == 0, one.text()
    assert not one.left()
    assert f"resuming from {checkpoint.directory(run, 2)}" in one.text()
    assert tiny_run.rows(run / "metrics.jsonl")[-1]["step"] == 8
    assert len(said(one.text())) == 1 and f"rank {rank}" in said(one.text())[0]


@pytest.mark.parallel
def test_two_nodes_by_rendezvous_and_a_restart_on_both(
    page: Path, tmp_path: Path, start: Start
) -> None:
    run, port = tmp_path / "run", free_port()
    nodes = [
        start(
            *TORCHRUN, "--nnodes", "2", "--nproc-per-node", "2", "--max-restarts", "1",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "two",
            FAULTY, "--", "kill", "step", "3", "4", "train", str(page), "--run", str(run), *FLAGS,
            "--train.steps", "8", "--checkpoint.steps", "[]", "--parallel.tensor", "2",
            TORCH_ELASTIC_SHUTDOWN_TIMEOUT="5",
        )
        for _ in range(2)
    ]  # fmt: skip
    assert [node.end() for node in nodes] == [0, 0], nodes[0].text() + nodes[1].text()
    text = nodes[0].text() + nodes[1].text()
    assert f"resuming from {checkpoint.directory(run, 2)}" in text
    assert tiny_run.rows(run / "metrics.jsonl")[-1]["step"] == 8
    assert not nodes[0].left() and not nodes[1].left()


@pytest.mark.parallel
def test_processes_whose_torchrun_is_killed_save_and_end(
    page: Path, tmp_path: Path, start: Start
) -> None:
    run = tmp_path / "run"
    one = start(
        *TORCHRUN, "--nproc-per-node", "2", "--master-port", str(free_port()), "-m", "pythia_fast",
        "--", "train", str(page), "--run", str(run), *FLAGS, "--train.steps", "2000",
    )  # fmt: skip
    one.until("step 0/2000 running")
    while (checkpoint.newest(run) or 0) < 4:
        one.descendants()
        time.sleep(0.05)
    one.process.kill()
    assert not one.left(), one.text()
    assert "SIGTERM: saved at step" in one.text()


FAKE = {
    "scontrol": 'echo localhost; echo "the others"',
    "srun": """
for node in 0 1; do
  SLURM_NODEID=$node SLURM_PROCID=$node "${@:2}" & all="$all $!"
done
for one in $all; do wait $one || exit $?; done
""",
}


@pytest.mark.parallel
def test_the_slurm_template(page: Path, tmp_path: Path, start: Start) -> None:
    """With an srun that starts both nodes here; a template may not need more than it sets."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, body in FAKE.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}")
        (tools / name).chmod(0o755)
    job = free_port() % 10000 + 50000  # whose port, 20000 + its last digits, is likely free
    one = start(
        "bash", str(REPOSITORY / "configs" / "slurm.sbatch"), str(page), "--run",
        str(tmp_path / "run"), *FLAGS, "--train.steps", "4",
        PATH=f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        SLURM_JOB_ID=str(job), SLURM_JOB_NUM_NODES="2", SLURM_GPUS_ON_NODE="2",
        SLURM_JOB_NODELIST="node[1-2]",
    )  # fmt: skip
    assert one.end() == 0, one.text()
    assert "trained to step 4" in one.text() and one.text().count("trained to step 4") == 1
    manifest = checkpoint.read_manifest(checkpoint.directory(tmp_path / "run", 4))
    assert manifest["world"]["processes"] == 4


def test_a_position_is_the_innermost_line_of_the_package() -> None:
    import threading

    place = launch._position(threading.get_ident())
    assert re.fullmatch(r"parallel/launch\.py:\d+ \(_position\)", place), place
    assert launch._position(-1) == "?"
