"""Head product and cross entropy, forward and backward together, against torch, Liger and QuACK."""

from __future__ import annotations

import sys

import torch

from bench.runner import Peer, main, peer

LABELS = ("linear_cross_entropy",)


def _liger(module):
    def linear_cross_entropy(x, weight, targets, scale, chunk_rows):
        """Chooses its own chunks."""
        loss = module.liger_fused_linear_cross_entropy(
            x, weight, targets, reduction="sum", accum_dtype=torch.float32
        )
        return loss * scale

    return linear_cross_entropy


def _quack(module):
    def linear_cross_entropy(x, weight, targets, scale, chunk_rows):
        loss = module.chunked_linear_cross_entropy(
            x, weight, targets, chunk_size=chunk_rows, reduction="sum"
        )
        return loss * scale

    return linear_cross_entropy


PEERS: dict[str, dict[str, Peer]] = {
    "linear_cross_entropy": {
        "liger": peer("liger_kernel.transformers.functional", _liger),
        "quack": peer("quack.linear_cross_entropy", _quack),
    }
}


if __name__ == "__main__":
    sys.exit(main(LABELS))
