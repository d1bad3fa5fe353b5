"""What a process sees of a rehearsal: the launches, or the cubins made on the way.

python tests/support/rehearsed.py launches PAGE     a JSON line a launch, of a GPU of no name
python tests/support/rehearsed.py all PAGES         what rehearsing every single rank adds to that
python tests/support/rehearsed.py cubins PAGE       how many are compiled for an H100
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from pythia_fast import rehearsal
from pythia_fast.config import Config, load
from pythia_fast.parallel.degrees import degrees

FAULTS: dict[str, tuple[str, Any]] = {
    "the first stage alone": ("different_stages", lambda config: [0]),
    "one data-parallel process": ("counts", lambda *_: ()),
    "one tensor-parallel process": ("vocabulary_start", lambda *_: (True,)),
}


def facts(kernel: Any, keywords: dict[str, Any]) -> str:
    """What Triton may make a kernel of its own for, and more: every integer as it is."""
    seen: dict[str, Any] = {}
    for name, value in keywords.items():
        if isinstance(value, torch.Tensor | rehearsal.Argument):
            seen[name] = [str(value.dtype), value.data_ptr() % 16 == 0]
        elif type(value) is int and "constexpr" not in str(kernel.fn.__annotations__.get(name)):
            seen[name] = value
        else:
            seen[name] = "a number" if isinstance(value, float) else repr(value)
    return json.dumps([kernel.__name__, seen], sort_keys=True)


def kind(fact: str) -> str:
    """The same with what Triton asks of an integer in its place: is it 1, 16·n, of 32 bits?"""
    name, seen = json.loads(fact)
    for key, n in seen.items():
        if type(n) is int:
            seen[key] = [n == 1, n % 16 == 0, -(2**31) <= n < 2**31]
    return json.dumps([name, seen], sort_keys=True)


@contextmanager
def recorded() -> Iterator[set[str]]:
    """Launches under the interpreter."""
    from triton.runtime.interpreter import InterpretedFunction

    seen, interpret = set[str](), InterpretedFunction.run

    def run(self: Any, *arguments: Any, **keywords: Any) -> Any:
        given = {k: v for k, v in keywords.items() if k not in ("grid", "warmup")}
        seen.add(facts(self, given))
        return interpret(self, *arguments, **keywords)

    with patch.object(InterpretedFunction, "run", run):
        yield seen


def launches_of_a_rank(page: str) -> set[str]:
    """Of a step and of held-out rows, on one process of several."""
    from parallel_proof import step, trainer_at_start

    from pythia_fast.parallel.mesh import joined

    config = load(page)
    with joined(config) as mesh, recorded() as seen:
        trainer = trainer_at_start(config, mesh, Path(page).parent / "no-run")
        step(trainer, 0)
        trainer.validate()
    return seen


class Launches:
    """Of rehearsals, by the rank that rehearses: in the place of compilation."""

    def __init__(self) -> None:
        from triton.runtime.jit import JITFunction

        self.by_rank: dict[int, set[str]] = {}
        of_one = rehearsal.rehearse_rank

        def rank(config: Config, mesh: Any) -> Any:
            self._now = self.by_rank.setdefault(mesh.rank, set())
            return of_one(config, mesh)

        def run(kernel: Any, *, grid: Any, warmup: bool, **keywords: Any) -> Any:
            self._now.add(facts(kernel, keywords))
            return SimpleNamespace(hash="")

        rehearsal.rehearse_rank, JITFunction.run = rank, run
        # no multiprocessors: launchers count 3 programs
        rehearsal.stand_in(rehearsal.Chip(90, 0, 227 * 1024))

    def of(self, rehearsal: Callable[[], Any]) -> dict[int, set[str]]:
        self.by_rank.clear()
        rehearsal()
        return dict(self.by_rank)


def left_out(config: Config, launches: Launches) -> dict[str, int]:
    """Kinds of launches that a rehearsal lacks and that of every single rank has, by fault.

    "": without one. "ranks": how many rehearse.
    """
    whole = degrees(config, config.parallel.processes)

    def every_rank() -> None:
        for rank in range(whole.world):
            with rehearsal.place(whole, rank) as mesh:
                rehearsal.rehearse_rank(config, mesh)

    wanted, found = kinds(launches.of(every_rank)), {}
    for fault in ("", *FAULTS):
        with patch.object(rehearsal, *FAULTS[fault]) if fault else nullcontext():
            some = launches.of(lambda: rehearsal.rehearse(config))
        assert kinds(some) <= wanted
        found |= {fault: len(wanted - kinds(some))} | ({} if fault else {"ranks": len(some)})
    return found


def kinds(by_rank: dict[int, set[str]]) -> set[str]:
    return {kind(fact) for seen in by_rank.values() for fact in seen}


def main(what: str, *pages: str) -> None:
    from triton.backends.nvidia.compiler import CUDABackend

    if what == "cubins":
        made, make_cubin = [], CUDABackend.make_cubin

        def counted(self: Any, *arguments: Any) -> Any:
            made.append(1)
            return make_cubin(self, *arguments)

        CUDABackend.make_cubin = counted
        rehearsal.stand_in(rehearsal.CHIPS["H100"])
        rehearsal.rehearse(load(pages[0]))
        print(len(made))
        return
    launches = Launches()
    for config in map(load, pages):
        if what == "all":
            print(json.dumps(left_out(config, launches)))
            continue
        by_rank = launches.of(lambda: rehearsal.rehearse(config))  # noqa: B023
        print(json.dumps({rank: sorted(seen) for rank, seen in by_rank.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
