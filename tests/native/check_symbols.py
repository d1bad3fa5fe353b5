"""check_symbols.py HEADER LIBRARY INDEX: what the header declares is what the library exports.

No name is missing and none is beside them; nothing of CUDA is left to be linked; every case of the
index has its function. Types and members: expected.py.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path


def symbols(library: str, which: str) -> set[str]:
    done = subprocess.run(["nm", "-D", which, library], capture_output=True, text=True, check=True)
    return {line.split()[-1].partition("@")[0] for line in done.stdout.splitlines()}


header, library, index = sys.argv[1:]
lines = Path(header).read_text().splitlines()
text = " ".join(line for line in lines if not line.startswith("#"))
text = re.sub(r"\s+", " ", text)
declared = set(re.findall(r"PYTHIA_KERNELS_API [\w *]*?(\w+)\(", text))
exported = symbols(library, "--defined-only")
assert declared == exported, sorted(declared ^ exported)[:9]
undefined = symbols(library, "--undefined-only")
assert not [s for s in undefined if re.match(r"cu[A-Z]", s)], undefined
rows = json.loads(Path(index).read_text())
missing = {f"pythia_{row['name']}" for row in rows} - declared
assert not missing, sorted(missing)[:9]
print(f"{len(declared)} functions, {len(rows)} cases")
