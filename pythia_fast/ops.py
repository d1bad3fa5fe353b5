"""Which implementation of each op a model runs on: the Triton kernels, or plain torch.

`Ops` names every op that model, loss and optimizer use; `select` fills it for a device. The
signatures are those of `kernels/reference.py`, the specification.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pythia_fast.errors import InputError
from pythia_fast.kernels import reference


@dataclass(frozen=True)
class Ops:
    name: str
    embedding: Callable[[Tensor, Tensor], Tensor]
    attention: Callable[..., Tensor]
    attention_decode: Callable[..., Tensor]
    layer_norm: Callable[..., Tensor]
    dual_layer_norm: Callable[..., tuple[Tensor, Tensor, Tensor]]
    parallel_residual: Callable[..., Tensor]
    gelu: Callable[..., Tensor]
    cross_entropy: Callable[..., Tensor]
    cross_entropy_stats: Callable[..., tuple[Tensor, Tensor, Tensor]]
    cross_entropy_combine: Callable[..., tuple[Tensor, Tensor]]
    cross_entropy_grad_: Callable[..., Tensor]
    grad_norm: Callable[[Tensor], Tensor]
    adamw_: Callable[..., None]
    adamw_lean_: Callable[..., None]


REFERENCE = Ops(
    name="reference",
    embedding=F.embedding,
    attention=reference.attention,
    attention_decode=reference.attention_decode,
    layer_norm=reference.layer_norm,
    dual_layer_norm=reference.dual_layer_norm,
    parallel_residual=reference.parallel_residual,
    gelu=reference.gelu,
    cross_entropy=reference.cross_entropy,
    cross_entropy_stats=reference.cross_entropy_stats,
    cross_entropy_combine=reference.cross_entropy_combine,
    cross_entropy_grad_=reference.cross_entropy_grad_,
    grad_norm=reference.grad_norm,
    adamw_=reference.adamw_,
    adamw_lean_=reference.adamw_lean_,
)


def select(backend: str, device: torch.device, deterministic: bool = True) -> Ops:
    """backend: "auto" (triton on a GPU, reference elsewhere), "triton" or "reference".

    deterministic: gradients repeat bit for bit; else attention takes what measured fastest.
    """
    if backend == "reference" or (backend == "auto" and device.type != "cuda"):
        return REFERENCE
    from pythia_fast.kernels import checks  # triton, which not every platform has

    if device.type != "cuda" and not checks.INTERPRETED:
        raise InputError(
            "kernels.backend = 'triton' needs a GPU (or TRITON_INTERPRET=1, slow, for tests)"
        )
    return _triton(device, deterministic)


def _triton(device: torch.device, deterministic: bool) -> Ops:
    from pythia_fast import attention
    from pythia_fast.kernels import (
        adam,
        adam_lean,
        cross_entropy,
        cross_entropy_shards,
        gelu,
        layer_norm,
        parallel_residual,
    )
    from pythia_fast.prebuilt import use_prebuilt

    use_prebuilt()
    return Ops(
        name="triton",
        embedding=F.embedding,
        attention=attention.select(device, deterministic),
        attention_decode=attention.decode,
        layer_norm=layer_norm.layer_norm,
        dual_layer_norm=layer_norm.dual_layer_norm,
        parallel_residual=parallel_residual.parallel_residual,
        gelu=gelu.gelu,
        cross_entropy=cross_entropy.cross_entropy,
        cross_entropy_stats=cross_entropy_shards.cross_entropy_stats,
        cross_entropy_combine=cross_entropy_shards.cross_entropy_combine,
        cross_entropy_grad_=cross_entropy_shards.cross_entropy_grad_,
        grad_norm=adam.grad_norm,
        adamw_=adam.adamw_,
        adamw_lean_=adam_lean.adamw_lean_,
    )
