"""check_promises.py INDEX: the cubins keep what their cases promise (`aot.violations`)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

rows = json.loads(Path(sys.argv[1]).read_text())
broken = [f"{r['name']}: {r['gpu']}: {line}" for r in rows for line in r["violations"]]
print(
    "\n".join(broken)
    or f"{len(rows)} cubins: registers, spills, shared memory, accesses, programs an SM"
)
sys.exit(1 if broken or not rows else 0)
