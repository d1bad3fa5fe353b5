"""The fused block and head against float64 layers, in a trainer, and what they allocate."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tiny_run
import torch
from kernel_proof import Mutant, assert_close, assert_killed, assert_sound
from op_proof import Allocations
from tiny_run import train_stopping_at
from torch import Tensor

import pythia_fast.block as real
import pythia_fast.train as trainer
from pythia_fast import checkpoint, hf
from pythia_fast.config import Model, Precision, load
from pythia_fast.config import Optimizer as OptimizerConfig
from pythia_fast.model import Pythia, materialise
from pythia_fast.ops import REFERENCE, select
from pythia_fast.optim import AdamW
from pythia_fast.plan import activation_bytes

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is for machines without a GPU"
)
CPU = torch.device("cpu")
ROWS, T, VOCABULARY = 2, 21, 50
PRECISION = {torch.float32: "fp32", torch.float16: "fp16"}

# --- a model on the fused block, and the same weights in torch ------------------------------------


def make(c: Model, dtype: torch.dtype, module: ModuleType = real) -> tuple[Pythia, AdamW]:
    """A fused model whose every parameter is random, and the optimizer that owns it."""
    ops = select("triton", CPU)
    model = Pythia(c, ops)
    precision = Precision(compute=PRECISION[dtype], gradients="fp32")  # type: ignore[arg-type]
    optimizer = AdamW(model, OptimizerConfig(), precision, ops, CPU)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            centre, spread = ("norm.weight" in name), 0.5 if p.ndim == 1 else p.shape[1] ** -0.5
            p.copy_(centre + spread * torch.randn(p.shape))
    optimizer.sync_weights(from_model=True)
    optimizer.grad.fill_(float("nan"))  # the first microbatch overwrites
    model.fused = module.Fused(model, optimizer)
    return model, optimizer


def twin(model: Pythia, dtype: torch.dtype) -> Pythia:
    other = Pythia(model.config, REFERENCE)
    materialise(other, CPU, dtype)
    with torch.no_grad():
        for (_, p), (_, q) in zip(other.named_parameters(), model.named_parameters(), strict=True):
            p.copy_(q)
    return other


def microbatches(dtype: torch.dtype, hidden: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(6)
    return [
        (torch.randn(ROWS, T, hidden).to(dtype), torch.randn(ROWS, T, hidden).to(dtype))
        for _ in range(2)
    ]


def through(model: Pythia, optimizer: AdamW | None, pairs: list[tuple[Tensor, Tensor]]):  # type: ignore[no-untyped-def]
    """Outputs and dx of each microbatch through the blocks, then the layers' summed gradients."""
    dtype = model.embed_out.weight.dtype
    blocks = model.blocks(T, CPU)
    results: dict[str, Tensor] = {}
    for i, (x, dy) in enumerate(pairs):
        leaf = x.to(dtype, copy=True).requires_grad_()
        y = leaf
        for block in blocks:
            y = block(y)
        y.backward(dy.to(dtype))
        assert leaf.grad is not None
        results |= {f"y{i}": y.detach(), f"dx{i}": leaf.grad}
        if optimizer is not None:
            optimizer.fresh = False
    for name, p in model.gpt_neox.layers.named_parameters():
        if optimizer is None:
            assert p.grad is not None
            results[name] = p.grad
        else:
            assert p.grad is None
            results[name] = optimizer.views(optimizer.grad)[f"gpt_neox.layers.{name}"]
    return results


def check_block(
    module: ModuleType,
    hidden: int = 64,
    dtype: torch.dtype = torch.float32,
    form: str = "gelu_tanh",
) -> None:
    """Two blocks, two microbatches: y, dx and every weight gradient against float64."""
    c = Model(layers=2, hidden=hidden, heads=2, vocab_size=VOCABULARY, activation=form)  # type: ignore[arg-type]
    model, optimizer = make(c, dtype, module)
    pairs = microbatches(dtype, hidden)
    actual = through(model, optimizer, pairs)
    same = through(twin(model, dtype), None, pairs)
    exact = through(twin(model, torch.float64), None, pairs)
    for name, expected in exact.items():
        if name[:-1] not in ("y", "dx"):
            assert actual[name].dtype == torch.float32
        assert_close(actual[name], same[name], expected, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "hidden,form", [(64, "gelu_tanh"), (128, "gelu"), (160, "gelu_tanh")], ids=str
)
@pytest.mark.usefixtures("poison")
def test_block_equals_float64(hidden: int, form: str, dtype: torch.dtype) -> None:
    """Head dims 32, 64 and 80; 21 positions."""
    check_block(real, hidden, dtype, form)


FILE = "pythia_fast/block.py"
BLOCK_MUTANTS = [
    Mutant("residual gradient lost", FILE, "            x, dy, d_norms, weights", "            x, None, d_norms, weights"),
    Mutant("residual lost", FILE, "_rows(y).addmm_(_rows(both), w.out.t())", "_rows(y).addmm_(_rows(both), w.out.t(), beta=0)"),
    Mutant("halves of [Wo W2] swapped", FILE, "_make([*first, joined(dense, mlp_out),", "_make([*first, joined(dense, mlp_out).roll(-dense.shape[1], 1),"),
    Mutant("gradients' halves swapped", FILE, "d_gelu = _rows(d_both)[:, inner:]", "d_gelu = _rows(d_both)[:, :-inner]"),
    Mutant("bias twice", FILE, "_rows(y).addmm_(", "_rows(y.add_(w.mlp_out_bias)).addmm_("),
    Mutant("MLP bias in the product too", FILE, "u = torch.mm(_rows(n2), w.mlp.t())", "u = torch.addmm(w.mlp_bias, _rows(n2), w.mlp.t())"),
    Mutant("norms feed the wrong branches", FILE, "(n1, n2), mean, rstd = layer", "(n2, n1), mean, rstd = layer"),
    Mutant("second microbatch overwrites a product", FILE, "accumulate(g.qkv, d_qkv.t(), _rows(n1), add)", "accumulate(g.qkv, d_qkv.t(), _rows(n1), False)"),
    Mutant("second microbatch overwrites vectors", FILE, "torch._foreach_add_ if add else", "torch._foreach_copy_ if add else"),
    Mutant("the first microbatch adds", FILE, "not block.sums.fresh", "True"),
    Mutant("keys not turned back", FILE, "lse, d_ctx, cos, sin).view", "lse, d_ctx).view"),
    Mutant("top's bias gradient from below", FILE, "above.below, below.is_top = below, False", "above.below, below.is_top = above, False"),
    Mutant("bias gradients of the block itself", FILE, "[block.below.grads.attention_out_bias, block.below", "[block.grads.attention_out_bias, block.below"),
    Mutant("wrong GELU", FILE, "    gelu_fwd(u, w.mlp_bias, block.approximate, out=_rows(both)[:, inner:])\n\n    if", "    gelu_fwd(u, w.mlp_bias, \"none\", out=_rows(both)[:, inner:])\n\n    if"),
]  # fmt: skip


def test_the_block_passes_where_its_mutants_fail() -> None:
    assert_sound(BLOCK_MUTANTS, check_block)


@pytest.mark.parametrize("mutant", BLOCK_MUTANTS, ids=lambda m: m.name)
def test_mutants_of_the_block_are_killed(mutant: Mutant, tmp_path: Path) -> None:
    assert_killed(mutant, check_block, tmp_path)


def kept_bytes(model: Pythia, x: Tensor) -> int:
    """Storage that the first block holds for its backward, tables and statistics left out."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.numel() >= x.numel():
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model.blocks(x.shape[1], CPU)[0](x)
    del y
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.usefixtures("poison")
def test_recomputed_equals_kept_to_the_bit_and_keeps_less(dtype: torch.dtype) -> None:
    c = Model(layers=2, hidden=64, heads=2, vocab_size=VOCABULARY)
    results, kept = [], []
    for recompute in (False, True):
        model, optimizer = make(c, dtype)
        assert model.fused is not None
        for block in model.fused.blocks:
            block.recompute = recompute
        results.append(through(model, optimizer, microbatches(dtype, 64)))
        kept.append(kept_bytes(model, torch.randn(1, T, 64).to(dtype).requires_grad_()))
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected), name
    one = Model(layers=1, hidden=64, heads=2)
    planned = [activation_bytes(one, selective) * T for selective in (False, True)]
    assert kept == [n * dtype.itemsize // 2 for n in planned]


def test_matrices_that_lie_apart_are_refused() -> None:
    whole = torch.zeros(4, 20)
    assert real.joined(whole[:, :4], whole[:, 4:]).shape == (4, 20)
    for left, right in (
        (whole[:, 4:8], whole[:, 8:]),
        (whole[:, :4], whole[:, 8:]),
        (torch.zeros(4, 4), torch.zeros(4, 16)),
    ):
        with pytest.raises(ValueError, match="not the columns of one"):
            real.joined(left, right)


# --- the whole model ------------------------------------------------------------------------------


def losses_and_gradients(model: Pythia, optimizer: AdamW | None) -> dict[str, Tensor]:
    """Two microbatches of next-token loss; the gradients of all parameters, summed."""
    torch.manual_seed(7)
    results = {}
    for i in range(2):
        rows = torch.randint(VOCABULARY, (ROWS, T + 1))
        loss = model.loss(rows, scale=0.5 / (ROWS * T))
        loss.backward()
        results[f"loss{i}"] = loss.detach()
        if optimizer is not None:
            optimizer.accumulate()
    for name, p in model.named_parameters():
        grad = p.grad if optimizer is None else optimizer.views(optimizer.grad)[name]
        assert grad is not None
        results[name] = grad
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_gradient_of_the_model_equals_float64(dtype: torch.dtype) -> None:
    c = Model(layers=2, hidden=64, heads=2, vocab_size=VOCABULARY)
    model, optimizer = make(c, dtype)
    actual = losses_and_gradients(model, optimizer)
    same = losses_and_gradients(twin(model, dtype), None)
    exact = losses_and_gradients(twin(model, torch.float64), None)
    for name, expected in exact.items():
        assert_close(actual[name], same[name], expected, name)


def check_model(module: ModuleType) -> None:
    c = Model(layers=1, hidden=64, heads=2, vocab_size=VOCABULARY)
    model, optimizer = make(c, torch.float32, module)
    actual = losses_and_gradients(model, optimizer)
    same = losses_and_gradients(twin(model, torch.float32), None)
    for name, expected in losses_and_gradients(twin(model, torch.float64), None).items():
        assert_close(actual[name], same[name], expected, name)


MODEL_MUTANTS = [
    Mutant("the second microbatch overwrites the embedding's", FILE, "dx, ids, not fused.sums.fresh)", "dx, ids, False)"),
    Mutant("the first adds to it", FILE, "dx, ids, not fused.sums.fresh)", "dx, ids, True)"),
    Mutant("the second overwrites the head's", FILE, "add = not self.sums.fresh", "add = False"),
    Mutant("head and embedding swapped", FILE, "(self.head_grad,) = sums", "self.head_grad = self.embedding_grad\n            (self.embedding_grad,) = sums"),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MODEL_MUTANTS, ids=lambda m: m.name)
def test_mutants_of_embedding_and_head_are_killed(mutant: Mutant, tmp_path: Path) -> None:
    assert_sound([mutant], check_model)
    assert_killed(mutant, check_model, tmp_path)


@pytest.mark.parametrize("fused", [True, False])
def test_the_logits_exist_once(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their gradient takes their place: autograd makes no copy, forward or backward."""
    monkeypatch.setattr("pythia_fast.kernels.cross_entropy.check_targets", lambda *_: None)
    c = Model(layers=1, hidden=64, heads=2, vocab_size=1000)  # more columns than any activation
    model, _ = make(c, torch.float32)
    if not fused:
        model.fused = None
    rows = torch.randint(1000, (4, T + 1))
    with Allocations() as made:
        model.loss(rows).backward()
    logits = 4 * T * 1000 * 4
    weight = 1000 * 64 * 4
    assert [size for size in made.sizes if size > weight] == [logits]


# --- the trainer ----------------------------------------------------------------------------------

FLAGS = ["--model.hidden", "64", "--kernels.backend", "triton"]


def test_resumed_in_the_middle_equals_uninterrupted(tmp_path: Path) -> None:
    small = ["--model.layers", "1", "--train.batch_size", "4", "--train.micro_batch_size", "2"]
    flags = [*FLAGS, *small, "--train.steps", "4", "--data.valid_prefix", ""]
    config = load(tiny_run.make_page(tmp_path), flags)
    trainer.train(config, tmp_path / "straight")
    train_stopping_at(trainer, config, tmp_path / "run", 2)
    trainer.train(config, tmp_path / "run")
    ours, expected = (tiny_run.result(tmp_path / r, 4) for r in ("run", "straight"))
    assert ours["tensors"] == expected["tensors"]
    assert ours["metrics"] == expected["metrics"]


def test_the_layout_does_not_show_in_files(tmp_path: Path) -> None:
    """Saved views are whole tensors; a run goes on under the other backend; export gives them."""
    page = tiny_run.make_page(tmp_path)
    flags = [*FLAGS, "--train.steps", "4", "--model.layers", "1", "--data.valid_prefix", ""]
    train_stopping_at(trainer, load(page, flags), tmp_path / "run", 2)
    saved = checkpoint.directory(tmp_path / "run", 2)
    tensors = checkpoint.load_all(saved)
    dense = tensors["gpt_neox.layers.0.attention.dense.weight"]
    assert dense.is_contiguous() and dense.shape == (64, 64)
    size = sum(t.nbytes for prefix in ("model.", "exp_avg.", "exp_avg_sq.")
               for t in checkpoint.load_all(saved, prefix).values())  # fmt: skip
    assert sum(f.stat().st_size for f in saved.glob("*.distcp")) < 1.5 * size + 2**18
    hf.export(saved, tmp_path / "hf", dtype="fp32")
    hf.import_checkpoint(tmp_path / "hf", tmp_path / "back")
    back = checkpoint.load_all(checkpoint.directory(tmp_path / "back", 0))
    assert tensors.keys() == back.keys()
    assert all(torch.equal(tensors[name], back[name]) for name in tensors)
    last = {}
    for backend in ("reference", "triton"):
        shutil.copytree(tmp_path / "run", tmp_path / backend)
        config = load(page, [*flags, "--kernels.backend", backend])
        last[backend] = trainer.train(config, tmp_path / backend)
    assert last["triton"]["loss"] == pytest.approx(last["reference"]["loss"], rel=2e-6)


@pytest.mark.slow
def test_fifty_steps_stay_with_the_reference(tmp_path: Path) -> None:
    """fp32 rounding grows as the runs part: 1e-4 of the loss after 50 steps of a learning model."""
    page = tiny_run.make_page(tmp_path)
    flags = ["--train.steps", "50", "--model.layers", "1", "--train.valid_every", "1000"]
    flags += ["--train.batch_size", "2", "--train.micro_batch_size", "1", "--data.valid_prefix", ""]
    for backend in ("reference", "triton"):
        config = load(page, [*FLAGS, *flags, "--kernels.backend", backend])
        trainer.train(config, tmp_path / backend)
    ours, expected = (
        [row["loss"] for row in tiny_run.rows(tmp_path / backend / "metrics.jsonl")]
        for backend in ("triton", "reference")
    )
    np.testing.assert_allclose(ours, expected, rtol=1e-4)
    assert expected[-1] < expected[0] - 0.5
