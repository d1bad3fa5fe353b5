"""One run, one TOML page: frozen dataclasses, read strictly.

    config = load("configs/pythia-70m.toml", ["--train.steps", "100"])

Precedence: defaults < preset < file < flags. An unknown key, a wrong type or numbers that do not
fit together are an `InputError` of one line. Numbers that follow from others are properties.
Imports neither torch nor numpy: `pythia-fast --help` stays instant.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pythia_fast.errors import InputError


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
    warmup: float = _key(0.01, "share of the steps with rising learning rate")
    betas: tuple[float, float] = _key((0.9, 0.95), "Adam's decay rates")
    eps: float = _key(1e-8, "Adam's epsilon")
    step_offset: int = _key(
        1, "added to Adam's count of updates: GPT-NeoX v1.0 took an empty step first; textbook: 0"
    )
    weight_decay: float = _key(0.1, "decoupled decay of all matrices; never of biases and norms")
    clip: float = _key(1.0, "bound of the global gradient norm")
    backend: Literal["auto", "triton", "torch"] = _key(
        "auto", "who runs AdamW; auto: triton where the kernels are triton"
    )


@dataclass(frozen=True)
class Precision:
    compute: Literal["bf16", "fp32"] = _key(
        "bf16", "dtype of weights and activations; master weights and statistics are fp32"
    )


@dataclass(frozen=True)
class Checkpoint:
    steps: Literal["pythia"] | tuple[int, ...] = _key(
        "pythia", "kept for ever: 0,1,2,4..512,1000,2000.. or a list; the last step always"
    )
    every: int = _key(0, "steps between rolling checkpoints for resuming; 0: none")
    keep: int = _key(2, "rolling checkpoints kept")


@dataclass(frozen=True)
class Kernels:
    backend: Literal["auto", "triton", "reference"] = _key(
        "auto", "auto: triton on a GPU, plain torch elsewhere"
    )


@dataclass(frozen=True)
class Log:
    every: int = _key(1, "steps between rows of metrics.jsonl")
    sample: str = _key("", "prompt continued at the end of training; needs data.tokenizer")
    tensorboard: bool = _key(False, "also write TensorBoard files (extra: tensorboard)")
    wandb: str = _key("", "Weights & Biases project (extra: wandb); empty: off")


@dataclass(frozen=True)
class Config:
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    optimizer: Optimizer = field(default_factory=Optimizer)
    precision: Precision = field(default_factory=Precision)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    kernels: Kernels = field(default_factory=Kernels)
    log: Log = field(default_factory=Log)

    @property
    def tokens_per_step(self) -> int:
        return self.train.batch_size * self.data.seq_len

    @property
    def decisive(self) -> dict[str, Any]:
        """The keys that decide the losses beyond rounding: not paths, layout, logs, storage."""
        return {k: v for k, v in flatten(self).items() if k not in _NOT_DECISIVE}

    @property
    def digest(self) -> str:
        """sha256 of `decisive`."""
        return hashlib.sha256(json.dumps(self.decisive, sort_keys=True).encode()).hexdigest()


_NOT_DECISIVE = frozenset(
    """
    model.preset data.prefix data.valid_prefix data.tokenizer data.cache
    train.micro_batch_size train.valid_every train.valid_rows optimizer.backend kernels.backend
    checkpoint.steps checkpoint.every checkpoint.keep
    log.every log.sample log.tensorboard log.wandb
    """.split()
)


# --- the suite ------------------------------------------------------------------------------------


def _published(
    layers: int, hidden: int, heads: int, lr: float, vocab: int = 50304, init: str = "small-wang"
) -> dict[str, Any]:
    """What the published run of one size fixes (semantics: GPT-NeoX v1.0 and the suite's YAML)."""
    return {
        "model.layers": layers,
        "model.hidden": hidden,
        "model.heads": heads,
        "model.vocab_size": vocab,
        "model.init": init,
        "optimizer.lr": lr,
        "optimizer.min_lr": round(lr / 10, 12),  # 6e-5, not 5.9999999999999995e-05
    }


# Learning rate of 1b: 2.5e-4 in the YAML that ran, 3e-4 in paper and README.
SUITE: dict[str, dict[str, Any]] = {
    "pythia-14m": _published(6, 128, 4, 1e-3),
    "pythia-31m": _published(6, 256, 8, 1e-3),
    "pythia-70m": _published(6, 512, 8, 1e-3),
    "pythia-160m": _published(12, 768, 12, 6e-4),
    "pythia-410m": _published(24, 1024, 16, 3e-4),
    "pythia-1b": _published(16, 2048, 8, 2.5e-4),
    "pythia-1.4b": _published(24, 2048, 16, 2e-4),
    "pythia-2.8b": _published(32, 2560, 32, 1.6e-4),
    "pythia-6.9b": _published(32, 4096, 32, 1.2e-4, vocab=50432, init="normal"),
    "pythia-12b": _published(36, 5120, 40, 1.2e-4, vocab=50688, init="normal"),
}


def published(preset: str) -> dict[str, Any]:
    """Dotted key -> value of the published recipe of one preset (the original's precision too)."""
    values = flatten(_apply(Config(), SUITE[preset]))
    values["model.preset"] = preset
    values["precision.compute"] = "bf16" if preset == "pythia-1b" else "fp16"
    values["model.rope_table"] = values["precision.compute"]
    return values


def differences(config: Config) -> list[str]:
    """How a run differs from the published recipe of its preset, a line a key; paths left out."""
    if not config.model.preset:
        return []
    ours, theirs = flatten(config), published(config.model.preset)
    if config.data.order == "preshuffled":  # the original's order, already applied to the files
        ours["data.order"] = theirs["data.order"]
    sections = (
        *("model.", "optimizer.", "precision.", "data.order", "data.seq_len"),
        *("train.steps", "train.batch_size", "train.seed"),
    )
    return [
        f"{key} = {_toml_value(ours[key])} (published: {_toml_value(theirs[key])})"
        for key in ours
        if key.startswith(sections) and key != "optimizer.backend" and ours[key] != theirs[key]
    ]


# --- reading --------------------------------------------------------------------------------------


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The resolved configuration of a TOML page and `--section.key value` flags; validated."""
    path = Path(path)
    try:
        page = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: {error}") from None
    values: dict[str, Any] = {}
    for section, keys in page.items():
        if not isinstance(keys, dict):
            raise InputError(f"{path}: {section} stands outside of a [section]")
        if section not in _SECTIONS:
            _hint(f"{section}.", f"{path}: ")
        values.update({f"{section}.{key}": value for key, value in keys.items()})
    return resolve(values, overrides, f"{path}: ")


def resolve(values: dict[str, Any], overrides: Sequence[str] = (), where: str = "") -> Config:
    """Defaults < preset < values (dotted keys, as TOML or JSON gives them) < flags, validated.

    where: what the values came from, for messages.
    """
    values = {name: _checked(name, value, where) for name, value in values.items()}
    values |= parse_overrides(overrides)
    preset = values.get("model.preset", "")
    if preset and preset not in SUITE:
        raise InputError(f"model.preset = {preset!r} is unknown{_nearest(preset, SUITE)}")
    config = _apply(Config(), {**SUITE.get(preset, {}), **values})
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


_SECTIONS: dict[str, Any] = get_type_hints(Config)
_KEYS: dict[str, Any] = {
    f"{section}.{key}": hint
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
        converted = _convert(value, option)
        if converted is not None:
            return converted
    raise InputError(f"{where}{name} = {value!r}: expected {_describe(hint)}")


def _convert(value: Any, hint: Any) -> Any:
    """value as hint, or None where it is of another kind. bool is no int, nan is no float."""
    if get_origin(hint) is Literal:
        return value if value in get_args(hint) and isinstance(value, str) else None
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            return None
        kinds = get_args(hint)
        kinds = (kinds[0],) * len(value) if kinds[-1] is Ellipsis else kinds
        items = tuple(_convert(v, k) for v, k in zip(value, kinds, strict=False))
        return None if len(value) != len(kinds) or None in items else items
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if math.isfinite(value) else None
    return value if type(value) is hint else None


def _describe(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_describe(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(repr(choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        return f"a list of {'' if kinds[-1] is Ellipsis else f'{len(kinds)} '}{kinds[0].__name__}s"
    return {
        "int": "a whole number",
        "float": "a number",
        "str": "a string",
        "bool": "true or false",
    }[hint.__name__]


def _apply(config: Config, values: dict[str, Any]) -> Config:
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = value
    return replace(
        config, **{name: replace(getattr(config, name), **keys) for name, keys in sections.items()}
    )


# --- validation -----------------------------------------------------------------------------------


def validate(config: Config) -> None:
    """Raises InputError naming the key, or the two numbers that do not fit."""
    m, d, t, o, c = config.model, config.data, config.train, config.optimizer, config.checkpoint
    for name in ("model.layers", "model.hidden", "model.heads", "model.vocab_size", "data.seq_len"):
        _positive(config, name)
    for name in ("train.steps", "train.batch_size", "train.micro_batch_size"):
        _positive(config, name)
    for name in ("train.valid_every", "train.valid_rows", "log.every", "optimizer.clip"):
        _positive(config, name)
    for name in ("checkpoint.keep", "model.rotary_base", "model.norm_eps", "optimizer.lr"):
        _positive(config, name)
    if m.hidden % m.heads:
        raise InputError(f"model.heads = {m.heads} does not divide model.hidden = {m.hidden}")
    if not 0 < m.rotary_pct <= 1 or m.rotary_dim % 2 or m.rotary_dim == 0:
        raise InputError(
            f"model.rotary_pct = {m.rotary_pct} of head dim {m.head_dim} gives {m.rotary_dim} "
            "rotary dims: an even number of at least 2 is needed"
        )
    if t.batch_size % t.micro_batch_size:
        raise InputError(
            f"train.batch_size = {t.batch_size} is not divisible by "
            f"train.micro_batch_size = {t.micro_batch_size}"
        )
    if not 0 <= t.seed < 2**32:
        raise InputError(f"train.seed = {t.seed}: expected a number in [0, 2^32)")
    if not 0 <= o.min_lr <= o.lr:
        raise InputError(f"optimizer.min_lr = {o.min_lr} is not in [0, optimizer.lr = {o.lr}]")
    if not 0 <= o.warmup < 1:
        raise InputError(f"optimizer.warmup = {o.warmup}: expected a share in [0, 1)")
    if not all(0 <= b < 1 for b in o.betas):
        raise InputError(f"optimizer.betas = {list(o.betas)}: expected numbers in [0, 1)")
    if o.step_offset < 0:
        raise InputError(f"optimizer.step_offset = {o.step_offset} must not be negative")
    if o.eps <= 0 or o.weight_decay < 0:
        raise InputError(
            f"optimizer: eps = {o.eps} and weight_decay = {o.weight_decay} must be > 0"
        )
    if c.every < 0 or (c.steps != "pythia" and any(s < 0 for s in c.steps)):
        raise InputError("checkpoint: steps must not be negative")
    if config.log.sample and not d.tokenizer:
        raise InputError("log.sample needs data.tokenizer")


def _positive(config: Config, name: str) -> None:
    section, _, key = name.partition(".")
    if getattr(getattr(config, section), key) <= 0:
        raise InputError(f"{name} = {getattr(getattr(config, section), key)} must be positive")


# --- writing --------------------------------------------------------------------------------------


def flatten(config: Config) -> dict[str, Any]:
    """Dotted key -> value."""
    return {
        f"{section}.{key}": value
        for section, keys in dataclasses.asdict(config).items()
        for key, value in keys.items()
    }


def to_toml(config: Config) -> str:
    """The resolved page; `load` reads it back equal."""
    lines: list[str] = []
    for section, keys in dataclasses.asdict(config).items():
        lines += ["", f"[{section}]"]
        lines += [f"{key} = {_toml_value(value)}" for key, value in keys.items()]
    return "\n".join(lines).lstrip() + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple | list):
        return f"[{', '.join(_toml_value(v) for v in value)}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)


def describe_keys() -> Iterator[tuple[str, str, str]]:
    """(dotted key, default as TOML, one-line doc) of every key, in page order."""
    for section, cls in _SECTIONS.items():
        for f in dataclasses.fields(cls):
            yield f"{section}.{f.name}", _toml_value(f.default), f.metadata["doc"]
