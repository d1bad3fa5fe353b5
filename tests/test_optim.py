"""AdamW over flat buffers, against numpy in float64."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from kernel_proof import Mutant, assert_killed
from torch import nn

import pythia_fast.optim as real
from pythia_fast.config import Optimizer, Precision, resolve
from pythia_fast.ops import REFERENCE

CPU = torch.device("cpu")


class Toy(nn.Module):
    """Parameters with the names and shapes that decide decay; sizes that need padding."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.embed_in = nn.Embedding(7, 5)
            self.input_layernorm = nn.LayerNorm(5)
            self.dense = nn.Linear(5, 3)


def numpy_adamw(
    values, grads_by_step, lr_by_step, decay, clip=1.0, wd=0.1, b1=0.9, b2=0.95, eps=1e-8, offset=1
):  # type: ignore[no-untyped-def]
    """The formula of apex FusedAdam with clipping by the global norm, in float64."""
    m = {k: np.zeros_like(v) for k, v in values.items()}
    v2 = {k: np.zeros_like(v) for k, v in values.items()}
    norms = []
    for t, (grads, lr) in enumerate(zip(grads_by_step, lr_by_step, strict=True), start=1 + offset):
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        norms.append(norm)
        factor = min(1.0, clip / (norm + 1e-6))
        for k in values:
            g = grads[k] * factor
            m[k] = b1 * m[k] + (1 - b1) * g
            v2[k] = b2 * v2[k] + (1 - b2) * g * g
            update = (m[k] / (1 - b1**t)) / (np.sqrt(v2[k] / (1 - b2**t)) + eps)
            values[k] = values[k] - lr * (update + (wd * values[k] if decay(k) else 0.0))
    return values, norms


def check_adamw(
    module: ModuleType, backend: str = "torch", dtype: torch.dtype = torch.float32
) -> None:
    """Five steps of two accumulated microbatches: norms, master and compute weights."""
    torch.manual_seed(3)
    model = Toy()
    c = resolve({"optimizer.lr": 0.1, "optimizer.backend": "torch"}).optimizer
    compute = next(k for k, v in real.DTYPES.items() if v == dtype)
    optimizer = module.AdamW(model, c, Precision(compute=compute), REFERENCE, CPU)
    if backend == "reference":
        optimizer._torch = None
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    optimizer.sync_weights(from_model=True)
    start = {n: p.detach().double().numpy().copy() for n, p in model.named_parameters()}
    lrs, history, norms = [0.0, 0.1, 0.05, 0.1, 0.02], [], []
    for lr in lrs:
        total = {n: np.zeros(p.shape) for n, p in model.named_parameters()}
        for _ in range(2):
            for name, p in model.named_parameters():
                p.grad = torch.randn(p.shape).to(dtype)
                total[name] += p.grad.double().numpy()
            optimizer.accumulate()
            assert all(p.grad is None for p in model.parameters())
        history.append(total)
        norms.append(float(optimizer.step(lr)))
    expected, expected_norms = numpy_adamw(
        start, history, lrs, decay=lambda n: n in ("embed_in.weight", "dense.weight")
    )
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-5)
    master = optimizer.views(optimizer.master)
    for name, p in model.named_parameters():
        np.testing.assert_allclose(
            master[name].numpy(), expected[name], rtol=2e-5, atol=2e-6, err_msg=name
        )
        assert torch.equal(p.detach(), master[name].to(dtype)), name
    used = torch.zeros_like(optimizer.master, dtype=torch.bool)
    for view in optimizer.views(used).values():
        view.fill_(True)
    assert not optimizer.master[~used].any()  # padding stays 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_adamw_follows_the_formula(backend: str, dtype: torch.dtype) -> None:
    check_adamw(real, backend, dtype)


ADAMW_MUTANTS = [
    Mutant("biases decay", "pythia_fast/flat.py", 'name.endswith("bias") or (', "("),
    Mutant("LayerNorms decay", "pythia_fast/flat.py", 'if "norm" in name:', "if False:"),
    Mutant("the second microbatch overwrites", "pythia_fast/optim.py", "if self.fresh:", "if True:"),
    Mutant("gradients never start afresh", "pythia_fast/optim.py", "self.fresh = self._first_rank = True\n        self.last", "self.last"),
    Mutant("no clipping", "pythia_fast/optim.py", ".clamp(max=1.0)", ".clamp(min=1.0, max=1.0)"),
    Mutant("compute weights not written", "pythia_fast/optim.py", "self._torch.step()\n            self.sync_weights()", "self._torch.step()"),
    Mutant("no step before the first", "pythia_fast/optim.py", 'torch.tensor(float(c.step_offset), device', 'torch.tensor(0.0, device'),
    Mutant("step count stands still", "pythia_fast/optim.py", "self.updates += 1", "self.updates = 1"),
]  # fmt: skip


@pytest.mark.parametrize("mutant", ADAMW_MUTANTS, ids=lambda m: m.name)
def test_adamw_mutants_are_killed(
    mutant: Mutant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(module: ModuleType) -> None:
        if mutant.file.endswith("flat.py"):
            monkeypatch.setattr(real, "lay_out", module.lay_out)
            module = real
        for backend in ("torch", "reference"):
            check_adamw(module, backend, torch.bfloat16)

    assert_killed(mutant, check, tmp_path)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_state_saved_and_loaded_continues_bit_for_bit(backend: str) -> None:
    def steps(optimizer: real.AdamW, model: nn.Module, seeds: range) -> None:
        for seed in seeds:
            torch.manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn(p.shape)
            optimizer.accumulate()
            optimizer.step(0.01)

    def fresh() -> tuple[nn.Module, real.AdamW]:
        model = Toy()
        precision = Precision(compute="fp32")
        optimizer = real.AdamW(model, Optimizer(), precision, REFERENCE, CPU)
        if backend == "reference":
            optimizer._torch = None
        return model, optimizer

    model, straight = fresh()
    steps(straight, model, range(4))
    saved = {k: v.clone() for k, v in straight.state().items()}
    steps(straight, model, range(4, 8))
    model, resumed = fresh()
    for name, view in resumed.state().items():
        view.copy_(saved[name])
    resumed.resume_at(4)
    steps(resumed, model, range(4, 8))
    for name, view in straight.state().items():
        assert torch.equal(view, resumed.state()[name]), name
