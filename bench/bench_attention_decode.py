"""Attention of one new position over a cache of keys and values, as generation has it."""

from __future__ import annotations

import sys

from bench.runner import main

LABELS = ("attention_decode", "attention_decode padded")


if __name__ == "__main__":
    sys.exit(main(LABELS))
