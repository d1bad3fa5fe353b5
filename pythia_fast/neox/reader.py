"""Reads a GPT-NeoX checkpoint, tensor-parallel and ZeRO-1 files merged, into a run."""

from __future__ import annotations

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
from pythia_fast.loss_scale import LossScale
from pythia_fast.neox.files import LossScaler, read_pt, read_yaml
from pythia_fast.neox.layout import KINDS, cut_along, layer_file, merge, names, shard_name

_LAYER = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
_SHARD = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_BUFFER = re.compile(r"attention\.(rotary_emb\.inv_freq|bias|masked_bias)")


@dataclass(frozen=True)
class NeoxCheckpoint:
    """A whole checkpoint: tensors named as ours are ("model.", "exp_avg.", "exp_avg_sq." + name).

    Without ZeRO-1 files there are weights alone: no updates and no loss scale.
    """

    keys: dict[str, Any]  # for `config.resolve`
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
    name = latest.read_text(encoding="utf-8").strip()
    if Path(name).name != name or not (directory / name).is_dir():
        raise InputError(f"{latest}: {name!r} is not a directory beside it")
    return directory / name


def read(directory: Path, yaml: Path | None = None) -> NeoxCheckpoint:
    """Reads and merges a `global_step<N>` directory; yaml: the run's, where it carries none.

    Raises InputError naming the first file that is missing, damaged or does not fit the others.
    """
    weights, tensor_ranks, layers = _read_layers(directory)
    states = [read_pt(_file(directory, f"mp_rank_{t:02}_model_states.pt")) for t in tensor_ranks]
    keys = _shape(directory, states[0], yaml, layers, weights)
    counts = {k: _count(directory, states, k) for k in ("global_steps", "skipped_steps")}
    step = states[0].get("iteration", counts["global_steps"])
    if directory.name != f"global_step{step}":
        raise InputError(f"{directory} is of step {step}: the checkpoint is out of its place")
    named, ranks = names(layers), range(len(tensor_ranks))
    if not list(directory.glob("zero_pp_rank_*.pt")):
        merged = {
            f"model.{ours}": merge(ours, [weights[t][key] for t in ranks]).float()
            for key, ours in named.items()
        }
        return NeoxCheckpoint(keys, step, merged, None, None)
    shards = [_read_shards(directory, t, weights[t], named) for t in ranks]
    merged = {
        f"{kind}.{ours}": merge(ours, [s.tensors[kind][key] for s in shards], kind != "model")
        for kind in KINDS
        for key, ours in named.items()
    }
    updates = counts["global_steps"] - counts["skipped_steps"]
    return NeoxCheckpoint(keys, step, merged, updates, _loss_scale(shards[0].scaler, states[0]))


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
                weights[rank][index, leaf] = tensor
    return weights, list(ranks), layers


def _shape(
    directory: Path, state: dict[str, Any], yaml: Path | None, layers: int, weights: list[Weights]
) -> dict[str, Any]:
    """The model's keys: sizes from the tensors, heads from the checkpoint's args or the YAML."""
    hidden = weights[0][layers + 3, "norm.weight"].numel()
    vocab = sum(w[0, "word_embeddings.weight"].shape[0] for w in weights)
    pages = sorted((directory / "configs").glob("*.yml")) if yaml is None else [yaml]
    claims = [(str(page), read_yaml(page)) for page in pages]
    args = state.get("args")
    if isinstance(args, dict):
        claims.insert(0, (f"{directory}/mp_rank_00_model_states.pt", args))
    known: dict[str, Any] = {"num_layers": layers, "hidden_size": hidden}
    known["padded_vocab_size"], known["model_parallel_size"] = vocab, len(weights)
    for where, claim in claims:
        for key, value in known.items():
            if claim.get(key, value) != value:
                raise InputError(f"{where}: {key} = {claim[key]!r}, but the files hold {value}")
        known |= {k: claim[k] for k in _FROM_CLAIMS if k in claim}
    heads = known.get("num_attention_heads")
    if not isinstance(heads, int):
        raise InputError(
            f"{directory}: nothing says how many attention heads there are; name the run's YAML"
        )
    keys = {"model.layers": layers, "model.hidden": hidden, "model.vocab_size": vocab}
    keys |= {_FROM_CLAIMS[k]: known[k] for k in _FROM_CLAIMS if k in known}
    if len(weights) > 1:
        keys |= dict.fromkeys(_COPIES, len(weights))
    model = resolve(keys, where=f"{directory}: ").model
    _check_parts(directory, model, weights)
    return keys


_COPIES = ("optimizer.row_bias_copies", "optimizer.norm_copies")
_FROM_CLAIMS = {
    "num_attention_heads": "model.heads",
    "max_position_embeddings": "data.seq_len",
    "rotary_pct": "model.rotary_pct",
}


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


def _count(directory: Path, states: list[dict[str, Any]], key: str) -> int:
    """A count of steps, on which all tensor ranks agree."""
    values = [state.get(key) for state in states]
    if type(values[0]) is not int or values[0] < 0 or values != values[:1] * len(values):
        found = ", ".join(map(repr, values))
        raise InputError(f"{directory}/mp_rank_*_model_states.pt: {key} = {found}")
    return values[0]


@dataclass(frozen=True)
class _Shards:
    tensors: dict[str, Weights]  # kind -> parameter -> fp32
    scaler: LossScaler


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
    scaler = states[0]["loss_scaler"]
    return _Shards(tensors, scaler if isinstance(scaler, LossScaler) else LossScaler())


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
            return list(parts)
    except (KeyError, IndexError, TypeError, AttributeError):
        pass
    raise InputError(f"{file}: no {kind} of parameter group {group} in it")


def _loss_scale(scaler: LossScaler, state: dict[str, Any]) -> dict[str, Any] | None:
    values = {**vars(scaler), "skipped_in_a_row": state.get("skipped_in_a_row", 0)}
    if "cur_iter" not in values:  # a constant scale
        return None
    names_there = {
        "iteration": "cur_iter",
        "last_overflow": "last_overflow_iter",
        "chances": "cur_hysteresis",
        "skipped_in_a_row": "skipped_in_a_row",  # GPT-NeoX forgets it; our own export does not
    }
    scale = LossScale(hysteresis=True)
    found = {key: values.get(name) for key, name in names_there.items()}
    cur_scale = values.get("cur_scale")
    scale.load({"hysteresis": True, "scale": float(cur_scale or 0), **found})
    return scale.state()


def import_checkpoint(directory: Path, run_dir: Path, yaml: Path | None = None) -> Path:
    """Starts a run from a `global_step<N>` directory; returns its checkpoint.

    With optimizer states it is step N, and training goes on from there with the data of step N;
    weights alone are step 0 of a new run, in fp32.
    """
    found = read(directory, yaml)
    config = resolve(found.keys)
    tokens = found.step * config.tokens_per_step if found.updates is not None else 0
    extra: dict[str, Any] = {"config": flatten(config), "tokens": tokens}
    if found.updates is not None:
        extra["updates"] = found.updates
    if found.loss_scale is not None:
        extra["loss_scale"] = found.loss_scale
    step = 0 if found.updates is None else found.step
    return checkpoint.start_run(run_dir, step, found.tensors, extra)


def _file(directory: Path, name: str) -> Path:
    if not (directory / name).is_file():
        raise InputError(f"{directory / name} is missing")
    return directory / name
