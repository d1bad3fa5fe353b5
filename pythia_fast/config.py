"""One run, one TOML page: frozen dataclasses, read strictly.

    config = load("configs/pythia-70m.toml", ["--train.steps", "100"])

Precedence: defaults < preset < recipe < file < flags (a recipe given as a flag is one of them). An
unknown key, a wrong type or numbers that do not fit together (`validation.py`) are an `InputError`
of one line. Numbers that follow from others are properties. Imports neither torch nor numpy:
`pythia-fast --help` stays instant.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import keyword
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pythia_fast.errors import InputError
from pythia_fast.recipe import PRESETS, switches
from pythia_fast.validation import validate
from pythia_fast.values import convert, describe, toml_value


def _key(default: Any, doc: str) -> Any:
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class Model:
    preset: str = _key("", "a published model, e.g. pythia-70m; other keys override it")
    layers: int = _key(6, "transformer blocks")
    hidden: int = _key(512, "width of the residual stream")
    heads: int = _key(8, "attention heads; must divide hidden")
    vocab_size: int = _key(50304, "rows of both embeddings, padding rows included")
    rotary_pct: float = _key(0.25, "share of each head that is rotated")
    rotary_base: float = _key(10000.0, "base of the rotary frequencies")
    rope_table: Literal["fp32", "fp16", "bf16"] = _key(
        "fp32", "dtype in which the rotary angles are formed (the original: the compute dtype)"
    )
    activation: Literal["gelu_tanh", "gelu"] = _key(
        "gelu_tanh", "tanh form (GPT-NeoX in training) or exact erf (Hugging Face in inference)"
    )
    norm_eps: float = _key(1e-5, "epsilon of every LayerNorm")
    init: Literal["small-wang", "normal"] = _key(
        "small-wang", "small_init/wang_init; 6.9b and 12b used normal 0.02, 0.02/sqrt(2 layers)"
    )

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rotary_pct)

    @property
    def parameters(self) -> int:
        return self.non_embedding_parameters + 2 * self.vocab_size * self.hidden

    @property
    def non_embedding_parameters(self) -> int:
        return self.layers * (12 * self.hidden**2 + 13 * self.hidden) + 2 * self.hidden


@dataclass(frozen=True)
class Data:
    prefix: str = _key("", "path of the token files without .bin/.idx")
    order: Literal["gpt-neox", "preshuffled", "sequential"] = _key(
        "gpt-neox", "how rows are drawn: the original shuffle, rows already shuffled, file order"
    )
    seq_len: int = _key(2048, "positions a row; rows carry one token more")
    valid_prefix: str = _key("", "held-out token files; empty: no validation")
    tokenizer: str = _key("", "tokenizer.json, for samples and export")
    cache: str = _key("", "where index files go; empty: beside the data")


@dataclass(frozen=True)
class Train:
    steps: int = _key(143000, "optimizer steps")
    batch_size: int = _key(1024, "rows a step, over all devices")
    micro_batch_size: int = _key(32, "rows a forward pass on one device")
    seed: int = _key(1234, "seed of the data order and of the initial weights")
    valid_every: int = _key(1000, "steps between validations; also at the end")
    valid_rows: int = _key(64, "held-out rows a validation reads")


@dataclass(frozen=True)
class Optimizer:
    lr: float = _key(1e-3, "peak learning rate")
    min_lr: float = _key(1e-4, "learning rate at the end")
    schedule: Literal["neox-v1", "cosine"] = _key(
        "neox-v1", "the original's curve (first update at 0, flat tail) or the textbook cosine"
    )
    schedule_counts: Literal["updates", "steps"] = _key(
        "updates", "what moves the schedule: a step skipped for overflow is no update"
    )
    warmup: float = _key(0.01, "share of the steps with rising learning rate")
    betas: tuple[float, float] = _key((0.9, 0.95), "Adam's decay rates")
    eps: float = _key(1e-8, "Adam's epsilon")
    step_offset: int = _key(
        1, "added to Adam's count of updates: GPT-NeoX v1.0 took an empty step first; textbook: 0"
    )
    weight_decay: float = _key(0.1, "decoupled decay of all matrices; never of biases and norms")
    decay_embeddings: bool = _key(True, "embed_in and embed_out decay too")
    clip: float = _key(1.0, "bound of the global gradient norm")
    clip_eps: float = _key(1e-6, "added to the norm before clipping divides by it")
    row_bias_copies: int = _key(
        1, "tensor-parallel copies that attention.dense.bias and dense_4h_to_h.bias are the sum of"
    )
    norm_copies: int = _key(
        1, "times that LayerNorms and those biases count in the gradient norm (tensor degree)"
    )
    states: Literal["fp32", "lean"] = _key(
        "fp32", "lean: 8 bytes a parameter, exact fp32 master, moments in bf16 rounded at random"
    )
    backend: Literal["auto", "triton", "torch"] = _key(
        "auto", "who runs AdamW; auto: triton where the kernels are triton"
    )


@dataclass(frozen=True)
class Precision:
    compute: Literal["bf16", "fp16", "fp32"] = _key(
        "bf16", "dtype of weights and activations; master weights and statistics are fp32"
    )
    gradients: Literal["fp32", "fp16", "bf16"] = _key(
        "fp32", "dtype in which microbatches add up: fp32 or the compute dtype"
    )
    gradient_sum: Literal["fp32", "fp16", "bf16"] = _key(
        "fp32", "dtype in which data-parallel ranks add up: fp32 or that of precision.gradients"
    )
    sum_ranks: int = _key(
        1, "data-parallel ranks that add up before their sum is divided (16-bit gradients)"
    )
    loss_scaling: Literal["none", "dynamic", "hysteresis"] = _key(
        "none", "fp16: each overflow halves the loss scale, or (hysteresis) all but the first"
    )
    unscale_after_update: bool = _key(
        False, "divide gradients by the loss scale that this step has just changed"
    )

    @property
    def ranks(self) -> int:
        """Ranks whose 16-bit gradients are rounded one by one; fp32 ones need no such care."""
        return 1 if self.gradients == "fp32" else self.sum_ranks


@dataclass(frozen=True)
class Parallel:
    data: int = _key(-1, "copies of the model that split each step's rows; -1: what is left")
    tensor: int = _key(1, "processes that share each layer's matrices")
    pipeline: int = _key(1, "processes that share the layers, each one stage or several")
    sequence: bool = _key(False, "split the residual stream's positions over the tensor processes")
    schedule: Literal["gpipe", "1f1b", "interleaved-1f1b", "zero-bubble"] = _key(
        "1f1b", "order of a pipeline's microbatches (1f1b of fewer than its processes is gpipe)"
    )
    stages_per_rank: int = _key(1, "pipeline stages of one process (interleaved-1f1b, zero-bubble)")
    shard: Literal["none", "optimizer", "full"] = _key(
        "optimizer", "what data-parallel processes split: nothing, optimizer states, weights too"
    )
    timeout: float = _key(
        600.0, "seconds without an answer after which a process is given up, once a step is done"
    )

    @property
    def processes(self) -> int:
        """Of the layout; data-parallel ones that are left to the launch (-1) count as one."""
        return self.tensor * self.pipeline * max(self.data, 1)


@dataclass(frozen=True)
class Checkpoint:
    steps: Literal["pythia"] | tuple[int, ...] = _key(
        "pythia", "kept for ever: 0,1,2,4..512,1000,2000.. or a list; the last step always"
    )
    every: int = _key(0, "steps between rolling checkpoints for resuming; 0: none")
    keep: int = _key(2, "rolling checkpoints kept")
    async_: bool = _key(
        False, "write beside the next steps, from a copy in the host's memory (12 B a parameter)"
    )


@dataclass(frozen=True)
class Kernels:
    backend: Literal["auto", "triton", "reference"] = _key(
        "auto", "auto: triton on a GPU, plain torch elsewhere"
    )
    deterministic: bool = _key(
        True, "gradients repeat bit for bit; false: the attention that measures fastest on the GPU"
    )
    recompute: Literal["none", "selective"] = _key(
        "none", "selective: fused blocks make norms and GELU again, 9 instead of 15 h a token kept"
    )
    graph: bool = _key(
        True, "replay the fused step as one CUDA graph; the same bits as launch by launch"
    )


@dataclass(frozen=True)
class Log:
    every: int = _key(1, "steps between rows of metrics.jsonl")
    sample: str = _key("", "prompt continued at the end of training; needs data.tokenizer")
    tensorboard: bool = _key(False, "also write TensorBoard files (extra: tensorboard)")
    wandb: str = _key("", "Weights & Biases project (extra: wandb); empty: off")


@dataclass(frozen=True)
class Config:
    recipe: Literal["", "pythia-v1", "modern"] = _key(
        "", "a named set of switches that other keys override (train --explain); empty: defaults"
    )
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    optimizer: Optimizer = field(default_factory=Optimizer)
    precision: Precision = field(default_factory=Precision)
    parallel: Parallel = field(default_factory=Parallel)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    kernels: Kernels = field(default_factory=Kernels)
    log: Log = field(default_factory=Log)

    @property
    def tokens_per_step(self) -> int:
        return self.train.batch_size * self.data.seq_len

    @property
    def accumulation(self) -> int:
        """Microbatches that one data-parallel rank accumulates."""
        return self.train.batch_size // (self.precision.ranks * self.train.micro_batch_size)

    @property
    def decisive(self) -> dict[str, Any]:
        """The keys that decide the losses beyond rounding: not paths, layout, logs, storage.

        Rows a microbatch are one where gradients add up in 16 bits.
        """
        rounding = {"train.micro_batch_size"} if self.precision.gradients == "fp32" else set()
        return {k: v for k, v in flatten(self).items() if k not in _NOT_DECISIVE | rounding}

    @property
    def digest(self) -> str:
        """sha256 of `decisive`."""
        return hashlib.sha256(json.dumps(self.decisive, sort_keys=True).encode()).hexdigest()


_NOT_DECISIVE = frozenset(
    """
    recipe model.preset data.prefix data.valid_prefix data.tokenizer data.cache
    train.valid_every train.valid_rows optimizer.backend kernels.backend kernels.recompute
    kernels.graph checkpoint.steps checkpoint.every checkpoint.keep checkpoint.async
    parallel.data parallel.tensor parallel.pipeline parallel.sequence parallel.schedule
    parallel.stages_per_rank parallel.shard parallel.timeout
    log.every log.sample log.tensorboard log.wandb
    """.split()
)


# --- reading --------------------------------------------------------------------------------------


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The resolved configuration of a TOML page and `--section.key value` flags; validated."""
    return resolve(read_page(Path(path)), overrides, f"{path}: ")


def read_page(path: Path) -> dict[str, Any]:
    """Dotted key -> value of a TOML page, as it is written there."""
    try:
        page = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: {error}") from None
    values: dict[str, Any] = {}
    for section, keys in page.items():
        if section == "recipe":
            values["recipe"] = keys
            continue
        if not isinstance(keys, dict):
            raise InputError(f"{path}: {section} stands outside of a [section]")
        if section not in _SECTIONS:
            _hint(f"{section}.", f"{path}: ")
        values.update({f"{section}.{key}": value for key, value in keys.items()})
    return values


def resolve(values: dict[str, Any], overrides: Sequence[str] = (), where: str = "") -> Config:
    """Defaults < preset < recipe < values < flags, validated.

    values: dotted keys, as TOML or JSON gives them. where: what they came from, for messages.
    """
    values = {name: _checked(name, value, where) for name, value in values.items()}
    flags = parse_overrides(overrides)
    preset = {**values, **flags}.get("model.preset", "")
    if preset and preset not in PRESETS:
        raise InputError(f"model.preset = {preset!r} is unknown{_nearest(preset, PRESETS)}")
    values |= switches(flags.get("recipe", ""), preset) | flags  # a flag's recipe is over the file
    named = switches(values.get("recipe", ""), preset)
    config = _apply(Config(), {**PRESETS.get(preset, {}), **named, **values})
    validate(config)
    return config


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`["--train.steps", "10", "--log.wandb=x"]` -> {"train.steps": 10, "log.wandb": "x"}."""
    values: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise InputError(f"unexpected argument {flag!r}: overrides are --section.key value")
        name, has_value, text = flag[2:].partition("=")
        hint = _hint(name, "command line: ")
        if not has_value:
            if not rest:
                raise InputError(f"--{name} needs a value")
            text = rest.pop(0)
        values[name] = _checked(name, _parse(text, hint), "command line: ")
    return values


def _parse(text: str, hint: Any) -> Any:
    """A flag's text as TOML where that gives the wanted kind, else as a plain string."""
    if hint is str:
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _key_of(field_name: str) -> str:
    """The key of a field: `async` is a keyword of Python, its field is `async_`."""
    return field_name.removesuffix("_")


def _field_of(key: str) -> str:
    return f"{key}_" if keyword.iskeyword(key) else key


_SECTIONS: dict[str, Any] = get_type_hints(Config)
_RECIPE = _SECTIONS.pop("recipe")
_KEYS: dict[str, Any] = {"recipe": _RECIPE} | {
    f"{section}.{_key_of(key)}": hint
    for section, cls in _SECTIONS.items()
    for key, hint in get_type_hints(cls).items()
}


def _hint(name: str, where: str) -> Any:
    if name in _KEYS:
        return _KEYS[name]
    section = name.partition(".")[0]
    if section not in _SECTIONS:
        raise InputError(f"{where}unknown section [{section}]{_nearest(section, _SECTIONS)}")
    raise InputError(f"{where}unknown key {name}{_nearest(name, _KEYS)}")


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f"; did you mean {close[0]}?" if close else ""


def _checked(name: str, value: Any, where: str) -> Any:
    hint = _hint(name, where)
    for option in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
        converted = convert(value, option)
        if converted is not None:
            return converted
    raise InputError(f"{where}{name} = {value!r}: expected {describe(hint)}")


def _apply(config: Config, values: dict[str, Any]) -> Config:
    sections: dict[str, dict[str, Any]] = {}
    recipe = values.get("recipe", config.recipe)
    for name in values.keys() - {"recipe"}:
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[_field_of(key)] = values[name]
    parts = {name: replace(getattr(config, name), **keys) for name, keys in sections.items()}
    return replace(config, recipe=recipe, **parts)


# --- writing --------------------------------------------------------------------------------------


def flatten(config: Config) -> dict[str, Any]:
    """Dotted key -> value."""
    return {"recipe": config.recipe} | {
        f"{section}.{_key_of(key)}": value
        for section in _SECTIONS
        for key, value in dataclasses.asdict(getattr(config, section)).items()
    }


def to_toml(config: Config) -> str:
    """The resolved page; `load` reads it back equal."""
    lines = [f"recipe = {toml_value(config.recipe)}"]
    for section in _SECTIONS:
        lines += ["", f"[{section}]"]
        keys = dataclasses.asdict(getattr(config, section))
        lines += [f"{_key_of(key)} = {toml_value(value)}" for key, value in keys.items()]
    return "\n".join(lines).lstrip() + "\n"


def describe_keys() -> Iterator[tuple[str, str, str]]:
    """(dotted key, default as TOML, one-line doc) of every key, in page order."""
    recipe = next(f for f in dataclasses.fields(Config) if f.name == "recipe")
    yield "recipe", toml_value(recipe.default), recipe.metadata["doc"]
    for section, cls in _SECTIONS.items():
        for f in dataclasses.fields(cls):
            yield f"{section}.{_key_of(f.name)}", toml_value(f.default), f.metadata["doc"]
