"""Whether an implementation trains: its gradients and first steps against a reference in fp32.

A loss that agrees says nothing of the backward pass, and a repeated batch is learnt with half of
the gradients gone. So each gradient (q, k and v of the packed projection apart), the norms and the
losses of the first steps are held to those of the reference ops and torch's AdamW in fp32, row by
row, from the same weights; their products are in TF32 on a GPU where the compute dtype is 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from bench import train_peers
from bench.record import Row
from pythia_fast.config import Config

STEPS = 2  # the loss of the second is that of the first update
QKV = "query_key_value.weight"
NOTHING = 1e-5  # share of the whole norm below which a gradient is rounding


class Band(NamedTuple):
    """gradient: ‖g − g_ref‖/‖g_ref‖ of one parameter; norm: relative; loss: nats a token, and the
    same share of what the step has won as `norm`.
    """

    gradient: float
    norm: float
    loss: float


BANDS = {
    "fp32": Band(2e-3, 1e-3, 1e-4),
    "fp16": Band(0.05, 0.02, 5e-3),
    "bf16": Band(0.2, 0.05, 2e-2),
}


@dataclass(frozen=True)
class FirstSteps:
    """Losses and norms of the first steps; gradients of the first microbatch on the host, fp32."""

    losses: list[float]
    norms: list[float]
    gradients: Mapping[str, Tensor]


def gradients(stepper: train_peers.Stepper, rows: Tensor) -> dict[str, Tensor]:
    """Those of the mean loss of rows, by Pythia's names, on the host."""
    return {name: gradient.cpu() for name, gradient in stepper.gradients(rows)}


def first_steps(
    stepper: train_peers.Stepper, config: Config, tokens: Tensor, count: int
) -> FirstSteps:
    """count steps, those not counted that loss scaling skipped: they move nothing."""
    losses, norms = [], []
    for _ in range(count if config.precision.loss_scaling == "none" else 4 * count):
        loss, norm = (t.item() for t in stepper.step(tokens))
        if config.precision.loss_scaling == "none" or math.isfinite(norm):
            losses.append(loss)
            norms.append(norm)
        if len(norms) == count:
            break
    return FirstSteps(losses, norms, {})


def reference(config: Config, tokens: Tensor) -> FirstSteps:
    """What the first STEPS steps of this configuration are in fp32."""
    p = replace(
        config.precision, compute="fp32", gradients="fp32", gradient_sum="fp32",
        loss_scaling="none",
    )  # fmt: skip
    wide = replace(config, precision=p, train=replace(config.train, micro_batch_size=1))
    with _products("highest" if config.precision.compute == "fp32" else "high"):
        stepper = train_peers.on_trainer(wide, tokens.device, "reference")
        found = gradients(stepper, tokens[: config.train.micro_batch_size])
        return replace(first_steps(stepper, wide, tokens, STEPS), gradients=found)


@contextmanager
def _products(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def compare(found: FirstSteps, exact: FirstSteps, config: Config) -> Row:
    """The errors as columns of a row, with status and reason where one is beyond its band."""
    band = BANDS[config.precision.compute]
    if len(found.norms) < STEPS:
        return _wrong("every step overflowed")
    if found.gradients.keys() != exact.gradients.keys():
        odd = sorted(found.gradients.keys() ^ exact.gradients.keys())
        return _wrong(f"gradients of {', '.join(odd[:3])} are missing or too many")
    where, worst = _worst_gradient(found, exact, config.model.heads)
    pairs = zip(found.norms, exact.norms, strict=False)  # a warm-up is longer
    norm = _largest(abs(a - b) / b for a, b in pairs)
    loss = _largest(abs(a - b) for a, b in zip(found.losses, exact.losses, strict=False))
    row: Row = {"grad_err": worst, "grad_err_of": where, "norm_err": norm, "loss_err": loss}
    if not worst <= band.gradient:
        return row | _wrong(f"gradient of {where} is off by {worst:.3g} of its norm")
    if not norm <= band.norm:
        return row | _wrong(f"gradient norms {found.norms}, in fp32 {exact.norms}")
    won = abs(exact.losses[-1] - exact.losses[0])
    if not loss <= band.loss + band.norm * won:
        return row | _wrong(f"losses {found.losses} of the first steps, in fp32 {exact.losses}")
    return row


def _wrong(reason: str) -> Row:
    return {"status": "wrong", "reason": reason}


def _largest(values: Iterable[float]) -> float:
    return max(math.inf if math.isnan(v) else v for v in values)


def _worst_gradient(found: FirstSteps, exact: FirstSteps, heads: int) -> tuple[str, float]:
    whole = torch.stack([g.norm() for g in exact.gradients.values()]).norm().item()
    errors = {
        name: (part - same).norm().item() / (same.norm().item() + NOTHING * whole)
        for key, gradient in exact.gradients.items()
        for (name, same), (_, part) in zip(
            _parts(key, gradient, heads), _parts(key, found.gradients[key], heads), strict=True
        )
    }
    worst = _largest(errors.values())
    return next(n for n, e in errors.items() if e == worst or math.isnan(e)), worst


def _parts(name: str, gradient: Tensor, heads: int) -> list[tuple[str, Tensor]]:
    """q, k, v of query_key_value (rows h0: q k v | h1: q k v ...); others are one part."""
    if not name.endswith(QKV):
        return [(name, gradient)]
    packed = gradient.unflatten(0, (heads, 3, -1))
    return [(f"{name} ({letter})", packed[:, i]) for i, letter in enumerate("qkv")]
