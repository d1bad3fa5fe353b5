"""GPT-NeoX in numpy: forward, backward and optimizer of the original, written out by hand.

Independent of the package and of autograd. Everything is float64 but the rotary table, whose
rounding is the subject. Tensor parallelism is simulated literally: every rank has its own shard or
copy of each parameter with its own Adam state, and the norm is summed over all ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


# --- the model ------------------------------------------------------------------------------------


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Values rounded to bf16 by way of fp32, to nearest and ties to even; fp32 holds them."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def rope_tables(length: int, dims: int, rounded: str) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin (length, dims/2) of angles that were formed in fp32, fp16 or bf16."""
    inv_freq = np.float32(1) / np.float32(10000) ** (np.arange(0, dims, 2, dtype=np.float32) / dims)
    if rounded == "bf16":
        angles = to_bf16(to_bf16(np.arange(length))[:, None] * to_bf16(inv_freq))
        wide = angles.astype(np.float64)
        return to_bf16(np.cos(wide)).astype(np.float64), to_bf16(np.sin(wide)).astype(np.float64)
    kind = {"fp32": np.float32, "fp16": np.float16}[rounded]
    angles = np.arange(length).astype(kind)[:, None] * inv_freq.astype(kind)
    assert angles.dtype == kind
    cos, sin = (f(angles.astype(np.float64)).astype(kind) for f in (np.cos, np.sin))
    return cos.astype(np.float64), sin.astype(np.float64)


def _rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, back: bool = False) -> np.ndarray:
    """x (B, T, H, D): the first R dims of each head by its position's angles; back: transposed."""
    half = cos.shape[1]
    c, s = cos[:, None, :], (-sin if back else sin)[:, None, :]
    a, b = x[..., :half], x[..., half : 2 * half]
    return np.concatenate([a * c - b * s, b * c + a * s, x[..., 2 * half :]], axis=-1)


def _norm(x: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """(x − mean)/√(var + eps) and 1/√(var + eps)."""
    centred = x - x.mean(-1, keepdims=True)
    inverse = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return centred * inverse, inverse


def _norm_back(grad: np.ndarray, xhat: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    mean = grad.mean(-1, keepdims=True)
    return inverse * (grad - mean - xhat * (grad * xhat).mean(-1, keepdims=True))


def _gelu(u: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """GELU and its derivative: the tanh form with the original's constants, or erf."""
    if kind == "gelu_tanh":
        t = np.tanh(0.7978845608028654 * u * (1 + 0.044715 * u * u))
        slope = 0.5 * u * (1 - t * t) * (0.7978845608028654 + 0.10703222440890037 * u * u)
        return 0.5 * u * (1 + t), slope + 0.5 * (1 + t)
    phi = 0.5 * (1 + np.vectorize(math.erf)(u / math.sqrt(2)))
    return u * phi, phi + u * np.exp(-u * u / 2) / math.sqrt(2 * math.pi)


def _outer(grad: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Weight gradient of y = x Wᵀ."""
    return np.einsum("btn,btm->nm", grad, x)


def loss_and_gradients(
    p: Arrays, rows: np.ndarray, layers: int, heads: int,
    rotary_pct: float = 0.25, activation: str = "gelu_tanh", rope: str = "fp32", eps: float = 1e-5,
) -> tuple[float, Arrays]:  # fmt: skip
    """Mean next-token loss of rows (B, T + 1), and its gradient by every parameter."""
    tokens, targets = rows[:, :-1], rows[:, 1:]
    B, T = tokens.shape
    h = p["gpt_neox.embed_in.weight"].shape[1]
    D = h // heads
    cos, sin = rope_tables(T, int(D * rotary_pct), rope)
    mask = np.triu(np.full((T, T), -np.inf), 1)
    x = p["gpt_neox.embed_in.weight"][tokens]
    kept: list[Any] = []
    for i in range(layers):
        w = {k: p[f"gpt_neox.layers.{i}.{k}"] for k in _LAYER}
        xhat, inverse = _norm(x, eps)
        x1 = xhat * w["input_layernorm.weight"] + w["input_layernorm.bias"]
        x2 = xhat * w["post_attention_layernorm.weight"] + w["post_attention_layernorm.bias"]
        qkv = x1 @ w["attention.query_key_value.weight"].T + w["attention.query_key_value.bias"]
        q, k, v = np.split(qkv.reshape(B, T, heads, 3 * D), 3, axis=-1)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(D) + mask
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        context = np.einsum("bhqk,bkhd->bqhd", weights, v).reshape(B, T, h)
        u = x2 @ w["mlp.dense_h_to_4h.weight"].T + w["mlp.dense_h_to_4h.bias"]
        act, slope = _gelu(u, activation)
        kept.append((w, xhat, inverse, x1, x2, q, k, v, weights, context, act, slope))
        attn = context @ w["attention.dense.weight"].T + w["attention.dense.bias"]
        x = x + attn + act @ w["mlp.dense_4h_to_h.weight"].T + w["mlp.dense_4h_to_h.bias"]
    xhat, inverse = _norm(x, eps)
    final = xhat * p["gpt_neox.final_layer_norm.weight"] + p["gpt_neox.final_layer_norm.bias"]
    logits = final @ p["embed_out.weight"].T
    logits -= logits.max(-1, keepdims=True)
    total = np.exp(logits).sum(-1, keepdims=True)
    picked = np.take_along_axis(logits, targets[..., None], -1)
    loss = float((np.log(total) - picked).mean())

    g: Arrays = {}
    d = np.exp(logits) / total
    np.put_along_axis(d, targets[..., None], np.take_along_axis(d, targets[..., None], -1) - 1, -1)
    d /= B * T
    g["embed_out.weight"] = _outer(d, final)
    d = d @ p["embed_out.weight"]
    g["gpt_neox.final_layer_norm.weight"] = (d * xhat).sum((0, 1))
    g["gpt_neox.final_layer_norm.bias"] = d.sum((0, 1))
    d = _norm_back(d * p["gpt_neox.final_layer_norm.weight"], xhat, inverse)
    for i in reversed(range(layers)):
        w, xhat, inverse, x1, x2, q, k, v, weights, context, act, slope = kept[i]
        own: Arrays = {
            "attention.dense.weight": _outer(d, context),
            "attention.dense.bias": d.sum((0, 1)),
            "mlp.dense_4h_to_h.weight": _outer(d, act),
            "mlp.dense_4h_to_h.bias": d.sum((0, 1)),
        }
        du = (d @ w["mlp.dense_4h_to_h.weight"]) * slope
        own["mlp.dense_h_to_4h.weight"], own["mlp.dense_h_to_4h.bias"] = (
            _outer(du, x2), du.sum((0, 1)),
        )  # fmt: skip
        dc = (d @ w["attention.dense.weight"]).reshape(B, T, heads, D)
        dv = np.einsum("bhqk,bqhd->bkhd", weights, dc)
        dw = np.einsum("bqhd,bkhd->bhqk", dc, v)
        ds = weights * (dw - (dw * weights).sum(-1, keepdims=True)) / math.sqrt(D)
        dq = _rotate(np.einsum("bhqk,bkhd->bqhd", ds, k), cos, sin, back=True)
        dk = _rotate(np.einsum("bhqk,bqhd->bkhd", ds, q), cos, sin, back=True)
        dqkv = np.concatenate([dq, dk, dv], axis=-1).reshape(B, T, 3 * h)
        own["attention.query_key_value.weight"] = _outer(dqkv, x1)
        own["attention.query_key_value.bias"] = dqkv.sum((0, 1))
        d1 = dqkv @ w["attention.query_key_value.weight"]
        d2 = du @ w["mlp.dense_h_to_4h.weight"]
        for name, dn in (("input_layernorm", d1), ("post_attention_layernorm", d2)):
            own[f"{name}.weight"], own[f"{name}.bias"] = (dn * xhat).sum((0, 1)), dn.sum((0, 1))
        into = d1 * w["input_layernorm.weight"] + d2 * w["post_attention_layernorm.weight"]
        d = d + _norm_back(into, xhat, inverse)
        g |= {f"gpt_neox.layers.{i}.{k}": value for k, value in own.items()}
    g["gpt_neox.embed_in.weight"] = np.zeros_like(p["gpt_neox.embed_in.weight"])
    np.add.at(g["gpt_neox.embed_in.weight"], tokens, d)
    return loss, g


_LAYER = (
    *("input_layernorm.weight", "input_layernorm.bias"),
    *("post_attention_layernorm.weight", "post_attention_layernorm.bias"),
    *("attention.query_key_value.weight", "attention.query_key_value.bias"),
    *("attention.dense.weight", "attention.dense.bias"),
    *("mlp.dense_h_to_4h.weight", "mlp.dense_h_to_4h.bias"),
    *("mlp.dense_4h_to_h.weight", "mlp.dense_4h_to_h.bias"),
)


# --- the optimizer --------------------------------------------------------------------------------


def neox_v1_rate(n: int, steps: int, lr: float, min_lr: float, warmup: float = 0.01) -> float:
    """GPT-NeoX v1.0: linear to lr over W, then half a cosine of period 2·steps, never under min_lr."""
    rise = warmup * steps
    if n <= rise and rise > 0:
        return lr * n / rise
    return max(min_lr, lr * (1 + math.cos(math.pi * (min(n, steps - rise) - rise) / steps)) / 2)


def cosine_rate(n: int, steps: int, lr: float, min_lr: float, warmup: float = 0.01) -> float:
    """The textbook curve: (n + 1)/W up, then down to min_lr at the last step."""
    rise = warmup * steps
    if n + 1 < rise:
        return lr * (n + 1) / rise
    share = (n + 1 - rise) / (steps - rise)
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * share)) / 2


def shards(name: str, whole: np.ndarray, ranks: int) -> list[np.ndarray]:
    """What each tensor-parallel rank holds of a parameter: a part, a copy, or a summand."""
    if name.endswith(("attention.dense.bias", "dense_4h_to_h.bias")):
        return [whole / ranks for _ in range(ranks)]
    if "norm" in name:
        return [whole.copy() for _ in range(ranks)]
    row = name.endswith(("attention.dense.weight", "dense_4h_to_h.weight"))
    return [part.copy() for part in np.split(whole, ranks, axis=1 if row else 0)]


def merged(name: str, parts: list[np.ndarray]) -> np.ndarray:
    if name.endswith(("attention.dense.bias", "dense_4h_to_h.bias")):
        return np.sum(parts, axis=0)
    if "norm" in name:
        return np.mean(parts, axis=0)
    row = name.endswith(("attention.dense.weight", "dense_4h_to_h.weight"))
    return np.concatenate(parts, axis=1 if row else 0)


@dataclass
class NumpyAdamW:
    """AdamW of the original on `ranks` tensor-parallel ranks; `values` maps names to whole arrays."""

    values: Arrays
    ranks: int = 1
    copies_in_norm: bool = True
    step_offset: int = 1
    decay_embeddings: bool = True
    clip: float = 1.0
    clip_eps: float = 1e-6
    weight_decay: float = 0.1
    updates: int = 0
    parts: dict[str, list[np.ndarray]] = field(init=False)
    m: dict[str, list[np.ndarray]] = field(init=False)
    v: dict[str, list[np.ndarray]] = field(init=False)

    def __post_init__(self) -> None:
        self.parts = {
            k: shards(k, w.astype(np.float64), self.ranks) for k, w in self.values.items()
        }
        self.m = {k: [np.zeros_like(s) for s in parts] for k, parts in self.parts.items()}
        self.v = {k: [np.zeros_like(s) for s in parts] for k, parts in self.parts.items()}

    def _gradient(self, name: str, whole: np.ndarray) -> list[np.ndarray]:
        if "norm" in name or name.endswith(("attention.dense.bias", "dense_4h_to_h.bias")):
            return [whole] * self.ranks  # every copy sees the gradient of the sum
        return shards(name, whole, self.ranks)

    def step(self, gradients: Arrays, lr: float) -> float:
        """One update; returns the norm before clipping."""
        split = {k: self._gradient(k, g) for k, g in gradients.items()}
        squares = {k: sum(float((s**2).sum()) for s in parts) for k, parts in split.items()}
        if not self.copies_in_norm:
            squares = {k: float((g**2).sum()) for k, g in gradients.items()}
        norm = math.sqrt(sum(squares.values()))
        factor = min(1.0, self.clip / (norm + self.clip_eps))
        self.updates += 1
        t = self.updates + self.step_offset
        for name, parts in split.items():
            decay = self.weight_decay if self._decays(name) else 0.0
            for rank, gradient in enumerate(parts):
                g = gradient * factor
                m = self.m[name][rank] = 0.9 * self.m[name][rank] + 0.1 * g
                v = self.v[name][rank] = 0.95 * self.v[name][rank] + 0.05 * g * g
                update = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
                w = self.parts[name][rank]
                self.parts[name][rank] = w - lr * (update + decay * w)
            self.values[name] = merged(name, self.parts[name])
        return norm

    def moments(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """m and v of the whole parameter; copies and summands all have the same ones."""
        whole = self._gradient(name, self.values[name])[0].shape == self.values[name].shape
        m, v = self.m[name], self.v[name]
        return (m[0], v[0]) if whole else (merged(name, m), merged(name, v))

    def _decays(self, name: str) -> bool:
        if name in ("gpt_neox.embed_in.weight", "embed_out.weight"):
            return self.decay_embeddings
        return self.values[name].ndim == 2
