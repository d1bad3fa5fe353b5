"""Each switch of the recipes against numpy in float64, and a mutant that ignores it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tiny_run
import torch
from kernel_proof import Mutant, assert_killed, assert_sound
from neox_numpy import NumpyAdamW, cosine_rate, loss_and_gradients, neox_v1_rate
from recipe_proof import FP16, accumulate, batch, fresh_trainer, optimizer_for

import pythia_fast.assemble
import pythia_fast.optim
import pythia_fast.train as real
from pythia_fast.config import Config, load, resolve
from pythia_fast.recipe import RECIPES

# in fp32, where float64 can follow: what a recipe says of 16-bit arithmetic is tested below
FP32 = ["--precision.compute", "fp32", "--precision.gradients", "fp32",
        "--precision.gradient_sum", "fp32", "--precision.loss_scaling", "none"]  # fmt: skip
SHARP = ["--optimizer.clip", "0.2", "--optimizer.warmup", "0.1"]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.make_page(tmp_path_factory.mktemp("recipe"))


def oracle_for(config: Config, trainer: real.Trainer, **more: Any) -> NumpyAdamW:
    """The numpy optimizer on the trainer's weights, set as the page says unless `more` does."""
    o, views = config.optimizer, trainer.optimizer.views(trainer.optimizer.master)
    settings = {
        "ranks": o.row_bias_copies,
        "copies_in_norm": o.norm_copies > 1,
        "step_offset": o.step_offset,
        "decay_embeddings": o.decay_embeddings,
        "clip": o.clip,
        "clip_eps": o.clip_eps,
        **more,
    }
    return NumpyAdamW({k: v.double().numpy().copy() for k, v in views.items()}, **settings)


def follow(
    config: Config, trainer: real.Trainer, steps: int, loss_rtol: float, state_rtol: float,
    model: dict[str, Any] | None = None, rate: Callable[..., float] | None = None, **more: Any,
) -> None:  # fmt: skip
    """Trainer and numpy side by side: losses and norms at each step, then weights and moments.

    From step 50 on losses may differ 20 times as much: a training that moves its weights by one
    rounding (6e-8) moves the tiny model's losses by 5e-7 until then, and by 2.3e-5 within 200.
    model, rate, more: what numpy computes otherwise than the page says.
    """
    c, o, oracle = config.model, config.optimizer, oracle_for(config, trainer, **more)
    setting = {
        "activation": c.activation,
        "rope": c.rope_table,
        "rotary_pct": c.rotary_pct,
        **(model or {}),
    }
    rate = rate or {"neox-v1": neox_v1_rate, "cosine": cosine_rate}[o.schedule]
    for step in range(steps):
        rows = batch(trainer, step)
        loss, gradients = loss_and_gradients(oracle.values, rows, c.layers, c.heads, **setting)
        norm = oracle.step(gradients, rate(step, config.train.steps, o.lr, o.min_lr, o.warmup))
        ours = trainer.train_step(torch.from_numpy(rows))
        rtol = loss_rtol if step < 50 else 20 * loss_rtol
        np.testing.assert_allclose(ours[0].item(), loss, rtol=rtol, err_msg=f"loss {step}")
        np.testing.assert_allclose(ours[1].item(), norm, rtol=30 * rtol, err_msg=f"norm {step}")
    ours = trainer.optimizer
    moments, weights = ours.views(ours.exp_avg), ours.views(ours.master)
    compared = 0
    for name, weight in weights.items():
        m, v = oracle.moments(name)
        scale = np.abs(m).max()
        np.testing.assert_allclose(
            moments[name].numpy(), m, rtol=0, atol=state_rtol * scale, err_msg=f"exp_avg {name}"
        )
        # a gradient that is 0 in exact arithmetic (key biases) leaves Adam a quotient of roundings
        real_gradient = np.sqrt(v) > 2e-3 * np.sqrt(v).max()
        compared += int(real_gradient.sum())
        a, b = weight.numpy()[real_gradient], oracle.values[name][real_gradient]
        np.testing.assert_allclose(a, b, rtol=0, atol=5 * state_rtol * o.lr, err_msg=name)
    assert compared > 0.8 * sum(w.numel() for w in weights.values())


ROPE = ["--model.rotary_pct", "1", "--data.seq_len", "200", "--data.valid_prefix", "",
        "--model.rope_table"]  # fmt: skip
CASES: dict[str, list[str]] = {
    "pythia-v1": ["--recipe", "pythia-v1"],
    "modern": ["--recipe", "modern"],
    "model.activation": ["--model.activation", "gelu"],
    "model.rope_table": [*ROPE, "fp16"],
    "model.rope_table bf16": [*ROPE, "bf16"],
    "optimizer.schedule": ["--optimizer.schedule", "cosine"],
    "optimizer.step_offset": ["--optimizer.step_offset", "0"],
    "optimizer.decay_embeddings": ["--optimizer.decay_embeddings", "false"],
    "optimizer.clip_eps": ["--optimizer.clip_eps", "0.5"],
    "optimizer.row_bias_copies": ["--optimizer.row_bias_copies", "4"],
    "optimizer.norm_copies": ["--optimizer.row_bias_copies", "2", "--optimizer.norm_copies", "2"],
}
# numpy with that one switch left as it was: the check must see the difference
IGNORED: dict[str, dict[str, Any]] = {
    "model.activation": {"model": {"activation": "gelu_tanh"}},
    "model.rope_table": {"model": {"rope": "fp32"}},
    "model.rope_table bf16": {"model": {"rope": "fp16"}},
    "optimizer.schedule": {"rate": neox_v1_rate},
    "optimizer.step_offset": {"step_offset": 1},
    "optimizer.decay_embeddings": {"decay_embeddings": True},
    "optimizer.clip_eps": {"clip_eps": 1e-6},
    "optimizer.row_bias_copies": {"ranks": 1},
    "optimizer.norm_copies": {"copies_in_norm": False},
}


@pytest.mark.parametrize("name", CASES)
def test_five_steps_equal_numpy(name: str, page: Path, tmp_path: Path) -> None:
    config = load(page, [*CASES[name], *FP32, *SHARP])
    follow(config, fresh_trainer(config, tmp_path), 5, loss_rtol=3e-6, state_rtol=1e-3)


@pytest.mark.parametrize("name", IGNORED)
def test_numpy_that_ignores_a_switch_differs(name: str, page: Path, tmp_path: Path) -> None:
    config = load(page, [*CASES[name], *FP32, *SHARP])
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        follow(config, fresh_trainer(config, tmp_path), 5, 3e-6, 1e-3, **IGNORED[name])


OPTIM, SCHEDULE, FLAT, MODEL = (
    f"pythia_fast/{name}.py" for name in ("optim", "schedule", "flat", "model")
)
SWITCH_MUTANTS = {
    "model.activation": Mutant("always the tanh form", MODEL, 'if c.activation == "gelu_tanh" else "none"', 'if True else "none"'),
    "model.rope_table": Mutant("table always fp32", MODEL, "_DTYPE[c.rope_table]", "torch.float32"),
    "optimizer.schedule": Mutant("always neox-v1", SCHEDULE, 'if c.schedule == "neox-v1":', "if True:"),
    "optimizer.step_offset": Mutant("offset always 1", OPTIM, 'torch.tensor(float(c.step_offset), device', 'torch.tensor(1.0, device'),
    "optimizer.decay_embeddings": Mutant("embeddings always decay", FLAT, "(embedding and not decay_embeddings)", "False"),
    "optimizer.clip_eps": Mutant("clip_eps always 1e-6", OPTIM, "norm + self.config.clip_eps", "norm + 1e-6"),
    "optimizer.row_bias_copies": Mutant("row biases move by lr", OPTIM, "lr * self.config.row_bias_copies", "lr"),
    "optimizer.norm_copies": Mutant("all counted once", OPTIM, "copies if mesh.part == 0", "1 if mesh.part == 0"),
}  # fmt: skip
MORE_MUTANTS = {
    "model.rope_table bf16": Mutant("bf16 angles formed in fp32", MODEL, "inverse_frequencies(rotary_dim, base).to(dtype)", "inverse_frequencies(rotary_dim, base).to(torch.float16 if dtype == torch.float16 else torch.float32)"),
    "model.rope_table": Mutant("fp16 is bf16", MODEL, '"fp16": torch.float16, "bf16"', '"fp16": torch.bfloat16, "bf16"'),
    "optimizer.norm_copies": Mutant("LayerNorms counted once", OPTIM, "self.own.below(self.layout.replicated_from)", "self.own.below(self.layout.row_biases_from)"),
    "optimizer.row_bias_copies": Mutant("LayerNorms move by p·lr", OPTIM, "self.own.size, self.own.below(self.layout.row_biases_from)", "self.own.size, self.own.below(self.layout.replicated_from)"),
    "pythia-v1": Mutant("column biases replicated", FLAT, "        return 3\n", "        return 2\n"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "mutant"), [*SWITCH_MUTANTS.items(), *MORE_MUTANTS.items()], ids=lambda x: getattr(x, "name", None)
)  # fmt: skip
def test_a_mutant_that_ignores_the_switch_is_killed(
    name: str, mutant: Mutant, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = CASES[name]
    if name == "pythia-v1":
        flags = [*flags, *CASES["optimizer.row_bias_copies"]]
    config = load(page, [*flags, *FP32, *SHARP])

    def check(module: ModuleType) -> None:
        if mutant.file == OPTIM:
            monkeypatch.setattr(pythia_fast.assemble, "AdamW", module.AdamW)
        elif mutant.file == SCHEDULE:
            monkeypatch.setattr(real, "learning_rate", module.learning_rate)
        elif mutant.file == FLAT:
            monkeypatch.setattr(pythia_fast.optim, "lay_out", module.lay_out)
        else:
            monkeypatch.setattr(pythia_fast.assemble, "Pythia", module.Pythia)
        follow(config, fresh_trainer(config, tmp_path), 5, loss_rtol=3e-6, state_rtol=1e-3)

    assert_sound([mutant], check)
    assert_killed(mutant, check, tmp_path)


WIDER = ["--model.layers", "4", "--model.hidden", "64", "--model.heads", "4", "--data.seq_len",
         "64", "--optimizer.lr", "1e-3"]  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "size", [[], pytest.param(WIDER, marks=pytest.mark.slow)], ids=["tiny", "wider"]
)
def test_two_hundred_steps_equal_numpy(
    recipe: str, size: list[str], page: Path, tmp_path: Path
) -> None:
    """The original on two tensor-parallel ranks, or the clean set: losses within rounding."""
    copies = CASES["optimizer.norm_copies"] if recipe == "pythia-v1" else []
    flags = ["--recipe", recipe, *FP32, *copies, *size, "--train.steps", "200"]
    config = load(page, flags)
    follow(config, fresh_trainer(config, tmp_path), 200, loss_rtol=1e-5, state_rtol=2e-2)


# --- 16-bit arithmetic ----------------------------------------------------------------------------


def summed(optimizer: Any) -> np.ndarray:
    """The gradient that the update sees, before unscaling; the step itself is skipped."""
    seen: list[torch.Tensor] = []

    def note(*_: Any, **__: Any) -> None:
        seen.append(optimizer.grad.clone())

    optimizer._update = note
    optimizer.step(0.1)
    return optimizer.views(seen[0])["dense.weight"].float().numpy()


def check_gradient_dtypes(module: ModuleType) -> None:
    """Sums over microbatches, then ranks, then the division, each rounded, exact to the bit."""
    random = np.random.default_rng(4)
    gradients = (random.normal(size=(4, 3, 8, 16)) * 10 ** random.uniform(-4, 3, (8, 16))).astype(
        np.float16
    )
    ranked = {"precision__sum_ranks": 4, "train__micro_batch_size": 1, "train__batch_size": 12}
    # fp16 throughout
    total = np.zeros((8, 16), np.float16)
    for share in gradients:
        rank = np.zeros((8, 16), np.float16)
        for gradient in share:
            rank = (rank + gradient).astype(np.float16)
        total = (total + rank).astype(np.float16)
    halves = (total * np.float16(0.25)).astype(np.float16)
    optimizer = optimizer_for(module, **FP16, **ranked)
    accumulate(optimizer, gradients)
    assert np.array_equal(summed(optimizer), halves.astype(np.float32))
    # fp16 in each rank, the sum over ranks in fp32 (fp32_allreduce), rounded at the end
    ranks = np.zeros((4, 8, 16), np.float16)
    for micro in range(3):
        ranks = (ranks + gradients[:, micro]).astype(np.float16)
    wide = np.zeros((8, 16), np.float32)
    for rank in ranks:
        wide += rank.astype(np.float32)
    optimizer = optimizer_for(module, **{**FP16, "precision__gradient_sum": "fp32"}, **ranked)
    accumulate(optimizer, gradients)
    expected = (wide * np.float32(0.25)).astype(np.float16).astype(np.float32)
    assert np.array_equal(summed(optimizer), expected)
    assert not np.array_equal(expected, halves.astype(np.float32))
    # one rank: no sum over ranks and no division
    optimizer = optimizer_for(module, **FP16, train__micro_batch_size=1, train__batch_size=12)
    accumulate(optimizer, gradients[:1])
    assert np.array_equal(summed(optimizer), ranks[0].astype(np.float32))
    # fp32 gradients of fp16 microbatches
    clean = {**FP16, "precision__gradients": "fp32", "precision__gradient_sum": "fp32"}
    optimizer = optimizer_for(module, **clean, **ranked)
    accumulate(optimizer, gradients)
    expected = np.zeros((8, 16), np.float32)
    for gradient in gradients.reshape(-1, 8, 16):
        expected += gradient.astype(np.float32)
    assert np.array_equal(summed(optimizer), expected)


def test_gradients_add_up_in_their_dtype_exactly() -> None:
    check_gradient_dtypes(pythia_fast.optim)


GRADIENT_MUTANTS = [
    Mutant("gradients always fp32", OPTIM, "self.grad = self._zeros(size, precision.gradients)", 'self.grad = self._zeros(size, "fp32")'),
    Mutant("ranks summed in the gradients' dtype", OPTIM, "precision.gradient_sum)", "precision.gradients)"),
    Mutant("divided before the sum", OPTIM, "self._sum.add_(self.grad)", "self._sum.add_(self.grad * 0.25)"),
    Mutant("never divided", OPTIM, "self._sum.mul_(1 / self.precision.ranks)", "self._sum"),
    Mutant("ranks run together", OPTIM, "self._first_rank, self.fresh = False, True", "self._first_rank = False"),
    Mutant("the sum is never emptied", OPTIM, "self.fresh = self._first_rank = True\n        self.last", "self.fresh = True\n        self.last"),
]  # fmt: skip


@pytest.mark.parametrize("mutant", GRADIENT_MUTANTS, ids=lambda m: m.name)
def test_mutants_of_the_gradient_sum_are_killed(mutant: Mutant, tmp_path: Path) -> None:
    def check(module: ModuleType) -> None:
        check_gradient_dtypes(module)
        twice = optimizer_for(module, **FP16, precision__sum_ranks=4, train__micro_batch_size=1,
                              train__batch_size=12)  # fmt: skip
        gradients = np.ones((4, 3, 8, 16), np.float16)
        accumulate(twice, gradients)
        twice.step(0.1)
        accumulate(twice, gradients)
        assert (summed(twice) == 3).all()

    assert_sound([mutant], check)
    assert_killed(mutant, check, tmp_path)


def check_rank_shares(module: ModuleType) -> None:
    """Row m·R·b + r·b + i of a step is row i of microbatch m of rank r."""
    config = resolve({"precision.compute": "fp16", "precision.gradients": "fp16",
                      "precision.loss_scaling": "dynamic", "precision.sum_ranks": 4,
                      "train.batch_size": 24, "train.micro_batch_size": 2})  # fmt: skip
    shares = module.rank_shares(torch.arange(24)[:, None], config)[..., 0].tolist()
    assert config.accumulation == 3
    assert shares == [[m * 8 + r * 2 + i for m in range(3) for i in range(2)] for r in range(4)]


def test_each_rank_has_its_own_rows() -> None:
    check_rank_shares(real)


TRAIN = "pythia_fast/train.py"
SHARE_MUTANTS = [
    Mutant("each rank a block of the step", TRAIN, "tokens.unflatten(0, micro).transpose(0, 1).flatten(1, 2)", "tokens.unflatten(0, (c.precision.ranks, -1))"),
    Mutant("rows dealt one by one", TRAIN, "tokens.unflatten(0, micro).transpose(0, 1).flatten(1, 2)", "tokens.unflatten(0, (-1, c.precision.ranks)).transpose(0, 1)"),
    Mutant("ranks and microbatches swapped", TRAIN, "(-1, c.precision.ranks, c.train", "(c.precision.ranks, -1, c.train"),
]  # fmt: skip


@pytest.mark.parametrize("mutant", SHARE_MUTANTS, ids=lambda m: m.name)
def test_mutants_of_the_rank_shares_are_killed(mutant: Mutant, tmp_path: Path) -> None:
    assert_sound([mutant], check_rank_shares)
    assert_killed(mutant, check_rank_shares, tmp_path)


def follow_in_fp16(config: Config, trainer: real.Trainer) -> None:
    """fp16 stays near float64: losses within 2e-3, weights within some roundings of each update."""
    oracle = oracle_for(config, trainer)
    c, o = config.model, config.optimizer
    for step in range(6):
        rows = batch(trainer, step)
        setting = {"activation": c.activation, "rope": c.rope_table}
        loss, gradients = loss_and_gradients(oracle.values, rows, c.layers, c.heads, **setting)
        norm = oracle.step(gradients, neox_v1_rate(step, config.train.steps, o.lr, o.min_lr))
        ours = trainer.train_step(torch.from_numpy(rows))
        np.testing.assert_allclose(ours[0].item(), loss, rtol=2e-3)
        np.testing.assert_allclose(ours[1].item(), norm, rtol=2e-2)
    moments = trainer.optimizer.views(trainer.optimizer.exp_avg)
    for name, moment in moments.items():
        m, _ = oracle.moments(name)
        np.testing.assert_allclose(moment.numpy(), m, rtol=0, atol=0.05 * np.abs(m).max() + 2e-5)


def test_fp16_training_follows_float64(page: Path, tmp_path: Path) -> None:
    flags = ["--recipe", "pythia-v1", "--train.micro_batch_size", "2", "--precision.sum_ranks", "2"]
    config = load(page, flags)
    trainer = fresh_trainer(config, tmp_path)
    assert trainer.optimizer.weight.dtype == trainer.optimizer.grad.dtype == torch.float16
    assert trainer.optimizer.loss_factor == 4096 * 2
    follow_in_fp16(config, trainer)
    assert trainer.optimizer.updates == 6


FP16_MUTANTS = [
    Mutant("loss not divided by its factor", TRAIN, "self.mesh.sum_(loss, \"data\") / factor, norm", "self.mesh.sum_(loss, \"data\"), norm"),
    Mutant("loss not scaled", TRAIN, "self.model.loss(rows, factor / positions)", "self.model.loss(rows, 1.0 / positions)"),
    Mutant("weights always fp32", OPTIM, 'precision.compute == "fp32"', "True"),
]  # fmt: skip


@pytest.mark.parametrize("mutant", FP16_MUTANTS, ids=lambda m: m.name)
def test_mutants_of_fp16_steps_are_killed(
    mutant: Mutant, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(page, ["--recipe", "pythia-v1"])

    def check(module: ModuleType) -> None:
        if mutant.file == OPTIM:
            monkeypatch.setattr(pythia_fast.assemble, "AdamW", module.AdamW)
            module = real
        trainer = fresh_trainer(config, tmp_path, module)
        assert trainer.model.embed_out.weight.dtype == torch.float16
        follow_in_fp16(config, trainer)

    assert_sound([mutant], check)
    assert_killed(mutant, check, tmp_path)


def test_1b_in_bf16_with_an_fp32_sum_of_ranks_resumes_bit_for_bit(
    page: Path, tmp_path: Path
) -> None:
    flags = ["--recipe", "pythia-v1", "--precision.compute", "bf16", "--precision.gradients", "bf16",
             "--precision.gradient_sum", "fp32", "--precision.loss_scaling", "none",
             "--precision.sum_ranks", "2", "--model.rope_table", "bf16"]  # fmt: skip
    config = load(page, [*flags, "--train.steps", "20"])
    last = real.train(config, tmp_path / "straight")
    tiny_run.train_stopping_at(real, config, tmp_path / "resumed", 11)
    real.train(config, tmp_path / "resumed")
    straight, resumed = (tiny_run.result(tmp_path / n, 20) for n in ("straight", "resumed"))
    assert straight["tensors"] == resumed["tensors"] and straight["metrics"] == resumed["metrics"]
    first = tiny_run.rows(tmp_path / "straight" / "metrics.jsonl")[0]
    assert last["loss"] < first["loss"] - 0.3 and "loss_scale" not in last
