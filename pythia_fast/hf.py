"""Hugging Face GPTNeoX directories: `export` a checkpoint to one, `import_` one.

Parameter names are the same on both sides, so that both directions copy tensors and nothing else.
The head is `embed_out.weight` on disk; transformers since 5.14 calls it lm_head in memory.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pythia_fast import checkpoint
from pythia_fast.config import Config, Model, flatten, resolve
from pythia_fast.data.build import END_OF_TEXT, load_tokenizer
from pythia_fast.errors import InputError
from pythia_fast.progress import console
from pythia_fast.storage import publish_directory

Dtype = Literal["fp16", "bf16", "fp32"]
HiddenAct = Literal["gelu", "gelu_pytorch_tanh"]

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Hugging Face's names of the two GELUs; the last three are one formula
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# masks and rotary frequencies that transformers before 4.48 saved: recomputed everywhere
_LEGACY_BUFFER = re.compile(
    r"gpt_neox\.(layers\.\d+\.attention\.(bias|masked_bias)|"
    r"(layers\.\d+\.attention\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached))"
)


def shapes(m: Model) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the 12·layers + 4 parameters, in the order of the model."""
    h, vocab = m.hidden, m.vocab_size
    layer = {
        "input_layernorm.weight": (h,),
        "input_layernorm.bias": (h,),
        "post_attention_layernorm.weight": (h,),
        "post_attention_layernorm.bias": (h,),
        "attention.query_key_value.weight": (3 * h, h),
        "attention.query_key_value.bias": (3 * h,),
        "attention.dense.weight": (h, h),
        "attention.dense.bias": (h,),
        "mlp.dense_h_to_4h.weight": (4 * h, h),
        "mlp.dense_h_to_4h.bias": (4 * h,),
        "mlp.dense_4h_to_h.weight": (h, 4 * h),
        "mlp.dense_4h_to_h.bias": (h,),
    }
    return {
        "gpt_neox.embed_in.weight": (vocab, h),
        **{
            f"gpt_neox.layers.{i}.{k}": shape for i in range(m.layers) for k, shape in layer.items()
        },
        "gpt_neox.final_layer_norm.weight": (h,),
        "gpt_neox.final_layer_norm.bias": (h,),
        "embed_out.weight": (vocab, h),
    }


def _check_shapes(where: Path, model: Model, tensors: dict[str, Tensor]) -> None:
    expected = shapes(model)
    for name, shape in expected.items():
        if name not in tensors:
            raise InputError(f"{where}: the parameter {name} is missing")
        if tuple(tensors[name].shape) != shape:
            found = list(tensors[name].shape)
            raise InputError(f"{where}: {name} has shape {found}, config says {list(shape)}")
    for name in tensors:
        if name not in expected:
            raise InputError(f"{where}: the tensor {name} is not part of this model")


# --- export ---------------------------------------------------------------------------------------


def export(
    checkpoint_path: Path,
    out_dir: Path,
    dtype: Dtype = "fp16",
    tokenizer: Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
    hidden_act: HiddenAct = "gelu",
) -> Path:
    """Writes a checkpoint as a directory for AutoModelForCausalLM and AutoTokenizer.

    dtype: of the weights on disk (the suite: fp16). tokenizer: a tokenizer.json, copied byte for
    byte; None takes the run's own, if it named one. hidden_act: "gelu", the exact erf form, is what
    the suite's published config.json says, although GPT-NeoX trained it with the tanh form (as this
    package does unless model.activation is "gelu"); "gelu_pytorch_tanh" is the function that was
    trained. Logits differ slightly.

    All or nothing. Raises InputError where out_dir is not empty, a value does not fit into dtype,
    or the tokenizer has more ids than the model; CheckError where the checkpoint is damaged.
    """
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise InputError(f"{out_dir} exists already and is not empty")
    config = checkpoint.config_of(checkpoint_path)
    model, seq_len = config.model, config.data.seq_len
    if tokenizer is None and config.data.tokenizer:
        tokenizer = Path(config.data.tokenizer)
    files = _tokenizer_files(tokenizer, model.vocab_size) if tokenizer else {}
    end = _end_of_text(tokenizer) if tokenizer else 0
    files["config.json"] = _json(_hf_config(model, seq_len, dtype, hidden_act, end))
    files["generation_config.json"] = _json({"bos_token_id": end, "eos_token_id": end})
    tensors = checkpoint.load_all(checkpoint_path)
    _check_shapes(checkpoint_path, model, tensors)
    try:
        with publish_directory(out_dir.absolute()) as temporary:
            _write_weights(temporary, tensors, dtype, max_shard_bytes)
            for name, data in files.items():
                (temporary / name).write_bytes(data)
            for file in temporary.iterdir():
                with file.open("rb") as f:
                    os.fsync(f.fileno())
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {out_dir}: {error}") from error
    return out_dir


def _hf_config(m: Model, seq_len: int, dtype: str, act: str, end: int) -> dict[str, Any]:
    """config.json as the suite published it (transformers 4.24); 5.x reads the same keys."""
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "bos_token_id": end,
        "eos_token_id": end,
        "hidden_act": act,
        "hidden_size": m.hidden,
        "initializer_range": 0.02,
        "intermediate_size": 4 * m.hidden,
        "layer_norm_eps": m.norm_eps,
        "max_position_embeddings": seq_len,
        "model_type": "gpt_neox",
        "num_attention_heads": m.heads,
        "num_hidden_layers": m.layers,
        "rotary_emb_base": int(m.rotary_base) if m.rotary_base.is_integer() else m.rotary_base,
        "rotary_pct": m.rotary_pct,
        "tie_word_embeddings": False,
        "torch_dtype": str(_DTYPES[dtype]).removeprefix("torch."),
        "transformers_version": "4.24.0",
        "use_cache": True,
        "use_parallel_residual": True,
        "vocab_size": m.vocab_size,
    }


def _write_weights(path: Path, tensors: dict[str, Tensor], dtype: str, max_bytes: int) -> None:
    """model.safetensors, or shards of at most max_bytes (a larger tensor: alone) and an index.

    Takes each tensor out of `tensors` as it goes: at most one shard is held twice.
    """
    to = _DTYPES[dtype]
    sizes = {name: tensor.numel() * to.itemsize for name, tensor in tensors.items()}
    shards: list[list[str]] = [[]]
    for name in sorted(sizes):
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + sizes[name] > max_bytes:
            shards.append([])
        shards[-1].append(name)
    n = len(shards)
    names = ["model.safetensors"]
    if n > 1:
        names = [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {
                t: file for file, shard in zip(names, shards, strict=True) for t in shard
            },
        }
        (path / "model.safetensors.index.json").write_bytes(_json(index))
    jobs = zip(names, shards, strict=True)
    quiet = not console.is_terminal
    for file, shard in track(jobs, "exporting", n, console=console, transient=True, disable=quiet):
        converted = {name: _convert(name, tensors.pop(name), to) for name in shard}
        save_file(converted, path / file, metadata={"format": "pt"})


def _convert(name: str, tensor: Tensor, to: torch.dtype) -> Tensor:
    converted = tensor.to(to).contiguous()
    if (converted.isinf() & ~tensor.isinf()).any():
        largest = tensor.abs().max().item()
        kind = str(to).removeprefix("torch.")
        raise InputError(f"{name} has values up to {largest:g}, beyond the range of {kind}")
    return converted


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _end_of_text(path: Path) -> int:
    """The id of <|endoftext|>; 0, the suite's, where the tokenizer has none."""
    return load_tokenizer(path).token_to_id(END_OF_TEXT) or 0


def _tokenizer_files(path: Path, vocab_size: int) -> dict[str, bytes]:
    """Name -> contents of the three files AutoTokenizer reads.

    PreTrainedTokenizerFast is the class that takes tokenizer.json as it is: GPTNeoXTokenizer of
    transformers 5 keeps its vocabulary and merges and replaces the rest by its own.
    """
    tokenizer = load_tokenizer(path, vocab_size)
    special = {}
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    return {
        "tokenizer.json": path.read_bytes(),
        "special_tokens_map.json": _json(special),
        "tokenizer_config.json": _json(
            {
                **special,
                "clean_up_tokenization_spaces": False,
                "tokenizer_class": "PreTrainedTokenizerFast",
            }
        ),
    }


# --- import ---------------------------------------------------------------------------------------


def import_(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads a GPTNeoX directory: (config keys for `config.resolve`, name -> tensor as stored).

    The keys are the model's ("model.layers" ..) and "data.seq_len"; model.activation is what the
    file's hidden_act says (see `export`). Reads model.safetensors or pytorch_model.bin, whole or
    sharded; drops the buffers that old versions of transformers saved. Raises InputError naming
    the first tensor that is missing, unexpected or of another shape.
    """
    keys = _read_hf_config(directory)
    model = resolve(keys).model
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(directory):
        for name, tensor in _read_weights(file):
            name = "embed_out.weight" if name == "lm_head.weight" else name
            if name in tensors:
                raise InputError(f"{file}: the tensor {name} is there twice")
            if tensor.dtype not in _DTYPES.values():
                kind = str(tensor.dtype).removeprefix("torch.")
                raise InputError(f"{file}: {name} is {kind}, expected float16, bfloat16, float32")
            tensors[name] = tensor
    _check_shapes(directory, model, tensors)
    return keys, tensors


def import_checkpoint(directory: Path, run_dir: Path) -> Path:
    """Starts a run from a GPTNeoX directory: <run>/checkpoints/step0, in fp32.

    A page of the same shapes trains on from there, with moments of zero and its own recipe.
    The checkpoint holds the weights ("model.<name>") and no optimizer state, and names the
    directory's tokenizer.json, where there is one. Returns its path.
    """
    keys, tensors = import_(directory)
    if (directory / "tokenizer.json").exists():
        tokenizer = _inside(directory, "tokenizer.json")
        load_tokenizer(tokenizer, keys["model.vocab_size"])
        keys["data.tokenizer"] = str(tokenizer)
    config: Config = resolve(keys)
    extra = {"config": flatten(config), "tokens": 0}
    weights = {f"model.{name}": tensor.float() for name, tensor in tensors.items()}
    return checkpoint.start_run(run_dir, 0, weights, extra)


def _read_hf_config(directory: Path) -> dict[str, Any]:
    file = _inside(directory, "config.json")
    hf = _read_json(file)
    if hf.get("model_type") != "gpt_neox":
        raise InputError(f"{file}: model_type is {hf.get('model_type')!r}, expected 'gpt_neox'")
    rope = hf.get("rope_parameters") or {}  # transformers 5
    if not isinstance(rope, dict):
        raise InputError(f"{file}: rope_parameters is not an object")
    for key, found, wanted in (
        ("use_parallel_residual", hf.get("use_parallel_residual", True), True),
        ("tie_word_embeddings", hf.get("tie_word_embeddings", False), False),
        ("attention_bias", hf.get("attention_bias", True), True),
        ("rope_scaling", hf.get("rope_scaling"), None),
        ("rope_type", rope.get("rope_type", "default"), "default"),
        ("intermediate_size / hidden_size", _ratio(file, hf), 4),
    ):
        if found != wanted:
            raise InputError(f"{file}: {key} = {found!r} is not supported, only {wanted!r}")
    activation = hf.get("hidden_act", "gelu")
    if activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise InputError(f"{file}: hidden_act = {activation!r} is none of {known}")
    pct = rope.get("partial_rotary_factor", hf.get("rotary_pct", 0.25))
    base = rope.get("rope_theta", hf.get("rotary_emb_base", 10000))
    return {
        "model.layers": _number(file, "num_hidden_layers", hf.get("num_hidden_layers"), int),
        "model.hidden": _number(file, "hidden_size", hf.get("hidden_size"), int),
        "model.heads": _number(file, "num_attention_heads", hf.get("num_attention_heads"), int),
        "model.vocab_size": _number(file, "vocab_size", hf.get("vocab_size"), int),
        "model.rotary_pct": _number(file, "rotary_pct", pct, float),
        "model.rotary_base": _number(file, "rotary_emb_base", base, float),
        "model.norm_eps": _number(file, "layer_norm_eps", hf.get("layer_norm_eps", 1e-5), float),
        "model.activation": _ACTIVATIONS[activation],
        "data.seq_len": _number(
            file, "max_position_embeddings", hf.get("max_position_embeddings"), int
        ),
    }


def _ratio(file: Path, hf: dict[str, Any]) -> float:
    inner = _number(file, "intermediate_size", hf.get("intermediate_size"), int)
    return inner / max(_number(file, "hidden_size", hf.get("hidden_size"), int), 1)


def _number(file: Path, key: str, value: Any, kind: type[int] | type[float]) -> int | float:
    if type(value) is not int and not (kind is float and type(value) is float):
        raise InputError(f"{file}: {key} = {value!r}, expected a number")
    return kind(value)


def _weight_files(directory: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (directory / name).exists():
            return [_inside(directory, name)]
        index = f"{name}.index.json"
        if (directory / index).exists():
            file = _inside(directory, index)
            weight_map = _read_json(file).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise InputError(f"{file}: no weight_map in it")
            return [_inside(directory, str(shard)) for shard in sorted(set(weight_map.values()))]
    raise InputError(f"{directory}: neither model.safetensors nor pytorch_model.bin, nor an index")


def _read_weights(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as f:
                for name in f.keys():  # noqa: SIM118  (not a mapping)
                    if not _LEGACY_BUFFER.fullmatch(name):
                        yield name, f.get_tensor(name)
            return
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch.load raise nearly anything
        reason = str(error).partition("\n")[0]
        raise InputError(f"{file} cannot be read: {reason}") from error
    if not isinstance(state, dict):
        raise InputError(f"{file} is not a state dict")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InputError(f"{file}: {name!r} is not a tensor")
        if not _LEGACY_BUFFER.fullmatch(name):
            yield name, tensor


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{file} is not a JSON object")
    return value


def _inside(directory: Path, name: str) -> Path:
    """directory/name, refused where it leaves the directory.

    The links of the Hugging Face cache, snapshots/<revision>/<name> -> blobs/<hash>, stay inside.
    """
    root = directory.resolve()
    roots = [root]
    if root.parent.name == "snapshots":
        roots.append(root.parent.parent / "blobs")
    path = directory / name
    if Path(name).name != name or path.resolve().parent not in roots:
        raise InputError(f"{directory}: {name!r} leads out of the directory")
    return path
