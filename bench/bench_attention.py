"""Attention with rotary on packed qkv, against torch's flash and cuDNN, flash-attn 2 and 3.

Every implementation turns q and k; torch's and flash-attn's by this project's rotation kernel, in
place, so that attention is what differs.
"""

from __future__ import annotations

import sys
from functools import partial

from bench.runner import Peer, main, peer

LABELS = ("attention", "attention any order", "attention documents")


def _torch(backend: str):
    def adapt(module):
        from torch.nn.attention import SDPBackend

        return partial(module.of_torch, backend=SDPBackend[backend])

    return adapt


def _flash_attn(module):
    from pythia_fast.kernels.rotary import rotary

    def attention(qkv, cos, sin):
        out = module.flash_attn_func(*rotary(qkv, cos, sin).chunk(3, dim=-1), causal=True)
        return (out[0] if isinstance(out, tuple) else out).flatten(-2)

    return attention


def _any_order(name: str, adapt) -> Peer:
    """Torch's and flash-attn's gradients come in any order unless asked otherwise."""

    def load():
        function = peer(name, adapt)()
        return lambda qkv, cos, sin, deterministic: function(qkv, cos, sin)

    return load


_PACKAGES = {
    "sdpa flash": ("pythia_fast.attention", _torch("FLASH_ATTENTION")),
    "sdpa cudnn": ("pythia_fast.attention", _torch("CUDNN_ATTENTION")),
    "flash-attn": ("flash_attn", _flash_attn),
    "flash-attn 3": ("flash_attn_interface", _flash_attn),
}
PEERS: dict[str, dict[str, Peer]] = {
    "attention": {name: peer(*package) for name, package in _PACKAGES.items()},
    "attention any order": {name: _any_order(*package) for name, package in _PACKAGES.items()},
}


if __name__ == "__main__":
    sys.exit(main(LABELS))
