"""The 22 traps of the original, T1 to T22: each is a test here, or a line of docs/traps.md."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus import make_documents, write_pair
from kernel_proof import REPOSITORY
from neox_checkpoint import MODEL, random_state, write_checkpoint
from neox_numpy import NumpyAdamW, to_bf16
from neox_oracle import small
from recipe_proof import FP16, accumulate, optimizer_for

from pythia_fast import hf
from pythia_fast.config import Config, Optimizer, Precision, resolve
from pythia_fast.data import order
from pythia_fast.data.order import open_rows
from pythia_fast.errors import InputError
from pythia_fast.explain import published
from pythia_fast.kernels import reference
from pythia_fast.loss_scale import LossScale
from pythia_fast.model import Pythia, initialise, materialise, rotary_tables
from pythia_fast.neox import reader
from pythia_fast.neox.files import read_yaml
from pythia_fast.ops import REFERENCE
from pythia_fast.optim import AdamW
from pythia_fast.schedule import learning_rate

STEPS = 143_000


def v1(preset: str) -> Config:
    return resolve({"model.preset": preset, "recipe": "pythia-v1"})


def neox_adamw(**keys: object) -> AdamW:
    """An optimizer in fp32 over a small model, master weights 0."""
    config = resolve({f"optimizer.{k}": v for k, v in keys.items()}).optimizer
    precision = Precision(compute="fp32")
    return AdamW(Pythia(small(64, 2)), config, precision, REFERENCE, torch.device("cpu"))


def test_T1_the_cosine_aims_at_zero_and_ends_flat() -> None:
    c = v1("pythia-70m").optimizer
    curve = np.array([learning_rate(c, n, STEPS) for n in range(STEPS)])
    n = np.arange(1430, STEPS)
    textbook = 1e-4 + 4.5e-4 * (1 + np.cos(np.pi * (n - 1430) / (STEPS - 1430)))
    ratio = textbook / curve[1430:]
    assert 1.75 < ratio.max() < 1.85 and abs(1430 + ratio.argmax() - 115_000) < 500
    assert (curve[115_139:] == 1e-4).all() and curve[115_138] > 1e-4
    assert textbook[:-1].min() > 1e-4  # the textbook's is never flat


def test_T2_the_first_update_has_rate_zero_and_skipped_steps_shift_the_rest() -> None:
    assert learning_rate(v1("pythia-70m").optimizer, 0, STEPS) == 0
    optimizer = optimizer_for(**FP16)
    clean, spoilt = np.ones((1, 1, 8, 16), np.float16), np.full((1, 1, 8, 16), np.inf, np.float16)
    for gradients, index in ((clean, 0), (spoilt, 1), (spoilt, 1), (clean, 1), (clean, 2)):
        assert optimizer.updates == index  # what the next step asks the schedule for
        accumulate(optimizer, gradients)
        optimizer.step(1e-3)


def test_T3_adams_count_starts_at_2_and_both_embeddings_decay() -> None:
    optimizer = neox_adamw()
    optimizer.grad.fill_(1e-3)
    optimizer.step(0.5)
    first = (0.1 / (1 - 0.9**2)) / math.sqrt(0.05 / (1 - 0.95**2))  # of g = m/0.1; with t = 1: 1
    weights = optimizer.views(optimizer.master)
    assert weights["embed_out.weight"].max().item() == pytest.approx(-0.5 * first, rel=1e-3)
    decaying = {
        n for n, slot in optimizer.slots.items() if slot.start < optimizer.layout.decay_until
    }
    assert {"gpt_neox.embed_in.weight", "embed_out.weight"} <= decaying
    assert decaying == {n for n, slot in optimizer.slots.items() if len(slot.shape) == 2}


def test_T4_row_biases_are_p_copies_and_move_by_p_times_the_rate() -> None:
    """Literally p copies, each with an Adam of its own, beside one bias that moves by p·lr."""
    for p in (2, 4):
        one = neox_adamw(clip=1e9)  # one of the copies, in fp32
        optimizer = neox_adamw(row_bias_copies=p, norm_copies=p, clip=1e9)
        name = "gpt_neox.layers.0.attention.dense.bias"
        copies = NumpyAdamW({name: np.zeros(64)}, ranks=p, clip=1e9)
        draw = np.random.default_rng(p)
        for rate in (0.0, 1e-2, 3e-3):
            gradient = draw.normal(size=64)
            for each in (optimizer, one):
                each.grad.zero_()
                each.views(each.grad)[name].copy_(torch.from_numpy(gradient))
                each.step(rate)
            copies.step({name: gradient}, rate)
        ours = optimizer.views(optimizer.master)[name].numpy()
        np.testing.assert_allclose(ours, copies.values[name], rtol=2e-6)
        assert np.array_equal(ours, p * one.views(one.master)[name].numpy())  # to the bit
        assert abs(ours).max() > 0.9 * p * 1.3e-2 * 0.5


def test_T5_replicated_gradients_count_p_times_and_growth_halves_a_gradient() -> None:
    optimizer = neox_adamw(norm_copies=4, row_bias_copies=4)
    views = optimizer.views(optimizer.grad)
    for view in views.values():
        view.fill_(1.0)
    replicated = {
        n for n in views if "norm" in n or n.endswith(("attention.dense.bias", "4h_to_h.bias"))
    }
    squares = {n: v.numel() * (4 if n in replicated else 1) for n, v in views.items()}
    assert optimizer.step(0.0).item() == pytest.approx(math.sqrt(sum(squares.values())), rel=1e-6)
    scaled = optimizer_for(**FP16, precision__unscale_after_update=True)
    scaled.loss_scale.iteration = 998
    for norm in (1.0, 0.5, 1.0):  # the step in the middle doubles the scale
        gradient = np.zeros((1, 1, 8, 16), np.float16)
        gradient[0, 0, 0, 0] = scaled.loss_factor
        accumulate(scaled, gradient)
        assert scaled.step(0.0).item() == norm
    assert Optimizer().clip_eps == 1e-6


def test_T6_the_rotary_table_is_rounded_as_the_weights_are() -> None:
    positions = torch.arange(2048)
    assert len(positions.bfloat16().unique()) == 641
    for rotary_dim, worst in ((16, 0.37), (20, 0.42), (32, 0.82)):  # radians, of fp16 angles
        exact = positions.double()[:, None] * 10000.0 ** (
            -torch.arange(0, rotary_dim, 2).double() / rotary_dim
        )
        cos, sin = (t.double() for t in rotary_tables(2048, rotary_dim, dtype=torch.float16))
        error = torch.atan2(
            sin * exact.cos() - cos * exact.sin(), cos * exact.cos() + sin * exact.sin()
        )
        assert error.abs().max().item() == pytest.approx(worst, abs=0.02)
    cos = rotary_tables(2048, 64, dtype=torch.bfloat16)[0].float()
    assert (cos - rotary_tables(2048, 64)[0]).abs().max() > 1.9
    inv_freq = np.float32(1) / np.float32(10000) ** (np.arange(0, 64, 2, dtype=np.float32) / 64)
    angles = to_bf16(to_bf16(np.arange(2048, dtype=np.float32))[:, None] * to_bf16(inv_freq))
    assert np.mean(to_bf16(np.cos(angles)) == cos.numpy()) > 0.999  # cos itself: 1 ulp either way
    assert (v1("pythia-1b").model.rope_table, v1("pythia-70m").model.rope_table) == ("bf16", "fp16")


def test_T7_gelu_is_the_tanh_form_in_training_and_erf_in_hugging_face() -> None:
    x = torch.linspace(-6, 6, 240_001, dtype=torch.float64)
    zero = torch.zeros_like(x)
    apart = (reference.gelu(x, zero) - reference.gelu(x, zero, "none")).abs()
    assert apart.max().item() == pytest.approx(4.73e-4, rel=2e-3)
    assert abs(abs(x[apart.argmax()].item()) - 2.70) < 0.02
    config = v1("pythia-70m")
    assert config.model.activation == "gelu_tanh"
    assert hf._hf_config(config.model, 2048, "fp16", "gelu", 0)["hidden_act"] == "gelu"


def test_T8_documents_are_shuffled_across_epochs_without_a_separate_last_one(
    tmp_path: Path,
) -> None:
    sizes = [40, 25, 31, 60, 12]
    prefix = write_pair(tmp_path / "document", make_documents(sizes))
    rows = open_rows(prefix, order="gpt-neox", seq_len=8, seed=3, steps=50, batch_size=1)
    epochs = len(rows.doc_idx) // len(sizes)
    shuffler = np.random.RandomState(3)
    documents = np.tile(np.arange(len(sizes), dtype=np.int32), epochs)
    shuffler.shuffle(documents)  # one shuffle over all epochs, then the same generator goes on
    samples = np.arange((epochs * sum(sizes) - 1) // 8, dtype=np.uint32)
    shuffler.shuffle(samples)
    assert epochs == 3 and np.array_equal(rows.doc_idx, documents)
    assert np.array_equal(rows.shuffle_idx, samples)
    assert rows.doc_idx.dtype == np.int32
    assert any(len(set(part)) < len(sizes) for part in documents.reshape(epochs, -1).tolist())


def test_T9_the_number_of_samples_has_the_factor_1_005_and_decides_the_epochs() -> None:
    wanted = math.ceil(STEPS * 1024 * 1.005)
    assert wanted == 147_164_160 == math.ceil(STEPS * 1024 * order.OVERSAMPLING)
    assert order.epochs_and_samples(207_170_414_058, 2048, wanted)[0] == 2
    short = 147_164_160 * 2048 - 1000  # enough without the factor, too little with it
    assert order.epochs_and_samples(short, 2048, STEPS * 1024)[0] == 1
    assert order.epochs_and_samples(short, 2048, wanted)[0] == 2


def test_T10_rows_of_2049_tokens_overlap_by_one_in_the_stream(tmp_path: Path) -> None:
    flat = np.arange(2048 * 4 + 1)
    prefix = write_pair(tmp_path / "document", np.split(flat, [3000, 5000]))
    rows = open_rows(prefix, order="sequential", seq_len=2048, steps=2, batch_size=2)
    found = rows.tokens(0, 4)
    assert found.shape == (4, 2049) and (found[:-1, -1] == found[1:, 0]).all()
    cut = write_pair(tmp_path / "cut", np.split(np.arange(2049 * 4), 4))
    preshuffled = open_rows(cut, order="preshuffled", seq_len=2048, steps=2, batch_size=2).tokens(
        0, 4
    )
    assert (preshuffled[1:, 0] == preshuffled[:-1, -1] + 1).all()  # cut already: stride 2049


@pytest.mark.parametrize("ends", [True, False])
def test_T11_an_end_of_document_is_a_token_like_others(ends: bool, tmp_path: Path) -> None:
    """Nothing is put in where it is absent, and neither attention nor loss looks for it."""
    documents = [np.arange(2, 20), np.arange(2, 30), np.arange(2, 14)]
    documents = [np.append(d, 0) if ends else d for d in documents]
    prefix = write_pair(tmp_path / "document", documents)
    rows = open_rows(prefix, order="sequential", seq_len=8, steps=6, batch_size=1).tokens(0, 6)
    flat = np.concatenate(documents)
    assert np.array_equal(rows, np.stack([flat[8 * k : 8 * k + 9] for k in range(6)]))
    model = Pythia(small(64, 2))
    materialise(model, "cpu", torch.float64)
    initialise(model, 1)
    tokens = torch.tensor([[5, 0, 7, 8, 9]])
    base = model(tokens)[0, -1]
    assert (model(torch.tensor([[6, 0, 7, 8, 9]]))[0, -1] - base).abs().max() > 1e-9


def test_T12_the_vocabulary_is_padded_as_in_the_original_on_any_layout() -> None:
    sizes = {"pythia-70m": 50304, "pythia-6.9b": 50432, "pythia-12b": 50688}
    for preset, rows in sizes.items():
        assert v1(preset).model.vocab_size == rows
        assert resolve({"model.preset": preset}).model.vocab_size == rows
    logits = torch.zeros(1, 50432)  # every row takes part in the softmax
    loss = reference.cross_entropy(logits, torch.tensor([3]))
    assert loss.item() == pytest.approx(math.log(50432), rel=1e-6)


def test_T13_embed_out_is_drawn_as_embed_in_and_the_two_largest_from_normal() -> None:
    for preset, std, narrow in (
        ("pythia-14m", 0.0559017, 0.0294628),
        ("pythia-6.9b", 0.02, 0.0025),
    ):
        init, layers = v1(preset).model.init, v1(preset).model.layers
        model = Pythia(resolve({"model.layers": layers, "model.hidden": 128, "model.heads": 4,
                                "model.vocab_size": 2048, "model.init": init}).model)  # fmt: skip
        materialise(model, "cpu", torch.float32)
        initialise(model, 1234)
        assert model.embed_out.weight.std().item() == pytest.approx(std, rel=0.02)
        assert model.gpt_neox.embed_in.weight.std().item() == pytest.approx(std, rel=0.02)
        dense = torch.cat([layer.attention.dense.weight for layer in model.gpt_neox.layers])
        assert dense.std().item() == pytest.approx(narrow, rel=0.02)


def test_T15_hysteresis_is_refilled_by_growth_alone_and_absent_without_zero() -> None:
    scale = LossScale(hysteresis=True)
    for overflow, expected in (
        (True, 4096),
        (False, 4096),
        (True, 2048),
        (False, 2048),
        (True, 1024),
    ):
        scale.update(overflow)
        assert scale.scale == expected
    for _ in range(1000):
        scale.update(False)
    assert (scale.scale, scale.chances) == (2048, 2)
    without = LossScale(hysteresis=False)
    without.update(True)
    assert without.scale == 2048
    kinds = {
        name: v1(f"pythia-{name}").precision.loss_scaling for name in ("14m", "31m", "70m", "12b")
    }
    assert kinds == {"14m": "dynamic", "31m": "dynamic", "70m": "hysteresis", "12b": "hysteresis"}


def test_T16_1b_has_the_rate_of_its_yaml_and_only_the_standard_one_ran_in_bf16() -> None:
    for preset, compute in (("pythia-1b", "bf16"), ("pythia-1b-deduped", "fp16")):
        assert published(preset)["optimizer.lr"] == 2.5e-4  # paper and README: 3e-4, unresolved
        assert published(preset)["precision.compute"] == compute


def test_T17_swapped_layers_and_heads_are_named(tmp_path: Path) -> None:
    page = tmp_path / "12b-deduped.yml"
    page.write_text('{"num-layers": 40, "hidden-size": 5120, "num-attention-heads": 36}')
    with pytest.raises(InputError, match=r"does not divide hidden-size = 5120; .* swapped"):
        read_yaml(page)
    with pytest.raises(InputError, match=r"model\.heads = 36 does not divide"):
        resolve({"model.preset": "pythia-12b", "model.layers": 40, "model.heads": 36})


def test_T18_exported_files_say_what_the_published_ones_say() -> None:
    config = hf._hf_config(v1("pythia-70m").model, 2048, "fp16", "gelu", 0)
    assert (config["eos_token_id"], config["bos_token_id"]) == (0, 0)
    assert (config["hidden_act"], config["torch_dtype"]) == ("gelu", "float16")
    assert "embed_out.weight" in hf.shapes(v1("pythia-70m").model)


@pytest.mark.parametrize("preset", ["pythia-160m-v0", "pythia-6.9b-v0", "pythia-1.3b"])
def test_T20_the_models_of_version_0_are_no_presets(preset: str) -> None:
    with pytest.raises(InputError, match=rf"model\.preset = .{preset}. is unknown"):
        resolve({"model.preset": preset})


def test_T22_later_versions_of_gpt_neox_are_another_recipe(tmp_path: Path) -> None:
    c = v1("pythia-70m").optimizer
    n = 50_000
    later = 1e-4 + 4.5e-4 * (1 + math.cos(math.pi * (n - 1430) / (STEPS - 1430)))
    assert abs(learning_rate(c, n, STEPS) / later - 1) > 0.005
    root = write_checkpoint(tmp_path, random_state(MODEL), 1, tensor=1, data=1, skipped=0)
    file = root / "layer_02-model_00-model_states.pt"
    layer = torch.load(file)
    layer["mlp.linear1.weight"] = layer.pop("mlp.dense_h_to_4h.weight")
    torch.save(layer, file)
    with pytest.raises(InputError, match=r"GPT-NeoX after v1\.0 renamed it"):
        reader.read(root)


def test_every_trap_is_a_test_or_a_line_of_the_page() -> None:
    tested = {int(m) for m in re.findall(r"^def test_T(\d+)_", Path(__file__).read_text(), re.M)}
    page = (REPOSITORY / "docs" / "traps.md").read_text()
    lines = dict(re.findall(r"^\| T(\d+) \|.*\| (\S.*) \|$", page, re.M))
    assert sorted(map(int, lines)) == list(range(1, 23))
    said = {int(n) for n, cell in lines.items() if cell.startswith("not tested here: ")}
    assert said == set(range(1, 23)) - tested
    for number in tested:
        name = re.search(rf"^def (test_T{number}_\w+)", Path(__file__).read_text(), re.M)
        assert name and lines[str(number)] == f"`{name[1]}`", number
