"""Cross entropy in place, forward and backward together."""

from __future__ import annotations

import sys

from bench.runner import Peer, main, peer

LABELS = ("cross_entropy",)


def _liger(module):
    def cross_entropy(logits, targets, scale):
        return module.liger_cross_entropy(logits, targets, reduction="sum") * scale

    return cross_entropy


def _quack(module):
    def cross_entropy(logits, targets, scale):
        loss = module.cross_entropy(logits, targets, reduction="sum", inplace_backward=True)
        return loss * scale

    return cross_entropy


def _flash_attn(module):
    def cross_entropy(logits, targets, scale):
        losses, _ = module.cross_entropy_loss(logits, targets, inplace_backward=True)
        return losses.sum() * scale

    return cross_entropy


PEERS: dict[str, dict[str, Peer]] = {
    "cross_entropy": {
        "liger": peer("liger_kernel.transformers.functional", _liger),
        "quack": peer("quack.cross_entropy", _quack),
        "flash-attn": peer("flash_attn.ops.triton.cross_entropy", _flash_attn),
    }
}


if __name__ == "__main__":
    sys.exit(main(LABELS))
