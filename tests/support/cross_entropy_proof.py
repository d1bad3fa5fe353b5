"""Logits that try a cross-entropy, and the loss and gradient of one."""

from __future__ import annotations

import torch
from op_proof import DEVICE, normal
from torch import Tensor


def inputs(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits with a few large ones, and targets that hit the first and the last column."""
    logits = normal(rows, columns, dtype=dtype, scale=3.0)
    targets = torch.randint(columns, (rows,), device=DEVICE)
    targets[0] = columns - 1
    targets[-1] = 0 if rows > 1 else targets[-1]
    return logits, targets


def loss_and_grad(op, logits: Tensor, targets: Tensor, dloss: float, scale: float | None):
    """op's loss and d(dloss · loss)/dlogits, on logits of any strides."""
    leaf = logits.detach().requires_grad_()
    loss = op(leaf, targets, scale)
    (grad,) = torch.autograd.grad(loss, leaf, torch.tensor(dloss, device=logits.device))
    return loss.detach(), grad
