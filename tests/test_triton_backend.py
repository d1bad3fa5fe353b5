"""Training on the Triton kernels under the interpreter reaches the reference's losses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch

from pythia_fast.config import load
from pythia_fast.errors import InputError
from pythia_fast.kernels import checks
from pythia_fast.ops import REFERENCE, select
from pythia_fast.train import train

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is for machines without a GPU"
)


@interpreted
def test_losses_and_norms_equal_the_reference_within_fp32_rounding(tmp_path: Path) -> None:
    """Four steps of two microbatches, a validation, and a resume in the middle."""
    page = tiny_run.make_page(tmp_path)
    flags = ["--train.steps", "4", "--train.valid_every", "4"]
    for backend in ("reference", "triton"):
        train(load(page, [*flags, "--kernels.backend", backend]), tmp_path / backend)
    expected, ours = (
        tiny_run.rows(tmp_path / backend / "metrics.jsonl") for backend in ("reference", "triton")
    )
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose(
            [row[key] for row in ours], [row[key] for row in expected], rtol=2e-6, err_msg=key
        )
    assert ours[-1]["valid_loss"] == pytest.approx(expected[-1]["valid_loss"], rel=2e-6)
    assert [row["tokens"] for row in ours] == [row["tokens"] for row in expected]


@interpreted
def test_select_says_what_triton_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert select("auto", cpu) is REFERENCE
    assert select("triton", cpu).name == "triton"
    monkeypatch.setattr(checks, "INTERPRETED", False)
    with pytest.raises(InputError, match="needs a GPU"):
        select("triton", cpu)
