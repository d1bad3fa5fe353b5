"""The argument checks: what passes, what is refused, and that the line names the argument."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from kernel_proof import REPOSITORY
from op_proof import DEVICE

from pythia_fast.kernels.checks import check, check_rows, check_vectors, grad_rows


def test_check_accepts_what_it_describes() -> None:
    x = torch.zeros(2, 3, 4, device=DEVICE)
    check(x, "x", rank=3, shape=(2, None, 4), device=x.device)
    check(x.transpose(1, 2), "x", last_stride=None)
    check(x.long(), "x", dtypes=(torch.int64,))
    check(x[..., ::4], "x")  # one column: its stride says nothing
    check(torch.zeros((), device=DEVICE), "x", rank=0)


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (lambda x: x.tolist(), {}, TypeError, r"x: expected a tensor, got list"),
        (lambda x: x.int(), {}, TypeError, r"x: dtype int32, not float32 or float16 or bfloat16"),
        (lambda x: x, {"dtypes": (torch.int64,)}, TypeError, r"x: dtype float32, not int64"),
        (lambda x: x, {"rank": 3}, ValueError, r"x: rank 2 \(2, 4\), expected 3"),
        (lambda x: x, {"shape": (None, 5)}, ValueError, r"x: shape \(2, 4\), expected \(\*, 5\)"),
        (lambda x: x, {"shape": (2,)}, ValueError, r"x: shape \(2, 4\), expected \(2\)"),
        (lambda x: x.T, {}, ValueError, r"x: strides \(1, 4\), the last dimension must have"),
        (lambda x: x.to("meta"), {}, ValueError, r"x: on meta; a Triton kernel needs"),
        (lambda x: x, {"device": torch.device("meta")}, ValueError, r"x: on \S+ the other argum"),
    ],
)  # fmt: skip
def test_check_refuses(change, options, error, message) -> None:
    with pytest.raises(error, match=message):
        check(change(torch.zeros(2, 4, device=DEVICE)), "x", **options)


def test_rows_of_a_view_share_its_memory() -> None:
    buffer = torch.arange(2 * 3 * 10, device=DEVICE).float().view(2, 3, 10)
    rows = check_rows(buffer[..., 2:6], "x", 4)
    assert rows.shape == (6, 4)
    assert rows.stride() == (10, 1)
    assert rows.data_ptr() == buffer[0, 0, 2:].data_ptr()
    assert check_rows(buffer[0, 0], "x", 10).shape == (1, 10)
    assert check_rows(buffer[:0], "x", 10).shape == (0, 10)


def test_rows_refuse_two_strides_and_other_widths() -> None:
    x = torch.zeros(2, 3, 4, device=DEVICE)
    with pytest.raises(ValueError, match=r"x: strides .* no single stride"):
        check_rows(x.transpose(0, 1), "x", 4)
    with pytest.raises(ValueError, match=r"x: shape \(2, 3, 4\), expected \(\.\.\., 5\)"):
        check_rows(x, "x", 5)


def test_vectors_are_of_one_dtype() -> None:
    x, w = torch.zeros(2, 4, device=DEVICE), torch.zeros(4, device=DEVICE)
    check_vectors({"weight": w.half(), "bias": w.half()}, x)
    with pytest.raises(TypeError, match="bias: dtype float16, not float32"):
        check_vectors({"weight": w, "bias": w.half()}, x)
    with pytest.raises(ValueError, match="weight: shape"):
        check_vectors({"weight": w[:3]}, x)


def test_grad_rows_copies_only_what_it_must() -> None:
    like = torch.zeros(2, 3, 4, device=DEVICE)
    grad = torch.randn(2, 3, 8, device=DEVICE)[..., :4]
    assert grad_rows(grad, "dy", like).data_ptr() == grad.data_ptr()
    expanded = torch.ones((), device=DEVICE).expand(2, 3, 4)
    assert grad_rows(expanded, "dy", like).stride() == (4, 1)
    turned = torch.randn(3, 2, 4, device=DEVICE).transpose(0, 1)
    assert torch.equal(grad_rows(turned, "dy", like), turned.reshape(6, 4))
    with pytest.raises(ValueError, match="dy: shape"):
        grad_rows(grad[:1], "dy", like)


@pytest.mark.skipif(DEVICE == "cuda", reason="for a machine without a GPU")
def test_cpu_tensor_without_the_interpreter() -> None:
    code = (
        "import torch; from pythia_fast.kernels.layer_norm import layer_norm\n"
        "x = torch.zeros(2, 4)\n"
        "try: layer_norm(x, x[0], x[0])\n"
        "except ValueError as e: print(e)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.stdout.startswith("x: on cpu; a Triton kernel needs a CUDA tensor"), run.stderr
    assert "TRITON_INTERPRET=1" in run.stdout
