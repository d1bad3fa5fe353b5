"""The recipes as tables: the published run of every size, the clean set, and what is refused."""

from __future__ import annotations

import functools
import importlib.util
import math
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny_run
import torch
from kernel_proof import REPOSITORY, Mutant, assert_killed, assert_sound, load_mutant

import pythia_fast.config
import pythia_fast.explain
import pythia_fast.model
import pythia_fast.recipe
import pythia_fast.train
from pythia_fast.config import Model, describe_keys, load, resolve
from pythia_fast.errors import InputError
from pythia_fast.explain import differences, differing, published
from pythia_fast.recipe import SUITE, SWITCHES, switches


def test_every_switch_is_a_key_with_a_reason_and_a_source() -> None:
    keys = {key for key, _, _ in describe_keys()}
    assert {s.key for s in SWITCHES} <= keys and len(SWITCHES) == 17
    assert all(s.reason and s.source and "\n" not in s.reason + s.source for s in SWITCHES)


# switch: test file, its list of mutants, the mutant that leaves the switch out of account
HELD_BY = {
    "model.activation": ("recipe", "SWITCH_MUTANTS", "always the tanh form"),
    "model.rope_table": ("recipe", "SWITCH_MUTANTS", "table always fp32"),
    "model.init": ("published", "INIT_MUTANTS", "always normal"),
    "model.vocab_size": ("published", "MUTANTS", "6.9b padded for one rank"),
    "optimizer.schedule": ("recipe", "SWITCH_MUTANTS", "always neox-v1"),
    "optimizer.schedule_counts": ("loss_scale", "RESUME_MUTANTS", "schedule counts updates"),
    "optimizer.step_offset": ("recipe", "SWITCH_MUTANTS", "offset always 1"),
    "optimizer.decay_embeddings": ("recipe", "SWITCH_MUTANTS", "embeddings always decay"),
    "optimizer.clip_eps": ("recipe", "SWITCH_MUTANTS", "clip_eps always 1e-6"),
    "optimizer.row_bias_copies": ("recipe", "SWITCH_MUTANTS", "row biases move by lr"),
    "optimizer.norm_copies": ("recipe", "SWITCH_MUTANTS", "all counted once"),
    "precision.compute": ("recipe", "FP16_MUTANTS", "weights always fp32"),
    "precision.gradients": ("recipe", "GRADIENT_MUTANTS", "gradients always fp32"),
    "precision.gradient_sum": ("recipe", "GRADIENT_MUTANTS", "ranks summed in the gradients' dtype"),
    "precision.sum_ranks": ("recipe", "GRADIENT_MUTANTS", "never divided"),
    "precision.loss_scaling": ("loss_scale", "STEP_MUTANTS", "always with hysteresis"),
    "precision.unscale_after_update": ("loss_scale", "STEP_MUTANTS", "unscaled by the scale before"),
}  # fmt: skip


def test_every_switch_has_a_mutant_that_ignores_it(tmp_path: Path) -> None:
    """Of the lists that the tests run: a switch without one, or a mutant that is gone, is seen."""
    assert HELD_BY.keys() == {s.key for s in SWITCHES}
    for switch, (file, name, wanted) in HELD_BY.items():
        path = REPOSITORY / "tests" / f"test_{file}.py"
        mutants = getattr(_module(path), name)
        mutants = list(mutants.values()) if isinstance(mutants, dict) else mutants
        (mutant,) = (m for m in mutants if m.name == wanted)
        assert load_mutant(mutant, tmp_path) is not None, switch
        used = re.search(rf"^@pytest\.mark\.parametrize\([^@]*\b{name}\b", path.read_text(), re.M)
        assert used, f"{switch}: no test runs over {name} of {path.name}"


@functools.cache
def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"held_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their types
    spec.loader.exec_module(module)
    return module


# size: GPUs, rows a microbatch, accumulation, tensor degree (the suite's YAML), ZeRO stage
RUNS = {
    "14m": (32, 32, 1, 1, 0), "31m": (32, 32, 1, 1, 0), "70m": (32, 32, 1, 1, 1),
    "160m": (32, 32, 1, 1, 1), "410m": (32, 32, 1, 1, 1), "1b": (64, 16, 1, 1, 0),
    "1.4b": (64, 16, 1, 1, 1), "2.8b": (64, 16, 1, 1, 1), "6.9b": (128, 8, 2, 2, 1),
    "12b": (256, 8, 2, 4, 1),
}  # fmt: skip


def check_published(module: ModuleType, size: str) -> None:
    gpus, rows, accumulation, tensor, zero = RUNS[size]
    values = module.PRESETS[f"pythia-{size}"] | module.switches("pythia-v1", f"pythia-{size}")
    config = resolve(values)
    p, o, m = config.precision, config.optimizer, config.model
    assert p.ranks == gpus // tensor
    assert (config.train.micro_batch_size, config.accumulation) == (rows, accumulation)
    assert (o.row_bias_copies, o.norm_copies) == (tensor, tensor)
    multiple = 128 * tensor
    assert m.vocab_size == -(-50277 // multiple) * multiple
    dtypes = ("bf16", "bf16", "fp32") if size == "1b" else ("fp16",) * 3
    assert (p.compute, p.gradients, p.gradient_sum) == dtypes
    scaling = "none" if size == "1b" else "hysteresis" if zero else "dynamic"
    assert p.loss_scaling == scaling
    assert m.rope_table == p.compute
    assert m.init == ("normal" if size in ("6.9b", "12b") else "small-wang")
    assert (o.schedule, o.step_offset, o.schedule_counts) == ("neox-v1", 1, "updates")
    assert p.unscale_after_update and o.decay_embeddings and o.clip_eps == 1e-6


@pytest.mark.parametrize("size", RUNS)
def test_the_published_layout_of_every_size(size: str) -> None:
    check_published(pythia_fast.recipe, size)


RECIPE = "pythia_fast/recipe.py"
MUTANTS = [
    Mutant("12b on two tensor ranks", RECIPE, "tensor=4", "tensor=2"),
    Mutant("12b with the suite's init", RECIPE, 'vocab=50688, init="normal"', "vocab=50688"),
    Mutant("6.9b padded for one rank", RECIPE, 'vocab=50432, init="normal"', 'init="normal"'),
    Mutant("14m with hysteresis", RECIPE, '"pythia-14m": _layout(32) | _NO_ZERO', '"pythia-14m": _layout(32)'),
    Mutant("1b in fp16", RECIPE, '"pythia-1b": _layout(64) | _BF16', '"pythia-1b": _layout(64)'),
    Mutant("2.8b on 32 ranks", RECIPE, '"pythia-2.8b": _layout(64)', '"pythia-2.8b": _layout(32)'),
    Mutant("presets of sizes forgotten", RECIPE, "if k in values} | own", "if k in values}"),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutants_of_the_tables_are_killed(mutant: Mutant, tmp_path: Path) -> None:
    def check(module: ModuleType) -> None:
        for size in RUNS:
            check_published(module, size)

    assert_sound([mutant], check)
    assert_killed(mutant, check, tmp_path)


def check_init(module: ModuleType) -> None:
    """Standard deviations of embeddings and of the two products into the residual stream."""
    for init, std, narrow in (
        ("small-wang", math.sqrt(2 / (5 * 64)), 2 / (4 * 8)),
        ("normal", 0.02, 0.02 / math.sqrt(8)),
    ):
        model = module.Pythia(Model(layers=4, hidden=64, heads=2, vocab_size=2048, init=init))
        module.materialise(model, "cpu", torch.float32)
        module.initialise(model, 3)
        layers = model.gpt_neox.layers
        for expected, weights in (
            (std, [model.gpt_neox.embed_in.weight]),
            (std, [model.embed_out.weight]),
            (std, [x.attention.query_key_value.weight for x in layers]),
            (std, [x.mlp.dense_h_to_4h.weight for x in layers]),
            (narrow, [x.attention.dense.weight for x in layers]),
            (narrow, [x.mlp.dense_4h_to_h.weight for x in layers]),
        ):
            drawn = torch.cat([w.flatten() for w in weights]).std().item()
            assert drawn == pytest.approx(expected, rel=0.03)


def test_init_draws_what_it_names() -> None:
    check_init(pythia_fast.model)


MODEL = "pythia_fast/model.py"
INIT_MUTANTS = [
    Mutant("always small-wang", MODEL, 'if c.init == "small-wang":', "if True:"),
    Mutant("always normal", MODEL, 'if c.init == "small-wang":', "if False:"),
    Mutant("MLP-out drawn wide", MODEL, 'or "4h_to_h" in name', ""),
]


@pytest.mark.parametrize("mutant", INIT_MUTANTS, ids=lambda m: m.name)
def test_mutants_of_the_init_are_killed(mutant: Mutant, tmp_path: Path) -> None:
    assert_sound([mutant], check_init)
    assert_killed(mutant, check_init, tmp_path)


def test_modern_is_the_same_clean_set_for_every_size() -> None:
    for name in SUITE:
        config = resolve({"model.preset": name, "recipe": "modern"})
        p, o, m = config.precision, config.optimizer, config.model
        assert (p.compute, p.gradients, p.gradient_sum, p.ranks) == ("bf16", "fp32", "fp32", 1)
        assert (o.schedule, o.step_offset, o.row_bias_copies, o.norm_copies) == ("cosine", 0, 1, 1)
        assert (m.rope_table, m.activation, m.init) == ("fp32", "gelu", "small-wang")
        assert m.vocab_size == 50304 and m.layers == SUITE[name]["model.layers"]


def test_a_recipe_on_the_command_line_is_over_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.toml"
    page.write_text('recipe = "pythia-v1"\n[model]\npreset = "pythia-70m"\nactivation = "gelu"\n')
    assert load(page).model.activation == "gelu"  # the page over its recipe
    assert load(page).precision.compute == "fp16"
    modern = load(page, ["--recipe", "modern", "--optimizer.schedule", "neox-v1"])
    assert (modern.recipe, modern.precision.compute) == ("modern", "bf16")
    assert modern.optimizer.schedule == "neox-v1"  # a key among the flags over the recipe there
    without = load(page, ["--model.preset", "", "--recipe", "modern", "--model.vocab_size", "64"])
    assert without.model.vocab_size == 64


BAD = [
    ({"recipe": "pythia"}, "recipe = 'pythia': expected '' or 'pythia-v1' or 'modern'"),
    ({"optimizer.row_bias_copys": 2}, r"unknown key .*; did you mean optimizer\.row_bias_copies\?"),
    ({"precision.gradients": "fp16"}, r"precision\.gradients = 'fp16' does not go with bf16, fp32"),
    ({"precision.gradient_sum": "bf16"}, r"gradient_sum = 'bf16' does not go with fp32"),
    ({"precision.compute": "fp16"}, r"loss_scaling = 'none' does not go with .* = 'fp16'"),
    ({"precision.loss_scaling": "dynamic"}, r"'dynamic' does not go with .* = 'bf16'"),
    ({"recipe": "pythia-v1", "optimizer.backend": "torch"}, "'torch' takes fp32 gradients"),
    ({"recipe": "pythia-v1", "model.preset": "pythia-70m", "train.micro_batch_size": 64},
     r"batch_size = 1024 is not divisible by precision\.sum_ranks = 32 times .* = 64"),
    ({"optimizer.norm_copies": 0}, r"optimizer\.norm_copies = 0 must be positive"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "message"), BAD, ids=lambda x: str(x)[:40])
def test_bad_recipes_are_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        resolve(keys)
    assert "\n" not in str(caught.value)


def test_recipes_mixed_on_resume_are_refused_by_both_names(tmp_path: Path) -> None:
    page = tiny_run.make_page(tmp_path)
    flags = ["--train.steps", "2", "--recipe"]
    pythia_fast.train.train(load(page, [*flags, "pythia-v1"]), tmp_path / "run")
    with pytest.raises(InputError, match="recipe = 'pythia-v1', not 'modern': recipes do not mix"):
        pythia_fast.train.train(load(page, [*flags, "modern"]), tmp_path / "run")


def test_rows_a_microbatch_are_fixed_where_gradients_add_up_in_16_bits(tmp_path: Path) -> None:
    page = tiny_run.make_page(tmp_path)
    flags = ["--train.steps", "2", "--recipe", "pythia-v1", "--train.micro_batch_size"]
    pythia_fast.train.train(load(page, [*flags, "4"]), tmp_path / "run")
    with pytest.raises(InputError, match=r"with train\.micro_batch_size = 4, not 8: choose"):
        pythia_fast.train.train(load(page, [*flags, "8"]), tmp_path / "run")
    base = {"model.preset": "pythia-70m", "recipe": "pythia-v1"}
    assert differences(resolve(base | {"train.micro_batch_size": 16})) == [
        "train.micro_batch_size = 16 (published: 32)"
    ]
    wide = {"precision.gradients": "fp32", "precision.gradient_sum": "fp32"}
    assert list(differing(resolve(base | wide | {"train.micro_batch_size": 16}))) == [*wide]


EXPLAIN, CONFIG = "pythia_fast/explain.py", "pythia_fast/config.py"


def check_explain(module: ModuleType) -> None:
    """What differs from the published run: only what decides the losses, each key of it."""

    def keys(**more: Any) -> set[str]:
        return set(
            module.differing(resolve(base | {k.replace("__", "."): v for k, v in more.items()}))
        )

    base = {"model.preset": "pythia-6.9b", "recipe": "pythia-v1"}
    assert keys() == set()
    assert keys(train__micro_batch_size=4) == {"train.micro_batch_size"}
    assert keys(data__order="preshuffled") == set() and keys(data__order="sequential") == {
        "data.order"
    }
    assert (
        keys(
            log__every=7, data__prefix="x", optimizer__backend="auto", kernels__deterministic=False
        )
        == set()
    )
    assert keys(optimizer__lr=1e-4, model__init="small-wang") == {"optimizer.lr", "model.init"}
    assert keys(train__steps=10, train__seed=1) == {"train.steps", "train.seed"}
    assert keys(precision__sum_ranks=32, train__batch_size=2048) == {
        "precision.sum_ranks",
        "train.batch_size",
    }
    assert module.differing(resolve({"optimizer.lr": 1e-4})) == {}
    assert module.differing(resolve(base | {"optimizer.lr": 1e-4})) == {
        "optimizer.lr": (1e-4, 1.2e-4)
    }
    modern = module.differing(resolve(base | {"recipe": "modern"}))
    clean = switches("modern", "pythia-6.9b")
    theirs = switches("pythia-v1", "pythia-6.9b")
    assert modern.keys() == {k for k in clean if clean[k] != theirs[k]}


EXPLAIN_MUTANTS = [
    Mutant("rows a microbatch never compared", EXPLAIN, '"train.micro_batch_size", ', ""),
    Mutant("seed never compared", EXPLAIN, ', "train.seed"', ""),
    Mutant("all keys compared", EXPLAIN, "key.startswith(_COMPARED) and ", ""),
    Mutant("compared with the clean set", EXPLAIN, '"recipe": "pythia-v1"', '"recipe": "modern"'),
    Mutant("preshuffled files differ", EXPLAIN, 'config.data.order == "preshuffled"', "False"),
    Mutant("any order will do", EXPLAIN, 'config.data.order == "preshuffled"', "True"),
    Mutant("here and there swapped", EXPLAIN, "key: (ours[key], theirs[key])", "key: (theirs[key], ours[key])"),
]  # fmt: skip


def check_precedence(module: ModuleType) -> None:
    """Defaults < preset < recipe < page < flags; a recipe among the flags is one of them."""
    page = {"model.preset": "pythia-12b", "recipe": "pythia-v1"}
    plain = module.resolve({"model.preset": "pythia-12b"})
    assert (plain.model.layers, plain.optimizer.row_bias_copies) == (36, 1)
    assert module.resolve(page).optimizer.row_bias_copies == 4
    modern = module.resolve(page | {"recipe": "modern"}).model
    assert (modern.vocab_size, modern.init, modern.layers) == (50304, "small-wang", 36)
    keyed = page | {"model.activation": "gelu", "optimizer.lr": 1e-4}
    assert (module.resolve(keyed).model.activation, module.resolve(keyed).optimizer.lr) == (
        "gelu",
        1e-4,
    )
    flagged = module.resolve(keyed, ["--optimizer.lr", "2e-4"])
    assert flagged.optimizer.lr == 2e-4
    again = module.resolve(keyed, ["--recipe", "pythia-v1"])
    assert again.model.activation == "gelu_tanh"  # a recipe among the flags is over the page
    both = module.resolve(keyed, ["--recipe", "modern", "--optimizer.schedule", "neox-v1"])
    assert (both.optimizer.schedule, both.precision.compute) == ("neox-v1", "bf16")
    other = module.resolve(page, ["--model.preset", "pythia-1b"])
    assert (other.model.layers, other.precision.compute) == (16, "bf16")


PRECEDENCE_MUTANTS = [
    Mutant("preset over recipe", CONFIG, "{**PRESETS.get(preset, {}), **named, **values}", "{**named, **PRESETS.get(preset, {}), **values}"),
    Mutant("recipe over page", CONFIG, "**named, **values}", "**values, **named}"),
    Mutant("preset over page", CONFIG, "{**PRESETS.get(preset, {}), **named, **values}", "{**named, **values, **PRESETS.get(preset, {})}"),
    Mutant("no preset", CONFIG, "{**PRESETS.get(preset, {}), **named", "{**named"),
    Mutant("page over a flag's recipe", CONFIG, 'values |= switches(flags.get("recipe", ""), preset) | flags', "values |= flags"),
    Mutant("a flag's recipe over flags", CONFIG, 'values |= switches(flags.get("recipe", ""), preset) | flags', 'values |= flags | switches(flags.get("recipe", ""), preset)'),
    Mutant("flags forgotten", CONFIG, ", preset) | flags", ", preset)"),
    Mutant("a flag's preset too late", CONFIG, '{**values, **flags}.get("model.preset"', '{**flags, **values}.get("model.preset"'),
]  # fmt: skip


def test_what_differs_and_what_comes_first() -> None:
    check_explain(pythia_fast.explain)
    check_precedence(pythia_fast.config)


@pytest.mark.parametrize("mutant", [*EXPLAIN_MUTANTS, *PRECEDENCE_MUTANTS], ids=lambda m: m.name)
def test_mutants_of_explain_and_precedence_are_killed(mutant: Mutant, tmp_path: Path) -> None:
    check = check_explain if mutant.file == EXPLAIN else check_precedence
    assert_sound([mutant], check)
    assert_killed(mutant, check, tmp_path)


def test_the_published_run_of_1b_deduped_is_fp16() -> None:
    assert published("pythia-1b")["precision.compute"] == "bf16"
    assert published("pythia-1b-deduped")["precision.compute"] == "fp16"
    assert switches("", "pythia-1b") == {}
    assert math.isclose(published("pythia-1b")["optimizer.lr"], 2.5e-4)
