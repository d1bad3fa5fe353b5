"""AdamW over flat buffers, and the gradient norm, against torch's and apex's AdamW."""

from __future__ import annotations

import sys

import torch

from bench.runner import Peer, main, peer

LABELS = ("adamw_", "grad_norm")
APEX_CHUNK = 2048 * 32  # elements a block, multi_tensor_applier's own


def _torch_fused(module):
    """torch's fused AdamW on the fp32 master, gradients scaled on the way, then a pass that casts.

    Its interface divides by grad_scale (GradScaler's) and writes the result over the gradient.
    """

    def adamw_(
        weight, master, exp_avg, exp_avg_sq, grad, decay_until, lr, step, grad_scale,
        betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
    ):  # fmt: skip
        divisor, finite = grad_scale.reciprocal(), module.zeros_like(grad_scale)
        for part, decay in ((slice(decay_until), weight_decay), (slice(decay_until, None), 0.0)):
            states = ([t[part]] for t in (master, grad, exp_avg, exp_avg_sq))
            module._fused_adamw_(
                *states, [], [step], lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=decay,
                eps=eps, amsgrad=False, maximize=False, grad_scale=divisor, found_inf=finite,
            )  # fmt: skip
        if weight is not None:
            weight.copy_(master)

    return adamw_


def _apex(module):
    """What apex's FusedAdam(capturable=True) launches on fp32 tensors, then a pass that casts."""

    def adamw_(
        weight, master, exp_avg, exp_avg_sq, grad, decay_until, lr, step, grad_scale,
        betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
    ):  # fmt: skip
        skip, count = step.new_zeros(1, dtype=torch.int32), step.int()
        for part, decay in ((slice(decay_until), weight_decay), (slice(decay_until, None), 0.0)):
            states = [[t[part]] for t in (grad, master, exp_avg, exp_avg_sq)]
            module.multi_tensor_adam_capturable(
                APEX_CHUNK, skip, states, lr, *betas, eps, count, 1, 1, decay, grad_scale
            )
        if weight is not None:
            weight.copy_(master)

    return adamw_


PEERS: dict[str, dict[str, Peer]] = {
    "adamw_": {"torch-fused": peer("torch", _torch_fused), "apex": peer("amp_C", _apex)},
}


if __name__ == "__main__":
    sys.exit(main(LABELS))
