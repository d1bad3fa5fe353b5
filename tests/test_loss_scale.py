"""Dynamic loss scaling against the rule of DeeperSpeed, simulated apart, over thousands of steps."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tiny_run
import torch
from kernel_proof import Mutant, assert_killed, assert_sound
from neox_numpy import neox_v1_rate
from recipe_proof import FP16, accumulate, optimizer_for
from tiny_run import train_stopping_at

import pythia_fast.loss_scale as real
import pythia_fast.optim
import pythia_fast.train as train
from pythia_fast import checkpoint
from pythia_fast.config import load
from pythia_fast.data.commands import digest
from pythia_fast.errors import CheckError, InputError


@dataclass
class Simulated:
    """The table of the original: cur_iter = 0, last = −1, hyst = 2, S = 4096."""

    hysteresis: bool
    S: float = 4096.0
    cur_iter: int = 0
    last: int = -1
    hyst: int = 2
    scales: list[float] = field(default_factory=list)

    def step(self, overflow: bool) -> float:
        if overflow:
            if self.hysteresis:
                if self.hyst == 1:
                    self.S = max(self.S / 2, 1.0)
                else:
                    self.hyst -= 1
            else:
                self.S = max(self.S / 2, 1.0)
            self.last = self.cur_iter
        elif self.hysteresis:
            if (self.cur_iter - self.last) % 1000 == 0:
                self.hyst, self.S = 2, self.S * 2
        else:
            stable = self.cur_iter - self.last - 1
            if stable > 0 and stable % 1000 == 0:
                self.S *= 2
        self.cur_iter += 1
        return self.S


def patterns(steps: int) -> dict[str, np.ndarray]:
    """Overflows by step: none, at one step, bursts, random ones, and right at a growth."""
    random = np.random.default_rng(11)
    single = np.zeros(steps, bool)
    single[1234] = True
    bursts = np.zeros(steps, bool)
    for start in (5, 990, 2050, 3100):
        bursts[start : start + 3] = True
    rare = random.random(steps) < 1 / 700
    edges = np.zeros(steps, bool)
    edges[[998, 999, 1000, 1001, 2000, 2001, 2999, 3000]] = True
    return {"none": np.zeros(steps, bool), "single": single, "bursts": bursts, "rare": rare,
            "edges": edges}  # fmt: skip


def check_against_the_table(module: ModuleType) -> None:
    for hysteresis in (True, False):
        for name, overflows in patterns(4000).items():
            ours, theirs = module.LossScale(hysteresis=hysteresis), Simulated(hysteresis)
            for step, overflow in enumerate(overflows.tolist()):
                ours.update(overflow)
                assert ours.scale == theirs.step(overflow), (hysteresis, name, step)


def test_both_variants_follow_the_table_for_4000_steps() -> None:
    check_against_the_table(real)


FILE = "pythia_fast/loss_scale.py"
MUTANTS = [
    Mutant("hysteresis refilled by clean steps", FILE, "        self.iteration += 1\n", "        self.iteration += 1\n        self.chances = self.chances if overflow else HYSTERESIS\n"),
    Mutant("hysteresis refilled by a halving", FILE, "self.scale = max(self.scale / FACTOR, MINIMUM)\n", "self.scale = max(self.scale / FACTOR, MINIMUM); self.chances = HYSTERESIS\n"),
    Mutant("hysteresis never refilled", FILE, "            self.chances = HYSTERESIS\n", "            pass\n"),
    Mutant("hysteresis in both", FILE, "not self.hysteresis or self.chances == 1", "self.chances == 1"),
    Mutant("no hysteresis at all", FILE, "not self.hysteresis or self.chances == 1", "True"),
    Mutant("first growth one step late", FILE, "clean % WINDOW == 0 if", "(clean - 1) % WINDOW == 0 and clean > 1 if"),
    Mutant("first growth of the other one step early", FILE, "clean > 1 and (clean - 1) % WINDOW == 0", "clean % WINDOW == 0"),
    Mutant("skipped steps do not count", FILE, "        self.iteration += 1\n", "        self.iteration += not overflow\n"),
    Mutant("overflow does not restart the window", FILE, "        self.last_overflow = self.iteration\n", "        pass\n"),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutants_of_the_loss_scale_are_killed(mutant: Mutant, tmp_path: Path) -> None:
    assert_sound([mutant], check_against_the_table)
    assert_killed(mutant, check_against_the_table, tmp_path)


def test_a_constant_ceiling_gives_the_skips_of_a_whole_run() -> None:
    """Overflow wherever the scale passes a ceiling: about 280 of 143,000 steps are skipped."""
    scale, skipped, growths = real.LossScale(hysteresis=True), 0, 0
    for _ in range(143_000):
        before = scale.scale
        scale.update(before > 2.0**16)
        skipped += before > 2.0**16
        growths += scale.scale > before
    assert 270 <= skipped <= 290
    assert 140 <= growths <= 145


def check_limits(module: ModuleType) -> None:
    """The minimum ends a run with hysteresis and holds without; 50 skips in a row end both."""
    scale = module.LossScale(hysteresis=True, scale=2.0, chances=1)
    scale.update(True)
    assert scale.scale == 1.0
    with pytest.raises(CheckError, match="loss scale at its minimum 1"):
        scale.update(True)
    held = module.LossScale(hysteresis=False, scale=1.0)
    held.update(True)
    assert held.scale == 1.0
    for hysteresis in (True, False):
        scale = module.LossScale(hysteresis=hysteresis, scale=2.0**120)
        for _ in range(49):
            scale.update(True)
        scale.update(False)
        for _ in range(49):
            scale.update(True)
        with pytest.raises(CheckError, match="50 steps in a row"):
            scale.update(True)


LIMIT_MUTANTS = [
    Mutant("60 skips allowed", FILE, "MAX_SKIPPED = 50", "MAX_SKIPPED = 60"),
    Mutant("49 skips end a run", FILE, "MAX_SKIPPED = 50", "MAX_SKIPPED = 49"),
    Mutant("skips counted in all", FILE, "self.skipped_in_a_row + 1 if overflow else 0", "self.skipped_in_a_row + overflow"),
    Mutant("a minimum of 2", FILE, "2.0**12, 1.0, 2.0", "2.0**12, 2.0, 2.0"),
    Mutant("a minimum of 1/2", FILE, "2.0**12, 1.0, 2.0", "2.0**12, 0.5, 2.0"),
    Mutant("the minimum holds in both", FILE, "if self.hysteresis and self.scale == MINIMUM", "if False"),
    Mutant("the minimum ends both", FILE, "if self.hysteresis and self.scale == MINIMUM", "if self.scale == MINIMUM"),
]  # fmt: skip


def test_the_limits_of_both_variants() -> None:
    check_limits(real)


@pytest.mark.parametrize("mutant", LIMIT_MUTANTS, ids=lambda m: m.name)
def test_mutants_of_the_limits_are_killed(mutant: Mutant, tmp_path: Path) -> None:
    assert_sound([mutant], check_limits)
    assert_killed(mutant, check_limits, tmp_path)


@pytest.mark.parametrize(
    "state", [None, 7, {}, {"scale": 1.0}, {**real.LossScale(True).state(), "iteration": "1"},
              real.LossScale(False).state()]
)  # fmt: skip
def test_a_wrong_state_is_named(state: Any) -> None:
    with pytest.raises(InputError, match="loss scale"):
        real.LossScale(hysteresis=True).load(state)


# --- in the optimizer -----------------------------------------------------------------------------


def check_steps(
    module: ModuleType, kind: str, after_update: bool, overflows: np.ndarray, dtype: str = "fp16"
) -> None:
    """3,200 optimizer steps beside numpy: skips, Adam's count, scale, and each clipped gradient."""
    keys = {
        **FP16,
        "precision__loss_scaling": kind,
        "precision__unscale_after_update": after_update,
        "precision__gradients": dtype,
        "precision__gradient_sum": dtype,
    }
    optimizer = optimizer_for(module, **keys, optimizer__weight_decay=0.0)
    random = np.random.default_rng(7)
    scale, m, updates = Simulated(kind == "hysteresis"), np.zeros((8, 16)), 0
    for step, overflow in enumerate(overflows.tolist()):
        factor = optimizer.loss_factor
        assert factor == scale.S, step
        g = (random.normal(size=(8, 16)) * 0.05).astype(np.float16).astype(np.float64)
        scaled = (g * min(factor, 2.0**14)).astype(np.float16)
        if overflow:
            scaled[3, 5] = (np.inf, -np.inf, np.nan)[step % 3]
        accumulate(optimizer, scaled[None, None])
        before = optimizer.master.clone()
        norm = optimizer.step(1e-3)
        now = scale.step(overflow)
        assert optimizer.loss_scale.scale == now, step
        if overflow:
            assert not norm.isfinite() and torch.equal(optimizer.master, before)
        else:
            gradient = scaled.astype(np.float64) / (now if after_update else factor)
            true_norm = np.sqrt((gradient**2).sum())
            m = 0.9 * m + 0.1 * gradient * min(1, 1 / (true_norm + 1e-6))
            updates += 1
            assert norm.item() == pytest.approx(true_norm, rel=1e-5), step
        assert optimizer.updates == updates
        ours = optimizer.views(optimizer.exp_avg)["dense.weight"].numpy()
        np.testing.assert_allclose(ours, m, rtol=0, atol=1e-6 * max(np.abs(m).max(), 1e-9) + 1e-9)


@pytest.mark.parametrize("pattern", ["single", "bursts"])
@pytest.mark.parametrize("kind", ["hysteresis", "dynamic"])
def test_overflows_in_3200_steps_of_the_optimizer(kind: str, pattern: str) -> None:
    check_steps(pythia_fast.optim, kind, pattern == "single", patterns(3200)[pattern])


def test_overflows_with_fp32_gradients_of_fp16_weights() -> None:
    """The path through torch's fused AdamW."""
    check_steps(pythia_fast.optim, "dynamic", True, patterns(4000)["bursts"][:1200], dtype="fp32")


OPTIM = "pythia_fast/optim.py"
STEP_MUTANTS = [
    Mutant("an overflow is applied", OPTIM, "                self.updates -= 1\n                return norm\n", "                pass\n"),
    Mutant("a skipped step counts as an update", OPTIM, "                self.updates -= 1\n", ""),
    Mutant("unscaled by the scale before", OPTIM, "self.loss_scale.scale if after_update else before", "before"),
    Mutant("unscaled by the scale after", OPTIM, "self.loss_scale.scale if after_update else before", "self.loss_scale.scale"),
    Mutant("norm of scaled gradients", OPTIM, "norm = norm / unscale", "norm = norm / 1.0"),
    Mutant("clip without unscaling", OPTIM, "self._clip_factor(norm) / unscale", "self._clip_factor(norm)"),
    Mutant("always with hysteresis", OPTIM, 'hysteresis=precision.loss_scaling == "hysteresis"', "hysteresis=True"),
]  # fmt: skip


@pytest.mark.parametrize("mutant", STEP_MUTANTS, ids=lambda m: m.name)
def test_mutants_of_the_scaled_step_are_killed(mutant: Mutant, tmp_path: Path) -> None:
    def check(module: ModuleType) -> None:
        overflows = np.zeros(1200, bool)
        overflows[[2, 3, 8]] = True
        for kind in ("hysteresis", "dynamic"):
            for after_update in (True, False):
                check_steps(module, kind, after_update, overflows)

    assert_sound([mutant], check)
    assert_killed(mutant, check, tmp_path)


# --- in a run -------------------------------------------------------------------------------------

AT = (3, 4, 10)  # the steps (from 0) whose gradients overflow


@pytest.fixture
def overflowing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of the steps AT hold an infinity."""
    original = train.Trainer.train_step

    def step(self: train.Trainer, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        end_rank = self.optimizer.end_rank

        def spoilt() -> None:
            if self.step in AT:
                self.optimizer.grad[7] = float("inf")
            end_rank()

        self.optimizer.end_rank = spoilt  # type: ignore[method-assign]
        try:
            return original(self, tokens)
        finally:
            del self.optimizer.end_rank

    monkeypatch.setattr(train.Trainer, "train_step", step)


def fp16_flags(*more: str) -> list[str]:
    return ["--recipe", "pythia-v1", "--train.steps", "20", "--optimizer.warmup", "0.25", *more]


def test_a_skipped_step_uses_up_its_data_but_moves_no_schedule(
    overflowing: None, tmp_path: Path
) -> None:
    page = tiny_run.make_page(tmp_path)
    config = load(page, fp16_flags())
    train.train(config, tmp_path / "run")
    rows = tiny_run.rows(tmp_path / "run" / "metrics.jsonl")
    scale, applied = Simulated(hysteresis=True), 0
    for step, row in enumerate(rows):
        assert row["lr"] == pytest.approx(neox_v1_rate(applied, 20, 1e-2, 1e-3, 0.25))
        assert row["loss_scale"] == scale.step(step in AT)
        applied += step not in AT
        assert row["skipped"] == step + 1 - applied
        assert (row["grad_norm"] is None) == (step in AT)
        assert row["tokens"] == (step + 1) * config.tokens_per_step
    assert rows[-1]["loss_scale"] == 4096 / 4  # the first overflow was free
    ledger = tiny_run.rows(tmp_path / "run" / "ledger.jsonl")
    assert ledger == list(digest(config, 0, 20))  # every step's data, skipped or not
    manifest = checkpoint.read_manifest(checkpoint.directory(tmp_path / "run", 20))
    assert manifest["updates"] == 17 and manifest["step"] == 20
    assert manifest["loss_scale"]["iteration"] == 20


def test_schedule_counts_steps_moves_the_schedule_with_the_data(
    overflowing: None, tmp_path: Path
) -> None:
    page = tiny_run.make_page(tmp_path)
    config = load(page, fp16_flags("--optimizer.schedule_counts", "steps"))
    train.train(config, tmp_path / "run")
    rows = tiny_run.rows(tmp_path / "run" / "metrics.jsonl")
    rates = [neox_v1_rate(n, 20, 1e-2, 1e-3, 0.25) for n in range(20)]
    assert [row["lr"] for row in rows] == pytest.approx(rates)
    assert rows[-1]["skipped"] == 3


@pytest.mark.parametrize("at", [4, 11])
def test_fp16_resumes_bit_for_bit_between_overflows(
    at: int, overflowing: None, tmp_path: Path
) -> None:
    """Loss scale, hysteresis and the count of updates come back with the weights."""
    page = tiny_run.make_page(tmp_path)
    config = load(page, fp16_flags())
    train.train(config, tmp_path / "straight")
    train_stopping_at(train, config, tmp_path / "resumed", at)
    train.train(config, tmp_path / "resumed")
    straight, resumed = (tiny_run.result(tmp_path / n, 20) for n in ("straight", "resumed"))
    assert {**straight, "checkpoints": None} == {**resumed, "checkpoints": None}
    final = (checkpoint.read_manifest(checkpoint.directory(tmp_path / n, 20))
             for n in ("straight", "resumed"))  # fmt: skip
    a, b = ({k: m[k] for k in ("updates", "loss_scale")} for m in final)
    assert a == b


RESUME_MUTANTS = [
    Mutant("loss scale starts anew", "pythia_fast/train.py", 'manifest.get("loss_scale"))', "None)"),
    Mutant("updates are steps", "pythia_fast/train.py", 'manifest.get("updates", step)', "step"),
    Mutant("schedule counts steps", "pythia_fast/train.py", "optimizer.updates if counts_updates else self.step", "self.step"),
    Mutant("schedule counts updates", "pythia_fast/train.py", "optimizer.updates if counts_updates else self.step", "optimizer.updates"),
]  # fmt: skip


@pytest.mark.parametrize("mutant", RESUME_MUTANTS, ids=lambda m: m.name)
def test_mutants_of_the_skipped_step_are_killed(mutant: Mutant, tmp_path: Path) -> None:
    page = tiny_run.make_page(tmp_path)

    def check(module: ModuleType) -> None:
        directory = Path(tempfile.mkdtemp(dir=tmp_path))  # not the runs of another module
        for counts in ("updates", "steps"):
            config = load(page, fp16_flags("--optimizer.schedule_counts", counts))
            for name, using in (("straight", train), ("resumed", module)):
                run = directory / f"{name}-{counts}"
                original = using.Trainer.train_step
                using.Trainer.train_step = _spoiling(original)
                try:
                    if name == "resumed":
                        train_stopping_at(using, config, run, 11)
                    using.train(config, run)
                finally:
                    using.Trainer.train_step = original
            a, b = (
                tiny_run.result(directory / f"{n}-{counts}", 20) for n in ("straight", "resumed")
            )
            assert a["metrics"] == b["metrics"] and a["tensors"] == b["tensors"]

    assert_sound([mutant], check)
    assert_killed(mutant, check, tmp_path)


def _spoiling(original: Any) -> Any:
    def step(self: Any, tokens: torch.Tensor) -> Any:
        def spoil(parameter: torch.Tensor) -> None:
            if self.step in AT and parameter.grad is not None:
                parameter.grad[0] = float("nan")

        first = next(iter(self.model.parameters()))
        handle = first.register_post_accumulate_grad_hook(spoil)
        try:
            return original(self, tokens)
        finally:
            handle.remove()

    return step


def test_a_run_that_always_overflows_ends_with_a_line(tmp_path: Path) -> None:
    page = tiny_run.make_page(tmp_path)
    original = train.Trainer.train_step
    config = load(page, ["--recipe", "pythia-v1", "--train.steps", "60"])

    def always(self: Any, tokens: torch.Tensor) -> Any:
        self.optimizer.loss_scale.scale = 2.0**60  # beyond fp16 whatever the gradient is
        return original(self, tokens)

    train.Trainer.train_step = always  # type: ignore[method-assign]
    try:
        with pytest.raises(
            CheckError,
            match="step 49: 50 steps in a row overflowed in fp16; the newest checkpoint is ",
        ):
            train.train(config, tmp_path / "run")
    finally:
        train.Trainer.train_step = original  # type: ignore[method-assign]
