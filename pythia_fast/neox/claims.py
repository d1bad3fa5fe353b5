"""What a NeoX checkpoint says of its run beside its tensors, as keys of a page.

A YAML or `args` gives keys under GPT-NeoX's names; our own export adds the keys that decide the
losses under `OWN`, because its files may have other degrees of parallelism than the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pythia_fast.errors import InputError

OWN = "pythia_fast"  # of mp_rank_*_model_states.pt
TENSOR = "tensor-parallel ranks"  # no key of a page

_KEYS = {
    "model_parallel_size": TENSOR,
    "num_layers": "model.layers",
    "hidden_size": "model.hidden",
    "num_attention_heads": "model.heads",
    "padded_vocab_size": "model.vocab_size",
    "rotary_pct": "model.rotary_pct",
    "rotary_emb_base": "model.rotary_base",
    "layernorm_epsilon": "model.norm_eps",
    "max_position_embeddings": "data.seq_len",
    "train_iters": "train.steps",
    "train_batch_size": "train.batch_size",
    "seed": "train.seed",
    "min_lr": "optimizer.min_lr",
    "warmup": "optimizer.warmup",
    "weight_decay": "optimizer.weight_decay",
    "gradient_clipping": "optimizer.clip",
    "optimizer.params.lr": "optimizer.lr",
    "optimizer.params.betas": "optimizer.betas",
    "optimizer.params.eps": "optimizer.eps",
}


class Claims:
    """Keys as `config.resolve` takes them; a second word on a key must be the first one's."""

    def __init__(self) -> None:
        self.keys: dict[str, Any] = {}
        self._said: dict[str, str] = {}

    def add(self, key: str, value: Any, where: str, name: str = "") -> None:
        """Takes key = value. name: what `where` calls it. Raises InputError on another value."""
        value = tuple(value) if isinstance(value, list) else value
        first = self.keys.setdefault(key, value)
        if first != value:
            raise InputError(f"{where}: {name or key} = {value!r}, but {self._said[key]} {first}")
        self._said.setdefault(key, f"{where} says" if where else "the files hold")

    def add_files(self, keys: dict[str, Any]) -> None:
        """Takes what tensors and counts show."""
        for key, value in keys.items():
            self.add(key, value, "")

    def add_page(self, page: dict[str, Any], where: str) -> None:
        """Takes what a YAML or `args` says under GPT-NeoX's names."""
        for name, value in _flat(page):
            if name in _KEYS:
                self.add(_KEYS[name], _number(value), where, name)
        scaled = page.get("fp16")
        if isinstance(scaled, dict) and scaled.get("enabled"):
            bf16 = scaled.get("type") == "bfloat16"
            self.add("precision.compute", "bf16" if bf16 else "fp16", where, "fp16")

    def add_own(self, keys: Any, where: str) -> None:
        """Takes what our own export wrote."""
        if not isinstance(keys, dict) or not all(isinstance(key, str) for key in keys):
            raise InputError(f"{where}: {OWN} is not a table of keys")
        for key, value in keys.items():
            self.add(key, value, where)


def _flat(page: dict[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in page.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{at}{key}.")
        else:
            yield f"{at}{key}", value


def _number(value: Any) -> Any:
    """YAML 1.1 takes 6e-4, without a point, for text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
