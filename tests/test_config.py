"""Configuration: every shipped page, the suite's parameter counts, and what bad input says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from kernel_proof import REPOSITORY, Mutant, load_mutant

from pythia_fast.config import Config, load, resolve, to_toml
from pythia_fast.errors import InputError
from pythia_fast.explain import differences, published

CONFIGS = sorted((REPOSITORY / "configs").glob("*.toml"))

# total and non-embedding parameters (the suite's table; PAPER Table 1 for the second column)
COUNTS = {
    "14m": (14_067_712, 1_189_888),
    "31m": (30_494_720, 4_739_072),
    "70m": (70_426_624, 18_915_328),
    "160m": (162_322_944, 85_056_000),
    "410m": (405_334_016, 302_311_424),
    "1b": (1_011_781_632, 805_736_448),
    "1.4b": (1_414_647_808, 1_208_602_624),
    "2.8b": (2_775_208_960, 2_517_652_480),
    "6.9b": (6_857_302_016, 6_444_163_072),
    "12b": (11_846_072_320, 11_327_027_200),
}


def test_the_set_of_pages_is_complete() -> None:
    expected = {"quickstart"} | {f"pythia-{size}" for size in COUNTS}
    expected |= {f"pythia-{size}-deduped" for size in COUNTS if size not in ("14m", "31m")}
    assert {page.stem for page in CONFIGS} == expected
    assert len(expected) == 19


@pytest.mark.parametrize("page", CONFIGS, ids=lambda p: p.stem)
def test_every_page_parses_and_follows_the_published_recipe(page: Path) -> None:
    config = load(page)
    if page.stem == "quickstart":
        return
    assert page.stem == config.model.preset
    assert config.recipe == "pythia-v1"
    assert config.train.steps * config.tokens_per_step == 299_892_736_000
    assert differences(config) == []
    # the page spells out what preset and recipe fix: dropping them changes nothing
    text = re.sub(r"^(preset|recipe) = .*\n", "", page.read_text(), flags=re.M)
    bare = page.parent / page.name
    assert bare.exists()
    import tomllib

    values = {
        f"{section}.{key}": value
        for section, keys in tomllib.loads(text).items()
        for key, value in keys.items()
    }
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    without = resolve(values)
    assert without.decisive == config.decisive


@pytest.mark.parametrize("size", COUNTS)
def test_parameter_counts_on_the_meta_device(size: str) -> None:
    from pythia_fast.model import Pythia

    config = load(REPOSITORY / "configs" / f"pythia-{size}.toml").model
    model = Pythia(config)
    assert all(p.is_meta for p in model.parameters())
    counted = sum(p.numel() for p in model.parameters())
    embedding = model.gpt_neox.embed_in.weight.numel() + model.embed_out.weight.numel()
    assert (counted, counted - embedding) == COUNTS[size]
    assert (config.parameters, config.non_embedding_parameters) == COUNTS[size]


def test_a_page_is_written_and_read_back_equal(tmp_path: Path) -> None:
    config = resolve({"model.preset": "pythia-2.8b", "checkpoint.steps": (1, 5), "log.sample": ""})
    path = tmp_path / "page.toml"
    path.write_text(to_toml(config))
    assert load(path) == config


def test_precedence_defaults_preset_file_flags(tmp_path: Path) -> None:
    page = tmp_path / "page.toml"
    page.write_text('[model]\npreset = "pythia-1b"\nlayers = 3\n[optimizer]\nlr = 5e-4\n')
    config = load(page, ["--model.layers", "4", "--optimizer.betas=[0.8, 0.9]"])
    assert config.model.hidden == 2048  # preset over default
    assert config.optimizer.min_lr == 2.5e-5
    assert config.optimizer.lr == 5e-4  # file over preset
    assert config.model.layers == 4  # flag over file
    assert config.optimizer.betas == (0.8, 0.9)


def test_a_rounding_choice_does_not_change_the_digest_but_the_recipe_does() -> None:
    base = Config()
    assert resolve({"train.micro_batch_size": 8}).digest == base.digest
    assert resolve({"optimizer.lr": 9e-4}).digest != base.digest
    assert resolve({"data.seq_len": 1024}).digest != base.digest


def test_published_names_the_original_precision() -> None:
    assert published("pythia-1b")["precision.compute"] == "bf16"
    assert published("pythia-12b")["precision.compute"] == "fp16"


BAD = [
    (["--train.stepz", "1"], r"unknown key train\.stepz; did you mean train\.steps\?"),
    (["--trian.steps", "1"], r"unknown section \[trian\]; did you mean train\?"),
    (["--train.steps", "ten"], r"train\.steps = 'ten': expected a whole number"),
    (["--train.steps", "1.5"], r"train\.steps = 1\.5: expected a whole number"),
    (["--train.steps", "true"], r"train\.steps = True: expected a whole number"),
    (["--optimizer.lr", "nan"], r"optimizer\.lr = nan: expected a number"),
    (["--optimizer.betas", "[0.9]"], r"optimizer\.betas .* expected a list of 2 floats"),
    (
        ["--precision.compute", "fp8"],
        r"precision\.compute = 'fp8': expected 'bf16' or 'fp16' or 'fp32'",
    ),
    (["--model.preset", "pythia-70"], r"model\.preset = 'pythia-70' is unknown; did you mean "),
    (["--model.heads", "7"], r"model\.heads = 7 does not divide model\.hidden = 512"),
    (["--train.micro_batch_size", "3"], r"batch_size = 1024 is not divisible by .* = 3"),
    (["--train.steps", "0"], r"train\.steps = 0 must be positive"),
    (["--train.steps"], r"--train\.steps needs a value"),
    (["--optimizer.min_lr", "1"], r"optimizer\.min_lr = 1\.0 is not in \[0, optimizer\.lr"),
    (["--log.sample", "hello"], r"log\.sample needs data\.tokenizer"),
]


@pytest.mark.parametrize(("flags", "message"), BAD)
def test_bad_input_is_named(flags: list[str], message: str, tmp_path: Path) -> None:
    page = tmp_path / "page.toml"
    page.write_text("")
    with pytest.raises(InputError, match=message) as caught:
        load(page, flags)
    assert "\n" not in str(caught.value)


def test_a_bad_page_is_named(tmp_path: Path) -> None:
    page = tmp_path / "page.toml"
    with pytest.raises(InputError, match="no such file"):
        load(page)
    for text in ("[model\n", "steps = 3\n", "[modle]\n", "[model]\nlayers = '6'\n"):
        page.write_text(text)
        with pytest.raises(InputError, match=r"page\.toml"):
            load(page)


def test_mutant_a_wrong_suite_table_is_seen(tmp_path: Path) -> None:
    mutant = Mutant(
        "12b swapped",
        "pythia_fast/recipe.py",
        "_size(36, 5120, 40,",
        "_size(40, 5120, 36,",
    )
    module = load_mutant(mutant, tmp_path)
    with pytest.raises(InputError, match="does not divide"):
        resolve(module.SUITE["pythia-12b"])
