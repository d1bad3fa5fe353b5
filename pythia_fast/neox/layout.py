"""Layout of a GPT-NeoX v1.0 checkpoint, as DeeperSpeed wrote it.

    global_step1000/
      layer_II-model_TT-model_states.pt               weights of pipeline layer II, tensor rank TT
      mp_rank_TT_model_states.pt                      counts, schedule, the model's shape
      zero_pp_rank_D_mp_rank_TT_optim_states.pt       ZeRO-1: fp32 weights and moments, data rank D

Layer 0 is the embedding, 2 .. L + 1 are the blocks, L + 3 the final norm, L + 4 the head; 1 and
L + 2 hold no parameters. Tensor ranks merge as GPT-NeoX's own converter does it: query_key_value,
dense_h_to_4h and both embeddings are cut along dim 0, dense and dense_4h_to_h along dim 1; biases
of those two are SUMMED (each rank adds its own), LayerNorms averaged (each rank has a copy).

A ZeRO-1 file holds, for the decaying and for the other parameters, flat buffers in module order,
cut into equal parts: part i·(data ranks) + D is the i-th of rank D. Sources: gpt-neox
convert_to_hf.py:152-251; DeeperSpeed module.py:535-560, stage1.py:206-287.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

KINDS = ("model", "exp_avg", "exp_avg_sq")

# parameters of a block in module order, which is that of ZeRO's buffers
_BLOCK = (
    *("input_layernorm.weight", "input_layernorm.bias"),
    *("attention.query_key_value.weight", "attention.query_key_value.bias"),
    *("attention.dense.weight", "attention.dense.bias"),
    *("post_attention_layernorm.weight", "post_attention_layernorm.bias"),
    *("mlp.dense_h_to_4h.weight", "mlp.dense_h_to_4h.bias"),
    *("mlp.dense_4h_to_h.weight", "mlp.dense_4h_to_h.bias"),
)


def names(layers: int) -> dict[tuple[int, str], str]:
    """(pipeline layer, NeoX name) -> our name of every parameter, in module order."""
    found = {(0, "word_embeddings.weight"): "gpt_neox.embed_in.weight"}
    for i in range(layers):
        found |= {(i + 2, leaf): f"gpt_neox.layers.{i}.{leaf}" for leaf in _BLOCK}
    for leaf in ("weight", "bias"):
        found[layers + 3, f"norm.{leaf}"] = f"gpt_neox.final_layer_norm.{leaf}"
    return found | {(layers + 4, "final_linear.weight"): "embed_out.weight"}


def _is_row_bias(name: str) -> bool:
    return name.endswith(("attention.dense.bias", "dense_4h_to_h.bias"))


def cut_along(name: str) -> int | None:
    """The dim along which tensor ranks cut a parameter; None where each rank has it whole."""
    if "norm" in name or _is_row_bias(name):
        return None
    return 1 if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")) else 0


def merge(name: str, parts: list[Tensor], moments: bool = False) -> Tensor:
    """The whole parameter of its tensor-parallel parts; moments of copies are averaged.

    In fp32, and exact where the copies are equal and their number is a power of two.
    """
    dim = cut_along(name)
    if dim is not None:
        return torch.cat(parts, dim=dim)
    total = torch.stack([part.float() for part in parts]).sum(0)
    return total if _is_row_bias(name) and not moments else total / len(parts)


def split(name: str, whole: Tensor, ranks: int, moments: bool = False) -> list[Tensor]:
    """What each of `ranks` tensor-parallel ranks holds: the inverse of `merge`."""
    dim = cut_along(name)
    if dim is not None:
        return [part.contiguous() for part in whole.chunk(ranks, dim=dim)]
    return [whole / ranks if _is_row_bias(name) and not moments else whole] * ranks


def layer_file(directory: Path, index: int, rank: int) -> Path:
    """Weights of one pipeline layer on one tensor rank."""
    return directory / f"layer_{index:02}-model_{rank:02}-model_states.pt"


def shard_name(data_rank: int, rank: int) -> str:
    """Optimizer state of one data rank and one tensor rank."""
    return f"zero_pp_rank_{data_rank}_mp_rank_{rank:02}_optim_states.pt"
