"""Writes a checkpoint as GPT-NeoX and DeeperSpeed would have, for any degrees of parallelism."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pythia_fast import checkpoint
from pythia_fast.config import Config
from pythia_fast.errors import InputError
from pythia_fast.model import inverse_frequencies
from pythia_fast.neox.claims import OWN
from pythia_fast.neox.files import write_pt
from pythia_fast.neox.layout import KINDS, layer_file, names, shard_name, split
from pythia_fast.neox.scaler import to_neox
from pythia_fast.optim import DTYPES
from pythia_fast.storage import publish_directory, sync_directory, write_synced


def export(checkpoint_path: Path, out_dir: Path, tensor: int = 1, ranks: int = 1) -> Path:
    """Writes a checkpoint as out_dir/global_step<N> and out_dir/latest; returns the former.

    tensor: tensor-parallel ranks; ranks: data-parallel ranks of the ZeRO-1 files. Weights are in
    the dtype that the run computed in. A checkpoint without optimizer state gets no ZeRO files.
    All or nothing. Raises InputError where out_dir is not empty or sizes do not divide.
    """
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise InputError(f"{out_dir} exists already and is not empty")
    manifest = checkpoint.read_manifest(checkpoint_path)
    config = checkpoint.config_of(checkpoint_path)
    for key in ("heads", "vocab_size"):
        if tensor < 1 or getattr(config.model, key) % tensor:
            size = getattr(config.model, key)
            raise InputError(f"--tensor {tensor} does not divide model.{key} = {size}")
    if ranks < 1:
        raise InputError(f"--ranks {ranks}: at least 1 is needed")
    tensors = checkpoint.load_all(checkpoint_path, prefix="")
    has_state = any(name.startswith("exp_avg.") for name in tensors)
    name = f"global_step{manifest['step']}"
    with publish_directory(out_dir.absolute()) as temporary:
        (temporary / name).mkdir()
        for rank in range(tensor):
            _write_rank(temporary / name, config, manifest, tensors, rank, tensor, ranks, has_state)
        sync_directory(temporary / name)
        write_synced(temporary / "latest", f"{name}\n".encode())
    return out_dir / name


def _write_rank(
    directory: Path, config: Config, manifest: dict[str, Any], tensors: dict[str, Tensor],
    rank: int, tensor: int, ranks: int, has_state: bool,
) -> None:  # fmt: skip
    """The files of one tensor-parallel rank."""
    named, dtype = names(config.model.layers), DTYPES[config.precision.compute]

    def own(kind: str) -> dict[tuple[int, str], Tensor]:
        moments = kind != "model"
        return {
            k: split(o, tensors[f"{kind}.{o}"], tensor, moments)[rank] for k, o in named.items()
        }

    weights = own("model")
    inv_freq = inverse_frequencies(config.model.rotary_dim, config.model.rotary_base)
    for index in dict.fromkeys(i for i, _ in named):
        state = OrderedDict((leaf, w.to(dtype)) for (i, leaf), w in weights.items() if i == index)
        if "attention.dense.weight" in state:
            state["attention.rotary_emb.inv_freq"] = inv_freq.to(dtype)
        write_pt(layer_file(directory, index, rank), state)
    write_pt(directory / f"mp_rank_{rank:02}_model_states.pt",
             _model_states(config, manifest, tensor, ranks))  # fmt: skip
    if not has_state:
        return
    flats = [
        {kind: torch.cat([t.flatten() for k, t in own(kind).items() if (weights[k].ndim == 2) == d])
         for kind in KINDS}
        for d in (True, False)
    ]  # fmt: skip
    shapes = OrderedDict((f"{i}.{leaf}", w.shape) for (i, leaf), w in weights.items())
    for number, part in enumerate(_cut(flats, ranks)):
        state_dict = {
            "loss_scaler": to_neox(manifest.get("loss_scale")),
            "dynamic_loss_scale": "loss_scale" in manifest,
            "overflow": False,
            "base_optimizer_state": [[{k: p[k] for k in KINDS[1:]}] for p in part],
            "zero_stage": 1,
            "partition_count": ranks,
            "num_comm_intervals_per_group": [1, 1],
            "local_sub_partitions_of_fp32_groups": [[p["model"]] for p in part],
        }
        content = {"optimizer_state_dict": state_dict, "param_shapes": shapes}
        write_pt(directory / shard_name(number, rank), content)


def _cut(flats: list[dict[str, Tensor]], ranks: int) -> Iterator[list[dict[str, Tensor]]]:
    """Per data rank, the groups' equal parts; padding at the end is left out."""
    for rank in range(ranks):
        part = []
        for flat in flats:
            size = math.ceil(flat["model"].numel() / ranks)
            own = slice(rank * size, (rank + 1) * size)
            part.append({kind: values[own].clone() for kind, values in flat.items()})
        yield part


def _model_states(
    config: Config, manifest: dict[str, Any], tensor: int, ranks: int
) -> dict[str, Any]:
    o, m, step = config.optimizer, config.model, manifest["step"]
    updates = manifest.get("updates", step)
    warmup = o.warmup * config.train.steps
    return {
        "module": None,
        "optimizer": None,
        "lr_scheduler": {
            "start_lr": o.lr,
            "warmup_iter": warmup,
            "num_iters": updates,
            "decay_style": "cosine",
            "end_iter": config.train.steps,
            "min_lr": o.min_lr,
        },
        "csr_tensor_module_names": set(),
        "skipped_steps": step - updates,
        "global_steps": step,
        "global_samples": step * config.train.batch_size,
        "dp_world_size": ranks,
        "mp_world_size": tensor,
        "iteration": step,
        "skipped_in_a_row": manifest.get("loss_scale", {}).get("skipped_in_a_row", 0),
        "args": {
            "num_layers": m.layers,
            "hidden_size": m.hidden,
            "num_attention_heads": m.heads,
            "max_position_embeddings": config.data.seq_len,
            "make_vocab_size_divisible_by": 128,
            "padded_vocab_size": m.vocab_size,
            "tokenizer_type": "HFTokenizer",
            "model_parallel_size": tensor,
        },
        OWN: config.decisive,  # the degrees of these files need not be those of the run
    }
