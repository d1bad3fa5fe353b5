"""Attention with rotary on packed qkv, against torch's flash and cuDNN, flash-attn 2 and 3.

Every implementation turns q and k; torch's and flash-attn's by this project's rotation kernel, in
place, so that attention is what differs. Ours repeats its gradients bit for bit; a peer does where
its name says "in order".
"""

from __future__ import annotations

import sys
from functools import partial

import torch

from bench.runner import Peer, main, peer

LABELS = ("attention", "attention any order", "attention documents")


def _torch(backend: str):
    def adapt(module):
        from torch.nn.attention import SDPBackend

        return partial(module.of_torch, backend=SDPBackend[backend])

    return adapt


def _flash_attn(deterministic: bool):
    def adapt(module):
        from pythia_fast.kernels.rotary import rotary

        def attention(qkv, cos, sin):
            q, k, v = rotary(qkv, cos, sin).chunk(3, dim=-1)
            out = module.flash_attn_func(q, k, v, causal=True, deterministic=deterministic)
            return (out[0] if isinstance(out, tuple) else out).flatten(-2)

        return attention

    return adapt


def _deterministic(name: str, adapt) -> Peer:
    """Torch's gradients repeat where it is asked for; a case has its process to itself.

    Fresh tensors are not filled, which costs a pass over each.
    """

    def load():
        function = peer(name, adapt)()
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        return function

    return load


def _any_order(name: str, adapt) -> Peer:
    """Torch's and flash-attn's gradients come in any order unless asked otherwise."""

    def load():
        function = peer(name, adapt)()
        return lambda qkv, cos, sin, deterministic: function(qkv, cos, sin)

    return load


_ANY_ORDER = {
    "sdpa flash": ("pythia_fast.attention", _torch("FLASH_ATTENTION")),
    "sdpa cudnn": ("pythia_fast.attention", _torch("CUDNN_ATTENTION")),
    "flash-attn": ("flash_attn", _flash_attn(False)),
    "flash-attn 3": ("flash_attn_interface", _flash_attn(False)),
}
_IN_ORDER = {
    "sdpa flash in order": _deterministic("pythia_fast.attention", _torch("FLASH_ATTENTION")),
    "sdpa cudnn in order": _deterministic("pythia_fast.attention", _torch("CUDNN_ATTENTION")),
    "flash-attn in order": peer("flash_attn", _flash_attn(True)),
    "flash-attn 3 in order": peer("flash_attn_interface", _flash_attn(True)),
}
PEERS: dict[str, dict[str, Peer]] = {
    "attention": {name: peer(*package) for name, package in _ANY_ORDER.items()} | _IN_ORDER,
    "attention any order": {name: _any_order(*package) for name, package in _ANY_ORDER.items()},
}


if __name__ == "__main__":
    sys.exit(main(LABELS))
