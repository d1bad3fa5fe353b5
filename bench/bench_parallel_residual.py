"""Parallel residual, alone and with the next block's dual LayerNorm, against torch."""

from __future__ import annotations

import sys

from bench.runner import main

LABELS = ("parallel_residual", "parallel_residual_dual_layer_norm")


if __name__ == "__main__":
    sys.exit(main(LABELS))
