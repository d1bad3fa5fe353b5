"""An embedding's gradient into its rows, against torch's dense gradient that is then added."""

from __future__ import annotations

import sys

from bench.runner import Peer, main, peer

LABELS = ("embedding_grad_",)


def _dense(module):
    """What autograd and an accumulation launch: (V, h) made anew in dy's dtype, then added."""

    def embedding_grad_(grad, dy, ids, add=True):
        dense = module.ops.aten.embedding_dense_backward(dy, ids, len(grad), -1, False)
        if add:
            grad.add_(dense)
        else:
            grad.copy_(dense)

    return embedding_grad_


PEERS: dict[str, dict[str, Peer]] = {"embedding_grad_": {"torch-dense": peer("torch", _dense)}}


if __name__ == "__main__":
    sys.exit(main(LABELS))
