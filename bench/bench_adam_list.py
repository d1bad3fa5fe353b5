"""AdamW over a list of tensors against torch's."""

from __future__ import annotations

import sys

from bench.runner import Peer, main, peer

LABELS = ("adamw_list_",)


def _torch_fused(module):
    """torch's fused AdamW as in `bench_adam.py`, then a pass that casts."""

    def adamw_list_(
        weights, masters, exp_avgs, exp_avg_sqs, grads, decays, lr, step, grad_scale,
        betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
    ):  # fmt: skip
        divisor, finite = grad_scale.reciprocal(), module.zeros_like(grad_scale)
        for decayed, decay in ((True, weight_decay), (False, 0.0)):
            chosen = [i for i, d in enumerate(decays) if d == decayed]
            states = ([t[i] for i in chosen] for t in (masters, grads, exp_avgs, exp_avg_sqs))
            module._fused_adamw_(
                *states, [], [step] * len(chosen), lr=lr, beta1=betas[0], beta2=betas[1],
                weight_decay=decay, eps=eps, amsgrad=False, maximize=False,
                grad_scale=divisor, found_inf=finite,
            )  # fmt: skip
        if weights is not None:
            module._foreach_copy_(weights, masters)

    return adamw_list_


PEERS: dict[str, dict[str, Peer]] = {
    "adamw_list_": {"torch-fused": peer("torch", _torch_fused)},
}


if __name__ == "__main__":
    sys.exit(main(LABELS))
