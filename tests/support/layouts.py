"""What one process of several does in the tests of layouts, and one process alone beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pythia_fast.config import Config, load
from pythia_fast.data.loader import read_batch
from pythia_fast.parallel.mesh import joined
from pythia_fast.train import Trainer

SMALL = """
--model.hidden 64 --model.heads 4 --train.batch_size 16 --train.micro_batch_size 2 --train.steps 8
--optimizer.clip 0.5 --optimizer.warmup 0.1
""".split()  # clipped from the first step on: the norm reaches the weights


def steps(page: Path, flags: list[str], count: int) -> dict[str, Any]:
    """`count` steps from the initial weights: losses, norms, and `held` of the last step.

    On as many processes as the environment says. Each reads its own rows.
    """
    config = load(page, [*SMALL, *flags])
    with joined(config) as mesh:
        trainer = Trainer(config, page.parent / "no-run", mesh)
        trainer._initialise()
        losses, norms = [], []
        for step in range(count):
            loss, norm = trainer.train_step(tokens_of(trainer, step))
            losses.append(loss.item())
            norms.append(norm.item())
        return {"losses": losses, "norms": norms, **held(trainer)}


def tokens_of(trainer: Trainer, step: int) -> Tensor:
    c = trainer.config
    batch = read_batch(trainer.rows, step, c.train.batch_size, c.model.vocab_size, trainer._share())
    return torch.from_numpy(batch.tokens.astype("int64"))


def held(trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    """grad, weight, exp_avg: name -> this tensor-parallel part, gathered over data."""
    o = trainer.optimizer
    found = {}
    for kind, own in (("grad", o._own_grad), ("master", o.master), ("exp_avg", o.exp_avg)):
        whole = own
        if o._sharded:
            whole = own.new_full((o.layout.size,), float("nan"))
            o.own.gather(whole, own, o._copies)
        found[kind] = {name: view.clone() for name, view in o.views(whole).items()}
    found["weight"] = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    return found


ROWS = ("embed_in.weight", "embed_out.weight", "query_key_value.weight", "query_key_value.bias",
        "dense_h_to_4h.weight", "dense_h_to_4h.bias")  # fmt: skip
COLUMNS = ("attention.dense.weight", "dense_4h_to_h.weight")


def assembled(results: list[dict[str, Any]], tensor: int, kind: str) -> dict[str, Tensor]:
    """Whole tensors from the parts of the first copy; every copy must hold the same bits."""
    for rank, result in enumerate(results):
        for name, part in results[rank % tensor][kind].items():
            assert torch.equal(part, result[kind][name]), f"rank {rank}: {kind} {name}"
    whole = {}
    for name, first in results[0][kind].items():
        parts = [results[part][kind][name] for part in range(tensor)]
        if name.endswith(ROWS):
            whole[name] = torch.cat(parts, 0)
        elif name.endswith(COLUMNS):
            whole[name] = torch.cat(parts, 1)
        else:
            assert all(torch.equal(first, part) for part in parts), f"{kind} {name}"
            whole[name] = first
    return whole


def config_of(page: Path, flags: list[str]) -> Config:
    return load(page, [*SMALL, *flags])
