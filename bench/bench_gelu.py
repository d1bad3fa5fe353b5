"""Bias and GELU, tanh and erf forms, against torch (Liger, apex and QuACK have no such op)."""

from __future__ import annotations

import sys

from bench.runner import main

LABELS = ("gelu tanh", "gelu erf")


if __name__ == "__main__":
    sys.exit(main(LABELS))
