"""The table of ops: its bytes against the design's figures, its inputs left as they were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.check import TINY
from bench.op import SIZES, Draw, Op, results, shape
from bench.op_table import OPS, find

TOKEN_BYTES = {  # bf16 elements of h a token, forward and backward
    "layer_norm": (2, 3),
    "dual_layer_norm": (3, 5),
    "parallel_residual": (4, 1),
    "parallel_residual_dual_layer_norm": (6, 5),
    "gelu tanh": (8, 12),
    "gelu erf": (8, 12),
}


@pytest.mark.parametrize("size", SIZES)
def test_necessary_bytes(size: str) -> None:
    s = shape(size, batch=2, positions=2048)
    tokens = 2 * 2048
    for label, counts in TOKEN_BYTES.items():
        moved = find(label).bytes_moved
        assert [moved[p](s, 2) for p in ("forward", "backward")] == [
            n * 2 * s.hidden * tokens for n in counts
        ], label
    assert find("cross_entropy").bytes_moved["both"](s, 2) == 4 * s.vocab * tokens
    assert find("adamw_").bytes_moved["forward"](s, 2) == 30 * s.flat
    assert find("grad_norm").bytes_moved["forward"](s, 2) == 4 * s.flat
    attention = find("attention").flops  # the facts' counting: 4·B·H·T²·D, halved, 2.5 times back
    halved = 4 * 2 * s.heads * 2048**2 * s.head_dim // 2
    assert attention["forward"](s, {}) == halved
    assert attention["backward"](s, {}) == 2.5 * halved
    lengths = (1, 600, 1447)  # of documents, in both rows
    starts = torch.tensor([i for i, n in zip((0, 1, 601), lengths, strict=True) for _ in range(n)])
    squares = 2 * sum(n**2 for n in lengths)
    within = attention["forward"](s, {"doc_start": starts.expand(2, -1)})
    assert within == 2 * squares * s.heads * s.head_dim
    assert find("attention_decode").bytes_moved["forward"](s, 2) == 4 * s.hidden * tokens
    # q and k, read and written, a quarter of each: as much as one tensor of h
    assert find("rotary").bytes_moved["forward"](s, 2) == 2 * s.hidden * tokens


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.label)
def test_running_an_op_leaves_its_inputs(op: Op) -> None:
    """So that kernel, reference and float64 see the same values."""
    inputs = op.inputs(TINY, torch.float16, Draw(torch.device("cpu")))
    tensors = [t for v in inputs.values() for t in (v if isinstance(v, list) else [v])]
    tensors = [t for t in tensors if isinstance(t, Tensor)]
    before = [t.clone() for t in tensors]

    def scribbling(**values: object) -> object:
        outputs = op.reference(**values)
        for name in op.consumed + op.written:
            values[name].data.fill_(7)  # type: ignore[attr-defined]
        return outputs

    first = results(op, op.reference, inputs, torch.float16)
    if not op.written:
        results(op, scribbling, inputs, torch.float16)
    torch.testing.assert_close(tensors, before, rtol=0, atol=0, equal_nan=True)
    again = results(op, op.reference, inputs, torch.float16)
    torch.testing.assert_close(again, first, rtol=0, atol=0, equal_nan=True)
    written = () if op.seen is not None else op.written
    wanted = {f"d_{name}" for name in op.differentiable} | set(written)
    assert wanted <= set(first) and any(torch.count_nonzero(t) for t in first.values())
