"""Partial rotary in place on packed qkv, against torch, QuACK and flash-attn."""

from __future__ import annotations

import sys

from bench.runner import Peer, main, peer

LABELS = ("rotary",)


def _quack(module):
    """Writes q and k in place, as views of qkv."""

    def rotary(qkv, cos, sin):
        head_dim = qkv.shape[-1] // 3
        for part in (qkv[..., :head_dim], qkv[..., head_dim : 2 * head_dim]):
            module.apply_rotary_emb(part, cos, sin, inplace=True)
        return qkv

    return rotary


def _flash_attn(module):
    """QuACK's interface, with tables of the input's dtype."""

    def rotary(qkv, cos, sin):
        return _quack(module)(qkv, cos.to(qkv.dtype), sin.to(qkv.dtype))

    return rotary


PEERS: dict[str, dict[str, Peer]] = {
    "rotary": {
        "quack": peer("quack.rotary", _quack),
        "flash-attn": peer("flash_attn.layers.rotary", _flash_attn),
    }
}


if __name__ == "__main__":
    sys.exit(main(LABELS))
