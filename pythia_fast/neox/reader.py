"""Reads a GPT-NeoX checkpoint, tensor-parallel and ZeRO-1 files merged, into a run."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pythia_fast import checkpoint
from pythia_fast.config import Model, flatten, resolve
from pythia_fast.errors import InputError
from pythia_fast.hf import shapes
from pythia_fast.neox.claims import OWN, TENSOR, Claims
from pythia_fast.neox.files import read_pt, read_yaml
from pythia_fast.neox.layout import KINDS, cut_along, layer_file, merge, names, shard_name
from pythia_fast.neox.scaler import from_neox
from pythia_fast.optim import DTYPES

_LAYER = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
_SHARD = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_BUFFER = re.compile(r"attention\.(rotary_emb\.inv_freq|bias|masked_bias)")


@dataclass(frozen=True)
class NeoxCheckpoint:
    """A whole checkpoint: tensors named as ours are ("model.", "exp_avg.", "exp_avg_sq." + name).

    Without ZeRO-1 files there are weights alone: no updates and no loss scale.
    """

    keys: dict[str, Any]  # for `config.resolve`: what the files say, no defaults
    step: int
    tensors: dict[str, Tensor]
    updates: int | None
    loss_scale: dict[str, Any] | None


def find(directory: Path) -> Path | None:
    """The `global_step<N>` directory that `directory` is, or that its file `latest` names."""
    if any(_LAYER.fullmatch(file.name) for file in directory.glob("layer_*.pt")):
        return directory
    latest = directory / "latest"
    if not latest.is_file():
        return None
    name = latest.read_bytes().decode("utf-8", "replace").strip()
    if Path(name).name != name or not (directory / name).is_dir():
        raise InputError(f"{latest}: {name!r} is not a directory beside it")
    return directory / name


def read(directory: Path, yaml: Path | None = None) -> NeoxCheckpoint:
    """Reads and merges a `global_step<N>` directory; yaml: the run's, where it carries none.

    Raises InputError naming the first file that is missing, damaged or does not fit the others.
    """
    weights, tensor_ranks, layers = _read_layers(directory)
    states = [read_pt(_file(directory, f"mp_rank_{t:02}_model_states.pt")) for t in tensor_ranks]
    claims = _claims(directory, states[0], yaml, layers, weights)
    counts = {k: _count(directory, states, k) for k in ("global_steps", "skipped_steps")}
    step = _count(directory, states, "iteration", counts["global_steps"])
    if counts["skipped_steps"] > counts["global_steps"]:
        raise InputError(f"{directory}: more skipped_steps than global_steps: {counts}")
    if directory.name != f"global_step{step}":
        raise InputError(f"{directory} is of step {step}: the checkpoint is out of its place")
    named, ranks = names(layers), range(len(tensor_ranks))
    if not list(directory.glob("zero_pp_rank_*.pt")):
        merged = {
            f"model.{ours}": merge(ours, [weights[t][key] for t in ranks]).float()
            for key, ours in named.items()
        }
        keys = {k: v for k, v in claims.keys.items() if k.startswith(("model.", "data."))}
        return NeoxCheckpoint(keys, step, merged, None, None)
    shards = [_read_shards(directory, t, weights[t], named) for t in ranks]
    merged = {
        f"{kind}.{ours}": merge(ours, [s.tensors[kind][key] for s in shards], kind != "model")
        for kind in KINDS
        for key, ours in named.items()
    }
    updates = counts["global_steps"] - counts["skipped_steps"]
    loss_scale = _add_training(directory, claims, states, shards, weights[0])
    return NeoxCheckpoint(claims.keys, step, merged, updates, loss_scale)


Weights = dict[tuple[int, str], Tensor]


def _read_layers(directory: Path) -> tuple[list[Weights], list[int], int]:
    """Weights of every tensor rank, the ranks, and the number of blocks."""
    matches = [m for f in directory.iterdir() if (m := _LAYER.fullmatch(f.name))]
    found = {(int(m[1]), int(m[2])) for m in matches}
    if not found:
        raise InputError(f"{directory}: no layer_*-model_*-model_states.pt, not a NeoX checkpoint")
    found_indices = sorted({index for index, _ in found})
    layers = found_indices[-1] - 4
    ranks = range(max(rank for _, rank in found) + 1)
    wanted = names(max(layers, 0))
    indices = dict.fromkeys(index for index, _ in wanted)
    if found_indices != sorted(indices):
        raise InputError(
            f"{directory}: files are missing: pipeline layers {found_indices} are here, where "
            "0, 2 .. L + 1, L + 3 and L + 4 are needed"
        )
    for index, rank in ((i, r) for i in indices for r in ranks):
        if (index, rank) not in found:
            raise InputError(f"{layer_file(directory, index, rank)} is missing")
    weights: list[Weights] = []
    for rank in ranks:
        weights.append({})
        for index in indices:
            file = layer_file(directory, index, rank)
            state = {k: v for k, v in read_pt(file).items() if not _BUFFER.fullmatch(k)}
            expected = {leaf for i, leaf in wanted if i == index}
            for leaf in expected - state.keys():
                hint = "; GPT-NeoX after v1.0 renamed it" if "mlp.linear1.weight" in state else ""
                raise InputError(f"{file}: {leaf} is missing{hint}")
            for leaf, tensor in state.items():
                if leaf not in expected or not isinstance(tensor, Tensor):
                    raise InputError(f"{file}: {leaf} is not part of this model")
                if tensor.dtype not in DTYPES.values() or tensor.ndim != 1 + (leaf in _MATRICES):
                    kind = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
                    raise InputError(f"{file}: {leaf} is {kind}, no weight of this model")
                if not tensor.isfinite().all():
                    raise InputError(f"{file}: {leaf} holds values that are not finite")
                weights[rank][index, leaf] = tensor
    return weights, list(ranks), layers


def _claims(
    directory: Path, state: dict[str, Any], yaml: Path | None, layers: int, weights: list[Weights]
) -> Claims:
    """What tensors, the checkpoint's args and the YAML say; the model's parts are checked."""
    vocab = sum(w[0, "word_embeddings.weight"].shape[0] for w in weights)
    hidden = weights[0][layers + 3, "norm.weight"].numel()
    claims, where = Claims(), f"{directory}/mp_rank_00_model_states.pt"
    claims.add_files({"model.layers": layers, "model.hidden": hidden, "model.vocab_size": vocab})
    claims.add_files({TENSOR: len(weights)})
    if isinstance(args := state.get("args"), dict):
        claims.add_page(args, where)
    if OWN in state:
        claims.add_own(state[OWN], where)
    for page in sorted((directory / "configs").glob("*.yml")) if yaml is None else [yaml]:
        claims.add_page(read_yaml(page), str(page))
    del claims.keys[TENSOR]
    if not isinstance(claims.keys.get("model.heads"), int):
        raise InputError(
            f"{directory}: nothing says how many attention heads there are; name the run's YAML"
        )
    keys = {k: v for k, v in claims.keys.items() if k.startswith("model.")}
    _check_parts(directory, resolve(keys, where=f"{directory}: ").model, weights)
    return claims


def _add_training(
    directory: Path, claims: Claims, states: list[dict[str, Any]], shards: list[_Shards],
    weights: Weights,
) -> dict[str, Any] | None:  # fmt: skip
    """Adds what the files show of the recipe; returns the state of the loss scale."""
    state, where = states[0], f"{directory / shard_name(0, 0)}"
    found = [
        from_neox(scaler, state.get("skipped_in_a_row", 0), f"{directory / shard_name(d, t)}")
        for t, shard in enumerate(shards)
        for d, scaler in enumerate(shard.scalers)
    ]
    if any(other != found[0] for other in found):
        raise InputError(f"{directory}: the loss scalers of its ZeRO files differ")
    kind, loss_scale = found[0]
    compute = next(n for n, d in DTYPES.items() if d == weights[0, "word_embeddings.weight"].dtype)
    if compute == "fp16" and kind == "none":
        raise InputError(
            f"{where}: a constant loss scale in fp16 is not there; without the ZeRO files the "
            "weights alone are imported"
        )
    claims.add_files({"precision.compute": compute, "precision.loss_scaling": kind})
    steps, samples = state["global_steps"], state.get("global_samples")
    if type(samples) is int and samples > 0 and steps > 0 and samples % steps == 0:
        claims.add_files({"train.batch_size": samples // steps})
    if OWN not in state:  # then the degrees of the files are the run's, and so is the empty step
        copies = dict.fromkeys(_COPIES, len(states))
        claims.add_files({**copies, "optimizer.step_offset": 1})
    return loss_scale


_COPIES = ("optimizer.row_bias_copies", "optimizer.norm_copies")
_MATRICES = frozenset(
    leaf for _, leaf in names(1) if leaf.endswith("weight") and "norm" not in leaf
)


def _check_parts(directory: Path, model: Model, weights: list[Weights]) -> None:
    whole, ranks = shapes(model), len(weights)
    for (index, leaf), ours in names(model.layers).items():
        expected, dim = list(whole[ours]), cut_along(ours)
        if dim is not None:
            expected[dim] //= ranks
        for rank in range(ranks):
            found = list(weights[rank][index, leaf].shape)
            if found != expected:
                file = layer_file(directory, index, rank)
                raise InputError(f"{file}: {leaf} has shape {found}, expected {expected}")


def _count(
    directory: Path, states: list[dict[str, Any]], key: str, default: int | None = None
) -> int:
    """A count of steps, on which all tensor ranks agree."""
    values = [state.get(key, default) for state in states]
    if type(values[0]) is not int or values[0] < 0 or values != values[:1] * len(values):
        found = ", ".join(map(repr, values))
        raise InputError(f"{directory}/mp_rank_*_model_states.pt: {key} = {found}")
    return values[0]


@dataclass(frozen=True)
class _Shards:
    tensors: dict[str, Weights]  # kind -> parameter -> fp32
    scalers: list[Any]  # of each data rank


def _read_shards(
    directory: Path, rank: int, weights: Weights, named: dict[tuple[int, str], str]
) -> _Shards:
    """The ZeRO-1 files of one tensor rank, joined and cut into parameters."""
    matches = [m for f in directory.iterdir() if (m := _SHARD.fullmatch(f.name))]
    count = max((int(m[1]) for m in matches if int(m[2]) == rank), default=-1) + 1
    files = [_file(directory, shard_name(d, rank)) for d in range(max(count, 1))]
    states = [_zero_state(file, len(files)) for file in files]
    tensors: dict[str, Weights] = {kind: {} for kind in KINDS}
    for group, decays in enumerate((True, False)):
        keys = [key for key, ours in named.items() if (weights[key].ndim == 2) == decays]
        for kind in KINDS:
            parts = [_parts(file, s, group, kind) for file, s in zip(files, states, strict=True)]
            intervals = {len(p) for p in parts}
            if len(intervals) != 1:
                raise InputError(f"{directory}: ZeRO ranks of mp_rank {rank:02} do not match")
            flat = torch.cat([part for interval in zip(*parts, strict=True) for part in interval])
            sizes = [weights[key].numel() for key in keys]
            if flat.numel() != sum(sizes):
                raise InputError(
                    f"{directory}: the ZeRO files of mp_rank {rank:02} hold {flat.numel()} values "
                    f"of {kind} where the weights have {sum(sizes)}"
                )
            for key, values in zip(keys, flat.split(sizes), strict=True):
                tensors[kind][key] = values.view(weights[key].shape)
    for key, weight in weights.items():
        if not torch.equal(tensors["model"][key].to(weight.dtype), weight):
            raise InputError(
                f"{directory}: {key[1]} of layer {key[0]} is not the rounded fp32 weight of the "
                "ZeRO files: they are of another step"
            )
    return _Shards(tensors, [state.get("loss_scaler") for state in states])


def _zero_state(file: Path, count: int) -> dict[str, Any]:
    state = read_pt(file).get("optimizer_state_dict")
    if not isinstance(state, dict) or state.get("zero_stage") != 1:
        raise InputError(f"{file}: not the optimizer state of ZeRO stage 1")
    if state.get("partition_count") != count:
        saved = state.get("partition_count")
        raise InputError(f"{file}: of {saved} data-parallel ranks, {count} of whose files are here")
    return state


def _parts(file: Path, state: dict[str, Any], group: int, kind: str) -> list[Tensor]:
    """The flat fp32 parts of one kind that one ZeRO file holds of one group."""
    try:
        if kind == "model":
            parts = state["local_sub_partitions_of_fp32_groups"][group]
        else:
            parts = [part[kind] for part in state["base_optimizer_state"][group]]
        if all(part.dtype == torch.float32 and part.ndim == 1 for part in parts):
            if all(_sound(part, kind) for part in parts):
                return list(parts)
            raise InputError(f"{file}: {kind} of parameter group {group} is not finite or negative")
    except (KeyError, IndexError, TypeError, AttributeError):
        pass
    raise InputError(f"{file}: no {kind} of parameter group {group} in it")


def _sound(part: Tensor, kind: str) -> bool:
    return bool(part.isfinite().all()) and (kind != "exp_avg_sq" or bool((part >= 0).all()))


def import_checkpoint(directory: Path, run_dir: Path, yaml: Path | None = None) -> Path:
    """Starts a run from a `global_step<N>` directory; returns its checkpoint.

    With optimizer states it is step N, and training goes on from there with the data of step N;
    weights alone are step 0 of a new run, in fp32.
    """
    found = read(directory, yaml)
    rows = math.gcd(found.keys.get("train.batch_size", 32), 32)  # any that divides the batch
    config = resolve({"train.micro_batch_size": rows, **found.keys}, where=f"{directory}: ")
    tokens = found.step * config.tokens_per_step if found.updates is not None else 0
    extra: dict[str, Any] = {"config": flatten(config), "tokens": tokens}
    if found.updates is not None:
        extra |= {"updates": found.updates, "known": sorted(found.keys)}
    if found.loss_scale is not None:
        extra["loss_scale"] = found.loss_scale
    step = 0 if found.updates is None else found.step
    return checkpoint.start_run(run_dir, step, found.tensors, extra)


def _file(directory: Path, name: str) -> Path:
    if not (directory / name).is_file():
        raise InputError(f"{directory / name} is missing")
    return directory / name
