"""`pythia-fast` with a fault: `torchrun ... tests/support/faulty.py HOW PHASE RANK STEP train ...`.

The fault strikes in the first attempt alone, so that a restart by torchrun goes through.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    from launched import Fault, arm

    from pythia_fast.cli import main

    how, phase, rank, step = sys.argv[1:5]
    fault = Fault(how, phase, int(rank), int(step))
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if first and int(os.environ["RANK"]) == fault.rank:
        arm(fault)
    sys.exit(main(sys.argv[5:]))
