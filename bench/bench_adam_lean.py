"""AdamW on 8 bytes of state a parameter; peers that keep fp32 states are in `bench_adam.py`."""

from __future__ import annotations

import sys

from bench.runner import main

LABELS = ("adamw_lean_",)


if __name__ == "__main__":
    sys.exit(main(LABELS))
