"""Cross entropy of a split vocabulary: a shard's statistics, their combination, its gradient."""

from __future__ import annotations

import sys

from bench.runner import main

LABELS = ("cross_entropy_stats", "cross_entropy_combine", "cross_entropy_grad_")


if __name__ == "__main__":
    sys.exit(main(LABELS))
