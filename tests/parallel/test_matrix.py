"""Losses and gradients of every layout against one process; bounds: tests/support/layout_proof.py.

Layouts are data, tensor and pipeline in {1, 2, 4} on 2 to 8 processes, with and without sequence
parallelism where tensor > 1: 25 of them. Schedules, where pipeline > 1: gpipe and 1f1b, interleaved
of two stages a process, zero-bubble of one and of two. Shard modes, where data > 1: none, optimizer,
full; full with a pipeline is refused, which is checked.

    fp32    whole: every layout × every schedule × every shard mode, 118 cells
    bf16    crossed: every layout × every shard mode, schedules in turn, 46 cells

Beyond it: 8 copies, 8 stages, larger microbatches, which are fewer than the stages, and a selection
of layouts with fused blocks. Each cell takes two steps of at least two microbatches a process, on
different rows for every copy, and validates. Not clipped: the norm is compared with the gradients',
and the loss after an update can be exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from layout_proof import Reference, check, check_rows
from parallel_proof import exact_gradients, follow, refusal
from ranks import Ranks

from pythia_fast.parallel.degrees import Degrees

SMALL = """
--model.layers 8 --model.hidden 64 --model.heads 4 --train.micro_batch_size 1 --train.batch_size 8
--train.steps 4 --optimizer.clip 1e9 --optimizer.warmup 0.1
""".split()
SCHEDULES = (
    ("gpipe", 1), ("1f1b", 1), ("interleaved-1f1b", 2), ("zero-bubble", 1), ("zero-bubble", 2),
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    degrees: Degrees
    sequence: bool = False
    schedule: tuple[str, int] = ("1f1b", 1)  # with stages of a process
    shard: str = "none"
    compute: str = "fp32"
    more: str = ""  # flags, of one process too

    @property
    def like(self) -> list[str]:
        """Flags of one process."""
        return [*SMALL, "--precision.compute", self.compute, *self.more.split()]

    @property
    def flags(self) -> list[str]:
        d, (schedule, stages) = self.degrees, self.schedule
        keys = {
            "data": d.data, "tensor": d.tensor, "pipeline": d.pipeline, "schedule": schedule,
            "sequence": str(self.sequence).lower(), "stages_per_rank": stages, "shard": self.shard,
        }  # fmt: skip
        return [*self.like, *(f for k, v in keys.items() for f in (f"--parallel.{k}", str(v)))]

    def __str__(self) -> str:
        d, axes = self.degrees, []
        if d.data > 1:
            axes.append(f"data {d.data} {self.shard}")
        if d.tensor > 1:
            axes.append(f"{'sequence' if self.sequence else 'tensor'} {d.tensor}")
        if d.pipeline > 1:
            axes.append(f"pipeline {d.pipeline} {self.schedule[0]} {self.schedule[1]}")
        more = [self.more.replace("--train.", "")] if self.more else []
        if self.more == FUSED:
            more = ["fused"]
        return ", ".join([*axes, self.compute, *more])


LAYOUTS = [
    (Degrees(pipeline, data, tensor), sequence)
    for data, tensor, pipeline in itertools.product((1, 2, 4), repeat=3)
    if 1 < data * tensor * pipeline <= 8
    for sequence in ((False, True) if tensor > 1 else (False,))
]


def shards(d: Degrees) -> tuple[str, ...]:
    """The modes that differ on such a layout and are accepted."""
    if d.data == 1:
        return ("none",)
    return ("none", "optimizer", "full") if d.pipeline == 1 else ("none", "optimizer")


def fp32() -> list[Cell]:
    return [
        Cell(d, sequence, schedule, shard)
        for d, sequence in LAYOUTS
        for schedule in (SCHEDULES if d.pipeline > 1 else SCHEDULES[1:2])
        for shard in shards(d)
    ]


def bf16() -> list[Cell]:
    turns = itertools.cycle(SCHEDULES)
    return [
        Cell(d, sequence, next(turns) if d.pipeline > 1 else SCHEDULES[1], shard, "bf16")
        for d, sequence in LAYOUTS
        for shard in shards(d)
    ]


SIZE2, SIZE4 = "--train.micro_batch_size 2", "--train.micro_batch_size 4"
BEYOND = [
    *(Cell(Degrees(data=8), shard=shard, more="--train.batch_size 16") for shard in ("none", "optimizer", "full")),
    Cell(Degrees(pipeline=8)),
    Cell(Degrees(pipeline=2), more=SIZE2),
    Cell(Degrees(pipeline=4), more=SIZE4),  # 2 microbatches
    Cell(Degrees(pipeline=4), schedule=("interleaved-1f1b", 2), more=SIZE4),
    Cell(Degrees(pipeline=2), schedule=("interleaved-1f1b", 4)),
    Cell(Degrees(pipeline=2, tensor=2), more="--train.valid_rows 7"),
]  # fmt: skip
# blocks, embedding and head as fused functions, which add up gradients themselves; interpreted
FUSED = (
    "--kernels.backend triton --model.hidden 128 --model.layers 4 --train.batch_size 4"
    " --train.valid_rows 2"
)
D, TP, P2 = Degrees(data=2), Degrees(tensor=2), Degrees(pipeline=2, data=2)
ON_KERNELS = [
    Cell(D, more=FUSED),
    Cell(D, shard="optimizer", more=FUSED),
    Cell(TP, more=FUSED),
    Cell(TP, True, more=FUSED),
    Cell(Degrees(data=2, tensor=2), True, shard="optimizer", more=FUSED),
    Cell(P2, schedule=("zero-bubble", 2), shard="optimizer", more=FUSED),
    Cell(P2, more=FUSED),
    Cell(Degrees(pipeline=2, tensor=2), False, ("zero-bubble", 1), more=FUSED),
    Cell(Degrees(pipeline=2, tensor=2), True, ("zero-bubble", 2), more=FUSED),
]
SAMPLE = {  # what `make test` runs
    "data 2 full, fp32",
    "data 2 optimizer, bf16",
    "tensor 2, bf16",
    "sequence 2, fp32",
    "data 2 none, sequence 2, fp32",
    "data 2 full, tensor 2, fp32",
    "pipeline 2 gpipe 1, fp32",
    "pipeline 2 zero-bubble 2, fp32",
    "pipeline 2 interleaved-1f1b 2, fp32",
    "pipeline 4 1f1b 1, fp32",
    "data 2 optimizer, pipeline 2 1f1b 1, fp32",
    "tensor 2, pipeline 2 zero-bubble 1, fp32",
}
CELLS = [*fp32(), *bf16(), *BEYOND, *ON_KERNELS]


@pytest.fixture(scope="module")
def reference(ranks: Ranks, page: Path) -> Callable[[Cell], Reference]:
    @cache
    def of(compute: str, more: str) -> Reference:
        like = Cell(Degrees(), compute=compute, more=more).like
        one = ranks.call(1, follow, str(page), like, 2)[0]
        microbatches = len(one["rows"]) // (int(more[-1]) if "micro" in more else 1)
        return Reference(one, exact_gradients(str(page), like), compute, microbatches)

    return lambda cell: of(cell.compute, cell.more)


def marked(cell: Cell) -> object:
    return pytest.param(
        cell, id=str(cell), marks=() if str(cell) in SAMPLE else pytest.mark.parallel
    )


@pytest.mark.parametrize("cell", [marked(cell) for cell in CELLS])
def test_a_layout_has_the_losses_and_gradients_of_one_process(
    cell: Cell, ranks: Ranks, page: Path, reference: Callable[[Cell], Reference]
) -> None:
    found = ranks.call(cell.degrees.world, follow, str(page), cell.flags, 2)
    assert all(process["fused"] == (cell.more == FUSED) for process in found)
    check_rows(found, reference(cell).one)
    check(found, reference(cell), cell.degrees)


def test_the_matrix_is_what_it_says() -> None:
    names = [str(cell) for cell in CELLS]
    assert len(names) == len(set(names)) and set(names) >= SAMPLE
    assert (len(LAYOUTS), len(fp32()), len(bf16())) == (25, 118, 46)
    assert {cell.schedule for cell in bf16()} == set(SCHEDULES)


@pytest.mark.parametrize("d", [d for d, s in LAYOUTS if d.data > 1 < d.pipeline and not s], ids=str)
def test_full_sharding_of_a_pipeline_is_refused(d: Degrees, ranks: Ranks, page: Path) -> None:
    for said in ranks.call(d.world, refusal, str(page), Cell(d, shard="full").flags):
        assert said == (
            f"parallel.shard = 'full' with parallel.pipeline = {d.pipeline} is not there yet: "
            "choose shard = 'optimizer'"
        )


DATA2, TENSOR2, PIPELINE2 = Degrees(data=2), Degrees(tensor=2), Degrees(pipeline=2)
BOTH = Cell(Degrees(data=2, tensor=2), True, shard="optimizer")
PIPELINES = Cell(Degrees(data=2, pipeline=2), shard="optimizer")
SAME, DROPPED = "every copy trains on the same rows", "the last microbatch is dropped"
FAULTS = [
    *((SAME, cell) for cell in (Cell(DATA2), Cell(DATA2, shard="full"), BOTH, PIPELINES)),
    *((DROPPED, cell) for cell in (
        Cell(DATA2), Cell(DATA2, shard="full"), Cell(TENSOR2), BOTH, Cell(PIPELINE2), PIPELINES,
        Cell(TENSOR2, compute="bf16"), Cell(PIPELINE2, schedule=("zero-bubble", 1), compute="bf16"),
    )),
    ("every process draws the first part", Cell(TENSOR2)),
    ("partial gradients of the norms' input", Cell(TENSOR2)),
    ("replicated gradients in the norm once a process", Cell(TENSOR2)),
    ("the loss of a microbatch is lost", Cell(PIPELINE2)),
    ("gradients divided by the microbatches", Cell(PIPELINE2)),
    ("a layer left out", Cell(PIPELINE2)),
    ("a step adds to the one before", Cell(PIPELINE2)),
    ("data-parallel sums set off a microbatch early", PIPELINES),
    ("microbatches add up in autograd", Cell(PIPELINE2, schedule=("zero-bubble", 1), compute="bf16")),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "cell"), FAULTS, ids=str)
def test_faults_are_seen(
    fault: str, cell: Cell, ranks: Ranks, page: Path, reference: Callable[[Cell], Reference]
) -> None:
    found = ranks.call(cell.degrees.world, follow, str(page), cell.flags, 2, fault)
    with pytest.raises(AssertionError):
        check(found, reference(cell), cell.degrees)
    if fault == SAME:
        with pytest.raises(AssertionError):
            check_rows(found, reference(cell).one)
