"""What all processes of a launch must have alike: the page, the token files."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pythia_fast.config import Config, flatten
from pythia_fast.data.loader import batch_digest
from pythia_fast.data.order import Rows
from pythia_fast.errors import InputError
from pythia_fast.parallel.mesh import Mesh
from pythia_fast.run_lock import holder

_SEEN = 5.0  # seconds in which what rank 0 wrote is seen by all
_SAMPLE = 64  # rows that all processes compare, spread over the run


def check_same_page(pages: Sequence[Config]) -> None:
    """Raises InputError naming the first key in which the page of a rank is not that of rank 0."""
    flat = [flatten(page) for page in pages]
    for key, value in flat[0].items():
        for rank, page in enumerate(flat):
            if page[key] != value:
                raise _shared(
                    f"rank {rank} has {key} = {page[key]!r}, rank 0 {value!r}: "
                    "all processes need the same page and flags"
                )


def check_same_directory(mesh: Mesh, run: Path) -> None:
    """Raises InputError on all processes where one does not see the directory that rank 0 holds."""
    wanted = mesh.together(lambda: holder(run) if mesh.main else "")[0]

    def sees() -> bool:
        until = time.monotonic() + _SEEN
        while not wanted or holder(run) != wanted:  # a network's disk may be a moment behind
            if time.monotonic() > until:
                return False
            time.sleep(0.1)
        return True

    for rank, here in enumerate(mesh.together(sees)):
        if not here:
            raise _shared(
                f"rank {rank} does not see the run directory of rank 0: {run} must be on a file "
                "system that all processes share"
            )


def check_same_data(mesh: Mesh, rows: Rows, c: Config) -> None:
    """Raises InputError on all processes where one would train on other tokens than the first.

    Each reads its own rows alone and the ledger is the first one's, so that nothing later would
    tell. Compares what identifies files and order, and 64 rows spread over the run.
    """
    if mesh.degrees.world == 1:
        return
    last = c.train.steps * c.train.batch_size - 1

    def sample() -> tuple[Any, ...]:
        places = sorted({round(i * last / (_SAMPLE - 1)) for i in range(_SAMPLE)})
        tokens = np.concatenate([rows.tokens(p, p + 1) for p in places])
        return rows.fingerprint, batch_digest(tokens)

    found = mesh.together(sample)
    for rank, one in enumerate(found):
        if one != found[0]:
            raise _shared(f"rank {rank} reads other data at {c.data.prefix} than rank 0")


def _shared(line: str) -> InputError:
    error = InputError(line)
    error.shared = True  # all processes have compared, and all raise it
    return error
