"""A `global_step<N>` directory written as DeeperSpeed would have, apart from the package."""

from __future__ import annotations

import random
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from neox_numpy import shards

from pythia_fast.config import Model

MODEL = Model(layers=2, hidden=32, heads=4, vocab_size=64)
_MODULES = ["deepspeed", "deepspeed.runtime", "deepspeed.runtime.fp16",
            "deepspeed.runtime.fp16.loss_scaler"]  # fmt: skip


class DynamicLossScaler:
    """Pickled by reference, under DeepSpeed's name."""


@contextmanager
def deepspeed_in_scope() -> Iterator[None]:
    """A module tree in which the pickler finds the class under its name there."""
    modules = {name: types.ModuleType(name) for name in _MODULES}
    modules[_MODULES[-1]].DynamicLossScaler = DynamicLossScaler  # type: ignore[attr-defined]
    DynamicLossScaler.__module__ = _MODULES[-1]
    sys.modules.update(modules)
    try:
        yield
    finally:
        DynamicLossScaler.__module__ = __name__
        for name in modules:
            del sys.modules[name]


def layer_names(layers: int) -> list[tuple[int, str, str]]:
    """(pipeline layer, NeoX name, Hugging Face name) in module order."""
    block = ["input_layernorm.weight", "input_layernorm.bias",
             "attention.query_key_value.weight", "attention.query_key_value.bias",
             "attention.dense.weight", "attention.dense.bias",
             "post_attention_layernorm.weight", "post_attention_layernorm.bias",
             "mlp.dense_h_to_4h.weight", "mlp.dense_h_to_4h.bias",
             "mlp.dense_4h_to_h.weight", "mlp.dense_4h_to_h.bias"]  # fmt: skip
    found = [(0, "word_embeddings.weight", "gpt_neox.embed_in.weight")]
    for i in range(layers):
        found += [(2 + i, leaf, f"gpt_neox.layers.{i}.{leaf}") for leaf in block]
    for leaf in ("weight", "bias"):
        found.append((layers + 3, f"norm.{leaf}", f"gpt_neox.final_layer_norm.{leaf}"))
    return [*found, (layers + 4, "final_linear.weight", "embed_out.weight")]


def random_state(model: Model, seed: int = 3) -> dict[str, dict[str, np.ndarray]]:
    """kind -> name -> whole fp32 array; row biases are sums of equal copies that fp16 holds."""
    from pythia_fast.hf import shapes

    draw = np.random.default_rng(seed)
    kinds: dict[str, dict[str, np.ndarray]] = {}
    for kind in ("model", "exp_avg", "exp_avg_sq"):
        kinds[kind] = {
            name: np.abs(draw.normal(size=shape)).astype(np.float32) * 0.1
            for name, shape in shapes(model).items()
        }
    return kinds


def of_rank(name: str, whole: np.ndarray, ranks: int, moments: bool) -> list[np.ndarray]:
    """Shards, copies, or summands of the weights; moments of summands are copies."""
    if moments and name.endswith(("attention.dense.bias", "dense_4h_to_h.bias")):
        return [whole] * ranks
    return shards(name, whole, ranks)


def write_checkpoint(
    directory: Path, state: dict[str, dict[str, np.ndarray]], step: int, tensor: int = 2,
    data: int = 3, intervals: int = 1, skipped: int = 2, model: Model = MODEL, **extra: Any,
) -> Path:  # fmt: skip
    """Writes <directory>/global_step<N>; extra: more keys of mp_rank_*_model_states.pt."""
    root = directory / f"global_step{step}"
    root.mkdir(parents=True)
    table = layer_names(model.layers)
    args = {"num_layers": model.layers, "hidden_size": model.hidden, "padded_vocab_size": model.vocab_size,
            "num_attention_heads": model.heads, "max_position_embeddings": 16,
            "model_parallel_size": tensor, "make_vocab_size_divisible_by": 128}  # fmt: skip
    for rank in range(tensor):
        own = {
            kind: {n: torch.from_numpy(np.ascontiguousarray(of_rank(n, a, tensor, kind != "model")[rank]))
                   for n, a in arrays.items()}
            for kind, arrays in state.items()
        }  # fmt: skip
        for index in sorted({i for i, _, _ in table}):
            layer = OrderedDict(
                (leaf, own["model"][n].half()) for i, leaf, n in table if i == index
            )
            if len(layer) > 2:
                layer["attention.rotary_emb.inv_freq"] = torch.ones(1).half()
            torch.save(layer, root / f"layer_{index:02d}-model_{rank:02d}-model_states.pt")
        torch.save(
            {"module": None, "optimizer": None, "lr_scheduler": {"num_iters": step - skipped},
             "csr_tensor_module_names": set(), "skipped_steps": skipped, "global_steps": step,
             "global_samples": step * 8, "dp_world_size": data, "mp_world_size": tensor,
             "iteration": step, "args": args, "random_rng_state": random.getstate(),
             "np_rng_state": np.random.RandomState(1234).get_state(),
             "torch_rng_state": torch.get_rng_state(),
             "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()}, **extra},
            root / f"mp_rank_{rank:02d}_model_states.pt",
        )  # fmt: skip
        groups = [
            [n for _, _, n in table if (state["model"][n].ndim == 2) == wide]
            for wide in (True, False)
        ]
        for number in range(data):
            parts: list[dict[str, list[torch.Tensor]]] = []
            for group in groups:
                flats = {k: torch.cat([own[k][n].flatten() for n in group]) for k in own}
                total = flats["model"].numel()
                size = -(-total // (data * intervals))
                cuts = [(i * data + number) * size for i in range(intervals)]
                parts.append(
                    {k: [flat[c : c + size].clone() for c in cuts] for k, flat in flats.items()}
                )
            scaler = DynamicLossScaler()
            vars(scaler).update(
                cur_scale=8192.0, cur_iter=step, last_overflow_iter=1, scale_factor=2.0,
                scale_window=1000, min_scale=1, delayed_shift=2, cur_hysteresis=1,
                consecutive_hysteresis=False, raise_error_at_min_scale=True,
            )  # fmt: skip
            shard = {
                "loss_scaler": scaler, "dynamic_loss_scale": True, "overflow": False,
                "base_optimizer_state": [
                    [{"exp_avg": a, "exp_avg_sq": b} for a, b in zip(p["exp_avg"], p["exp_avg_sq"], strict=True)]
                    for p in parts
                ],
                "zero_stage": 1, "partition_count": data,
                "num_comm_intervals_per_group": [intervals, intervals],
                "local_sub_partitions_of_fp32_groups": [p["model"] for p in parts],
            }  # fmt: skip
            shapes = OrderedDict((f"{i}.{leaf}", own["model"][n].shape) for i, leaf, n in table)
            with deepspeed_in_scope():
                torch.save({"optimizer_state_dict": shard, "param_shapes": shapes},
                           root / f"zero_pp_rank_{number}_mp_rank_{rank:02d}_optim_states.pt")  # fmt: skip
    return root
