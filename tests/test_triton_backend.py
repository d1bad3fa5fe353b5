"""Training on the Triton kernels under the interpreter reaches the reference's losses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch

from pythia_fast import block
from pythia_fast.config import Model, load
from pythia_fast.errors import InputError
from pythia_fast.generate import generate
from pythia_fast.kernels import checks
from pythia_fast.model import Pythia, initialise, materialise
from pythia_fast.ops import REFERENCE, select
from pythia_fast.train import train

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is for machines without a GPU"
)


@interpreted
@pytest.mark.parametrize("hidden", [64, 160])
def test_losses_and_norms_equal_the_reference_within_fp32_rounding(
    hidden: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four steps of two microbatches and a validation; two heads of 32 or 80 dims."""
    launched = []
    backward = block.block_bwd
    monkeypatch.setattr(block, "block_bwd", lambda *a: launched.append(1) or backward(*a))
    page = tiny_run.make_page(tmp_path)
    flags = ["--train.steps", "4", "--train.valid_every", "4", "--model.hidden", str(hidden)]
    for backend in ("reference", "triton"):
        train(load(page, [*flags, "--kernels.backend", backend]), tmp_path / backend)
    expected, ours = (
        tiny_run.rows(tmp_path / backend / "metrics.jsonl") for backend in ("reference", "triton")
    )
    assert len(launched) == 4 * 2 * 2  # steps, microbatches, layers
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose(
            [row[key] for row in ours], [row[key] for row in expected], rtol=2e-6, err_msg=key
        )
    assert ours[-1]["valid_loss"] == pytest.approx(expected[-1]["valid_loss"], rel=2e-6)
    assert [row["tokens"] for row in ours] == [row["tokens"] for row in expected]


@interpreted
def test_the_published_recipe_in_fp16_equals_the_reference(tmp_path: Path) -> None:
    """fp16 gradients, their norm and the loss scale on the kernels; p-fold row biases in parts."""
    page = tiny_run.make_page(tmp_path)
    copies = ["--optimizer.row_bias_copies", "2", "--optimizer.norm_copies", "2"]
    flags = ["--recipe", "pythia-v1", *copies, "--train.steps", "3", "--precision.sum_ranks", "2"]
    for backend in ("reference", "triton"):
        train(load(page, [*flags, "--kernels.backend", backend]), tmp_path / backend)
    expected, ours = (
        tiny_run.rows(tmp_path / backend / "metrics.jsonl") for backend in ("reference", "triton")
    )
    for key, rtol in (("loss", 1e-3), ("grad_norm", 1e-2)):
        np.testing.assert_allclose(
            [row[key] for row in ours], [row[key] for row in expected], rtol=rtol, err_msg=key
        )
    assert [row["loss_scale"] for row in ours] == [4096.0] * 3


@interpreted
def test_select_says_what_triton_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert select("auto", cpu) is REFERENCE
    assert select("triton", cpu).name == "triton"
    monkeypatch.setattr(checks, "INTERPRETED", False)
    with pytest.raises(InputError, match="needs a GPU"):
        select("triton", cpu)


@interpreted
def test_generation_decodes_by_the_kernel_to_the_same_tokens() -> None:
    """Prompts of 3 and 20 positions: the second is beyond the kernel's 16, its steps are not."""
    rows = {}
    for backend in ("reference", "triton"):
        c = Model(layers=2, hidden=64, heads=2, vocab_size=50)
        model = Pythia(c, select(backend, torch.device("cpu")))
        materialise(model, "cpu", torch.float32)
        initialise(model, seed=1)
        rows[backend] = generate(model, [[3, 4, 5], list(range(20))], 6, stop_id=None)
    assert rows["triton"] == rows["reference"]
