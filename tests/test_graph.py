"""The step as a CUDA graph on a recorder in place of a GPU: the same bits, and what a step does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny_run
import torch
from fake_cuda import Cuda
from fused_run import STEPS, batch, fresh, on_a_graph, page
from kernel_proof import Mutant, assert_killed
from tiny_run import train_stopping_at
from torch import Tensor

import pythia_fast.assemble
import pythia_fast.graph as real
import pythia_fast.optim
import pythia_fast.train
from pythia_fast.assemble import obstacle

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a GPU captures for real: test_step_on_gpu.py"
)


def through(trainer: Any) -> dict[str, Any]:
    """Every loss, norm and rate, and the state after the last step."""
    seen = []
    for step in range(STEPS):
        loss, norm = trainer.train_step(batch(trainer, step))
        seen.append((loss.item(), norm.item(), trainer.lr))
    state = {name: view.clone() for name, view in trainer.optimizer.state().items()}
    return {"seen": seen, "updates": trainer.optimizer.updates, "step": trainer.step} | state


def assert_same(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        equal = torch.equal(ours[name], value) if isinstance(value, Tensor) else ours[name] == value
        assert equal, f"{name}: {ours[name]}, without the graph {value}"


def check_graph(module: ModuleType) -> None:
    """module: graph, optim or train, which may be a mutant."""
    directory, expected = check_graph.given  # type: ignore[attr-defined]
    config = page(directory)
    patch = pytest.MonkeyPatch()
    try:
        patch.setattr(real, "cuda", None)
        train = module if hasattr(module, "Trainer") else pythia_fast.train
        patch.setattr(
            pythia_fast.assemble, "AdamW", getattr(module, "AdamW", pythia_fast.optim.AdamW)
        )
        trainer = fresh(config, directory / "run", train)
        cuda = on_a_graph(trainer, module if hasattr(module, "StepGraph") else real)
        assert_same(through(trainer), expected)
        graph = trainer.compute._graph
        assert graph.replays == STEPS - real.WARMUP
        assert cuda.log == [*_WARM * real.WARMUP, "capture"]
    finally:
        patch.undo()


_WARM = ["side waits for main", "on side", "done", "main waits for side"]


@pytest.fixture(autouse=True)
def _no_check_of_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter alone the launcher reads the targets."""
    monkeypatch.setattr("pythia_fast.kernels.cross_entropy.check_targets", lambda *_: None)


@pytest.fixture(scope="module")
def _given(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The directory of all trainers and what they do launch by launch."""
    directory = tmp_path_factory.mktemp("graph")
    expected = through(fresh(page(directory), directory / "run"))
    check_graph.given = directory, expected  # type: ignore[attr-defined]


GRAPH, TRAIN = "pythia_fast/graph.py", "pythia_fast/train.py"
MUTANTS = [
    Mutant("tokens of the capture for ever", GRAPH, "        self._tokens.copy_(tokens", "        if self._graph is None: self._tokens.copy_(tokens"),
    Mutant("a warm-up step taken twice", GRAPH, "return self._aside(self._tokens)", "self._aside(self._tokens); return self._aside(self._tokens)"),
    Mutant("the capture counts as a step", GRAPH, "        self._graph.replay()", "        if self._calls > WARMUP + 1: self._graph.replay()"),
    Mutant("captured anew each step", GRAPH, "if self._graph is None:", "if True:"),
    Mutant("the side stream is not waited for", GRAPH, "        current.wait_stream(stream)\n", ""),
    Mutant("rate and t baked in", TRAIN, "norm = optimizer.apply()", "optimizer.begin(self.lr); optimizer.updates -= 1; norm = optimizer.apply()"),
    Mutant("rate written once", TRAIN, "optimizer.begin(self.lr)", "optimizer.begin(self.lr if self.step < 3 else 0.0)"),
    Mutant("t stands still", "pythia_fast/optim.py", "t = float(self.updates +", "t = float(min(self.updates, 3) +"),
    Mutant("a value read back", TRAIN, "/ factor, norm\n", "/ factor, norm + 0 * norm.item()\n"),
]  # fmt: skip


@pytest.mark.usefixtures("_given")
def test_a_graph_gives_the_same_bits() -> None:
    check_graph(real)


@pytest.mark.usefixtures("_given")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutants_are_killed(mutant: Mutant, tmp_path: Path) -> None:
    assert_killed(mutant, check_graph, tmp_path)


def test_a_run_with_validation_and_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eager work between replays, a checkpoint, and a capture anew after it: the same files."""
    flags = ["--train.valid_every", "2", "--train.valid_rows", "2", "--train.steps", "6"]
    config = page(tmp_path, *flags)
    plain = replace(config, kernels=replace(config.kernels, graph=False))
    pythia_fast.train.train(plain, tmp_path / "plain")
    made: list[real.StepGraph] = []

    def graphed(compute: Any, device: torch.device, obstacle: str | None) -> Any:
        assert obstacle is None
        made.append(real.StepGraph(compute, device))
        return made[-1]

    monkeypatch.setattr(pythia_fast.train, "graphed", graphed)
    monkeypatch.setattr(real, "cuda", Cuda())
    train_stopping_at(pythia_fast.train, config, tmp_path / "run", 3)
    pythia_fast.train.train(config, tmp_path / "run")
    assert [g._graph.replays for g in made if g._graph] == [1, 1]
    ours, expected = (tiny_run.result(tmp_path / r, 6) for r in ("run", "plain"))
    for what in ("tensors", "metrics", "ledger"):
        assert ours[what] == expected[what], what


def test_tokens_of_another_shape_are_refused(tmp_path: Path) -> None:
    trainer = fresh(page(tmp_path), tmp_path / "run")
    on_a_graph(trainer)
    trainer.train_step(batch(trainer, 0))
    with pytest.raises(ValueError, match=r"tokens \(1, 17\), first \(2, 17\)"):
        trainer.compute(batch(trainer, 0)[:1])


FP16 = ["--precision.compute", "fp16", "--precision.loss_scaling", "dynamic"]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (FP16, "loss scaling decides on the host"),
        (["--kernels.deterministic", "false"], "blocks are not fused"),
        (["--optimizer.backend", "torch"], "torch's AdamW updates"),
    ],
)
def test_what_cannot_be_recorded_is_said(
    flags: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = pythia_fast.train.Trainer(page(tmp_path, *flags), tmp_path / "run")
    gpu = torch.device("cuda")
    why_not = obstacle(trainer.model, trainer.optimizer, trainer.pipeline)
    assert real.graphed(trainer._on_device, gpu, why_not) == trainer._on_device
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "kernels.graph" in said and reason in said


def test_off_a_gpu_nothing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = pythia_fast.train.Trainer(page(tmp_path, *FP16), tmp_path / "run")
    assert trainer.compute == trainer._on_device and "graph" not in capsys.readouterr().err
    ours = pythia_fast.train.Trainer(page(tmp_path), tmp_path / "run")
    assert isinstance(real.graphed(ours._on_device, torch.device("cuda"), None), real.StepGraph)
