"""Runs on lean states: they learn, resume to the bit, and leave fp32 checkpoints to other tools."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import tiny_run
import torch
from kernel_proof import Mutant, assert_killed, assert_sound
from tiny_run import train_stopping_at

import pythia_fast.assemble
import pythia_fast.lean as real
import pythia_fast.train as trainer
from pythia_fast import checkpoint
from pythia_fast.config import Config, load, resolve
from pythia_fast.errors import InputError
from pythia_fast.explain import differences
from pythia_fast.kernels.rounding import joined_master

LEAN = ["--optimizer.states", "lean", "--precision.compute", "bf16"]
STEPS = ["--train.steps", "16", "--data.valid_prefix", "", "--checkpoint.every", "0"]


def page(directory: Path, *flags: str) -> Config:
    return load(tiny_run.make_page(directory), [*LEAN, *STEPS, *flags])


def check(module: ModuleType) -> None:
    """Stopped within and resumed equals uninterrupted; the files hold the masters to the bit."""
    directory = check.directory / module.__name__  # type: ignore[attr-defined]
    directory.mkdir()
    config = page(directory, "--precision.gradients", "bf16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pythia_fast.assemble, "LeanAdamW", module.LeanAdamW)
        trainer.train(config, directory / "straight")
        train_stopping_at(trainer, config, directory / "run", 7)
        trainer.train(config, directory / "run")
        ours, expected = (tiny_run.result(directory / r, 16) for r in ("run", "straight"))
        assert ours["tensors"] == expected["tensors"] and ours["metrics"] == expected["metrics"]
        losses = [row["loss"] for row in expected["metrics"]]
        assert losses[-1] < losses[0] - 0.5
        resumed = trainer.Trainer(config, directory / "run")
        resumed._load_newest()
        optimizer = resumed.optimizer
        saved = checkpoint.load_all(checkpoint.directory(directory / "run", 16))
        whole = joined_master(optimizer.weight, optimizer.remainder)
        for name, view in optimizer.views(whole).items():
            assert torch.equal(view, saved[name]) and saved[name].dtype == torch.float32
        assert whole.bfloat16().float().ne(whole).float().mean() > 0.5  # not the weights alone
        assert optimizer.remainder.count_nonzero() > 0
        decayed = saved["gpt_neox.final_layer_norm.weight"]
        assert (decayed - 1).abs().max() < 0.5


LEAN_PY = "pythia_fast/lean.py"
MUTANTS = [
    Mutant("weights alone saved", LEAN_PY, "joined_master(weight.contiguous(), remainders[name].contiguous())", "weight.float()"),
    Mutant("remainder not loaded", LEAN_PY, "            remainders[name].copy_(low)\n", ""),
    Mutant("moments not loaded", LEAN_PY, 'view.copy_(state[f"{kind}.{name}"])', "pass"),
    Mutant("another key after a resume", LEAN_PY, "            weight.copy_(high)\n", "            weight.copy_(high); self._key.fill_(3)\n"),
]  # fmt: skip


@pytest.fixture
def _directory(tmp_path: Path) -> None:
    check.directory = tmp_path  # type: ignore[attr-defined]


@pytest.mark.usefixtures("_directory")
def test_a_lean_run_resumes_to_the_bit() -> None:
    assert_sound(MUTANTS, check)


@pytest.mark.usefixtures("_directory")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutants_are_killed(mutant: Mutant, tmp_path: Path) -> None:
    assert_killed(mutant, check, tmp_path)


def test_losses_stay_near_those_of_fp32_states(tmp_path: Path) -> None:
    """Both compute in bf16 from the same weights: 2 % of the loss after 16 steps."""
    lean, wide = page(tmp_path), page(tmp_path, "--optimizer.states", "fp32")
    rows = [trainer.train(c, tmp_path / c.optimizer.states)["loss"] for c in (lean, wide)]
    assert rows[0] == pytest.approx(rows[1], rel=0.02)


def test_eight_bytes_a_parameter(tmp_path: Path) -> None:
    optimizer = trainer.Trainer(page(tmp_path), tmp_path / "run").optimizer
    assert isinstance(optimizer, real.LeanAdamW) and not hasattr(optimizer, "master")
    flat = (optimizer.weight, optimizer.remainder, optimizer.exp_avg, optimizer.exp_avg_sq)
    assert sum(t.nbytes for t in flat) == 8 * optimizer.layout.size


def test_it_is_another_recipe() -> None:
    config = resolve({"model.preset": "pythia-12b", "recipe": "modern", "optimizer.states": "lean"})
    assert 'optimizer.states = "lean" (published: "fp32")' in differences(config)
    assert config.decisive["optimizer.states"] == "lean"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"precision.compute": "fp32"}, "keeps bf16 weights, not precision.compute = 'fp32'"),
        ({"optimizer.backend": "torch"}, "does not go with optimizer.backend = 'torch'"),
    ],
)
def test_what_it_does_not_go_with_is_refused(flags: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve({"optimizer.states": "lean", **flags})
