"""GPT-NeoX as Pythia trained it: parallel residual, partial rotary, two LayerNorms a block.

Parameter names are Hugging Face's, so export is a plain mapping. The model says nothing of
devices, precision, optimizers or parallelism; the ops it runs on are handed in.

Shapes: B rows, T positions, H heads, D head dim, R rotary dims, h = H·D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pythia_fast.config import Model
from pythia_fast.ops import REFERENCE, Ops

if TYPE_CHECKING:
    from pythia_fast.block import Fused

Attend = Callable[[Tensor], Tensor]
"""Packed projection (B, T, H, 3·D), unrotated -> context (B, T, h)."""


class Attention(nn.Module):
    """The two products around attention; rows of query_key_value are h0: q k v | h1: q k v ..."""

    def __init__(self, c: Model) -> None:
        super().__init__()
        self.heads = c.heads
        self.query_key_value = nn.Linear(c.hidden, 3 * c.hidden)
        self.dense = nn.Linear(c.hidden, c.hidden)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:  # dense.bias: added by the block
        qkv = self.query_key_value(x).unflatten(-1, (self.heads, -1))  # (B, T, H, 3·D)
        return F.linear(attend(qkv), self.dense.weight)


class MLP(nn.Module):
    def __init__(self, c: Model, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.approximate = "tanh" if c.activation == "gelu_tanh" else "none"
        self.dense_h_to_4h = nn.Linear(c.hidden, 4 * c.hidden)
        self.dense_4h_to_h = nn.Linear(4 * c.hidden, c.hidden)

    def forward(self, x: Tensor) -> Tensor:  # dense_4h_to_h.bias: added by the block
        u = F.linear(x, self.dense_h_to_4h.weight)  # (B, T, 4h)
        u = self.ops.gelu(u, self.dense_h_to_4h.bias, self.approximate)
        return F.linear(u, self.dense_4h_to_h.weight)


class Layer(nn.Module):
    """y = x + Attention(LN₁ x) + MLP(LN₂ x), both norms of the same x."""

    def __init__(self, c: Model, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.input_layernorm = nn.LayerNorm(c.hidden, eps=c.norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(c.hidden, eps=c.norm_eps)
        self.attention = Attention(c)
        self.mlp = MLP(c, ops)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        n1, n2 = self.input_layernorm, self.post_attention_layernorm
        x, x1, x2 = self.ops.dual_layer_norm(x, n1.weight, n1.bias, n2.weight, n2.bias, n1.eps)
        attn, mlp = self.attention(x1, attend), self.mlp(x2)
        return self.ops.parallel_residual(
            x, attn, mlp, self.attention.dense.bias, self.mlp.dense_4h_to_h.bias
        )


class GPTNeoX(nn.Module):
    def __init__(self, c: Model, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.embed_in = nn.Embedding(c.vocab_size, c.hidden)
        self.layers = nn.ModuleList(Layer(c, ops) for _ in range(c.layers))
        self.final_layer_norm = nn.LayerNorm(c.hidden, eps=c.norm_eps)
        # called with embedding, layer, norm or head before it runs: its weights may be on their way
        self.before: Callable[[nn.Module], None] = lambda module: None

    def forward(self, x: Tensor, blocks: list[Callable[[Tensor], Tensor]]) -> Tensor:
        """x: the embedded tokens (B, T, h)."""
        for block in blocks:
            x = block(x)
        return self.final(x)

    def final(self, x: Tensor) -> Tensor:
        norm = self.final_layer_norm
        self.before(norm)
        return self.ops.layer_norm(x, norm.weight, norm.bias, norm.eps)


class Pythia(nn.Module):
    """tokens (B, T) int64 -> logits (B, T, V). Built on the meta device: see `materialise`."""

    def __init__(self, c: Model, ops: Ops = REFERENCE) -> None:
        super().__init__()
        self.config, self.ops = c, ops
        with torch.device("meta"):
            self.gpt_neox = GPTNeoX(c, ops)
            self.embed_out = nn.Linear(c.hidden, c.vocab_size, bias=False)
        self._tables: tuple[Tensor, Tensor] | None = None
        self.fused: Fused | None = None  # takes the place of embedding, layers, head

    def forward(self, tokens: Tensor, attend: list[Attend] | None = None) -> Tensor:
        """attend: one callable a layer in place of causal attention (generation has a cache)."""
        blocks = self.blocks(tokens.shape[1], tokens.device, attend)
        x = self.gpt_neox(self.embed(tokens), blocks)
        self.gpt_neox.before(self.embed_out)
        return self.embed_out(x)

    def embed(self, tokens: Tensor) -> Tensor:
        """x (B, T, h) of tokens (B, T)."""
        self.gpt_neox.before(self.gpt_neox.embed_in)
        if self.fused is not None:
            return self.fused.embed(tokens)
        return self.ops.embedding(tokens, self.gpt_neox.embed_in.weight)

    def blocks(
        self, length: int, device: torch.device, attend: list[Attend] | None = None
    ) -> list[Callable[[Tensor], Tensor]]:
        """x -> y of each layer for T = length: on its own ops, or as one fused function."""
        layers = list(self.gpt_neox.layers)
        runs: list[Callable[[Tensor], Tensor]]
        if attend is not None:
            runs = [partial(y, attend=a) for y, a in zip(layers, attend, strict=True)]
        else:
            cos, sin = self.rotary_tables(length, device)
            runs = [
                partial(y, attend=lambda qkv: self.ops.attention(qkv, cos, sin)) for y in layers
            ]
            if self.fused is not None:
                runs = [partial(block, cos=cos, sin=sin) for block in self.fused.blocks]
        return [partial(self._run, *both) for both in zip(layers, runs, strict=True)]

    def _run(self, layer: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        self.gpt_neox.before(layer)
        return run(x)

    def loss(self, rows: Tensor, scale: float | None = None) -> Tensor:
        """Next-token loss of rows (B, T + 1) int64: scale·Σ, or the mean where scale is None."""
        tokens, targets = rows[:, :-1], rows[:, 1:].flatten()
        x = self.gpt_neox(self.embed(tokens), self.blocks(tokens.shape[1], tokens.device))
        return self.head_loss(x.flatten(0, 1), targets, scale)

    def head_loss(self, x: Tensor, targets: Tensor, scale: float | None) -> Tensor:
        """`loss` from the normalised x (M, h); targets (M,)."""
        self.gpt_neox.before(self.embed_out)
        if self.fused is not None:
            return self.fused.loss(x, targets, scale)
        return self.ops.cross_entropy(self.embed_out(x), targets, scale)

    def rotary_tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin (≥ length, R/2), made once and kept."""
        kept = self._tables
        if kept is None or kept[0].shape[0] < length or kept[0].device != device:
            c = self.config
            tables = rotary_tables(length, c.rotary_dim, c.rotary_base, _DTYPE[c.rope_table])
            self._tables = kept = tuple(t.to(device) for t in tables)  # type: ignore[assignment]
        return kept  # type: ignore[return-value]


_DTYPE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def inverse_frequencies(rotary_dim: int, base: float = 10000.0) -> Tensor:
    """base^(−2i/R), (R/2,) fp32."""
    return 1.0 / base ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)


def rotary_tables(
    length: int, rotary_dim: int, base: float = 10000.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """cos and sin of position·base^(−2i/R), (length, R/2), fp32 or dtype.

    dtype is where the angles are rounded: GPT-NeoX v1.0 cast inv_freq to the compute dtype and
    formed positions and products there (positional_embeddings.py:48-63), which moves fp16 angles
    by up to 0.8 rad; in bf16 it then took cos and sin of the widened angle.
    """
    inv_freq = inverse_frequencies(rotary_dim, base).to(dtype)
    angles = torch.arange(length, dtype=torch.float32).to(dtype)[:, None] * inv_freq  # (T, R/2)
    if dtype == torch.bfloat16:
        return angles.float().cos().bfloat16(), angles.float().sin().bfloat16()
    return angles.cos(), angles.sin()


def materialise(model: nn.Module, device: torch.device | str, dtype: torch.dtype) -> None:
    """Gives every meta parameter its own uninitialised memory (the trainer uses flat buffers)."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fresh = torch.empty(parameter.shape, dtype=dtype, device=device)
            setattr(module, name, nn.Parameter(fresh))


def initial_weights(c: Model, seed: int) -> Iterator[tuple[str, Tensor]]:
    """(name, fp32 weight on the CPU) of every parameter, in module order: equal on every device.

    small-wang: N(0, √(2/5h)) for embeddings, qkv and MLP-in; N(0, 2/(L√h)) for the two products
    that write the residual stream. normal: 0.02 and 0.02/√(2L) in their place (6.9b and 12b).
    Biases 0, LayerNorm weights 1. Source: GPT-NeoX v1.0 init_functions.py:20-36, 101-118.
    """
    if c.init == "small-wang":
        std, output_std = math.sqrt(2 / (5 * c.hidden)), 2 / (c.layers * math.sqrt(c.hidden))
    else:
        std, output_std = 0.02, 0.02 / math.sqrt(2 * c.layers)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in Pythia(c).named_parameters():
        if name.endswith("bias"):
            yield name, torch.zeros(parameter.shape)
        elif "norm" in name:
            yield name, torch.ones(parameter.shape)
        else:
            wide = output_std if ("dense.weight" in name or "4h_to_h" in name) else std
            drawn = torch.empty(parameter.shape)
            yield name, drawn.normal_(0.0, wide, generator=generator)


@torch.no_grad()
def initialise(model: Pythia, seed: int) -> None:
    """Gives a whole model its `initial_weights`."""
    parameters = dict(model.named_parameters())
    for name, drawn in initial_weights(model.config, seed):
        parameters[name].copy_(drawn)
