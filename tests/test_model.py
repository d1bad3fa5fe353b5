"""The model against transformers' GPTNeoXForCausalLM, initialisation, and generation."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from kernel_proof import Mutant, assert_killed
from neox_oracle import randomised, small, transformers_twin

import pythia_fast.model as real
from pythia_fast.config import Model, load
from pythia_fast.errors import InputError
from pythia_fast.generate import generate
from pythia_fast.model import Pythia, initialise, materialise, rotary_tables

# head dims of the suite: 32, 64, 80, 128, 256
SHAPES = [(128, 4, "gelu_tanh"), (128, 2, "gelu"), (160, 2, "gelu_tanh"), (256, 2, "gelu"),
          (512, 2, "gelu_tanh")]  # fmt: skip


def compare_with_transformers(
    module: ModuleType = real, shape: tuple[int, int, str] = (96, 3, "gelu_tanh")
) -> None:
    """Logits and every gradient in float64, within 2e-6 and 5e-6 of their scale.

    float64 leaves only the rotary table, which both form in fp32, as a source of rounding.
    """
    hidden, heads, activation = shape
    model = randomised(small(hidden, heads, activation=activation), torch.float64, module)
    twin = transformers_twin(model)
    rows = torch.randint(0, 211, (2, 38))
    ours, theirs = model(rows[:, :-1]), twin(rows[:, :-1]).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 * theirs.abs().max().item())
    model.loss(rows).backward()
    flat = theirs.flatten(0, 1)
    torch.nn.functional.cross_entropy(flat, rows[:, 1:].flatten()).backward()
    expected = dict(twin.named_parameters())
    head = twin.get_output_embeddings().weight
    for name, p in model.named_parameters():
        grad = head.grad if name == "embed_out.weight" else expected[name].grad
        torch.testing.assert_close(
            p.grad, grad, rtol=0, atol=5e-6 * max(grad.abs().max().item(), 1e-6), msg=name
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_and_gradients_equal_transformers(shape: tuple[int, int, str]) -> None:
    compare_with_transformers(shape=shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_to_transformers_within_fp32_rounding(shape: tuple[int, int, str]) -> None:
    """fp32 against fp32: both err about equally against float64."""
    hidden, heads, activation = shape
    model = randomised(small(hidden, heads, activation=activation))
    twin = transformers_twin(model, attention="sdpa")
    tokens = torch.randint(0, 211, (2, 65))
    with torch.no_grad():
        ours, theirs = model(tokens), twin(tokens).logits
        exact = transformers_twin(model).double()(tokens).logits
    scale = exact.abs().max().item()
    ours_error = (ours - exact).abs().max().item()
    assert ours_error <= 2 * (theirs - exact).abs().max().item() + 1e-5 * scale


MUTANTS = [
    Mutant(
        "qkv split in thirds of the row instead of per head", "pythia_fast/model.py",
        "self.query_key_value(x).unflatten(-1, (self.heads, -1))",
        "torch.cat([p.unflatten(-1, (self.heads, -1)) for p in "
        "self.query_key_value(x).chunk(3, -1)], -1)",
    ),
    Mutant(
        "LayerNorms feed the wrong branches", "pythia_fast/model.py",
        "self.attention(x1, attend), self.mlp(x2)", "self.attention(x2, attend), self.mlp(x1)",
    ),
    Mutant(
        "qkv bias missing", "pythia_fast/model.py",
        "self.query_key_value(x).unflatten",
        "F.linear(x, self.query_key_value.weight).unflatten",
    ),
    Mutant(
        "attention output bias missing", "pythia_fast/model.py",
        "x, attn, mlp, self.attention.dense.bias,", "x, attn, mlp, 0 * self.attention.dense.bias,",
    ),
    Mutant(
        "MLP bias before the wrong product", "pythia_fast/model.py",
        "self.ops.gelu(u, self.dense_h_to_4h.bias, self.approximate)",
        "self.ops.gelu(u, 0 * self.dense_h_to_4h.bias, self.approximate)",
    ),
    Mutant(
        "wrong GELU", "pythia_fast/model.py",
        '"tanh" if c.activation == "gelu_tanh" else "none"',
        '"none" if c.activation == "gelu_tanh" else "tanh"',
    ),
    Mutant(
        "serial residual", "pythia_fast/model.py",
        "attn, mlp = self.attention(x1, attend), self.mlp(x2)",
        "attn = self.attention(x1, attend); mlp = self.mlp(x2 + attn)",
    ),
    Mutant(
        "rotary frequencies of the whole head", "pythia_fast/model.py",
        "/ rotary_dim)\n", "/ (4 * rotary_dim))\n",
    ),
    Mutant(
        "final LayerNorm missing", "pythia_fast/model.py",
        "return self.ops.layer_norm(x, norm.weight, norm.bias, norm.eps)", "return x",
    ),
    Mutant(
        "targets not shifted", "pythia_fast/model.py",
        "rows[:, 1:].flatten()", "rows[:, :-1].flatten()",
    ),
]  # fmt: skip

REFERENCE_MUTANTS = [
    Mutant(
        "interleaved rotary pairs", "kernels/reference.py",
        "x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]",
        "x1, x2, rest = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2], x[..., 2 * half :]",
    ),
    Mutant("rotation the other way", "kernels/reference.py", "x1 * c - x2 * s", "x1 * c + x2 * s"),
    Mutant(
        "values rotated, keys not", "kernels/reference.py",
        "q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)",
        "q, v = _rotate(q, cos, sin), _rotate(v, cos, sin)",
    ),
    Mutant("not causal", "kernels/reference.py", "is_causal=True", "is_causal=False"),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutants_of_the_model_are_killed(mutant: Mutant, tmp_path: Path) -> None:
    assert_killed(mutant, compare_with_transformers, tmp_path)


@pytest.mark.parametrize("mutant", REFERENCE_MUTANTS, ids=lambda m: m.name)
def test_mutants_of_the_reference_are_killed(
    mutant: Mutant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(module: ModuleType) -> None:
        ops = real.REFERENCE.__class__(**{**vars(real.REFERENCE), "attention": module.attention})
        monkeypatch.setattr(Pythia.__init__, "__defaults__", (ops,))
        compare_with_transformers()

    assert_killed(mutant, check, tmp_path)


def test_the_reference_passes_where_its_mutants_fail() -> None:
    compare_with_transformers()


# --- rotary tables --------------------------------------------------------------------------------


def test_rotary_tables_equal_a_float64_computation() -> None:
    cos, sin = rotary_tables(2048, 16)
    for position, i in ((0, 0), (1, 0), (17, 3), (2047, 7)):
        angle = position * 10000.0 ** (-2 * i / 16)
        assert cos[position, i] == pytest.approx(math.cos(angle), abs=3e-4)
        assert sin[position, i] == pytest.approx(math.sin(angle), abs=3e-4)


def test_rounded_tables_show_the_errors_of_the_original_runs() -> None:
    """GPT-NeoX v1.0 formed angles in the compute dtype: bf16 keeps 641 of 2048 positions apart."""
    exact = rotary_tables(2048, 64)[0]
    half, bf16 = (rotary_tables(2048, 64, dtype=d)[0] for d in (torch.float16, torch.bfloat16))
    assert half.dtype == torch.float16
    assert len(set(torch.arange(2048).bfloat16().tolist())) == 641
    assert len(bf16[:, 0].unique()) <= 641
    assert (bf16.float() - exact).abs().max() > 1.9
    assert 0.05 < (half.float() - exact).abs().max() < 1.0


# --- initialisation -------------------------------------------------------------------------------

# standard deviation of (embeddings, qkv, MLP-in) and of (dense, MLP-out), from the suite's table
STD = {
    "pythia-14m": (0.0559017, 0.0294628),
    "pythia-70m": (0.0279508, 0.0147314),
    "pythia-160m": (0.0228218, 0.0060141),
}


@pytest.mark.parametrize("preset", STD)
def test_initial_weights_have_the_published_spread(preset: str) -> None:
    c = load(Path(__file__).parents[1] / "configs" / f"{preset}.toml", ["--model.layers", "1"])
    layers = {"pythia-14m": 6, "pythia-70m": 6, "pythia-160m": 12}[preset]
    model = Pythia(Model(layers=layers, hidden=c.model.hidden, heads=c.model.heads, vocab_size=512))
    materialise(model, "cpu", torch.float32)
    initialise(model, 1234)
    wide, narrow = STD[preset]
    layer = model.gpt_neox.layers[1]
    for weight in (
        model.gpt_neox.embed_in.weight,
        model.embed_out.weight,
        layer.attention.query_key_value.weight,
        layer.mlp.dense_h_to_4h.weight,
    ):
        assert weight.std().item() == pytest.approx(wide, rel=0.02)
    assert layer.attention.dense.weight.std().item() == pytest.approx(narrow, rel=0.02)
    assert layer.mlp.dense_4h_to_h.weight.std().item() == pytest.approx(narrow, rel=0.02)
    assert all((p == 0).all() for n, p in model.named_parameters() if n.endswith("bias"))
    assert all((p == 1).all() for n, p in model.named_parameters() if "norm.weight" in n)


def test_the_two_largest_models_start_from_normal_002() -> None:
    c = Model(layers=32, hidden=64, heads=2, vocab_size=2048, init="normal")
    model = Pythia(c)
    materialise(model, "cpu", torch.float32)
    initialise(model, 1)
    assert model.embed_out.weight.std().item() == pytest.approx(0.02, rel=0.02)
    dense = torch.cat([x.attention.dense.weight.flatten() for x in model.gpt_neox.layers])
    assert dense.std().item() == pytest.approx(0.0025, rel=0.02)  # 0.02/√64


def test_initial_weights_follow_from_the_seed_alone() -> None:
    states = []
    for seed in (7, 7, 8):
        model = Pythia(small(64, 2))
        materialise(model, "cpu", torch.float32)
        initialise(model, seed)
        states.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


# --- generation -----------------------------------------------------------------------------------


def test_cached_generation_equals_running_the_whole_prefix_again() -> None:
    model = randomised(small(64, 2), torch.float64)
    prompts = [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
    together = generate(model, prompts, 12, stop_id=None)
    for prompt, row in zip(prompts, together, strict=True):
        tokens = list(prompt)
        for _ in range(12):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        assert tokens[len(prompt) :] == row


def test_cached_generation_with_rounded_tables_keeps_each_rows_positions() -> None:
    model = randomised(small(64, 2, rope_table="bf16"), torch.float64)
    long = list(range(1, 41))
    alone = generate(model, [[3, 4]], 8, stop_id=None)
    assert generate(model, [long, [3, 4]], 8, stop_id=None)[1] == alone[0]


def test_generation_stops_at_the_end_of_the_document() -> None:
    model = randomised(small(64, 2))
    row = generate(model, [[5, 6, 7]], 12, stop_id=None)[0]
    cut = generate(model, [[5, 6, 7]], 12, stop_id=row[4])[0]
    assert cut == row[: row.index(row[4])]


def test_sampling_follows_its_seed_and_an_empty_prompt_is_named() -> None:
    model = randomised(small(64, 2))
    first, again, other = (
        generate(model, [[5]], 20, temperature=1.0, seed=s, stop_id=None) for s in (1, 1, 2)
    )
    assert first == again != other
    with pytest.raises(InputError, match="at least one token"):
        generate(model, [[]], 3)
