"""LayerNorm and dual LayerNorm, against torch, Liger and apex."""

from __future__ import annotations

import sys

from bench.runner import Peer, main, peer

LABELS = ("layer_norm", "dual_layer_norm")


def _named(norm):
    """Our argument names for a function that takes (x, weight, bias, eps) by position."""

    def layer_norm(x, weight, bias, eps=1e-5):
        return norm(x, weight, bias, eps)

    return layer_norm


def _liger(module):
    return _named(module.liger_layer_norm)


def _apex(module):
    return _named(lambda x, w, b, eps: module.fused_layer_norm_affine(x, w, b, w.shape, eps))


def _apex_fast(module):
    return _named(module._fast_layer_norm)


def _twice(adapt):
    """The pair, as two norms of the same x; autograd adds the three gradients of x."""

    def of(module):
        norm = adapt(module)

        def dual_layer_norm(x, weight1, bias1, weight2, bias2, eps=1e-5):
            return x, norm(x, weight1, bias1, eps), norm(x, weight2, bias2, eps)

        return dual_layer_norm

    return of


_PACKAGES = {
    "liger": ("liger_kernel.transformers.functional", _liger),
    "apex": ("apex.normalization.fused_layer_norm", _apex),
    "apex-fast": ("apex.contrib.layer_norm.layer_norm", _apex_fast),
}
PEERS: dict[str, dict[str, Peer]] = {
    "layer_norm": {name: peer(module, adapt) for name, (module, adapt) in _PACKAGES.items()},
    "dual_layer_norm": {
        name: peer(module, _twice(adapt)) for name, (module, adapt) in _PACKAGES.items()
    },
}


if __name__ == "__main__":
    sys.exit(main(LABELS))
