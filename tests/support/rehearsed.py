"""What a process sees of a rehearsal: the launches, or the cubins made on the way.

python tests/support/rehearsed.py launches PAGE     a JSON line a launch, of a GPU of no name
python tests/support/rehearsed.py cubins PAGE       how many are compiled for an H100
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from pythia_fast.rehearsal import Argument


def facts(kernel: str, keywords: dict[str, Any]) -> str:
    """What Triton may make a kernel of its own for, and more: every integer as it is."""
    seen: dict[str, Any] = {}
    for name, value in keywords.items():
        if isinstance(value, torch.Tensor | Argument):
            seen[name] = [str(value.dtype), value.data_ptr() % 16 == 0]
        else:
            seen[name] = "a number" if isinstance(value, float) else repr(value)
    return json.dumps([kernel, seen], sort_keys=True)


def main(what: str, page: str) -> None:
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import JITFunction

    from pythia_fast import rehearsal
    from pythia_fast.config import load

    if what == "launches":

        def run(self: Any, *, grid: Any, warmup: bool, **keywords: Any) -> Any:
            print(facts(self.__name__, keywords))
            return SimpleNamespace(hash="")

        JITFunction.run = run
        chip = rehearsal.Chip(90, 0, 227 * 1024)  # no multiprocessors: launchers count 3 programs
        rehearsal.stand_in(chip)
        rehearsal.rehearse(load(Path(page), []))
        return
    made = []
    make_cubin = CUDABackend.make_cubin

    def counted(self: Any, *arguments: Any) -> Any:
        made.append(1)
        return make_cubin(self, *arguments)

    CUDABackend.make_cubin = counted
    rehearsal.stand_in(rehearsal.CHIPS["H100"])
    rehearsal.rehearse(load(Path(page), []))
    print(len(made))


if __name__ == "__main__":
    main(*sys.argv[1:])
