"""Flash attention over the packed projection, against the reference."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_proof import Mutant, assert_killed
from op_proof import DEVICE, far_rows, normal, prove, wide_slice
from torch import Tensor

from pythia_fast.kernels import attention as kernels
from pythia_fast.kernels import attention_bwd, attention_dq, reference
from pythia_fast.kernels.attention_tiles import DTYPES, HEAD_DIMS, long_first

# a GPU's products take 16 bits, so fp32 and its small bounds are for the interpreter
WIDE = DTYPES[0]
TESTED = [d for d in DTYPES if d != torch.bfloat16]
TESTED += [pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="fp32 bounds, or a mutant")

FORWARD, BACKWARD, DQ, TILES = (
    f"kernels/attention{part}.py" for part in ("", "_bwd", "_dq", "_tiles")
)
MUTANTS = [
    Mutant("a query sees the next key", FORWARD, "m = o_k[None, :] <= o_q[:, None]", "m = o_k[None, :] <= o_q[:, None] + 1"),
    Mutant("a query does not see itself", FORWARD, "m = o_k[None, :] <= o_q[:, None]", "m = o_k[None, :] < o_q[:, None]"),
    Mutant("accumulator not rescaled", TILES, "b_faded += (b_acc[i] * b_fade[:, None],)", "b_faded += (b_acc[i],)"),
    Mutant("sum not rescaled", TILES, "b_sum * b_fade + tl.sum", "b_sum + tl.sum"),
    Mutant("lse in base e", FORWARD, "b_max + tl.log2(b_sum)", "b_max + tl.log(b_sum)"),
    Mutant("unmasked diagonal", FORWARD, "T, scale_log2, True, D, PARTS,\n        )  # fmt: skip\n\n    tl.store(lse", "T, scale_log2, False, D, PARTS,\n        )  # fmt: skip\n\n    tl.store(lse"),
    Mutant("last query tile left out", FORWARD, "m_q = o_q < T\n    p_head", "m_q = o_q < T // BLOCK_M * BLOCK_M\n    p_head"),
    Mutant("head of the next batch row", FORWARD, "p_ctx = ctx + i_head // H * stride_ob", "p_ctx = ctx + (i_head // H + 1) % 2 * stride_ob"),
    Mutant("v read where k lies", FORWARD, "b_s, p_k + D, m_key, scale", "b_s, p_k, m_key, scale"),
    Mutant("documents ignored", FORWARD, "m = m & (o_k[None, :] >= b_start[:, None])", "m = m"),
    Mutant("a query before the key", BACKWARD, "m = o_k[:, None] <= o_q[None, :]", "m = o_k[:, None] <= o_q[None, :] + 1"),
    Mutant("delta not subtracted", BACKWARD, "dot_rows(b_v, b_grad) - b_delta[None, :]", "dot_rows(b_v, b_grad)"),
    Mutant("delta of another head", BACKWARD, "tl.store(delta + (i_b * H + i_h) * T + o_t", "tl.store(delta + (i_b * H + (i_h + 1) % H) * T + o_t"),
    Mutant("dk not scaled", BACKWARD, "b_x = b_dk[i] * scale", "b_x = b_dk[i]"),
    Mutant("dk not turned back", BACKWARD, "if cos is not None and i == 0:", "if cos is not None and i == 1:"),
    Mutant("dk and dv swapped", BACKWARD, "store_part(p_dk + D, b_dv[i]", "store_part(p_dk + D, b_dk[i]"),
    Mutant("dv turned back", BACKWARD, "store_part(p_dk + D, b_dv[i], m_k, i, PARTS)", "store_part(p_dk + D, rotate_back(b_dv[i], o_k, m_k, cos, sin, stride_cos, stride_sin, HALF) if i == 0 else b_dv[i], m_k, i, PARTS)"),
    Mutant("a maximum of 0 before any score", FORWARD, "tl.full((BLOCK_M,), LOWEST, tl.float32)", "tl.full((BLOCK_M,), 0.0, tl.float32)"),
    Mutant("first segment only", BACKWARD, "segments * BLOCK_N):", "T):"),
    Mutant("every key tile begins dq", BACKWARD, "begin_dq = (i_n == i_segment * BLOCK_N) & (dq_is_zero == 0)", "begin_dq = dq_is_zero == 0"),
    Mutant("no key tile begins dq", BACKWARD, "begin_dq = (i_n == i_segment * BLOCK_N) & (dq_is_zero == 0)", "begin_dq = i_n < 0"),
    Mutant("keys of a later document", BACKWARD, "m = m & (o_q[None, :] < b_end[:, None])", "m = m"),
    Mutant("document ends one early", BACKWARD, "at.repeat(len(doc_start), 1), right=True", "at.repeat(len(doc_start), 1), right=False"),
    Mutant("segments not added", DQ, "for _ in range(1, last):", "for _ in range(1, 1):"),
    Mutant("segments read before their first key", DQ, "last = tl.minimum(segments, ", "last = tl.maximum(segments, "),
    Mutant("dq not turned back", DQ, "b_x = tl.trans(b_sum)\n        if cos is not None and i == 0:", "b_x = tl.trans(b_sum)\n        if cos is not None and i == 1:"),
    Mutant("dq apart not scaled", DQ, "b_x = b_dq[i] * scale", "b_x = b_dq[i]"),
    Mutant("dq apart without delta", DQ, "m_key, PARTS)) - b_delta[:, None])", "m_key, PARTS)))"),
    Mutant("dq apart sees the next key", DQ, "m = o_k[None, :] <= o_q[:, None]", "m = o_k[None, :] <= o_q[:, None] + 1"),
    Mutant("rotated forward again", TILES, "rotate_pairs(b_1, b_2, b_cos, b_sin, True)", "rotate_pairs(b_1, b_2, b_cos, b_sin, False)"),
    Mutant("rest put back in the wrong order", TILES, "b_rest[len(b_rest) - 1 - i]", "b_rest[i]"),
    Mutant("halves of neighbours", TILES, "tl.split(tl.permute(b_pair, (0, 2, 1)))", "tl.split(tl.reshape(b_x, (b_x.shape[0], b_x.shape[1] // 2, 2)))"),
    Mutant("partner on the wrong side", TILES, "tl.where((o_d < HALF)[None, :], b_partner, -b_partner)", "tl.where((o_d < HALF)[None, :], -b_partner, b_partner)"),
    Mutant("second part of the head dim left out", TILES, "b_sum = tl.dot(b_a[i], tl.trans(b_b[i]), b_sum, ", "b_sum += 0 * tl.dot(b_a[i], tl.trans(b_b[i]), b_sum, "),
    Mutant("a full tile too many", TILES, "i_edge, i_end = i_m // BLOCK_N * BLOCK_N,", "i_edge, i_end = tl.cdiv(i_m + BLOCK_M, BLOCK_N) * BLOCK_N,"),
    Mutant("documents' full tiles begin early", TILES, "i_full = tl.cdiv(tl.load(p_start + i_end - 1), BLOCK_N) * BLOCK_N", "i_full = tl.load(p_start + i_end - 1) // BLOCK_N * BLOCK_N"),
]  # fmt: skip

# (B, T, H, D): every head dim of the suite, odd T, one and several tiles
SHAPES = [(1, 1, 2, 64), (2, 63, 2, 32), (1, 65, 3, 80), (2, 100, 1, 128), (1, 257, 2, 64), (1, 257, 1, 80), (1, 257, 1, 256)]  # fmt: skip


def inputs(batch: int, positions: int, heads: int, d: int, dtype: torch.dtype):
    """qkv (B, T, H, 3·D), a gradient (B, T, h), cos and sin (T + 3, R/2) fp32."""
    qkv = normal(batch, positions, heads, 3 * d, dtype=dtype)
    grad = normal(batch, positions, heads * d, dtype=dtype)
    angles = torch.rand(positions + 3, d // 8, device=DEVICE) * 6.3
    return qkv, grad, angles.cos(), angles.sin()


def documents(batch: int, positions: int, share: float = 0.03) -> Tensor:
    """(B, T) int32: a new document begins at a position with probability share."""
    begins = torch.rand(batch, positions) < share
    begins[:, 0] = True
    at = torch.arange(positions).expand(batch, positions)
    return torch.where(begins, at, 0).cummax(1).values.int().to(DEVICE)


def compare(op, qkv: Tensor, grad: Tensor, tables=(None, None), doc_start=None, **options) -> None:
    """op on a non-leaf copy of qkv (it may turn it in place) beside the reference."""

    def plain(leaf: Tensor) -> Tensor:
        wide = [None if t is None else t.to(torch.promote_types(leaf.dtype, t.dtype)) for t in tables]  # fmt: skip
        return reference.attention(leaf, *wide, doc_start)

    prove(lambda leaf: op(leaf * 1, *tables, doc_start, **options), plain, (qkv,), (grad,))


@contextmanager
def segments(count: int):
    """As many programs a head as asked for, whatever the device would take."""
    with mock.patch.object(attention_bwd, "_segments", lambda heads, tiles, sms: min(count, tiles)):
        yield


@pytest.mark.parametrize("dtype", TESTED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poison")
def test_attention(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    qkv, grad, *tables = inputs(*shape, dtype)
    compare(kernels.attention, qkv, grad, tables)


@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.usefixtures("poison")
def test_without_rotary(d: int) -> None:
    qkv, grad, *_ = inputs(1, 130, 2, d, WIDE)
    compare(kernels.attention, qkv, grad)


@pytest.mark.parametrize("table", [torch.float16, WIDE])
def test_tables_of_another_dtype(table: torch.dtype) -> None:
    qkv, grad, *tables = inputs(1, 33, 2, 64, WIDE)
    compare(kernels.attention, qkv, grad, [t.to(table) for t in tables])


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("d", [64, 80])
@pytest.mark.usefixtures("poison")
def test_segments_of_dq(count: int, d: int) -> None:
    """520 positions are five key tiles, shared by one, two or five programs a head."""
    qkv, grad, *tables = inputs(1, 520, 2, d, WIDE)
    with segments(count):
        compare(kernels.attention, qkv, grad, tables)


@pytest.mark.parametrize("d", [64, 256])
@pytest.mark.usefixtures("poison")
def test_gradient_in_any_order(d: int) -> None:
    qkv, grad, *tables = inputs(2, 257, 2, d, WIDE)
    compare(kernels.attention, qkv, grad, tables, deterministic=False)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(("d", "share"), [(64, 0.005), (64, 0.03), (80, 0.3), (256, 0.02)])
@pytest.mark.usefixtures("poison")
def test_documents(d: int, share: float, deterministic: bool) -> None:
    qkv, grad, *tables = inputs(2, 400, 1, d, WIDE)
    starts = documents(2, 400, share)
    with segments(2):
        compare(kernels.attention, qkv, grad, tables, starts, deterministic=deterministic)


@interpreted
def test_documents_are_separate_rows() -> None:
    """Two documents in a row attend as two rows would."""
    qkv, *_ = inputs(1, 200, 2, 64, WIDE)
    starts = torch.zeros(1, 200, dtype=torch.int32, device=DEVICE)
    starts[:, 77:] = 77
    both = kernels.attention(qkv, doc_start=starts)
    apart = [kernels.attention(part.contiguous()) for part in qkv.split((77, 123), dim=1)]
    torch.testing.assert_close(both, torch.cat(apart, dim=1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("d", HEAD_DIMS)
def test_tiles_of_smaller_chips(d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (kernels, attention_bwd, attention_dq):
        monkeypatch.setattr(module, "tile_on", lambda device, tiles: tiles[1])
    qkv, grad, *tables = inputs(1, 150, 2, d, WIDE)
    compare(kernels.attention, qkv, grad, tables)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    positions=st.integers(1, 150),
    heads=st.integers(1, 3),
    d=st.sampled_from((32, 64, 80)),
    share=st.sampled_from((None, 0.05, 0.5)),
    count=st.integers(1, 3),
)
def test_any_shape(batch, positions, heads, d, share, count) -> None:
    qkv, grad, *tables = inputs(batch, positions, heads, d, WIDE)
    starts = None if share is None else documents(batch, positions, share)
    with segments(count):
        compare(kernels.attention, qkv, grad, tables, starts)


def check(module: ModuleType) -> None:
    """`module` stands in for the real one; all head dims' ways, several tiles, documents."""
    real = {"attention": kernels, "attention_bwd": attention_bwd, "attention_dq": attention_dq}
    name = module.__name__.rpartition(".")[2].removesuffix("_mutant")
    own = {
        k: v
        for k, v in vars(module).items()
        if getattr(getattr(v, "fn", v), "__module__", "") == module.__name__
    }
    patches = [
        mock.patch.object(user, k, v)
        for user in real.values()
        for k, v in own.items()
        if user is not real.get(name) and k in vars(user)
    ]
    if "_segments" in own:
        patches.append(mock.patch.object(module, "_segments", lambda heads, tiles, sms: 2))
    for patch in patches:
        patch.start()
    op = module.attention if name == "attention" else kernels.attention
    try:
        qkv, grad, *tables = inputs(2, 40, 1, 64, WIDE)
        qkv[..., 0], qkv[..., 64] = 60.0, -60.0  # scores near −450: 2^(score) is 0 in fp32
        compare(op, qkv, grad)
        for d in (64, 80, 256):
            qkv, grad, *tables = inputs(2, 257, 2 if d == 64 else 1, d, WIDE)
            with segments(2), poisoned_empty():
                compare(op, qkv, grad, tables)
                compare(op, qkv, grad, tables, documents(2, 257, 0.01))
    finally:
        for patch in patches:
            patch.stop()


def far_and_near(op) -> None:
    """Rows 2³⁰ elements apart and side by side: the same bits, forward and backward."""
    near = normal(3, 1, 1, 192, dtype=torch.float16)
    far = far_rows(near.view(3, 192)).view(3, 1, 1, 192)
    results = []
    for qkv in (near, far):
        ctx, lse = op.__globals__["attention_fwd"](qkv)
        results.append((ctx, op.__globals__["attention_bwd"](qkv, ctx, lse, ctx)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@contextmanager
def poisoned_empty():
    empty = torch.empty

    def nan(*size, **options):
        t = empty(*size, **options)
        return t.fill_(float("nan")) if t.is_floating_point() else t

    with mock.patch.object(torch, "empty", nan):
        yield


@pytest.mark.parametrize("module", [kernels, attention_bwd, attention_dq])
def test_check_passes(module: ModuleType) -> None:
    check(module)


@interpreted
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_is_killed(mutant: Mutant, tmp_path: Path) -> None:
    assert_killed(mutant, check, tmp_path)


def strided(t: Tensor) -> Tensor:
    """t (B, T, ...) inside a NaN buffer with time outermost and room between its rows."""
    batch, positions = t.shape[:2]
    row = t[0, 0].numel()
    buffer = torch.full((positions, batch, row + 48), float("nan")).to(t.device, t.dtype)
    view = buffer[..., 16 : 16 + row].unflatten(-1, t.shape[2:]).transpose(0, 1)
    return view.copy_(t)


@interpreted
@pytest.mark.parametrize("d", [64, 256])
@pytest.mark.usefixtures("poison")
def test_strides_of_every_argument(d: int) -> None:
    """qkv with time outermost; ctx and its gradient as columns of buffers of row stride 5h + 48."""
    qkv, grad, cos, sin = inputs(2, 70, 2, d, WIDE)
    rotated = reference.rotary(qkv, cos, sin)
    wide = wide_slice(torch.zeros(2, 70, 2 * d, device=DEVICE), before=2 * d, after=6 * d + 48)
    out, lse = kernels.attention_fwd(strided(rotated), out=wide)
    assert out.data_ptr() == wide.data_ptr() and out.stride(1) == 10 * d + 48
    assert wide._base is not None and torch.isnan(wide._base[..., : 2 * d]).all()
    d_qkv = attention_bwd.attention_bwd(
        strided(rotated), out, lse, wide_slice(grad, before=16), cos, sin
    )
    leaf = qkv.double().requires_grad_()
    exact = reference.attention(leaf, cos.double(), sin.double())
    torch.testing.assert_close(out, exact.float(), atol=2e-6, rtol=1e-5)
    exact.backward(grad.double())
    torch.testing.assert_close(d_qkv, leaf.grad.float(), atol=1e-5, rtol=1e-5)


@interpreted
def test_lse_is_the_log2_of_the_softmax_sum() -> None:
    qkv, *_ = inputs(1, 70, 2, 64, WIDE)
    q, k, _ = (t.double().transpose(1, 2) for t in qkv.chunk(3, dim=-1))
    scores = (q @ k.mT / 8).masked_fill(~torch.ones(70, 70).tril().bool().to(DEVICE), -torch.inf)
    _, lse = kernels.attention_fwd(qkv)
    expected = scores.logsumexp(-1) / torch.log(torch.tensor(2.0).double())
    torch.testing.assert_close(lse.double(), expected, atol=1e-5, rtol=0)


@interpreted
@pytest.mark.parametrize("large", [30.0, 100.0])
def test_scores_of_any_size(large: float) -> None:
    """Scores far apart: the running maximum must follow them, and nothing may overflow.

    lse has 24 bits, so P errs by |lse|·2⁻²⁵ relative: at scores of thousands that shows.
    """
    qkv, grad, *_ = inputs(1, 150, 1, 64, WIDE)
    qkv[..., :128] *= large**0.5
    compare(kernels.attention, qkv, grad)


def test_two_runs_are_equal_bit_for_bit() -> None:
    qkv, grad, *tables = inputs(2, 300, 2, 80, torch.float16)
    results = []
    for _ in range(2):
        leaf = qkv.clone().requires_grad_()
        out = kernels.attention(leaf * 1, *tables)
        results.append((out, *torch.autograd.grad(out, leaf, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@interpreted
def test_turns_qkv_in_place_and_autograd_sees_it() -> None:
    qkv, _, *tables = inputs(1, 9, 2, 64, WIDE)
    x = qkv.clone().requires_grad_() * 1
    y = x * x
    kernels.attention(x, *tables)
    torch.testing.assert_close(x, reference.rotary(qkv, *tables))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@interpreted
def test_gradient_through_a_view_of_the_projection() -> None:
    """As a model has it: a linear layer's output viewed as heads, then turned in place."""
    x, weight = (normal(n, 96, dtype=WIDE, scale=0.3) for n in (10, 384))
    x = x.view(2, 5, 96)
    _, grad, cos, sin = inputs(2, 5, 2, 64, WIDE)

    def run(op, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
        packed = torch.nn.functional.linear(*leaves).unflatten(-1, (2, 192))
        return torch.autograd.grad(op(packed, cos.to(dtype), sin.to(dtype)), leaves, grad.to(dtype))

    pairs = zip(
        run(kernels.attention, WIDE),
        run(reference.attention, torch.float64),
        strict=True,
    )
    assert all((a - e).abs().max() <= 1e-5 * e.abs().max() for a, e in pairs)


def test_without_tables_qkv_keeps_its_bits() -> None:
    qkv, grad, *_ = inputs(1, 9, 2, 64, WIDE)
    leaf = qkv.clone().requires_grad_()
    kernels.attention(leaf).backward(grad)
    assert torch.equal(leaf.detach(), qkv) and leaf.grad is not None


def test_the_gradient_given_is_not_written() -> None:
    qkv, grad, *tables = inputs(1, 9, 2, 64, WIDE)
    kept, leaf = grad.clone(), qkv.clone().requires_grad_()
    kernels.attention(leaf * 1, *tables).backward(grad)
    assert torch.equal(grad, kept)


def test_reference_passes_gradcheck() -> None:
    qkv, _, cos, sin = inputs(2, 5, 2, 32, torch.float64)
    starts = documents(2, 5, 0.4)
    for doc_start in (None, starts):
        leaf = qkv.clone().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, d=doc_start: reference.attention(x, cos.double(), sin.double(), d), leaf
        )


def test_offsets_beyond_32_bits() -> None:
    far_and_near(kernels.attention)


@triton.jit
def _order_kernel(out, TILES, heads, GROUP):
    i_tile, i_head = long_first(TILES, heads, GROUP)
    tl.store(out + 2 * tl.program_id(0), i_tile)
    tl.store(out + 2 * tl.program_id(0) + 1, i_head.to(tl.int32))


@pytest.mark.parametrize(("tiles", "heads", "group"), [(5, 7, 3), (1, 4, 10), (3, 6, 6)])
def test_every_program_has_work_of_its_own(tiles: int, heads: int, group: int) -> None:
    """Each (tile, head) once; the heads of a group before the next, its long tiles first."""
    out = torch.full((tiles * heads, 2), -1, dtype=torch.int32, device=DEVICE)
    _order_kernel[(tiles * heads,)](out=out, TILES=tiles, heads=heads, GROUP=group)
    seen = [tuple(pair) for pair in out.tolist()]
    expected = [
        (tile, head)
        for first in range(0, heads, group)
        for tile in range(tiles)
        for head in range(first, min(first + group, heads))
    ]
    assert seen == expected


@pytest.mark.parametrize("heads", [1, 8, 128, 256, 320, 4096])
def test_segments_fill_the_device(heads: int) -> None:
    """On 132 SMs the waves of programs waste at most a fifth of the SMs, with few segments."""
    count = attention_bwd._segments(heads, 16, 132)
    assert 1 <= count <= 16
    waves = -(-heads * count // 132)
    assert heads * count >= 0.8 * 132 * waves or heads < 8
    assert count == 1 or heads < 1000


def test_a_refused_call_leaves_qkv() -> None:
    qkv, _, *tables = inputs(2, 5, 4, 64, WIDE)
    kept = qkv.clone()
    for arguments, error in (
        ((*tables, documents(2, 5).long()), "doc_start: dtype"),
        ((tables[0][:4], tables[1]), "cos: shape"),
    ):
        with pytest.raises((TypeError, ValueError), match=error):
            kernels.attention(qkv, *arguments)
    assert torch.equal(qkv, kept)


def test_rotary_dims_beyond_the_first_part() -> None:
    """At D = 80 the first 64 dims can turn (R = 20 in the suite); all of 64 at D = 64."""
    qkv, grad, *_ = inputs(1, 9, 1, 80, WIDE)
    for half, taken in ((32, True), (36, False), (40, False)):
        tables = [t(torch.rand(9, half, device=DEVICE)) for t in (torch.cos, torch.sin)]
        if taken:
            compare(kernels.attention, qkv, grad, tables)
        else:
            with pytest.raises(ValueError, match=f"cos: {2 * half} rotary dims of 80"):
                kernels.attention(qkv, *tables)
    qkv, grad, *_ = inputs(1, 9, 1, 64, WIDE)
    for half in (1, 5, 32):
        tables = [t(torch.rand(9, half, device=DEVICE)) for t in (torch.cos, torch.sin)]
        compare(kernels.attention, qkv, grad, tables)


def test_empty_batch() -> None:
    tables = [torch.ones(4, 8, device=DEVICE)] * 2
    leaf = torch.zeros(0, 4, 2, 192, device=DEVICE, requires_grad=True)
    out = kernels.attention(leaf * 1, *tables)
    out.sum().backward()
    assert out.shape == (0, 4, 128) and leaf.grad is not None and leaf.grad.shape == leaf.shape


def test_bad_input_names_the_argument() -> None:
    qkv, grad, cos, sin = inputs(2, 5, 4, 64, WIDE)
    with pytest.raises(ValueError, match="qkv: a leaf that requires grad"):
        kernels.attention(qkv.clone().requires_grad_(), cos, sin)
    with pytest.raises(ValueError, match="cos, sin: both or neither"):
        kernels.attention(qkv, cos)
    with pytest.raises(ValueError, match="qkv: head dim 48, not one of 32, 64, 80, 128, 256"):
        kernels.attention(normal(1, 5, 2, 144, dtype=WIDE))
    with pytest.raises(ValueError, match="T must be at least 1"):
        kernels.attention(qkv[:, :0])
    with pytest.raises(TypeError, match="qkv: dtype float64"):
        kernels.attention(qkv.double())
    with pytest.raises(ValueError, match="heads must lie 192 elements apart"):
        kernels.attention(qkv[:, :, ::2])
    with pytest.raises(ValueError, match="cos: shape"):
        kernels.attention(qkv, cos[:4], sin)
    with pytest.raises(TypeError, match="doc_start: dtype int64, not int32"):
        kernels.attention(qkv, doc_start=documents(2, 5).long())
    with pytest.raises(ValueError, match="doc_start: shape"):
        kernels.attention(qkv, doc_start=documents(2, 4))
    with pytest.raises(ValueError, match="doc_start: strides"):
        kernels.attention(qkv, doc_start=documents(5, 2).t())
    if DEVICE == "cpu":
        for values in ([-1, 0, 0], [0, 2, 2], [0, 1, 0]):
            with pytest.raises(ValueError, match="doc_start: must be nondecreasing"):
                kernels.attention(qkv[:1, :3], doc_start=torch.tensor([values]).int())
    view = qkv.clone().requires_grad_()[..., :]
    with pytest.raises(ValueError, match="qkv: a leaf that requires grad"):
        kernels.attention(view, cos, sin)
    crossed = torch.empty(1000, device=DEVICE).as_strided((2, 3, 1, 192), (192, 192, 192, 1))
    with pytest.raises(ValueError, match="overlap"):
        kernels.attention(crossed)
    ctx, lse = kernels.attention_fwd(qkv)
    with pytest.raises(ValueError, match="lse: strides"):
        attention_bwd.attention_bwd(qkv, ctx, lse.transpose(0, 1).contiguous().transpose(0, 1), ctx)
    with pytest.raises(ValueError, match="cos, sin: both or neither"):
        attention_bwd.attention_bwd(qkv, ctx, lse, ctx, cos)
    with pytest.raises(ValueError, match="out: shape"):
        kernels.attention_fwd(qkv, out=grad[..., 1:])
    with pytest.raises(ValueError, match="out: shares memory with qkv"):
        kernels.attention_fwd(qkv, out=qkv.flatten(-2)[..., :256])
    with pytest.raises(TypeError, match="d_ctx: dtype float16, not float32"):
        attention_bwd.attention_bwd(qkv, *kernels.attention_fwd(qkv), grad.half())
    with pytest.raises(ValueError, match="lse: shape"):
        attention_bwd.attention_bwd(qkv, grad, torch.zeros(2, 5, 4, device=DEVICE), grad)
    far = far_rows(normal(3, 192, dtype=torch.float16)).view(1, 3, 1, 192)
    with pytest.raises(ValueError, match="a row must span less than 2\\^31"):
        kernels.attention_fwd(far)


@pytest.mark.slow
@interpreted
def test_sixteen_thousand_positions() -> None:
    """The longest row that is asked for, one head, forward and backward."""
    qkv, grad, *tables = inputs(1, 16384, 1, 32, WIDE)
    compare(kernels.attention, qkv, grad, tables)
