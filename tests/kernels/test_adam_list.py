"""AdamW over a list against `adamw_` tensor by tensor, and mutants that must die."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from kernel_proof import Mutant, assert_killed
from op_proof import BF16, DEVICE, scalar
from torch import Tensor

from pythia_fast.kernels import adam, aot, reference
from pythia_fast.kernels import adam_list as kernels

FILE = "kernels/adam_list.py"
MUTANTS = [
    Mutant("every chunk is the first", FILE, "+ 1).to(tl.int64) * CHUNK", "+ 1).to(tl.int64) * 0"),
    Mutant("decay flag ignored", FILE, "weight_decay * tl.load(p_row + 6).to(tl.float32)", "weight_decay"),
    Mutant("tail tile left out", FILE, "tl.minimum(n - i_chunk, CHUNK).to(tl.int32), BLOCK", "tl.minimum(n - i_chunk, CHUNK).to(tl.int32) // BLOCK * BLOCK, BLOCK"),
    Mutant("chunks counted over all tensors", FILE, "torch.arange(len(tensor)) - first", "torch.arange(len(tensor))"),
    Mutant("one chunk of each tensor", FILE, "(sizes + CHUNK - 1) // CHUNK", "sizes.clamp(max=1)"),
]  # fmt: skip


def list_inputs(sizes: list[int]) -> tuple[list[list[Tensor]], list[bool]]:
    """[masters, exp_avgs, exp_avg_sqs, grads] of shapes (1, n), and alternating decay."""
    of_kind = [[torch.randn(1, n, device=DEVICE) for n in sizes] for _ in range(4)]
    of_kind[2] = [t.square() for t in of_kind[2]]
    return of_kind, [i % 2 == 0 for i in range(len(sizes))]


def flatten(state: list[list[Tensor]]) -> list[Tensor]:
    return [tensor for kind in state for tensor in kind]


def check_list(module: ModuleType, weight_dtype: torch.dtype | None = torch.float16) -> None:
    """Bit for bit what `adamw_` gives, tensor by tensor; sizes around the tile and the chunk."""
    sizes = [1, 1023, 1024, 5, 0, module.CHUNK, module.CHUNK + 1025]
    state, decays = list_inputs(sizes)
    scalars = (scalar(1e-2), scalar(3), scalar(0.5))
    flat = [[t.clone() for t in kind] for kind in state]
    weights = (
        None
        if weight_dtype is None
        else [torch.zeros_like(t, dtype=weight_dtype) for t in state[0]]
    )
    module.adamw_list_(weights, *state, decays, *scalars)
    for i, decay in enumerate(decays):
        weight = None if weights is None else torch.zeros_like(weights[i]).view(-1)
        own = [kind[i].view(-1) for kind in flat]
        adam.adamw_(weight, *own, sizes[i] if decay else 0, *scalars)
        for actual, expected in zip(state, flat, strict=True):
            assert torch.equal(actual[i], expected[i])
        if weights is not None:
            assert torch.equal(weights[i].view(-1), weight)


def check(module: ModuleType) -> None:
    torch.manual_seed(0)
    check_list(module)


@pytest.mark.usefixtures("poison")
def test_check_passes() -> None:
    check(kernels)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_is_killed(mutant: Mutant, tmp_path: Path) -> None:
    assert_killed(mutant, check, tmp_path)


@pytest.mark.parametrize("weight_dtype", [None, torch.float16, BF16])
def test_like_flat_buffers(weight_dtype: torch.dtype | None) -> None:
    check_list(kernels, weight_dtype)


def test_like_reference_and_the_table_follows_the_addresses() -> None:
    """The same lists twice, then a gradient at another address: no stale table."""
    state, decays = list_inputs([40, 7])
    expected = [[t.double() for t in kind] for kind in state]
    for t in range(1, 4):
        if t == 3:
            for kind, of in ((state, torch.float32), (expected, torch.float64)):
                kind[3] = [g.to(of, copy=True) * 2 for g in kind[3]]
        scalars = (scalar(1e-2), scalar(t), scalar(0.5))
        kernels.adamw_list_(None, *state, decays, *scalars)
        reference.adamw_list_(None, *expected, decays, *scalars)
    for actual, exact in zip(state, expected, strict=True):
        for a, e in zip(actual, exact, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-7)


def test_an_unaligned_view() -> None:
    buffer = torch.randn(101, device=DEVICE)
    states = [[buffer[1:].clone()] for _ in range(4)]
    unaligned = [[torch.cat((t[0][:1], t[0]))[1:]] for t in states]
    for kinds in (states, unaligned):
        kinds[2][0].abs_()
        kernels.adamw_list_(None, *kinds, [True], scalar(0.1), scalar(1), scalar(1))
    assert unaligned[0][0].data_ptr() % 16 != 0
    assert all(torch.equal(a[0], b[0]) for a, b in zip(states, unaligned, strict=True))


def test_full_tiles_are_128_bit() -> None:
    """Its pointers come from memory, so their alignment must have been told to the compiler."""
    pytest.importorskip("triton.backends.nvidia")
    case = "adam_list: weights bf16"
    (row,) = aot.compile_all([kernels.__name__], ["sm_90"], only=case, workers=1)
    wide = kernels.BLOCK // (32 * kernels.WARPS * 4)  # accesses a thread and fp32 stream
    assert row["violations"] == []
    assert row["accesses"]["?"]["ld128"] == 4 * wide
    assert row["accesses"]["?"]["st128"] == 3 * wide + wide // 2


def test_kept_list_is_one_step_after_another() -> None:
    """What a graph replays: the same table, other values at the same addresses."""
    sizes = [40, 0, kernels.CHUNK + 3]
    state, decays = list_inputs(sizes)
    other = [[t.clone() for t in kind] for kind in state]
    kept = kernels.AdamWList(None, *state, decays)
    for t in range(1, 4):
        scalars = (scalar(1e-2), scalar(t), scalar(0.5))
        for mine, theirs in zip(state[3], other[3], strict=True):
            mine.copy_(theirs.mul_(-0.7))
        kept.step_(*scalars)
        kernels.adamw_list_(None, *other, decays, *scalars)
    assert all(map(torch.equal, flatten(state), flatten(other)))


def test_chunks_of_every_tensor() -> None:
    n = kernels.CHUNK
    chunks = kernels._chunks(torch.tensor([1, n, n + 1, 3 * n, 5]))
    assert chunks.dtype == torch.int32
    assert chunks.tolist() == [[0, 0], [1, 0], [2, 0], [2, 1], [3, 0], [3, 1], [3, 2], [4, 0]]


def test_table_is_not_made_during_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    state, decays = list_inputs([40, 7])
    scalars = (scalar(1e-2), scalar(1), scalar(1))
    kept = kernels.AdamWList(None, *state, decays)
    before = state[0][0].clone()
    monkeypatch.setattr(kernels, "_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="CUDA graph cannot capture; make an AdamWList before"):
        kernels.adamw_list_(None, *state, decays, *scalars)
    assert torch.equal(state[0][0], before)
    kept.step_(*scalars)
    assert not torch.equal(state[0][0], before)


@pytest.mark.gpu
def test_kept_list_in_a_cuda_graph() -> None:
    state, decays = list_inputs([40, kernels.CHUNK + 3])
    expected = [[t.clone() for t in kind] for kind in state]
    lr, step, scale = scalar(1e-2), scalar(1), scalar(0.5)
    kept = kernels.AdamWList(None, *state, decays)
    kernels.adamw_list_(None, *([t.clone() for t in kind] for kind in state), decays, lr, step, scale)  # fmt: skip
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(RuntimeError, match="CUDA graph"):
            kernels.adamw_list_(None, *state, decays, lr, step, scale)
        kept.step_(lr, step, scale)
    for t in (1, 2, 3):
        step.fill_(t)
        graph.replay()
        kernels.adamw_list_(None, *expected, decays, lr, scalar(t), scale)
    assert all(map(torch.equal, flatten(state), flatten(expected)))


def test_empty() -> None:
    empty = [torch.zeros(0, device=DEVICE) for _ in range(4)]
    one = scalar(1.0)
    kernels.adamw_list_(None, [], [], [], [], [], one, one, one)
    kernels.adamw_list_(None, *([t] for t in empty), [True], one, one, one)


def test_bad_input_names_the_argument() -> None:
    p, m, v, g = (torch.zeros(8, device=DEVICE) for _ in range(4))
    one = scalar(1.0)
    with pytest.raises(ValueError, match="grads: 1 entries, masters has 2"):
        kernels.adamw_list_(None, [p, p], [m, m], [v, v], [g], [True, True], one, one, one)
    with pytest.raises(TypeError, match=r"grads\[1\]: dtype"):
        lists = ([p, p], [m, m], [v, v], [g, g.bfloat16()])
        kernels.adamw_list_(None, *lists, [True, True], one, one, one)
    with pytest.raises(ValueError, match="two share memory"):
        kernels.adamw_list_(None, [p, p], [m, m], [v, v], [g, g], [True, True], one, one, one)
    with pytest.raises(ValueError, match=r"exp_avgs\[1\]: shape"):
        kernels.adamw_list_(None, [p, p], [m, m[:3]], [v, v], [g, g], [True, True], one, one, one)
