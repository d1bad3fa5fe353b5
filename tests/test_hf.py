"""Export and import: bit-exact, loadable by both majors of transformers, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from checkpoint_faults import Calls
from kernel_proof import REPOSITORY, Mutant, assert_killed
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from pythia_fast import checkpoint, hf
from pythia_fast.config import Config, flatten, resolve
from pythia_fast.errors import CheckError, InputError
from pythia_fast.model import Pythia, materialise

CONFIG = resolve(
    {
        "model.layers": 3,
        "model.hidden": 48,
        "model.heads": 4,
        "model.vocab_size": 320,
        "model.rotary_pct": 0.5,
        "model.rotary_base": 5000.0,
        "model.norm_eps": 2e-5,
        "data.seq_len": 64,
    }
)
TRANSFORMERS_4 = Path(
    os.environ.get("PYTHIA_FAST_TRANSFORMERS_4", REPOSITORY / ".venv" / "transformers-4")
)
TOKENIZER_20B = REPOSITORY.parent / "shared" / "data" / "20B_tokenizer.json"


def oracle(config: Config = CONFIG, act: str = "gelu") -> GPTNeoXForCausalLM:
    """transformers' own module with random weights, built from its own arguments."""
    m = config.model
    torch.manual_seed(3)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=m.vocab_size,
            hidden_size=m.hidden,
            num_hidden_layers=m.layers,
            num_attention_heads=m.heads,
            intermediate_size=4 * m.hidden,
            hidden_act=act,
            max_position_embeddings=config.data.seq_len,
            layer_norm_eps=m.norm_eps,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": m.rotary_base,
                "partial_rotary_factor": m.rotary_pct,
            },
            attn_implementation="eager",
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm.weight" in name else 0.0, 0.2)
    return model.eval()


def state(model: GPTNeoXForCausalLM) -> dict[str, Tensor]:
    """Its tensors under the names of the Hub."""
    tensors = {k: v for k, v in model.state_dict().items() if "lm_head" not in k}
    return {**tensors, "embed_out.weight": model.get_output_embeddings().weight.detach()}


def make_checkpoint(run: Path, tensors: dict[str, Tensor], config: Config = CONFIG) -> Path:
    named = {f"model.{name}": tensor for name, tensor in tensors.items()}
    named["exp_avg.embed_out.weight"] = torch.ones(2)
    return checkpoint.save(run, 8, named, {"config": flatten(config)}, True)


def run_loader(exports: dict[str, Path], path: Path | None) -> dict[str, dict[str, Any]]:
    """What transformers makes of directories, in a process of its own; path: another version's."""
    script = REPOSITORY / "tests" / "support" / "load_with_transformers.py"
    done = subprocess.run(
        [sys.executable, str(script), *map(str, exports.values())],
        env={
            **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
            **({"PYTHONPATH": str(path)} if path else {}),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
        cwd=next(iter(exports.values())).parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(exports, map(json.loads, done.stdout.splitlines()), strict=True))


def expected_logits(model: GPTNeoXForCausalLM) -> dict[str, Tensor]:
    tokens = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return {"tokens": tokens, "logits": model(tokens).logits.contiguous()}


@pytest.fixture(scope="module", name="tiny_tokenizer")
def make_tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BPE whose normaliser and splitting are not GPT-NeoX's: lower case, digits one by one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(["hello world, hello 1234 1234 def return"] * 9, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


# --- loading in transformers ----------------------------------------------------------------------


def majors() -> list[Any]:
    absent = not (TRANSFORMERS_4 / "transformers").is_dir()
    reason = "no transformers 4.57 (PYTHIA_FAST_TRANSFORMERS_4 or .venv/transformers-4)"
    return [
        pytest.param(None, id="installed"),
        pytest.param(TRANSFORMERS_4, id="4.57", marks=pytest.mark.skipif(absent, reason=reason)),
    ]


TEXT = "Hello  world\n\n  def f(x):\n\treturn é 😀 <|endoftext|> 1234 naïve"


@pytest.fixture(scope="module", params=majors())
def reports(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path
) -> dict[str, dict[str, Any]]:
    """What one version of transformers makes of exports with each tokenizer and dtype."""
    root = tmp_path_factory.mktemp("exports")
    large = resolve({**flatten(CONFIG), "model.vocab_size": 50304})
    cases: dict[str, tuple[Config, hf.Dtype, Path | None]] = {
        "tiny": (CONFIG, "fp32", tiny_tokenizer),
        "fp16": (CONFIG, "fp16", None),
        "bf16": (CONFIG, "bf16", None),
    }
    if TOKENIZER_20B.exists():
        cases["20B"] = (large, "fp32", TOKENIZER_20B)
    exports = {}
    for name, (config, dtype, tokenizer) in cases.items():
        model = oracle(config)
        path = make_checkpoint(root / f"run-{name}", state(model), config)
        exports[name] = hf.export(path, root / name, dtype, tokenizer, max_shard_bytes=100_000)
        save_file(expected_logits(model), root / f"{name}.expected.safetensors")
    return {
        name: {**report, "major": 4 if request.param else 5, "directory": exports[name]}
        for name, report in run_loader(exports, request.param).items()
    }


def test_both_majors_load_it(reports: dict[str, dict[str, Any]]) -> None:
    dtypes = {"tiny": "float32", "fp16": "float16", "bf16": "bfloat16"}
    errors = {"tiny": 2e-5, "fp16": 0.05, "bf16": 0.4}  # logits of order 10
    for name, dtype in dtypes.items():
        report = reports[name]
        assert len(list(report["directory"].glob("model-*-of-*.safetensors"))) > 1
        assert report["version"].startswith({4: "4.57.", 5: "5."}[report["major"]])
        assert report["missing"] == report["unexpected"] == report["mismatched"] == []
        assert report["dtype"] == f"torch.{dtype}"
        assert report["error"] < errors[name], name
        assert report["activation"] == "gelu"
        assert report["eos"] == report["bos"] == [0, 0] and not report["tied"]


def test_both_majors_load_any_tokenizer(
    reports: dict[str, dict[str, Any]], tiny_tokenizer: Path
) -> None:
    report = reports["tiny"]
    assert report["ids"] == Tokenizer.from_file(str(tiny_tokenizer)).encode(TEXT).ids
    assert report["text"] == TEXT.lower()
    assert report["eos_token"] == ["<|endoftext|>", 0]


@pytest.mark.skipif(not TOKENIZER_20B.exists(), reason="the 20B tokenizer is not at hand")
def test_both_majors_load_the_real_tokenizer(reports: dict[str, dict[str, Any]]) -> None:
    report = reports["20B"]
    copy = report["directory"] / "tokenizer.json"
    assert copy.read_bytes() == TOKENIZER_20B.read_bytes()
    assert report["ids"] == Tokenizer.from_file(str(TOKENIZER_20B)).encode(TEXT).ids
    assert report["text"] == TEXT
    assert report["eos_token"] == ["<|endoftext|>", 0]


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh"])
def test_the_activation_is_the_one_asked_for(tmp_path: Path, act: hf.HiddenAct) -> None:
    model = oracle(act=act)
    path = make_checkpoint(tmp_path / "run", state(model))
    out = hf.export(path, tmp_path / "out", "fp32", hidden_act=act)
    loaded = GPTNeoXForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    want = expected_logits(model)
    with torch.no_grad():
        error = (loaded(want["tokens"]).logits - want["logits"]).abs().max()
        other = oracle(act="gelu" if act != "gelu" else "gelu_new")
        difference = (other(want["tokens"]).logits - want["logits"]).abs().max()
    assert error < 2e-5 < 1e-3 < difference
    keys, _ = hf.import_(out)
    assert keys["model.activation"] == {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}[act]


def test_a_model_of_this_package_computes_the_same_in_transformers(tmp_path: Path) -> None:
    ours = Pythia(CONFIG.model)
    materialise(ours, "cpu", torch.float32)
    with torch.no_grad():
        for (name, parameter), value in zip(
            ours.named_parameters(), state(oracle()).values(), strict=True
        ):
            assert parameter.shape == value.shape, name
            parameter.copy_(value)
    path = make_checkpoint(tmp_path / "run", ours.state_dict())
    out = hf.export(path, tmp_path / "out", "fp32", hidden_act="gelu_pytorch_tanh")
    theirs = GPTNeoXForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    tokens = expected_logits(theirs)["tokens"]
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=2e-5, rtol=1e-5)


def test_config_json_is_the_published_one(tmp_path: Path) -> None:
    """Of pythia-70m, key by key; written by hand from the file on the Hub."""
    published = {
        "architectures": ["GPTNeoXForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu",
        "hidden_size": 512,
        "initializer_range": 0.02,
        "intermediate_size": 2048,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "model_type": "gpt_neox",
        "num_attention_heads": 8,
        "num_hidden_layers": 6,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.24.0",
        "use_cache": True,
        "use_parallel_residual": True,
        "vocab_size": 50304,
    }
    config = resolve({"model.preset": "pythia-70m"})
    assert hf._hf_config(config.model, 2048, "fp16", "gelu", 0) == published


# --- round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 50_000, 1])
def test_fp32_round_trip_is_bit_exact(tmp_path: Path, max_shard_bytes: int) -> None:
    tensors = state(oracle())
    path = make_checkpoint(tmp_path / "run", tensors)
    out = hf.export(path, tmp_path / "out", "fp32", max_shard_bytes=max_shard_bytes)
    files = sorted(p.name for p in out.glob("*.safetensors*"))
    if max_shard_bytes > 10**9:
        assert files == ["model.safetensors"]
    else:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        shards = {name: load_file(out / name) for name in files if name.endswith(".safetensors")}
        assert index["weight_map"] == {t: name for name, held in shards.items() for t in held}
        sizes = [(sum(t.nbytes for t in held.values()), len(held)) for held in shards.values()]
        assert all(size <= max_shard_bytes or count == 1 for size, count in sizes)
        n = len(shards)
        assert sorted(shards) == [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
    again = hf.import_checkpoint(out, tmp_path / "again")
    loaded = checkpoint.load_all(again)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert again == tmp_path / "again" / "checkpoints" / "step0"
    with pytest.raises(InputError, match="again holds a run already"):
        hf.import_checkpoint(out, tmp_path / "again")
    manifest = checkpoint.read_manifest(again)
    want = {**flatten(CONFIG), "model.activation": "gelu"}
    assert resolve(manifest["config"]) == resolve(want)
    second = hf.export(again, tmp_path / "second", "fp32", max_shard_bytes=max_shard_bytes)
    for file in out.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("fp16", torch.half), ("bf16", torch.bfloat16)])
def test_half_precision(tmp_path: Path, dtype: hf.Dtype, torch_dtype: torch.dtype) -> None:
    tensors = state(oracle())
    path = make_checkpoint(tmp_path / "run", tensors)
    out = hf.export(path, tmp_path / "out", dtype)
    written = load_file(out / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(written[name], tensor.to(torch_dtype)), name
    model, info = GPTNeoXForCausalLM.from_pretrained(out, output_loading_info=True, dtype="auto")
    assert model.dtype == torch_dtype
    assert not info["missing_keys"] and not info["unexpected_keys"]
    _, imported = hf.import_(out)
    assert all(torch.equal(imported[name], written[name]) for name in written)


def test_a_directory_saved_by_transformers_is_imported(tmp_path: Path) -> None:
    model = oracle()
    model.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    keys, tensors = hf.import_(tmp_path / "hf")
    assert all(torch.equal(tensors[name], t) for name, t in state(model).items())
    assert keys == {
        k: v
        for k, v in {**flatten(CONFIG), "model.activation": "gelu"}.items()
        if k in keys
    }  # fmt: skip
    assert len(keys) == 9


# --- legacy files of the Hub ----------------------------------------------------------------------


def legacy(tensors: dict[str, Tensor], layers: int = 3) -> dict[str, Tensor]:
    buffers = {}
    for i in range(layers):
        at = f"gpt_neox.layers.{i}.attention."
        buffers[at + "bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
        buffers[at + "masked_bias"] = torch.tensor(-1e9)
        buffers[at + "rotary_emb.inv_freq"] = torch.rand(3).half()
    buffers["gpt_neox.rotary_emb.inv_freq"] = torch.rand(3)
    return {**tensors, **buffers}


def hf_directory(path: Path, **changes: Any) -> Path:
    path.mkdir(exist_ok=True)
    config = hf._hf_config(CONFIG.model, 64, "fp32", "gelu", 0)
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    return path


def test_legacy_buffers_are_dropped(tmp_path: Path) -> None:
    tensors = state(oracle())
    out = hf_directory(tmp_path / "safe")
    save_file(legacy(tensors), out / "model.safetensors")
    assert hf.import_(out)[1].keys() == tensors.keys()
    out = hf_directory(tmp_path / "bin")
    torch.save(legacy(tensors), out / "pytorch_model.bin")
    _, imported = hf.import_(out)
    assert imported.keys() == tensors.keys()
    assert all(torch.equal(imported[name], tensors[name]) for name in tensors)


def test_sharded_bin_and_lm_head(tmp_path: Path) -> None:
    tensors = state(oracle())
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    out = hf_directory(tmp_path / "hf")
    names = list(tensors)
    weight_map = {}
    for i, part in enumerate((names[:7], names[7:]), start=1):
        file = f"pytorch_model-{i:05}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, out / file)
        weight_map |= dict.fromkeys(part, file)
    (out / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    _, imported = hf.import_(out)
    assert torch.equal(imported["embed_out.weight"], tensors["lm_head.weight"])
    assert len(imported) == 12 * 3 + 4


# --- refusals -------------------------------------------------------------------------------------

QKV = "gpt_neox.layers.1.attention.query_key_value.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(QKV), f"parameter {QKV} is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra is not part of this model"),
        (lambda t: t.update({QKV: t[QKV].t().contiguous()}), rf"{QKV} has shape \[48, 144\]"),
        (lambda t: t.update({QKV: t[QKV].to(torch.int8)}), f"{QKV} is int8"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(320, 48)}), "embed_out.weight .* twice"),
        (
            lambda t: t.update({"gpt_neox.layers.3.attention.dense.bias": torch.zeros(48)}),
            "layers.3.attention.dense.bias is not part",
        ),
    ],
)
def test_import_names_the_first_tensor_that_does_not_fit(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    tensors = state(oracle())
    change(tensors)
    out = hf_directory(tmp_path / "hf")
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(InputError, match=message):
        hf.import_checkpoint(out, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"use_parallel_residual": False}, "use_parallel_residual = False"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True"),
        ({"attention_bias": False}, "attention_bias = False"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type = 'yarn'"),
        ({"rope_parameters": [1]}, "rope_parameters is not an object"),
        ({"intermediate_size": 100}, "intermediate_size"),
        ({"hidden_act": "silu"}, "hidden_act = 'silu'"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers = '3'"),
        ({"num_hidden_layers": None}, "num_hidden_layers = None"),
        ({"vocab_size": 319.5}, "vocab_size = 319.5"),
        ({"hidden_size": 0, "intermediate_size": 0}, "intermediate_size"),
        ({"num_attention_heads": 5}, "model.heads = 5 does not divide"),
        ({"vocab_size": 321}, r"embed_in.weight has shape \[320, 48\], config says \[321, 48\]"),
    ],
)
def test_a_model_that_is_not_pythia_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    out = hf_directory(tmp_path / "hf", **changes)
    save_file(state(oracle()), out / "model.safetensors")
    with pytest.raises(InputError, match=message):
        hf.import_(out)


class Calling:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, ("executed",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_that_can_not_be_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"nowhere/config\.json: No such file"):
        hf.import_(tmp_path / "nowhere")
    out = hf_directory(tmp_path / "hf")
    with pytest.raises(InputError, match="neither model"):
        hf.import_(out)
    hostile = {"a": torch.zeros(1), "b": Calling()}
    torch.save(hostile, tmp_path / "live.bin")
    torch.load(tmp_path / "live.bin", weights_only=False)
    (tmp_path / "executed").rmdir()  # the payload works
    payloads = [b"", b"nonsense", b"\x80\x04K\x01.", pickle.dumps(hostile["b"])]
    payloads.append((tmp_path / "live.bin").read_bytes())
    for payload in payloads:
        (out / "pytorch_model.bin").write_bytes(payload)
        with pytest.raises(InputError, match=r"pytorch_model\.bin"):
            hf.import_(out)
        assert not (tmp_path / "executed").exists()
    torch.save({"a": 3}, out / "pytorch_model.bin")
    with pytest.raises(InputError, match="'a' is not a tensor"):
        hf.import_(out)
    for payload in (b"", b"\xff" * 64, (1 << 40).to_bytes(8, "little") + b"{}"):
        (out / "model.safetensors").write_bytes(payload)
        with pytest.raises(InputError, match=r"model\.safetensors cannot be read"):
            hf.import_(out)
    for text in ("[]", "{", "[" * 10**5):
        (out / "config.json").write_text(text)
        with pytest.raises(InputError, match=r"config\.json is not"):
            hf.import_(out)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    ("suffix", "zipped"), [("bin", True), ("bin", False), ("safetensors", True)]
)
def test_damaged_weights_end_in_one_line(tmp_path: Path, suffix: str, zipped: bool) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).half()}
    file = tmp_path / f"weights.{suffix}"
    if suffix == "bin":
        torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
    else:
        save_file(tensors, file)
    intact, draw, refused = file.read_bytes(), random.Random(2), 0
    for _ in range(300):
        data = bytearray(intact)
        for _ in range(draw.choice([1, 2, 8])):
            data[draw.randrange(len(data))] = draw.randrange(256)
        file.write_bytes(data[: draw.choice([len(data), draw.randrange(len(data))])])
        try:
            list(hf._read_weights(file))
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 150


def index_to(out: Path, shard: str) -> None:
    index = {"weight_map": dict.fromkeys(state(oracle()), shard)}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))


def leaving_is_refused(module: ModuleType, tmp_path: Path) -> None:
    out = hf_directory(tmp_path / "hf")
    secret = tmp_path / "secret.safetensors"
    save_file(state(oracle()), secret)
    if not (out / "link.safetensors").exists():
        (out / "link.safetensors").symlink_to(secret)
    for shard in ("../secret.safetensors", str(secret), "link.safetensors", "..", "", "a/../b"):
        index_to(out, shard)
        try:
            module.import_(out)
        except InputError as error:
            assert "leads out of the directory" in str(error), shard
        else:
            raise AssertionError(f"{shard} was read")


def test_shards_can_not_leave_the_directory(tmp_path: Path) -> None:
    leaving_is_refused(hf, tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Path(name).name != name or", ""),
        (" or path.resolve().parent not in roots", ""),
        ("roots = [root]", "roots = [root, root.parent]"),
    ],
)
def test_leaving_mutants(tmp_path: Path, old: str, new: str) -> None:
    mutant = Mutant(old, "pythia_fast/hf.py", old, new)
    assert_killed(mutant, lambda module: leaving_is_refused(module, tmp_path), tmp_path)


def test_the_links_of_the_hugging_face_cache_are_followed(tmp_path: Path) -> None:
    repository = tmp_path / "models--EleutherAI--pythia"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    made = hf_directory(tmp_path / "made")
    save_file(state(oracle()), made / "model.safetensors")
    for i, file in enumerate(sorted(made.iterdir())):
        file.rename(blobs / f"hash{i}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"hash{i}")
    assert len(hf.import_(snapshot)[1]) == 40


# --- export refuses -------------------------------------------------------------------------------


def test_a_value_beyond_fp16_is_named(tmp_path: Path) -> None:
    tensors = state(oracle())
    tensors[QKV][3, 4] = -65520.0  # rounds to -inf; 65504 is the largest
    path = make_checkpoint(tmp_path / "run", tensors)
    with pytest.raises(InputError, match=rf"{QKV} has values up to 65520, beyond .* float16"):
        hf.export(path, tmp_path / "out", "fp16")
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 1
    hf.export(path, tmp_path / "out", "bf16")
    tensors[QKV][3, 4] = 65504.0
    hf.export(make_checkpoint(tmp_path / "run2", tensors), tmp_path / "out2", "fp16")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(converted.isinf() & ~tensor.isinf()).any()", "False"),
        ("(converted.isinf() & ~tensor.isinf()).any()", "tensor.abs().max() > 65520"),
    ],
)
def test_overflow_mutants(tmp_path: Path, old: str, new: str) -> None:
    def check(module: ModuleType) -> None:
        module._convert("w", torch.tensor([65504.0, -float("inf")]), torch.half)
        try:
            module._convert("w", torch.tensor([0.0, 65520.0]), torch.half)
        except InputError:
            return
        raise AssertionError("written as inf")

    check(hf)
    assert_killed(Mutant(new, "pythia_fast/hf.py", old, new), check, tmp_path)


def test_bad_exports_are_refused(tmp_path: Path, tiny_tokenizer: Path) -> None:
    tensors = state(oracle())
    path = make_checkpoint(tmp_path / "run", tensors)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="out exists already and is not empty"):
        hf.export(path, out)
    with pytest.raises(InputError, match=r"mine\.txt exists already"):
        hf.export(path, out / "mine.txt")
    with pytest.raises(InputError, match="no complete checkpoint"):
        hf.export(tmp_path, tmp_path / "new")
    with pytest.raises(
        InputError, match=r"mine\.txt: (not a tokenizers JSON file|no such tokenizer)"
    ):
        hf.export(path, tmp_path / "new", tokenizer=out / "mine.txt")
    small = resolve({**flatten(CONFIG), "model.vocab_size": 200})
    with pytest.raises(InputError, match=r"token id \d+ is beyond the model's vocabulary 200"):
        hf.export(
            make_checkpoint(tmp_path / "s", tensors, small),
            tmp_path / "new",
            tokenizer=tiny_tokenizer,
        )
    del tensors[QKV]
    with pytest.raises(InputError, match=f"{QKV} is missing"):
        hf.export(make_checkpoint(tmp_path / "m", tensors), tmp_path / "new")
    bare = checkpoint.save(tmp_path / "bare", 1, {"model.a": torch.zeros(1)}, {}, True)
    with pytest.raises(InputError, match="holds no config"):
        hf.export(bare, tmp_path / "new")
    alien = {"config": {"model.colour": "red"}}
    bare = checkpoint.save(tmp_path / "bare", 2, {"model.a": torch.zeros(1)}, alien, True)
    with pytest.raises(InputError, match=r"manifest\.json: unknown key model\.colour"):
        hf.export(bare, tmp_path / "new")
    shard = next(path.glob("*.distcp"))
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(CheckError, match="distcp"):
        hf.export(path, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "run", state(oracle()))
    with Calls(lambda k, when: None) as calls:
        hf.export(path, tmp_path / "counted", "fp32", max_shard_bytes=50_000)
    assert calls.names.count("rename") == 1 and calls.names.count("fsync") > 5
    for point in range(len(calls.names)):

        def full(k: int, when: str, point: int = point) -> None:
            if (k, when) == (point, "before"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        out = tmp_path / f"out{point}"
        with pytest.raises(InputError, match=r"cannot write .*No space left"), Calls(full):
            hf.export(path, out, "fp32", max_shard_bytes=50_000)
        assert not list(tmp_path.glob(".out*")), calls.names[point]
        published = point >= len(calls.names) - 2  # the parent's open and fsync
        assert out.exists() == published, calls.names[point]
