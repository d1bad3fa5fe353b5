"""Every public op of the kernels in one table: inputs, what is compared, and necessary bytes.

The GPU check, the benchmarks and the tests of both read `OPS`; nothing else lists the ops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.op import Draw, Inputs, Op, Shape
from pythia_fast.kernels import reference
from pythia_fast.kernels.rounding import joined_master, split_master
from pythia_fast.model import rotary_tables


def _rotary(s: Shape, dtype: torch.dtype, draw: Draw) -> dict[str, Any]:
    tables = rotary_tables(s.positions, s.head_dim // 4)
    cos, sin = (t.to(draw.device) for t in tables)
    return {
        "qkv": draw(s.batch, s.positions, s.heads, 3 * s.head_dim, dtype=dtype),
        "cos": cos,
        "sin": sin,
    }


def _documents(s: Shape, dtype: torch.dtype, draw: Draw) -> dict[str, Any]:
    """Attention within documents of some hundred positions."""
    begins = draw(s.batch, s.positions, dtype=torch.float32) > 2.886  # one in 512
    begins[:, :: max(s.positions // 10, 512)] = True
    at = torch.arange(s.positions, device=draw.device).expand(s.batch, -1)
    starts = torch.where(begins, at, 0).cummax(1).values.int()
    return _rotary(s, dtype, draw) | {"doc_start": starts}


def _cache(s: Shape, dtype: torch.dtype, draw: Draw) -> dict[str, Any]:
    """One new position over a full cache."""
    keys, values = (draw(s.batch, s.heads, s.positions, s.head_dim, dtype=dtype) for _ in range(2))
    q = draw(s.batch, 1, s.heads, s.head_dim, dtype=dtype)
    return {"q": q, "keys": keys, "values": values, "filled": s.positions}


def _norms(count: int) -> Inputs:
    names = ("weight", "bias") if count == 1 else ("weight1", "bias1", "weight2", "bias2")

    def inputs(s: Shape, dtype: torch.dtype, draw: Draw) -> dict[str, Any]:
        x = draw(s.batch, s.positions, s.hidden, dtype=dtype)
        return {"x": x, **{name: draw(s.hidden, dtype=dtype) for name in names}}

    return inputs


def _residual(s: Shape, dtype: torch.dtype, draw: Draw) -> dict[str, Any]:
    rows = {n: draw(s.batch, s.positions, s.hidden, dtype=dtype) for n in ("x", "attn", "mlp")}
    return rows | {n: draw(s.hidden, dtype=dtype) for n in ("attn_bias", "mlp_bias")}


def _residual_norms(s: Shape, dtype: torch.dtype, draw: Draw) -> dict[str, Any]:
    names = ("weight1", "bias1", "weight2", "bias2")
    return _residual(s, dtype, draw) | {n: draw(s.hidden, dtype=dtype) for n in names}


def _gelu(approximate: str) -> Inputs:
    def inputs(s: Shape, dtype: torch.dtype, draw: Draw) -> dict[str, Any]:
        x = draw(s.batch, s.positions, 4 * s.hidden, dtype=dtype)
        return {"x": x, "bias": draw(4 * s.hidden, dtype=dtype), "approximate": approximate}

    return inputs


def _logits(s: Shape, dtype: torch.dtype, draw: Draw) -> dict[str, Any]:
    """Standard deviation 3, so that a row has a few probabilities that matter."""
    logits = (3 * draw(s.rows, s.vocab, dtype=torch.float32)).to(dtype)
    return {"logits": logits, "targets": draw.targets(s.rows, s.vocab)}


def _shard(s: Shape, dtype: torch.dtype, draw: Draw) -> dict[str, Any]:
    """The second half of the vocabulary of a two-way split."""
    half = s.vocab // 2
    values = _logits(s, dtype, draw)
    shard = values["logits"][:, half:].contiguous()
    return {"logits": shard, "targets": values["targets"], "vocab_start": half}


def _shard_statistics(s: Shape, dtype: torch.dtype, draw: Draw) -> dict[str, Any]:
    """Those of both halves, each of which knows the target's logit of its own rows."""
    half = s.vocab // 2
    values = _logits(s, dtype, draw)
    pieces = ((values["logits"][:, :half], 0), (values["logits"][:, half:], half))
    stats = [reference.cross_entropy_stats(x, values["targets"], start) for x, start in pieces]
    names = ("row_max", "row_sum", "row_target")
    return dict(zip(names, map(torch.stack, zip(*stats, strict=True)), strict=True))


def _shard_grad(s: Shape, dtype: torch.dtype, draw: Draw) -> dict[str, Any]:
    half = s.vocab // 2
    values = _logits(s, dtype, draw)
    return {
        "logits": values["logits"][:, half:].contiguous(),
        "targets": values["targets"],
        "lse": values["logits"].float().logsumexp(1),
        "scale": 0.25,
        "vocab_start": half,
    }


def _head(s: Shape, dtype: torch.dtype, draw: Draw) -> dict[str, Any]:
    weight = draw(s.vocab, s.hidden, dtype=torch.float32) * (3 / s.hidden**0.5)
    return {
        "x": draw(s.rows, s.hidden, dtype=dtype),
        "weight": weight.to(dtype),
        "targets": draw.targets(s.rows, s.vocab),
        "chunk_rows": max(s.rows // 2, 1),
    }


def _embedding(s: Shape, dtype: torch.dtype, draw: Draw) -> dict[str, Any]:
    """Ids as text has them: the k-th most frequent about 1/k of the time."""
    uniform = torch.special.ndtr(draw(s.rows, dtype=torch.float32))
    return {
        "grad": draw(s.vocab, s.hidden, dtype=torch.float32),
        "dy": draw(s.rows, s.hidden, dtype=dtype),
        "ids": (s.vocab**uniform).long().sub_(1).clamp_(0, s.vocab - 1),
    }


def _flat(s: Shape, dtype: torch.dtype, draw: Draw) -> dict[str, Any]:
    """State after some steps: v near g², weights of a few per cent."""

    def one(value: float) -> Tensor:
        return torch.full((), value, dtype=torch.float32, device=draw.device)

    master = 0.02 * draw(s.flat, dtype=torch.float32)
    return {
        "weight": None if dtype == torch.float32 else master.to(dtype),
        "master": master,
        "exp_avg": 0.1 * draw(s.flat, dtype=torch.float32),
        "exp_avg_sq": draw(s.flat, dtype=torch.float32).square_(),
        "grad": draw(s.flat, dtype=torch.float32),
        "decay_until": s.flat * 2 // 3 // 128 * 128,  # where optim.AdamW lets vectors begin
        "lr": one(1e-2),
        "step": one(7.0),
        "grad_scale": one(0.5),
    }


def _lean(s: Shape, dtype: torch.dtype, draw: Draw) -> dict[str, Any]:
    """The same state as halves of the master and bf16 moments; gradients in dtype."""
    flat = _flat(s, dtype, draw)
    weight, remainder = split_master(flat["master"])
    moments = {name: flat[name].bfloat16() for name in ("exp_avg", "exp_avg_sq")}
    names = ("decay_until", "lr", "step", "grad_scale")
    return {
        "weight": weight,
        "remainder": remainder,
        **moments,
        "grad": flat["grad"].to(dtype),
        **{name: flat[name] for name in names},
        "seed": torch.tensor([1234], device=draw.device),
    }


def _lean_seen(values: dict[str, Any]) -> dict[str, Tensor]:
    """The halves of the master as one; in float64 the weight is all of it."""
    weight, moments = values["weight"], {n: values[n] for n in ("exp_avg", "exp_avg_sq")}
    wide = weight.dtype == torch.float64
    return moments | {"master": weight if wide else joined_master(weight, values["remainder"])}


def _list(s: Shape, dtype: torch.dtype, draw: Draw) -> dict[str, Any]:
    """The same state as tensors of a matrix's and of a vector's size in turn; vectors decay not."""
    flat = _flat(s, dtype, draw)
    matrix = max(s.flat // 7, s.hidden)
    sizes: list[int] = []
    while (left := s.flat - sum(sizes)) > 0:
        sizes.append(min(left, s.hidden if len(sizes) % 2 else matrix))
    names = {"weight": "weights", "master": "masters", "exp_avg": "exp_avgs"}
    names |= {"exp_avg_sq": "exp_avg_sqs", "grad": "grads"}
    lists = {
        n: flat[k] if flat[k] is None else list(flat[k].split(sizes)) for k, n in names.items()
    }
    decays = {"decays": [i % 2 == 0 for i in range(len(sizes))]}
    return lists | decays | {name: flat[name] for name in ("lr", "step", "grad_scale")}


def _padded(s: Shape, dtype: torch.dtype, draw: Draw) -> dict[str, Any]:
    """Five new positions; rows begin later and later, the last with its last position."""
    count = min(5, s.positions)
    values = _cache(s, dtype, draw)
    first = torch.linspace(0, s.positions - 1, s.batch, device=draw.device).int()
    q = draw(s.batch, count, s.heads, s.head_dim, dtype=dtype)
    return values | {"q": q, "first": first}


def _heads(s: Shape) -> tuple[int, ...]:
    return (s.batch, s.positions, s.heads, s.head_dim)


def _hidden(s: Shape) -> tuple[int, ...]:
    return (s.batch, s.positions, s.hidden)


def _vocabulary(s: Shape) -> tuple[int, ...]:
    return (s.rows, s.vocab)


def _rows_moved(count: int, width: int = 1) -> Callable[[Shape, int], int]:
    """count tensors of (rows, width·h)."""
    return lambda s, size: count * s.rows * width * s.hidden * size


def _logits_moved(count: int, share: int = 1) -> Callable[[Shape, int], int]:
    return lambda s, size: count * s.rows * (s.vocab // share) * size


def _rotary_moved(s: Shape, size: int) -> int:
    return 4 * size * (s.head_dim // 4 // 2 * 2) * s.rows * s.heads


def _causal(s: Shape, inputs: dict[str, Any]) -> float:
    """FLOPs of causal attention's forward: 4·B·H·T²·D, halved; within documents Σ n² for B·T²."""
    squares = s.batch * s.positions**2
    if (starts := inputs.get("doc_start")) is not None:
        at = torch.arange(s.positions, device=starts.device)
        squares = int((2 * (at - starts) + 1).sum())  # Σ (2j + 1) over j < n is n²
    return 2.0 * squares * s.hidden


def _attention(label: str, inputs: Inputs, **fields: Any) -> Op:
    return Op(
        label=label,
        file="attention",
        name="attention",
        inputs=inputs,
        key=_heads,
        bytes_moved={},
        differentiable=("qkv",),
        consumed=("qkv",),
        flops={"forward": _causal, "backward": lambda s, inputs: 2.5 * _causal(s, inputs)},
        products=True,
        **fields,
    )


_NORM1 = ("weight", "bias")
_NORM2 = ("weight1", "bias1", "weight2", "bias2")
_BIASES = ("attn_bias", "mlp_bias")

OPS: tuple[Op, ...] = (
    Op(
        label="rotary",
        file="rotary",
        name="rotary",
        inputs=_rotary,
        key=_heads,
        bytes_moved={"forward": _rotary_moved, "backward": _rotary_moved},
        differentiable=("qkv",),
        consumed=("qkv",),
    ),
    _attention("attention", _rotary),
    _attention(
        "attention any order",
        lambda s, dtype, draw: _rotary(s, dtype, draw) | {"deterministic": False},
        repeats=False,
    ),
    _attention("attention documents", _documents),
    *(
        Op(
            label=label,
            file="attention_decode",
            name="attention_decode",
            inputs=inputs,
            key=_heads,
            bytes_moved={"forward": lambda s, size: 2 * s.rows * s.hidden * size},
            products=True,
        )
        for label, inputs in (("attention_decode", _cache), ("attention_decode padded", _padded))
    ),
    Op(
        label="layer_norm",
        file="layer_norm",
        name="layer_norm",
        inputs=_norms(1),
        key=_hidden,
        bytes_moved={"forward": _rows_moved(2), "backward": _rows_moved(3)},
        differentiable=("x", *_NORM1),
    ),
    Op(
        label="dual_layer_norm",
        file="layer_norm",
        name="dual_layer_norm",
        inputs=_norms(2),
        key=_hidden,
        bytes_moved={"forward": _rows_moved(3), "backward": _rows_moved(5)},
        differentiable=("x", *_NORM2),
    ),
    Op(
        label="parallel_residual",
        file="parallel_residual",
        name="parallel_residual",
        inputs=_residual,
        key=_hidden,
        bytes_moved={"forward": _rows_moved(4), "backward": _rows_moved(1)},
        differentiable=("x", "attn", "mlp", *_BIASES),
    ),
    Op(
        label="parallel_residual_dual_layer_norm",
        file="parallel_residual",
        name="parallel_residual_dual_layer_norm",
        inputs=_residual_norms,
        key=_hidden,
        bytes_moved={"forward": _rows_moved(6), "backward": _rows_moved(5)},
        differentiable=("x", "attn", "mlp", *_BIASES, *_NORM2),
    ),
    *(
        Op(
            label=f"gelu {form}",
            file="gelu",
            name="gelu",
            inputs=_gelu(approximate),
            key=_hidden,
            bytes_moved={"forward": _rows_moved(2, 4), "backward": _rows_moved(3, 4)},
            differentiable=("x", "bias"),
        )
        for form, approximate in (("tanh", "tanh"), ("erf", "none"))
    ),
    Op(
        label="cross_entropy",
        file="cross_entropy",
        name="cross_entropy",
        inputs=lambda s, dtype, draw: _logits(s, dtype, draw) | {"scale": 1 / s.rows},
        key=_vocabulary,
        bytes_moved={"both": _logits_moved(2)},
        differentiable=("logits",),
        consumed=("logits",),
    ),
    Op(
        label="cross_entropy_stats",
        file="cross_entropy_shards",
        name="cross_entropy_stats",
        inputs=_shard,
        key=_vocabulary,
        bytes_moved={"forward": _logits_moved(1, 2)},
    ),
    Op(
        label="cross_entropy_combine",
        file="cross_entropy_shards",
        name="cross_entropy_combine",
        inputs=_shard_statistics,
        key=_vocabulary,
        bytes_moved={"forward": lambda s, size: (2 * 3 + 2) * 4 * s.rows},
    ),
    Op(
        label="cross_entropy_grad_",
        file="cross_entropy_shards",
        name="cross_entropy_grad_",
        inputs=_shard_grad,
        key=_vocabulary,
        bytes_moved={"forward": _logits_moved(2, 2)},
        written=("logits",),
    ),
    Op(
        label="linear_cross_entropy",
        file="linear_cross_entropy",
        name="linear_cross_entropy",
        inputs=lambda s, dtype, draw: _head(s, dtype, draw) | {"scale": 1 / s.rows},
        key=lambda s: (s.rows, s.hidden, s.vocab),
        bytes_moved={},
        differentiable=("x", "weight"),
        flops={"both": lambda s, _: 6.0 * s.rows * s.hidden * s.vocab},
        products=True,
    ),
    Op(
        label="embedding_grad_",
        file="embedding",
        name="embedding_grad_",
        inputs=_embedding,
        key=lambda s: (s.rows, s.hidden, s.vocab),
        # rows of dy and their order; rows of grad that no id names are not necessary
        bytes_moved={"forward": lambda s, size: s.rows * (s.hidden * size + 24)},
        written=("grad",),
    ),
    Op(
        label="grad_norm",
        file="adam",
        name="grad_norm",
        inputs=lambda s, dtype, draw: {"grad": draw(s.flat, dtype=torch.float32)},
        key=lambda s: (s.flat,),
        bytes_moved={"forward": lambda s, size: 4 * s.flat},
    ),
    Op(
        label="adamw_",
        file="adam",
        name="adamw_",
        inputs=_flat,
        key=lambda s: (s.flat,),
        # read master, m, v, gradient in fp32; write master, m, v in fp32 and the weight
        bytes_moved={"forward": lambda s, size: (7 * 4 + size) * s.flat},
        consumed=("grad",),  # by torch's fused AdamW; ours leaves it
        written=("weight", "master", "exp_avg", "exp_avg_sq"),
    ),
    Op(
        label="adamw_lean_",
        file="adam_lean",
        name="adamw_lean_",
        inputs=_lean,
        key=lambda s: (s.flat,),
        bytes_moved={"forward": lambda s, size: (8 * 2 + size) * s.flat},
        written=("weight", "remainder", "exp_avg", "exp_avg_sq"),
        seen=_lean_seen,
    ),
    Op(
        label="adamw_list_",
        file="adam_list",
        name="adamw_list_",
        inputs=_list,
        key=lambda s: (s.flat,),
        bytes_moved={"forward": lambda s, size: (7 * 4 + size) * s.flat},
        consumed=("grads",),  # as above
        written=("weights", "masters", "exp_avgs", "exp_avg_sqs"),
    ),
)


def find(label: str) -> Op:
    """The op of that label."""
    return next(op for op in OPS if op.label == label)
